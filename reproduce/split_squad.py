"""Halve a SQuAD training file by article: one half to pretrain a base on questions, the other for all experiments.

    python reproduce/split_squad.py --train_file train-v1.1.json --output_dir halves

Writes base.json and train.json into --output_dir, in the official nested form. No article is in both; the numbers of
questions are about equal. The same seed gives the same files.
"""

import dataclasses
import json
import os
import random
import sys
import time
from itertools import groupby

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "base_model"))
from common.arguments import option  # noqa: E402
from common.checksums import file_checksum  # noqa: E402
from common.flags import parse_args  # noqa: E402
from common.record import relative_path, run_record, write_json_atomic, write_text_atomic  # noqa: E402
from common.script import plain_errors  # noqa: E402
from common.squad_data import load_squad_json  # noqa: E402
from models.errors import UserError  # noqa: E402
from models.user_input import read_text  # noqa: E402

HALVES = ("base", "train")


@dataclasses.dataclass
class SplitArguments:
    """What is split, and where to."""

    train_file: str = dataclasses.field(kw_only=True, metadata={"help": "SQuAD's training file"})
    output_dir: str = dataclasses.field(kw_only=True, metadata={"help": "folder of base.json and train.json"})
    seed: int = option(0, "seed of the draw")
    record_file: str | None = option(None, "where the JSON record goes (default: record.json in --output_dir)")


def halve(articles, seed):
    """{half: titles} of {title: rows}: the largest articles first, each to the half with fewer questions so far."""
    titles, halves, questions = list(articles), {name: [] for name in HALVES}, dict.fromkeys(HALVES, 0)
    random.Random(seed).shuffle(titles)
    for title in sorted(titles, key=lambda title: -len(articles[title])):
        half = min(HALVES, key=questions.get)
        halves[half].append(title)
        questions[half] += len(articles[title])
    return halves


def nested(articles):
    """{title: rows} in SQuAD's form."""
    data = []
    for title, rows in articles.items():
        paragraphs = []
        for context, group in groupby(rows, key=lambda row: row["context"]):
            qas = []
            for row in group:
                pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
                answers = [{"text": text, "answer_start": start} for text, start in pairs]
                qas.append({"id": row["id"], "question": row["question"], "answers": answers})
            paragraphs.append({"context": context, "qas": qas})
        data.append({"title": title, "paragraphs": paragraphs})
    return {"version": "1.1", "data": data}


def main():
    start = time.time()
    (args,) = parse_args(SplitArguments)
    rows, articles = load_squad_json(args.train_file), {}
    for row in rows:
        articles.setdefault(row["title"], []).append(row)
    if len(articles) < 2:
        raise UserError(f"{args.train_file}: {len(articles)} title; at least two articles are needed to split")
    halves = {
        name: {title: articles[title] for title in articles if title in set(titles)}
        for name, titles in halve(articles, args.seed).items()
    }
    texts = {os.path.join(args.output_dir, f"{name}.json"): json.dumps(nested(halves[name])) for name in HALVES}
    for path, text in texts.items():
        if os.path.exists(path) and read_text(path) != text:
            raise UserError(f"{path}: is there, with other content; remove it, or choose another --output_dir")
    for path, text in texts.items():
        write_text_atomic(path, text)
    sizes = {name: (len(half), sum(map(len, half.values()))) for name, half in halves.items()}
    counts = [f"{name}.json: {titles} articles, {questions} questions" for name, (titles, questions) in sizes.items()]
    print(f"{args.output_dir}: {'; '.join(counts)}", flush=True)
    path = args.train_file
    source = {"source": relative_path(path), "examples": len(rows), "sha256": file_checksum(path)}
    metrics = {f"{name}_{kind}": n for name, pair in sizes.items() for kind, n in zip(("articles", "questions"), pair)}
    record = run_record(
        model=None,
        bit_config=None,
        metrics=metrics,
        data={"train": source},
        seed=args.seed,
        wall_seconds=time.time() - start,
    )
    write_json_atomic(args.record_file or os.path.join(args.output_dir, "record.json"), record)


if __name__ == "__main__":
    with plain_errors():
        main()
