"""adv_attack/distractors.py: what is appended, what stays, what is refused."""

import json
import re
import sys

import pytest

from conftest import load_script

ARTICLES = {
    "Birds": [("In 1901 Ada painted Kites.", "Who painted Kites in 1901?", "Ada"),
              ("Owls sleep.", "what sleeps?", "Owls")],
    "Rivers": [("Ben crossed the Elbe in 1700 with 12 men.", "How many men crossed the Elbe with Ben in 1700?", "12")],
    "Towns": [("Cleo left Bonn in 1850.", "In which year did Cleo leave Bonn?", "1850"),
              ("Dora likes York.", "Does Dora like York or Bath?", "York")],
}  # fmt: skip


@pytest.fixture
def make(monkeypatch, tmp_path):
    """make(*flags, articles=...): (the questions of --output by id, the record), or the error."""
    script = load_script("adv_attack/distractors.py")

    def call(*flags, articles=ARTICLES, output="out.json"):
        data = []
        for title, rows in articles.items():
            for number, (context, question, text) in enumerate(rows):
                answers = [{"text": text, "answer_start": context.index(text)}] if text else []
                qa = {"id": f"{title}{number}", "question": question, "answers": answers}
                data.append({"title": title, "paragraphs": [{"context": context, "qas": [qa]}]})
        (tmp_path / "in.json").write_text(json.dumps({"version": "1.1", "data": data}))
        words = [
            "--input",
            tmp_path / "in.json",
            "--output",
            tmp_path / output,
            "--record_file",
            tmp_path / "record.json",
        ]
        monkeypatch.setattr(sys, "argv", ["distractors.py", *map(str, words), *flags])
        try:
            script.main()
        except script.UserError as error:
            return str(error)
        found = json.loads((tmp_path / output).read_text())["data"]
        rows = {
            article["paragraphs"][0]["qas"][0]["id"]: article["paragraphs"][0]["context"]
            for article in found
            if article["paragraphs"][0]["qas"][0]["answers"]
        }
        return rows, json.loads((tmp_path / "record.json").read_text())

    return call


def old(key):
    return ARTICLES[key[:-1]][int(key[-1])]


def test_names_numbers_and_the_question_word_are_replaced(make):
    found, record = make()
    assert record["metrics"] == {"questions": 5, "distracted": 4} and found["Birds1"] == "Owls sleep.", "no name in it"
    for key, context in found.items():
        before, question, answer = old(key)
        assert context.startswith(before)
        if key != "Birds1":
            added = context.removeprefix(before + " ")
            assert answer not in added and added.endswith(".") and "?" not in added
            assert not re.search(r"\b(Who|How many|which)\b", added)
    names = "(Elbe|Ben|Bonn|Cleo|York|Bath|Dora)"
    assert re.fullmatch(rf"York painted {names} in 1700\.", found["Birds0"].split(". ")[1]), "the one name of others"
    assert re.fullmatch(r"1850 men crossed the (\w+) with (\w+) in 1901\.", found["Rivers0"].split(". ")[1])
    said = found["Towns1"].split(". ")[1]
    assert said.startswith("Does ") and re.search(r": (Ada|Owls)\.$", said), "no question word: the answer comes last"


def test_the_seed_decides_and_the_control_is_of_another_article(make):
    first, _ = make()
    assert make(output="again.json")[0] == first
    assert any(make("--seed", str(seed), output=f"{seed}.json")[0] != first for seed in range(3))
    control, record = make("--control", output="control.json")
    sentences = {key: context.removeprefix(old(key)[0]).strip() for key, context in first.items()}
    for key, context in control.items():
        added = context.removeprefix(old(key)[0]).strip()
        makers = [other[:-1] for other, text in sentences.items() if text == added]
        assert not added if key == "Birds1" else makers and key[:-1] not in makers
    assert record["metrics"]["distracted"] == 4


def test_refusals(make, tmp_path):
    nothing = {"Birds": [("Owls sleep.", "what sleeps?", "Owls")]}
    assert "no question whose names or numbers another article could replace" in make(articles=nothing)
    assert '"answers" is empty' in make(articles={"Birds": [("Owls sleep.", "what sleeps?", None)]})
    (tmp_path / "there.json").write_text("{}")
    assert "is there, with other content" in make(output="there.json")
    assert (tmp_path / "there.json").read_text() == "{}"
