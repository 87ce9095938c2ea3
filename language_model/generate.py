#!/usr/bin/env python
"""Generate text with a GPT-2 language model under any bit-width config, with the KV cache held as integer codes.

    python generate.py --model_name_or_path gpt2 --bit_config W8A8KV4 --prompt "The bridge was built in"
    python generate.py --model_name_or_path results/clm --bit_config 8 --prompt_file story.txt --do_sample --seed 1
    python generate.py --model_name_or_path gpt2 --prompt "The bridge was built in" --stream

Takes stock GPT-2 weights or a checkpoint of run_clm.py. Prints the text, tokens a second, and the bytes that a token
takes in the cache beside those of a float cache. Several prompts make one batch.
"""

import dataclasses
import functools
import logging
import os
import random
import sys
import time

import torch
from accelerate import PartialState
from transformers import DynamicCache, TextStreamer, set_seed

from common.arguments import CheckpointArguments, option
from common.calibration import quantizer_label, set_quantizer
from common.checksums import file_checksum
from common.flags import parse_args
from common.loading import describe_bits, load_model, load_tokenizer, resolve_configs, resolve_random
from common.record import relative_path, run_record, write_json_atomic
from common.script import plain_errors, setup_logging
from models.errors import UserError
from models.kv_cache import QuantizedKVCache, cache_bytes
from models.modeling_gpt2_quant import QuantGPT2LMHeadModel
from models.user_input import read_text
from perplexity import calibration_blocks

logger = logging.getLogger("generate")
HERE = os.path.dirname(os.path.abspath(__file__))


@dataclasses.dataclass
class GenerationArguments:
    """The prompt, the bits and how the next token is chosen."""

    prompt: list[str] | None = option(None, "one or more prompts; several make one batch, padded on the left")
    prompt_file: str | None = option(None, "text file that is one prompt")
    train_file: str | None = option(None, "text to calibrate --quantizer rotated on, for a model without a rotation")
    bit_config: str = option("checkpoint", "JSON file, short form as W4A8KV8, uniform width as 8, or as saved")
    random_precision: list[str] | None = option(
        None, "two or more configs: each prompt is continued at one of them, drawn for it with --seed"
    )
    kv_cache: str = option("quantized", "quantized: integer codes at the config's kv_bits; float: as computed")
    bf16: bool = option(False, "bfloat16 autocast")
    max_new_tokens: int = option(64, "tokens to generate, at most")
    do_sample: bool = option(False, "draw the next token instead of taking the likeliest")
    temperature: float = option(1.0, "of --do_sample: logits are divided by it")
    top_k: int = option(50, "of --do_sample: draw from so many likeliest tokens (0: all)")
    top_p: float = option(1.0, "of --do_sample: draw from the likeliest tokens that have this probability together")
    num_beams: int = option(1, "beams of a beam search")
    stream: bool = option(False, "print the words of one prompt as they come")
    seed: int = option(42, "of --do_sample")
    record_file: str = option(os.path.join(HERE, "results", "generate.json"), "where the run's JSON record goes")


def check_args(args):
    """Refuse what cannot work, before anything is loaded."""
    if (args.prompt is None) == (args.prompt_file is None):
        raise UserError("pass either --prompt or --prompt_file")
    if args.kv_cache not in ("quantized", "float"):
        raise UserError(f"--kv_cache {args.kv_cache}: allowed are quantized, float")
    for flag, lowest in {"max_new_tokens": 1, "num_beams": 1, "top_k": 0}.items():
        if getattr(args, flag) < lowest:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least {lowest}")
    if args.temperature <= 0:
        raise UserError(f"--temperature {args.temperature}: must be positive; without --do_sample it is not used")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p {args.top_p}: a probability, above 0 and at most 1")
    if args.random_precision and (args.stream or args.bit_config != "checkpoint"):
        raise UserError("--random_precision says the bits of every prompt: no --bit_config and no --stream")
    if args.stream and (len(args.prompt or [""]) > 1 or args.num_beams > 1):
        raise UserError("--stream: one prompt and no --num_beams, whose words are not known until the end")


def read_prompts(args):
    """[prompt]; none of them empty."""
    prompts = [read_text(args.prompt_file)] if args.prompt_file else args.prompt
    if not all(prompts):
        raise UserError(f"{args.prompt_file or '--prompt'}: an empty prompt; GPT-2 needs at least one token")
    return prompts


def count_tokens(tokens, end):
    """Tokens (batch, n) up to and with the first end token of each row; what follows it is padding.

    Args: end: an id, a list of them, or None.
    """
    ends = torch.isin(tokens, torch.tensor([] if end is None else end, dtype=tokens.dtype, device=tokens.device))
    return int((ends.cumsum(1) - ends.long() == 0).sum())


def generate(model, tokenizer, prompts, args):
    """(texts with their prompts, measurements) of one batch under the model's present bits."""
    tokenizer.padding_side = "left"  # the next token follows the prompt's last
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, verbose=False).to(model.device)
    length, positions = inputs["input_ids"].shape[1], model.config.n_positions
    if length + args.max_new_tokens > positions:
        asked = f"a prompt of {length} tokens and --max_new_tokens {args.max_new_tokens}"
        raise UserError(f"{asked} do not fit into the model's {positions} positions")
    keys = ("max_new_tokens", "do_sample", "num_beams", *(("temperature", "top_k", "top_p") * args.do_sample))
    cache = (QuantizedKVCache if args.kv_cache == "quantized" else DynamicCache)(config=model.config)
    set_seed(args.seed)
    start = time.perf_counter()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
        tokens = model.generate(
            **inputs,
            past_key_values=cache,
            pad_token_id=tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True) if args.stream else None,
            **{key: getattr(args, key) for key in keys},
        )
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)  # waits for the device
    seconds = time.perf_counter() - start
    new_tokens = count_tokens(tokens[:, length:], model.generation_config.eos_token_id)
    values = 2 * model.config.n_layer * model.config.n_embd  # of K and V
    return texts, {
        "new_tokens": new_tokens,
        "seconds": seconds,
        "tokens_per_second": new_tokens / seconds,
        "cache_bytes": cache_bytes(cache),
        "cache_bytes_per_token": cache_bytes(cache) / (cache.get_seq_length() * len(prompts) * args.num_beams),
        "float32_bytes_per_token": 4 * values,
        "float16_bytes_per_token": 2 * values,
    }


def generate_at_random(model, tokenizer, prompts, args, configs):
    """(texts, measurements, the config drawn for every prompt); prompts of one config are one batch of `generate`."""
    draw = random.Random(args.seed)
    drawn = [draw.choice(list(configs)) for _ in prompts]
    texts, parts = {}, []
    for name in sorted(set(drawn)):
        with model.at_bits(configs[name]):
            at = [index for index, other in enumerate(drawn) if other == name]
            found, measured = generate(model, tokenizer, [prompts[index] for index in at], args)
        texts |= dict(zip(at, found, strict=True))
        parts.append(measured)
    total = {key: sum(part[key] for part in parts) for key in ("new_tokens", "seconds", "cache_bytes")}
    positions = sum(part["cache_bytes"] / part["cache_bytes_per_token"] for part in parts)
    total["tokens_per_second"] = total["new_tokens"] / total["seconds"]
    total["cache_bytes_per_token"] = total["cache_bytes"] / positions
    return [texts[index] for index in range(len(prompts))], parts[0] | total, drawn


def main():
    start = time.time()
    model_args, args = parse_args(CheckpointArguments, GenerationArguments)
    setup_logging(PartialState())
    check_args(args)
    prompts = read_prompts(args)
    tokenizer = load_tokenizer(model_args)
    model = load_model(QuantGPT2LMHeadModel, model_args, tokenizer)
    configs = resolve_random(model, args.random_precision)
    ((name, resolved),) = resolve_configs(model, [args.bit_config]).items()
    model.set_bit_config(resolved)

    samples = model.config.n_positions, model_args.calibration_samples, args.seed
    windows = functools.partial(calibration_blocks, args.train_file, tokenizer, *samples)

    quantizer = set_quantizer(model, model_args, args.seed, windows)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    drawn = None
    if configs:
        texts, measured, drawn = generate_at_random(model, tokenizer, prompts, args, configs)
        name = f"random precision ({', '.join(drawn)})"
    else:
        texts, measured = generate(model, tokenizer, prompts, args)
    if not args.stream:
        print(*texts, sep="\n---\n", flush=True)
    per_token, full, half = (measured[f"{key}_bytes_per_token"] for key in ("cache", "float32", "float16"))
    print(
        f"\n{name}, {quantizer_label(quantizer)}, {args.kv_cache} KV cache: {measured['new_tokens']} tokens, "
        f"{measured['tokens_per_second']:.1f} tokens/s; {per_token:.0f} bytes a token in the cache, "
        f"{per_token / full:.3f} of float32 ({full}), {per_token / half:.3f} of float16 ({half})",
        file=sys.stderr,
    )
    prompt = {"source": "--prompt", "examples": len(prompts), "sha256": None}
    if args.prompt_file:
        prompt |= {"source": relative_path(args.prompt_file), "sha256": file_checksum(args.prompt_file)}
    record = run_record(
        model=relative_path(model_args.model_name_or_path),
        bit_config={
            "name": name,
            **({} if configs else describe_bits(model, resolved)),
            **quantizer,
            "layers": configs or resolved,
        },
        drawn_configs=drawn,
        metrics=measured,
        data={"prompt": prompt},
        seed=args.seed,
        wall_seconds=time.time() - start,
        dtype="bf16" if args.bf16 else "fp32",
        generation={key: value for key, value in vars(args).items() if key not in ("prompt_file", "record_file")},
        texts=texts,
    )
    write_json_atomic(args.record_file, record)


if __name__ == "__main__":
    with plain_errors():
        main()
