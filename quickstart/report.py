"""Tables of the README pages, and the quick start's plot, from the records.

python quickstart/report.py --records quickstart/work/records --output_dir quickstart/work
python quickstart/report.py --records results/quickstart --output_dir results --pages quickstart/README.md
python quickstart/report.py --attack results/adv_attack/plain_rpi.json --pages adv_attack/README.md
python quickstart/report.py --benchmark results/benchmark.json --pages benchmark/README.md
python quickstart/report.py --language_model results/small_lm --pages language_model/README.md
python quickstart/report.py --compare results/cpt_compare.json --pages cpt/README.md
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "report"))
from findings import over_seeds  # noqa: E402

NOTICE = "Tiny stand-in (made-up text, tiny GPT-2): shows that the code works, says nothing about GPT-2 on SQuAD."
ROWS = {
    "full_fp32": ("full fine-tuning, float32", "32"),
    "lora_fp32": ("LoRA, float32", "32"),
    **{
        f"ptq_{quantizer}_{bits}": (f"LoRA, then {bits}, {quantizer} (post-training)", bits[1])
        for bits in ("W8A8KV8", "W4A8KV8", "W4A4KV4")
        for quantizer in ("minmax", "rotated")
    },
    "bnb_nf4": ("LoRA, then bitsandbytes nf4 (weight-only)", "4"),
    "static_w4_minmax": ("LoRA trained at W4A4KV4, minmax", "4"),
    "static_w4_rotated": ("LoRA trained at W4A4KV4, rotated", "4"),
}
FLOAT = "W32A32KV32"
LM_CONFIGS = (FLOAT, "W8A8KV8", "W4A8KV8", "W4A8KV4", "W4A4KV4")


def load(path):
    """JSON of a record."""
    return json.loads(path.read_text(encoding="utf-8-sig"))


def markdown(header, rows):
    """A markdown table, its columns as wide as they come. header: [text]; rows: [[text]]."""
    lines = [f"| {' | '.join(header).lstrip()} |", "|---" * len(header) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def shown(middle, low, high, digits=1):
    """ "1.5 (1.2 - 1.7)"."""
    return f"{middle:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def paired_difference(first, second):
    """Mean of first - second over the seeds, with its 95 % t-interval, as text."""
    mean, low, high = over_seeds(first, second)
    return f"{mean:+z.1f}" if low is None else f"{mean:+z.1f} [{low:+z.1f}, {high:+z.1f}]"


def compare_table(record):
    """Markdown of cpt's compare.sh: EM of every training at every width, and what CPT gains over static training."""
    scores = {row["training"]: row["scores"] for row in record["rows"]}
    widths = sorted({width for found in scores.values() for width in found})
    costs, cells = {row["training"]: f"{row['relative_cost']:.3f}" for row in record["rows"]}, {}
    for training, found in scores.items():
        measured = [found[width]["exact_match"] if width in found else None for width in widths]
        cells[training] = [shown(*(em[key] for key in ("mean", "min", "max"))) if em else "-" for em in measured]
    cyclic = next(training for training in scores if training.startswith("cyclic"))
    for training in [name for name in scores if name.startswith("static")]:
        pairs = [[scores[name][width]["exact_match"]["values"] for name in (cyclic, training)] for width in widths]
        cells[f"CPT minus {training} [95 %]"] = [paired_difference(*pair) for pair in pairs]
    header = [f"EM, {len(record['seeds'])} seeds", *widths, "cost of a step"]
    return markdown(header, ([name, *found, costs.get(name, "")] for name, found in cells.items()))


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
    """Markdown of `read_rows`."""
    cells = ([label, bits, *(f"{score:.1f}" for score in scores), f"{s:.0f}"] for label, bits, *scores, s in rows)
    return markdown(["configuration", "weight bits", "EM", "F1", "EM drop", "seconds"], cells)


def switchable_table(record):
    """Markdown of switch_precision's evaluation: one model, trained jointly at 4 and 8 bits, under several configs."""
    rows = []
    for row in record["rows"]:
        low, high = row["exact_match_drop_interval"]
        drop = f"{row['exact_match_drop']:.1f} [{low:.1f}, {high:.1f}]"
        scores = f"{row['exact_match']:.1f}", f"{row['f1']:.1f}"
        rows.append([row["config"], f"{row['average_w_bits']:.2f}", *scores, drop])
    header = ["one jointly trained model, served as", "average weight bits", "EM", "F1", "EM drop [95 %]"]
    return markdown(header, rows)


def cyclic_table(record):
    """Markdown of cpt's evaluation: one cyclically trained adapter at every width."""
    header = ["one adapter, trained cyclically (CPT), served at", *(row["config"] for row in record["rows"])]
    return markdown(header, [["EM", *(f"{row['exact_match']:.1f}" for row in record["rows"])]])


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
        rows = []
        for attack, cells in matrix.items():
            found = ["{:.1f} [{:.1f}, {:.1f}]".format(cell["accuracy"], *cell["interval"]) for cell in cells.values()]
            if own:
                random = record["random_precision"][attack]
                found += [f"{random['mean']:.1f} ({random['std']:.1f})", f"{random['mcnemar']['median']:.2g}"]
            rows.append([attack, *found])
        tables.append(markdown(header, rows))
    return "\n\n".join(tables)


def benchmark_table(record):
    """Markdown of benchmark.py: speed against float32, a column a shape; time and memory at the first."""
    cells, more = {}, {}
    for row in record["rows"]:
        key = row["label"], row["config"] or ""
        cells.setdefault(key, {})[row["shape"]] = shown(row["ratio"], row["ratio_min"], row["ratio_max"], 2)
        sizes = [row.get(name) for name in ("peak_bytes", "stored_bytes")]
        sizes = ["" if size is None else f"{size / 2**20:.0f}" for size in sizes]
        more.setdefault(key, [f"{1000 * row['seconds']:.0f}", *sizes])
    shapes = list(next(iter(cells.values())))
    header = ["speed / float32 (min - max)", "bits", *shapes, f"ms, {shapes[0]}", f"peak MiB, {shapes[0]}", "file MiB"]
    return markdown(header, ([*key, *(found[s] for s in shapes), *more[key]] for key, found in cells.items()))


def step_table(record):
    """Markdown of bench_step.py (time) or bench_forward.py (speed), against the first variant's."""
    rows = record["metrics"]["variants"]
    key, head = ("speed", "one forward") if "speed" in next(iter(rows.values())) else ("ratio", "one training step")
    cells = ([name, shown(row[key], min(row[f"{key}s"]), max(row[f"{key}s"]), 2)] for name, row in rows.items())
    return markdown([head, f"{'time' if key == 'ratio' else key}, ratio (min - max)"], cells)


def language_model_table(records):
    """Markdown of language_model's perplexities in a folder of records: mean (min - max) over the seeds."""
    cells = {}
    for path in sorted(records.glob("lm_*.json")):
        record = load(path)
        training = record.get("training", {"trains": "nothing (post-training)", "objective": ""})
        own = record["data"].get("train", {}).get("source", "").endswith(".jsonl")
        learnt = {"ce": "cross-entropy", "kd": "distillation", "": "-"}[training["objective"]]
        text = "-" if learnt == "-" else "generated" if own else "real"
        for row in record.get("rows", ()):
            quantizer = "-" if row["config"] == FLOAT else row["quantizer"].split()[0]
            key = training["trains"], learnt, text, quantizer
            cells.setdefault(key, {}).setdefault(row["config"], []).append(row["perplexity"])
    configs = [name for name in LM_CONFIGS if any(name in found for found in cells.values())]
    rows = []
    for key, found in sorted(cells.items(), key=lambda pair: (pair[0][0] != "nothing (post-training)", pair[0])):
        values = [found.get(name, []) for name in configs]
        several = [shown(sum(v) / len(v), min(v), max(v), 2) if len(v) > 1 else "" for v in values]
        single = ["{:.2f}".format(*v) if len(v) == 1 else "" for v in values]
        rows.append([*key, *map(str.__add__, several, single), str(max(map(len, values)))])
    return markdown(["perplexity; trained", "on", "text", "quantizer", *configs, "seeds"], rows)


def size_table(records):
    """Markdown of two model sizes at equal bytes of their linears: perplexity, mean (min - max) over the seeds."""
    found = {}
    for path in sorted(records.glob("lm_size_*.json")):
        record = load(path)
        blocks = len(record["bit_config"]["layers"]) // 4  # linears of a block
        trained = "distillation, all weights" if "training" in record else "-"
        for row in record["rows"]:
            key = (str(blocks), f"{row['weight_mb']:.2f}", row["config"], trained)
            found.setdefault(key, []).append(row["perplexity"])
    order = sorted(found, key=lambda key: (key[2] != FLOAT, key[3] != "-", -int(key[0])))
    cells = [
        f"{v[0]:.2f}" if len(v) == 1 else shown(sum(v) / len(v), min(v), max(v), 2) for v in map(found.get, order)
    ]
    rows = [[*key, cell, str(len(found[key]))] for key, cell in zip(order, cells, strict=True)]
    return markdown(["blocks", "MB of the linears", "served as", "trained for it", "perplexity", "seeds"], rows)


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


def write_into(pages, tables):
    """Put each table {name: text} into the page that has its two markers."""
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for name, table_text in tables.items():
            begin, end = f"<!-- {name} table: begin -->", f"<!-- {name} table: end -->"
            if begin in text:
                before, rest = text.split(begin)
                text = f"{before}{begin}\n{table_text}\n{end}{rest.split(end)[1]}"
        page.write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--records", type=Path, help="folder of the run records")
    source.add_argument("--attack", type=Path, help="record of random_precision_inference.py on real text")
    source.add_argument("--benchmark", type=Path, help="record of benchmark/benchmark.py")
    source.add_argument("--compare", type=Path, help="record of cpt/compare.sh")
    source.add_argument("--language_model", type=Path, help="folder of records of reproduce's small_lm")
    source.add_argument("--sizes", type=Path, help="folder of records of reproduce's small_sizes")
    source.add_argument("--steps", type=Path, nargs="+", help="records of benchmark/bench_step.py")
    parser.add_argument("--output_dir", type=Path, help="with --records: where quickstart.md and quickstart.png go")
    parser.add_argument("--pages", type=Path, nargs="+", default=[], help="pages whose markers get the table")
    args = parser.parse_args()
    makers = {"attack": attack_table, "benchmark": benchmark_table, "compare": compare_table, "steps": step_table}
    makers |= {"language_model": language_model_table, "sizes": size_table}
    for name, make in makers.items():
        if paths := getattr(args, name):
            paths = paths if name == "steps" else [paths]
            text = "\n\n".join(make(path if path.is_dir() else load(path)) for path in paths)
            write_into(args.pages, {name: text})
            print(text)
            return
    if not args.output_dir:
        parser.error("--records needs --output_dir")
    rows = read_rows(args.records)
    text = f"{NOTICE}\n\n{table(rows)}"
    # of the attacks without the best-of-N rows, which are near zero everywhere
    single = functools.partial(attack_table, kinds=["single sample"])
    tables = {"switch_eval": switchable_table, "cpt_eval": cyclic_table, "attack_rpi": single}
    for name, make in tables.items():
        if (args.records / f"{name}.json").exists():
            text += f"\n\n{make(load(args.records / f'{name}.json'))}"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "quickstart.md").write_text(f"{text}\n")
    plot(rows, args.output_dir / "quickstart.png")
    write_into(args.pages, {"quickstart": text})
    print(f"\n{text}\n\nplot: {args.output_dir / 'quickstart.png'}")


if __name__ == "__main__":
    main()
