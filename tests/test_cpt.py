"""Cyclic precision training: schedule, cost, gradient quantizer, whole runs, range test, evaluation, comparison."""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser

from conftest import ROOT, experiment

with experiment("base_model"):
    import run_qa as base_run_qa
with experiment("switch_precision"):
    import run_qa as switch_run_qa
with experiment("cpt"):
    import compare
    import cyclic_precision_trainer as training
    import precision_range_test as range_test
    import run_qa
    import run_qa_eval
    from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering, QuantLinear

bits_at = training.cyclic_bit_width


def sequence(steps, cycles, low, high, period="real"):
    return [bits_at(step, steps, cycles, low, high, period) for step in range(steps)]


# ---- schedule

RELEASED_CYCLE = [4] * 8 + [5] * 6 + [6] * 4 + [7] * 6 + [8] * 7  # case c1: 31 steps


def test_published_schedule():
    """Case c1: 1000 steps, 32 cycles, 4 to 8 bits, period int(1000 / 32)."""
    found = sequence(1000, 32, 4, 8, "floor")
    assert found == (RELEASED_CYCLE * 33)[:1000]
    assert {bits: found.count(bits) for bits in range(4, 9)} == {4: 264, 5: 192, 6: 128, 7: 192, 8: 224}
    assert sum(found) / 1000 == 5.92 and found[992:] == [4] * 8, "it ends in a 33rd cycle"
    assert [bits_at(step, 1000, 32, 4, 8, "floor") for step in (250, 500, 750, 1000)] == [4, 4, 4, 5]


def test_real_period():
    """Case c1 with P = 31.25."""
    found = sequence(1000, 32, 4, 8)
    first = [4] * 8 + [5] * 6 + [6] * 5 + [7] * 6 + [8] * 7 + [4] * 7 + [5] * 6 + [6] * 5 + [7] * 6 + [8] * 7
    assert found[:63] == first and found[63:70] == [4] * 7
    assert found[992:] == [7] + [8] * 7, "it ends at the highest width"
    assert {bits: found.count(bits) for bits in range(4, 9)} == {4: 232, 5: 192, 6: 160, 7: 192, 8: 224}
    assert sum(a != b for a, b in zip(found, sequence(1000, 32, 4, 8, "floor"), strict=True)) == 612


def test_conventions_agree_where_cycles_divide_the_steps():
    for steps, cycles in ((1000, 8), (64000, 32), (96, 12)):
        assert sequence(steps, cycles, 3, 8) == sequence(steps, cycles, 3, 8, "floor")


def test_cycles_start_where_they_should():
    """Against whole-number arithmetic; in floats, (5 mod 10/6) / (10/6) is 0.9999... and gives the highest width."""
    assert bits_at(5, 10, 6, 4, 8) == 4
    for steps, cycles in itertools.product((7, 10, 30, 97, 250), (1, 3, 6, 7)):
        for step in range(steps):
            phase = Fraction(step * cycles, steps) % 1
            exact = 4 + 2 * (1 - math.cos(math.pi * float(phase)))
            if abs(exact % 1 - 0.5) > 1e-9:  # ties: next test
                assert bits_at(step, steps, cycles, 4, 8) == round(exact), (step, steps, cycles)


@pytest.mark.parametrize(("low", "high", "middle"), [(3, 4, 4), (4, 5, 4), (5, 6, 6), (4, 7, 6), (3, 8, 6), (4, 4, 4)])
def test_rounding_is_half_to_even(low, high, middle):
    assert bits_at(1, 2, 1, low, high) == bits_at(1, 2, 1, low, high, "floor") == middle


def test_width_climbs_and_jumps():
    found = sequence(400, 10, 2, 8)
    for start in range(0, 400, 40):
        cycle = found[start : start + 40]
        assert cycle == sorted(cycle) and set(cycle) == set(range(2, 9))
    assert sequence(6, 6, 4, 8) == [4] * 6, "a cycle of one step is only a start"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 31, 32, 4, 8), "num_cyclic_period = 32: allowed is 1 to the number of steps, 31"),
        ((0, 10, 0, 4, 8), "num_cyclic_period = 0"),
        ((0, 10, 2, 8, 4), "min_bits = 8 is above max_bits = 4"),
        ((-1, 10, 2, 4, 8), "step = -1"),
        ((0, 10, 2, 4, 8, "ceil"), "allowed are real, floor"),
    ],
)
def test_schedules_that_do_not_exist(arguments, message):
    with pytest.raises(ValueError, match=message):
        bits_at(*arguments)


# ---- cost


@pytest.mark.parametrize(("low", "high", "gradient", "saving"), [(3, 8, 8, 36.67), (3, 6, 6, 30.05)])
def test_cost_model_gives_the_published_savings(low, high, gradient, saving):
    cyclic = training.training_cost(sequence(64000, 32, low, high), gradient)["total"]
    static = training.training_cost([high], gradient)["total"]
    assert 100 * (1 - cyclic / static) == pytest.approx(saving, abs=0.01)


def test_cost_by_hand():
    assert set(training.training_cost([32]).values()) == {1.0}
    cost = training.training_cost([4, 8], 16, a_bits=[8, 8])
    assert cost["forward"] == (32 + 64) / 2 / 1024 and cost["error"] == (64 + 128) / 2 / 1024
    assert cost["weight_gradient"] == 128 / 1024 and cost["total"] == pytest.approx(sum((48, 96, 128)) / 3 / 1024)


# ---- gradient quantization


def test_gradient_quantizer_is_unbiased_and_keeps_the_range():
    torch.manual_seed(0)
    grad = torch.randn(40, 5) * 1e-7  # below the published floor of the step
    draws = torch.stack([training.quantize_gradient(grad, 4) for _ in range(4000)])
    step = (grad.max() - grad.min()) / 15
    codes = (draws - grad.min()) / step
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    assert codes.round().min() == 0 and codes.round().max() == 15
    assert (draws - grad).abs().max() <= step * 1.001, "one of the two neighbours"
    # a neighbour's mean over n draws is off by at most half a step / sqrt(n)
    assert ((draws.mean(0) - grad).abs().max() / step).item() < 5 * 0.5 / 4000**0.5
    assert (draws[:, grad.flatten().argmin() // 5, grad.flatten().argmin() % 5] == grad.min()).all()


def test_gradient_quantizer_on_odd_input():
    same = torch.full((3, 2), -0.25)
    assert torch.equal(training.quantize_gradient(same, 8), same)
    assert torch.equal(training.quantize_gradient(torch.zeros(4), 8), torch.zeros(4))
    for bad in (torch.nan, torch.inf, -torch.inf):  # so that a loss scaler sees the overflow
        assert training.quantize_gradient(torch.tensor([1.0, bad, 2.0]), 8).isnan().any()
    half = torch.randn(5, dtype=torch.bfloat16)
    assert training.quantize_gradient(half, 8).dtype == torch.bfloat16


def test_gradient_of_every_linear_is_quantized(tiny_model):
    torch.manual_seed(0)
    model = QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model)
    model.add_lora(["shared"])
    model.set_bit_config(8)
    training.quantize_output_gradients(model, 3)
    seen = {}
    for name, layer in model.quant_layers().items():  # hooks of a tensor run in order: this one sees the quantized

        def watch(layer, args, output, name=name):
            output.register_hook(lambda grad: seen.__setitem__(name, grad.unique().numel()))

        layer.register_forward_hook(watch)
    inputs = {"input_ids": torch.arange(1, 21).view(2, 10), "start_positions": torch.tensor([1, 2])}
    model(**inputs, end_positions=torch.tensor([3, 4])).loss.backward()
    assert seen.keys() == model.quant_layers().keys() and all(1 < levels <= 8 for levels in seen.values()), seen
    assert not any(isinstance(layer, QuantLinear) and layer._forward_hooks for layer in fresh(tiny_model).modules())


def fresh(tiny_model):
    return QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model)


# ---- runs


@pytest.fixture
def argv(qa_words):
    def words(*flags, train=True, **options):
        more = ["--do_train", "--max_steps", "4", "--num_cyclic_period", "2"] if train else []
        return qa_words("--logging_steps", "1", *more, *flags, train=False, **options)

    return words


@pytest.fixture
def run(argv, monkeypatch, tmp_path):
    """run(*flags) calls main() with the tiny model and data; later flags win; returns the run's record."""

    def call(*flags, out="out", script=run_qa, **options):
        monkeypatch.setattr(sys, "argv", ["run_qa.py", *argv(*flags, out=tmp_path / out, **options)])
        script.main()
        return json.loads((tmp_path / out / "record.json").read_text())

    return call


@pytest.fixture(scope="module")
def dropout_model(tiny_model, tmp_path_factory):
    """The tiny model with dropout, whose random state a resumed run must bring back."""
    folder = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def forwards(monkeypatch):
    """[(optimizer step, bits of the third linear, adapter)] of every training forward, K/V bits of the first."""
    seen, original = [], training.CyclicPrecisionTrainer.compute_loss

    def watch(self, model, *args, **kwargs):
        if model.training:
            layers = list(self.model.quant_layers().values())
            seen.append((self.state.global_step, (layers[2].w_bits, layers[2].a_bits, layers[0].kv_bits)))
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(training.CyclicPrecisionTrainer, "compute_loss", watch)
    return seen


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def assert_equal_weights(folder, other):
    expected, found = weights(folder), weights(other)
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def history(folder):
    return json.loads((pathlib.Path(folder) / "trainer_state.json").read_text())["log_history"]


def logged_bits(folder):
    return [entry["bits"] for entry in history(folder) if "bits" in entry]


def test_bits_follow_the_optimizer_steps(run, forwards, figures, tmp_path):
    """Four micro-batches a step of 2 each: bits change with the step, are logged, and evaluation has its own."""
    flags = ("--max_steps", 8, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4)
    flags += ("--eval_strategy", "steps", "--eval_steps", 3, "--save_steps", 3)
    record = run(*flags)
    expected = sequence(8, 2, 4, 8)
    assert expected == [4, 5, 6, 7] * 2
    assert forwards == [(step, (bits,) * 3) for step, bits in enumerate(expected) for _ in range(4)]
    assert logged_bits(tmp_path / "out") == expected
    evaluations = [entry for entry in history(tmp_path / "out") if "eval_f1" in entry]
    assert [entry["step"] for entry in evaluations][:2] == [3, 6]
    for entry in evaluations:
        assert entry["eval_f1"] == pytest.approx((entry["eval_f1_W4A4KV4"] + entry["eval_f1_W8A8KV8"]) / 2)
    assert record["bit_config"]["name"] == "W8A8KV8" and record["bit_config"]["lora_bank"] == ["shared"]
    for folder in ("out", "out/checkpoint-3"):  # saved after a step at 6 bits
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert {layer["w_bits"] for layer in config["bit_config"].values()} == {8}
        assert config["trained_bit_configs"] == [f"W{bits}A{bits}KV{bits}" for bits in (8, 7, 6, 5, 4)]
    assert record["cyclic"]["mean_bits"] == 5.5 and record["cyclic"]["gradient_bits"] == 32
    assert record["training_cost"] == training.training_cost(expected)
    written = json.loads((tmp_path / "out" / "schedule.json").read_text())
    assert written["bits"] == expected and written["mean_bits"] == 5.5
    assert written["steps_per_width"] == {"4": 2, "5": 2, "6": 2, "7": 2}
    (line,) = figures["schedule"].axes[0].lines
    assert line.get_ydata().tolist() == expected and (tmp_path / "out" / "schedule.png").is_file()


def test_logged_bits_are_a_mean_like_the_loss(run, tmp_path):
    run("--logging_steps", 4, "--max_steps", 8)
    assert logged_bits(tmp_path / "out") == [5.5, 5.5]


def test_what_does_not_cycle_stays(run, forwards, tmp_path):
    record = run("--cycle", "w", "kv", "--fixed_bits", 6, "--period", "floor", "--max_steps", 5)
    assert [bits for _, bits in forwards] == [(4, 6, 4), (6, 6, 6)] * 2 + [(4, 6, 4)]
    assert record["bit_config"]["name"] == "W8A6KV8"
    assert {"eval_f1_W4A6KV4", "eval_f1_W8A6KV8"} <= set(record["metrics"])
    assert record["training_cost"] == training.training_cost([4, 6, 4, 6, 4], 32, [6] * 5)


def test_one_adapter_serves_every_width(run, tmp_path):
    run("--bf16", "--gradient_bits", 8, "--eval_bit_width", 32)
    names = {re.sub(r".*lora_[AB]\.(\w+)\..*", r"\1", name) for name in weights(tmp_path / "out") if ".lora_" in name}
    assert names == {"shared"} and "transformer.wte.weight" not in weights(tmp_path / "out")
    model = QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert all(layer.lora_B["shared"].weight.abs().sum() > 0 for layer in model.quant_layers().values())


def test_static_training_is_that_of_base_model(run, tmp_path):
    """The same width twice: the adapter has another name there, the weights are the same bit for bit."""
    static = run("--bit_widths", 4, 4)
    with experiment("base_model"):
        argv = [word for word in sys.argv[1:] if word not in ("--num_cyclic_period", "2")]
    at = argv.index("--bit_widths")
    argv[at : at + 3] = ["--bit_widths", "4"]
    argv[argv.index("--output_dir") + 1] = str(tmp_path / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run_qa.py", *argv])
        base_run_qa.main()
    expected = {re.sub(r"(lora_[AB])\.4\.", r"\1.shared.", key): v for key, v in weights(tmp_path / "base").items()}
    found = weights(tmp_path / "out")
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    base = json.loads((tmp_path / "base" / "record.json").read_text())["metrics"]
    assert base["eval_f1"] == static["metrics"]["eval_f1"] == static["metrics"]["eval_f1_W4A4KV4"]


def test_learns_at_every_width(run, tmp_path, squad_files):
    """8 questions are memorized at 8 and 3 bits; quantizing a float LoRA run to 3 bits loses most of them."""
    same = ("--validation_file", squad_files[0], "--max_eval_samples", 8)
    learn = ("--max_train_samples", 8, "--learning_rate", "1e-2", "--lr_scheduler_type", "cosine", "--max_steps", 100)
    cyclic = run("--bit_widths", 3, 8, "--num_cyclic_period", 5, *learn, *same)["metrics"]
    plain = run("--bit_widths", 32, 32, "--eval_bit_widths", 3, 32, *learn, *same, out="float")["metrics"]
    assert min(cyclic["eval_exact_match_W8A8KV8"], plain["eval_exact_match_W32A32KV32"]) >= 87.5
    assert cyclic["eval_f1_W3A3KV3"] > plain["eval_f1_W3A3KV3"] + 20, (cyclic, plain)


def test_best_model_by_f1(run, tmp_path):
    flags = ("--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1, "--load_best_model_at_end")
    run(*flags, "--metric_for_best_model", "f1", "--eval_bit_widths", 4, 6)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_metric"] == max(entry["eval_f1"] for entry in state["log_history"][:8] if "eval_f1" in entry)


# ---- resume

# 3 micro-batches a step of 21 in an epoch; checkpoint 5 lies in the middle of the second cycle of 4.
RESUME = ("--max_steps", 12, "--num_cyclic_period", 3, "--save_steps", 5, "--gradient_accumulation_steps", 3)
RESUME += ("--per_device_train_batch_size", 3, "--gradient_bits", 8)


def test_resumed_in_the_middle_of_a_cycle(run, dropout_model, tmp_path):
    """Dropout, stochastic rounding, accumulation: the same bits and the same weights, bit for bit."""
    run(*RESUME, model=dropout_model)
    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copytree(tmp_path / "out" / "checkpoint-5", killed / "checkpoint-5")
    shutil.copy(tmp_path / "out" / "run_settings.json", killed)
    record = run(*RESUME, out="killed", model=dropout_model)
    assert record["steps"] == 12 and logged_bits(killed) == logged_bits(tmp_path / "out") == sequence(12, 3, 4, 8)
    assert_equal_weights(tmp_path / "out", killed)
    run(*RESUME, "--gradient_bits", 32, out="float", model=dropout_model)
    assert not torch.equal(weights(tmp_path / "float")["qa_outputs.weight"], weights(killed)["qa_outputs.weight"])


def test_other_schedule_does_not_continue_a_run(run):
    run()
    with pytest.raises(ValueError, match="max_steps: 4 then, 8 now"):
        run("--max_steps", 8)
    with pytest.raises(ValueError, match=r"bit_widths: \[4, 8\] then, \[3, 8\] now"):
        run("--bit_widths", 3, 8)


def test_finished_run_is_only_evaluated_again(run, tmp_path):
    flags = ("--save_steps", 2, "--lr_scheduler_type", "constant")
    run(*flags)
    before = weights(tmp_path / "out")
    record = run(*flags, "--eval_bit_widths", 5)
    assert record["steps"] == 4 and record["metrics"]["eval_f1"] == record["metrics"]["eval_f1_W5A5KV5"]
    assert all(torch.equal(value, before[key]) for key, value in weights(tmp_path / "out").items())


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_weights(argv, dropout_model, tmp_path):
    flags = (*RESUME, "--max_steps", 60, "--num_cyclic_period", 6, "--save_total_limit", 2)
    command = [sys.executable, str(ROOT / "cpt" / "run_qa.py")]
    subprocess.run([*command, *argv(*flags, out=tmp_path / "whole", model=dropout_model)], check=True)
    killed = subprocess.Popen([*command, *argv(*flags, out=tmp_path / "killed", model=dropout_model)])
    deadline = time.time() + 120
    while not (tmp_path / "killed" / "checkpoint-15").exists() and time.time() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it was to be killed before its end"
    subprocess.run([*command, *argv(*flags, out=tmp_path / "killed", model=dropout_model)], check=True)
    assert_equal_weights(tmp_path / "whole", tmp_path / "killed")
    assert logged_bits(tmp_path / "killed") == logged_bits(tmp_path / "whole") == sequence(60, 6, 4, 8)


# ---- range test


def test_improvements_by_hand():
    starts, accuracies = [[0.0, 0.2], [0.1]], [[0.0, 0.1, 0.1, 0.3], [0.1, 0.3, 0.4, 0.6]]
    low, high = range_test.improvements(starts, accuracies, window=2)
    assert (low["bits"], low["first"]) == (2, 0.1) and (high["bits"], high["first"]) == (3, 0.1)
    assert low["improvement"] == pytest.approx(0.1) and high["improvement"] == pytest.approx(0.4)
    # sample variances 0.02 each of a mean of two; a single batch before training counts as exact
    assert low["standard_error"] == pytest.approx(0.02**0.5) and high["standard_error"] == pytest.approx(0.1)


@pytest.mark.parametrize(("v2", "absent"), [(False, 0), (True, 3)])
def test_windows_without_the_answer_do_not_count(v2, absent):
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]] * 3)
    positions = torch.tensor([absent, 2, 1])
    logits = torch.nn.functional.one_hot(torch.tensor([absent, 2, 2]), 6).float()
    inputs = {"attention_mask": mask, "start_positions": positions, "end_positions": positions}
    found = range_test.count_right(inputs, {"start_logits": logits, "end_logits": logits}, v2)
    assert found.tolist() == [1, 2]


def test_min_bits_by_hand():
    def rows(*pairs):
        return [{"bits": bits, "improvement": i, "standard_error": e} for bits, (i, e) in enumerate(pairs, 2)]

    def found(*pairs, share=0.6, threshold=0.02):
        return range_test.find_min_bits(rows(*pairs), threshold, share)

    assert found((0, 0.01), (0.3, 0.01), (0.5, 0.01)) == (3, False), "exactly at the share"
    assert found((0, 0.01), (0.3, 0.01), (0.5, 0.01), share=0.5) == (3, True)
    assert found((0.28, 0.01), (0.5, 0.01), (0.5, 0.01)) == (3, False), "2 bits are within the noise of 0.6"
    assert found((0.45, 0.01), (0.1, 0.01), (0.5, 0.01)) == (2, True), "the lowest one counts"
    assert found((0, 0), (0.1, 0), (0.5, 0)) == (4, True), "the highest always has its own improvement"
    assert found((0.5, 0), (0.5, 0), (0.5, 0), threshold=0.5) == (None, False)
    assert found((0, 0), (0, 0), (0.5, 0.25)) == (None, False), "the highest width itself may be noise"
    judged = rows((0.3, 0.03), (0.5, 0.05))
    range_test.find_min_bits(judged, 0.02, 0.6)
    assert judged[0]["share"] == pytest.approx(0.6) and judged[1]["share_error"] == 0
    assert judged[0]["share_error"] == pytest.approx((0.03**2 + (0.6 * 0.05) ** 2) ** 0.5 / 0.5)


def test_accuracy_counts_windows_with_an_answer(run, monkeypatch, tmp_path):
    """Of 4 windows one has no answer, one is right, one has its end wrong, one is right but for a padded position."""
    monkeypatch.setattr(run_qa, "run_range_test", lambda trainer, *rest: trainers.append(trainer) or {})
    trainers = []
    run(*RANGE)
    (trainer,) = trainers
    start, end = torch.zeros(2, 4, 6)
    for row, (first, last) in enumerate([(0, 0), (2, 3), (2, 4), (1, 2)]):
        start[row, first] = end[row, last] = 1
    start[3, 5] = 9  # masked below
    labels = {"start_positions": torch.tensor([0, 2, 2, 1]), "end_positions": torch.tensor([0, 3, 3, 2])}
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[3, 5] = 0
    outputs = {"loss": torch.zeros(()), "start_logits": start, "end_logits": end}
    for _ in range(2):  # micro-batches of one step
        trainer.compute_loss(lambda **inputs: outputs, {"attention_mask": mask, **labels})
    assert trainer._counts[0].tolist() == [4, 6]
    assert trainer.accuracies(trainer._counts.values()) == [pytest.approx(2 / 3)]


RANGE = ("--precision_range_test", "--bit_widths", 4, 5, "--range_test_steps", 8, "--range_test_window", 2)


MEMORIZE = ("--max_train_samples", 8, "--learning_rate", "1e-2", "--range_test_steps", 30, "--range_test_window", 8)


def with_weights(tiny_model, folder, outlier):
    """The tiny model with weights of plus and minus 0.15, which every width represents exactly: 2 bits too.

    With `outlier`, each row has one weight of 7 * 0.15 as well: 4 bits just represent both, and 2 and 3 bits round all
    others to zero, so that the attention to the question is lost.
    """
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if ".h." in name and weight.ndim == 2:  # (in, out)
            weights[name] = 0.15 * weight.sign()
            if outlier:
                weights[name][0] = 7 * 0.15
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("outlier", "min_bits"), [(False, 2), (True, 4)])
def test_range_test_finds_the_lowest_width_that_can_learn(outlier, min_bits, run, tiny_model, tmp_path, capsys):
    model = with_weights(tiny_model, tmp_path / "model", outlier)
    record = run(*RANGE, *MEMORIZE, "--cycle", "w", model=model)
    found = json.loads((tmp_path / "out" / "range_test.json").read_text())
    assert record["metrics"]["min_bits"] == found["min_bits"] == min_bits and found["clear"]
    # 2 and 3 bits have the same weights: the same start, batches and optimizer give the same accuracies
    assert found["accuracies"][0] == found["accuracies"][1] and found["start_accuracies"][0] == [0.0]
    assert [row["last"] > 0.9 for row in found["rows"]] == [not outlier, not outlier, True, True]
    printed = capsys.readouterr().out
    assert f"min_bits = {min_bits}: the lowest width with at least 0.6" in printed and "not clear" not in printed


def test_range_test_trains_every_width_from_the_same_start(run, forwards, figures, monkeypatch, tmp_path):
    starts, batches, original = [], [], training.CyclicPrecisionTrainer.training_step

    def watch(self, model, inputs, *rest):
        if self.state.global_step == 0:
            starts.append({n: v.detach().clone() for n, v in model.named_parameters() if v.requires_grad})
        batches.append(inputs["input_ids"].tolist())
        return original(self, model, inputs, *rest)

    monkeypatch.setattr(training.CyclicPrecisionTrainer, "training_step", watch)
    flags = ("--lr_scheduler_type", "cosine", "--warmup_steps", 10, "--eval_strategy", "steps", "--save_steps", 3)
    record = run(*RANGE, *flags, "--range_test_threshold", "0")
    assert [bits for _, (bits, _, _) in forwards] == [bits for bits in (2, 3, 4, 5) for _ in range(8)]
    assert len(starts) == 4 and all(torch.equal(starts[0][n], v) for start in starts for n, v in start.items())
    assert batches[:8] == batches[8:16] == batches[24:] and batches[0] != batches[1]
    found = json.loads((tmp_path / "out" / "range_test.json").read_text())
    assert [len(steps) for steps in found["accuracies"]] == [8] * 4 and record["metrics"]["train_runtime"] > 0
    lines = figures["range_test"].axes[0].lines
    assert [line.get_label().split()[0] for line in lines] == ["2", "3", "4", "5"]
    assert all(len(line.get_ydata()) for line in lines) and (tmp_path / "out" / "range_test.png").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists(), "a probe leaves no model"
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_learning_rate_of_the_range_test_is_constant(run, capsys):
    run(*RANGE, "--lr_scheduler_type", "cosine", "--warmup_steps", 10)
    found = re.findall(r"'learning_rate': '([^']+)'", capsys.readouterr().out)
    assert len(found) == 32 and set(found) == {"0.003"}


def test_range_test_says_when_the_highest_width_does_not_learn(run, tmp_path, capsys):
    record = run(*RANGE, "--range_test_threshold", "2")
    assert record["metrics"]["min_bits"] is None
    assert json.loads((tmp_path / "out" / "range_test.json").read_text())["min_bits"] is None
    assert "5 bits do not improve by more than 2.0 and two standard errors" in capsys.readouterr().out


def test_range_test_says_when_it_is_not_clear(tmp_path):
    noisy, steady = [0.1, 0.9, 0.4, 1.0, 0.6], [0.9, 1.0, 0.9, 1.0, 0.9]
    for low, warned in ((noisy, True), (steady, False)):
        min_bits, lines = range_test.report([[0.0], [0.0]], [low, steady], 5, 0.02, 0.6, tmp_path, "", write=False)
        assert min_bits == 2 and ("not clear" in lines[-1]) == warned
    assert not list(tmp_path.iterdir())


# ---- evaluation


@pytest.fixture
def evaluate(monkeypatch, squad_files, tmp_path):
    def call(model, *flags, out="eval"):
        argv = ["run_qa_eval.py", "--model_name_or_path", str(model), "--validation_file", squad_files[1]]
        argv += ["--max_seq_length", "96", "--doc_stride", "16", "--per_device_eval_batch_size", "4"]
        argv += ["--use_cpu", "True", "--disable_tqdm", "True", "--output_dir", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", [*argv, *map(str, flags)])
        run_qa_eval.main()
        return json.loads((tmp_path / out / "record.json").read_text())["rows"]

    return call


def test_every_width_in_one_table(run, evaluate, tmp_path, capsys):
    metrics = run("--max_steps", 6, "--eval_bit_widths", 4, 8, 32)["metrics"]
    rows = evaluate(tmp_path / "out", "--eval_bit_widths", 4, 5, 6, 7, 8, 32)
    assert [row["config"] for row in rows] == [f"W{bits}A{bits}KV{bits}" for bits in (4, 5, 6, 7, 8, 32)]
    for row in rows:
        if row["average_w_bits"] in (4, 8, 32):
            assert (row["exact_match"], row["f1"]) == tuple(
                metrics[f"eval_{metric}_{row['config']}"] for metric in ("exact_match", "f1")
            )
    assert capsys.readouterr().out.count("| W") == 6


def test_default_widths_are_those_trained(run, evaluate, tmp_path):
    run("--bit_widths", 5, 7, "--cycle", "w", "a")
    rows = evaluate(tmp_path / "out")
    assert [row["config"] for row in rows] == ["W7A7KV8", "W6A6KV8", "W5A5KV8"]


def test_evaluation_alone(run, tmp_path):
    trained = run()["metrics"]
    again = run(out="again", model=tmp_path / "out", train=False)
    for key, value in trained.items():
        if "_W" in key:  # on integers now: sums agree to rounding
            assert again["metrics"][key] == (pytest.approx(value, rel=1e-2) if "loss" in key else value)
    assert "cyclic" not in again and again["bit_config"]["name"] == "W8A8KV8"


# ---- comparison


def write_run(folder, name, seed, exact_match, cost, **changes):
    metrics = {"eval_exact_match_W4A4KV4": exact_match, "eval_f1_W4A4KV4": exact_match + 1, "eval_f1": 0}
    training_of = {"max_steps": 30, "windows_per_step": 16, "learning_rate": 3e-3, "lr_scheduler_type": "cosine"}
    record = {
        "metrics": metrics,
        "steps": 30,
        "seed": seed,
        "model": "m",
        "data": {"train": "x"},
        "dtype": "fp32",
        "training": training_of,
        "training_cost": {"total": cost},
        "cyclic": {"mean_bits": 5.5},
    }
    (folder / f"{name}_{seed}").mkdir(parents=True)
    (folder / f"{name}_{seed}" / "record.json").write_text(json.dumps(record | changes))


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    for seed, offset in ((1, 0), (2, 3)):
        write_run(folder, "static4", seed, 40 + offset, 0.05)
        write_run(folder, "static8", seed, 20 + offset, 0.2)
        write_run(folder, "cpt", seed, 30 + offset, 0.1)
    return folder


def call_compare(runs, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compare.py", "--runs", str(runs), *flags])
        compare.main()
    return json.loads((runs / "summary.json").read_text())


def test_comparison_table(runs, capsys):
    summary = call_compare(runs, "--seeds", "1", "2")
    printed = capsys.readouterr().out
    assert "| static, 4 bits | 2 | 30 | 41.5 (40.0-43.0) | 0.0500 |" in printed
    assert "| cyclic (CPT) | 2 | 30 | 31.5 (30.0-33.0) | 0.1000 |" in printed
    assert "30 updates of 16 windows, learning rate 0.003 (cosine), seeds 1 2" in printed
    scores = summary["rows"][1]["scores"]["W4A4KV4"]
    assert scores["f1"] == {"mean": 22.5, "min": 21, "max": 24, "values": [21, 24]} and len(summary["records"]) == 6


def test_comparison_says_how_it_was_made(runs, tmp_path, monkeypatch):
    """Without what compare.sh leaves, the command is that of compare.py."""
    monkeypatch.chdir(tmp_path)
    summary = call_compare(runs, "--seeds", "1")
    assert summary["command"] == "python compare.py --runs runs --seeds 1"
    assert summary["git"]["commit"] and summary["versions"]["torch"] and summary["seed"] == [1]
    settings = ["MODEL=gpt2", f"TRAIN_FILE={tmp_path}/a b.json", "VALIDATION_FILE=", "--max_steps", "30"]
    (runs / "settings.txt").write_text("\n".join(settings) + "\n")
    command = call_compare(runs, "--seeds", "1", "2")["command"]
    script = os.path.relpath(ROOT / "cpt" / "compare.sh")
    assert command == f"MODEL=gpt2 TRAIN_FILE='a b.json' OUTPUT_DIR=runs SEEDS='1 2' bash {script} --max_steps 30"


@pytest.mark.parametrize(
    ("flags", "cost"),
    [
        ((), [8, 4, (4, 8)]),
        (("--bit_widths", "4", "6", "8", "--teacher", "--num_mixed_configs", "2"), [32, 8, 4, (4, 6, 8), (4, 6, 8)]),
        (("--curriculum", "0.5"), None),
        (("--objective", "random"), None),
    ],
    ids=str,
)
def test_joint_row_costs_the_sum_of_its_passes(flags, cost, runs, run, tmp_path, capsys):
    (runs / "joint").mkdir()
    shutil.copy(runs / "cpt_1" / "record.json", runs / "joint")
    settings = {"max_steps": 77}
    for group in (switch_run_qa.BankArguments, switch_run_qa.ObjectiveArguments):
        parser = HfArgumentParser(group)
        settings |= dataclasses.asdict(
            parser.parse_args_into_dataclasses(list(flags), return_remaining_strings=True)[0]
        )
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "run_settings.json").write_text(json.dumps(settings))
    row = call_compare(runs, "--seeds", "1", "2", "--joint", str(tmp_path / "ckpt"))["rows"][-1]
    assert row["steps"] == 77 and row["runs"] == 1
    if cost is None:
        assert row["relative_cost"] is None and "| - |" in capsys.readouterr().out
        return

    def one(widths):
        return sum(b * b + 2 * 32 * b for b in widths) / len(widths) / 3 / 1024

    assert row["relative_cost"] == pytest.approx(sum(one(p if isinstance(p, tuple) else (p,)) for p in cost))


def test_runs_that_do_not_compare_are_refused(runs):
    write_run(runs, "cpt", 3, 30, 0.1, dtype="bf16")
    write_run(runs, "static4", 3, 30, 0.1)
    write_run(runs, "static8", 3, 30, 0.1)
    with pytest.raises(SystemExit, match="cpt_3 differ in dtype: fp32 and bf16"):
        call_compare(runs, "--seeds", "1", "2", "3")
    with pytest.raises(SystemExit, match="static4_4.*is not there"):
        call_compare(runs, "--seeds", "1", "4")


@pytest.fixture
def stub(python_stub):
    environment, calls = python_stub
    return environment | {"TRAIN_FILE": "my train.json", "MODEL": "my model"}, calls


def test_compare_script_repeats_nothing_and_mixes_nothing(runs, stub, tmp_path, monkeypatch):
    (runs / "cpt_2" / "record.json").unlink()
    joint = tmp_path / "joint 2"
    joint.mkdir()
    (joint / "config.json").write_text(json.dumps({"lora_bank": ["4", "8"]}))
    environment, calls = stub
    environment |= {"OUTPUT_DIR": str(runs), "SEEDS": "1 2", "JOINT": str(tmp_path / "joint SEED")}
    (runs / "settings.txt").touch()  # the mark of compare.sh
    (runs / "joint_1").mkdir()
    (runs / "joint_1" / "record.json").write_text("{}")
    (tmp_path / "joint 1").mkdir()
    shutil.copy(joint / "config.json", tmp_path / "joint 1")
    command = ["bash", ROOT / "cpt" / "compare.sh", "--max_steps", "30", "--use_cpu"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "cpt_2/record.json is not there" in done.stderr and done.returncode == 1
    cpt, joined = calls()
    model_args, _, cyclic, training_args = parse(cpt[3:], monkeypatch)
    assert (model_args.model_name_or_path, training_args.max_steps, training_args.seed) == ("my model", 30, 2)
    assert cyclic.bit_widths == [4, 8] and cyclic.eval_bit_widths == [4, 5, 6, 7, 8] and training_args.do_train
    model_args, _, cyclic, training_args = parse(joined[3:], monkeypatch)
    assert model_args.model_name_or_path == str(joint) and not training_args.do_train and training_args.do_eval
    assert cyclic.eval_bit_widths == [4, 8] and training_args.output_dir == str(runs / "joint_2")
    done = subprocess.run([*command, "--learning_rate", "1"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "holds results of other settings" in done.stderr
    assert len(calls()) == 2


@pytest.mark.slow
def test_compare_script_end_to_end(run, argv, tiny_model, squad_files, tmp_path):
    with experiment("switch_precision"):
        words = argv("--bit_widths", 4, 8, out=tmp_path / "joint")
    at = words.index("--num_cyclic_period")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run_qa.py", *words[:at], *words[at + 2 :]])
        switch_run_qa.main()
    environment = os.environ | {
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        "MODEL": tiny_model,
        "TRAIN_FILE": squad_files[0],
        "VALIDATION_FILE": squad_files[1],
        "OUTPUT_DIR": str(tmp_path / "compare"),
        "SEEDS": "1 2",
        "JOINT": str(tmp_path / "joint"),
        "OMP_NUM_THREADS": "1",
    }
    flags = ["--max_steps", "4", "--num_cyclic_period", "2", "--use_cpu", "--max_seq_length", "96"]
    command = ["bash", ROOT / "cpt" / "compare.sh", *flags, "--doc_stride", "16", "--disable_tqdm", "True"]
    first = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert first.stdout.count("\n| static") == 4 and "| joint (switchable precision) | 1 | 4 |" in first.stdout
    summary = json.loads((tmp_path / "compare" / "summary.json").read_text())
    assert [row["runs"] for row in summary["rows"]] == [2, 2, 2, 1]
    assert list(summary["rows"][3]["scores"]) == ["W4A4KV4", "W8A8KV8"]
    again = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert again.stdout.count("is done") == 7


# ---- several processes


@pytest.mark.slow
def test_two_processes_equal_one_with_the_batch_of_both(argv, tmp_path):
    """Padded to one length: in GPT-2's own loss padding counts as a class, so the loss depends on how it is padded."""
    flags = (
        "--pad_to_max_length",
        "--train_sampling_strategy",
        "sequential",
        "--optim",
        "sgd",
        "--learning_rate",
        "0.01",
    )
    flags += ("--lr_scheduler_type", "constant", "--max_grad_norm", 0, "--max_steps", 4, "--eval_strategy", "steps")
    flags += ("--eval_steps", 2, "--save_steps", 2, "--metric_for_best_model", "f1", "--load_best_model_at_end")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        words = argv(*flags, "--per_device_train_batch_size", 8 // processes, out=tmp_path / f"{processes}")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        subprocess.run([*command, str(ROOT / "cpt" / "run_qa.py"), *words], check=True, env=environment)
    assert logged_bits(tmp_path / "2") == logged_bits(tmp_path / "1") == sequence(4, 2, 4, 8)
    one, two = history(tmp_path / "1"), history(tmp_path / "2")
    for expected, found in zip(one, two, strict=True):
        for key in {"loss", "grad_norm"} & expected.keys():
            assert found[key] == pytest.approx(expected[key], rel=1e-3), key
    # the mean gradient of both ranks at 4 bits is another than at 6: other bits on one rank would show here
    expected, found = weights(tmp_path / "1"), weights(tmp_path / "2")
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_range_test_counts_on_all_processes(argv, tmp_path):
    words = argv(*RANGE, "--per_device_train_batch_size", 4, out=tmp_path / "out")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "cpt" / "run_qa.py"), *words],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    )
    found = json.loads((tmp_path / "out" / "range_test.json").read_text())["accuracies"]
    assert len(sum(found, [])) == 32 and all((8 * value).is_integer() for value in sum(found, [])), "8 windows a step"
    assert done.stdout.count("| 2 | ") == 1


# ---- refusals, published command, shell


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--bit_widths", 4), "the lowest and the highest width"),
        (("--bit_widths", 4, 6, 8), "the lowest and the highest width"),
        (("--bit_widths", 4, 9), "--bit_widths 4 9: 9 is not a bit-width"),
        (("--bit_widths", 8, 32), "2 to 8, or twice 16 or 32"),
        (("--bit_widths", 8, 4), "the lowest width comes first"),
        (("--num_cyclic_period", 5), "--num_cyclic_period 5: allowed is 1 to --max_steps 4"),
        (("--num_cyclic_period", 0), "--num_cyclic_period 0: allowed is 1"),
        (("--max_steps", -1), "--max_steps is missing"),
        (("--period", "ceil"), "--period ceil: allowed are real, floor"),
        (("--cycle", "w", "g"), "--cycle w g: allowed are w, a, kv"),
        (("--fixed_bits", 9), "--fixed_bits 9: 9 is not a bit-width, allowed are 2 to 8, 16 or 32"),
        (("--eval_bit_widths", 4, 12), "--eval_bit_widths 4 12: 12 is not a bit-width"),
        (("--gradient_bits", 1), "--gradient_bits 1: allowed are 2 to 16, or 32"),
        (("--gradient_bits", 24), "--gradient_bits 24: allowed are 2 to 16, or 32"),
        (("--precision_range_test", "--range_test_window", 51), "2 to half of --range_test_steps 100"),
        (("--precision_range_test", "--range_test_share", 1.5), "allowed are above 0 up to 1"),
        (("--precision_range_test", "--bit_widths", 32, 32), "32 is no such width"),
        (("--precision_range_test", "--resume_from_checkpoint", "x"), "no --resume_from_checkpoint"),
        (("--lora_r", 0), "--lora_r 0: must be a number above 0"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_refused_before_any_compute(flags, message, run, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(*flags)
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == [".lock"]


PUBLISHED = """--model_name_or_path /path/to/model --dataset_name squad --do_train --do_eval
    --per_device_train_batch_size 32 --per_device_eval_batch_size 32 --seed 42 --learning_rate 5e-04
    --logging_strategy steps --logging_steps 10 --lr_scheduler_type linear --max_seq_length 786 --bf16 False
    --fp16 False --max_steps 1000 --output_dir ./results/your-output-directory --overwrite_output_dir
    --eval_strategy steps --eval_steps 512 --save_strategy steps --save_steps 500
    --lora_r 8 --lora_alpha 16 --bit_widths 4 8 --num_cyclic_period 32 --eval_bit_width 8"""


def parse(argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_qa.py", *argv])
    groups = (
        run_qa.arguments.ModelArguments,
        run_qa.DataTrainingArguments,
        run_qa.CyclicArguments,
        run_qa.TrainingArguments,
    )
    return run_qa.parse_args(*groups)


def test_published_command_is_understood(monkeypatch):
    model_args, data_args, cyclic, training_args = parse(shlex.split(PUBLISHED) + ["--use_cpu"], monkeypatch)
    assert cyclic.bit_widths == [4, 8] and cyclic.num_cyclic_period == 32 and cyclic.eval_bit_widths == [8]
    assert (model_args.lora_r, model_args.lora_alpha, training_args.bf16) == (8, 16, False)
    assert data_args.overwrite_output_dir and cyclic.gradient_bits == 32, "float gradients unless asked for"
    run_qa.check_args(cyclic, training_args)


@pytest.mark.parametrize("script", ["train.sh", "eval.sh"])
def test_scripts_run_from_anywhere_and_pass_flags_on(script, stub, tmp_path, monkeypatch):
    command = ["bash", ROOT / "cpt" / script, "--use_cpu", "--eval_bit_widths", "5", "6"]
    environment, calls = stub
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    (argv,) = calls()
    name = {"train.sh": "run_qa.py", "eval.sh": "run_qa_eval.py"}[script]
    assert argv[:3] == ["--standalone", "--nproc_per_node=1", str(ROOT / "cpt" / name)]
    if script == "eval.sh":
        monkeypatch.setattr(sys, "argv", ["run_qa_eval.py", *argv[3:]])
        groups = (run_qa_eval.EvalArguments, run_qa_eval.EvalDataArguments, run_qa.TrainingArguments)
        assert run_qa_eval.parse_args(*groups)[0].bit_configs == ["5", "6"]
        return
    model_args, data_args, cyclic, training_args = parse(argv[3:], monkeypatch)
    assert (model_args.model_name_or_path, data_args.train_file) == ("my model", "my train.json")
    assert cyclic.bit_widths == [4, 8] and cyclic.eval_bit_widths == [5, 6] and not training_args.bf16
    published = (training_args.max_steps, training_args.learning_rate, training_args.per_device_train_batch_size)
    assert published == (1000, 5e-4, 32) and (training_args.eval_steps, training_args.save_steps) == (512, 500)
    assert training_args.lr_scheduler_type == "linear" and cyclic.num_cyclic_period == 32
