"""Make up a small question-answering data set in the format of SQuAD v1.1, from templates.

    python quickstart/make_data.py --output_dir quickstart/data        # 5 seconds, no network

A paragraph tells six facts about two invented people, towns or companies, so it holds several dates, towns, people
and numbers; a question asks for one of them. What decides is mostly the relation (born, moved, died), in
some paragraphs (--shared) also the name. Files:

    train.json      one gold answer a question
    dev.json        several gold answers where more than one is right ("12 March 1887", "March 1887", "1887")
    pretrain.txt    documents for language-model pretraining (make_model.py), separated by blank lines
    manifest.json   arguments and checksums; when they still hold, nothing is written again

No name of dev.json (a pair of words) is in the other two files. The same arguments give the same bytes anywhere.
"""

import argparse
import hashlib
import json
import os
import random
import string
from pathlib import Path

# A name is a word of the first list and a word of the second. A fifth of the pairs is kept for dev.json.
NAMES = {
    "person": (
        "Abel Adra Basil Berta Calla Corin Dara Delan Edda Elric Fara Finn Gerda Gorin Hanna Hugo Ida Ivo Jana Joren "
        "Kara Kolin Lena Loris Mara Milan Nadia Noel Olga Otis Petra Pavel Rhea Rolf Sana Sorin Tilda Tomas Ursa",
        "Albrek Barlow Brandt Castor Corven Dalberg Dorning Ekholt Elsner Farrow Fendrik Garvin Grell Halvor Ilmar "
        "Jarvis Jensk Kaldor Kestrel Lindgar Lowen Marlow Morn Nesbit Norvik Ostrand Palmer Pruitt Quist Renner Rusk "
        "Selwin Stroud Tarrant Thorne Ulver Vance Wexler Zeller",
    ),
    "town": (
        "Old New North South East West Upper Lower Port Lake Mount Saint Great Little Castle Fort",
        "Velmora Hartwick Brenholm Caldera Dunmere Elsport Farnby Gildon Hollin Istria Jesmond Kirland Lumley Marbeck "
        "Norwen Orlan Penrith Quarry Rosden Selby Tarn Ulmen Varda Welford Yarrow Zelin Ashby Birch Corran Denham",
    ),
    "firm": (
        "Acton Belmar Corvex Delta Elmo Ferrol Gantry Helix Indus Juno Kappa Lomax Mira Nordex Omega Pallas Quanta "
        "Rondo Sigma Tellus Unitas Vega Wotan Xenon Zephyr",
        "Works Press Bank Mills Stores Group Lines Brothers Foods Motors Tools Films",
    ),
}
WORDS = {
    "month": "January February March April May June July August September October November December",
    "job": "painter teacher lawyer sailor doctor nurse farmer printer singer builder tailor chemist pilot engineer",
    "subject": "law music botany physics history medicine geology chemistry grammar astronomy theology",
    "goods": "clocks boats paper glass bicycles pianos lamps carpets cameras boots tractors soap cheese engines",
    "sight": "castle bridge harbour market library theatre lighthouse abbey garden museum tower mill",
}
WORDS = {kind: words.split() for kind, words in WORDS.items()}

# A fact: sentences, and questions with the field that answers each. {s} is the subject as the sentence mentions it,
# {n} its name in the question; other fields are filled by kind ("town2" is a second town). A causal model reads a word
# with the question and the text on its left only, so the subject and the verb come before the answer.
FACTS = {
    "person": [
        (["{s} was born on {date} in {town}.", "{s} was born in {town} on {date}."],
         [("When was {n} born?", "date"), ("Where was {n} born?", "town"), ("On what day was {n} born?", "date")]),
        (["{s} worked as {job} for {firm}.", "{s} was {job} at {firm}."],
         [("What was the job of {n}?", "job"), ("For which company did {n} work?", "firm")]),
        (["{s} studied {subject} under {person}.", "{s} was taught {subject} by {person}."],
         [("Who taught {n}?", "person"), ("What did {n} study?", "subject"), ("Under whom did {n} study?", "person")]),
        (["{s} moved from {town} to {town2} in {year}.", "{s} moved in {year} from {town} to {town2}."],
         [("From which town did {n} move?", "town"), ("To which town did {n} move?", "town2"),
          ("When did {n} move?", "year")]),
        (["{s} married {person} in {year}.", "{s} became the partner of {person} in {year}."],
         [("Whom did {n} marry?", "person"), ("When did {n} marry?", "year"),
          ("Who was the partner of {n}?", "person")]),
        (["{s} died in {town} on {date}.", "{s} died on {date} in {town}."],
         [("When did {n} die?", "date"), ("Where did {n} die?", "town"), ("On what day did {n} die?", "date")]),
        (["{s} earned {count} pounds in {year}.", "{s} was paid {count} pounds in {year}."],
         [("How much did {n} earn?", "count"), ("How many pounds did {n} get?", "count")]),
        (["{s} led {firm} from {year} to {year2}.", "{s} was head of {firm} from {year} until {year2}."],
         [("Which company did {n} lead?", "firm"), ("From which year did {n} lead it?", "year"),
          ("Until which year did {n} lead it?", "year2")]),
    ],
    "town": [
        (["{s} was founded in {year} by {person}.", "{s} was founded by {person} in {year}."],
         [("When was {n} founded?", "year"), ("Who founded {n}?", "person"), ("By whom was {n} founded?", "person")]),
        (["{s} has a population of {count} and an area of {count2}.",
          "{s} has an area of {count2} and a population of {count}."],
         [("What is the population of {n}?", "count"), ("What is the area of {n}?", "count2")]),
        (["{s} is known for its {sight}, built in {year}.", "{s} has a famous {sight} from {year}."],
         [("What is {n} known for?", "sight"), ("When was the sight of {n} built?", "year")]),
        (["{s} lies on the road from {town} to {town2}.", "{s} got a train line from {town} to {town2}."],
         [("From which town can one come to {n}?", "town"), ("To which town can one go from {n}?", "town2")]),
        (["{s} elected {person} as mayor on {date}.", "{s} got a new mayor, {person}, on {date}."],
         [("Who became mayor of {n}?", "person"), ("When did {n} get a mayor?", "date")]),
        (["{s} makes {goods} for {firm}.", "{s} sells {goods} to {firm}."],
         [("What does {n} make?", "goods"), ("Which firm buys from {n}?", "firm")]),
        (["{s} burned on {date} and was rebuilt by {person}.", "{s} was rebuilt by {person} after a fire on {date}."],
         [("When did {n} burn?", "date"), ("Who rebuilt {n}?", "person")]),
    ],
    "firm": [
        (["{s} was started by {person} in {town}.", "{s} was started in {town} by {person}."],
         [("Who started {n}?", "person"), ("Where was {n} started?", "town")]),
        (["{s} makes {goods} and has {count} workers.", "{s} has {count} workers and makes {goods}."],
         [("What does {n} make?", "goods"), ("How many workers does {n} have?", "count")]),
        (["{s} was sold to {firm} in {year}.", "{s} was bought by {firm} in {year}."],
         [("Who bought {n}?", "firm"), ("When was {n} sold?", "year")]),
        (["{s} is led by {person}, {job}.", "{s} has a new head, {person}, {job}."],
         [("Who leads {n}?", "person"), ("What is the job of the head of {n}?", "job")]),
        (["{s} opened an office in {town} on {date}.", "{s} opened on {date} an office in {town}."],
         [("Where did {n} open an office?", "town"), ("When did {n} open an office?", "date")]),
        (["{s} moved from {town} to {town2} in {year}.", "{s} moved in {year} from {town} to {town2}."],
         [("From which town did {n} move?", "town"), ("To which town did {n} move?", "town2"),
          ("When did {n} move?", "year")]),
        (["{s} earned {count} pounds and owed {count2}.", "{s} owed {count2} pounds and earned {count}."],
         [("How much did {n} earn?", "count"), ("How much did {n} owe?", "count2")]),
    ],
}  # fmt: skip
PRONOUNS = {"person": ["He", "She"], "town": ["It", "The town"], "firm": ["It", "The firm"]}
LEADS = ["This is a short text.", "Here is what we know.", "The old book tells more.", "A few notes follow."]


def name_pools(dev: bool) -> dict:
    """Returns {kind: names}, for the dev set or for the other files."""
    pools = {}
    for kind, (first, second) in NAMES.items():
        pairs = ((i, a, j, b) for i, a in enumerate(first.split()) for j, b in enumerate(second.split()))
        pools[kind] = [f"{a} {b}" for i, a, j, b in pairs if ((i + j) % 5 == 0) == dev]
    return pools


def draw(field: str, values: dict, rng: random.Random, pools: dict) -> tuple:
    """Returns (words before the answer, answer, other right answers) for a field of a sentence.

    values: answers of this sentence so far; a second one of a kind differs, and a second year is the later one.
    """
    kind = field.rstrip("2")
    if kind == "year":
        return "", str(int(values["year"]) + rng.randint(1, 40) if "year" in values else rng.randint(1801, 1959)), []
    if kind == "date":
        month, year = rng.choice(WORDS["month"]), rng.randint(1801, 1999)
        return "", f"{rng.randint(1, 28)} {month} {year}", [f"{month} {year}", str(year)]
    if kind == "count":
        choices = [str(n * m) for n in range(2, 100) for m in (1, 10, 100)]
    else:
        choices = pools.get(kind) or WORDS[kind]
    answer = rng.choice([choice for choice in choices if choice not in values.values()])
    if kind == "person":
        return "", answer, [answer.split()[1]]
    before = ""
    if kind == "job":
        before = "an " if answer[0] in "aeiou" else "a "
    elif kind in ("town", "firm"):
        before = rng.choice(["", "", {"town": "the town of ", "firm": "the company "}[kind]])
    return before, answer, [before + answer] if before else []


def draw_all(template: str, values: dict, rng: random.Random, pools: dict) -> dict:
    """Returns {field: of `draw`} for the fields of a sentence; `values` gets the answers."""
    drawn = {}
    # in alphabetical order, so that "year" comes before "year2"
    for field in sorted({field for _, field, _, _ in string.Formatter().parse(template) if field} - {"s"}):
        drawn[field] = draw(field, values, rng, pools)
        values[field] = drawn[field][1]
    return drawn


def make_paragraph(rng: random.Random, pools: dict, shared: float) -> tuple:
    """Returns (context, [(question, answer, start in the context, other right answers)])."""
    kind = rng.choice(["person", "person", "town", "firm"])
    facts = rng.sample(FACTS[kind], 6)
    if rng.random() < shared:
        facts[rng.randrange(3, 6)] = facts[rng.randrange(3)]  # told of both subjects: only the name decides
    context, questions = rng.choice(LEADS), []
    for name, told in zip(rng.sample(pools[kind], 2), (facts[:3], facts[3:])):
        pronoun = rng.choice(PRONOUNS[kind])
        for i, (templates, asked) in enumerate(told):
            template = rng.choice(templates)
            subject = name if i == 0 or rng.random() < 0.5 else pronoun
            sentence, values, found = "", {"subject of the sentence": name}, {}
            drawn = draw_all(template, values, rng, pools)
            for text, field, _, _ in string.Formatter().parse(template):
                sentence += text
                if field == "s":
                    sentence += subject
                elif field:
                    before, answer, others = drawn[field]
                    found[field] = (answer, len(context) + 1 + len(sentence) + len(before), others)
                    sentence += before + answer
            context += " " + sentence
            question, field = rng.choice(asked)
            questions.append((question.format(n=name, **values), *found[field]))
    rng.shuffle(questions)
    return context, questions


def make_squad(split: str, paragraphs: int, args: argparse.Namespace) -> str:
    """Returns a data set as JSON text in the nested SQuAD v1.1 form; "dev" has all right answers, "train" one."""
    rng, pools = random.Random(f"{split} {args.seed}"), name_pools(split == "dev")
    articles = []
    for p in range(paragraphs):
        context, questions = make_paragraph(rng, pools, args.shared)
        qas = []
        for q, (question, answer, start, others) in enumerate(questions[: args.questions]):
            answers = [{"text": answer, "answer_start": start}]
            if split == "dev":  # every other answer ends where the first one ends
                answers += [{"text": text, "answer_start": start + len(answer) - len(text)} for text in others]
            assert all(context.startswith(a["text"], a["answer_start"]) for a in answers)
            qas.append({"id": f"{split}-{p}-{q}", "question": question, "answers": answers})
        articles.append({"title": f"{split} {p}", "paragraphs": [{"context": context, "qas": qas}]})
    return json.dumps({"version": "1.1", "data": articles}, indent=1) + "\n"


def make_pretrain(args: argparse.Namespace) -> str:
    """Returns the pretraining text: question, paragraph, and the answer after the paragraph or marked inside it."""
    rng, pools = random.Random(f"pretrain {args.seed}"), name_pools(dev=False)
    documents = []
    while len(documents) < args.pretrain_documents:
        context, questions = make_paragraph(rng, pools, args.shared)
        for question, answer, start, _ in questions[:2]:
            if rng.random() < 0.5:
                documents.append(f"{question}\n{context}\n{answer}")
            else:
                documents.append(f"{question}\n{context[:start]}[ {answer} ]{context[start + len(answer) :]}")
    return "\n\n".join(documents[: args.pretrain_documents]) + "\n"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_up_to_date(folder: Path, arguments: dict) -> bool:
    """Whether the manifest in `folder` has these arguments and the files have its checksums."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8-sig"))
        return manifest["arguments"] == arguments and all(
            sha256((folder / name).read_bytes()) == checksum for name, checksum in manifest["files"].items()
        )
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return False


def write_atomically(path: Path, text: str):
    part = path.with_name(path.name + ".part")
    part.write_bytes(text.encode("utf-8"))  # bytes: no translation of line ends
    os.replace(part, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the files")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: 0)")
    parser.add_argument("--train_paragraphs", type=int, default=1500, help="paragraphs of train.json (default: 1500)")
    parser.add_argument("--dev_paragraphs", type=int, default=200, help="paragraphs of dev.json (default: 200)")
    parser.add_argument("--questions", type=int, default=4, help="questions a paragraph, 1 to 6 (default: 4)")
    parser.add_argument("--pretrain_documents", type=int, default=16000, help="for pretrain.txt (default: 16000)")
    parser.add_argument("--shared", type=float, default=0.1, help="paragraphs with a fact told twice (default: 0.1)")
    args = parser.parse_args()
    if min(args.train_paragraphs, args.dev_paragraphs, args.pretrain_documents) < 1 or not 1 <= args.questions <= 6:
        parser.error("sizes must be at least 1, and --questions 1 to 6")
    if not 0 <= args.shared <= 1:
        parser.error(f"--shared {args.shared}: a fraction, 0 to 1")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir} is a file, not a folder")

    arguments = {name: value for name, value in vars(args).items() if name != "output_dir"}
    arguments["script_sha256"] = sha256(Path(__file__).read_bytes())
    if is_up_to_date(args.output_dir, arguments):
        print(f"{args.output_dir} is up to date")
        return
    texts = {
        "train.json": make_squad("train", args.train_paragraphs, args),
        "dev.json": make_squad("dev", args.dev_paragraphs, args),
        "pretrain.txt": make_pretrain(args),
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(args.output_dir / name, text)
    manifest = {"arguments": arguments, "files": {name: sha256(text.encode("utf-8")) for name, text in texts.items()}}
    write_atomically(args.output_dir / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    train, dev = args.questions * args.train_paragraphs, args.questions * args.dev_paragraphs
    print(f"wrote {args.output_dir}: {train} training and {dev} dev questions, {args.pretrain_documents} documents")


if __name__ == "__main__":
    main()
