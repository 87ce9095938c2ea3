#!/usr/bin/env python
"""Does a random precision at inference protect? Attack precision x inference precision, and a draw per query.

    python random_precision_inference.py --model_name_or_path results/train --precision_set 4 8 \\
        --attack_dirs results/attack_32 results/attack_8 results/attack_4 results/attack_random results/attack_eot \\
        --bitsandbytes 8bit nf4 --output_dir results/rpi

Random precision inference (RPI): Double-Win Quant, ICML 2021, claimed for adversarially trained vision models. Two
attackers stand beside each other: one whose precision is drawn independently of the model's (mean of all cells of the
matrix), and one who knows the model's precision (its diagonal). The adaptive attacker (EOT) is a row of its own.
Writes table.md, matrix.png and record.json.
"""

import dataclasses
import os
import textwrap
import time
import types

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from adversarial_texts import baseline_name, check_bits, correct_table, load_attacks, set_attacked_quantizer
from attack_setup import ClassifierArguments, load_classifier
from classifier import accuracy_row
from common.arguments import option
from common.calibration import quantizer_label
from common.flags import parse_args
from common.loading import load_tokenizer, resolve_configs
from common.record import atomic_path, plot_caption, relative_path, run_record, write_json_atomic, write_text_atomic
from common.resuming import run_lock
from common.script import plain_errors, setup_logging
from common.statistics import markdown_table, mcnemar, with_interval
from models.bitsandbytes_ptq import LABELS, METHODS, quantize_with_bitsandbytes
from models.errors import UserError

CLEAN = "no attack"
FULL_PRECISION = "W32A32KV32"


@dataclasses.dataclass
class RandomPrecisionArguments:
    """What to evaluate."""

    output_dir: str = dataclasses.field(metadata={"help": "folder of table.md, matrix.png and record.json"})
    attack_dirs: list[str] = dataclasses.field(
        metadata={"help": "output folders of whitebox_attack.py, word_attack.py"}
    )
    precision_set: list[str] = option(["4", "8"], "the precisions that a query's is drawn from: widths or configs")
    inference_bits: list[str] = option(["32"], "further columns: fixed precisions outside the set")
    bitsandbytes: list[str] = option([], "columns of another quantizer: 8bit, nf4", aliases=["--bnb"])
    repetitions: int = option(100, "independent sequences of draws")
    best_of: int | None = option(None, "hard samples that the best-of-N attacker may try (default: all that are kept)")
    seed: int = option(42, "seed of the draws")
    record_file: str | None = option(None, "where the run's JSON record goes (default: record.json in --output_dir)")


def check_args(args):
    """Refuse what cannot work, before anything is loaded."""
    if len(set(args.precision_set)) < 2:
        raise UserError(f"--precision_set {' '.join(args.precision_set)}: needs at least two precisions")
    if args.repetitions < 2:
        raise UserError(f"--repetitions {args.repetitions}: at least 2, random precision is a random variable")
    if args.best_of is not None and args.best_of < 1:
        raise UserError(f"--best_of {args.best_of}: must be at least 1")
    for method in args.bitsandbytes:
        if method not in METHODS:
            raise UserError(f"--bitsandbytes {method}: allowed are {', '.join(METHODS)}")


def matrix_summary(matrix):
    """What a square attack x inference matrix of accuracies (P, P) says about random precision inference.

    Returns: {"mean_all": expected accuracy when attacker and defender draw independently and uniformly,
        "mean_diagonal": when the attacker knows the precision, "mean_off_diagonal": when the draws never agree}.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise UserError(f"transfer matrix of shape {matrix.shape}: rows and columns must be the same precisions")
    size, diagonal, total = len(matrix), float(np.trace(matrix)), float(matrix.sum())
    apart = (total - diagonal) / (size**2 - size) if size > 1 else None
    return {"mean_all": total / size**2, "mean_diagonal": diagonal / size, "mean_off_diagonal": apart}


def draw_precisions(count, shape, seed, repetition):
    """Which of `count` precisions serves each query: independent, uniform; a function of seed and repetition."""
    return np.random.default_rng([seed, repetition]).integers(count, size=shape)


def random_precision(correct, reference, repetitions, seed):
    """Accuracy when every query gets a precision of its own, in `repetitions` independent sequences of draws.

    Args: correct (P, texts, samples) bool, at each precision of the set; reference (texts, samples) bool at full
        precision, or None.
    Returns: expected: accuracy (percent) over all draws, from the table itself; mean, std, low, high: over the
        repetitions, first sample; best_of_n_...: broken if any sample, each with its own draw, is wrong;
        repeated_queries: share that the first sample never breaks in all repetitions; first: accuracy row of
        repetition 0; mcnemar: exact paired test against `reference` on the same inputs (None without one).
    """
    queries = correct.shape[1:]
    index = np.indices(queries)
    outcomes = np.array(
        [correct[draw_precisions(len(correct), queries, seed, number), *index] for number in range(repetitions)]
    )  # (repetitions, texts, samples)
    first, singles, best = outcomes[:, :, 0], 100 * outcomes[:, :, 0].mean(1), 100 * outcomes.all(2).mean(1)
    result = {
        "expected": 100 * float(correct[:, :, 0].mean()),
        **{"mean": float(singles.mean()), "std": float(singles.std(ddof=1))},
        **{"low": float(singles.min()), "high": float(singles.max())},
        "repeated_queries": accuracy_row(first.all(0)),
        **{"best_of_n_mean": float(best.mean()), "best_of_n_std": float(best.std(ddof=1))},
        "first": accuracy_row(first[0]),
        "mcnemar": None,
    }
    if reference is not None:
        right = reference[:, 0]
        pvalues = [mcnemar(right, outcome) for outcome in first]
        result["mcnemar"] = {
            **{"first": pvalues[0], "median": float(np.median(pvalues))},
            "only_full_precision_right": int((right & ~first[0]).sum()),
            "only_random_right": int((~right & first[0]).sum()),
        }
    return result


def measure(model_args, tokenizer, model, attacks, configs, args, samples):
    """{column: {row: (texts, samples) bool}}: right answers; what is wrong without attack is wrong throughout."""
    first = next(iter(attacks.values()))
    texts, length = first["texts"], first["settings"]["max_seq_length"]

    def column(target):
        clean = correct_table(target, tokenizer, texts, "text", samples, length)
        found = {baseline_name(first): correct_table(target, tokenizer, texts, "initial_samples", samples, length)}
        for name, attack in attacks.items():
            found[name] = correct_table(target, tokenizer, attack["texts"], "samples", samples, length)
        return {CLEAN: clean.repeat(samples, 1)} | {name: rows & clean for name, rows in found.items()}

    columns = {}
    for name, resolved in configs.items():
        with model.at_bits(resolved):
            columns[name] = column(model)
    for method in args.bitsandbytes:
        columns[LABELS[method]] = column(quantize_with_bitsandbytes(load_classifier(model_args, tokenizer), method))
    return columns


def transfer_matrix(columns, kind):
    """{row: {column: accuracy row}}; kind: "single" (first sample) or "best_of_n" (all samples must be right)."""

    def cell(right):
        return accuracy_row(right[:, 0] if kind == "single" else right.all(1))

    rows = next(iter(columns.values()))
    return {row: {name: cell(table[row]) for name, table in columns.items()} for row in rows}


def draw_matrix(matrices, rpi, path, caption):
    """Heat maps of matrices {title: of `transfer_matrix`}, single sample and best of N, with random precision
    inference, rpi {row: of `random_precision`}, as the last column."""
    columns, rows = [*next(iter(next(iter(matrices.values())).values())), "RPI (mean)"], list(rpi)
    size = (2.2 + 0.95 * len(columns) * len(matrices), 1.7 + 0.36 * len(rows))
    figure, panels = plt.subplots(1, len(matrices), figsize=size, layout="constrained", sharey=True)
    for axes, (title, matrix), key in zip(panels, matrices.items(), ("mean", "best_of_n_mean"), strict=True):
        values = np.array([[*(one["accuracy"] for one in matrix[row].values()), rpi[row][key]] for row in rows])
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        names = [textwrap.fill(name.removesuffix(" (weight-only)"), 14) for name in columns]
        axes.set_xticks(range(len(columns)), names, fontsize=8)
        axes.set_xlabel("inference precision")
        axes.set_title(title, fontsize=10)
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value < 60 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    panels[0].set_yticks(range(len(rows)), rows, fontsize=8)
    panels[0].set_ylabel("attack")
    figure.colorbar(image, ax=panels, label="accuracy (%)", pad=0.01)
    figure.suptitle(caption, fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)


def matrix_lines(title, matrix, rpi, key):
    """Markdown of one matrix."""
    names, cells = list(next(iter(matrix.values()))), []
    for row, found in matrix.items():
        texts = [with_interval(one["accuracy"], one["interval"], 1) for one in found.values()]
        spread = rpi[row]["std" if key == "mean" else "best_of_n_std"]
        cells.append([row, *texts, f"{rpi[row][key]:.1f} ± {spread:.1f}"])
    return [f"**{title}**", "", *markdown_table(["attack \\ inference", *names, "RPI"], cells), ""]


def report_lines(matrices, rpi, summary, args, texts, label):
    """The whole table.md."""
    lines = []
    for (title, matrix), key in zip(matrices.items(), ("mean", "best_of_n_mean"), strict=True):
        lines += matrix_lines(title, matrix, rpi, key)
    header = ["attack", "RPI, expected", "lowest - highest draw", f"right in all {args.repetitions} queries"]
    header += ["full precision : RPI, right alone", "McNemar p (median)"]
    cells = []
    for name, row in rpi.items():
        test = row["mcnemar"]
        alone = f"{test['only_full_precision_right']} : {test['only_random_right']}" if test else "-"
        p = f"{test['first']:.2g} ({test['median']:.2g})" if test else "-"
        spread = f"{row['low']:.1f} - {row['high']:.1f}"
        cells.append([name, f"{row['expected']:.1f}", spread, f"{row['repeated_queries']['accuracy']:.1f}", alone, p])
    lines += [*markdown_table(header, cells), ""]
    for title, values in summary.items():
        numbers = ", ".join(f"{key} {value:.1f}" for key, value in values.items())
        lines.append(f"Attacks at the set x inference at the set, {title}: {numbers}.")
    lines += [
        "",
        f"Quantizer: {label}. "
        f"{texts} texts; accuracy in percent [Wilson 95 %], all inputs counted, a clean error counts as broken. RPI: "
        f"a precision of {', '.join(args.precision_set)} per query, mean ± standard deviation over {args.repetitions} "
        "sequences of draws. mean_all: the attacker draws a precision too, independently; mean_diagonal: the attacker "
        "knows it. McNemar: exact, full precision against RPI on the same inputs, first sequence (median of all).",
    ]
    return lines


def main():
    start = time.time()
    model_args, args = parse_args(ClassifierArguments, RandomPrecisionArguments)
    setup_logging(types.SimpleNamespace(process_index=0))
    check_args(args)
    tokenizer = load_tokenizer(model_args)
    model = load_classifier(model_args, tokenizer)
    members = resolve_configs(model, args.precision_set)
    configs = resolve_configs(model, [*args.inference_bits, *args.precision_set])
    quantizer = set_attacked_quantizer(model, model_args, args.attack_dirs)
    attacks = load_attacks(args.attack_dirs, model, quantizer, tokenizer, args.best_of)
    for name, attack in attacks.items():
        check_bits(name, attack, configs)
    _lock = run_lock(args.output_dir)
    samples = args.best_of or min(attack["settings"]["gumbel_samples"] for attack in attacks.values())
    columns = measure(model_args, tokenizer, model, attacks, configs, args, samples)
    kinds = {"single sample": "single", f"best of {samples} samples": "best_of_n"}
    matrices = {title: transfer_matrix(columns, kind) for title, kind in kinds.items()}
    rpi, summary, full = {}, {}, columns.get(FULL_PRECISION, {})
    for row in matrices["single sample"]:
        correct = np.array([columns[name][row] for name in members])
        rpi[row] = random_precision(correct, full.get(row), args.repetitions, args.seed)
    if all(name in attacks for name in members):  # the square part: every precision of the set was attacked
        for title, matrix in matrices.items():
            summary[title] = matrix_summary([[matrix[row][name]["accuracy"] for name in members] for row in members])
    texts = len(next(iter(attacks.values()))["texts"])
    label = quantizer_label(quantizer)
    lines = report_lines(matrices, rpi, summary, args, texts, label)
    print("\n".join(lines), flush=True)
    write_text_atomic(os.path.join(args.output_dir, "table.md"), "\n".join(lines) + "\n")
    attacked = {"source": f"texts attacked in {relative_path(args.attack_dirs[0])}", "examples": texts}
    caption = f"{plot_caption(model_args.model_name_or_path, attacked)}; quantizer: {label}"
    draw_matrix(matrices, rpi, os.path.join(args.output_dir, "matrix.png"), caption)
    record = run_record(
        model=relative_path(model_args.model_name_or_path),
        bit_config={
            "precision_set": list(members),
            "inference": list(configs),
            "bitsandbytes": args.bitsandbytes,
            **quantizer,
        },
        metrics={f"{row}/rpi": values["mean"] for row, values in rpi.items()},
        data={"attacked": {"examples": texts}},
        seed=args.seed,
        wall_seconds=time.time() - start,
        repetitions=args.repetitions,
        best_of=samples,
        matrices=matrices,
        random_precision=rpi,
        summary=summary,
        attack_settings={name: attack["settings"] for name, attack in attacks.items()},
    )
    write_json_atomic(args.record_file or os.path.join(args.output_dir, "record.json"), record)


if __name__ == "__main__":
    with plain_errors():
        main()
