"""Make up a small topic data set from the sentences of make_data.py, which the tiny GPT-2 was pretrained on.

    python quickstart/make_topics.py --output_dir quickstart/topics        # 2 seconds, no network

A text tells two facts about a person: about the family (0), work (1), or study and moves (2). Only a few words of it
decide (born, married; worked, paid; studied, moved), the rest is names, towns and dates. Files: train.jsonl and
test.jsonl, rows {"text", "label"}; no name of test.jsonl is in train.jsonl. The same arguments give the same bytes.
"""

import argparse
import json
import random
from pathlib import Path

from make_data import FACTS, LEADS, PRONOUNS, draw_all, name_pools, write_atomically

TOPICS = ((0, 4, 5), (1, 6, 7), (2, 3))  # facts of FACTS["person"] of each label


def make_sentence(fact: int, subject: str, name: str, rng: random.Random, pools: dict) -> str:
    """Returns a sentence of FACTS["person"][fact] about `subject`, filled with random answers."""
    template = rng.choice(FACTS["person"][fact][0])
    drawn = draw_all(template, {"subject of the sentence": name}, rng, pools)
    return template.format(s=subject, **{field: before + answer for field, (before, answer, _) in drawn.items()})


def make_texts(split: str, number: int, seed: int) -> str:
    """Returns `number` rows as JSON lines, labels in turn."""
    rng, pools = random.Random(f"topics {split} {seed}"), name_pools(split == "test")
    lines = []
    for row in range(number):
        label = row % len(TOPICS)
        name = rng.choice(pools["person"])
        first, second = rng.sample(TOPICS[label], 2)
        lead = f"{rng.choice(LEADS)} " if rng.random() < 0.3 else ""
        subject = rng.choice([name, *PRONOUNS["person"]])
        sentences = (make_sentence(fact, who, name, rng, pools) for fact, who in ((first, name), (second, subject)))
        lines.append(json.dumps({"text": lead + " ".join(sentences), "label": label}))
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the files")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: 0)")
    parser.add_argument("--train_texts", type=int, default=1500, help="rows of train.jsonl (default: 1500)")
    parser.add_argument("--test_texts", type=int, default=300, help="rows of test.jsonl (default: 300)")
    args = parser.parse_args()
    if min(args.train_texts, args.test_texts) < len(TOPICS):
        parser.error(f"--train_texts and --test_texts must be at least {len(TOPICS)}")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir} is a file, not a folder")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, number in (("train", args.train_texts), ("test", args.test_texts)):
        write_atomically(args.output_dir / f"{split}.jsonl", make_texts(split, number, args.seed))
    print(f"wrote {args.output_dir}: {args.train_texts} training and {args.test_texts} test texts")


if __name__ == "__main__":
    main()
