"""Table and summary over seeds of the records that seeds.sh made.

python quickstart/seeds.py --records quickstart/work/seeds --seeds 42 43 44 --output quickstart/work/seeds.json
python quickstart/seeds.py --summary results/quickstart_seeds.json --pages switch_precision/README.md
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from report import NOTICE, paired_difference, shown, write_into

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "base_model"))
from common.record import run_record, write_json_atomic  # noqa: E402

BITS = ("W8A8KV8", "W4A4KV4")
METHODS = {
    "joint": "joint, with a mixed assignment a step",
    "uniform": "joint, uniform widths only",
    "sequential_steps": "sequential, equal steps",
    "sequential_passes": "sequential, equal passes",
    "ptq": "LoRA in float32, quantized afterwards",
}
PAIRS = (("uniform", "sequential_passes"), ("joint", "sequential_passes"), ("joint", "sequential_steps"),
         ("joint", "uniform"), ("uniform", "ptq"), ("joint", "ptq"), ("sequential_passes", "ptq"))  # fmt: skip


def load(path):
    if not path.exists():
        raise SystemExit(f"error: {path} is not there: let quickstart/seeds.sh finish, and pass the seeds that it ran")
    return json.loads(path.read_text(encoding="utf-8-sig"))


def spread(values):
    return {"mean": statistics.mean(values), "min": min(values), "max": max(values), "values": values}


def summarize(folder, seeds):
    """The record: EM of every method at both widths, and each search against its random assignments."""
    start = time.time()
    rows, sources = {}, {}
    for method in METHODS:
        scores = {bits: [] for bits in BITS}
        for seed in seeds:
            trained = f"lora_{seed}" if method == "ptq" else f"{method}_{seed}"
            training = load(folder / f"{trained}.json")
            for bits in BITS:
                ptq = (f"ptq_{bits}_{seed}", "eval_exact_match")
                name, key = ptq if method == "ptq" else (trained, f"eval_exact_match_{bits}")
                record = load(folder / f"{name}.json")
                scores[bits].append(record["metrics"][key])
                sources[name] = {"command": record["command"], "git": record["git"], "metrics": record["metrics"]}
        steps = training["steps"]
        rows[method] = {"steps": steps, "passes": training.get("passes", steps)}  # base_model: one pass a step
        rows[method] |= {bits: spread(values) for bits, values in scores.items()}
    searches = {}
    for seed in seeds:
        record = load(folder / f"search_{seed}.json")
        found = next(row for row in record["rows"] if row["config"] == "found")
        searches[seed] = {"average_w_bits": found["average_w_bits"], "found": found["exact_match"]}
        searches[seed] |= record["search"]["found"]["random"]
        sources[f"search_{seed}"] = {"command": record["command"], "git": record["git"]}
    return run_record(
        model="tiny GPT-2 of quickstart/make_model.py",
        bit_config=None,
        metrics={f"{method}, EM at {bits}": row[bits]["mean"] for method, row in rows.items() for bits in BITS},
        data=training["data"],
        seed=[int(seed) for seed in seeds],
        wall_seconds=time.time() - start,
        notice=NOTICE,
        seeds=seeds,
        methods=rows,
        searches=searches,
        records=sources,
    )


def table(summary):
    """Markdown of a summary."""
    number = len(summary["seeds"])
    lines = [f"| {number} seeds | steps | passes | EM at 8 bits | EM at 4 bits |", "|---|---|---|---|---|"]
    for method, label in METHODS.items():
        row = summary["methods"][method]
        cells = " | ".join(shown(*(row[bits][key] for key in ("mean", "min", "max"))) for bits in BITS)
        lines.append(f"| {label} | {row['steps']} | {row['passes']} | {cells} |")
    lines += ["", "| EM, difference of the same seeds [95 %] | at 8 bits | at 4 bits |", "|---|---|---|"]
    for first, second in PAIRS:
        found = [[summary["methods"][method][bits]["values"] for method in (first, second)] for bits in BITS]
        cells = " | ".join(paired_difference(*values) for values in found)
        lines.append(f"| {METHODS[first]}, minus {METHODS[second]} | {cells} |")
    lines += ["", "| seed | average bits | found, EM | random of that budget, mean EM (s.d.) | random better |"]
    lines += ["|---|---|---|---|---|"]
    for seed, row in summary["searches"].items():
        random = f"{row['mean_exact_match']:.1f} ({row['std_exact_match']:.1f})"
        better = f"{row['better_than_found']} of {row['number']}"
        lines.append(f"| {seed} | {row['average_w_bits']:.2f} | {row['found']:.1f} | {random} | {better} |")
    found, random = ([row[key] for row in summary["searches"].values()] for key in ("found", "mean_exact_match"))
    lines.append(f"| all | | found minus mean of random [95 %]: {paired_difference(found, random)} | | |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--records", type=Path, help="folder of the records of seeds.sh")
    source.add_argument("--summary", type=Path, help="a summary made earlier")
    parser.add_argument("--seeds", nargs="+", default=["42", "43", "44"], help="with --records: the seeds that it ran")
    parser.add_argument("--output", type=Path, help="with --records: where the summary goes")
    parser.add_argument("--pages", type=Path, nargs="+", default=[], help="pages whose markers get the table")
    args = parser.parse_args()
    summary = summarize(args.records, args.seeds) if args.records else load(args.summary)
    if args.output:
        write_json_atomic(args.output, summary)
    text = f"{summary['notice']}\n\n{table(summary)}"
    write_into(args.pages, {"seeds": text})
    print(text)


if __name__ == "__main__":
    main()
