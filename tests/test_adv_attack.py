"""adv_attack's scripts end to end on a tiny classifier: training, attack, resume, evaluation, random precision."""

import csv
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import HfArgumentParser

from conftest import NAMES, ROOT, THINGS, experiment, save_tiny_tokenizer

with experiment("adv_attack"):
    import adversarial_texts
    import attack_setup
    import classifier
    import eval as attack_eval
    import random_precision_inference as rpi
    import text_classification
    import text_data
    import whitebox_attack
    from common.statistics import mcnemar

SMALL = ["--use_cpu", "True", "--disable_tqdm", "True", "--report_to", "none", "--save_strategy", "no"]
ATTACK = ["--num_samples", "6", "--num_iters", "25", "--lr", "1", "--gumbel_batch", "3", "--gumbel_samples", "5"]
ATTACK += ["--batch_texts", "4"]


def make_rows(count, seed):
    """Label 1 where somebody has the kite, 0 where somebody has the drum; the rest of the text is noise."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        things = [("drum", "kite")[number % 2], *rng.sample(THINGS[2:], rng.randint(1, 2))]
        rng.shuffle(things)
        text = " ".join(f"{name} has the {thing}." for name, thing in zip(rng.sample(NAMES, 3), things))
        rows.append({"text": text, "label": number % 2})
    return rows


@pytest.fixture(scope="session")
def text_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, count in (("train", 64), ("test", 30)):
        lines = [json.dumps(row) for row in make_rows(count, name)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return ["--train_file", str(folder / "train.jsonl"), "--validation_file", str(folder / "test.jsonl")]


def call(module, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x.py", *map(str, flags)])
        module.main()


def read(path):
    return json.loads(pathlib.Path(path).read_text())


@pytest.fixture(scope="session")
def trained(tiny_model, text_files, tmp_path_factory):
    """A LoRA classifier (one shared adapter) that has learned the two words."""
    folder = tmp_path_factory.mktemp("classifier") / "lora"
    flags = ["--do_train", "--do_eval", "--add_lora", "--learning_rate", "1e-2", "--max_steps", "50"]
    flags += ["--per_device_train_batch_size", "16", "--output_dir", folder, *SMALL]
    call(text_classification, "--model_name_or_path", tiny_model, *text_files, *flags)
    return folder


@pytest.fixture(scope="session")
def attacks(trained, text_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacks")
    for bits in ("32", "8", "4", "eot"):
        attack(trained, text_files, folder / bits, "--attack_bits", bits)
    return folder


def attack(trained, text_files, output, *flags):
    call(whitebox_attack, "--model_name_or_path", trained, *text_files, "--output_dir", output, *ATTACK, *flags)
    return read(output / "adversarial.json")


def test_classifier_learns_and_records_accuracy_with_its_interval(trained):
    record = read(trained / "record.json")
    assert record["metrics"]["eval_accuracy"] >= 95
    assert record["metrics"]["eval_accuracy_low"] < record["metrics"]["eval_accuracy"]
    assert set(load_file(trained / "model.safetensors")) & {"score.weight"}
    assert sum(path.stat().st_size for path in trained.glob("model.safetensors")) < 400_000  # no frozen base in it


def test_attack_beats_the_classifier_and_the_unoptimized_theta_does_not(trained, attacks, tmp_path):
    folders = [attacks / bits for bits in ("32", "4", "eot")]
    call(attack_eval, "--model_name_or_path", trained, "--attack_dirs", *folders, "--output_dir", tmp_path)
    rows = {(row["attack"][:5], row["inference"], row["texts"]): row for row in read(tmp_path / "record.json")["rows"]}
    for key in (("W32A3", "W32A32KV32"), ("W4A4K", "W4A4KV4"), ("eot(W", "W8A8KV8")):
        clean, initial, optimized = (rows[*key, kind] for kind in ("clean", "initial Theta", "optimized"))
        assert clean["single"]["accuracy"] >= 80 and clean["single"]["n"] == 6
        assert initial["single"]["accuracy"] == clean["single"]["accuracy"]
        assert optimized["best_of_n"]["accuracy"] <= 40
        assert optimized["best_of_n"]["accuracy"] <= optimized["single"]["accuracy"]
        assert "best_of_n" not in clean and clean["token_error_rate"] == 0
        assert clean["similarity"] == pytest.approx(1, abs=1e-5) and optimized["similarity"] < 0.999
        assert optimized["token_error_rate"] > 0
    table = (tmp_path / "table.md").read_text()
    assert "best of 5, all" in table and "single, right" in table


def test_matrix_random_precision_and_plot(trained, attacks, figures, tmp_path):
    folders = [attacks / bits for bits in ("32", "8", "4", "eot")]
    call(rpi, "--model_name_or_path", trained, "--attack_dirs", *folders, "--precision_set", 4, 8,
         "--bitsandbytes", "nf4", "--repetitions", 20, "--output_dir", tmp_path)  # fmt: skip
    record = read(tmp_path / "record.json")
    single = record["matrices"]["single sample"]
    assert list(single) == ["no attack", "initial Theta", "W32A32KV32", "W8A8KV8", "W4A4KV4", "eot(W4A4KV4+W8A8KV8)"]
    assert list(single["no attack"])[:3] == ["W32A32KV32", "W4A4KV4", "W8A8KV8"] and len(single["no attack"]) == 4
    for name, row in record["random_precision"].items():
        cells = [single[name][bits]["accuracy"] for bits in ("W4A4KV4", "W8A8KV8")]
        assert row["expected"] == pytest.approx(np.mean(cells))
        assert row["low"] - 1e-9 <= row["mean"] <= row["high"] + 1e-9  # a mean of equal numbers may round
        assert row["repeated_queries"]["accuracy"] <= row["low"] + 1e-9
    cells = [[single[a][b]["accuracy"] for b in ("W4A4KV4", "W8A8KV8")] for a in ("W4A4KV4", "W8A8KV8")]
    assert record["summary"]["single sample"]["mean_diagonal"] == pytest.approx((cells[0][0] + cells[1][1]) / 2)
    assert (tmp_path / "matrix.png").is_file()
    panels = [axes for axes in figures["matrix"].axes if axes.images]
    for axes, matrix in zip(panels, record["matrices"].values(), strict=True):
        cells = [[cell["accuracy"] for cell in row.values()] for row in matrix.values()]
        shown = axes.images[0].get_array().tolist()
        assert [row[:-1] for row in shown] == cells, "the last column is random precision"
        assert [text.get_text() for text in axes.texts] == [f"{value:.0f}" for row in shown for value in row]
    assert [row[-1] for row in panels[0].images[0].get_array().tolist()] == pytest.approx(
        [record["random_precision"][row]["mean"] for row in single]
    )
    table = (tmp_path / "table.md").read_text()
    assert "mean_all" in table and "mean_diagonal" in table and "weight-only" in table


def test_two_runs_agree_to_the_last_digit_and_so_does_a_killed_and_resumed_one(
    trained, text_files, attacks, tmp_path, monkeypatch
):
    again = attack(trained, text_files, tmp_path / "again", "--attack_bits", "8")
    assert again == read(attacks / "8" / "adversarial.json")

    original, calls = whitebox_attack.Attack.run, []

    def killed(self, texts):
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, texts)

    monkeypatch.setattr(whitebox_attack.Attack, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        attack(trained, text_files, tmp_path / "killed", "--attack_bits", "8")
    assert not (tmp_path / "killed" / "adversarial.json").exists()
    assert attack(trained, text_files, tmp_path / "killed", "--attack_bits", "8") == again
    assert calls == [4, 2, 2]  # the first batch is not attacked again
    assert attack(trained, text_files, tmp_path / "other", "--attack_bits", "8", "--seed", "1") != again


def damages(whole):
    """An empty file, half of one, one with a flipped bit in its content, one without a checksum."""
    at = len(whole) * 2 // 3
    bare = {key: value for key, value in json.loads(whole).items() if key != "sha256"}
    return [
        b"",
        whole[: len(whole) // 2],
        whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :],
        json.dumps(bare).encode(),
    ]


@pytest.mark.parametrize("name", ["parts/00000.json", "adversarial.json", "attack_settings.json", "record.json"])
def test_damaged_state_of_an_attack_is_named_and_made_again(name, trained, text_files, tmp_path, caplog):
    fast = ("--num_iters", "2", "--attack_bits", "8")
    whole = attack(trained, text_files, tmp_path, *fast)
    path = tmp_path / name
    for damage in damages(path.read_bytes()):
        path.write_bytes(damage)
        if name.startswith("parts"):
            (tmp_path / "adversarial.json").unlink()
        caplog.clear()
        assert attack(trained, text_files, tmp_path, *fast) == whole
        named = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and str(path) in r.getMessage()]
        assert len(named) == 1 and "measured again" in named[0]
        assert read(tmp_path / "record.json")["settings"] == whole["settings"]


def test_finished_attack_does_nothing_but_report(trained, text_files, tmp_path, monkeypatch, caplog):
    flags = ("--num_iters", "1", "--attack_bits", "8")
    attack(trained, text_files, tmp_path, *flags)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*.json")}
    monkeypatch.setattr(whitebox_attack, "Attack", None)
    with caplog.at_level("INFO"):
        attack(trained, text_files, tmp_path, *flags)
    assert "this attack is finished; nothing to do" in caplog.text
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*.json")}


@pytest.mark.parametrize("script", [whitebox_attack, attack_eval, rpi])
def test_folder_of_another_run_is_refused_and_left_alone(script, trained, attacks, text_files, hold, tmp_path):
    hold(tmp_path)
    words = [*text_files, *ATTACK] if script is whitebox_attack else ["--attack_dirs", attacks / "32"]
    with pytest.raises(ValueError, match="another run .* is writing to it"):
        call(script, "--model_name_or_path", trained, *words, "--output_dir", tmp_path)
    assert os.listdir(tmp_path) == [".lock"]


def test_killed_start_is_no_obstacle(trained, text_files, tmp_path):
    (tmp_path / "attack_settings.json.99999999.tmp").write_text("{")
    attack(trained, text_files, tmp_path, "--num_iters", "1")
    assert sorted(set(os.listdir(tmp_path)) - {".lock"}) == [
        "adversarial.json",
        "attack_settings.json",
        "parts",
        "record.json",
    ]


def test_overwriting_removes_the_finished_attack_first(trained, text_files, tmp_path, monkeypatch):
    attack(trained, text_files, tmp_path, "--num_iters", "1")
    monkeypatch.setattr(whitebox_attack.Attack, "run", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attack(trained, text_files, tmp_path, "--num_iters", "2", "--overwrite_output_dir")
    assert [path.name for path in tmp_path.rglob("*.json")] == ["attack_settings.json"]


def test_restricted_vocabulary_holds_only_tokens_of_the_training_texts(trained, text_files, tmp_path):
    result = attack(trained, text_files, tmp_path / "restricted", "--candidate_tokens", "train")
    assert 20 < result["settings"]["candidates"] < 100
    assert result["settings"]["initial_probability"] > 0.9999
    words = {word for row in make_rows(64, "train") for word in row["text"].replace(".", "").split()}
    samples = [word.strip(".") for text in result["texts"] for sample in text["samples"] for word in sample.split()]
    assert sum(word in words for word in samples) > 0.6 * len(samples)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attack_bits", "9"], "9 is not a bit-width"),
        (["--attack_bits", "eot", "--precision_set", "8"], "--precision_set needs at least two"),
        (["--attack_bits", "missing.json"], "missing.json: no such bit-width config"),
        (["--constraint", "bert"], "--constraint bert: allowed are none, cosine"),
        (["--num_samples", "0"], "--num_samples 0: must be at least 1"),
        (["--lr", "nan"], "--lr nan: must be a number"),
        (["--start_index", "30"], "--start_index 30: there are only 30 texts"),
        (["--lr", "0.2"], r"other settings \(lr: 1.0 then, 0.2 now\)"),
        (["--num_iters", "7"], r"other settings \(num_iters: 25 then, 7 now\)"),
        (["--kappa", "1"], r"other settings \(kappa: 5.0 then, 1.0 now\)"),
        (["--gumbel_batch", "2"], r"other settings \(gumbel_batch: 3 then, 2 now\)"),
        (["--batch_texts", "2"], r"other settings \(batch_texts: 4 then, 2 now\)"),
        (["--seed", "3"], r"other settings \(seed: 42 then, 3 now\)"),
        (["--num_samples", "5"], r"other settings \(num_samples: 6 then, 5 now\)"),
        (["--max_seq_length", "9"], r"other settings \(max_seq_length: 128 then, 9 now\)"),
        (
            ["--max_train_samples", "9"],
            r"data.train.examples: 64 then, 9 now; data.train.sha256: '\w+' then, '\w+' now",
        ),
        (["--execution", "fake"], r"other settings \(execution: 'integer' then, 'fake' now"),
        (["--attn_implementation", "eager"], r"other settings \(attention: '\w+' then, 'eager' now\)"),
    ],
)
def test_attack_refuses(trained, text_files, attacks, flags, message):
    output = attacks / "8"
    with pytest.raises((ValueError, OSError), match=message):
        call(whitebox_attack, "--model_name_or_path", trained, *text_files, "--output_dir", output, *ATTACK,
             "--attack_bits", "8", *flags)  # fmt: skip


def test_attack_on_other_data_weights_config_tokenizer_or_bits_is_refused(trained, text_files, tiny_model, tmp_path):
    bits = tmp_path / "mine.json"
    bits.write_text('{"default": 8}')
    flags, out = ("--num_iters", "1", "--attack_bits", bits), tmp_path / "out"
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    attack(other, text_files, out, *flags)
    data = tmp_path / "test.jsonl"
    rows = [json.loads(line) for line in open(text_files[3])]
    data.write_text("\n".join(json.dumps({"text": row["text"], "label": 1 - row["label"]}) for row in rows))

    def refused(message, *more, model=other):
        with pytest.raises(ValueError, match=message):
            attack(model, text_files, out, *flags, *more)

    refused("data.validation.sha256: '[0-9a-f]+' then, '[0-9a-f]+' now", "--validation_file", data)
    reference = tmp_path / "reference"
    shutil.copytree(tiny_model, reference)
    for key, value in {"layer_norm_epsilon": 0.1, "n_head": 2, "activation_function": "relu"}.items():
        edit(reference / "config.json", key, value)
        refused("reference_sha256: '[0-9a-f]+' then", "--reference_model", reference)
    edit(other / "config.json", "lora_alpha", 3)
    refused("model_sha256: '[0-9a-f]+' then, '[0-9a-f]+' now")
    edit(other / "config.json", "lora_alpha", 16)
    tokenizer = tmp_path / "tokenizer"
    save_tiny_tokenizer(tokenizer, vocab_size=300)
    refused("tokenizer_sha256: '[0-9a-f]+' then, '[0-9a-f]+' now", "--tokenizer_name", tokenizer)
    with pytest.raises(ValueError, match="out: attacked the tokens of a tokenizer with checksum"):
        call(attack_eval, "--model_name_or_path", other, "--attack_dirs", out, "--tokenizer_name", tokenizer,
             "--output_dir", tmp_path / "eval")  # fmt: skip
    bits.write_text('{"default": 8, "*.mlp.c_fc": 4}')
    refused(r"precisions.mine.transformer.h.0.mlp.c_fc.w_bits: 8 then, 4 now")
    with pytest.raises(ValueError, match="attack mine: mine has other bits than when it was attacked .*8 then, 4 now"):
        call(attack_eval, "--model_name_or_path", other, "--attack_dirs", out, "--output_dir", tmp_path / "eval")
    bits.write_text('{"default": 8}')
    attack(other, text_files, tmp_path / "labels", "--validation_file", data, *flags[:2])
    with pytest.raises(ValueError, match="labels: attacked other texts or labels than .*out"):
        call(attack_eval, "--model_name_or_path", other, "--attack_dirs", out, tmp_path / "labels",
             "--output_dir", tmp_path / "eval")  # fmt: skip


def edit(path, key, value):
    path.write_text(json.dumps(read(path) | {key: value}))


def test_evaluation_refuses_unfinished_other_and_damaged_attacks(trained, text_files, attacks, tmp_path, tiny_model):
    def evaluate(*folders, model=trained, module=attack_eval, more=()):
        call(module, "--model_name_or_path", model, "--attack_dirs", *folders, "--output_dir", tmp_path, *more)

    with pytest.raises(FileNotFoundError, match="the attack is not finished"):
        evaluate(tmp_path)
    with pytest.raises(ValueError, match="a second attack at W8A8KV8"):
        evaluate(attacks / "8", attacks / "8")
    with pytest.raises(ValueError, match="--best_of 6: .* holds 5 samples"):
        evaluate(attacks / "8", more=["--best_of", "6"])
    with pytest.raises(ValueError, match="not a classifier of text_classification.py"):
        evaluate(attacks / "8", model=tiny_model)
    with pytest.raises(ValueError, match="--precision_set 4: needs at least two"):
        evaluate(attacks / "8", module=rpi, more=["--precision_set", "4"])
    with pytest.raises(ValueError, match="--bitsandbytes int3: allowed are 8bit, nf4"):
        evaluate(attacks / "8", module=rpi, more=["--bitsandbytes", "int3"])
    attack(trained, text_files, tmp_path / "other", "--start_index", "3", "--num_iters", "0")
    with pytest.raises(ValueError, match="attacked other texts"):
        evaluate(attacks / "8", tmp_path / "other")
    for damage in damages((tmp_path / "other" / "adversarial.json").read_bytes()):
        (tmp_path / "other" / "adversarial.json").write_bytes(damage)
        with pytest.raises(ValueError, match="adversarial.json: damaged .*; run the attack again"):
            evaluate(tmp_path / "other")


# ---- the rotated quantizer


ROTATED = ("--quantizer", "rotated", "--calibration_samples", "32")


def classify(model, output, *flags):
    """The record of a run of text_classification.py."""
    call(text_classification, "--model_name_or_path", model, "--output_dir", output, *SMALL, *flags)
    return read(output / "record.json")


@pytest.mark.parametrize("quantizer", ["minmax", "rotated"])
def test_a_model_whose_weights_trained_at_4_bits_comes_back_with_the_same_logits(
    quantizer, tiny_model, text_files, tmp_path, monkeypatch
):
    models, original = [], text_classification.run

    def run(trainer, *rest):
        models.append(trainer.model)
        return original(trainer, *rest)

    monkeypatch.setattr(text_classification, "run", run)
    flags = ["--do_train", "--bit_widths", "4", "--train_all_weights", "--max_steps", "3", "--learning_rate", "1e-3"]
    classify(tiny_model, tmp_path, *text_files, *flags, *ROTATED[:1], quantizer, *ROTATED[2:])
    again = text_classification.QuantGPT2ForSequenceClassification.from_pretrained(str(tmp_path))
    assert again.config.trained_weights and again.config.quantizer == quantizer
    assert (again.rotations() is not None) == (quantizer == "rotated")
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = models[0].eval()(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, expected)
        assert torch.equal(models[0].requires_grad_(False)(input_ids=ids).logits, expected)
    more = ["--do_train", "--max_steps", "1", "--bit_config", "32", "--train_all_weights"]
    classify(tmp_path, tmp_path / "float", *text_files, *more)
    assert not read(tmp_path / "float" / "config.json")["trained_weights"]


def test_weights_of_random_precision_training_are_trained_though_one_width_is_float(tiny_model, text_files, tmp_path):
    flags = ["--random_precision_training", "--bit_widths", "4", "32", "--train_all_weights", "--max_steps", "1"]
    classify(tiny_model, tmp_path, *text_files, "--do_train", *flags)
    assert read(tmp_path / "config.json")["trained_weights"]


def test_rotated_training_is_recorded_and_resumes_with_its_rotation(tiny_model, text_files, tmp_path, monkeypatch):
    saving = ["--save_strategy", "steps", "--save_steps", "2", *ROTATED]
    whole = rpt(tiny_model, text_files, tmp_path / "whole", 4, *saving)
    found = read(tmp_path / "whole" / "record.json")["bit_config"]
    assert (found["quantizer"], found["checkpoint_quantizer"], found["calibration_windows"]) == (
        "rotated",
        "minmax",
        32,
    )
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-4")
    (tmp_path / "killed" / "model.safetensors").unlink()
    monkeypatch.setattr(classifier, "calibration_texts", None)  # the checkpoint has a rotation
    resumed = rpt(tiny_model, text_files, tmp_path / "killed", 4, *saving)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert read(tmp_path / "killed" / "record.json")["bit_config"]["rotation_sha256"] == found["rotation_sha256"]


def test_a_classifier_without_rotation_is_calibrated_on_training_texts(trained, text_files, tmp_path):
    evaluation = [*text_files[2:], "--do_eval", "--bit_config", "4"]
    record = classify(trained, tmp_path / "r", *evaluation, *text_files[:2], *ROTATED)
    assert (record["bit_config"]["quantizer"], record["bit_config"]["checkpoint_quantizer"]) == ("rotated", "minmax")
    plain = classify(trained, tmp_path / "m", *evaluation)
    assert plain["bit_config"]["quantizer"] == "minmax" and "rotation_sha256" not in plain["bit_config"]
    assert plain["metrics"]["eval_loss"] != record["metrics"]["eval_loss"]
    with pytest.raises(ValueError, match="no rotation, and it is calibrated on training texts: pass --train_file or"):
        classify(trained, tmp_path / "r", *evaluation, *ROTATED)
    with pytest.raises(ValueError, match="--calibration_samples 65: allowed are up to 64, the training texts"):
        classify(trained, tmp_path / "r", *evaluation, *text_files[:2], *ROTATED, "--calibration_samples", "65")


FAST = ("--num_iters", "2", "--attack_bits", "4")


@pytest.fixture(scope="module")
def rotated_attack(trained, text_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rotated") / "attack"
    attack(trained, text_files, folder, *FAST, *ROTATED)
    return folder


def test_attacks_on_the_rotated_quantizer_keep_their_rotation_for_the_evaluation(
    trained, rotated_attack, text_files, attacks, tmp_path, caplog
):
    about = read(rotated_attack / "record.json")["bit_config"]
    own = {"quantizer": "rotated", "checkpoint_quantizer": "minmax", "rotation_sha256": about["rotation_sha256"]}
    for module in (attack_eval, rpi):
        folder = tmp_path / module.__name__
        words = ["--model_name_or_path", trained, "--output_dir", folder]
        call(module, *words, "--attack_dirs", rotated_attack, "--quantizer", "rotated")
        found = read(folder / "record.json")["bit_config"]
        assert {key: found[key] for key in own} == own
        assert "Quantizer: rotated (the checkpoint has minmax)." in (folder / "table.md").read_text()
        assert "transfer" not in caplog.text
        with pytest.raises(ValueError, match=r"attack: attacked the rotated quantizer, .* has minmax \(--quantizer\)"):
            call(module, *words, "--attack_dirs", rotated_attack)
        with pytest.raises(ValueError, match="8: attacked the minmax quantizer, this evaluation has rotated"):
            call(module, *words, "--attack_dirs", rotated_attack, attacks / "8", "--quantizer", "rotated")
        with pytest.raises(ValueError, match="8 no rotation.safetensors: attack with --quantizer rotated first"):
            call(module, *words, "--attack_dirs", attacks / "8", "--quantizer", "rotated")
    other = tmp_path / "other"
    attack(trained, text_files, other, *FAST[:2], "--attack_bits", "8", *ROTATED, "--seed", "1")
    with pytest.raises(ValueError, match="other: attacked another classifier or rotation than this one with .*attack"):
        call(attack_eval, *words, "--attack_dirs", rotated_attack, other, "--quantizer", "rotated")


def test_columns_of_bitsandbytes_do_not_depend_on_the_quantizer(trained, rotated_attack, text_files, tmp_path):
    attack(trained, text_files, tmp_path / "attack", *FAST)
    cells = []
    for folder, quantizer in ((rotated_attack, "rotated"), (tmp_path / "attack", "minmax")):
        call(rpi, "--model_name_or_path", trained, "--attack_dirs", folder, "--quantizer", quantizer,
             "--bitsandbytes", "nf4", "--output_dir", tmp_path / quantizer)  # fmt: skip
        matrix = read(tmp_path / quantizer / "record.json")["matrices"]["single sample"]
        cells.append({row: list(matrix[row].values())[-1] for row in ("no attack", "initial Theta")})
    assert cells[0] == cells[1]


def test_a_resumed_attack_goes_on_with_its_rotation(trained, rotated_attack, text_files, tmp_path, monkeypatch):
    killed = tmp_path / "killed"
    shutil.copytree(rotated_attack, killed)
    (killed / "adversarial.json").unlink()
    (killed / "parts" / "00001.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(whitebox_attack, "calibration_texts", None)
        whole = read(rotated_attack / "adversarial.json")
        assert attack(trained, text_files, killed, *FAST, *ROTATED) == whole
    with pytest.raises(ValueError, match=r"other settings \(calibration_samples: 32 then, 16 now\)"):
        attack(trained, text_files, killed, *FAST, *ROTATED, "--calibration_samples", "16")
    with pytest.raises(ValueError, match="other settings .*quantizer: 'rotated' then, 'minmax' now"):
        attack(trained, text_files, killed, *FAST)
    (killed / "rotation.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="killed/rotation.safetensors: .*with --overwrite_output_dir"):
        attack(trained, text_files, killed, *FAST, *ROTATED)
    assert attack(trained, text_files, killed, *FAST, *ROTATED, "--overwrite_output_dir") == whole


# ---- numbers by hand


def test_published_transfer_matrix_has_the_published_means():
    """Double-Win Quant, CIFAR-10, PGD-7 at 4 bits: inference bits 3 to 8 in rows, attack bits in columns."""
    matrix = [
        [24.4, 54.3, 54.2, 53.8, 53.9, 54.1], [77.1, 46.9, 64.4, 64.8, 64.2, 64.3],
        [76.3, 62.6, 48.7, 58.6, 58.0, 57.9], [76.4, 62.2, 59.1, 50.0, 55.2, 54.8],
        [76.2, 62.4, 59.0, 55.7, 50.7, 53.4], [76.3, 62.3, 58.9, 55.8, 53.6, 51.1],
    ]  # fmt: skip
    summary = rpi.matrix_summary(matrix)
    assert [round(summary[f"mean_{key}"], 2) for key in ("all", "diagonal", "off_diagonal")] == [58.66, 45.3, 61.33]
    with pytest.raises(ValueError, match="rows and columns must be the same precisions"):
        rpi.matrix_summary(matrix[:3])


def test_random_precision_by_hand():
    # text 0 right at the first precision only, text 1 always, text 2 never
    correct = np.array([[[True], [True], [False]], [[False], [True], [False]]])
    result = rpi.random_precision(correct, np.array([[True], [True], [True]]), 400, seed=1)
    assert result["expected"] == pytest.approx(50)
    assert result["mean"] == pytest.approx(50, abs=2.5)
    assert (result["low"], result["high"]) == pytest.approx((100 / 3, 200 / 3))
    assert result["repeated_queries"]["correct"] == 1
    assert result["mcnemar"]["only_random_right"] == 0 and result["mcnemar"]["only_full_precision_right"] in (1, 2)
    assert result == rpi.random_precision(correct, np.array([[True], [True], [True]]), 400, seed=1)
    two = np.repeat(correct, 2, axis=2)  # two queries a text, each with a draw of its own: (1/4 + 1 + 0) / 3
    assert rpi.random_precision(two, None, 400, seed=1)["best_of_n_mean"] == pytest.approx(100 * 1.25 / 3, abs=2.5)


def test_accuracies_count_clean_errors_as_broken_or_leave_them_out():
    correct = np.array([[True, False], [True, True], [True, True], [False, True]])
    result = adversarial_texts.accuracies(correct, np.array([True, True, False, True]))
    assert {key: (row["correct"], row["n"]) for key, row in result.items()} == {
        "single": (2, 4), "single_clean_right": (2, 3), "best_of_n": (1, 4), "best_of_n_clean_right": (1, 3)
    }  # fmt: skip


def test_wilson_interval_and_mcnemar_by_hand():
    row = classifier.accuracy_row([True] * 3 + [False] * 97)
    centre, half = (3 + 1.96**2 / 2) / (100 + 1.96**2), 1.96 / (100 + 1.96**2) * (3 * 0.97 + 1.96**2 / 4) ** 0.5
    assert row["interval"] == pytest.approx([100 * (centre - half), 100 * (centre + half)], abs=0.01)
    assert mcnemar([1, 1, 1, 1, 0], [0, 0, 0, 1, 0]) == pytest.approx(2 / 2**3)


def test_edit_distance():
    assert adversarial_texts.edit_distance("kitten", "sitting") == 3
    assert adversarial_texts.edit_distance([], [1, 2]) == 2 and adversarial_texts.edit_distance([1], [1]) == 0


# ---- random precision training


def test_width_of_a_step_is_a_function_of_seed_and_step():
    widths = [text_classification.width_for_step(step, 42, [8, 4]) for step in range(200)]
    assert widths == [text_classification.width_for_step(step, 42, [4, 8]) for step in range(200)]
    assert widths != [text_classification.width_for_step(step, 43, [4, 8]) for step in range(200)]
    assert 70 < widths.count(4) < 130


def rpt(tiny_model, text_files, output, steps, *flags):
    flags = ["--do_train", "--bit_widths", 4, 8, "--random_precision_training", "--learning_rate", "1e-2",
             "--lr_scheduler_type", "constant", "--max_steps", steps, *SMALL, *flags]  # fmt: skip
    call(text_classification, "--model_name_or_path", tiny_model, *text_files, "--output_dir", output, *flags)
    return load_file(output / "model.safetensors")


def test_random_precision_training_moves_the_adapter_of_the_drawn_width_and_resumes_exactly(
    tiny_model, text_files, tmp_path
):
    saving = ["--save_strategy", "steps", "--save_steps", "2", "--do_eval"]
    whole = rpt(tiny_model, text_files, tmp_path / "whole", 5, *saving)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    saved = [read(path)["bit_config"] for path in sorted((tmp_path / "whole").glob("checkpoint-*/config.json"))]
    assert saved and all(bits["w_bits"] == 8 for config in saved for bits in config.values())
    resumed = rpt(tiny_model, text_files, tmp_path / "resumed", 5, *saving, "--resume_from_checkpoint", checkpoint)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    metrics = read(tmp_path / "whole" / "record.json")["metrics"]
    assert {"eval_4bit_accuracy", "eval_8bit_accuracy"} <= set(metrics)

    single = rpt(tiny_model, text_files, tmp_path / "single", 1)
    drawn = str(text_classification.width_for_step(0, 42, [4, 8]))
    for name, value in single.items():
        if ".lora_B." in name:
            assert bool(value.any()) == (name.split(".")[-2] == drawn), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bit_widths", "4", "8"], "need --random_precision_training"),
        (["--random_precision_training", "--bit_widths", "4"], "at least two different ones"),
        (["--bit_widths", "4", "--bit_config", "W4A8"], "both say the bits"),
        (["--add_lora", "--train_all_weights"], "contradict"),
        (["--train_file", "missing.jsonl"], "missing.jsonl: no such file"),
    ],
)
def test_training_refuses(tiny_model, text_files, tmp_path, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        call(text_classification, "--model_name_or_path", tiny_model, *text_files, "--do_train",
             "--output_dir", tmp_path / "out", *SMALL, *flags)  # fmt: skip


# ---- data


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x", "label": 0}\n{"text": "y"}\n', r'a.jsonl, line 2: no "label"; found text'),
        ("a.jsonl", '{"text": "", "label": 0}\n', r'line 1: "text" = "": allowed is a text'),
        ("a.jsonl", '{"text": "x", "label": -1}\n', r'line 1: "label" = -1: allowed are the integers'),
        ("a.jsonl", '{"text": "x", "label": 0.5}\n', r'"label" = 0.5: allowed are the integers'),
        ("a.jsonl", '{"text": "x", "label": true}\n', r'"label" = true: allowed are the integers'),
        ("a.jsonl", '{"text": "x", "label": 0}\n{"text"\n', r"a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", "[1]\n", r"line 1: want an object with text and label, found list"),
        ("a.jsonl", "\n", r"a.jsonl: no rows in it"),
        ("a.csv", "text,class\nx,0\n", r'a.csv, line 2: no "label"; found text, class'),
        ("a.csv", "text,label\nx,positive\n", r'"label" = "positive": allowed are the integers'),
        ("a.jsonl", '{"text": "a\\ud800", "label": 0}\n', r'line 1: "text" = "a.ud800": allowed is a text'),
        ("a.jsonl", '{"text": ' + "[" * 100_000 + "\n", r"line 1: not valid JSON .nested too deeply"),
        ("a.jsonl", '{"text": "x", "label": ' + "9" * 5000 + "}\n", r"line 1: not valid JSON"),
        ("a.jsonl", '{"text": "x", "label": ' + "[" * 900 + "]" * 900 + "}\n", r'"label" = \[\[.*\.\.\.: allowed'),
        ("a.jsonl", '{"text": "x", "label": 0, "label": 1}\n', r'line 1: duplicate key "label"'),
        ("a.jsonl", '{"text": "x", "label": NaN}\n', "NaN is no number"),
        ("a.csv", "text,label\nx,٤\n", r'"label" = ".*": allowed are the integers'),
        ("a.csv", "text,label\nx," + "9" * 5000 + "\n", r'"label" = "9+\.\.\.: allowed are the integers'),
        ("a.csv", "label,text\n1,hello, world\n", r'line 2: more fields than the header names, from " world" on'),
        ("a.txt", "x", r"a.txt: allowed are .jsonl, .json, .csv"),
    ],
)
def test_data_faults_name_file_line_and_key(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        text_data.read_text_file(str(tmp_path / name))


def test_csv_and_json_lines_give_the_same_rows(tmp_path):
    rows = [{"text": 'with "quotes", commas\nand a line', "label": 1}, {"text": "plain", "label": 0}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    assert text_data.read_text_file(str(tmp_path / "a.csv")) == rows
    assert text_data.read_text_file(str(tmp_path / "a.jsonl")) == rows


def test_byte_order_mark_is_no_part_of_the_data(tmp_path):
    for name, content in (("a.jsonl", '{"text": "x", "label": 0}\n'), ("a.csv", "text,label\nx,0\n")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert text_data.read_text_file(str(tmp_path / name)) == [{"text": "x", "label": 0}]


def test_hub_texts_pass_the_checks_of_files(tmp_path):
    def load(rows, features=None):
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
        make = datasets.Dataset.from_dict if isinstance(rows, dict) else datasets.Dataset.from_list
        make(rows, features=features).to_parquet(tmp_path / "hub" / "train.parquet")
        options = {"files": {}, "splits": ["train"], "cache_dir": str(tmp_path / "cache")}
        return text_data.load_texts(dataset_name=str(tmp_path / "hub"), **options)["train"]

    classes = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"text": "x", "label": 1}, {"text": "y", "label": 0}]
    assert load(rows, classes) == rows == load(rows)
    for bad, message in (
        ({"text": " ", "label": 0}, r'train row 2: "text" = " "'),
        ({"text": "x", "label": -1}, r'train row 2: "label" = -1'),
        ({"text": None, "label": 0}, r'train row 2: no "text"'),
    ):
        with pytest.raises(ValueError, match=message):
            load([*rows, bad])
    with pytest.raises(ValueError, match="cannot be read"):
        load({"text": [], "label": []})


def test_labels_must_be_complete_and_known():
    for label in (2, 10**9, 10**30):
        with pytest.raises(ValueError, match="the labels must be 0 to K-1"):
            text_data.number_of_classes([{"label": 0}, {"label": 1}, {"label": label + 1}], "train.jsonl")
    with pytest.raises(ValueError, match="labels .0, 2.: the labels must be 0 to K-1"):
        text_data.number_of_classes([{"label": 0}, {"label": 2}], "train.jsonl")
    with pytest.raises(ValueError, match="test.jsonl, row 2: label 2: the classifier has 0 to 1"):
        text_data.check_labels([{"label": 1}, {"label": 2}], 2, "test.jsonl")


# ---- shell scripts and the quick start's data


def test_shell_scripts_run_from_anywhere_and_pass_flags_last(python_stub):
    environment, calls = python_stub
    data = {"TRAIN_FILE": "my train.jsonl", "VALIDATION_FILE": "v.jsonl", "NPROC_PER_NODE": "1"}
    environment |= data | {"MODEL": "m"}

    def words(script, *flags, **more):
        command = ["bash", str(ROOT / "adv_attack" / script), *flags]
        subprocess.run(command, cwd="/", env=environment | more, check=True)
        return calls()[-1]

    types = (text_classification.ModelArguments, text_classification.TrainingTextArguments)
    train = words("train.sh", "--max_seq_length", "9")
    parser = HfArgumentParser([*types, text_classification.TrainingArguments])
    _, texts, _ = parser.parse_args_into_dataclasses(train[train.index("--model_name_or_path") :])
    assert texts.train_file == "my train.jsonl" and texts.max_seq_length == 9

    found = words("attack.sh", "--attack_bits", "eot", "--num_samples", "7")
    types = (attack_setup.ClassifierArguments, text_classification.TextArguments, whitebox_attack.AttackArguments)
    parser = HfArgumentParser(types)
    _, _, args = parser.parse_args_into_dataclasses(found[1:])
    assert args.attack_bits == "eot" and args.num_samples == 7 and args.output_dir.endswith("results/attack_eot")
    assert words("attack.sh", ATTACK_BITS="x/mine.json")[-1].endswith("results/attack_mine")

    found = words("eval.sh", "--repetitions", "3", ATTACK_DIRS="a b")
    at = found.index(str(ROOT / "adv_attack" / "random_precision_inference.py"))
    parser = HfArgumentParser((attack_setup.ClassifierArguments, rpi.RandomPrecisionArguments))
    _, args = parser.parse_args_into_dataclasses(found[at + 1 :])
    assert args.attack_dirs == ["a", "b"] and args.repetitions == 3


def test_topics_are_the_same_every_time_and_share_no_name(tmp_path):
    for name in ("one", "two"):
        command = [sys.executable, ROOT / "quickstart" / "make_topics.py", "--output_dir", tmp_path / name]
        subprocess.run([*map(str, command), "--train_texts", "90", "--test_texts", "30"], check=True)
    for file in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    train, test = (text_data.read_text_file(str(tmp_path / "one" / file)) for file in ("train.jsonl", "test.jsonl"))
    assert text_data.number_of_classes(train, "train") == 3 and len(train) == 90 and len(test) == 30
    seen = " ".join(row["text"] for row in train)
    first = [
        " ".join(row["text"].split()[:2]) for row in test if not row["text"].startswith(("This", "Here", "The", "A f"))
    ]
    assert first and not any(name in seen for name in first)


def test_evaluation_sees_the_weights_that_the_fused_optimizer_left(text_files, tiny_model, tmp_path):
    flags = [*SMALL, *text_files, "--model_name_or_path", tiny_model, "--output_dir", tmp_path, "--do_train"]
    flags += ["--bit_widths", "4", "--train_all_weights", "--eval_on_start", "True", "--eval_strategy", "steps"]
    call(
        text_classification, *flags, "--do_eval", "--eval_steps", "20", "--max_steps", "20", "--learning_rate", "3e-3"
    )
    history = read(tmp_path / "trainer_state.json")["log_history"]
    before, after = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    metrics = read(tmp_path / "record.json")["metrics"]
    assert after < before and metrics["eval_loss"] == pytest.approx(after, rel=1e-6)
    evaluation = [
        *SMALL,
        *text_files,
        "--model_name_or_path",
        tmp_path,
        "--output_dir",
        tmp_path / "again",
        "--do_eval",
    ]
    call(text_classification, *evaluation)
    again = read(tmp_path / "again" / "record.json")["metrics"]
    assert again["eval_loss"] == pytest.approx(after, rel=1e-4)
