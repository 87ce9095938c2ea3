#!/usr/bin/env python
"""Append a distractor to the context of every question of a SQuAD file: AddOneSent by rule, no model is asked.

    python adv_attack/distractors.py --input dev-v1.1.json --output attacked.json
    python adv_attack/distractors.py --input dev-v1.1.json --output control.json --control

The sentence looks like the answer to a question that is not asked: names and numbers of the question are replaced by
those of other articles' questions, and a fake answer of the gold answer's kind takes the place of the question word. A
question without a name or number keeps its context: nothing would tell the sentence from its answer. Answers and ids
stay, so run_qa_eval.py measures before and after. --control appends the sentence of a question of another article: the
cost of a longer context. The idea is of Jia and Liang 2017 (arXiv:1707.07328), where people have mended the sentences;
these are as the rule leaves them. The same seed gives the same file.
"""

import dataclasses
import json
import os
import random
import re
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "adv_attack"))
from common.arguments import option  # noqa: E402
from common.checksums import file_checksum  # noqa: E402
from common.flags import parse_args  # noqa: E402
from common.record import relative_path, run_record, write_json_atomic, write_text_atomic  # noqa: E402
from common.script import plain_errors  # noqa: E402
from common.squad_data import load_squad_json  # noqa: E402
from models.errors import UserError  # noqa: E402
from models.user_input import read_text  # noqa: E402

QUESTION_WORD = re.compile(r"\b(how (?:many|much)|who|whom|whose|what|which|when|where|why|how)\b", re.IGNORECASE)
TRIES = 100
WORD = re.compile(r"[^\W_]+(?:[.,'-][^\W_]+)*")


@dataclasses.dataclass
class DistractorArguments:
    """What is read and written."""

    input: str = dataclasses.field(kw_only=True, metadata={"help": "SQuAD file, nested or flat"})
    output: str = dataclasses.field(kw_only=True, metadata={"help": "SQuAD file with the distractors"})
    control: bool = option(False, "append the sentence of a question of another article")
    seed: int = option(42, "seed of the replacements")
    record_file: str | None = option(None, "where the JSON record goes (default: none)")


def kind(word):
    """ "number", "name" (begins with a capital) or "other" of a word or an answer."""
    if any(letter.isdigit() for letter in word):
        return "number"
    return "name" if word[:1].isupper() else "other"


def replaceable(question):
    """[(start, end, kind)] of the names and numbers of a question; its first word begins with a capital anyway."""
    found = [(match.start(), match.end(), kind(match[0])) for match in WORD.finditer(question)]
    return [(start, end, what) for start, end, what in found[1:] if what != "other"]


class Distractors:
    """Draws sentences for the questions of a file. rows: of `load_squad_json`."""

    def __init__(self, rows, seed):
        self.rng, self.words, self.answers = random.Random(seed), {}, {}
        for row in rows:
            for start, end, what in replaceable(row["question"]):
                self.words.setdefault(what, []).append((row["title"], row["question"][start:end]))
            for text in row["answers"]["text"][:1]:
                self.answers.setdefault(kind(text), []).append((row["title"], text))

    def draw(self, pool, title, avoided):
        """A text of the pool from another article that is none of `avoided`; None where none was drawn."""
        for _ in range(TRIES):
            other, text = self.rng.choice(pool)
            if other != title and text.casefold() not in avoided:
                return text
        return None

    def sentence(self, row):
        """The distractor of a question; None where nothing in it can be replaced."""
        question, title, places = row["question"], row["title"], replaceable(row["question"])
        avoided = {question[start:end].casefold() for start, end, _ in places}
        golds = {text.casefold() for text in row["answers"]["text"]}
        fake = self.draw(self.answers[kind(row["answers"]["text"][0])], title, golds)
        if not places or fake is None:
            return None
        for start, end, what in reversed(places):
            other = self.draw(self.words[what], title, avoided)
            if other is None:
                return None
            question = question[:start] + other + question[end:]
        text = question.strip().rstrip("?").rstrip()
        said, number = QUESTION_WORD.subn(lambda match: fake, text, count=1)
        said = said if number else f"{text}: {fake}"
        return f"{said[0].upper()}{said[1:]}."


def distract(rows, control, seed):
    """{id: distractor} of the rows that get one."""
    maker = Distractors(rows, seed)
    found = {row["id"]: sentence for row in rows if (sentence := maker.sentence(row))}
    if not control:
        return found
    made = [(row["title"], found[row["id"]]) for row in rows if row["id"] in found]
    return {row["id"]: maker.draw(made, row["title"], ()) for row in rows if row["id"] in found}


def main():
    start = time.time()
    (args,) = parse_args(DistractorArguments)
    rows = load_squad_json(args.input)
    sentences = distract(rows, args.control, args.seed)
    if not sentences:
        raise UserError(f"--input {args.input}: no question whose names or numbers another article could replace")
    data = []
    for row in rows:
        context = row["context"] + (f" {sentences[row['id']]}" if row["id"] in sentences else "")
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        answers = [{"text": text, "answer_start": at} for text, at in pairs]
        question = {"id": row["id"], "question": row["question"], "answers": answers}
        data.append({"title": row["title"], "paragraphs": [{"context": context, "qas": [question]}]})
    text = json.dumps({"version": "1.1", "data": data})
    if os.path.exists(args.output) and read_text(args.output) != text:
        raise UserError(f"{args.output}: is there, with other content; remove it, or choose another --output")
    write_text_atomic(args.output, text)
    print(f"{args.output}: {len(rows)} questions, {len(sentences)} with a distractor", flush=True)
    if args.record_file:
        source = {"source": relative_path(args.input), "examples": len(rows), "sha256": file_checksum(args.input)}
        record = run_record(
            model=None,
            bit_config=None,
            metrics={"questions": len(rows), "distracted": len(sentences)},
            data={"validation": source},
            seed=args.seed,
            wall_seconds=time.time() - start,
            output_sha256=file_checksum(args.output),
        )
        write_json_atomic(args.record_file, record)


if __name__ == "__main__":
    with plain_errors():
        main()
