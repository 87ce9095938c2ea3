"""Perplexity of a text under any number of bit-width configs, and the table of it. Used by run_clm.py."""

import logging
import math
import os
import random
import time

import torch
import torch.nn.functional as F
from tqdm.auto import trange

from common.loading import describe_bits
from common.statistics import markdown_table
from models.errors import UserError
from models.user_input import parse_json, read_text, show

logger = logging.getLogger("perplexity")


def read_json_lines(path):
    """The objects of a .jsonl file, each with a string under "text". Raises UserError naming file and line."""
    rows = []
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), 1):
        row = parse_json(line, f"{path}, line {number}")
        try:
            row["text"].encode()
        except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
            allowed = 'an object with a string "text"'
            raise UserError(f"{path}, line {number}: {show(row)}: allowed is {allowed}") from None
        rows.append(row)
    return rows


def read_tokens(path, tokenizer, at_least):
    """Token ids of a text file, (tokens,) int64; it must have `at_least` so many.

    Of a .jsonl file (generate_data.py) the texts, one after the other, each ended by the end-of-text token.
    """
    if os.fspath(path).endswith(".jsonl"):
        texts = [row["text"] for row in read_json_lines(path)]
        ids = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        tokens = torch.tensor([token for text in ids for token in (*text, tokenizer.eos_token_id)])
    else:
        tokens = tokenizer(read_text(path), return_tensors="pt", verbose=False)["input_ids"][0].long()
    if len(tokens) < at_least:
        raise UserError(f"{path}: {len(tokens)} tokens, at least {at_least} are needed (see --block_size)")
    return tokens


def calibration_blocks(path, tokenizer, block_size, wanted, seed):
    """Token ids of `wanted` consecutive blocks of a training text, drawn with `seed`, for the rotated quantizer.

    Raises UserError: no text (path None), or a shorter one.
    """
    if not path:
        why = "the checkpoint has no rotation, and it is calibrated on the training text"
        raise UserError(f"--quantizer rotated: {why}: pass --train_file")
    blocks = read_tokens(path, tokenizer, block_size).unfold(0, block_size, block_size).tolist()
    if wanted > len(blocks):
        found = f"allowed are up to {len(blocks)}, the blocks of {block_size} tokens in {path}"
        raise UserError(f"--calibration_samples {wanted}: {found}")
    return random.Random(seed).sample(blocks, wanted)


def windows(total, block_size, stride):
    """Yield (start, first, end): tokens `first`..`end` - 1 are scored, from the tokens `start`.. before each.

    The first window scores all it can, each further one `stride` tokens with at least block_size - stride before them.
    """
    first, end = 1, min(block_size + 1, total)
    while first < total:
        yield max(end - 1 - block_size, 0), first, end
        first, end = end, min(end + stride, total)


@torch.no_grad()
def perplexity(model, tokens, block_size, stride, batch_size=8, half=None):
    """exp of the mean negative log-likelihood of tokens 1, 2, ... under the model's present bits.

    Args: tokens: (total,). half: dtype of autocast, None for float32.
    """
    model.eval()
    spans = list(windows(len(tokens), block_size, stride))  # all of one length: only a short text has one shorter
    loss = torch.zeros((), dtype=torch.float64, device=model.device)
    for index in trange(0, len(spans), batch_size, desc="perplexity", unit="batch", leave=False):
        batch = spans[index : index + batch_size]
        inputs = torch.stack([tokens[start : end - 1] for start, _, end in batch]).to(model.device)
        keep = max(end - first for _, first, end in batch)
        labels = torch.full((len(batch), keep), -100)
        for row, (_, first, end) in zip(labels, batch, strict=True):
            row[first - end :] = tokens[first:end]
        with torch.autocast(model.device.type, half, enabled=half is not None):
            logits = model(inputs, logits_to_keep=keep, use_cache=False).logits  # (batch, keep, vocabulary)
        loss += F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten().to(logits.device), reduction="sum")
    return math.exp(loss.item() / (len(tokens) - 1))


def perplexity_of_configs(model, configs, quantizer, tokens, block_size, stride, batch_size=8, half=None):
    """[{"config", "quantizer", "average_w_bits", "weight_mb", "perplexity", "seconds"}] of {name: resolved config}.

    quantizer: of `quantizer_label`.
    """
    rows = []
    for name, config in configs.items():
        start, size = time.time(), describe_bits(model, config)
        with model.at_bits(config):
            found = perplexity(model, tokens, block_size, stride, batch_size, half)
        row = {"config": name, "quantizer": quantizer, "average_w_bits": size["average_w_bits"]}
        row |= {"weight_mb": size["weight_bytes"] / 1e6, "perplexity": found}
        rows.append({**row, "seconds": round(time.time() - start, 2)})
        logger.info("%s: perplexity %.3f", name, found)
    return rows


def table_lines(rows):
    """The table as markdown."""
    keys = ("average_w_bits", "weight_mb", "perplexity", "seconds")
    cells = [[row["config"], row["quantizer"], *(f"{row[key]:.2f}" for key in keys)] for row in rows]
    return markdown_table(["config", "quantizer", "avg bits", "MB", "perplexity", "seconds"], cells)
