"""adv_attack/paired.py: evaluations of the same questions, compared question by question."""

import json
import sys

import pytest

from common.record import write_state
from conftest import load_script

GOLDS = {f"q{number}": "Ada" for number in range(8)}


@pytest.fixture
def paired(monkeypatch, tmp_path, capsys):
    """paired(*flags, **answers): the record, or the error. answers: NAME={config: text of every question}."""
    script = load_script("adv_attack/paired.py")
    qas = [{"id": key, "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]} for key in GOLDS]
    article = {"title": "a", "paragraphs": [{"context": "Ada Ben Cleo", "qas": qas}]}
    (tmp_path / "dev.json").write_text(json.dumps({"version": "1.1", "data": [article]}))

    def call(*flags, **answers):
        words = []
        for name, configs in answers.items():
            words.append(f"{name}={tmp_path / name}")
            for config, texts in configs.items():
                folder = tmp_path / name / f"{config}-1"
                folder.mkdir(parents=True)
                write_state(folder / "record.json", {"bit_config": {"name": config}})
                (folder / "eval_predictions.json").write_text(json.dumps(dict(zip(GOLDS, texts, strict=False))))
        record = tmp_path / "record.json"
        words = [
            *(["--evaluations", *words] if words else []),
            "--validation_file",
            tmp_path / "dev.json",
            "--record_file",
            record,
            *flags,
        ]
        monkeypatch.setattr(sys, "argv", ["paired.py", *map(str, words)])
        try:
            script.main()
        except script.UserError as error:
            return str(error)
        return json.loads(record.read_text())

    return call


def test_what_is_lost_from_one_evaluation_to_the_next(paired, capsys):
    right, wrong = ["Ada"] * 8, ["Ada"] * 2 + ["Ben"] * 6
    plain, control = {"W8A8KV8": right, "W4A4KV4": right}, {"W8A8KV8": right, "W4A4KV4": ["Ada"] * 7 + ["Ben"]}
    record = paired(plain=plain, control=control, attack={"W8A8KV8": wrong})
    rows = {(row["first"], row["second"]): row for row in record["rows"]}
    assert list(rows) == [("plain", "control"), ("plain", "attack"), ("control", "attack")], "at W8A8KV8 alone"
    assert rows["plain", "control"]["exact_match_drop"] == 0 and rows["plain", "control"]["mcnemar_p"] == 1
    attack = rows["control", "attack"]
    assert attack["exact_match_drop"] == 75 and attack["mcnemar_p"] == pytest.approx(2 * 0.5**6)
    low, high = attack["exact_match_drop_interval"]
    assert 25 <= low < 75 < high <= 100
    assert "| W8A8KV8 | control | attack" in capsys.readouterr().out


def test_refusals(paired, tmp_path):
    right = ["Ada"] * 8
    assert "two or more are compared" in paired(plain={"W8A8KV8": right})
    assert "no config that all of them have" in paired(a={"W8A8KV8": right}, b={"W4A4KV4": right})
    assert f"{tmp_path / 'd'}: its questions are not those" in paired(c={"W8A8KV8": right}, d={"W8A8KV8": right[:3]})
    assert "no such folder" in paired("--evaluations", "x=none", "y=none")
    assert "allowed is NAME=FOLDER" in paired("--evaluations", "none", "y=none")
