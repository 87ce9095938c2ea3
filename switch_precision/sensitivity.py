#!/usr/bin/env python
"""How much does each linear, block and layer type lose at low bits? One flip at a time from a reference config.

    bash sweep.sh                                          # every flip from 8 to 4 bits, SQuAD v1.1 validation
    bash sweep.sh --operands w a kv                        # weights, inputs, and keys and values, each alone
    python sensitivity.py --model_name_or_path results/train --validation_file dev.json --output_dir results/sens

Flips: the linears (48 in GPT-2), the blocks, the types attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj, attention, mlp,
and all at once; W, A and K/V together, or one of them alone (--operands). Measured: EM, F1, cross-entropy of the gold
span, and KL of the start and end distributions from the reference's; beside them scores predicted from gradients of a
few batches. Batches are outside and flips inside, and a flip reuses the hidden states below it (block_reuse.py). State
is kept per chunk of batches: a killed sweep goes on.
Outputs in --output_dir: sensitivity.json (what search.py reads), sensitivity.png, the table on stdout.
"""

import dataclasses
import glob
import json
import logging
import os
import time

import numpy as np
from tqdm.auto import tqdm
from transformers import set_seed

from allocation.block_reuse import ReusedForward
from allocation.flips import OPERANDS, lowered, make_flips, title
from allocation.gradient_scores import MEASURES, SCORES, correlations, gradient_scores
from allocation.measure_set import autocast_of, load_measure_set, span_kl, span_nll
from allocation.plots import draw_heat_map
from common.arguments import CheckpointArguments, DataTrainingArguments, option
from common.checksums import data_identity, model_checksum, tokenizer_checksum
from common.data import set_qa_quantizer
from common.flags import parse_args
from common.loading import load_model, load_tokenizer, resolve_configs
from common.record import differences, plot_caption, read_state, relative_path, run_record, write_state
from common.resuming import run_lock
from common.script import plain_errors, setup_logging
from common.squad_v2 import squad_v2_per_example
from common.statistics import compare, markdown_table, with_interval
from common.training_args import TrainingArguments
from models.bit_config import describe_bit_config
from models.errors import UserError
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering
from utils_qa import squad_em_f1_per_example

logger = logging.getLogger("sensitivity")


@dataclasses.dataclass
class SweepArguments(CheckpointArguments):
    """The checkpoint and the flips."""

    reference_config: str = option("8", "config that is flipped from: JSON file, short form as W8A8KV8, or a width")
    low_bits: list[str] = option(["4"], "configs that are flipped to, one or several (search.py: one per low width)")
    operands: list[str] = option(
        ["together"], "what a flip lowers: together (W, A and K/V of a linear), or one alone, one or several of w a kv"
    )
    measure_split: str = option("validation", "data to measure on: validation or train (see --max_train_samples)")
    chunk_batches: int = option(8, "batches between two saves of the state")
    num_gradient_batches: int = option(8, "batches for the gradient-based scores (0: none)")
    num_bootstrap: int = option(1000, "resamples of the 95 % intervals over questions (0: no intervals)")


def measure_chunk(forward, measure_set, chunk, reference, configs, tick):
    """{"ids", "windows", "results": [{"texts", "loss", "kl"}, ...]} of a chunk under the reference (first) and under
    each of `configs`, losses and KL summed over windows; tick() per batch."""
    ids, examples, features = measure_set.chunk_rows(chunk)
    logits = [[] for _ in range(len(configs) + 1)]  # the chunk's logits only: (2, batch, seq) per config and batch
    sums = np.zeros((len(configs) + 1, 2))
    for batch in chunk:
        inputs, real, context, labels = measure_set.tensors(batch)
        for index, found in enumerate(forward.logits(inputs, reference, configs)):
            if index == 0:
                base = found
            loss, divergence = span_nll(found, real, labels), span_kl(base, found, context)
            sums[index] += [loss.double().sum().item(), divergence.double().sum().item()]
            logits[index].append(found.cpu())
        tick()
    texts = [measure_set.texts(examples, features, parts) for parts in logits]
    results = [{"texts": found, "loss": loss, "kl": kl} for found, (loss, kl) in zip(texts, sums.tolist())]
    return {"ids": ids, "windows": sum(map(len, chunk)), "results": results}


def open_state(folder, identity, overwrite):
    """The state folder of a sweep, not of another; with `overwrite`, or without a whole identity, the chunks go."""
    path = os.path.join(folder, "identity.json")
    before = None if overwrite else read_state(path)
    if before is None:
        for chunk in glob.glob(os.path.join(glob.escape(folder), "chunk-*.json*")):
            os.remove(chunk)
        write_state(path, identity)
    elif changed := differences(before, json.loads(json.dumps(identity))):
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        found = f"{folder} holds a sweep with other settings ({'; '.join(changed[:5])}{more})"
        raise UserError(f"{found}: pass --overwrite_output_dir to start over, or another --output_dir")
    return folder


def sweep(forward, measure_set, reference, configs, state, progress=True):
    """Measures all chunks that have no state yet; returns all chunks' states, in order."""
    blocks = len(forward.blocks)
    paths = [os.path.join(state, f"chunk-{number:05d}.json") for number in range(len(measure_set.chunks))]
    parts = [read_state(path) for path in paths]
    left = sum(len(chunk) for part, chunk in zip(parts, measure_set.chunks, strict=True) if part is None)
    bar = tqdm(total=left, desc=f"{len(configs)} flips", unit="batch", disable=not progress)
    for number, (path, chunk) in enumerate(zip(paths, measure_set.chunks, strict=True)):
        if parts[number] is None:
            start, before = time.time(), forward.block_forwards
            part = measure_chunk(forward, measure_set, chunk, reference, configs, bar.update)
            part["block_forwards"] = forward.block_forwards - before
            part["plain_block_forwards"] = blocks * len(chunk) * (1 + len(configs))
            parts[number] = part | {"wall_seconds": time.time() - start}
            write_state(path, parts[number])
    bar.close()
    return parts


def summarize(parts, names, references, num_bootstrap, seed, score=squad_em_f1_per_example):
    """{name: measures} of the reference (names[0]) and the flips, from the states of all chunks.

    score: (texts, references) -> {id: (exact match, F1)}.
    """
    windows = sum(part["windows"] for part in parts)
    scores, sums = {}, {}
    for index, name in enumerate(names):
        texts = {}
        for part in parts:
            texts |= dict(zip(part["ids"], part["results"][index]["texts"], strict=True))
        scores[name] = list(score(texts, references).values())
        sums[name] = {key: sum(part["results"][index][key] for part in parts) / windows for key in ("loss", "kl")}
    result = compare(scores, names[0], num_bootstrap, seed)
    for name in names:
        result[name] |= {**sums[name], "loss_increase": sums[name]["loss"] - sums[names[0]]["loss"]}
    return result


def table_lines(flips, reference):
    """The table as markdown."""
    header = ["flip", "EM", "EM drop", "F1 drop", "KL", "loss increase", *SCORES]
    rows = [["reference", f"{reference['exact_match']:.2f}", "", "", "", "", *([""] * len(SCORES))]]
    for key, flip in flips.items():
        drops = [with_interval(flip[name], flip[f"{name}_interval"]) for name in ("exact_match_drop", "f1_drop")]
        smooth = [f"{flip['kl']:.5f}", f"{flip['loss_increase']:+.5f}"]
        predicted = [f"{flip[name]:.3g}" if name in flip else "" for name in SCORES]
        rows.append([key, f"{flip['exact_match']:.2f}", *drops, *smooth, *predicted])
    return markdown_table(header, rows)


def low_configs(args, name, reference, others):
    """`lowered` of --low_bits and --operands; UserError for flips that change nothing."""
    asked = list(dict.fromkeys(args.operands))
    if asked != ["together"] and not set(asked) <= set(OPERANDS):
        raise UserError(f"--operands {' '.join(args.operands)}: allowed are together, or some of {' '.join(OPERANDS)}")
    if not others or reference in others.values():
        shown = " ".join(args.low_bits)
        raise UserError(f"--low_bits {shown}: allowed are configs other than --reference_config {name}")
    found = lowered(reference, others, asked)
    if same := [operand for operand in asked if operand not in {operand for _, operand in found}]:
        raise UserError(
            f"--operands {same[0]}: {' '.join(others)} have its bits as --reference_config {name} has them"
        )
    return found


def sweep_identity(model, tokenizer, measure_set, reference, lows, model_args, data_args, training_args):
    """All that the measurements depend on; what search.py looks at, too."""
    v2 = data_args.version_2_with_negative
    return {
        "model_sha256": model_checksum(model),
        "reference_config": reference,
        "low_bits": lows,
        "operands": list(dict.fromkeys(model_args.operands)),
        "quantizer": model.config.quantizer,
        "tokenizer_sha256": tokenizer_checksum(tokenizer),
        "data": data_identity(measure_set.examples),
        "batches": [training_args.eval_batch_size, model_args.chunk_batches, len(measure_set.batches)],
        "features": [data_args.max_seq_length, data_args.doc_stride, data_args.question_separator],
        "max_answer_length": data_args.max_answer_length,
        "dtype": training_args.run_dtype,
        "execution": model_args.execution,
        "attention": model.config._attn_implementation,
        **({"null_score_diff_threshold": data_args.null_threshold} if v2 else {}),
    }


def sweep_cost(parts):
    """Block forwards made, those that separate evaluations would make, and seconds, over all runs of the sweep."""
    keys = ("block_forwards", "plain_block_forwards", "wall_seconds")
    cost = {key: sum(part[key] for part in parts) for key in keys}
    return cost | {"block_forwards_fraction": cost["block_forwards"] / cost["plain_block_forwards"]}


def report_lines(flips, reference, ranks, cost):
    """Everything that the sweep prints."""
    lines = table_lines(flips, reference)
    for name, rows in ranks.items():
        for score, values in rows.items():
            shown = ", ".join(f"{key} {'-' if value is None else f'{value:+.2f}'}" for key, value in values.items())
            lines.append(f"Spearman rank correlation over linears, {name}: {score} with {shown}")
    lines.append(
        f"{cost['block_forwards']} block forwards in {cost['wall_seconds']:.0f} s; separate evaluations of reference "
        f"and {len(flips)} flips: {cost['plain_block_forwards']} ({100 * cost['block_forwards_fraction']:.1f} %)"
    )
    return lines


def main():
    start = time.time()
    model_args, data_args, training_args = parse_args(SweepArguments, DataTrainingArguments, TrainingArguments)
    setup_logging(training_args)
    if training_args.world_size > 1:
        raise UserError(f"the sweep is one process, not {training_args.world_size}: --nproc_per_node=1")
    training_args.refuse_full_eval()
    folder, seed = training_args.output_dir, training_args.seed
    set_seed(seed)
    tokenizer = load_tokenizer(model_args)
    model = load_model(QuantGPT2ForQuestionAnswering, model_args, tokenizer).to(training_args.device)
    (name, reference), *others = resolve_configs(model, [model_args.reference_config, *model_args.low_bits]).items()
    lows = dict(others)
    targets = low_configs(model_args, name, reference, lows)
    quantizer = set_qa_quantizer(model, tokenizer, model_args, data_args, training_args)
    _lock = run_lock(folder)
    chunk = model_args.chunk_batches
    measure_set, sources = load_measure_set(model, tokenizer, model_args, data_args, training_args, chunk)
    identity = sweep_identity(model, tokenizer, measure_set, reference, lows, model_args, data_args, training_args)
    state = open_state(os.path.join(folder, "state"), identity, data_args.overwrite_output_dir)
    flips = make_flips(reference, targets)
    configs = [
        reference | {layer: targets[flip["low_bits"], flip["operand"]][layer] for layer in flip["layers"]}
        for flip in flips.values()
    ]
    forward = ReusedForward(model, autocast_of(training_args))
    parts = sweep(forward, measure_set, reference, configs, state, progress=not training_args.disable_tqdm)

    references = {row["id"]: row["answers"]["text"] for row in measure_set.examples}
    score = squad_v2_per_example if data_args.version_2_with_negative else squad_em_f1_per_example
    measured = summarize(parts, ["reference", *flips], references, model_args.num_bootstrap, seed, score)
    predicted = gradient_scores(model, measure_set, reference, targets, model_args.num_gradient_batches, seed)
    for key, flip in flips.items():
        flip |= measured[key]
        if flip["kind"] == "layer":
            flip |= predicted.get(((flip["low_bits"], flip["operand"]), flip["name"]), {})
    linears = {target: [] for target in targets}
    for flip in flips.values():
        if flip["kind"] == "layer":
            linears[flip["low_bits"], flip["operand"]].append(flip)
    ranks = {title(*target): correlations(members) for target, members in linears.items()}
    cost = sweep_cost(parts)
    print("\n".join(report_lines(flips, measured["reference"], ranks, cost)), flush=True)
    caption = plot_caption(model_args.model_name_or_path, sources[model_args.measure_split])
    draw_heat_map(flips, os.path.join(folder, "sensitivity.png"), caption)
    description = {"name": name, **describe_bit_config(reference, model.layer_shapes())}
    record = run_record(
        model=relative_path(model_args.model_name_or_path),
        bit_config={**description, **quantizer, "lora_bank": model.config.lora_bank, "layers": reference},
        metrics=measured["reference"],
        data=sources,
        seed=seed,
        wall_seconds=time.time() - start,
        identity=identity,
        cost=cost,
        flips=flips,
        rank_correlations=ranks,
        num_gradient_batches=model_args.num_gradient_batches,
        measures=list(MEASURES),
    )
    write_state(data_args.record_file or os.path.join(folder, "sensitivity.json"), record)


if __name__ == "__main__":
    with plain_errors():
        main()
