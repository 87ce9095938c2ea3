"""Tables and summary over seeds of the records that seeds.sh made.

python quickstart/seeds.py --records quickstart/work/seeds --seeds 42 43 44 --output quickstart/work/seeds.json
python quickstart/seeds.py --summary results/quickstart_seeds.json --pages switch_precision/README.md
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from report import NOTICE, markdown, paired_difference, shown, write_into

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "base_model"))
from common.record import run_record, write_json_atomic  # noqa: E402

QUANTIZERS = ("minmax", "rotated")
OPERANDS = ("W8A8KV8", "W4A8KV8", "W4A4KV4", "W4A32KV32", "W32A4KV32", "W32A32KV4", "W3A3KV3", "W2A8KV8")
FLOAT, EIGHT, FOUR, THREE = "W32A32KV32", "W8A8KV8", "W4A4KV4", "W3A3KV3"
TRAINED = (EIGHT, FOUR, THREE)  # columns of the table of trainings
METHODS = {
    "ptq_minmax": "LoRA in float32, then MinMax",
    "ptq_rotated": "LoRA in float32, then rotated",
    "static_minmax": "trained at 4 bits, MinMax",
    "static_rotated": "trained at 4 bits, rotated",
    "joint": "joint 8 and 4, rotated, 4 bits join late",
    "nokl": "the same without distillation",
    "mixed": "the same with a random assignment a step",
    "sequential": "published procedure, MinMax",
    "joint3": "joint 8 and 3, rotated, 3 bits join late",
    "joint3_early": "the same, 3 bits join after 60 %",
}
FACTORS, ALL_FACTORS = ("30", "1"), ("30", "10", "3", "1")  # over all seeds; post-training quantization of one seed
EVERY_FACTOR = ("ptq_minmax", "ptq_rotated", "joint")
PAIRS = (
    ("joint", "ptq_rotated"),
    ("joint", "static_rotated"),
    ("joint", "nokl"),
    ("joint", "mixed"),
    ("joint", "sequential"),
    ("static_rotated", "static_minmax"),
    ("joint3", "ptq_rotated"),
    ("joint3_early", "ptq_rotated"),
)
PASSES = ("800",)  # of the shorter trainings
SEARCHES = {  # labels of the searches; names of their own, as some are named after a method
    "search_joint": "8 and 4 bits, jointly trained",
    "search_mixed": "8 and 4 bits, trained with random assignments",
    "search_lora": "8 and 3 bits, float32 adapter",
    "search_operands": "8 and 3 bits, float32 adapter, W, A and KV apart",
}


def load(path):
    if not path.exists():
        raise SystemExit(f"error: {path} is not there: let quickstart/seeds.sh finish, and pass the seeds that it ran")
    return json.loads(path.read_text(encoding="utf-8-sig"))


def methods_of(factor):
    """The methods that seeds.sh ran on the stand-in of this factor."""
    return [method for method in METHODS if factor == FACTORS[0] or method in EVERY_FACTOR]


def spread(values):
    return {"mean": statistics.mean(values), "min": min(values), "max": max(values), "values": values}


def scores_of(folder, method, at):
    """({config: EM}, {config: noise floor}, record of the evaluation, record of the training) of one run."""
    ptq = method.startswith("ptq")
    record = load(folder / f"{method if ptq else f'eval_{method}'}_{at}.json")
    rows = {row["config"]: row for row in record["rows"]}
    measured = load(folder / f"{method.replace('ptq', 'floor')}_{at}.json")["rows"] if ptq else record["rows"]
    floors = {row["config"]: row["noise_floor"] for row in measured}
    training = load(folder / f"{'lora' if ptq else method}_{at}.json")
    return {name: row["exact_match"] for name, row in rows.items()}, floors, record, training


def outliers_of(folder, factor, seed):
    """One row of the table of outliers: how large they are, and what both quantizers make of them."""
    records = [load(folder / f"ptq_{quantizer}_{factor}_{seed}.json") for quantizer in QUANTIZERS]
    rows = [{row["config"]: row["exact_match"] for row in record["rows"]} for record in records]
    sizes = {name.partition(".h.")[2].partition(".")[2]: [] for name in records[1]["outliers"]}
    for name, size in records[1]["outliers"].items():
        sizes[name.partition(".h.")[2].partition(".")[2]].append(size)
    sources = {
        f"ptq_{quantizer}_{factor}_{seed}": record for quantizer, record in zip(QUANTIZERS, records, strict=True)
    }
    row = {"outliers": {name: [min(found), max(found)] for name, found in sizes.items()}, "float": rows[0][FLOAT]}
    for quantizer, scores in zip(QUANTIZERS, rows, strict=True):
        row[quantizer] = {config: scores[config] for config in (EIGHT, "W4A8KV8", FOUR)}
    return row, {name: {"command": record["command"], "git": record["git"]} for name, record in sources.items()}


def curves_of(folder, factor, seeds, longest, sources):
    """{passes: {label: {config: spread}}} of the float32 adapter quantized afterwards and of joint training."""
    curves = {}
    for passes in PASSES:
        curves[passes] = {}
        for label, name in (("ptq_rotated", f"ptq_{passes}"), ("joint", f"eval_joint_{passes}")):
            records = {seed: load(folder / f"{name}_{factor}_{seed}.json") for seed in seeds}
            scores = [{row["config"]: row["exact_match"] for row in record["rows"]} for record in records.values()]
            curves[passes][label] = {config: spread([found[config] for found in scores]) for config in scores[0]}
            for seed, record in records.items():
                sources[f"{name}_{factor}_{seed}"] = {"command": record["command"], "git": record["git"]}
    curves["1200"] = {label: longest[label] for label in ("ptq_rotated", "joint")}
    return curves


def summarize(folder, seeds):
    """The record: EM of every method at every config and factor, noise floors, searches against random ones."""
    start, rows, searches, sources, steps, outliers = time.time(), {}, {}, {}, {}, {}
    for factor in ALL_FACTORS:
        outliers[factor], found = outliers_of(folder, factor, seeds[0])
        sources |= found
    for factor in FACTORS:
        rows[factor] = {}
        for method in methods_of(factor):
            found, floors = {}, {}
            for seed in seeds:
                scores, floor, record, training = scores_of(folder, method, f"{factor}_{seed}")
                for config, score in scores.items():
                    found.setdefault(config, []).append(score)
                for config, values in floor.items():
                    low, high = values["exact_match"]
                    floors.setdefault(config, []).append([high - low, values["changed"]])
                name = f"{method}_{factor}_{seed}"
                sources[name] = {"command": record["command"], "git": record["git"], "metrics": record["metrics"]}
                sources[f"training of {name}"] = {"command": training["command"], "git": training["git"]}
                steps[method] = training["steps"], training.get("passes", training["steps"])  # base_model: one a step
            rows[factor][method] = {config: spread(values) for config, values in found.items()}
            for config, values in floors.items():
                rows[factor][method][config]["noise_floor"] = [max(column) for column in zip(*values)]
        if factor == FACTORS[0]:
            curves = curves_of(folder, factor, seeds, rows[factor], sources)
    for kind in SEARCHES:
        searches[kind] = {}
        for seed in seeds:
            record = load(folder / f"{kind}_{FACTORS[0]}_{seed}.json")
            (name,) = record["search"]
            scores = {row["config"]: row["exact_match"] for row in record["rows"]}
            averages = record["search"][name]["average_bits"]
            searches[kind][seed] = {"average_bits": averages, "found": scores[name]} | record["search"][name]["random"]
            searches[kind][seed]["baselines"] = {key: scores[key] for key in ("first_last", "hybrid") if key in scores}
            sources[f"{kind} of seed {seed}"] = {"command": record["command"], "git": record["git"]}
    return run_record(
        model="tiny GPT-2 of quickstart/make_model.py",
        bit_config=None,
        metrics={
            f"factor {factor}, {method}, EM at {config}": found["mean"]
            for factor, methods in rows.items()
            for method, configs in methods.items()
            for config, found in configs.items()
        },
        data=training["data"],
        seed=[int(seed) for seed in seeds],
        wall_seconds=time.time() - start,
        notice=NOTICE,
        seeds=seeds,
        outliers=outliers,
        curves=curves,
        labels=METHODS | SEARCHES,
        steps=steps,
        methods=rows,
        searches=searches,
        records=sources,
    )


def cell(found):
    """EM over the seeds, and how far it moves under changes that mean nothing."""
    floor = f", floor {found['noise_floor'][0]:.1f}" if found.get("noise_floor") else ""
    return shown(*(found[key] for key in ("mean", "min", "max"))) + floor


def post_training_table(summary, factor):
    """Markdown: a float32 adapter under both quantizers, and what it loses."""
    methods = [summary["methods"][factor][f"ptq_{quantizer}"] for quantizer in QUANTIZERS]
    rows = [["float32", *(cell(found[FLOAT]) for found in methods), "", ""]]
    for config in OPERANDS:
        values = [found[config]["values"] for found in methods]
        drops = [paired_difference(found[FLOAT]["values"], own) for found, own in zip(methods, values, strict=True)]
        rows.append([config, *(cell(found[config]) for found in methods), *drops])
    names = [f"EM, {quantizer}" for quantizer in QUANTIZERS]
    return markdown([f"factor {factor}", *names, "drop, minmax [95 %]", "drop, rotated [95 %]"], rows)


def training_table(summary, factor):
    """Markdown: the trainings at both widths, and paired differences."""
    found, rows = summary["methods"][factor], []
    for method in methods_of(factor):
        label = METHODS[method]
        steps, passes = summary["steps"][method]
        rows.append([label, str(steps), str(passes)])
        rows[-1] += [cell(found[method][config]) if config in found[method] else "-" for config in TRAINED]
    for first, second in [pair for pair in PAIRS if set(pair) <= set(methods_of(factor))]:
        pairs = [
            paired_difference(found[first][config]["values"], found[second][config]["values"])
            if config in found[first] and config in found[second]
            else "-"
            for config in TRAINED
        ]
        rows.append([f"{METHODS[first]}, minus {METHODS[second]} [95 %]", "", "", *pairs])
    title = f"factor {factor}, {len(summary['seeds'])} seeds"
    return markdown([title, "steps", "passes", "EM at 8", "at 4", "at 3"], rows)


def outlier_table(summary):
    """Markdown: MinMax and rotated by the size of the outlier channels, one seed."""
    columns = [(quantizer, config) for quantizer in QUANTIZERS for config in (EIGHT, "W4A8KV8", FOUR)]
    rows = []
    for factor, row in summary["outliers"].items():
        sizes = "; ".join(f"{name} {low:.1f} - {high:.1f}" for name, (low, high) in row["outliers"].items())
        rows.append([factor, sizes, f"{row['float']:.1f}", *(f"{row[q][config]:.1f}" for q, config in columns)])
    header = ["factor", "largest channel / median", "EM, float32", *(f"{q} {config}" for q, config in columns)]
    return markdown(header, rows)


def curve_table(summary):
    """Markdown: what more passes bring, at factor 30."""
    rows = []
    for passes, found in summary["curves"].items():
        float_adapter, joint = found["ptq_rotated"], found["joint"]
        cells = [float_adapter[FLOAT], float_adapter[EIGHT], float_adapter[FOUR], joint[EIGHT], joint[FOUR]]
        rows.append([passes, *(shown(*(scores[key] for key in ("mean", "min", "max"))) for scores in cells)])
    return markdown(["passes", "float32 adapter", "its 8 bits", "its 4 bits", "joint, 8", "joint, 4"], rows)


def search_table(summary):
    """Markdown: found assignments against random ones of their budget."""
    rows = []
    for kind, seeds in summary["searches"].items():
        for seed, row in seeds.items():
            averages = [row["average_bits"][f"average_{operand}_bits"] for operand in ("w", "a", "kv")]
            random = f"{row['mean_exact_match']:.1f} ({row['std_exact_match']:.1f})"
            better = f"{row['better_than_found']} of {row['number']}"
            found = row["baselines"]
            others = [f"{found[key]:.1f}" if key in found else "-" for key in ("first_last", "hybrid")]
            bits = " / ".join(f"{average:.2f}" for average in averages)
            rows.append([SEARCHES[kind], seed, bits, f"{row['found']:.1f}", random, better, *others])
    header = ["model, widths", "seed", "bits of W / A / KV", "found, EM", "random, mean EM (s.d.)", "random better"]
    return markdown([*header, "first and last high", "hybrid (its own bits)"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--records", type=Path, help="folder of the records of seeds.sh")
    source.add_argument("--summary", type=Path, help="a summary made earlier")
    parser.add_argument("--seeds", nargs="+", default=["42", "43", "44"], help="with --records: the seeds that it ran")
    parser.add_argument("--output", type=Path, help="with --records: where the summary goes")
    parser.add_argument("--pages", type=Path, nargs="+", default=[], help="pages whose markers get the tables")
    args = parser.parse_args()
    summary = summarize(args.records, args.seeds) if args.records else load(args.summary)
    if args.output:
        write_json_atomic(args.output, summary)
    tables = {"post-training": post_training_table, "seeds": training_table}
    texts = {name: "\n\n".join(make(summary, f) for f in FACTORS) for name, make in tables.items()}
    texts["outliers"] = outlier_table(summary)
    texts |= {"curves": curve_table(summary), "search": search_table(summary)}
    write_into(args.pages, texts)
    print(summary["notice"], *texts.values(), sep="\n\n")


if __name__ == "__main__":
    main()
