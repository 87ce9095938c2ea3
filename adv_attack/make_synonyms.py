#!/usr/bin/env python
"""Makes the table of word_attack.py --synonyms from the files of a WordNet dictionary.

    python make_synonyms.py --wordnet /usr/share/wordnet --output synonyms.json      # Debian: package wordnet-base

Synonyms of a word are the other words of its senses: the commonest sense of each part of speech first, then the next.
Only single words of three or more lower-case letters: shorter ones are mostly function words, whose senses there are
chemical elements and abbreviations. Format: wndb(5WN).
"""

import dataclasses
import os
import re
import time

from common.arguments import option
from common.flags import parse_args
from common.record import relative_path, run_record, write_json_atomic
from common.script import plain_errors
from models.errors import UserError

WORD = re.compile("[a-z]{3,}")


@dataclasses.dataclass
class SynonymArguments:
    """Input and output."""

    wordnet: str = dataclasses.field(metadata={"help": "folder with data.noun, index.noun, data.verb, ..."})
    output: str = dataclasses.field(metadata={"help": "JSON file: an object word -> list of words"})
    record_file: str | None = option(None, "where the run's JSON record goes (default: none)")


def read_entries(path, parse):
    """{key: value} of parse(fields) of every line but the licence's, which are indented. Raises UserError, OSError."""
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [(number, line.split()) for number, line in enumerate(file, 1) if not line.startswith("  ")]
    found = {}
    for number, fields in lines:
        try:
            found |= parse(fields)
        except (ValueError, IndexError):
            raise UserError(f"{path}, line {number}: not of WordNet's format (wndb(5WN))") from None
    return found


def synset(fields):
    """{offset: its single words} of a line of data.*: their number is hexadecimal, "(p)" marks where one may stand."""
    words = [re.sub(r"\((a|p|ip)\)$", "", fields[4 + 2 * n]) for n in range(int(fields[3], 16))]
    return {fields[0]: [word for word in words if WORD.fullmatch(word)]}


def synonyms(folder):
    """{word: [word, ...]} of a dictionary folder."""
    senses = {}
    for part in ("noun", "verb", "adj", "adv"):
        synsets = read_entries(os.path.join(folder, f"data.{part}"), synset)
        index = os.path.join(folder, f"index.{part}")
        for word, offsets in read_entries(index, lambda fields: {fields[0]: fields[-int(fields[2]) :]}).items():
            for rank, offset in enumerate(offsets):  # the commonest sense first
                if offset not in synsets:
                    raise UserError(f"{index}: {word}: no synset {offset} in data.{part}")
                senses.setdefault(word, []).append((rank, synsets[offset]))
    table = {}
    for word in filter(WORD.fullmatch, sorted(senses)):
        ordered = [other for _, words in sorted(senses[word], key=lambda sense: sense[0]) for other in words]
        if others := list(dict.fromkeys(other for other in ordered if other != word)):
            table[word] = others
    if not table:
        raise UserError(f"--wordnet {folder}: no word in it has a synonym")
    return table


def main():
    start = time.time()
    (args,) = parse_args(SynonymArguments)
    table = synonyms(args.wordnet)
    write_json_atomic(args.output, table)
    print(f"{args.output}: {len(table)} words, {sum(map(len, table.values()))} synonyms")
    if args.record_file:
        data = {"wordnet": {"source": relative_path(args.wordnet), "examples": len(table)}}
        wall = time.time() - start
        record = run_record(model=None, bit_config={}, metrics={}, data=data, seed=None, wall_seconds=wall)
        write_json_atomic(args.record_file, record)


if __name__ == "__main__":
    with plain_errors():
        main()
