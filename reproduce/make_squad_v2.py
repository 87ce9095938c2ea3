"""Make a file in the form of SQuAD v2 from one of v1.1: questions are asked of paragraphs that do not answer them.

    python reproduce/make_squad_v2.py --input train-v1.1.json --output train-v2.json --share 0.33 --seed 42

All questions of --input stay. Some of them, drawn at random, are asked a second time of another paragraph of the same
article that contains none of their answers: with is_impossible, no answers, and an id of their own. The questions of
the real SQuAD v2 were written to look answerable; these are easier. The same seed gives the same file.
"""

import dataclasses
import json
import os
import random
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "base_model"))
from common.arguments import option  # noqa: E402
from common.flags import parse_args  # noqa: E402
from common.record import write_text_atomic  # noqa: E402
from common.script import plain_errors  # noqa: E402
from common.squad_data import load_squad_json  # noqa: E402
from models.errors import UserError  # noqa: E402
from models.user_input import read_text  # noqa: E402


@dataclasses.dataclass
class MakeArguments:
    """What is read and written, and how many questions get no answer."""

    input: str = dataclasses.field(kw_only=True, metadata={"help": "SQuAD v1.1 file, nested or flat"})
    output: str = dataclasses.field(kw_only=True, metadata={"help": "file of the official v2 form to write"})
    share: float = option(0.33, "questions without answer among all questions of --output (v2's training file: 0.33)")
    seed: int = option(42, "seed of the draw")


def as_qa(row):
    """A row of `load_squad_json` as a question of the nested form."""
    pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
    answers = [{"text": text, "answer_start": start} for text, start in pairs]
    return {"question": row["question"], "id": row["id"], "answers": answers, "is_impossible": not answers}


def add_impossible(articles, number, seed):
    """Ask up to `number` questions again where they have no answer; returns how many.

    articles: {title: {context: [row, ...]}}, whose lists get the new rows.
    """
    rng, made = random.Random(seed), 0
    rows = [row for paragraphs in articles.values() for group in paragraphs.values() for row in group]
    rng.shuffle(rows)
    for row in rows:
        if made == number:
            break
        answers, paragraphs = [text.casefold() for text in row["answers"]["text"]], articles[row["title"]]
        others = [context for context in paragraphs if not any(text in context.casefold() for text in answers)]
        if others:  # its own paragraph has the answers
            nothing = {"text": [], "answer_start": []}
            paragraphs[rng.choice(others)].append(row | {"id": f"{row['id']}-impossible", "answers": nothing})
            made += 1
    return made


def main():
    (args,) = parse_args(MakeArguments)
    if not 0 < args.share <= 0.5:
        raise UserError(f"--share {args.share}: allowed are above 0 up to 0.5: a question is asked twice at most")
    rows, articles = load_squad_json(args.input), {}
    for row in rows:
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(row)
    wanted = max(1, round(len(rows) * args.share / (1 - args.share)))
    made = add_impossible(articles, wanted, args.seed)
    if made < wanted:
        most = f"only {made} of the {len(rows)} questions have another paragraph of their article without an answer"
        largest = f"{made / (len(rows) + made):.4f}"
        raise UserError(f"--share {args.share}: {most}; allowed with this file: up to about {largest}")
    data = []
    for title, paragraphs in articles.items():
        nested = [{"qas": list(map(as_qa, group)), "context": context} for context, group in paragraphs.items()]
        data.append({"title": title, "paragraphs": nested})
    text = json.dumps({"version": "v2.0", "data": data})
    if os.path.exists(args.output) and read_text(args.output) != text:
        raise UserError(f"{args.output}: is there, with other content; remove it, or choose another --output")
    write_text_atomic(args.output, text)
    print(f"{args.output}: {len(rows)} questions with an answer, {made} without", flush=True)


if __name__ == "__main__":
    with plain_errors():
        main()
