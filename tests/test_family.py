"""benchmark/family.py: the GPT-2 family, one training step, export, evaluation, within a memory limit."""

import json
import sys

import pytest

from conftest import load_script


@pytest.fixture
def main(monkeypatch, squad_files, tmp_path):
    """main(*flags): (script, record or the exit's message); sizes of 6 and 24 narrow blocks."""
    script = load_script("benchmark/family.py")
    monkeypatch.setattr(script, "SIZES", {"distilgpt2": (6, 64), "gpt2-medium": (24, 64)})
    train, dev = squad_files

    def call(*flags):
        words = ["--train_file", train, "--validation_file", dev, "--output", str(tmp_path / "family.json"), *flags]
        monkeypatch.setattr(sys, "argv", ["family.py", *map(str, words)])
        try:
            script.main()
        except SystemExit as stop:
            return stop.code
        return json.loads((tmp_path / "family.json").read_text())

    return call


@pytest.mark.slow
def test_one_size_goes_through_training_export_and_evaluation(main, tiny_model, tmp_path, capsys):
    record = main("--tokenizer", tiny_model, "--sizes", "distilgpt2", "--work", tmp_path, "--use_cpu")
    found = record["sizes"]["distilgpt2"]
    assert record["metrics"] == {"failed": 0} and list(found["stages"]) == ["train", "export", "evaluate"]
    assert found["linears_at_4_bits"] == 2 + 4 + 2, "attn.c_proj of blocks 0 and 1, block 5, and the MLP of block 4"
    assert all(stage["peak_bytes"] > 1e7 and stage["seconds"] > 0 for stage in found["stages"].values())
    assert found["file_bytes"] > 0 and "| distilgpt2 | 6      | 8 " in capsys.readouterr().out
    assert not list(tmp_path.glob("tmp*")), "the models are gone"


def test_what_does_not_fit_ends_its_size(main, tiny_model, tmp_path, monkeypatch, capsys):
    script = sys.modules.get("family") or load_script("benchmark/family.py")
    assert script.run([sys.executable, "-c", "bytearray(2**31)"], 2**30)[0] == 1
    assert script.run([sys.executable, "-c", "print('a'); print('b')"], 2**34) == (0, "b")
    record = main("--tokenizer", tiny_model, "--memory_gib", 0, "--sizes", "distilgpt2")
    assert record["metrics"] == {"failed": 1} and list(record["sizes"]["distilgpt2"]["stages"]) == ["train"]
    assert "failed" in capsys.readouterr().out


def test_refusals(main, tmp_path):
    assert main("--train_file", "none.json") == "error: --train_file none.json: no such file"
    assert main("--sizes", "gpt3") == 2
    assert main("--tokenizer", tmp_path / "none").startswith("error: ")
