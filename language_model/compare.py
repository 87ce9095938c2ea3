#!/usr/bin/env python
"""The same prompts at several precisions, one after the other: text, perplexity, time a token, memory.

    python compare.py --model_name_or_path gpt2 --prompt "The bridge was built in" --validation_file valid.txt
    python compare.py --model_name_or_path results/clm --bit_configs 8 ../configs/hybrid_25pct_4bit.json 4 \\
        --bitsandbytes --prompt "The bridge was built in" "Once upon a time"

Prints a markdown table with a row a precision, then the texts. Takes what generate.py takes.
"""

import dataclasses
import os
import time

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from common.arguments import CheckpointArguments, option
from common.calibration import quantizer_label, set_quantizer
from common.checksums import file_checksum
from common.flags import parse_args
from common.loading import describe_bits, load_model, load_tokenizer, resolve_configs
from common.record import relative_path, run_record, write_json_atomic
from common.script import plain_errors, setup_logging
from common.statistics import markdown_table
from generate import GenerationArguments, check_args, generate, read_prompts
from models.bitsandbytes_ptq import LABELS, BitsAndBytesLinear, quantize_with_bitsandbytes
from models.errors import UserError
from models.modeling_gpt2_quant import QuantGPT2LMHeadModel
from perplexity import calibration_blocks, perplexity, read_tokens

HERE = os.path.dirname(os.path.abspath(__file__))
HEADER = ["precision", "perplexity", "ms a token", "linears, MB", "cache, bytes a token", "notes"]


@dataclasses.dataclass
class CompareArguments(GenerationArguments):
    """The prompts and the precisions."""

    bit_config: str = dataclasses.field(default="", init=False)
    bit_configs: list[str] = option(["32", "8", "4"], "JSON files, short forms as W4A8KV8, widths as 8, checkpoint")
    bitsandbytes: bool = option(False, "bitsandbytes int8 and nf4 beside them, with the adapters of the first config")
    validation_file: str | None = option(None, "UTF-8 text whose perplexity is measured")
    block_size: int = option(1024, "tokens of a window of it (at most the model's positions)")
    record_file: str = option(os.path.join(HERE, "results", "compare.json"), "where the run's JSON record goes")


def check_compare_args(args):
    check_args(args)
    if not args.bit_configs:
        raise UserError("--bit_configs: name at least one config")
    if args.stream:
        raise UserError("--stream: the texts of several precisions are printed one after the other")
    if args.block_size < 2:
        raise UserError(f"--block_size {args.block_size}: at least 2 tokens, one to read and one to predict")


def measure(model, tokenizer, prompts, args, tokens):
    """{texts, perplexity (None without a text), ms_per_token, ...} of the model as it is now."""
    generate(model, tokenizer, prompts, dataclasses.replace(args, max_new_tokens=1))  # makes the codes, untimed
    texts, measured = generate(model, tokenizer, prompts, args)
    measured["ms_per_token"] = 1000 / measured["tokens_per_second"]
    block = min(args.block_size, model.config.n_positions)
    half = torch.bfloat16 if args.bf16 else None
    found = None if tokens is None else perplexity(model, tokens, block, max(block // 2, 1), half=half)
    return {"texts": texts, "perplexity": found, **measured}


def kept_bytes(model):
    """Bytes of the weights of bitsandbytes' layers, with their scales."""
    layers = [module.base for module in model.modules() if isinstance(module, BitsAndBytesLinear)]
    return sum(value.nbytes for layer in layers for key, value in layer.state_dict().items() if key != "bias")


def rows_of(model, configs, label, tokenizer, prompts, args, tokens, load):
    """Rows of our configs, then of bitsandbytes if asked for. load(): the model anew, at its first config."""
    rows = []
    for name, resolved in tqdm(configs.items(), desc="precisions", leave=False):
        size = describe_bits(model, resolved)
        with model.at_bits(resolved):
            row = measure(model, tokenizer, prompts, args, tokens)
        rows.append({"precision": name, "weight_bytes": size["weight_bytes"], "notes": label, **row})
    for method, text in LABELS.items() if args.bitsandbytes else ():
        other = quantize_with_bitsandbytes(load(), method)
        size = kept_bytes(other)  # before a forward: a CPU then keeps nf4 in another form
        row = measure(other, tokenizer, prompts, dataclasses.replace(args, kv_cache="float"), tokens)
        rows.append({"precision": method, "weight_bytes": size, "notes": text, **row})
    return rows


def table_lines(rows):
    """The table as markdown."""
    cells = [
        [
            row["precision"],
            "-" if row["perplexity"] is None else f"{row['perplexity']:.2f}",
            f"{row['ms_per_token']:.2f}",
            f"{row['weight_bytes'] / 1e6:.2f}",
            f"{row['cache_bytes_per_token']:.0f}",
            row["notes"],
        ]
        for row in rows
    ]
    return markdown_table(HEADER, cells)


def main():
    start = time.time()
    model_args, args = parse_args(CheckpointArguments, CompareArguments)
    setup_logging(PartialState())
    check_compare_args(args)
    prompts = read_prompts(args)
    tokenizer = load_tokenizer(model_args)
    tokens = read_tokens(args.validation_file, tokenizer, 2) if args.validation_file else None
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def windows():
        samples = model.config.n_positions, model_args.calibration_samples, args.seed
        return calibration_blocks(args.train_file, tokenizer, *samples)

    def first_config():
        other = load_model(QuantGPT2LMHeadModel, model_args, tokenizer)
        other.set_bit_config(next(iter(configs.values())))
        return other.to(device)

    model = load_model(QuantGPT2LMHeadModel, model_args, tokenizer)
    configs = resolve_configs(model, args.bit_configs)
    quantizer = set_quantizer(model, model_args, args.seed, windows)
    label = f"{quantizer_label(quantizer)}, {args.kv_cache} cache"
    rows = rows_of(model.to(device), configs, label, tokenizer, prompts, args, tokens, first_config)
    print(*table_lines(rows), sep="\n")
    for row in rows:
        print(f"\n{row['precision']}:", *row["texts"], sep="\n")
    validation = args.validation_file
    data = {"prompt": {"source": args.prompt_file or "--prompt", "examples": len(prompts), "sha256": None}}
    if validation:
        digest = file_checksum(validation)
        data["validation"] = {"source": relative_path(validation), "examples": len(tokens), "sha256": digest}
    record = run_record(
        model=relative_path(model_args.model_name_or_path),
        bit_config={"configs": configs, **quantizer},
        metrics={f"perplexity_{row['precision']}": row["perplexity"] for row in rows},
        data=data,
        seed=args.seed,
        wall_seconds=time.time() - start,
        dtype="bf16" if args.bf16 else "fp32",
        rows=rows,
        generation={key: value for key, value in vars(args).items() if key not in ("prompt_file", "record_file")},
    )
    write_json_atomic(args.record_file, record)


if __name__ == "__main__":
    with plain_errors():
        main()
