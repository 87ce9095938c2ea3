"""Switchable-precision training: the sampler, the losses against reference values, one step, whole runs."""

import json
import math
import os
import pathlib
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from conftest import ROOT, experiment

with experiment("base_model"):
    import run_qa as base_run_qa
with experiment("switch_precision"):
    import adaptive_lora_trainer as training
    import run_qa
    from common.step_configs import bit_configs_for_step
    from models.bit_config import describe_bit_config, resolve_bit_config
    from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering

LAYERS = {
    f"transformer.h.{block}.{name}": shape
    for block in range(12)
    for name, shape in {
        "attn.c_attn": (2304, 768),
        "attn.c_proj": (768, 768),
        "mlp.c_fc": (3072, 768),
        "mlp.c_proj": (768, 3072),
    }.items()
}


def draw(step, widths=(4, 8), mixed=1, seed=42, **settings):
    return bit_configs_for_step(step, seed, LAYERS, list(widths), mixed, **settings)


def names(passes):
    return [name for name, _ in passes]


def average(config):
    return describe_bit_config(config, LAYERS)["average_w_bits"]


# ---- sampler


def test_sandwich():
    for step in range(20):
        passes = draw(step, (4, 6, 8), mixed=2)
        assert names(passes) == ["W8A8KV8", "mixed", "mixed", "W4A4KV4"]
        bits = [average(config) for _, config in passes]
        assert bits == sorted(bits, reverse=True)
        for _, config in passes:
            assert config == resolve_bit_config(config, LAYERS), "resolved: nothing is missing or added"
            assert all({*layer.values()} == {layer["w_bits"]} for layer in config.values()), "W = A = KV"
            assert all(("kv_bits" in layer) == name.endswith("c_attn") for name, layer in config.items())


def test_sampler_is_a_function_of_seed_and_step():
    sequence = [draw(step) for step in range(30)]
    assert sequence == [draw(step) for step in range(30)]
    assert [draw(step) for step in reversed(range(30))] == sequence[::-1]
    assert len({json.dumps(passes) for passes in sequence}) == 30
    assert draw(3) != draw(3, seed=43)


def test_every_layer_draws_every_width():
    configs = [draw(step, (4, 6, 8))[1][1] for step in range(600)]
    for layer in LAYERS:
        for width in (4, 6, 8):  # 200 +- 11.5
            assert 140 < sum(config[layer]["w_bits"] == width for config in configs) < 260
    different = statistics.mean(a["w_bits"] != b["w_bits"] for c in configs for a, b in [list(c.values())[:2]])
    assert 0.55 < different < 0.78, "layers draw for themselves"


def test_one_width_needs_one_pass():
    assert names(draw(0, (8,), mixed=3)) == ["W8A8KV8"]


def test_no_mixed_configs_and_sampled_widths():
    assert names(draw(0, (2, 4, 5, 6, 8), mixed=0)) == ["W8A8KV8", "W2A2KV2"]
    drawn = [names(draw(step, (2, 4, 5, 6, 8), 0, sample_widths=2)) for step in range(50)]
    assert {len(passes) for passes in drawn} == {4} and all(sorted(p, reverse=True) == p for p in drawn)
    assert {name for passes in drawn for name in passes[1:3]} == {"W6A6KV6", "W5A5KV5", "W4A4KV4"}


def test_teacher_goes_first():
    assert names(draw(0, teacher=True)) == ["W32A32KV32", "W8A8KV8", "mixed", "W4A4KV4"]


def test_random_objective_draws_once():
    drawn = [draw(step, objective="random") for step in range(400)]
    assert {len(passes) for passes in drawn} == {1}
    counts = {name: sum(names(passes) == [name] for passes in drawn) for name in ("mixed", "W8A8KV8", "W4A4KV4")}
    assert 160 < counts["mixed"] < 240 and 70 < counts["W8A8KV8"] < 130 and sum(counts.values()) == 400
    assert {name for step in range(50) for name in names(draw(step, mixed=0, objective="random"))} == {
        "W8A8KV8",
        "W4A4KV4",
    }


@pytest.mark.parametrize(("widths", "steps"), [((4, 8), 10), ((4, 6, 8), 12), ((4, 6, 8), 10)])
def test_sequential_phases(widths, steps):
    phases = [names(draw(step, widths, objective="sequential", total_steps=steps)) for step in range(steps)]
    assert all(len(passes) == 1 for passes in phases)
    order = [f"W{width}A{width}KV{width}" for width in sorted(widths, reverse=True)]
    lengths = [phases.count([name]) for name in order]
    assert phases == [[name] for name, length in zip(order, lengths, strict=True) for _ in range(length)]
    assert max(lengths) - min(lengths) <= 1 and sum(lengths) == steps


def test_curriculum_lets_lower_widths_join():
    lowest = [names(draw(step, (2, 4, 8), 0, curriculum=0.5, total_steps=20))[-1] for step in range(20)]
    assert lowest == ["W8A8KV8"] * 5 + ["W4A4KV4"] * 5 + ["W2A2KV2"] * 10
    _, (_, early), _ = draw(5, (2, 4, 8), 1, curriculum=0.5, total_steps=20)
    assert {layer["w_bits"] for layer in early.values()} == {4, 8}, "mixed configs wait as well"


def test_explicit_configs_replace_the_sampler():
    model_args = run_qa.BankArguments(bit_configs=["W4A8KV8", str(ROOT / "configs/hybrid_25pct_4bit.json"), "W4A4KV4"])
    targets = run_qa.target_configs(model_args, LAYERS)
    assert names(targets) == ["hybrid_25pct_4bit", "W4A8KV8", "W4A4KV4"]
    assert draw(0, explicit=targets) == draw(9, explicit=targets) == targets
    assert names(draw(0, explicit=targets, teacher=True))[0] == "W32A32KV32"
    assert draw(9, explicit=targets, objective="sequential", total_steps=10) == targets[-1:]


# ---- losses


def reference_case(name):
    cases = json.loads((ROOT / "tests" / "reference_cases.json").read_text())["cases"]
    return next(case for case in cases if case["id"] == name)


def test_qa_distillation_by_hand():
    """Two positions, T = 2: p = (3/4, 1/4) from logits (2 ln 3, 0), q = (1/2, 1/2); the third position is padding."""
    teacher, student = torch.tensor([[2 * math.log(3), 0.0, 9.0]]), torch.tensor([[1.0, 1.0, -7.0]])
    mask = torch.tensor([[True, True, False]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = training.qa_distillation_kl(student, student, teacher, student, mask, 2.0)
    assert found.item() == pytest.approx(4 * 0.5 * kl, rel=1e-6)
    assert training.qa_distillation_kl(student, teacher, student, teacher, mask).item() == pytest.approx(0, abs=1e-7)
    mse = training.qa_distillation_mse(student, student, teacher, student, mask)
    assert mse.item() == pytest.approx(0.5 * ((2 * math.log(3) - 1) ** 2 + 1) / 2, rel=1e-6)


def test_qa_distillation_reference_case():
    case = reference_case("k2_qa_kd")
    logits = [torch.tensor(case[key]) for key in ("start_student", "end_student", "start_teacher", "end_teacher")]
    everything = torch.ones(1, 4, dtype=torch.bool)
    for mask, temperature, key in (
        (everything, 1.0, "T1"),
        (everything, 2.0, "T2_with_T2_factor"),
        (torch.tensor([[True, True, True, False]]), 1.0, "T1_masked_last_position"),
    ):
        found = training.qa_distillation_kl(*logits, mask, temperature).item()
        assert found == pytest.approx(case[key], rel=1e-6), key


def test_padding_gets_no_gradient_and_no_mass():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5).requires_grad_(), torch.randn(2, 3, 5)
    mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
    labels = torch.zeros(2, 3, dtype=torch.long)
    for loss in (
        training.qa_distillation_kl(*student, *teacher, mask),
        training.qa_distillation_mse(*student, *teacher, mask),
        training.qa_cross_entropy(student, labels, mask),
    ):
        (grad,) = torch.autograd.grad(loss, student, retain_graph=True)
        assert loss.isfinite() and grad.isfinite().all() and not grad[:, ~mask].any() and grad[:, mask].any()
    unpadded = [training.qa_cross_entropy(student[:, i : i + 1, :n], labels[:, :1], mask[i : i + 1, :n])
                for i, n in enumerate((5, 3, 1))]  # fmt: skip
    assert training.qa_cross_entropy(student, labels, mask).item() == pytest.approx(sum(unpadded).item() / 3)


@pytest.fixture
def cascade(monkeypatch):
    """cascade(logits, labels, weight): the losses of the trainer's own loop, for given logits of its passes."""

    def run(logits, labels, weight=1.0):
        trainer, passes, losses = object.__new__(training.AdaptiveLoRATrainer), iter(logits), []
        trainer.objective = training.ObjectiveArguments(distill_weight=weight)
        trainer.accelerator = types.SimpleNamespace(backward=lambda loss: losses.append(loss * len(logits)))
        monkeypatch.setattr(trainer, "_logits", lambda *_: next(passes), raising=False)
        monkeypatch.setattr(training, "qa_cross_entropy", lambda z, *_: F.cross_entropy(z, labels))
        monkeypatch.setattr(trainer, "_distance", lambda z, teacher, mask: F.mse_loss(z, teacher), raising=False)
        batch = dict.fromkeys(("attention_mask", "start_positions", "end_positions"), torch.zeros(1))
        trainer.joint_losses(None, batch, [("", {})] * len(logits), 1.0)
        return losses

    return run


def test_cascade_distillation_reference_case(cascade):
    case = reference_case("d1_cdt")
    widths = ["32", "8", "4"]
    logits = [torch.tensor(case["logits"][width], requires_grad=True) for width in widths]
    losses = cascade(logits, torch.tensor(case["labels"]))
    for width, loss in zip(widths, losses, strict=True):
        assert loss.item() == pytest.approx(case["loss_per_bit"][width], rel=1e-6)
    assert sum(losses).item() == pytest.approx(case["total_released_sum"], rel=1e-6)
    assert sum(losses).item() / 3 == pytest.approx(case["total_paper_mean"], rel=1e-6)
    sum(losses).backward()
    for width, tensor in zip(widths, logits, strict=True):
        expected = torch.tensor(case["grad_logits_with_stopgrad"][width])
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-5, atol=1e-7)


def test_cascade_by_hand(cascade):
    high, low = torch.tensor([[2.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 0.0]], requires_grad=True)
    losses = cascade([high, low], torch.tensor([0]), weight=0.5)
    assert losses[1].item() == pytest.approx(math.log(2) + 0.5 * 2.0)
    losses[1].backward()
    assert high.grad is None, "the teacher is not dragged to the student"


# ---- runs


@pytest.fixture
def run(qa_words, monkeypatch, tmp_path):
    """run(*flags) calls main() with the tiny model and data; later flags win; returns the run's record."""

    def call(*flags, out="out", **options):
        monkeypatch.setattr(sys, "argv", ["run_qa.py", *qa_words(*flags, out=tmp_path / out, **options)])
        run_qa.main()
        return json.loads((tmp_path / out / "record.json").read_text())

    return call


@pytest.fixture
def make_trainer(run, monkeypatch, tmp_path):
    """make_trainer(*flags): the trainer that main() builds, before it trains."""

    def make(*flags, **options):
        caught = []

        def catch(trainer, *rest):
            caught.append(trainer)
            raise InterruptedError

        with monkeypatch.context() as patch:
            patch.setattr(run_qa.AdaptiveLoRATrainer, "run", catch)
            with pytest.raises(InterruptedError):
                run(*flags, "--overwrite_output_dir", **options)
        trainer = caught[0]
        trainer.create_optimizer()
        trainer.state.max_steps = trainer.args.max_steps
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def assert_equal_weights(folder, other):
    expected, found = weights(folder), weights(other)
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def history(folder):
    return json.loads((pathlib.Path(folder) / "trainer_state.json").read_text())["log_history"]


def first_batch(trainer):
    trainer.args.train_sampling_strategy = "sequential"
    return next(iter(trainer.get_train_dataloader()))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, dict(inputs))
    return loss, gradients(trainer.model)


def adam_gradient(checkpoint):
    """Adam's first moment after one step is 0.1 x the gradient."""
    state = torch.load(os.path.join(checkpoint, "optimizer.pt"), weights_only=True)["state"]
    return torch.cat([state[key]["exp_avg"].flatten() for key in sorted(state)])


@pytest.mark.parametrize(
    ("flags", "evaluated", "passes"),
    [
        ((), ["W8A8KV8", "W4A4KV4"], 6),
        (("--bf16", "--teacher", "--bit_widths", "4", "6", "8"), ["W8A8KV8", "W6A6KV6", "W4A4KV4"], 8),
        (("--objective", "random", "--distill_loss", "mse"), ["W8A8KV8", "W4A4KV4"], 2),
        (("--objective", "sequential"), ["W8A8KV8", "W4A4KV4"], 3),
        (("--bit_configs", "W4A4KV4", str(ROOT / "configs/attn8_mlp4.json")), ["attn8_mlp4", "W4A4KV4"], 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_training_modes(flags, evaluated, passes, run, tmp_path):
    record = run(*flags)
    metrics = record["metrics"]
    for key in ("eval_exact_match", "eval_f1"):
        found = [metrics[f"{key}_{name}"] for name in evaluated]
        assert metrics[key] == pytest.approx(statistics.mean(found))
    assert {key for key in metrics if key.startswith("eval_f1_")} == {f"eval_f1_{name}" for name in evaluated}
    assert record["passes"] == passes and record["steps"] == 2 and list(record["bit_configs"]) == evaluated
    assert record["objective"]["objective"] == ("joint" if "--objective" not in flags else flags[1])
    assert record["bit_config"]["layers"] == record["bit_configs"][evaluated[0]]["layers"], "left at the highest"
    model = QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert model.config.bit_config == record["bit_config"]["layers"]
    assert model.config.trained_bit_configs == (["W4A4KV4"] if "--bit_configs" in flags else None)
    assert "transformer.wte.weight" not in weights(tmp_path / "out")
    if "--bf16" not in flags:
        widths = ("--bit_configs", *flags[1:]) if "--bit_configs" in flags else ()
        again = run(*widths, out="again", model=tmp_path / "out", train=False)
        for name in evaluated:
            file = f"eval_{name}_predictions.json"
            assert (tmp_path / "out" / file).read_text() == (tmp_path / "again" / file).read_text()
        assert again["objective"] is None and again["passes"] == 0


def test_untrained_model_is_the_post_training_quantized_model(make_trainer, tiny_model):
    trainer = make_trainer("--bit_widths", "2", "4", "8")
    inputs = {key: first_batch(trainer)[key] for key in ("input_ids", "attention_mask")}
    stock = QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model)
    stock.qa_outputs.load_state_dict(trainer.model.qa_outputs.state_dict())  # a stock GPT-2 has no such head
    trainer.model.eval()
    passes = trainer.step_configs(0)
    with torch.no_grad():
        for _, config in [*trainer.configs, *passes]:
            trainer.model.set_bit_config(config)
            stock.set_bit_config(config)
            assert torch.equal(trainer.model(**inputs).start_logits, stock(**inputs).start_logits)


@pytest.mark.parametrize("distill_loss", ["kl", "mse", "none"])
def test_joint_gradient_is_the_mean_of_the_passes_gradients(distill_loss, make_trainer):
    """Against losses that are written out here, all in one graph, with teachers kept apart by detach."""
    trainer = make_trainer("--distill_loss", distill_loss, "--distill_weight", "0.7", "--distill_temperature", "3")
    model, inputs = trainer.model, dict(first_batch(trainer))
    for layer in model.quant_layers().values():  # B = 0 would hide the adapters' A
        for adapter in layer.lora_B.values():
            torch.nn.init.normal_(adapter.weight, std=0.02)
    inputs["attention_mask"][::2, -3:] = 0
    for key in ("start_positions", "end_positions"):
        inputs[key] = inputs[key].clamp(max=inputs["input_ids"].shape[1] - 4)  # no label on what is now padding
    loss, found = step(trainer, inputs)
    mask, logits, losses = inputs["attention_mask"].bool(), [], []
    model.zero_grad()
    for _, config in trainer.step_configs(0):
        model.set_bit_config(config)
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        pair = [z.masked_fill(~mask, -1e30) for z in (output.start_logits, output.end_logits)]
        total = 0
        for z, key, side in zip(pair, ("start_positions", "end_positions"), (0, 1), strict=True):
            total = total + F.cross_entropy(z, inputs[key]) / 2
            for teacher in logits:
                t = teacher[side].detach()
                if distill_loss == "kl":
                    p, q = (t / 3).softmax(-1), (z / 3).softmax(-1)
                    kl = (p * (p.clamp(min=1e-30).log() - q.clamp(min=1e-30).log())).sum(-1).mean()
                    total = total + 0.7 * 9 * kl / 2
                elif distill_loss == "mse":
                    squares = torch.where(mask, (z - t) ** 2, 0)
                    total = total + 0.7 * (squares.sum(-1) / mask.sum(-1)).mean() / 2
        logits.append(pair)
        losses.append(total)
        (total / 3).backward()
    expected = gradients(model)
    assert loss.item() == pytest.approx(sum(losses).item() / 3, rel=1e-5) and expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")


def test_every_pass_is_sent_backward_before_the_next_one(make_trainer, monkeypatch):
    trainer, events = make_trainer("--teacher"), []
    backward = trainer.accelerator.backward
    trainer.model.register_forward_pre_hook(lambda *_: events.append("forward"))
    monkeypatch.setattr(trainer.accelerator, "backward", lambda loss: events.append("backward") or backward(loss))
    step(trainer, first_batch(trainer))
    assert events == ["forward", "backward"] * 4


def test_loss_is_the_models_own_where_nothing_is_padded(make_trainer):
    trainer = make_trainer("--bit_widths", "8")
    inputs = {key: value[:1] for key, value in first_batch(trainer).items()}
    loss, _ = step(trainer, inputs)
    assert inputs["attention_mask"].all()
    assert loss.item() == pytest.approx(trainer.model(**inputs).loss.item(), rel=1e-6)


def test_inactive_adapters_do_not_move(make_trainer):
    """random objective, uniform widths: one adapter a step. Weight decay 0.1 would shrink whatever AdamW touches."""
    flags = ("--objective", "random", "--num_mixed_configs", "0", "--weight_decay", "0.1", "--max_steps", "6")
    trainer = make_trainer(*flags)
    inputs, seen = first_batch(trainer), set()
    for number in range(6):
        trainer.state.global_step = number
        ((name, config),) = trainer.step_configs(number)
        active = str(config["transformer.h.0.mlp.c_fc"]["w_bits"])
        before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        step(trainer, inputs)
        trainer.optimizer.step()
        for key, value in trainer.model.state_dict().items():
            trained = f".lora_A.{active}." in key or f".lora_B.{active}." in key or key.startswith("qa_outputs.")
            moves = trained and not (".lora_A." in key and active not in seen and number == 0)
            assert torch.equal(value, before[key]) != trained or not moves, (number, key)
            assert trained or torch.equal(value, before[key]), f"{key} moved in a step of {name}"
        seen.add(active)
    assert seen == {"4", "8"}


def test_gradient_accumulation_equals_one_large_batch(run, tmp_path, squad_files):
    first = ("--max_steps", "1", "--max_grad_norm", "0", "--train_sampling_strategy", "sequential")
    first += ("--logging_steps", "1")
    run(*first)
    run(*first, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4", out="accumulated")
    expected, found = (adam_gradient(tmp_path / out / "checkpoint-1") for out in ("out", "accumulated"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    losses = [history(tmp_path / out)[0] for out in ("out", "accumulated")]
    for key in ("loss", "loss_W8A8KV8", "loss_mixed", "loss_W4A4KV4"):
        assert losses[1][key] == pytest.approx(losses[0][key], rel=1e-4)
    passes = [losses[0][f"loss_{name}"] for name in ("W8A8KV8", "mixed", "W4A4KV4")]
    assert losses[0]["loss"] == pytest.approx(statistics.mean(passes), rel=1e-5)


def test_gradient_checkpointing_recomputes_with_the_right_bits(make_trainer):
    plain, checkpointed = make_trainer(), make_trainer()
    checkpointed.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed.model.load_state_dict(plain.model.state_dict())
    inputs = first_batch(plain)
    expected, found = step(plain, inputs)[1], step(checkpointed, inputs)[1]
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-8)


def test_gradient_checkpointing_flag(run):
    assert run("--gradient_checkpointing")["steps"] == 2


def test_sequential_distillation_is_the_published_mix(make_trainer):
    trainer = make_trainer("--objective", "sequential", "--max_steps", "4")
    inputs = dict(first_batch(trainer))
    trainer.state.global_step = 2
    assert names(trainer.step_configs(2)) == ["W4A4KV4"] and trainer.teacher_names("W4A4KV4") == ["W8A8KV8"]
    assert trainer.teacher_names("W8A8KV8") == []
    loss, found = step(trainer, inputs)
    assert not any(".lora_A.8." in name or ".lora_B.8." in name for name in found), "the teacher gets no gradient"
    logits, mask = {}, inputs["attention_mask"].bool()
    for bits in (8, 4):
        with trainer.model.at_bits(bits), torch.no_grad():
            output = trainer.model(**inputs)
        logits[bits] = (output.start_logits, output.end_logits)
    kl = training.qa_distillation_kl(*logits[4], *logits[8], mask, 2.0)
    ce = training.qa_cross_entropy(
        torch.stack(logits[4]), torch.stack([inputs["start_positions"], inputs["end_positions"]]), mask
    )
    assert loss.item() == pytest.approx((0.5 * ce + 0.5 * kl).item(), rel=1e-5)
    assert trainer.model.training


def test_sequential_learning_rate_restarts_with_each_width(run, tmp_path):
    run("--objective", "sequential", "--max_steps", "4", "--logging_steps", "1", "--lr_scheduler_type", "cosine")
    logged = [entry for entry in history(tmp_path / "out") if "learning_rate" in entry]
    assert [entry["learning_rate"] for entry in logged] == pytest.approx([3e-3, 1.5e-3, 3e-3, 1.5e-3])
    phases = [[key for key in entry if key.startswith("loss_")] for entry in logged]
    assert phases == [["loss_W8A8KV8"]] * 2 + [["loss_W4A4KV4"]] * 2


def test_best_model_by_f1(run, tmp_path):
    flags = ("--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--load_best_model_at_end")
    run(*flags, "--metric_for_best_model", "f1")
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_metric"] == max(entry["eval_f1"] for entry in state["log_history"][:4] if "eval_f1" in entry)


def test_nan_stops_the_run_and_names_the_config(run, monkeypatch):
    original = training.qa_cross_entropy
    calls = []

    def diverge(logits, *rest):
        calls.append(1)
        return original(logits, *rest) * (float("nan") if len(calls) == 6 else 1)  # the third pass of step 2

    monkeypatch.setattr(training, "qa_cross_entropy", diverge)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 2 \(bit config: W4A4KV4\)"):
        run()


# ---- learning


def test_joint_training_learns_at_every_width(run, tmp_path, squad_files, monkeypatch):
    """8 questions are memorized at 8 and 3 bits; quantizing a float LoRA run to 3 bits loses most of them."""
    same = ("--validation_file", squad_files[0], "--max_eval_samples", "8")
    learn = ("--max_train_samples", "8", "--learning_rate", "1e-2", "--lr_scheduler_type", "cosine")
    learn += ("--max_steps", "80", "--logging_steps", "10", *same)
    joint = run("--bit_widths", "3", "8", *learn)["metrics"]
    logged = [entry for entry in history(tmp_path / "out") if "loss" in entry]
    for name in ("W8A8KV8", "mixed", "W3A3KV3"):
        assert logged[-1][f"loss_{name}"] < 0.5 * logged[0][f"loss_{name}"], name
    assert joint["eval_exact_match_W8A8KV8"] >= 87.5
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "run_qa", base_run_qa)
        run("--add_lora", *learn, out="float")
        after = run("--bit_config", "W3A3KV3", *same, out="ptq", model=tmp_path / "float", train=False)["metrics"]
    assert joint["eval_f1_W3A3KV3"] > after["eval_f1"] + 20, (joint, after)


# ---- resume

STEPS = ("--max_steps", "4", "--save_steps", "2", "--curriculum", "0.5")


def test_resumed_run_equals_the_uninterrupted_one(run, tmp_path):
    run(*STEPS)
    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copytree(tmp_path / "out" / "checkpoint-2", killed / "checkpoint-2")
    shutil.copy(tmp_path / "out" / "run_settings.json", killed)
    record = run(*STEPS, out="killed")
    assert record["steps"] == 4 and record["passes"] == 1 + 1 + 3 + 3
    assert_equal_weights(tmp_path / "out", killed)


@pytest.mark.parametrize("widths", [(), ("--bit_configs", "8", "W4A8KV8"), ("--bit_widths", "8", "6", "4")])
def test_a_config_that_joins_goes_on_from_the_next_higher(widths, run, monkeypatch):
    original, equal = training.AdaptiveLoRATrainer.joint_losses, []

    def spy(self, net, inputs, configs, share):
        banks = [bank for layer in net.quant_layers().values() for bank in (layer.lora_A, layer.lora_B)]
        keys = sorted(banks[0], reverse=True)
        equal.append(
            [all(torch.equal(bank[a].weight, bank[b].weight) for bank in banks) for a, b in zip(keys, keys[1:])]
        )
        return original(self, net, inputs, configs, share)

    monkeypatch.setattr(training.AdaptiveLoRATrainer, "joint_losses", spy)
    run("--max_steps", "4", "--curriculum", "0.5", "--save_strategy", "no", *widths)
    joins = [[True], [False], [True], [False]]
    if "6" in widths:  # 6 bits join in step 1, 4 bits in step 2
        joins = [[True, True], [True, False], [False, True], [False, False]]
    assert equal == joins, "before the passes of every step; at the start all adapters are the same"


def test_other_settings_do_not_continue_a_run(run):
    run(*STEPS)
    with pytest.raises(ValueError, match=r"other settings \(curriculum: 0.5 then, 0.25 now\)"):
        run(*STEPS, "--curriculum", "0.25")


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_weights(qa_words, tmp_path):
    flags = ("--max_steps", "40", "--save_steps", "4", "--teacher", "--save_total_limit", "2")
    command = [sys.executable, str(ROOT / "switch_precision" / "run_qa.py")]
    subprocess.run([*command, *qa_words(*flags, out=tmp_path / "whole")], check=True)
    killed = subprocess.Popen([*command, *qa_words(*flags, out=tmp_path / "killed")])
    deadline = time.time() + 120
    while not (tmp_path / "killed" / "checkpoint-8").exists() and time.time() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it was to be killed before its end"
    subprocess.run([*command, *qa_words(*flags, out=tmp_path / "killed")], check=True)
    assert_equal_weights(tmp_path / "whole", tmp_path / "killed")


# ---- several processes


def torchrun(*flags, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(ROOT / "switch_precision" / "run_qa.py"), *flags], check=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("samples", "batch", "accumulated", "steps", "extra"),
    [
        (7, 4, 1, 1, ()),  # rank 1 has 3 of 4
        (3, 4, 1, 1, ()),  # rank 1 has nothing but duplicates
        (11, 2, 2, 2, ()),  # the second window of an epoch: a full micro-batch and 3 of 4
        (7, 2, 1, 2, ("--gradient_checkpointing", "--objective", "random")),  # one adapter a step
    ],
)
def test_two_processes_equal_one_with_the_batch_of_both(samples, batch, accumulated, steps, extra, qa_words, tmp_path):
    """Contexts of different lengths, dynamic padding, ragged last batch: the gradients are the same."""
    train = json.loads(pathlib.Path(qa_words(out="x")[3]).read_text())
    for number, paragraph in enumerate(train["data"][0]["paragraphs"]):
        paragraph["context"] += " So it is." * (number % 4)
    (tmp_path / "train.json").write_text(json.dumps(train))
    flags = ("--train_file", str(tmp_path / "train.json"), "--max_train_samples", str(samples), "--save_steps", "1")
    flags += ("--max_grad_norm", "0", "--train_sampling_strategy", "sequential", "--max_steps", str(steps), *extra)
    flags += ("--gradient_accumulation_steps", str(accumulated), "--logging_steps", "1", "--max_eval_samples", "3")
    flags += ("--optim", "sgd", "--learning_rate", "0.1", "--lr_scheduler_type", "constant")
    for processes in (1, 2):
        size = ("--per_device_train_batch_size", str(batch * 2 // processes))
        torchrun(*qa_words(*flags, *size, out=tmp_path / f"{processes}"), processes=processes)
    one, two = history(tmp_path / "1"), history(tmp_path / "2")
    for expected, found in zip(one[:steps], two[:steps], strict=True):
        for key in expected:
            if key.startswith("loss") or key == "grad_norm":
                assert found[key] == pytest.approx(expected[key], rel=1e-4), key
    expected, found = weights(tmp_path / "1"), weights(tmp_path / "2")
    for key in expected:
        # Rounding in another order now and then moves an activation to the next code.
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5)


# ---- refusals, published command, shell


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--bit_widths", "4", "9"), "9 is not a bit-width"),
        (("--bit_widths", "4", "4"), "every width once"),
        (("--bit_configs", "nowhere.json"), "nowhere.json: no such bit-width config"),
        (("--bit_configs", "W4A8KV8", "W4A8KV8"), "two configs are called W4A8KV8"),
        (("--bit_configs", "8", "W8A8KV8"), "two configs are called W8A8KV8"),
        (("--bit_configs", "x/a.json", "y/A.json"), "would write eval_A_predictions.json"),
        (("--bit_configs", "a_nbest.json", "a.json"), "would write eval_a_nbest_predictions.json"),
        (("--bit_configs", "x" * 240 + ".json"), "bytes; allowed are 255"),
        (("--bit_configs", "W04A08"), "W04A08: no such bit-width config"),
        (("--report_to", "no_such_tracker"), "--report_to"),
        (("--objective", "alternate"), "allowed are joint, random, sequential"),
        (("--distill_loss", "l1"), "allowed are kl, mse, none"),
        (("--distill_weight", "-1"), "must not be negative"),
        (("--num_mixed_configs", "-1"), "must not be negative"),
        (("--distill_temperature", "0"), "must be positive"),
        (("--curriculum", "2"), "a fraction"),
        (("--sample_widths", "1"), "0 widths between"),
        (("--sample_widths", "1", "--objective", "random"), "no other objective"),
        (("--objective", "sequential", "--teacher"), "no --teacher"),
        (("--teacher", "--bit_widths", "8", "32"), "has already"),
        (("--lora_r", "0"), "--lora_r 0: must be a number above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refused_before_any_compute(flags, message, run, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(*flags)
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == [".lock"]


def test_widths_as_text_are_configs(run, tmp_path):
    record = run("--bit_configs", "8", "W4A8KV8", "--max_steps", "1")
    assert list(record["bit_configs"]) == ["W8A8KV8", "W4A8KV8"] and record["bit_config"]["lora_bank"] == ["4", "8"]


def test_checkpoint_without_the_adapters_asked_for(run, tmp_path):
    run("--bit_widths", "8", "--max_steps", "1")
    with pytest.raises(ValueError, match=r"w_bits = 4, but the LoRA bank has only \['8'\]"):
        run(out="more", model=tmp_path / "out")


PUBLISHED = """--model_name_or_path /path/to/model --dataset_name squad --do_train --do_eval
    --per_device_train_batch_size 16 --per_device_eval_batch_size 16 --seed 42 --learning_rate 3e-03
    --logging_strategy steps --logging_steps 10 --lr_scheduler_type cosine --max_seq_length 786 --bf16 True
    --fp16 False --max_steps 1000 --output_dir ./results/your-output-directory --overwrite_output_dir
    --eval_strategy steps --eval_steps 256 --save_strategy steps --save_steps 256
    --lora_r 8 --lora_alpha 16 --bit_widths 4 8"""


def parse(argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_qa.py", *argv])
    groups = (run_qa.BankArguments, run_qa.DataTrainingArguments, run_qa.ObjectiveArguments, run_qa.TrainingArguments)
    return run_qa.parse_args(*groups)


def test_published_command_is_understood(monkeypatch):
    model_args, _, objective, training_args = parse(shlex.split(PUBLISHED) + ["--use_cpu"], monkeypatch)
    assert model_args.bit_widths == [4, 8] and (model_args.lora_r, model_args.lora_alpha) == (8, 16)
    assert training_args.max_steps == 1000 and training_args.bf16 and objective == run_qa.ObjectiveArguments()
    run_qa.check_args(model_args, objective, training_args)


def test_train_script_runs_from_anywhere_and_passes_flags_on(python_stub, tmp_path, monkeypatch):
    environment, calls = python_stub
    environment |= {"TRAIN_FILE": "my train.json", "MODEL": "my model"}
    command = ["bash", ROOT / "switch_precision" / "train.sh", "--use_cpu", "--bit_widths", "4", "6"]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    (argv,) = calls()
    assert argv[:3] == ["--standalone", "--nproc_per_node=1", str(ROOT / "switch_precision" / "run_qa.py")]
    model_args, data_args, _, training_args = parse(argv[3:], monkeypatch)
    assert model_args.bit_widths == [4, 6] and data_args.train_file == "my train.json" and not training_args.bf16
    published = (training_args.max_steps, training_args.learning_rate, training_args.per_device_train_batch_size)
    assert published == (1000, 3e-3, 16) and (training_args.eval_steps, training_args.save_steps) == (256, 256)
