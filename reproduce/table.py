#!/usr/bin/env python
"""Every published figure beside ours: the step that does the same, and EM / F1 of its record at each scale.

    python reproduce/table.py --pages reproduce/README.md README.md
    python reproduce/table.py --gpt2 reproduce/work/gpt2/records

A scale without a record has an empty cell. Sources: published.json. The columns are different models and data.
"""

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "report"), str(ROOT / "quickstart")]
from make_report import PUBLISHED, read, read_records  # noqa: E402
from report import markdown, write_into  # noqa: E402
from robustness import distractor_table, needle_table, tokens_table, training_table, words_table  # noqa: E402
from tables import UNPUBLISHED, ours_of, scores  # noqa: E402

OTHERS = "lihe07/llm_qat_test"
OVERVIEW = {  # of README.md: row -> (source and setting in published.json, step, config)
    "full fine-tuning": ("QaLoF", "full fine-tuning, float32", "full_fp32", None),
    "LoRA, not quantized": ("QaLoF", "LoRA, bf16, not quantized", "lora_fp32", None),
    "post-training, 8 bits, MinMax (published: lihe07, of another float model)": (
        OTHERS,
        "post-training, W8A8, one scale a tensor",
        "ptq_minmax_W8A8KV8",
        None,
    ),
    "post-training, 4 bits, MinMax (published: the same)": (
        OTHERS,
        "post-training, W4A4, one scale a tensor",
        "ptq_minmax_W4A4KV4",
        None,
    ),
    "post-training, 4 bits, **rotated**": (None, None, "ptq_rotated_W4A4KV4", None),
    "8-bit static, MinMax": ("QaLoF", "8-bit static", "static_w8_minmax", None),
    "4-bit static, MinMax": ("QaLoF", "4-bit static", "static_w4_minmax", None),
    "4-bit static, **rotated**": (None, None, "static_w4_rotated", None),
    **{
        f"switchable as published (MinMax, in turn), {name}": ("QaLoF", f"switchable, {theirs}", step, config)
        for step in ("switch_sequential_eval",)
        for name, theirs, config in (
            ("8 bits", "served at 8 bits", "W8A8KV8"),
            ("hybrid", "hybrid (25 % of weights at 4)", "hybrid"),
            ("4 bits", "served at 4 bits", "W4A4KV4"),
        )
    },
    **{
        f"switchable, **rotated**, joint, {name}": (None, None, "switch_eval", config)
        for name, config in (("8 bits", "W8A8KV8"), ("hybrid", "hybrid"), ("found", "found"), ("4 bits", "W4A4KV4"))
    },
    **{
        f"CPT, **rotated**, {bits} bits (published: MinMax)": ("QaLoF", f"CPT, served at {bits} bits", "cpt_eval", c)
        for bits in (8, 7, 6, 4)
        for c in (f"W{bits}A{bits}KV{bits}",)
    },
}


def rows_of(published):
    """[(source, setting, EM / F1 as published, step, config)] with those of ours that nobody has published."""
    rows = []
    for row in published:
        if "measure" not in row:
            theirs = " / ".join("-" if row[key] is None else f"{row[key]:.2f}" for key in ("exact_match", "f1"))
            rows.append((row["source"], row["setting"], theirs, row["step"], row["config"]))
    return rows + [("ours", setting, "-", step, config) for setting, (step, config) in UNPUBLISHED.items()]


def records_of(folder):
    """`read_records`, nothing of a folder without any."""
    return read_records(folder) if any(folder.glob("*.json")) else {}


def table(folders):
    """Markdown. folders: {title: folder of records}, which may be missing or empty."""
    scales = [{"records": records_of(path)} for path in folders.values()]
    header = [
        "source",
        "setting",
        "GPT-2 124M, published: EM / F1",
        "step",
        *(f"{title}: EM / F1" for title in folders),
    ]
    cells = []
    for source, setting, theirs, step, config in rows_of(read(PUBLISHED)):
        ours = [ours_of(scale, step, config) for scale in scales]
        cells.append([source, setting, theirs, f"`{step}`" if step else "", *ours])
    return markdown(header, cells)


def overview(folders):
    """Markdown: published figures beside the means of our records, and their seeds. folders: {title: of records}."""
    scales = [records_of(folder) for folder in folders.values()]
    published = {(row["source"], row["setting"]): row for row in read(PUBLISHED)}
    cells = []
    for label, (source, setting, step, config) in OVERVIEW.items():
        values = [published[source, setting][key] if source else None for key in ("exact_match", "f1")]
        row = [label, " / ".join("-" if value is None else f"{value:.2f}" for value in values)]
        for records in scales:
            found = [score for record in records.get(step, {}).values() if (score := scores(record, config))]
            means = [statistics.mean(score[key] for score in found) for key in ("exact_match", "f1")] if found else []
            row += [" / ".join(f"{mean:.1f}" for mean in means), str(len(found) or "")]
        cells.append(row)
    header = ["", "GPT-2 124M, published: EM / F1"]
    for title in folders:
        header += [f"{title}, ours: EM / F1", "seeds"]
    return markdown(header, cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for scale in ("gpt2", "small", "small_outliers", "small_robust"):
        parser.add_argument(f"--{scale}", type=Path, default=ROOT / "results" / scale, help="folder of its records")
    parser.add_argument("--pages", type=Path, nargs="+", default=[], help="pages whose markers get the table")
    args = parser.parse_args()
    small = {"small GPT-2": args.small, "another, with outlier channels": args.small_outliers}
    text = table({"GPT-2 124M, ours": args.gpt2} | small)
    scale, robust = ({"records": records_of(folder)} for folder in (args.small, args.small_robust))
    attacks = {"distractor": distractor_table(scale), "words": words_table(robust["records"])}
    attacks |= {"tokens": tokens_table(robust["records"]), "robust": training_table(robust["records"])}
    attacks |= {"needle": needle_table(robust["records"])}
    found = {name: one or {"header": ["not measured"], "rows": []} for name, one in attacks.items()}
    pages = {"published": text, "overview": overview(small)}
    write_into(args.pages, pages | {name: markdown(one["header"], one["rows"]) for name, one in found.items()})
    print(text)


if __name__ == "__main__":
    main()
