"""The whole GPT-2 family through the scripts: one joint training step, export, evaluation; what fits into memory.

    python benchmark/family.py --tokenizer gpt2 --train_file train-v1.1.json --validation_file dev-v1.1.json \\
        --output results/family.json
    python benchmark/family.py ... --sizes distilgpt2 gpt2-xl --memory_gib 24

Random weights of each size, batch 1, windows of --max_seq_length; each stage is a command of this repository in a
process of its own, whose peak memory its record says. A stage that asks for more than --memory_gib, or fails, ends its
size. The export has the published hybrid by block fraction. Models of one size are removed before the next is made.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "configs"), str(ROOT / "base_model")]
from show import SIZES  # noqa: E402

from common.record import run_record, write_json_atomic  # noqa: E402
from common.statistics import markdown_table  # noqa: E402
from models.errors import UserError  # noqa: E402
from models.user_input import read_json  # noqa: E402

HYBRID = ROOT / "configs" / "hybrid_25pct_4bit.json"
GIB = 2**30


def make_stock(name, tokenizer, folder):
    """A stock GPT-2 of that size with random weights in a folder."""
    layers, width = SIZES[name]
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, vocab_size=len(tokenizer))
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def stages(work, args):
    """{stage: its command}; the records go to records/STAGE.json in the folder `work`."""
    train, export, record = work / "train", work / "export", work / "records"
    data = ["--validation_file", args.validation_file, "--max_seq_length", args.max_seq_length]
    joint = ["--dataset_name", "squad", "--train_file", args.train_file, *data, "--do_train", "--max_steps", 1]
    joint += ["--bit_widths", 4, 8, "--per_device_train_batch_size", 1, "--curriculum", 0, "--eval_strategy", "no"]
    joint += ["--max_train_samples", 64, "--calibration_samples", 8, "--quantizer", args.quantizer, "--seed", 0]
    joint += ["--report_to", "none", *(["--use_cpu"] if args.use_cpu else [])]
    serve = ["--dataset_name", "squad", *data, "--per_device_eval_batch_size", 4, "--max_eval_samples", 16]
    commands = {
        "train": ["run_qa.py", "--model_name_or_path", work / "model", "--output_dir", train, *joint],
        "export": ["export.py", "--model_name_or_path", train, "--output_dir", export, "--bit_configs", HYBRID],
        "evaluate": ["run_qa_eval.py", "--model_name_or_path", export, "--output_dir", work / "eval", *serve],
    }
    script = ROOT / "switch_precision"
    return {
        name: ([sys.executable, script / words[0], *words[1:], "--record_file", record / f"{name}.json"])
        for name, words in commands.items()
    }


def run(command, limit):
    """(exit status, last line of the output) of a process that may take so many bytes."""

    def limited():
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    done = subprocess.run([*map(str, command)], capture_output=True, text=True, preexec_fn=limited)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return done.returncode, lines[-1][-300:] if lines else ""


def measure(name, args):
    """What the stages of one size took, and what failed."""
    found = {"blocks": SIZES[name][0], "width": SIZES[name][1], "stages": {}}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        make_stock(name, AutoTokenizer.from_pretrained(args.tokenizer), work / "model")
        for stage, command in stages(work, args).items():
            status, last = run(command, args.memory_gib * GIB)
            if status:
                found["stages"][stage] = {"failed": re.sub(re.escape(folder), "", last), "status": status}
                break
            told = read_json(work / "records" / f"{stage}.json")
            found["stages"][stage] = {
                "peak_bytes": told["peak_memory_bytes"]["cuda" if torch.cuda.is_available() else "host"],
                "seconds": told["wall_seconds"],
            }
            if stage == "export":
                found["file_bytes"] = told["files"]["model.safetensors"]
                layers = next(iter(told["bit_config"]["layers"].values()))
                found["linears_at_4_bits"] = sum(bits["w_bits"] == 4 for bits in layers.values())
            print(f"{name}: {stage}: {found['stages'][stage]}", flush=True)
    return found


def table_lines(sizes):
    """The table as markdown."""
    cells = []
    for name, found in sizes.items():
        size = f"{found['file_bytes'] / 1e6:.0f}" if "file_bytes" in found else ""
        row = [name, str(found["blocks"]), str(found.get("linears_at_4_bits", "")), size]
        for stage in ("train", "export", "evaluate"):
            told = found["stages"].get(stage, {})
            peak = f"{told['peak_bytes'] / GIB:.1f}" if "peak_bytes" in told else "failed" if told else ""
            row.append(peak)
        cells.append(row)
    return markdown_table(
        ["model", "blocks", "at 4 bits", "export MB", "train GiB", "export GiB", "evaluate GiB"], cells
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default="gpt2", help="hub name or folder of GPT-2's tokenizer")
    parser.add_argument("--train_file", required=True, help="SQuAD's training file")
    parser.add_argument("--validation_file", required=True, help="SQuAD's dev file")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="models (default: all)")
    parser.add_argument("--quantizer", choices=("minmax", "rotated"), default="rotated", help="of the training")
    parser.add_argument("--max_seq_length", type=int, default=384, help="tokens of a window")
    parser.add_argument("--memory_gib", type=int, default=24, help="what a stage may take of the host's memory")
    parser.add_argument("--use_cpu", action="store_true", help="train on the CPU where there is a GPU")
    parser.add_argument("--work", default=None, help="where models go for the time of a size (default: the system's)")
    parser.add_argument("--output", required=True, help="the JSON record")
    args = parser.parse_args()
    for name in ("train_file", "validation_file"):
        if not os.path.isfile(getattr(args, name)):
            sys.exit(f"error: --{name} {getattr(args, name)}: no such file")
    started = time.time()
    try:
        sizes = {name: measure(name, args) for name in args.sizes}
    except (UserError, OSError) as fault:
        sys.exit(f"error: {fault}")
    print("\n".join(table_lines(sizes)))
    record = run_record(
        model="GPT-2 sizes, random weights",
        bit_config={"export": HYBRID.name, "training": "joint W8A8KV8, W4A4KV4", "quantizer": args.quantizer},
        metrics={"failed": sum("failed" in stage for found in sizes.values() for stage in found["stages"].values())},
        data={},
        seed=0,
        wall_seconds=time.time() - started,
        sizes=sizes,
        memory_gib=args.memory_gib,
    )
    write_json_atomic(args.output, record)


if __name__ == "__main__":
    main()
