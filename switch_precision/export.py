#!/usr/bin/env python
"""Write the deployable form of a checkpoint: integer weights at the widths that the given configs need, packed.

    python export.py --model_name_or_path results/train --bit_configs ../configs/hybrid_25pct_4bit.json \\
        --output_dir results/hybrid
    python export.py --model_name_or_path results/train --bit_configs 8 4 --output_dir results/both     # switchable

The folder opens like any checkpoint (run_qa_eval.py, from_pretrained) and needs neither the frozen base nor float32
weights. It opens at the first config, and serves every assignment of the widths that it has. With --validation_file or
--dataset_name, its answers are compared with those of the checkpoint, and the record says how many differ.
--quantizer rotated needs --train_file or --dataset_name where the checkpoint has no rotation.

    python export.py --model_name_or_path results/train --merge --bit_config 4 --output_dir results/merged4
    python export.py --model_name_or_path results/train --peft 8 --output_dir results/peft8

--merge folds the adapters of one config into the weights before they are quantized: no LoRA pass, other numbers.
--peft writes one adapter and the head, in float, in the files of peft, for stock GPT-2.
"""

import dataclasses
import os
import tempfile
import time

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from common.arguments import CheckpointArguments, option
from common.data import set_qa_quantizer
from common.flags import parse_args
from common.loading import load_model, load_tokenizer, resolve_configs, trained_configs
from common.record import atomic_path, relative_path, run_record, write_json_atomic
from common.resuming import LOCK_FILE, run_lock
from common.script import plain_errors, setup_logging
from common.training_args import TrainingArguments
from models import modeling_gpt2_quant
from models.checkpoint import read_config
from models.errors import UserError
from models.exported import PARTS, merge_adapters, save_exported, served_widths
from models.peft_adapter import CONFIG_FILE, WEIGHTS_FILE, peft_files
from run_qa_eval import EvalDataArguments, Evaluator

NAMES = ("QuantGPT2ForQuestionAnswering", "QuantGPT2LMHeadModel", "QuantGPT2ForSequenceClassification")
QA = NAMES[0]
HEADS = {name: getattr(modeling_gpt2_quant, name) for name in NAMES}


@dataclasses.dataclass
class ExportArguments(CheckpointArguments):
    """The checkpoint and what is written."""

    output_dir: str | None = option(None, "folder of the deployable checkpoint")
    bit_configs: list[str] | None = option(
        None,
        'configs to serve: JSON files, short forms as W4A8KV8, or widths as 8; "checkpoint": as saved '
        "(default: what it was trained for)",
        aliases=["--bit_config"],
    )
    merge: bool = option(False, "fold the adapters of one config into the weights before they are quantized")
    peft: str | None = option(None, "write this adapter of the bank (8, shared) in peft's files instead")
    embeddings: str = option("float32", "float32, or float16: half the size, but rounded, so that answers may change")
    head: str = option(QA, f"class of the checkpoint: {', '.join(HEADS)}")
    per_device_eval_batch_size: int = option(16, "windows in a batch of the comparison")
    seed: int = option(42, "of the questions and signs that --quantizer rotated is calibrated with")


@dataclasses.dataclass
class ExportDataArguments(EvalDataArguments):
    """The questions whose answers before and after the export are compared, if any."""

    max_eval_samples: int | None = option(800, "compare so many questions")
    overwrite_output_dir: bool = option(False, "write into a folder that holds a checkpoint already")
    record_file: str | None = option(None, "where the JSON record goes (default: export.json in --output_dir)")


def check_args(args, data_args):
    if not args.output_dir:
        raise UserError("--output_dir is missing: the folder that the deployable checkpoint goes to")
    if args.head not in HEADS:
        raise UserError(f"--head {args.head}: allowed are {', '.join(HEADS)}")
    if args.embeddings not in ("float32", "float16"):
        raise UserError(f"--embeddings {args.embeddings}: allowed are float32, float16")
    if (data_args.validation_file or data_args.dataset_name) and args.head != QA:
        raise UserError(
            f"--validation_file, --dataset_name: answers are compared for question answering, not {args.head}"
        )
    source = args.model_name_or_path
    if os.path.isdir(source) and os.path.realpath(args.output_dir) == os.path.realpath(source):
        raise UserError(f"--output_dir {args.output_dir} is the checkpoint itself, which would be lost")
    for name, what in (("config.json", "a checkpoint"), (CONFIG_FILE, "a peft adapter")):
        if os.path.exists(os.path.join(args.output_dir, name)) and not data_args.overwrite_output_dir:
            raise UserError(f"--output_dir {args.output_dir} holds {what}: pass --overwrite_output_dir")
    if args.peft:
        others = ("merge", "bit_configs", "quantizer", "dataset_name", "train_file", "validation_file")
        given = [name for name in others if getattr(args, name, None) or getattr(data_args, name, None)]
        given += ["embeddings"] if args.embeddings != "float32" else []
        if given:
            raise UserError(f"--{given[0]}: --peft writes one adapter in float, and nothing that is quantized")


def check_merge(model, configs):
    """Refuse what has no adapters, or several configs: each would need weights of its own."""
    if not model.config.lora_bank:
        raise UserError("--merge: the checkpoint has no adapters to fold")
    if len(configs) > 1:
        raise UserError(f"--merge folds the adapters of one --bit_config, not of {', '.join(configs)}")


def set_export_quantizer(model, tokenizer, args, data_args):
    """`set_quantizer` with training questions; language models and classifiers are not calibrated here."""
    if args.quantizer == "rotated" and model.config.quantizer == "minmax" and args.head != QA:
        why = f"the checkpoint has no rotation, and {args.head} is calibrated where it is trained"
        raise UserError(f"--quantizer rotated: {why}: train it with --quantizer rotated, or export it as it is")
    return set_qa_quantizer(model, tokenizer, args, data_args, args)


def export_peft(model, args, data_args, start):
    """Write one adapter in peft's files, and a record."""
    base = args.base_model_name_or_path or model.config.base_model_name_or_path
    hub = {"cache_dir": args.cache_dir, "revision": model.config.base_model_revision, "token": args.token}
    if base is None or read_config(base, hub)[2]:
        raise UserError(f"--peft {args.peft}: the base of {args.model_name_or_path} is no stock GPT-2, as peft needs")
    base = os.path.abspath(base) if os.path.isdir(base) else base
    config, tensors, metadata = peft_files(model, args.peft, base)
    _lock = run_lock(args.output_dir)
    paths = [os.path.join(args.output_dir, name) for name in (WEIGHTS_FILE, CONFIG_FILE)]
    with atomic_path(paths[0]) as temporary:
        save_file(tensors, temporary, metadata)
    write_json_atomic(paths[1], config)
    files = {os.path.basename(path): os.path.getsize(path) for path in paths}
    total = sum(files.values())
    print(f"adapter {args.peft} for peft: {total / 1e6:.3f} MB in {args.output_dir}; its base: {base}", flush=True)
    record = run_record(
        model=relative_path(args.model_name_or_path),
        bit_config={"peft_adapter": args.peft, "quantizer": model.config.quantizer},
        metrics={"all_files_bytes": total},
        data={},
        seed=args.seed,
        wall_seconds=time.time() - start,
        files=files,
    )
    write_json_atomic(data_args.record_file or os.path.join(args.output_dir, "export.json"), record)


def answers(model, tokenizer, args, data_args, configs, quantizer):
    """({config: {id: text}}, {config: metrics}, source of the data) of a model. quantizer: of `set_quantizer`."""
    with tempfile.TemporaryDirectory() as scratch:
        batch = {"per_device_eval_batch_size": args.per_device_eval_batch_size}
        training_args = TrainingArguments(scratch, report_to="none", **batch)
        evaluator = Evaluator(model, tokenizer, args, data_args, training_args, quantizer, overwrite=True)
        records = {name: evaluator.evaluate(name, resolved) for name, resolved in configs.items()}
    texts = {name: record["predictions"] for name, record in records.items()}
    return texts, {name: record["metrics"] for name, record in records.items()}, evaluator.sources


def compare_answers(before, after):
    """{config: {"questions", "changed", "exact_match": [before, after], "f1": ...}} of what `answers` gave."""
    return {
        name: {
            "questions": len(texts),
            "changed": sum(text != after[0][name][key] for key, text in texts.items()),
            **{key: [found[1][name][f"eval_{key}"] for found in (before, after)] for key in ("exact_match", "f1")},
        }
        for name, texts in before[0].items()
    }


def main():
    start = time.time()
    args, data_args = parse_args(ExportArguments, ExportDataArguments)
    setup_logging(PartialState())
    check_args(args, data_args)
    source, tokenizer = args.model_name_or_path, load_tokenizer(args)
    model = load_model(HEADS[args.head], args, tokenizer)
    if model.config.exported_widths:
        raise UserError(f"{args.model_name_or_path} is exported already: export from the checkpoint of the training")
    if args.peft:
        return export_peft(model, args, data_args, start)
    texts = args.bit_configs or trained_configs(model)
    configs = resolve_configs(model, texts)
    widths = served_widths(list(configs.values()))
    if args.merge:
        check_merge(model, configs)
    _lock = run_lock(args.output_dir)
    quantizer = set_export_quantizer(model, tokenizer, args, data_args)
    # Where it is evaluated without --bit_configs: all that it serves, by name or as it was saved.
    model.config.trained_bit_configs = [text for text in texts if not os.path.isfile(text)] or ["checkpoint"]
    first, dtype = next(iter(configs.values())), getattr(torch, args.embeddings)
    has_data = data_args.validation_file or data_args.dataset_name
    before = answers(model, tokenizer, args, data_args, configs, quantizer) if has_data else None
    if args.merge:
        model.set_bit_config(first)
        merge_adapters(model)
    parts = save_exported(model.cpu(), args.output_dir, widths, first, dtype)
    tokenizer.save_pretrained(args.output_dir)
    names = sorted(name for name in os.listdir(args.output_dir) if name != LOCK_FILE)
    files = {name: os.path.getsize(os.path.join(args.output_dir, name)) for name in names}
    total = sum(size for name, size in files.items() if name != "export.json")
    for part in PARTS:
        print(f"{part:12s} {parts[part] / 1e6:10.3f} MB")
    print(f"{'all files':12s} {total / 1e6:10.3f} MB  in {args.output_dir}, serves {', '.join(configs)}", flush=True)
    changes = "not measured"
    if before:
        del model
        args = dataclasses.replace(args, model_name_or_path=args.output_dir, base_model_name_or_path=None)
        exported = load_model(HEADS[args.head], args, tokenizer)
        changes = compare_answers(before, answers(exported, tokenizer, args, data_args, configs, quantizer))
        for name, change in changes.items():
            number = f"{change['changed']} of {change['questions']}"
            moved = "EM {:.2f} to {:.2f}, F1 {:.2f} to {:.2f}".format(*change["exact_match"], *change["f1"])
            print(f"{name}: {number} answers differ from the checkpoint's; {moved}")
    else:
        print("answers that differ from the checkpoint's: not measured (pass --validation_file or --dataset_name)")
    record = run_record(
        model=relative_path(source),
        bit_config={**quantizer, "layers": configs, "exported_widths": widths},
        metrics={**{f"{part}_bytes": size for part, size in parts.items()}, "all_files_bytes": total},
        data=before[2] if before else {},
        seed=args.seed,
        wall_seconds=time.time() - start,
        files=files,
        embeddings=args.embeddings,
        merged=args.merge,
        changed_answers=changes,
    )
    write_json_atomic(data_args.record_file or os.path.join(args.output_dir, "export.json"), record)


if __name__ == "__main__":
    with plain_errors():
        main()
