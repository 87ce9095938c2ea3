#!/usr/bin/env python
"""Training text from the model itself, without data (LLM-QAT, arXiv:2305.17888): one text per token of the vocabulary.

    python generate_data.py --model_name_or_path gpt2 --output_dir results/data
    python generate_data.py --model_name_or_path gpt2 --first_tokens 1000 --max_tokens 200000 --output_dir results/data

A text starts with its token alone (no start token); its first 3, then 4, then 5 tokens (--greedy_lengths, a text each)
are the likeliest ones, the others are drawn, until the end-of-text token or --max_length. OUTPUT_DIR/texts.jsonl has a
line per text: {"first_token", "greedy_length", "tokens", "text"}; run_clm.py takes it as --train_file. The KV cache is
quantized where --bit_config says so. A killed run goes on when the same command is given again, to the same bytes.
"""

import dataclasses
import functools
import json
import os
import random
import time

import torch
import torch.nn.functional as F
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.cache_utils import DynamicLayer

from common.arguments import CheckpointArguments, option
from common.calibration import set_quantizer
from common.checksums import file_checksum, model_checksum, tokenizer_checksum
from common.flags import parse_args, refuse
from common.loading import describe_model, load_model, load_tokenizer, resolve_configs
from common.record import differences, load_state, relative_path, run_record, write_json_atomic, write_state
from common.resuming import run_lock
from common.script import plain_errors, setup_logging
from models.errors import UserError
from models.kv_cache import QuantizedKVCache
from models.modeling_gpt2_quant import QuantGPT2LMHeadModel
from perplexity import calibration_blocks, read_json_lines

TEXTS, SETTINGS = "texts.jsonl", "generation_settings.json"
GROUP = 64  # of largest_logits: logits whose maximum is taken first
START_OVER = "pass --overwrite_output_dir to start over"


@dataclasses.dataclass
class DataArguments:
    """Which texts, how their tokens are chosen, and where they go."""

    output_dir: str = dataclasses.field(kw_only=True, metadata={"help": "folder of texts.jsonl"})
    first_tokens: int | None = option(None, "so many first tokens, drawn (default: every token of the vocabulary)")
    decoding: str = option("hybrid", "hybrid; greedy: all tokens the likeliest; sampled: all drawn but the first")
    greedy_lengths: list[int] = option([3, 4, 5], "of hybrid: tokens that are not drawn, the first one counted")
    temperature: float = option(1.0, "of drawn tokens: logits are divided by it")
    top_k: int = option(50, "of drawn tokens: from so many likeliest ones (0: all)")
    max_length: int | None = option(None, "tokens of a text, at most (default: the model's positions)")
    max_tokens: int | None = option(None, "stop after the batch that reaches so many tokens in all")
    bit_config: str = option("checkpoint", "JSON file, short form as W4A8KV8, uniform width as 8, or as saved")
    train_file: str | None = option(None, "text to calibrate --quantizer rotated on, for a model without a rotation")
    bf16: bool = option(False, "bfloat16 autocast")
    batch_size: int = option(64, "texts at a time, and between two writes")
    seed: int = option(42, "of the draws; each text has its own")
    overwrite_output_dir: bool = option(False, "start over in a folder with other texts")
    record_file: str | None = option(None, "where the run's JSON record goes (default: record.json in --output_dir)")


def check_args(args):
    """Refuse what cannot work, before anything is loaded."""
    if args.decoding not in ("hybrid", "greedy", "sampled"):
        raise UserError(f"--decoding {args.decoding}: allowed are hybrid, greedy, sampled")
    for name, least in {"first_tokens": 1, "top_k": 0, "max_length": 2, "max_tokens": 1, "batch_size": 1}.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            refuse(name, getattr(args, name), f"{least} or more")
    if args.temperature <= 0:
        refuse("temperature", args.temperature, "a number above 0")
    lengths = args.greedy_lengths
    if not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths):
        raise UserError(f"--greedy_lengths {' '.join(map(str, lengths))}: different numbers, 1 or more each")


def texts_to_make(args, vocabulary, max_length):
    """[(first token, greedy length)] in the order of the file: every pair once, shuffled with the seed, so that a run
    that stops early has seen a fair sample of both.

    Raises UserError: more first tokens than there are, greedy lengths beyond a text.
    """
    if args.first_tokens and args.first_tokens > vocabulary:
        refuse("first_tokens", args.first_tokens, f"at most {vocabulary}, the tokens of the vocabulary")
    if args.decoding == "hybrid" and max(args.greedy_lengths) > max_length:
        refuse("greedy_lengths", max(args.greedy_lengths), f"at most {max_length}, the tokens of a text")
    ids = range(vocabulary)
    if args.first_tokens:
        ids = sorted(random.Random(args.seed).sample(ids, args.first_tokens))
    lengths = {"hybrid": args.greedy_lengths, "greedy": [max_length], "sampled": [1]}[args.decoding]
    items = [(first, length) for length in lengths for first in ids]
    random.Random(args.seed).shuffle(items)
    return items


class RoomyLayer(DynamicLayer):
    """K and V of one attention layer in a buffer of `length` tokens, of which they are the beginning.

    Adding a token copies nothing: upstream's concatenation takes longer than all the rest of a step.
    """

    def __init__(self, length):
        super().__init__()
        self.length = length

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffer, self.used = (
                key_states.new_empty(2, *key_states.shape[:2], self.length, key_states.shape[3]),
                0,
            )
        before, self.used = self.used, self.used + key_states.shape[2]
        self.buffer[0, :, :, before : self.used], self.buffer[1, :, :, before : self.used] = key_states, value_states
        self.keys, self.values = self.buffer[:, :, :, : self.used]
        return self.keys, self.values

    def batch_select_indices(self, indices):
        self.buffer = self.buffer[:, indices]
        self.keys, self.values = self.buffer[:, :, :, : self.used]


def largest_logits(logits, k):
    """Values and ids of the k largest logits, largest first: those of topk, in a tenth of its time.

    They lie in the k groups whose maxima are the largest. logits: (n, vocabulary) -> (n, k) each.
    """
    groups = F.pad(logits, (0, -logits.shape[-1] % GROUP), value=-torch.inf).unflatten(-1, (-1, GROUP))
    if k >= groups.shape[1]:
        return logits.topk(k)
    best = groups.amax(-1).topk(k).indices
    values, at = groups.gather(1, best[..., None].expand(-1, -1, GROUP)).flatten(1).topk(k)
    return values, best.gather(1, at // GROUP) * GROUP + at % GROUP


def next_tokens(logits, draws, greedy, args):
    """The next token of every text (n,): the likeliest where `greedy` (n,), else the one that the draw falls on.

    logits: (n, vocabulary); draws: (n,), each from 0 to 1.
    """
    if args.top_k == 0:
        values, ids = logits, torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    else:
        values, ids = largest_logits(logits, min(args.top_k, logits.shape[-1]))
    shares = (values / args.temperature).softmax(-1).cumsum(-1)
    drawn = (shares < draws[:, None] * shares[:, -1:]).sum(-1)
    return ids.gather(1, torch.where(greedy, values.argmax(-1), drawn)[:, None])[:, 0]


@torch.no_grad()
def make_texts(model, items, max_length, end, args):
    """[token ids] of a text for each (first token, greedy length), up to and with the end token, under present bits.

    A text's draws depend on the seed and its item alone.
    """
    seeds = [random.Random(f"{args.seed}-{first}-{length}").getrandbits(63) for first, length in items]
    draws = torch.stack([torch.rand(max_length, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    draws, greedy = draws.to(model.device), torch.tensor([length for _, length in items], device=model.device)
    tokens = torch.zeros(len(items), max_length, dtype=torch.long, device=model.device)
    tokens[:, 0] = torch.tensor([first for first, _ in items])
    rows, cache = torch.arange(len(items), device=model.device), QuantizedKVCache(model.config)
    cache.layers = [RoomyLayer(max_length) if isinstance(x, DynamicLayer) else x for x in cache.layers]
    running = torch.ones_like(rows, dtype=torch.bool)
    for at in range(1, max_length):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            logits = model(tokens[rows, at - 1 : at], past_key_values=cache, use_cache=True).logits[:, -1].float()
        tokens[rows, at] = next_tokens(logits, draws[rows, at], greedy[rows] > at, args)
        running &= tokens[rows, at] != end
        if not running.any():
            break
        if 2 * running.sum() <= len(rows):  # what has ended is computed no longer
            cache.batch_select_indices(running.nonzero()[:, 0])
            rows, running = rows[running], running[running]
    found = tokens[:, : at + 1].tolist()
    return [ids[: ids.index(end, 1) + 1] if end in ids[1:] else ids for ids in found]


def kept_texts(path, items, batch_size):
    """What an interrupted run left in whole batches, as `read_json_lines`; the rest of the file is cut off."""
    if not os.path.exists(path):
        return []
    with open(path, "rb+") as file:
        lines = file.read().split(b"\n")[:-1]  # what follows the last newline was torn
        whole = len(lines) if len(lines) == len(items) else len(lines) // batch_size * batch_size
        file.truncate(sum(len(line) + 1 for line in lines[:whole]))
    rows = read_json_lines(path) if whole else []
    for number, (row, item) in enumerate(zip(rows, items, strict=False), 1):
        if (row.get("first_token"), row.get("greedy_length")) != item or type(row.get("tokens")) is not int:
            raise UserError(f"{path}, line {number}: no text of this run: {START_OVER}")
    return rows


def write_texts(model, tokenizer, items, max_length, args):
    """(texts, tokens) of the file that is complete then, (tokens, seconds) of this run. Goes on where it was left."""
    path = os.path.join(args.output_dir, TEXTS)
    rows = kept_texts(path, items, args.batch_size)
    number, total, start = len(rows), sum(row["tokens"] for row in rows), time.perf_counter()
    before, limit = total, args.max_tokens or float("inf")
    end = tokenizer.eos_token_id
    unit = {"unit": "token", "total": args.max_tokens} if args.max_tokens else {"unit": "text", "total": len(items)}
    with open(path, "ab") as file, tqdm(desc="texts", initial=total if args.max_tokens else number, **unit) as bar:
        while number < len(items) and total < limit:
            batch = items[number : number + args.batch_size]
            texts = make_texts(model, batch, max_length, end, args)
            for (first, length), ids in zip(batch, texts, strict=True):
                # the end is not part of the text: whoever reads it ends it
                text = tokenizer.decode(ids[:-1] if len(ids) > 1 and ids[-1] == end else ids)
                row = {"first_token": first, "greedy_length": length, "tokens": len(ids), "text": text}
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            made = sum(map(len, texts))
            number, total = number + len(batch), total + made
            bar.update(made if args.max_tokens else len(batch))
    return (number, total), (total - before, time.perf_counter() - start)


def claim_folder(args, settings):
    """Refuse a folder with texts of other settings; note these. Raises UserError naming what differs."""
    note, texts = (os.path.join(args.output_dir, name) for name in (SETTINGS, TEXTS))
    if args.overwrite_output_dir and os.path.exists(texts):
        os.remove(texts)
    elif os.path.exists(texts):
        changed = differences(load_state(note), settings) if os.path.exists(note) else [f"{SETTINGS} is missing"]
        if changed:
            raise UserError(f"--output_dir {args.output_dir} has other texts ({'; '.join(changed)}): {START_OVER}")
    write_state(note, settings)


def main():
    start = time.time()
    model_args, args = parse_args(CheckpointArguments, DataArguments)
    setup_logging(PartialState())
    check_args(args)
    lock = run_lock(args.output_dir)
    set_seed(args.seed)
    tokenizer = load_tokenizer(model_args)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{model_args.model_name_or_path}: its tokenizer has no end-of-text token")
    model = load_model(QuantGPT2LMHeadModel, model_args, tokenizer)
    ((_, resolved),) = resolve_configs(model, [args.bit_config]).items()
    model.set_bit_config(resolved)
    max_length, positions = args.max_length or model.config.n_positions, model.config.n_positions
    if max_length > positions:
        refuse("max_length", max_length, f"at most {positions}, the model's positions")
    items = texts_to_make(args, len(tokenizer), max_length)

    samples = positions, model_args.calibration_samples, args.seed
    windows = functools.partial(calibration_blocks, args.train_file, tokenizer, *samples)

    quantizer = set_quantizer(model, model_args, args.seed, windows)
    model.to(PartialState().device)
    free = ("output_dir", "overwrite_output_dir", "record_file", "train_file", "bit_config", "max_length")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    settings |= {"max_length": max_length, "bits": resolved, "execution": model_args.execution}
    settings |= {"model": model_checksum(model), "tokenizer": tokenizer_checksum(tokenizer)}
    claim_folder(args, settings)

    (texts, tokens), (made, seconds) = write_texts(model, tokenizer, items, max_length, args)
    path = os.path.join(args.output_dir, TEXTS)
    print(f"{path}: {texts} texts, {tokens} tokens; {made / seconds:.0f} tokens/s", flush=True)
    record = run_record(
        model=relative_path(model_args.model_name_or_path),
        bit_config=describe_model(model) | quantizer,
        metrics={"texts": texts, "tokens": tokens, "new_tokens": made, "tokens_per_second": made / seconds},
        data={"generated": {"source": relative_path(path), "examples": texts, "sha256": file_checksum(path)}},
        seed=args.seed,
        wall_seconds=time.time() - start,
        dtype="bf16" if args.bf16 else "fp32",
        generation=settings,
    )
    write_json_atomic(args.record_file or os.path.join(args.output_dir, "record.json"), record)
    del lock  # held until here


if __name__ == "__main__":
    with plain_errors():
        main()
