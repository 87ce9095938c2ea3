#!/usr/bin/env python
"""Write the deployable form of a checkpoint: integer weights at the widths that the given configs need, packed.

    python export.py --model_name_or_path results/train --bit_configs ../configs/hybrid_25pct_4bit.json \\
        --output_dir results/hybrid
    python export.py --model_name_or_path results/train --bit_configs 8 4 --output_dir results/both     # switchable

The folder opens like any checkpoint (run_qa_eval.py, from_pretrained) and needs neither the frozen base nor float32
weights. It opens at the first config, and serves every assignment of the widths that it has.
"""

import dataclasses
import os
import time

from eval_setup import CheckpointArguments, load_model, resolve_configs, trained_configs
from models.errors import UserError
from models.exported import PARTS, save_exported, served_widths
from models.modeling_gpt2_quant import (
    QuantGPT2ForQuestionAnswering,
    QuantGPT2ForSequenceClassification,
    QuantGPT2LMHeadModel,
)
from record import relative_path, run_record, write_json_atomic
from run_qa import load_tokenizer, option, parse_args, plain_errors

HEADS = {
    head.__name__: head
    for head in (QuantGPT2ForQuestionAnswering, QuantGPT2LMHeadModel, QuantGPT2ForSequenceClassification)
}


@dataclasses.dataclass
class ExportArguments(CheckpointArguments):
    """The checkpoint and what is written."""

    output_dir: str | None = option(None, "folder of the deployable checkpoint")
    bit_configs: list[str] | None = option(
        None,
        'configs to serve: JSON files, short forms as W4A8KV8, or widths as 8; "checkpoint": as saved '
        "(default: what it was trained for)",
    )
    head: str = option("QuantGPT2ForQuestionAnswering", f"class of the checkpoint: {', '.join(HEADS)}")
    overwrite_output_dir: bool = option(False, "write into a folder that holds a checkpoint already")
    record_file: str | None = option(None, "where the JSON record goes (default: export.json in --output_dir)")


def check_args(args):
    if not args.output_dir:
        raise UserError("--output_dir is missing: the folder that the deployable checkpoint goes to")
    if args.head not in HEADS:
        raise UserError(f"--head {args.head}: allowed are {', '.join(HEADS)}")
    if os.path.isdir(args.model_name_or_path) and os.path.realpath(args.output_dir) == os.path.realpath(
        args.model_name_or_path
    ):
        raise UserError(f"--output_dir {args.output_dir} is the checkpoint itself, which would be lost")
    if os.path.exists(os.path.join(args.output_dir, "config.json")) and not args.overwrite_output_dir:
        raise UserError(f"--output_dir {args.output_dir} holds a checkpoint: pass --overwrite_output_dir")


def main():
    start = time.time()
    (args,) = parse_args(ExportArguments)
    check_args(args)
    tokenizer = load_tokenizer(args)
    model = load_model(args, tokenizer, HEADS[args.head])
    if model.config.exported_widths:
        raise UserError(f"{args.model_name_or_path} is exported already: export from the checkpoint of the training")
    texts = args.bit_configs or trained_configs(model)
    configs = resolve_configs(model, texts)
    widths = served_widths(list(configs.values()))
    # Where it is evaluated without --bit_configs: all that it serves, by name or as it was saved.
    model.config.trained_bit_configs = [text for text in texts if not os.path.isfile(text)] or ["checkpoint"]
    parts = save_exported(model, args.output_dir, widths, next(iter(configs.values())))
    tokenizer.save_pretrained(args.output_dir)
    files = {entry.name: entry.stat().st_size for entry in sorted(os.scandir(args.output_dir), key=lambda e: e.name)}
    total = sum(size for name, size in files.items() if name != "export.json")
    for part in PARTS:
        print(f"{part:12s} {parts[part] / 1e6:10.3f} MB")
    print(f"{'all files':12s} {total / 1e6:10.3f} MB  in {args.output_dir}, serves {', '.join(configs)}", flush=True)
    record = run_record(
        model=relative_path(args.model_name_or_path),
        bit_config={"layers": configs, "exported_widths": widths},
        metrics={**{f"{part}_bytes": size for part, size in parts.items()}, "all_files_bytes": total},
        data={},
        seed=None,
        wall_seconds=time.time() - start,
        files=files,
    )
    write_json_atomic(args.record_file or os.path.join(args.output_dir, "export.json"), record)


if __name__ == "__main__":
    with plain_errors():
        main()
