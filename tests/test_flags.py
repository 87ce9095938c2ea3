"""The door of all flags: --help of every script, JSON files of flags, and refusals before anything is loaded."""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import sys

import pytest
import transformers

from conftest import ROOT, experiment

with experiment("base_model"):
    import run_qa
    from common import flags

FOLDERS = ("base_model", "switch_precision", "cpt", "adv_attack", "language_model", "benchmark")
SCRIPTS = sorted(
    path
    for path in ROOT.glob("*/*.py")
    if "__main__" in (text := path.read_text(encoding="utf-8"))
    and "parse" in text
    and path.name not in ("peers.py", "memory.py")
    and not path.name.startswith("test_")
)


def load(path):
    """A module from its file, with its folder's neighbours."""
    inside = experiment(path.parent.name) if path.parent.name in FOLDERS else contextlib.nullcontext()
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    with inside:
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        sys.path.append(str(path.parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
    return module


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_help_of_every_script_explains_every_flag_of_ours(path, monkeypatch, capsys):
    module, parsers, original = load(path), [], argparse.ArgumentParser.format_help
    monkeypatch.setattr(argparse.ArgumentParser, "format_help", lambda self: parsers.append(self) or original(self))
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert not stop.value.code and "usage:" in capsys.readouterr().out
    upstream = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    unexplained = [action.dest for action in parsers[-1]._actions if not (action.help or "").strip()]
    assert [name for name in unexplained if name not in upstream] == []


def test_scripts_are_found():
    names = {f"{path.parent.name}/{path.name}" for path in SCRIPTS}
    assert len(names) > 25
    assert {
        "base_model/run_qa_eval.py",
        "cpt/compare.py",
        "quickstart/make_model.py",
        "benchmark/bench_step.py",
    } <= names


# ---- numbers, choices, paths


def parse(monkeypatch, *words, types=(run_qa.ModelArguments, run_qa.DataTrainingArguments, run_qa.TrainingArguments)):
    monkeypatch.setattr(sys, "argv", ["run_qa.py", *map(str, words)])
    return flags.parse_args(*types)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("per_device_train_batch_size", value) for value in (0, -1)],
        *[("per_device_eval_batch_size", value) for value in (0, -8)],
        *[(f"max_{split}_samples", value) for split in ("train", "eval", "predict") for value in (0, -2)],
        *[("max_seq_length", value) for value in (0, -1)],
        *[("doc_stride", value) for value in (-1, 786, 5000)],
        *[(name, 0) for name in ("n_best_size", "max_answer_length", "lora_r", "lora_alpha", "num_train_epochs")],
        *[(name, -1) for name in ("n_best_size", "max_answer_length", "lora_r", "lora_alpha", "learning_rate")],
        *[("learning_rate", value) for value in ("nan", "inf", "-inf")],
        *[(name, "nan") for name in ("weight_decay", "adam_beta1", "max_grad_norm", "num_train_epochs")],
        *[("seed", value) for value in (-1, 2**32)],
        *[("data_seed", value) for value in (-1, 2**64)],
        *[("max_steps", value) for value in (0, -2)],
        *[("gradient_accumulation_steps", value) for value in (0, -1)],
        ("adam_beta2", 1),
        ("dataloader_num_workers", -1),
        ("preprocessing_num_workers", 0),
        ("execution", "int4"),
        ("backward_dtype", "fp8"),
        ("bit_widths", 1),
        ("bit_widths", 12),
        ("lora_r", 8.5),
        ("lora_alpha", "inf"),
        ("max_seq_length", "many"),
        ("no_such_flag", 1),
        ("report_to", "tensorboard"),
        ("report_to", "no_such_tracker"),
    ],
)
def test_flags_that_cannot_work_are_one_error(flag, value, monkeypatch, tmp_path):
    monkeypatch.setattr(flags, "get_available_reporting_integrations", lambda: ["wandb"])
    with pytest.raises(ValueError) as caught:
        parse(monkeypatch, "--output_dir", tmp_path / "out", f"--{flag}={value}")
    assert flag in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert isinstance(caught.value, run_qa.UserError) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--max_seq_length", "384", "--doc_stride", "0", "--max_steps", "-1", "--seed", 2**32 - 1),
        ("--learning_rate", "0", "--max_grad_norm", "inf", "--warmup_steps", "99", "--max_steps", "5"),
        ("--report_to", "none"),
    ],
)
def test_flags_that_can_work(words, monkeypatch, tmp_path):
    parse(monkeypatch, "--output_dir", tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("switch_precision/run_qa_eval.py", "EvalArguments", ["--num_bootstrap", "-1"]),
        ("switch_precision/search.py", "SearchArguments", ["--average_bits", "nan"]),
        ("switch_precision/search.py", "SearchArguments", ["--num_random", "-1"]),
        ("switch_precision/search.py", "SearchArguments", ["--output", "FOLDER"]),
        ("switch_precision/sensitivity.py", "SweepArguments", ["--measure_split", "test"]),
        ("language_model/generate.py", "GenerationArguments", ["--temperature", "nan"]),
        ("language_model/generate.py", "GenerationArguments", ["--record_file", "FOLDER"]),
        ("adv_attack/random_precision_inference.py", "RandomPrecisionArguments", ["--seed", "-1"]),
        ("adv_attack/whitebox_attack.py", "AttackArguments", ["--data_seed", "-1"]),
        ("cpt/run_qa.py", "CyclicArguments", ["--fixed_bits", "9"]),
        ("cpt/run_qa.py", "CyclicArguments", ["--range_test_threshold", "inf"]),
    ],
)
def test_flags_of_other_scripts(script, arguments, words, monkeypatch, tmp_path):
    module = load(ROOT / script)
    names = {field.name for field in vars(module)[arguments].__dataclass_fields__.values()}
    needed = {"model_name_or_path": "m", "output_dir": tmp_path / "out", "attack_dirs": "a"}
    words = [tmp_path if word == "FOLDER" else word for word in words]
    given = [word for name in names & set(needed) for word in (f"--{name}", needed[name])]
    with pytest.raises(ValueError, match=words[0]) as caught:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, [*given, *words])])
        module.parse_args(vars(module)[arguments])
    assert type(caught.value).__name__ == "UserError"


@pytest.mark.parametrize(
    ("flag", "path", "message"),
    [
        ("output_dir", "file", "is a file"),
        ("output_dir", "file/below/it", "cannot be written"),
        ("output_dir", "x" * 256, "a name of 256 bytes"),
        ("output_dir", "new/" + "é" * 128 + "/out", "a name of 256 bytes"),
        ("output_dir", "/proc/nowhere/out", "cannot be written"),
        ("record_file", ".", "is a folder"),
        ("record_file", "file/record.json", "cannot be written"),
        ("record_file", "/proc/record.json", "cannot be written"),
        ("record_file", "x" * 250, "bytes; allowed are 255"),
    ],
)
def test_output_paths_that_cannot_be_written(flag, path, message, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=message) as caught:
        parse(monkeypatch, "--output_dir", tmp_path / "out", f"--{flag}", tmp_path / path)
    assert f"--{flag} " in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file"], "a refusal leaves nothing"


def test_output_paths_that_can_be_written_are_left_alone(monkeypatch, tmp_path):
    parse(monkeypatch, "--output_dir", tmp_path / "a/b/c", "--record_file", tmp_path / "d/record.json")
    monkeypatch.chdir(tmp_path)
    parse(monkeypatch, "--output_dir", "out", "--record_file", "record.json")
    assert os.listdir(tmp_path) == []


# ---- one JSON file in the place of flags


def write_flags(folder, content, prefix=""):
    path = folder / "flags.json"
    path.write_text(prefix + (content if isinstance(content, str) else json.dumps(content)), encoding="utf-8")
    return path


@pytest.mark.parametrize("prefix", ["", "\ufeff"], ids=["plain", "byte-order mark"])
def test_a_json_file_says_what_the_command_line_says(prefix, monkeypatch, tmp_path):
    content = {
        "output_dir": str(tmp_path / "out"), "do_eval": True, "bf16": False, "max_steps": 7, "learning_rate": 1e-5,
        "bit_widths": [4, 8], "question_separator": "", "bit_config": 8, "sp_config_path": None, "token": "--x",
        "lr_scheduler_kwargs": {"num_cycles": 2}, "report_to": "none",
    }  # fmt: skip
    path = write_flags(tmp_path, content, prefix)
    model_args, data_args, training_args = parse(monkeypatch, path)
    assert training_args.do_eval and not training_args.do_train and not training_args.bf16
    assert (training_args.max_steps, training_args.learning_rate) == (7, 1e-5)
    assert training_args.lr_scheduler_kwargs == {"num_cycles": 2} and data_args.question_separator == ""
    assert model_args.bit_widths == [4, 8] and model_args.bit_config == "8" and model_args.token == "--x"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"max_seq": 96}, ["max_seq"]),
        ({"no_such_flag": 1}, ["no_such_flag"]),
        ({"max_seq_length": "many"}, ["max_seq_length", "many"]),
        ({"max_seq_length": 96.5}, ["max_seq_length", "96.5"]),
        ({"do_eval": "perhaps"}, ["do_eval", "perhaps"]),
        ({"lora_r": True}, ["lora_r", "true"]),
        ('{"learning_rate": NaN}', ["NaN is no number"]),
        ('{"lora_r": 8, "lora_r": 4}', ["duplicate key", "lora_r"]),
        ('{"lora_r": ' + "9" * 5000 + "}", ["not valid JSON"]),
        ('{"lora_r": ' + "[" * 100_000, ["nested too deeply"]),
        ("[1]", ["expected a JSON object", "list"]),
        ('{"lora_r": 8', ["not valid JSON"]),
        ("", ["not valid JSON"]),
    ],
)
def test_faults_of_a_json_file_name_file_and_key(content, parts, monkeypatch, tmp_path):
    path = write_flags(tmp_path, content)
    with pytest.raises(ValueError) as caught:
        parse(monkeypatch, path)
    assert isinstance(caught.value, run_qa.UserError) and len(str(caught.value)) < 400
    for part in ("flags.json", *parts):
        assert part in str(caught.value), str(caught.value)


def test_missing_json_file(monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        parse(monkeypatch, "nowhere.json")
