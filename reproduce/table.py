#!/usr/bin/env python
"""Every published figure beside ours: the step that does the same, and EM / F1 of its record at each scale.

    python reproduce/table.py --pages reproduce/README.md
    python reproduce/table.py --gpt2 reproduce/work/gpt2/records

A scale without a record has an empty cell. Sources: published.json. The columns are different models and data.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "report"), str(ROOT / "quickstart")]
from make_report import PUBLISHED, read, read_records  # noqa: E402
from report import markdown, write_into  # noqa: E402
from tables import UNPUBLISHED, ours_of  # noqa: E402


def rows_of(published):
    """[(source, setting, EM / F1 as published, step, config)] with those of ours that nobody has published."""
    rows = []
    for row in published:
        if "measure" not in row:
            theirs = " / ".join("-" if row[key] is None else f"{row[key]:.2f}" for key in ("exact_match", "f1"))
            rows.append((row["source"], row["setting"], theirs, row["step"], row["config"]))
    return rows + [("ours", setting, "-", step, config) for setting, (step, config) in UNPUBLISHED.items()]


def table(folders):
    """Markdown. folders: {title: folder of records}, which may be missing or empty."""
    scales = [{"records": read_records(path) if any(path.glob("*.json")) else {}} for path in folders.values()]
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for scale in ("gpt2", "small"):
        parser.add_argument(f"--{scale}", type=Path, default=ROOT / "results" / scale, help="folder of its records")
    parser.add_argument("--pages", type=Path, nargs="+", default=[], help="pages whose markers get the table")
    args = parser.parse_args()
    text = table({"GPT-2 124M, ours": args.gpt2, "small GPT-2 made here": args.small})
    write_into(args.pages, {"published": text})
    print(text)


if __name__ == "__main__":
    main()
