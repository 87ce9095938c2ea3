#!/usr/bin/env python
"""Paired differences of EM and F1 between evaluations of the same questions: as asked, under an attack, its control.

    python adv_attack/paired.py --evaluations plain=eval/plain control=eval/control distractor=eval/attacked \\
        --validation_file dev-v1.1.json --record_file results/paired.json

Each folder is one of run_qa_eval.py; their files ask the same questions with the same answers (distractors.py). For
every config that all of them have and every two of them, in their order: what EM and F1 lose from the first to the
second, with the 95 % bootstrap interval over questions and McNemar's exact p.
"""

import dataclasses
import glob
import itertools
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "adv_attack"))
from common.arguments import option  # noqa: E402
from common.checksums import file_checksum  # noqa: E402
from common.flags import parse_args  # noqa: E402
from common.record import read_state, relative_path, run_record, write_json_atomic  # noqa: E402
from common.script import plain_errors  # noqa: E402
from common.squad_data import load_squad_json  # noqa: E402
from common.statistics import compare, markdown_table, with_interval  # noqa: E402
from models.errors import UserError  # noqa: E402
from models.user_input import read_json  # noqa: E402
from utils_qa import squad_em_f1_per_example  # noqa: E402


@dataclasses.dataclass
class PairedArguments:
    """What is compared."""

    evaluations: list[str] = dataclasses.field(
        kw_only=True, metadata={"help": "NAME=FOLDER of two or more evaluations"}
    )
    validation_file: str = dataclasses.field(kw_only=True, metadata={"help": "SQuAD file with the gold answers"})
    num_bootstrap: int = option(1000, "resamples of the intervals")
    seed: int = option(42, "of the resamples")
    record_file: str | None = option(None, "where the JSON record goes (default: none)")


def read_evaluations(texts):
    """{name: folder}. Raises UserError: not NAME=FOLDER, fewer than two, no folder."""
    found = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals) or name in found:
            raise UserError(f"--evaluations {text}: allowed is NAME=FOLDER, each name once")
        if not os.path.isdir(folder):
            raise UserError(f"--evaluations {text}: no such folder")
        found[name] = folder
    if len(found) < 2:
        raise UserError(f"--evaluations {' '.join(texts)}: two or more are compared")
    return found


def predictions_of(folder):
    """{config: {id: text}} of a folder of run_qa_eval.py."""
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*", "record.json"))):
        if record := read_state(path):
            texts = read_json(os.path.join(os.path.dirname(path), "eval_predictions.json"))
            found[record["bit_config"]["name"]] = texts
    return found


def scores_of(predictions, references, folder):
    """[(exact match, F1)] of all questions. Raises UserError: other questions than those of the file."""
    if predictions.keys() != references.keys():
        raise UserError(f"{folder}: its questions are not those of --validation_file")
    return list(squad_em_f1_per_example(predictions, references).values())


def main():
    start = time.time()
    (args,) = parse_args(PairedArguments)
    folders = read_evaluations(args.evaluations)
    references = {row["id"]: row["answers"]["text"] for row in load_squad_json(args.validation_file)}
    texts = {name: predictions_of(folder) for name, folder in folders.items()}
    configs = [config for config in next(iter(texts.values())) if all(config in found for found in texts.values())]
    if not configs:
        raise UserError(f"--evaluations {' '.join(args.evaluations)}: no config that all of them have")
    rows = []
    for config in configs:
        scores = {name: scores_of(found[config], references, folders[name]) for name, found in texts.items()}
        for first, second in itertools.combinations(scores, 2):
            pair = {name: scores[name] for name in (first, second)}
            found = compare(pair, first, args.num_bootstrap, args.seed)[second]
            rows.append({"config": config, "first": first, "second": second, **found})
    header = ["config", "from", "to", "EM lost", "F1 lost", "p"]
    drops = ("exact_match_drop", "f1_drop")
    cells = [
        [row["config"], row["first"], row["second"]]
        + [*(with_interval(row[key], row[f"{key}_interval"]) for key in drops), f"{row['mcnemar_p']:.2g}"]
        for row in rows
    ]
    print("\n".join(markdown_table(header, cells)))
    if args.record_file:
        data = {"source": relative_path(args.validation_file), "examples": len(references)}
        record = run_record(
            model=None,
            bit_config={"configs": configs},
            metrics={},
            data={"validation": data | {"sha256": file_checksum(args.validation_file)}},
            seed=args.seed,
            wall_seconds=time.time() - start,
            evaluations={name: relative_path(folder) for name, folder in folders.items()},
            num_bootstrap=args.num_bootstrap,
            rows=rows,
        )
        write_json_atomic(args.record_file, record)


if __name__ == "__main__":
    with plain_errors():
        main()
