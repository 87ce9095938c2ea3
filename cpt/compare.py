"""Table of compare.sh: EM and F1 of static and cyclic training at equal updates, over seeds, with the training cost.

python compare.py --runs results/compare --seeds 42 43 44
"""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

from common.record import command_line, relative_path, run_record, write_json_atomic
from cyclic_precision_trainer import training_cost
from models.errors import UserError
from models.user_input import read_json

LABELS = {
    "static4": "static, 4 bits",
    "static8": "static, 8 bits",
    "cpt": "cyclic (CPT)",
    "joint": "joint (switchable precision)",
}
METRICS = {"exact_match": "EM", "f1": "F1"}


def load(path):
    """JSON of a file that an earlier step must have left."""
    try:
        return read_json(path)
    except FileNotFoundError:
        sys.exit(f"error: {path} is not there: let compare.sh finish, and pass the seeds that it ran")
    except UserError as error:
        sys.exit(f"error: {error}")


def check_comparable(records):
    """Refuse runs that differ in more than seed and bits. records: {name: record}."""
    (first, expected), *others = records.items()
    for name, record in others:
        for key in ("training", "data", "dtype", "model"):
            if record[key] != expected[key]:
                sys.exit(f"error: {first} and {name} differ in {key}: {expected[key]} and {record[key]}")


def joint_cost(settings):
    """Cost of one joint step relative to a float32 step: the sum of its passes, None where they vary over the run.

    A mixed pass draws the width of every layer evenly, so that its expected cost is the mean over the widths.
    settings: run_settings.json of the joint run.
    """
    varying = (settings["bit_configs"], settings["curriculum"], settings["sample_widths"])
    if settings["objective"] != "joint" or any(varying):
        return None
    widths = sorted(settings["bit_widths"])
    passes = [[32]] * settings["teacher"] + [[widths[-1]]]
    if len(widths) > 1:
        passes += [widths] * settings["num_mixed_configs"] + [[widths[0]]]
    return sum(training_cost(bits)["total"] for bits in passes)


def spread(values):
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values), "values": values}


def summarize(label, records, steps, cost, mean_bits):
    """One row. records: those of its seeds."""
    metrics = [record["metrics"] for record in records]
    scores = {}
    for name in sorted(key.removeprefix("eval_f1_") for key in metrics[0] if key.startswith("eval_f1_")):
        scores[name] = {metric: spread([found[f"eval_{metric}_{name}"] for found in metrics]) for metric in METRICS}
    row = {"training": label, "runs": len(records), "steps": steps, "mean_bits": mean_bits}
    return row | {"relative_cost": cost, "scores": scores}


def table(rows, metric):
    """Markdown: a row a training, a column a width."""
    names = sorted({name for row in rows for name in row["scores"]})
    lines = [f"| {METRICS[metric]} | runs | updates | {' | '.join(names)} | cost |", "|---" * (len(names) + 4) + "|"]
    for row in rows:
        cells = []
        for name in names:
            found = row["scores"].get(name, {}).get(metric)
            cells.append(f"{found['mean']:.1f} ({found['min']:.1f}-{found['max']:.1f})" if found else "-")
        cost = "-" if row["relative_cost"] is None else f"{row['relative_cost']:.4f}"
        lines.append(f"| {row['training']} | {row['runs']} | {row['steps']} | {' | '.join(cells)} | {cost} |")
    return lines


def script_command(runs, seeds, joint):
    """The command line of compare.sh, from the settings.txt that it left; without that, the one of this script."""
    try:
        lines = (runs / "settings.txt").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return command_line()
    variables, flags = lines[:3], lines[3:]
    values = dict(line.split("=", 1) for line in variables) | {"OUTPUT_DIR": str(runs), "SEEDS": " ".join(seeds)}
    values |= {"JOINT": joint} if joint else {}
    words = [f"{name}={shlex.quote(relative_path(value))}" for name, value in values.items() if value]
    script = os.path.relpath(Path(__file__).with_suffix(".sh"))
    return " ".join([*words, "bash", script, shlex.join(map(relative_path, flags))]).rstrip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="OUTPUT_DIR of compare.sh")
    parser.add_argument("--seeds", nargs="+", required=True, help="the seeds it ran")
    parser.add_argument("--joint", help="the jointly trained checkpoint it evaluated; SEED stands for a seed")
    args = parser.parse_args()
    start = time.time()

    names = {kind: [f"{kind}_{seed}" for seed in args.seeds] for kind in ("static4", "static8", "cpt")}
    records = {name: load(args.runs / name / "record.json") for group in names.values() for name in group}
    check_comparable(records)
    rows = []
    for kind, group in names.items():
        found = [records[name] for name in group]
        cost, bits = found[0]["training_cost"]["total"], found[0]["cyclic"]["mean_bits"]
        rows.append(summarize(LABELS[kind], found, found[0]["steps"], cost, bits))
    if args.joint:
        names["joint"] = [f"joint_{seed}" for seed in args.seeds] if "SEED" in args.joint else ["joint"]
        settings = load(Path(args.joint.replace("SEED", args.seeds[0])) / "run_settings.json")
        records |= {name: load(args.runs / name / "record.json") for name in names["joint"]}
        found = [records[name] for name in names["joint"]]
        rows.append(summarize(LABELS["joint"], found, settings["max_steps"], joint_cost(settings), None))

    first = records["cpt_" + args.seeds[0]]
    training = first["training"]
    caption = (
        f"{training['max_steps']} updates of {training['windows_per_step']} windows, learning rate "
        f"{training['learning_rate']:g} ({training['lr_scheduler_type']}), seeds {' '.join(args.seeds)}: mean "
        "(min-max). Cost: BitOPs of a step by CPT's model, 1 for float32; joint: its passes together, and updates, "
        "batch and learning rate of its own."
    )
    lines = [*table(rows, "exact_match"), "", *table(rows, "f1"), "", caption]
    print("\n".join(lines), flush=True)
    means = {
        f"{row['training']}, {name}, {label}": row["scores"][name][metric]["mean"]
        for row in rows
        for name in row["scores"]
        for metric, label in METRICS.items()
    }
    sources = {relative_path(str(args.runs / name / "record.json")): record for name, record in records.items()}
    sources = {path: {key: record.get(key) for key in ("command", "git")} for path, record in sources.items()}
    content = run_record(
        model=first["model"],
        bit_config=None,
        metrics=means,
        data=first["data"],
        seed=[int(seed) for seed in args.seeds],
        wall_seconds=time.time() - start,
        caption=caption,
        training=training,
        cyclic=first["cyclic"],
        rows=rows,
        records=sources,
    )
    content["command"] = script_command(args.runs, args.seeds, args.joint)
    write_json_atomic(args.runs / "summary.json", content)


if __name__ == "__main__":
    main()
