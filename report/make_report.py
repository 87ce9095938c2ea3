#!/usr/bin/env python
"""Write the report as a PDF from records alone.

    python report/make_report.py
    python report/make_report.py --records results/quickstart --output report/tiny.pdf

Beside the PDF stands a JSON file of its name: every number that report.typ shows is read from it. What has no record
is "not measured at this scale"; what depends on results is chosen by a verdict (findings.py).
"""

import argparse
import json
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import figures
import robustness
import tables
from findings import LEAST_F1, LEVEL, MARGIN, by_seed, findings, first_record, low_flips

HERE = Path(__file__).resolve().parent
PUBLISHED = HERE.parent / "reproduce" / "published.json"
TITLES = {  # by the name of the folder of records
    "quickstart": ("tiny stand-in", "made-up text; says nothing about GPT-2 on SQuAD"),
    "small": ("small", "a small GPT-2 on real text; says nothing certain about GPT-2 124M"),
    "small_outliers": ("small, outliers", "another, with outlier channels put in before pretraining"),
    "gpt2": ("GPT-2", "the published weights"),
}
ROBUST = "_robust"  # ends the name of the folder of what goes on from a scale: its models, trained on attacks
VARIANT = "_outliers"  # ends the name of a scale whose tables stand beside those of the scale before

SERVED = {  # numbers of the abstract: step, config
    "float": ("lora_fp32", None),
    "minmax4": ("ptq_minmax_W4A4KV4", None),
    "rotated4": ("ptq_rotated_W4A4KV4", None),
    "joint8": ("switch_eval", "W8A8KV8"),
    "joint4": ("switch_eval", "W4A4KV4"),
    "cpt8": ("cpt_eval", "W8A8KV8"),
    "cpt4": ("cpt_eval", "W4A4KV4"),
}


def fail(message):
    sys.exit(f"error: {message}")


def read(path):
    """JSON of a file; ends the script where it has none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as fault:
        fail(f"{path}: broken record: {fault}")


def read_if(path):
    """JSON of a file, None where there is none."""
    return read(path) if path.exists() else None


def read_records(folder):
    """{step: {seed: record}} of a folder; NAME_43.json is NAME with seed 43 where NAME.json is there too."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        fail(f"{folder}: no records (*.json) there: run reproduce/run.sh first, or pass --records results/quickstart")
    names, records = {path.stem for path in paths}, {}
    for path in paths:
        record = read(path)
        lacks = [
            key for key in ("metrics", "data", "seed", "model") if not isinstance(record, dict) or key not in record
        ]
        if lacks:
            fail(f"{path}: broken record: it has no {', '.join(lacks)}")
        found = re.fullmatch(r"(.+)_(\d+)", path.stem)
        step = found[1] if found and found[1] in names else path.stem
        records.setdefault(step, {})[record["seed"]] = record
    return records


def read_scale(folder, key):
    """A scale: its records, the summary over seeds beside them, and what model and data it is. key: of TITLES."""
    records = read_records(folder)
    summary = folder.parent / f"{folder.name}_seeds.json"
    title, note = TITLES.get(key, (key, ""))
    scale = {"key": key, "title": title, "note": note, "records": records, "variant": key.endswith(VARIANT)}
    if "--init_from" in (first_record(scale, "pretrain") or {}).get("command", ""):
        scale["note"] += "; it goes on from a model pretrained elsewhere"
    scale["summary"] = read_if(summary)
    scale["n"] = scale["blocks"] = 0
    model, trained, seeds = "", "", []
    for name in ("lora_fp32", "full_fp32", "switch_train", "cpt_train"):
        if record := first_record(scale, name):
            data, bits = record["data"], record["bit_config"]
            scale |= {"n": data["validation"]["examples"], "blocks": len(bits["layers"]) // len(figures.KINDS)}
            stored = 8 * bits["weight_bytes"] / bits["average_w_bits"] / 1e6
            model = f"{Path(record['model']).name}: {scale['blocks']} blocks, {stored:.1f} M weights in their linears"
            trained = f"{data['train']['source']}, {data['train']['examples']} questions, {record['steps']} steps"
            break
    runs = [found for step, found in records.items() if step != "split"]  # which draws nothing
    seeds = sorted({seed for found in runs for seed in found if isinstance(seed, int)})
    scale |= {"model": model, "trained": trained, "seeds": ", ".join(map(str, seeds))}
    return scale


def about_sweep(record):
    """Low bits and questions of a sweep, its flips of one linear, and how many of these lose EM; None without one."""
    if not record:
        return None
    (data,) = record["data"].values()
    flips = [flip for flip in low_flips(record) if flip["kind"] == "layer"]
    clear = [flip for flip in flips if flip["exact_match_drop_interval"][0] > 0]
    return {"low": flips[0]["low_bits"], "n": data["examples"], "flips": len(flips), "clear": len(clear)}


def describe(scale):
    """What the template needs of one scale for its sentences."""
    served = {}
    for name, (step, config) in SERVED.items():
        values = list(by_seed(scale, step, config).values())
        served[name] = f"{statistics.mean(values):.1f}" if values else None
    named = ("key", "title", "note", "variant", "model", "trained", "seeds", "n", "blocks")
    return {name: scale[name] for name in named} | {
        "served": served,
        "sweep": about_sweep(first_record(scale, "sensitivity")),
        "findings": findings(scale),
    }


def tables_of(scale):
    """{name: (table or None, how many of its columns name a row)} of one scale."""
    assignments, budgets, ranks = tables.search_tables(scale)
    trainings, operands, sizes, passes, searches = tables.summary_tables(scale)
    widths, range_test = tables.cyclic_tables(scale)
    return {
        "accuracy": (tables.accuracy_table(scale), 3),
        "assignments": (assignments, 2),
        "found": (tables.found_table(scale), 1),
        "budgets": (budgets, 1),
        "ranks": (ranks, 2),
        "objectives": (tables.objectives_table(scale), 2),
        "trainings": (trainings, 2),
        "operands": (operands, 2),
        "sizes": (sizes, 1),
        "passes": (passes, 1),
        "searches": (searches, 3),
        "widths": (widths, 2),
        "range_test": (range_test, 2),
        "distractors": (robustness.distractor_table(scale), 1),
        "attack": (robustness.attack_table(first_record(scale, "attack_rpi")), 1),
    }


def shown(scales, bench, folder):
    """({name: table}, {name: figure}), each of the first scale and its variant, or of the stand-in if they have none.

    None where no scale has it. "of" says which scales a table or figure shows; the figures go into `folder`.
    """
    first = [scale for scale in scales if scale["variant"] or scale is scales[0]]
    groups = [first, [scale for scale in scales if scale not in first]]
    lack = f"; {scales[0]['title']}: not measured"
    found, pictures = dict.fromkeys(tables_of(scales[0])), dict.fromkeys(figures.ALL)
    for group, note in zip(groups, ("", lack)):
        each = [(scale["title"], tables_of(scale)) for scale in group]
        for name, (_, keys) in each[0][1].items() if each else ():
            if not found[name] and (one := tables.beside([(title, made[name][0]) for title, made in each], keys)):
                found[name] = one | {"of": one["of"] + note}
        for name, draw in figures.ALL.items():
            timed = [scale | {"times": bench["times"]} for scale in group]
            if not pictures[name] and timed and (drawn := draw(timed, folder / f"{name}.svg")):
                of = " and ".join(scale["title"] for scale in drawn)
                pictures[name] = {"path": f"{name}.svg", "of": of + note}
    return found, pictures


def robust(records):
    """What the template needs of adversarial training, and of attacks by words and tokens. records: `read_records`."""
    matrices = [record for found in robustness.measured(records).values() for record in found.values()]
    settings = matrices[0]["settings"] if matrices else {}
    return {
        "words": robustness.words_table(records),
        "tokens": robustness.tokens_table(records),
        "table": robustness.training_table(records),
        "needle": robustness.needle_table(records),
        "findings": robustness.training_findings(records),
        "about": {"radius": f"{settings['radius']:g}"} if matrices else None,
        "n": sorted({str(record["data"]["attacked"]["examples"]) for record in matrices}),
    }


def build(folders, robust_folder, work):
    """The data of the report; the figures go into the folder `work`. folders: {scale: folder of its records}."""
    results, scales = next(iter(folders.values())).parent, []
    bench = tables.benchmark(*(read_if(results / f"{name}.json") for name in ("benchmark", "bench_rotated_forward")))
    for key, folder in folders.items():
        try:
            scales.append(read_scale(folder, key))
            scales[-1]["described"] = describe(scales[-1])
        except (LookupError, TypeError, AttributeError, ValueError) as fault:
            fail(f"{folder}: broken record: {type(fault).__name__}: {fault}")
    attacked = read_if(results / "adv_attack" / "plain_rpi.json")
    known = read(PUBLISHED)
    published, others = tables.published_tables(known, scales)
    try:
        joined, pictures = shown(scales, bench, work)
        further = read_records(robust_folder) if robust_folder.is_dir() else {}
        attacked_in_training = robust(scales[0]["records"] | further)
    except (LookupError, TypeError, AttributeError, ValueError) as fault:
        fail(f"{results}: broken record: {type(fault).__name__}: {fault}")
    return {
        "scales": [scale["described"] for scale in scales],
        "tables": joined,
        "pictures": pictures,
        "robust": attacked_in_training,
        "bench": bench,
        "real_text": robustness.attack_table(attacked),
        "trail": tables.trail_table(results / "trail.md"),
        "published": published,
        "others": others,
        "sources": sorted({row["source"] for row in known}),
        "margin": f"{MARGIN:g}",
        "level": f"{LEVEL:g}",
        "least_f1": f"{LEAST_F1:g}",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=Path("results/small"), help="folder of the records")
    parser.add_argument("--scale", choices=TITLES, help="what the records are of (default: the folder's name)")
    parser.add_argument("--variant", type=Path, help=f"the same with outliers put in (default: --records + {VARIANT})")
    parser.add_argument("--stand_in", type=Path, default=Path("results/quickstart"), help="records shown beside them")
    parser.add_argument("--output", type=Path, default=Path("report/report.pdf"), help="the PDF; its data as .json")
    args = parser.parse_args()
    try:
        import typst
    except ImportError:
        fail("the report needs typst: pip install -r requirements-dev.txt")
    folders = {args.scale or args.records.resolve().name: args.records}
    variant = args.variant or args.records.with_name(args.records.name + VARIANT)
    folders |= {variant.name: variant} if args.variant or variant.is_dir() else {}
    folders |= {args.stand_in.name: args.stand_in} if args.stand_in.resolve() != args.records.resolve() else {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        data = build(folders, args.records.with_name(args.records.name + ROBUST), work)
        text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        (work / "data.json").write_text(text, encoding="utf-8")
        shutil.copy(HERE / "report.typ", work)
        pdf = typst.compile(work / "report.typ", root=work, ignore_system_fonts=True)
        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.with_suffix(".json").write_text(text, encoding="utf-8")
            args.output.write_bytes(pdf)
        except OSError as fault:
            fail(fault)
    print(f"{args.output}, its data {args.output.with_suffix('.json')}")


if __name__ == "__main__":
    main()
