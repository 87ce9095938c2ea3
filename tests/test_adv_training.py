"""Adversarial training and PGD matrices: the attack by hand and on tiny models, training, resuming, statistics."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from conftest import ROOT, experiment, parse_flags
from test_adv_attack import SMALL, call, make_rows, read

with experiment("adv_attack"):
    import adversarial_training
    import embedding_pgd
    import pgd_matrix
    import pgd_report
    import pgd_tasks
    from models.execution import Execution


# ---- PGD by hand


class Linear(torch.nn.Module):
    """A model that sees nothing but its embeddings; its config is the factor of its output."""

    def __init__(self):
        super().__init__()
        self.transformer = torch.nn.Module()
        self.transformer.wte = torch.nn.Embedding(3, 2)
        self.transformer.wte.weight.data = torch.tensor([[3.0, 4.0], [0.0, 5.0], [5.0, 0.0]])  # all of norm 5
        self.execution, self.factor, self.seen = Execution(), torch.tensor([1.0, 0.0]), []

    def at_bits(self, config):
        self.factor = torch.tensor(config)
        return embedding_pgd.contextlib.nullcontext()

    def forward(self, ids):
        self.seen.append((self.training, self.transformer.wte.weight.requires_grad, self.execution.kind))
        return self.transformer.wte(ids) @ self.factor


def linear_loss(model, inputs):
    return (model(inputs["input_ids"]) * inputs["weights"]).sum()


INPUTS = {"input_ids": torch.tensor([[0, 1, 2]]), "weights": torch.tensor([[1.0, -2.0, 3.0]])}
FREE = torch.tensor([[True, True, False]])


def start_of(model, seed):
    """Where `pgd` starts: what it returns after no step."""
    return attack_linear(model, 0, [[1.0, 0.0]], seed=seed)


def attack_linear(model, steps, configs, seed=0, step_size=0.02, radius=0.1):
    ball = {"steps": steps, "step_size": step_size, "radius": radius, "free": FREE}
    return embedding_pgd.pgd(
        model, INPUTS, linear_loss, configs, **ball, generator=torch.Generator().manual_seed(seed)
    )


def test_one_step_is_the_one_computed_by_hand():
    """Gradient of token t: weight_t * factor; a step is 0.02 * 5 = 0.1 long, the ball 0.1 * 5 = 0.5."""
    for seed in range(5):
        model = Linear()
        start = start_of(model, seed)
        found = attack_linear(model, 1, [[0.6, 0.8]], seed=seed)
        by_hand = start + 0.1 * torch.tensor([[[0.6, 0.8], [-0.6, -0.8], [0.0, 0.0]]])
        norms = by_hand.norm(dim=-1, keepdim=True)
        by_hand = torch.where(norms > 0.5, by_hand / norms * 0.5, by_hand)
        torch.testing.assert_close(found, by_hand)
        # EOT: the mean of (1, 0) and (0, 1) points to (0.5, 0.5)
        eot = attack_linear(model, 40, [[1.0, 0.0], [0.0, 1.0]], seed=seed)
        corner = 0.5 * 0.5**0.5
        expected = torch.tensor([[[corner, corner], [-corner, -corner], [0.0, 0.0]]])
        torch.testing.assert_close(eot, expected, atol=0.02, rtol=0)


def test_the_radius_is_in_units_of_the_mean_embedding_norm():
    for factor in (1.0, 10.0):
        model = Linear()
        model.transformer.wte.weight.data *= factor
        found = attack_linear(model, 30, [[1.0, 0.0]])
        torch.testing.assert_close(found.norm(dim=-1), factor * 0.5 * FREE.float())
        control = embedding_pgd.random_delta(model, 0.1, FREE, torch.Generator().manual_seed(0))
        torch.testing.assert_close(control.norm(dim=-1), factor * 0.5 * FREE.float())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = Linear().train()
    model.execution.kind = "integer"
    loss = linear_loss if not fails else lambda model, inputs: 1 / 0
    ball = {"steps": 2, "step_size": 0.02, "radius": 0.1, "free": FREE, "generator": torch.Generator()}
    if fails:
        with pytest.raises(ZeroDivisionError):
            embedding_pgd.pgd(model, INPUTS, loss, [[1.0, 0.0]], **ball)
    else:
        with torch.no_grad():
            embedding_pgd.pgd(model, INPUTS, loss, [[1.0, 0.0]], **ball)
        assert model.seen == [(False, False, "fake")] * 2
    weight = model.transformer.wte.weight
    assert model.training and model.execution.kind == "integer" and weight.requires_grad and weight.grad is None
    assert not model.transformer.wte._forward_hooks


# ---- PGD on the model


@pytest.fixture(scope="module")
def text_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, count in (("train", 64), ("test", 24)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, make_rows(count, name))))
    return ["--train_file", str(folder / "train.jsonl"), "--validation_file", str(folder / "test.jsonl")]


def train_texts(tiny_model, text_files, out, *flags, steps=40):
    words = ["--task", "classification", "--model_name_or_path", tiny_model, *text_files, "--output_dir", out]
    words += ["--do_train", "--max_steps", steps, "--learning_rate", "1e-2", "--lr_scheduler_type", "constant"]
    words += ["--per_device_train_batch_size", "16", "--max_seq_length", "24", "--precision_set", "4", "8"]
    call(adversarial_training, *words, *SMALL, *flags)
    return out


def train_questions(qa_words, out, *flags, **options):
    more = ["--precision_set", 4, 8, "--radius", 0.3, "--pgd_steps", 1, *flags]
    call(adversarial_training, "--task", "qa", *qa_words(*more, out=out, **options))
    return out


@pytest.fixture(scope="module")
def learned(tiny_model, text_files, tmp_path_factory):
    """A classifier that was trained on clean texts: under attack from the start it would stay at chance."""
    return train_texts(tiny_model, text_files, tmp_path_factory.mktemp("learned"), "--pgd_steps", 0)


@pytest.fixture(scope="module")
def control(learned, text_files, tmp_path_factory):
    """The same after more clean steps."""
    flags = ("--pgd_steps", 0, "--learning_rate", "3e-3", "--do_eval")
    return train_texts(learned, text_files, tmp_path_factory.mktemp("control"), *flags)


@pytest.fixture(scope="module")
def questions(qa_words, tmp_path_factory):
    """A question answering model after two adversarial steps."""
    return train_questions(qa_words, tmp_path_factory.mktemp("questions"))


def load(module_class, folder):
    return module_class.from_pretrained(str(folder)).requires_grad_(False).eval()


def test_an_attack_beats_a_random_perturbation_and_moves_only_what_may_move(control):
    model = load(pgd_tasks.QuantGPT2ForSequenceClassification, control)
    model.set_execution("integer")
    tokenizer = AutoTokenizer.from_pretrained(control)
    rows = make_rows(12, "attacked")
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    inputs = {**batch, "labels": torch.tensor([row["label"] for row in rows])}
    inputs["input_ids"][:, -3:], inputs["attention_mask"][:, -3:] = tokenizer.eos_token_id, 0
    free, before = pgd_tasks.free_text_tokens(inputs), model.config.bit_config
    ball = {"steps": 5, "step_size": 0.05, "radius": 0.2, "free": free}

    def loss(delta, bits):
        with torch.no_grad(), model.at_bits(bits), embedding_pgd.perturbed(model, delta):
            return pgd_tasks.text_loss(model, inputs).item()

    control_delta = embedding_pgd.random_delta(model, 0.2, free, torch.Generator().manual_seed(1))
    for attacked in (["4"], ["8"], ["32"], ["4", "8"]):
        generator = torch.Generator().manual_seed(1)
        delta = embedding_pgd.pgd(model, inputs, pgd_tasks.text_loss, attacked, **ball, generator=generator)
        norms, unit = delta.norm(dim=-1), embedding_pgd.length_unit(model)
        assert norms.max() <= 0.2 * unit * 1.0001 and (norms[free] > 0).all()
        assert not delta[~free].any()
        for bits in attacked:
            assert loss(delta, bits) > 1.5 * loss(control_delta, bits) > 0
    assert model.config.bit_config == before and model.execution.kind == "integer" and not model.training
    again = embedding_pgd.pgd(model, inputs, pgd_tasks.text_loss, attacked, **ball,
                              generator=torch.Generator().manual_seed(1))  # fmt: skip
    assert torch.equal(again, delta)


def test_of_a_window_only_the_question_moves(questions, squad_files):
    model = load(pgd_tasks.QuantGPT2ForQuestionAnswering, questions)
    tokenizer = AutoTokenizer.from_pretrained(questions)
    examples = [row for article in read(squad_files[1])["data"] for row in article["paragraphs"]]
    texts = [(qa["question"], paragraph["context"]) for paragraph in examples for qa in paragraph["qas"]][:4]
    rows = {"id": list("abcd"), "question": ["  " + q for q, _ in texts], "context": [c for _, c in texts]}
    settings = {"max_seq_length": 96, "doc_stride": 16, "separator": "\n"}
    rows["answers"] = [{"text": [c.split()[0]], "answer_start": [0]} for c in rows["context"]]
    windows = adversarial_training.training_windows(rows, tokenizer, **settings)
    for (question, context), ids, number in zip(texts, windows["input_ids"], windows["question_tokens"], strict=True):
        assert tokenizer.decode(ids[:number]) == question and tokenizer.decode(ids[number:]) == "\n" + context
    names = ("input_ids", "attention_mask")
    padded = tokenizer.pad({name: windows[name] for name in names}, return_tensors="pt")
    inputs = {**padded, **{name: torch.tensor(windows[name]) for name in ("start_positions", "end_positions")}}
    inputs["question_tokens"] = torch.tensor(windows["question_tokens"])
    free = pgd_tasks.free_question_tokens(inputs)
    ball = {"steps": 2, "step_size": 0.05, "radius": 0.2, "free": free, "generator": torch.Generator()}
    delta = embedding_pgd.pgd(model, inputs, pgd_tasks.qa_loss, ["8"], **ball)
    assert (delta.norm(dim=-1) > 0).sum(1).tolist() == windows["question_tokens"]
    with embedding_pgd.perturbed(model, delta):  # a token only sees what is before it
        moved = model(**padded).start_logits
    assert not torch.equal(moved, model(**padded).start_logits)


# ---- training


def test_precisions_of_a_step_are_a_function_of_seed_and_step():
    names = ["W8A8KV8", "W4A4KV4", "W6A6KV6"]
    other = [adversarial_training.precisions_of_step(step, 1, names, "other") for step in range(300)]
    assert other == [adversarial_training.precisions_of_step(step, 1, names[::-1], "other") for step in range(300)]
    assert len(set(other)) == 6 and all(update != attack for update, attack in other)
    same = [adversarial_training.precisions_of_step(step, 1, names, "same") for step in range(300)]
    assert all(update == attack for update, attack in same) and len(set(same)) == 3
    assert other != [adversarial_training.precisions_of_step(step, 2, names, "other") for step in range(300)]
    assert adversarial_training.precisions_of_step(3, 1, names[:1], "same") == ("W8A8KV8", "W8A8KV8")


def robust(folder, text_files, out, *flags):
    """Record of a small matrix of a classifier."""
    words = ["--task", "classification", "--model_name_or_path", folder, *text_files, "--output_dir", out]
    words += ["--max_seq_length", 24, "--precision_set", 4, 8, "--radius", 0.3, "--attack_steps", 5]
    call(pgd_matrix, *words, "--num_samples", 24, "--batch_size", 10, "--repetitions", 5, *flags)
    return read(out / "record.json")


@pytest.fixture(scope="module")
def control_matrix(control, text_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("control_matrix")
    return robust(control, text_files, out), out


def test_adversarial_training_keeps_more_accuracy_under_attack(learned, text_files, control, control_matrix, tmp_path):
    attacked = ("--radius", 0.3, "--step_size", 0.15, "--pgd_steps", 2, "--learning_rate", "3e-3", "--do_eval")
    trained = train_texts(learned, text_files, tmp_path / "trained", *attacked)
    metrics = read(trained / "record.json")["metrics"]
    assert {"eval_accuracy_W8A8KV8", "eval_accuracy_W4A4KV4", "eval_loss_W4A4KV4"} <= set(metrics)
    assert read(trained / "record.json")["adversarial"]["attack_precision"] == "other"
    assert read(control / "record.json")["metrics"]["eval_accuracy_W8A8KV8"] >= 90
    matrix = robust(trained, text_files, tmp_path / "matrix")["matrix"]
    eot = "eot(W4A4KV4+W8A8KV8)"
    for column in ("W4A4KV4", "W8A8KV8", "W32A32KV32"):
        before, after = (found[eot][column]["all"]["accuracy"] for found in (control_matrix[0]["matrix"], matrix))
        assert after > before + 20, (column, before, after)


def test_what_is_not_attacked_trains_as_without_the_script(tiny_model, text_files, tmp_path, monkeypatch):
    monkeypatch.setattr(adversarial_training, "pgd", None)
    out = train_texts(tiny_model, text_files, tmp_path, "--pgd_steps", 0, "--precision_set", 8, steps=2)
    args = read(out / "record.json")["adversarial"]
    assert args["pgd_steps"] == 0 and args["attack_precision"] == "same"
    config = read(out / "config.json")
    assert config["lora_bank"] == ["shared"] and config["trained_bit_configs"] == ["W8A8KV8"]


def test_all_weights_train_at_the_drawn_precisions(tiny_model, text_files, tmp_path, monkeypatch):
    attack, stop, seen = adversarial_training.pgd, adversarial_training.ClassificationTrainer.stop_unless_finite, []

    def recorded(model, inputs, loss, configs, **rest):
        seen.append([adversarial_training.short_name(config) for config in configs])
        return attack(model, inputs, loss, configs, **rest)

    def update(trainer, loss):
        seen[-1].insert(0, adversarial_training.short_name(trainer.model.config.bit_config))
        stop(trainer, loss)

    monkeypatch.setattr(adversarial_training, "pgd", recorded)
    monkeypatch.setattr(adversarial_training.ClassificationTrainer, "stop_unless_finite", update)
    flags = ("--train_all_weights", "--pgd_steps", 1, "--learning_rate", "1e-3", "--precision_set", 4, 6, 8)
    out = train_texts(tiny_model, text_files, tmp_path, *flags, steps=3)
    names = ["W4A4KV4", "W6A6KV6", "W8A8KV8"]
    drawn = [adversarial_training.precisions_of_step(step, 42, names, "other") for step in range(3)]
    assert [tuple(pair) for pair in seen] == drawn
    assert read(out / "config.json")["trained_weights"] and not read(out / "config.json")["lora_bank"]
    start, end = load_file(f"{tiny_model}/model.safetensors"), load_file(out / "model.safetensors")
    assert not torch.equal(start["transformer.h.0.mlp.c_fc.weight"].t(), end["transformer.h.0.mlp.c_fc.weight"])


@pytest.mark.parametrize("task", ["classification", "qa"])
def test_a_resumed_training_ends_with_the_same_weights(task, tiny_model, text_files, qa_words, tmp_path):
    saving = ["--save_strategy", "steps", "--save_steps", 2]

    def train(out):
        if task == "qa":
            return train_questions(qa_words, out, *saving, "--max_steps", 3, "--gradient_accumulation_steps", 2)
        return train_texts(tiny_model, text_files, out, *saving, "--pgd_steps", 2, steps=3)

    whole = load_file(train(tmp_path / "whole") / "model.safetensors")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-3")
    (tmp_path / "killed" / "model.safetensors").unlink()
    resumed = load_file(train(tmp_path / "killed") / "model.safetensors")
    assert read(tmp_path / "killed" / "record.json")["continues"].endswith("checkpoint-2")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_questions_are_evaluated_at_every_precision(questions):
    metrics = read(questions / "record.json")["metrics"]
    assert {"eval_f1_W8A8KV8", "eval_f1_W4A4KV4", "eval_exact_match_W4A4KV4"} <= set(metrics)
    assert read(questions / "config.json")["trained_bit_configs"] == ["W8A8KV8", "W4A4KV4"]


# ---- matrix


def without_times(record):
    changing = ("wall_seconds", "peak_memory_bytes", "metrics", "command", "git")
    return {key: value for key, value in record.items() if key not in changing}


def test_the_matrix_and_what_is_made_of_it(control_matrix):
    record, out = control_matrix
    members = ["W4A4KV4", "W8A8KV8"]
    eot = "eot(W4A4KV4+W8A8KV8)"
    matrix, rpi = record["matrix"], record["random_precision"]
    assert list(matrix) == ["no attack", "random delta", "W32A32KV32", *members, eot] == list(rpi)
    assert all(list(row) == ["W32A32KV32", *members] for row in matrix.values())
    for row, cells in matrix.items():
        accuracies = [cells[name]["all"]["accuracy"] for name in members]
        found = rpi[row]
        assert found["expected"] == pytest.approx(np.mean(accuracies))
        assert found["queries"]["20"] <= found["queries"]["2"] <= found["expected"] + 1e-9
        assert found["per_layer"]["draws"] == 3
        assert cells["W8A8KV8"]["clean_right"]["n"] == matrix["no attack"]["W8A8KV8"]["all"]["correct"]
        assert found["best_fixed"] == members[int(np.argmax(accuracies))]
    assert matrix["W8A8KV8"]["W8A8KV8"]["all"]["accuracy"] < matrix["random delta"]["W8A8KV8"]["all"]["accuracy"] - 20
    cells = [[matrix[attack][name]["all"]["accuracy"] for name in members] for attack in members]
    assert record["protection"]["mean_all"] == pytest.approx(np.mean(cells))
    assert record["protection"]["best_fixed"]["accuracy"] == pytest.approx(max(cells[0][0], cells[1][1]))
    table = (out / "table.md").read_text()
    assert "24 texts; accuracy [Wilson 95 %]" in table and f"| {eot}" in table and "minus best fixed: " in table


def test_a_killed_matrix_resumes_to_the_same_record_and_a_finished_one_is_read_again(
    control, text_files, control_matrix, tmp_path, monkeypatch
):
    record, out = control_matrix
    folder = tmp_path / "killed"
    shutil.copytree(out, folder)
    for number in (3, 5):
        (folder / "parts" / f"{number:02d}.json").unlink()
    (folder / "parts" / "02.json").write_text("{")
    (folder / "record.json").unlink()
    original, made = pgd_matrix.Measurement.row, []
    monkeypatch.setattr(pgd_matrix.Measurement, "row", lambda self, name, *rest: made.append(name) or original(
        self, name, *rest))  # fmt: skip
    again = robust(control, text_files, folder)
    assert made == ["W32A32KV32", "W4A4KV4", "eot(W4A4KV4+W8A8KV8)"]
    assert without_times(again) == without_times(record)
    other = robust(control, text_files, folder, "--margin", 90, "--queries", 3)
    assert len(made) == 3 and list(other["random_precision"]["no attack"]["queries"]) == ["3"]
    assert other["protection"]["adaptive_attacker"]["verdict"] == "no effect larger than 90 points"
    with pytest.raises(ValueError, match=r"other settings \(radius: 0.3 then, 0.2 now; step_size"):
        robust(control, text_files, folder, "--radius", 0.2)


def test_a_matrix_of_questions(questions, squad_files, tmp_path):
    words = ["--task", "qa", "--model_name_or_path", questions, "--validation_file", squad_files[1]]
    words += ["--max_seq_length", 96, "--doc_stride", 16, "--precision_set", 4, 8, "--num_samples", 6]
    words += ["--attack_steps", 1, "--layer_draws", 0, "--further_bits", 8, "--output_dir", tmp_path]
    call(pgd_matrix, *words)
    record = read(tmp_path / "record.json")
    cell = record["matrix"]["W4A4KV4"]["W8A8KV8"]
    assert cell["all"]["n"] == 6 and 0 <= cell["all"]["accuracy"] <= cell["f1"] <= 100
    assert record["random_precision"]["no attack"]["per_layer"] is None
    assert record["data"]["attacked"] == {"examples": 6, "left_out": 0}
    assert "6 questions whose context fits one window; exact match" in (tmp_path / "table.md").read_text()
    with pytest.raises(ValueError, match="--version_2_with_negative: attacked are questions that have an answer"):
        call(pgd_matrix, *words, "--version_2_with_negative")
    with pytest.raises(ValueError, match="no context fits one window; allowed are more tokens .--max_seq_length 16."):
        call(pgd_matrix, *words, "--max_seq_length", 16, "--doc_stride", 2)


def test_differences_and_verdicts_by_hand():
    first, second = np.array([1, 1, 1, 0, 1, 0, 1, 1]), np.array([0, 1, 0, 0, 1, 1, 1, 0])
    found = pgd_report.paired_difference(first, second)
    up, down, n = 3 + 1, 1 + 1, 8 + 2  # Bonett-Price: one more for either side, n + 2
    middle, half = (up - down) / n, 1.96 * (((up + down) / n - ((up - down) / n) ** 2) / n) ** 0.5
    assert found["points"] == 25
    assert found["interval"] == pytest.approx([100 * (middle - half), 100 * (middle + half)], abs=0.01)
    same = pgd_report.paired_difference(first, first)
    assert same["points"] == 0 and same["interval"][1] > 20, "eight items without a difference exclude little"
    for interval, said in {
        (-4.9, 4.9): "no effect larger than 5 points", (0.5, 4): "no effect larger than 5 points",
        (0.5, 6): "higher", (-9, -1): "lower", (-6, 2): "not decided",
    }.items():  # fmt: skip
        assert pgd_report.verdict({"interval": interval}, 5.0) == said


def test_random_precision_against_its_attackers_by_hand():
    clean = {"a": [1, 1, 1, 0], "b": [1, 1, 1, 1]}
    tables = {
        "no attack": {"right": clean, "per_layer": [[1, 1, 1, 1], [1, 1, 0, 1]]},
        "a": {"right": {"a": [0, 0, 1, 1], "b": [1, 0, 1, 1]}, "per_layer": [[1, 0, 1, 0], [0, 0, 1, 1]]},
        "b": {"right": {"a": [1, 0, 1, 0], "b": [0, 0, 1, 0]}, "per_layer": [[1, 0, 1, 0], [0, 0, 1, 1]]},
        "eot": {"right": {"a": [0, 0, 1, 0], "b": [0, 0, 0, 1]}, "per_layer": [[1, 0, 1, 0], [0, 0, 1, 1]]},
    }

    class args:
        repetitions, seed, margin, queries = 50, 0, 5.0, [2]

    matrix = pgd_report.transfer_matrix(tables)
    assert matrix["a"]["a"]["all"]["correct"] == 1, "item 3 is wrong without an attack"
    assert (matrix["a"]["a"]["clean_right"]["correct"], matrix["a"]["a"]["clean_right"]["n"]) == (1, 3)
    found = pgd_report.random_inference(tables, "a", ["a", "b"], args)
    # right at (a, b): item 0 (no, yes), item 1 neither, item 2 both, item 3 (no, yes)
    assert found["expected"] == 50 and found["queries"]["2"] == 100 * (0.25 + 0 + 1 + 0.25) / 4
    assert found["best_fixed"] == "b" and found["difference"]["points"] == -25
    assert found["clean_right"] == {"n": 3, "expected": pytest.approx(50)}
    # draws: (1, 0, 1, 0) and (0, 0, 0, 1), where item 2 was wrong without an attack
    assert found["per_layer"]["mean"] == 37.5 and found["per_layer"]["difference"]["points"] == -12.5
    protected = pgd_report.protection(tables, ["a", "b"], "eot", 5.0)
    assert protected["best_fixed"]["name"] == "a" and protected["best_fixed"]["accuracy"] == 25
    assert (protected["mean_all"], protected["mean_diagonal"]) == (43.75, 25)
    assert protected["published_protocol"]["points"] == 18.75 and protected["adaptive_attacker"]["points"] == 0


# ---- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "translation"], "--task translation: allowed are classification, qa"),
        (
            ["--precision_set", "8", "--attack_precision", "other"],
            "other: --precision_set 8 has no other",
        ),
        (["--attack_precision", "both"], "--attack_precision both: allowed are same, other"),
        (["--radius", "0"], "--radius 0.0: must be a number above 0"),
        (["--step_size", "-1"], "--step_size -1.0: must be a number above 0"),
        (["--pgd_steps", "-1"], "--pgd_steps -1: must be 0 or more"),
        (["--precision_set", "8", "W8A8KV8"], "--precision_set 8 W8A8KV8: every precision once"),
        (["--precision_set", "8", "9"], "9 is not a bit-width"),
        (["--do_train", "False"], "nothing to do"),
        (["--do_predict"], "--do_predict: give the data as --validation_file"),
        (
            ["--task", "qa", "--train_all_weights", "--doc_stride", "0"],
            "--train_all_weights: allowed with --task class",
        ),
        (["--model_name_or_path", "LEARNED", "--train_all_weights"], "--train_all_weights: .* has adapters"),
        (["--fsdp", "full_shard"], "--fsdp and --deepspeed shard the model"),
    ],
)
def test_training_refuses(flags, message, tiny_model, learned, text_files, tmp_path):
    flags = [str(learned) if word == "LEARNED" else word for word in flags]
    with pytest.raises(ValueError, match=message):
        train_texts(tiny_model, text_files, tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "x"], "--task x: allowed are classification, qa"),
        (["--precision_set", "8"], "--precision_set 8: needs at least two precisions"),
        (["--precision_set", "8", "W8A8KV8"], "every precision once"),
        (["--radius", "0"], "--radius 0.0: must be a number above 0"),
        (["--attack_steps", "0"], "--attack_steps 0: must be at least 1"),
        (["--num_samples", "0"], "--num_samples 0: must be at least 1"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--repetitions", "1"], "--repetitions 1: at least 2"),
        (["--layer_draws", "-1"], "--layer_draws -1: must be 0 or more"),
        (["--queries", "2", "0"], "--queries 2 0: must be 1 or more each"),
        (["--margin", "0"], "--margin 0.0: must be a number above 0"),
    ],
)
def test_matrix_refuses(flags, message, control, text_files, tmp_path):
    with pytest.raises(ValueError, match=message):
        robust(control, text_files, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_models_and_texts_that_cannot_be_attacked(control, questions, tiny_model, text_files, squad_files, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "A", "label": 0}\n{"text": "B", "label": 1}\n')
    with pytest.raises(ValueError, match="short.jsonl: every text is one token; allowed is two or more"):
        robust(control, ["--validation_file", tmp_path / "short.jsonl"], tmp_path / "out")
    with pytest.raises(ValueError, match="questions.*: weights are missing: score.weight"):
        robust(questions, text_files, tmp_path / "out")
    words = ["--task", "qa", "--validation_file", squad_files[1], "--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match="no question answering model; train one first"):
        call(pgd_matrix, *words, "--model_name_or_path", tiny_model)
    with experiment("switch_precision"):
        import export
    call(export, "--model_name_or_path", questions, "--bit_configs", 4, 8, "--output_dir", tmp_path / "exported")
    exported = ("--model_name_or_path", tmp_path / "exported")
    with pytest.raises(ValueError, match="exported checkpoint, whose integers have no gradients"):
        call(pgd_matrix, *words, *exported)
    with pytest.raises(ValueError, match="exported checkpoint without float weights"):
        call(adversarial_training, *words, *exported, "--train_file", squad_files[0], "--do_train", *SMALL)


# ---- shell script and protocol


def test_the_shell_script_sets_the_defaults_of_the_task(python_stub):
    environment, calls = python_stub
    script = str(ROOT / "adv_attack" / "adv_train.sh")

    def flags_of(*flags, **more):
        subprocess.run(["bash", script, *flags], check=True, env=environment | more, cwd="/")
        words = calls()[-1]
        at = next(index for index, word in enumerate(words) if word.endswith(".py"))
        return parse_flags("adv_attack/adversarial_training.py", words[at + 1 :])

    found = flags_of("--task", "qa", "--precision_set", "8", TRAIN_FILE="t.json", MODEL="m")
    assert (found.task, found.dataset_name, found.train_file, found.doc_stride) == ("qa", "squad", "t.json", 128)
    assert found.precision_set == ["8"] and found.max_steps == 1000 and found.output_dir.endswith("results/adv_qa")
    found = flags_of("--task=classification", "--num_train_epochs", "1", "--do_train", "False")
    assert (found.dataset_name, found.max_steps, found.quantizer) == ("ag_news", -1, None)
    for words in ([], ["--task", "x"]):
        done = subprocess.run(["bash", script, *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and "allowed are classification, qa" in done.stderr


def test_arms_of_the_protocol_differ_in_the_attack_alone(monkeypatch):
    names = {"SMALL_WORK": "my small", "TOPICS": "topics", "VALIDATION_FILE": "dev.json"}
    command = [sys.executable, ROOT / "reproduce" / "run.py", "small_robust", "--dry_run"]
    dry = subprocess.run(command, capture_output=True, text=True, env={**names, "PATH": "/usr/bin:/bin"}, check=True)
    lines = dry.stdout.splitlines()
    assert len([line for line in lines if "records/adv_" in line]) == 45
    for task in ("classification", "qa"):
        found = {}
        for arm in ("plain", "8bit", "rpt"):
            (line,) = [line for line in lines if f"records/adv_{task}_{arm}.json" in line]
            words = line.split("adv_train.sh ")[1].split()
            found[arm] = parse_flags("adv_attack/adversarial_training.py", ["--task", task, *words])
        assert [(args.pgd_steps > 0, args.precision_set) for args in found.values()] == [
            (False, ["8"]), (True, ["8"]), (True, ["4", "5", "6", "7", "8"])
        ]  # fmt: skip
        assert len({(args.model_name_or_path, args.max_steps, args.radius) for args in found.values()}) == 1
    (line,) = [line for line in lines if "records/adv_classification_rpt_same.json" in line]
    words = line.split("adv_train.sh ")[1].split()
    same = parse_flags("adv_attack/adversarial_training.py", ["--task", "classification", *words])
    assert (same.precision_set, same.attack_precision) == (["4", "5", "6", "7", "8"], "same")
