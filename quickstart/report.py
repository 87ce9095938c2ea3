"""Table and plot of the quick start's records; README tables of an attack on real text and of the benchmark.

python quickstart/report.py --records quickstart/work/records --output_dir quickstart/work
python quickstart/report.py --records results/quickstart --output_dir results --readme README.md
python quickstart/report.py --attack results/adv_attack/plain_rpi.json --readme README.md
python quickstart/report.py --benchmark results/benchmark.json --readme README.md
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NOTICE = "Tiny stand-in (made-up text, tiny GPT-2): shows that the code works, says nothing about GPT-2 on SQuAD."
ROWS = {
    "full_fp32": ("full fine-tuning, float32", "32"),
    "lora_fp32": ("LoRA, float32", "32"),
    "ptq_W8A8KV8": ("LoRA, then W8A8KV8 (post-training)", "8"),
    "ptq_W4A4KV4": ("LoRA, then W4A4KV4 (post-training)", "4"),
    "bnb_nf4": ("LoRA, then bitsandbytes nf4 (weight-only)", "4"),
    "static_w4": ("LoRA trained at W4A4KV4", "4"),
}


def load(path):
    """JSON of a record."""
    return json.loads(path.read_text(encoding="utf-8-sig"))


def read_rows(records):
    """[(label, weight bits, EM, F1, EM drop against float32 LoRA, wall seconds)] of the records that are there."""
    paths = {name: records / f"{name}.json" for name in ROWS}
    found = {name: load(path) for name, path in paths.items() if path.exists()}
    if "lora_fp32" not in found:
        raise SystemExit(f"error: {records} has no lora_fp32.json; run bash quickstart/run.sh first")
    reference = found["lora_fp32"]["metrics"]["eval_exact_match"]
    rows = []
    for name, record in found.items():
        exact, f1 = record["metrics"]["eval_exact_match"], record["metrics"]["eval_f1"]
        rows.append((*ROWS[name], exact, f1, reference - exact, record["wall_seconds"]))
    return rows


def table(rows):
    """Markdown."""
    lines = ["| configuration | weight bits | EM | F1 | EM drop | seconds |", "|---|---|---|---|---|---|"]
    for label, bits, exact, f1, drop, seconds in rows:
        lines.append(f"| {label} | {bits} | {exact:.1f} | {f1:.1f} | {drop:.1f} | {seconds:.0f} |")
    return "\n".join(lines)


def switchable_table(record):
    """Markdown of switch_precision's evaluation: one model, trained jointly at 4 and 8 bits, under several configs."""
    lines = [
        "| one jointly trained model, served as | average weight bits | EM | F1 | EM drop [95 %] |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        low, high = row["exact_match_drop_interval"]
        drop = f"{row['exact_match_drop']:.1f} [{low:.1f}, {high:.1f}]"
        scores = f"{row['exact_match']:.1f} | {row['f1']:.1f}"
        lines.append(f"| {row['config']} | {row['average_w_bits']:.2f} | {scores} | {drop} |")
    return "\n".join(lines)


def cyclic_table(record):
    """Markdown of cpt's evaluation: one cyclically trained adapter at every width."""
    cells = [f"{row['exact_match']:.1f}" for row in record["rows"]]
    names = [row["config"] for row in record["rows"]]
    return "\n".join(
        [
            f"| one adapter, trained cyclically (CPT), served at | {' | '.join(names)} |",
            "|---" * (len(names) + 1) + "|",
            f"| EM | {' | '.join(cells)} |",
        ]
    )


def attack_table(record, kinds=None):
    """Markdown of adv_attack's random_precision_inference.py: accuracy by attack and by inference precision."""
    tables = []
    for kind, matrix in record["matrices"].items():
        if kinds and kind not in kinds:
            continue
        columns = list(next(iter(matrix.values())))
        count = next(iter(next(iter(matrix.values())).values()))["n"]
        own = kind == "single sample"  # random precision is drawn per query: only there it has a mean and a spread
        more = ["random precision (s.d. of draws)", "McNemar p"] if own else []
        header = [f"accuracy [95 %] on {count} texts, {kind}; attacked at", *columns, *more]
        lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for attack, cells in matrix.items():
            found = ["{:.1f} [{:.1f}, {:.1f}]".format(cell["accuracy"], *cell["interval"]) for cell in cells.values()]
            if own:
                random = record["random_precision"][attack]
                found += [f"{random['mean']:.1f} ({random['std']:.1f})", f"{random['mcnemar']['median']:.2g}"]
            lines.append(f"| {attack} | {' | '.join(found)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def quick_attack_table(record):
    """The part of it that the quick start shows: its best-of-N rows are near zero everywhere."""
    return attack_table(record, ["single sample"])


def benchmark_table(record):
    """Markdown of switch_precision's benchmark.py: speed against float32, a column a shape; time and memory at the
    first."""
    cells, more = {}, {}
    for row in record["rows"]:
        key = row["label"], row["config"] or ""
        ratio = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} - {row['ratio_max']:.2f})"
        cells.setdefault(key, {})[row["shape"]] = ratio
        sizes = [row.get(name) for name in ("peak_bytes", "stored_bytes")]
        sizes = ["" if size is None else f"{size / 2**20:.0f}" for size in sizes]
        more.setdefault(key, [f"{1000 * row['seconds']:.0f}", *sizes])
    shapes = list(next(iter(cells.values())))
    header = ["speed / float32 (min - max)", "bits", *shapes, f"ms, {shapes[0]}", f"peak MiB, {shapes[0]}", "file MiB"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    lines += [f"| {' | '.join([*key, *(found[s] for s in shapes), *more[key]])} |" for key, found in cells.items()]
    return "\n".join(lines)


def plot(rows, path):
    """EM and F1 of every row as bars."""
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.6), layout="constrained")
    positions = range(len(rows))
    for offset, column, name, colour in ((-0.2, 2, "EM", "#2b6ca3"), (0.2, 3, "F1", "#a9c8e2")):
        values = [row[column] for row in rows]
        bars = axes.barh([p + offset for p in positions], values, 0.38, color=colour, label=name)
        axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(list(positions), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel("percent on the tiny data set")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    figure.suptitle(NOTICE, fontsize=8)
    figure.savefig(path, dpi=150)


def write_into(readme, text, name):
    """Replace what stands between the two markers `name` of the README."""
    begin, end = f"<!-- {name} table: begin -->", f"<!-- {name} table: end -->"
    before, rest = readme.read_text().split(begin)
    _, after = rest.split(end)
    readme.write_text(f"{before}{begin}\n{text}{end}{after}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--records", type=Path, help="folder of the run records")
    source.add_argument("--attack", type=Path, help="record of random_precision_inference.py on real text")
    source.add_argument("--benchmark", type=Path, help="record of switch_precision/benchmark.py")
    parser.add_argument("--output_dir", type=Path, help="with --records: where quickstart.md and quickstart.png go")
    parser.add_argument("--readme", type=Path, help="also put the table into this file, between its markers")
    args = parser.parse_args()
    for name, path, make in (("attack", args.attack, attack_table), ("benchmark", args.benchmark, benchmark_table)):
        if path:
            text = f"{make(json.loads(path.read_text(encoding='utf-8-sig')))}\n"
            if args.readme:
                write_into(args.readme, text, name)
            print(text)
            return
    if not args.output_dir:
        parser.error("--records needs --output_dir")
    rows = read_rows(args.records)
    text = f"{NOTICE}\n\n{table(rows)}\n"
    tables = {"switch_eval": switchable_table, "cpt_eval": cyclic_table, "attack_rpi": quick_attack_table}
    for name, make in tables.items():
        if (args.records / f"{name}.json").exists():
            text += f"\n{make(load(args.records / f'{name}.json'))}\n"
    (args.output_dir / "quickstart.md").write_text(text)
    plot(rows, args.output_dir / "quickstart.png")
    if args.readme:
        write_into(args.readme, text, "quickstart")
    print(f"\n{text}\nplot: {args.output_dir / 'quickstart.png'}")


if __name__ == "__main__":
    main()
