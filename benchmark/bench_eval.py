"""Questions a second of the SQuAD evaluation: on integers, batches by length, against fake quantization padded to 786.

    python benchmark/bench_eval.py --tokenizer ../gpt2 --validation_file dev-v1.1.json      # about 10 minutes

GPT-2 124M size with random weights and a LoRA bank, through base_model/run_qa_eval.py. Forward passes,
post-processing and scores count; loading and tokenizing, which both need once, do not. The padded way, that of the
published code, runs on the first questions only, before and after the other, which takes them all.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import torch
from transformers import AutoTokenizer, GPT2Config

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "base_model"))
from common.checksums import file_checksum  # noqa: E402
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering  # noqa: E402
from timing import write_record  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder or hub name of GPT-2's tokenizer")
    parser.add_argument("--validation_file", required=True, help="SQuAD v1.1 JSON")
    parser.add_argument("--bit_config", default="W8A8KV8", help="JSON file or short form")
    parser.add_argument("--padded_questions", type=int, default=96, help="questions of the padded way")
    parser.add_argument("--max_eval_samples", type=int, help="questions of the other way (default: all)")
    parser.add_argument("--layers", type=int, default=12, help="blocks (12 is GPT-2 124M)")
    parser.add_argument("--output", help="also write the figures to this JSON file")
    args = parser.parse_args()
    started = time.time()

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = QuantGPT2ForQuestionAnswering(GPT2Config(n_layer=args.layers))
        model.add_lora([4, 8])
        model.save_pretrained(os.path.join(folder, "model"))
        AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(os.path.join(folder, "model"))

        def evaluate(name, execution, *flags):
            """(questions, seconds) of an evaluation as a user runs it."""
            record = os.path.join(folder, f"{name}.json")
            command = [sys.executable, os.path.join(ROOT, "base_model", "run_qa_eval.py"), "--do_eval"]
            command += ["--model_name_or_path", os.path.join(folder, "model"), "--bit_configs", args.bit_config]
            command += ["--validation_file", args.validation_file, "--max_seq_length", "786", "--num_bootstrap", "10"]
            command += ["--per_device_eval_batch_size", "32", "--execution", execution, *flags]
            command += ["--output_dir", os.path.join(folder, name), "--record_file", record]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            with open(record, encoding="utf-8") as file:
                found = json.load(file)
            questions, seconds = found["data"]["validation"]["examples"], found["rows"][0]["seconds"]
            print(f"{name}: {questions} questions in {seconds:.1f} s, {questions / seconds:.2f} a second", flush=True)
            return questions, seconds

        padded = ("fake", "--pad_to_max_length", "--max_eval_samples", str(args.padded_questions))
        limit = ("--max_eval_samples", str(args.max_eval_samples)) if args.max_eval_samples else ()
        before = evaluate("padded to 786, fake", *padded)
        ours = evaluate("by length, integer", "integer", *limit)
        after = evaluate("padded to 786, fake, again", *padded)
    slow, fast = [questions / seconds for questions, seconds in (before, after)], ours[0] / ours[1]
    ratios = sorted(fast / speed for speed in slow)
    print(f"{ratios[0]:.1f} to {ratios[1]:.1f} times as many questions a second")
    metrics = {"questions_per_second": fast, "padded_questions_per_second": slow, "ratios": ratios}
    data = {"validation": {"questions": ours[0], "sha256": file_checksum(args.validation_file)}}
    del args.tokenizer  # a path of this machine
    write_record(args, started, metrics, {"name": args.bit_config}, data)


if __name__ == "__main__":
    main()
