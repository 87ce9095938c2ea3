#!/usr/bin/env python
"""How well attacks work: accuracy, changed tokens, perplexity and similarity, at any inference precision.

    bash eval.sh --attack_dirs results/attack_32 results/attack_4
    python eval.py --model_name_or_path results/train --attack_dirs results/attack_* --eval_bits 32 8 4 \\
        --output_dir results/eval

Each attack is evaluated at the precision that it attacked (--eval_bits: at these), beside the clean texts and beside
hard samples of Theta before optimization (of word_attack.py: words replaced at random). Single-sample and best-of-N
accuracies have columns of their own. Where float32 is among the precisions, a second table has every precision's
difference from it. Writes table.md and record.json.
"""

import dataclasses
import os
import time
import types

from adversarial_texts import (
    accuracies,
    baseline_name,
    check_bits,
    correct_table,
    load_attacks,
    method_name,
    set_attacked_quantizer,
    text_quality,
)
from attack_setup import ClassifierArguments, load_classifier, load_reference
from common.arguments import option
from common.calibration import quantizer_label
from common.checksums import json_checksum
from common.flags import parse_args
from common.loading import load_tokenizer, resolve_configs
from common.record import relative_path, run_record, write_json_atomic, write_text_atomic
from common.resuming import run_lock
from common.script import plain_errors, setup_logging
from common.statistics import markdown_table, with_interval
from models.errors import UserError
from precision_gain import gain_lines, gains

CAPTION = (
    "Attack: {method}. Quantizer: {quantizer}. "
    "Accuracy in percent [Wilson 95 %]; all: every input counts, and one that is wrong without attack counts as "
    "broken (the paper's way); right: only inputs that are right without attack; single: one hard sample a text; best "
    "of {n}: broken if any of {n} samples is wrong; token error rate, perplexity and similarity of the single sample, "
    "tokenized again, under the reference model {reference}."
)


@dataclasses.dataclass
class EvalArguments:
    """What to evaluate."""

    output_dir: str = dataclasses.field(metadata={"help": "folder of table.md and record.json"})
    attack_dirs: list[str] = dataclasses.field(
        metadata={"help": "output folders of whitebox_attack.py, word_attack.py"}
    )
    eval_bits: list[str] | None = option(None, "inference precisions (default: those that the attack attacked)")
    best_of: int | None = option(None, "hard samples that the best-of-N attacker may try (default: all that are kept)")
    record_file: str | None = option(None, "where the run's JSON record goes (default: record.json in --output_dir)")


def evaluate_attack(name, attack, configs, model, reference, tokenizer, samples, cache):
    """(rows, right, clean) of one attack: clean, initial and optimized texts at every config.

    cache: {(config, checksum of the texts): booleans}, of other attacks too. right, clean: {config: (texts,) bool},
    the single sample under attack and without it, and the text without attack.
    """
    texts, length = attack["texts"], attack["settings"]["max_seq_length"]
    kinds = {"clean": "text", baseline_name(attack): "initial_samples", "optimized": "samples"}
    rows, quality, right, clean = [], {}, {}, {}
    checksums = {kind: json_checksum([text[key] for text in texts]) for kind, key in kinds.items()}
    for kind, key in kinds.items():
        singles = [text["text"] if key == "text" else text[key][0] for text in texts]
        quality[kind] = text_quality(reference, tokenizer, texts, singles, length)
    for config, resolved in configs.items():
        with model.at_bits(resolved):
            for kind, key in kinds.items():
                place = config, checksums[kind]
                if place not in cache:
                    cache[place] = correct_table(model, tokenizer, texts, key, samples, length)
                if kind == "clean":
                    clean[config] = cache[place][:, 0]
                scores = accuracies(cache[place], clean[config])
                if kind == "clean":  # there is one clean text, so nothing to choose the best of
                    scores = {"single": scores["single"]}
                rows.append({"attack": name, "inference": config, "texts": kind, **scores, **quality[kind]})
        right[config] = cache[config, checksums["optimized"]][:, 0] & clean[config]
    return rows, right, clean


def cell(row):
    """ "63.2 [60.1, 66.2] of 500", or a dash."""
    if row is None or row["accuracy"] is None:
        return "-"
    return f"{with_interval(row['accuracy'], row['interval'], 1)} of {row['n']}"


def table_lines(rows, samples, reference, quantizer, method):
    """Markdown table with its caption. quantizer: of `set_quantizer`; method: in words."""
    scores = ("single", "single_clean_right", "best_of_n", "best_of_n_clean_right")
    best = f"best of {samples}"
    header = ["attack", "inference", "texts", "single, all", "single, right", f"{best}, all", f"{best}, right"]
    header += ["token error %", "perplexity", "similarity"]
    digits, cells = {"token_error_rate": 1, "perplexity": 1, "similarity": 3}, []
    for row in rows:
        quality = ["-" if row[key] is None else f"{row[key]:.{number}f}" for key, number in digits.items()]
        found = [cell(row.get(score)) for score in scores]
        cells.append([row["attack"], row["inference"], row["texts"], *found, *quality])
    label = quantizer_label(quantizer)
    caption = CAPTION.format(n=samples, reference=reference, quantizer=label, method=method)
    return [*markdown_table(header, cells), "", caption]


def main():
    start = time.time()
    model_args, args = parse_args(ClassifierArguments, EvalArguments)
    setup_logging(types.SimpleNamespace(process_index=0))
    if args.best_of is not None and args.best_of < 1:
        raise UserError(f"--best_of {args.best_of}: must be at least 1")
    tokenizer = load_tokenizer(model_args)
    model = load_classifier(model_args, tokenizer)
    reference_name, reference = load_reference(model_args, model)
    quantizer = set_attacked_quantizer(model, model_args, args.attack_dirs)
    attacks = load_attacks(args.attack_dirs, model, quantizer, tokenizer, args.best_of)
    samples = args.best_of or min(attack["settings"]["gumbel_samples"] for attack in attacks.values())
    _lock = run_lock(args.output_dir)
    rows, right, clean, cache = [], {}, {}, {}
    for name, attack in attacks.items():
        settings = attack["settings"]
        several = settings["attack_bits"] in ("random", "eot")
        asked = args.eval_bits or (settings["precision_set"] if several else [settings["attack_bits"]])
        configs = resolve_configs(model, asked)
        check_bits(name, attack, configs)
        found = evaluate_attack(name, attack, configs, model, reference, tokenizer, samples, cache)
        rows, right[name], clean = rows + found[0], found[1], clean | found[2]
    compared = gains(attacks, right, clean)
    lines = table_lines(rows, samples, relative_path(reference_name), quantizer, method_name(attack))
    lines += gain_lines(compared)
    print("\n".join(lines), flush=True)
    write_text_atomic(os.path.join(args.output_dir, "table.md"), "\n".join(lines) + "\n")
    record = run_record(
        model=relative_path(model_args.model_name_or_path),
        bit_config={
            "attacks": list(attacks),
            "inference": list(dict.fromkeys(row["inference"] for row in rows)),
            **quantizer,
        },
        metrics={
            f"{row['attack']}/{row['inference']}/{row['texts']}/{key}": row[key]["accuracy"]
            for row in rows
            for key in ("single", "best_of_n")
            if key in row
        },
        data={"attacked": {"examples": len(next(iter(attacks.values()))["texts"])}},
        seed=next(iter(attacks.values()))["settings"]["seed"],
        wall_seconds=time.time() - start,
        reference_model=relative_path(reference_name),
        best_of=samples,
        attack_settings={name: attack["settings"] for name, attack in attacks.items()},
        rows=rows,
        differences_from_float32=compared,
    )
    write_json_atomic(args.record_file or os.path.join(args.output_dir, "record.json"), record)


if __name__ == "__main__":
    with plain_errors():
        main()
