"""switch_precision's tools: many-config evaluation, sensitivity sweep, gradient scores, search, statistics."""

import copy
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import run_qa as base_run_qa
from conftest import ROOT, experiment, save_tiny_tokenizer

with experiment("switch_precision"):
    import run_qa_eval
    import search
    import sensitivity
    from allocation import block_reuse, gradient_scores, measure_set, problem
    from allocation import flips as flips_of
    from common import noise
    from common import statistics as eval_stats
    from common.record import write_state
    from models.fast import integer as integer_products
    from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering
    from utils_qa import prepare_train_features, prepare_validation_features

DATA = ["--max_seq_length", "48", "--doc_stride", "8", "--per_device_eval_batch_size", "4"]
COMMON = [*DATA, "--use_cpu", "True", "--disable_tqdm", "True", "--seed", "3"]


def make_bank(tiny_model, folder, widths=(4, 8), seed=0):
    """A checkpoint with a LoRA bank of random adapters, strong enough that widths disagree."""
    torch.manual_seed(seed)
    model = QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model)
    model.add_lora(list(widths))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
            elif name == "qa_outputs.weight":
                parameter.normal_(std=0.5)
    model.set_base(tiny_model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bank(tiny_model, tmp_path_factory):
    return make_bank(tiny_model, tmp_path_factory.mktemp("bank"))


@pytest.fixture
def run(monkeypatch, bank, squad_files, tmp_path):
    """run(module, *flags) calls its main() on bank and dev file; later flags win; returns the output folder."""

    def call(module, *flags, out="out", model=bank):
        argv = ["x.py", "--model_name_or_path", model, "--validation_file", squad_files[1], *COMMON]
        monkeypatch.setattr(sys, "argv", [*argv, "--output_dir", str(tmp_path / out), *flags])
        module.main()
        return tmp_path / out

    return call


def read(path):
    return json.loads(path.read_text())


def rows_of(folder):
    return {
        row["config"]: {key: value for key, value in row.items() if key != "seconds"}
        for row in read(folder / "record.json")["rows"]
    }


@pytest.fixture
def count(monkeypatch):
    """count(object, name) counts the calls of an attribute: a list that grows."""

    def wrap(owner, name):
        calls, original = [], getattr(owner, name)

        def counted(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
        return calls

    return wrap


# ---- evaluation of many configs


def test_execution_on_integers_is_the_default_and_gives_the_answers_of_fake_quantization(run, count):
    products = count(integer_products, "int_mm")
    integer = rows_of(run(run_qa_eval, "--bit_configs", "8", "W4A8KV8", out="integer"))
    assert products
    del products[:]
    assert rows_of(run(run_qa_eval, "--bit_configs", "8", "W4A8KV8", "--execution", "fake", out="fake")) == integer
    assert not products
    with pytest.raises(ValueError, match="--execution int4: allowed are integer, fake"):
        run(run_qa_eval, "--execution", "int4", out="refused")


def test_an_evaluation_keeps_only_codes_unless_a_config_needs_floats(run, monkeypatch, tiny_model, tmp_path):
    models, load = [], run_qa_eval.load_model
    monkeypatch.setattr(run_qa_eval, "load_model", lambda *args: models.append(load(*args)) or models[-1])
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps({"default": 8, "transformer.h.0.mlp.*": 4}))
    out = run(run_qa_eval, "--bit_configs", "8", str(mixed))
    for name, layer in models[0].quant_layers().items():
        assert layer.weight is None and set(layer.stored_codes()) == ({4, 8} if ".h.0.mlp." in name else {8})
    rows = rows_of(out)
    shapes = models[0].layer_shapes()
    assert rows["W8A8KV8"]["weight_mb"] == sum(out * (inp + 4) for out, inp in shapes.values()) / 1e6
    kept = rows_of(run(run_qa_eval, "--bit_configs", "8", "32", model=tiny_model, out="floats"))
    assert all(layer.weight is not None for layer in models[1].quant_layers().values())
    only = rows_of(run(run_qa_eval, "--bit_configs", "8", model=tiny_model, out="codes"))
    assert only["W8A8KV8"]["exact_match"] == kept["W8A8KV8"]["exact_match"]


def test_table_equals_single_evaluations_with_one_load_and_one_tokenization(run, count, bank, squad_files, tmp_path):
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps({"default": 8, "transformer.h.0.mlp.*": 4}))
    loads = count(run_qa_eval, "load_model")
    tokenizations = count(run_qa_eval, "build_features")
    out = run(run_qa_eval, "--bit_configs", "8", "4", "W4A8KV8", str(mixed))
    assert len(loads) == len(tokenizations) == 1
    rows = rows_of(out)
    assert list(rows) == ["W8A8KV8", "W4A4KV4", "W4A8KV8", "mixed"]
    assert [row["average_w_bits"] for row in rows.values()] == pytest.approx([8, 4, 4, 8 - 4 * 8 / 24])
    assert [row["relative_bitops"] for row in rows.values()] == pytest.approx([1, 0.25, 0.5, 1 - 0.75 * 8 / 24])
    table = (out / "table.md").read_text()
    for name, text in zip(rows, ("W8A8KV8", "W4A4KV4", "W4A8KV8", str(mixed)), strict=True):
        assert f"| {name} " in table
        with pytest.MonkeyPatch.context() as patch:
            argv = ["run_qa.py", "--model_name_or_path", bank, "--validation_file", squad_files[1], *COMMON]
            patch.setattr(
                sys, "argv", [*argv, "--do_eval", "--bit_config", text, "--output_dir", str(tmp_path / "one")]
            )
            base_run_qa.main()
        metrics = read(tmp_path / "one" / "record.json")["metrics"]
        assert rows[name]["exact_match"] == metrics["eval_exact_match"] and rows[name]["f1"] == metrics["eval_f1"]
        (folder,) = out.glob(f"{name}-*")
        assert read(folder / "eval_predictions.json") == read(tmp_path / "one" / "eval_predictions.json")
    record = read(folder / "record.json")
    assert record["bit_config"]["name"] == "mixed" and len(record["bit_config"]["layers"]) == 8
    assert record["metrics"]["eval_f1"] == metrics["eval_f1"] and record["data"]["validation"]["examples"] == 14


def test_random_precision_answers_every_question_at_a_config_drawn_for_it(run, count, capsys):
    predictions = count(run_qa_eval.QuestionAnsweringTrainer, "predict_texts")
    flags = ("--bit_configs", "8", "--random_precision", "8", "W4A2KV2")
    record = read(run(run_qa_eval, *flags) / "record.json")
    found, low = record["random_precision"], rows_of(run(run_qa_eval, "--bit_configs", "W4A2KV2"))["W4A2KV2"]
    assert len(predictions) == 2, "each config once"
    for key in ("exact_match", "f1"):
        high, spread = record["rows"][0][key], found[key]
        assert spread["expected"] == pytest.approx((high + low[key]) / 2)
        assert spread["min"] <= spread["expected"] <= spread["max"]
    assert found["configs"] == ["W8A8KV8", "W4A2KV2"] and "drawn for it: EM" in capsys.readouterr().out
    assert read(run(run_qa_eval, *flags) / "record.json")["random_precision"] == found, (
        "the same seed, the same spread"
    )
    with pytest.raises(ValueError, match="--random_precision 8 W8A8KV8: one precision is no choice"):
        run(run_qa_eval, "--random_precision", "8", "W8A8KV8")


def test_spread_over_draws_is_that_of_a_binomial():
    """100 questions that one config gets right and the other wrong: sd of the mean 5 points, by hand."""
    spread, line = eval_stats.spread_over_draws({"a": [(1, 1)] * 100, "b": [(0, 0.5)] * 100}, seed=0)
    assert spread["exact_match"]["expected"] == 50 and spread["f1"]["expected"] == 75
    assert spread["exact_match"]["std"] == pytest.approx(5, abs=0.5) and spread["f1"]["std"] == pytest.approx(
        2.5, abs=0.3
    )
    assert line.startswith("Each question at one of a, b, drawn for it: EM 50.00 (")


def test_published_command_and_default_configs(run, capsys):
    published = "--dataset_name squad --do_eval --per_device_eval_batch_size 32 --seed 42 --max_seq_length 786"
    out = run(run_qa_eval, *published.split(), "--overwrite_output_dir")
    assert list(rows_of(out)) == ["W8A8KV8", "W4A4KV4"], "the uniform widths of the bank, highest first"
    assert "| W4A4KV4 " in capsys.readouterr().out
    assert list(rows_of(run(run_qa_eval, "--sp_config_path", str(ROOT / "configs" / "attn4_mlp8.json")))) == [
        "attn4_mlp8"
    ]
    assert list(rows_of(run(run_qa_eval, "--eval_bit_width", "4"))) == ["W4A4KV4"]


def test_checkpoint_without_bank_is_evaluated_as_it_is(run, tiny_model):
    out = run(run_qa_eval, model=tiny_model)
    assert list(rows_of(out)) == ["checkpoint"]


@pytest.mark.parametrize("changed", [{"git": {"commit": "another", "dirty": False}}, {"threads": 99}])
def test_rows_of_other_code_or_another_machine_are_not_taken(changed, run, count, monkeypatch):
    predictions = count(run_qa_eval.QuestionAnsweringTrainer, "predict_texts")
    run(run_qa_eval, "--bit_configs", "8")
    other = run_qa_eval.surroundings() | changed
    monkeypatch.setattr(run_qa_eval, "surroundings", lambda: other)
    run(run_qa_eval, "--bit_configs", "8")
    assert len(predictions) == 2


def test_resume_evaluates_only_what_is_missing(run, count, tmp_path):
    predictions = count(run_qa_eval.QuestionAnsweringTrainer, "predict_texts")
    whole = run(run_qa_eval, "--bit_configs", "8", "4", "W4A8KV8", out="whole")
    assert len(predictions) == 3
    run(run_qa_eval, "--bit_configs", "8")
    out = run(run_qa_eval, "--bit_configs", "8", "4", "W4A8KV8")
    assert len(predictions) == 6 and rows_of(out) == rows_of(whole)
    (folder,) = out.glob("W4A4KV4-*")
    (folder / "record.json").unlink()  # as a kill between the predictions and the record leaves it
    out = run(run_qa_eval, "--bit_configs", "8", "4", "W4A8KV8")
    assert len(predictions) == 7 and rows_of(out) == rows_of(whole)
    copied = tmp_path / "copied.json"
    copied.write_text('{"default": 4}')
    assert (
        rows_of(run(run_qa_eval, "--bit_configs", "8", str(copied)))["copied"]["f1"] == rows_of(whole)["W4A4KV4"]["f1"]
    )
    assert len(predictions) == 7, "the same bits under another name"
    run(run_qa_eval, "--bit_configs", "8", "--max_eval_samples", "6")
    assert len(predictions) == 8, "other data"
    run(run_qa_eval, "--bit_configs", "8", "--overwrite_output_dir")
    assert len(predictions) == 9


def test_other_weights_are_evaluated_anew(run, count, tiny_model, tmp_path):
    other = make_bank(tiny_model, tmp_path / "other", seed=5)
    predictions = count(run_qa_eval.QuestionAnsweringTrainer, "predict_texts")
    run(run_qa_eval, "--bit_configs", "8")
    run(run_qa_eval, "--bit_configs", "8", model=other)
    assert len(predictions) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", 3),
        ("n_head", 2),
        ("layer_norm_epsilon", 0.1),
        ("activation_function", "relu"),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
    ],
)
def test_what_changes_the_answers_is_evaluated_anew(key, value, run, swept, count, bank, tiny_model, tmp_path):
    other, base = tmp_path / "other", tmp_path / "base"
    shutil.copytree(bank, other)
    shutil.copytree(tiny_model, base)
    predictions = count(run_qa_eval.QuestionAnsweringTrainer, "predict_texts")
    run(run_qa_eval, "--bit_configs", "8", model=str(other))
    run(run_qa_eval, "--bit_configs", "8", model=bank)
    assert len(predictions) == 1, "the same model elsewhere"
    for folder in (other, base) if key != "lora_alpha" else (other,):
        config = read(folder / "config.json")
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
    moved = ("--base_model_name_or_path", str(base))
    run(run_qa_eval, "--bit_configs", "8", *moved, model=str(other))
    assert len(predictions) == 2
    with pytest.raises(ValueError, match="swept a checkpoint with checksum"):
        run(search, "--sensitivity_file", swept, "--average_bits", "6", *moved, model=str(other))


def test_other_data_flags_and_tokenizer_are_evaluated_anew(run, count, squad_files, tmp_path):
    """The data are known by their content, from wherever they come."""
    data = tmp_path / "dev.json"
    data.write_text(pathlib.Path(squad_files[1]).read_text() + "\n")
    predictions = count(run_qa_eval.QuestionAnsweringTrainer, "predict_texts")
    run(run_qa_eval, "--bit_configs", "8")
    run(run_qa_eval, "--bit_configs", "8", "--validation_file", str(data))
    assert len(predictions) == 1
    data.write_text(data.read_text().replace('"question": "What does ', '"question": "What did '))
    run(run_qa_eval, "--bit_configs", "8", "--validation_file", str(data))
    run(run_qa_eval, "--bit_configs", "8", "--n_best_size", "5")
    run(run_qa_eval, "--bit_configs", "8", "--attn_implementation", "eager")
    save_tiny_tokenizer(tmp_path / "tokenizer", vocab_size=300)
    run(run_qa_eval, "--bit_configs", "8", "--tokenizer_name", str(tmp_path / "tokenizer"))
    assert len(predictions) == 5


def damages(whole):
    """An empty file, half of one, one with a flipped bit in its content."""
    at = len(whole) * 2 // 3
    return [b"", whole[: len(whole) // 2], whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]]


@pytest.mark.parametrize("name", ["record.json", "eval_predictions.json", "eval_nbest_predictions.json"])
def test_damaged_evaluation_is_named_and_made_again(name, run, count, caplog):
    out = run(run_qa_eval, "--bit_configs", "8", "4")
    rows, (folder,) = rows_of(out), out.glob("W4A4KV4-*")
    whole = (folder / "eval_predictions.json").read_bytes()
    predictions = count(run_qa_eval.QuestionAnsweringTrainer, "predict_texts")
    for number, damage in enumerate(damages((folder / name).read_bytes()), 1):
        (folder / name).write_bytes(damage)
        caplog.clear()
        assert rows_of(run(run_qa_eval, "--bit_configs", "8", "4")) == rows and len(predictions) == number
        named = [r for r in caplog.records if r.levelname == "WARNING" and str(folder / name) in r.getMessage()]
        assert len(named) == 1 and (folder / "eval_predictions.json").read_bytes() == whole


def test_all_faulty_configs_are_refused_before_any_work(run, count, tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text('{"default": 9, "transformer.h.7.*": 4}')
    loads = count(run_qa_eval, "load_data")
    with pytest.raises(ValueError) as error:
        run(run_qa_eval, "--bit_configs", "8", "5", str(bad), "missing.json", "W6A8", "4")
    message = str(error.value)
    parts = ("5: ", "w_bits = 5", "['4', '8']", "bad.json", "9 is not a bit-width", "matches no layer")
    for part in (*parts, "missing.json", "W6A8"):
        assert part in message, message
    assert not loads and not (tmp_path / "out").exists()


def test_training_flags_are_refused(run):
    with pytest.raises(ValueError, match="only evaluates"):
        run(run_qa_eval, "--do_train")


def test_noise_floor(run, squad_files):
    folder = run(run_qa_eval, "--bit_configs", "8", "4", "--noise_floor")
    rows = read(folder / "record.json")["rows"]
    for row in rows:
        low, high = row["noise_floor"]["exact_match"]
        scores = [row["exact_match"], *row["noise_floor"]["variants"].values()]
        assert [low, high] == [min(scores), max(scores)] and 0 <= row["noise_floor"]["changed"] <= 1
    names = {"fake execution", "float16 embeddings", "perturbed 1", "perturbed 2"}
    assert set(rows[0]["noise_floor"]["variants"]) == names
    assert "noise floor" in (folder / "table.md").read_text()
    plain = run(run_qa_eval, "--bit_configs", "8", "4", out="plain")
    assert "noise floor" not in (plain / "table.md").read_text()


def test_variants_of_the_noise_floor_change_the_model_and_leave_it_as_it_was(bank):
    model = QuantGPT2ForQuestionAnswering.from_pretrained(bank)
    model.set_execution("integer")
    weight, positions, seen = model.transformer.wte.weight, model.transformer.wpe.weight, {}
    before, places = weight.detach().clone(), positions.detach().clone()
    for name, context in noise.variants(model, 0).items():
        with context:
            seen[name] = model.execution.kind, (weight / before - 1).abs().nan_to_num().max().item()
            moved = places.half().float() if name == "float16 embeddings" else places
            assert torch.equal(positions, moved)
        assert torch.equal(weight, before) and torch.equal(positions, places) and model.execution.kind == "integer"
    assert seen["fake execution"] == ("fake", 0)
    model.set_execution("fake")
    with noise.variants(model, 0)["integer execution"]:
        assert model.execution.kind == "integer"
    model.set_execution("integer")
    assert 1e-6 < seen["perturbed 1"][1] < 1e-5 and seen["perturbed 1"] != seen["perturbed 2"]
    assert 1e-5 < seen["float16 embeddings"][1] < 1e-2
    texts, answers = {"a": "x", "b": "y"}, iter([{"a": "x", "b": "y"}] * 3 + [{"a": "x", "b": "z"}])
    floor = noise.noise_floor(model, lambda: next(answers), lambda found: 50.0 * (found == texts), texts, 0)
    assert floor["exact_match"] == [0, 50] and floor["changed"] == 0.5


def test_outliers_are_measured_printed_and_drawn(run, squad_files, tiny_model, figures, tmp_path):
    """A channel whose gain is raised is seen where its LayerNorm is read, and nowhere else in that block."""
    model = QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model)
    model.transformer.h[1].ln_2.weight.data[3] *= 1000
    model.save_pretrained(tmp_path / "loud")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "loud")
    training = ("--train_file", squad_files[0], "--calibration_samples", "4")
    flags = ("--bit_configs", "8", "--measure_outliers", *training)
    folder = run(run_qa_eval, *flags, model=str(tmp_path / "loud"))
    found = read(folder / "record.json")["outliers"]
    loud = max(found, key=found.get)
    assert loud == "transformer.h.1.mlp.c_fc" and 100 < found[loud]
    assert all(1 <= size < 100 for name, size in found.items() if not name.startswith("transformer.h.1.mlp"))
    assert f"{found[loud]:.1f}" in (folder / "table.md").read_text()
    (axes, _) = figures["outliers"].axes
    assert axes.images[0].get_array().max() == pytest.approx(found[loud])
    rotated = run(run_qa_eval, *flags, "--quantizer", "rotated", out="rotated", model=str(tmp_path / "loud"))
    assert read(rotated / "record.json")["outliers"] == found, "the same windows"


# ---- statistics


def test_bootstrap_is_the_mean_of_resampled_questions_and_paired():
    scores = np.random.default_rng(1).random((7, 3))
    rng = np.random.default_rng(5)
    expected = [scores[rng.integers(7, size=7)].mean(0) for _ in range(20)]
    np.testing.assert_allclose(eval_stats.bootstrap_means(scores, 20, 5), expected)
    # two columns that differ by a constant have a difference without spread
    means = eval_stats.bootstrap_means(np.stack([scores[:, 0], scores[:, 0] + 0.5], 1), 20, 5)
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 0.5)
    assert eval_stats.intervals(np.arange(101.0)[:, None]) == [[2.5, 97.5]]


@pytest.mark.parametrize(
    ("only_reference", "only_other", "p"),
    [(0, 0, 1.0), (3, 3, 1.0), (5, 1, 2 * (1 + 6) / 2**6), (1, 5, 2 * (1 + 6) / 2**6), (10, 0, 2 / 2**10)],
)
def test_mcnemar_by_hand(only_reference, only_other, p):
    reference = [1] * 4 + [0] * 4 + [1] * only_reference + [0] * only_other
    other = [1] * 4 + [0] * 4 + [0] * only_reference + [1] * only_other
    assert eval_stats.mcnemar(reference, other) == pytest.approx(p)


def test_compare_by_hand():
    scores = {
        "a": [(1.0, 1.0), (1.0, 1.0), (0.0, 0.5), (0.0, 0.5)],
        "b": [(1.0, 1.0), (0.0, 0.5), (0.0, 0.5), (0.0, 0.0)],
    }
    rows = eval_stats.compare(scores, "a", 2000, 0)
    assert (rows["a"]["exact_match"], rows["a"]["f1"], rows["b"]["exact_match"], rows["b"]["f1"]) == (50, 75, 25, 50)
    assert rows["b"]["exact_match_drop"] == 25 and rows["b"]["f1_drop"] == 25 and rows["b"]["mcnemar_p"] == 1
    # the EM difference is right on 1 of 4 questions: resamples hold it 0 to 4 times, more than 3 with p = 1 / 256
    assert rows["b"]["exact_match_drop_interval"] == [0, 75] and rows["a"]["exact_match_drop_interval"] == [0, 0]
    assert eval_stats.compare(scores, "a", 0, 0)["b"]["f1_interval"] is None


# ---- reuse of hidden states, measures


@pytest.fixture
def tools(bank, squad_files):
    """(model, MeasureSet of the dev file with windows of several lengths)."""
    model = QuantGPT2ForQuestionAnswering.from_pretrained(bank)
    tokenizer = AutoTokenizer.from_pretrained(bank)
    tokenizer.pad_token = tokenizer.eos_token
    data = sensitivity.DataTrainingArguments(validation_file=squad_files[1], max_seq_length=22, doc_stride=4)
    arguments = sensitivity.TrainingArguments("unused", use_cpu=True, per_device_eval_batch_size=5, disable_tqdm=True)
    model_args = sensitivity.SweepArguments(model_name_or_path=bank)
    return model, measure_set.load_measure_set(model, tokenizer, model_args, data, arguments, 2)[0]


@pytest.fixture
def configs(tools):
    return sensitivity.resolve_configs(tools[0], ["8", "4", "W4A8KV8"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_reused_hidden_states_give_exactly_the_plain_logits(attention, tools, configs):
    model, measures = tools
    model.set_attn_implementation(attention)
    reference = configs["W8A8KV8"]
    lows = {name: configs[name] for name in ("W4A4KV4", "W4A8KV8")}
    flips = flips_of.make_flips(reference, flips_of.lowered(reference, lows, ["together"]))
    assert len(flips) == 2 * (8 + 2 + 6 + 1)
    flipped = [reference | {name: configs[f["low_bits"]][name] for name in f["layers"]} for f in flips.values()]
    forward = block_reuse.ReusedForward(model)
    distinct = set()
    last = len(measures.ids) - 1
    for batch, padded in (([0, 1, 2], False), ([0, 5, last - 1, last], True)):  # windows are sorted by length
        inputs, real, _, _ = measures.tensors(batch)
        assert real.all() != padded
        before, found = forward.block_forwards, list(forward.logits(inputs, reference, [*flipped, reference]))
        # per low width: 4 linears x (2 + 1), blocks 2 + 1, six types x 2, all 2
        assert forward.block_forwards - before == 2 + 2 * (12 + 3 + 12 + 2)
        for config, logits in zip([reference, *flipped, reference], found, strict=True):
            with model.at_bits(config), torch.no_grad():
                plain = model(**inputs)
            assert torch.equal(logits, torch.stack([plain.start_logits, plain.end_logits]))
            distinct.add(logits.sum().item())
    assert len(distinct) > len(flips), "flips change the logits"


def test_bits_are_back_when_a_reused_forward_is_left_early(tools, configs):
    model, measures = tools
    model.set_bit_config("W4A8KV8")
    inputs, _, _, _ = measures.tensors(measures.batches[0])
    for _ in block_reuse.ReusedForward(model).logits(inputs, configs["W8A8KV8"], [configs["W4A4KV4"]]):
        break
    assert model.config.bit_config == configs["W4A8KV8"]
    assert not any(block._forward_pre_hooks for block in model.transformer.h)


def test_gold_labels_are_those_of_training(tools, bank):
    tokenizer, examples = AutoTokenizer.from_pretrained(bank), tools[1].examples
    settings = {"tokenizer": tokenizer, "max_seq_length": 22, "doc_stride": 4, "separator": "\n"}
    trained = prepare_train_features(examples[:], **settings)
    features = prepare_validation_features(examples[:], **settings)
    features = examples.from_dict({key: features[key] for key in ("example_id", "offset_mapping")})
    labels = measure_set.gold_labels(features, examples)
    assert labels.tolist() == [list(pair) for pair in zip(trained["start_positions"], trained["end_positions"])]
    assert (labels == 0).all(1).any() and (labels > 0).all(1).any(), "windows with and without the answer"


def test_chunks_hold_whole_questions(tools):
    measures = tools[1]
    chunk_ids = [{measures.ids[index] for batch in chunk for index in batch} for chunk in measures.chunks]
    assert len(chunk_ids) > 1 and sum(map(len, chunk_ids)) == len(set().union(*chunk_ids)) == 14
    assert sorted(index for batch in measures.batches for index in batch) == list(range(len(measures.ids)))
    assert len(measures.ids) > 14, "questions of several windows"


def test_span_measures_by_hand():
    torch.manual_seed(0)
    logits, other = torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    real = torch.tensor([[True, True, True, False]])
    labels = torch.tensor([[1, 2]])
    p, q = logits[:, 0, :3].softmax(-1), other[:, 0, :3].softmax(-1)
    expected = -(p[0, 1].log() + p[1, 2].log()) / 2
    torch.testing.assert_close(measure_set.span_nll(logits, real, labels), expected[None])
    torch.testing.assert_close(measure_set.span_kl(logits, other, real), (p * (p / q).log()).sum(-1).mean()[None])
    assert measure_set.span_kl(logits, other, torch.zeros(1, 4, dtype=torch.bool)).tolist() == [0.0]


# ---- sweep


def comparable(folder):
    record = read(folder / "sensitivity.json")
    return [record[key] for key in ("metrics", "flips", "rank_correlations", "identity")]


SWEEP = ("--chunk_batches", "1", "--num_gradient_batches", "2", "--num_bootstrap", "50", "--low_bits", "4", "W4A8KV8")


def test_sweep_equals_separate_evaluations(run, figures, tmp_path, capsys):
    record = read(run(sensitivity, *SWEEP) / "sensitivity.json")
    flips = record["flips"]
    picked = ["W4A4KV4: transformer.h.1.mlp.c_fc", "W4A4KV4: block 0", "W4A8KV8: attn", "W4A4KV4: all"]
    files = []
    for number, key in enumerate(picked):
        low = record["identity"]["low_bits"][flips[key]["low_bits"]]
        files.append(str(tmp_path / f"{number}.json"))
        config = {"default": 8} | {layer: low[layer] for layer in flips[key]["layers"]}
        (tmp_path / f"{number}.json").write_text(json.dumps(config))
    rows = rows_of(run(run_qa_eval, "--bit_configs", "8", *files, "--num_bootstrap", "50", out="eval"))
    assert {k: record["metrics"][k] for k in ("exact_match", "f1")} == {
        k: rows["W8A8KV8"][k] for k in ("exact_match", "f1")
    }
    for number, key in enumerate(picked):
        assert len(flips[key]["f1_drop_interval"]) == 2
        for name, value in rows[str(number)].items():  # all but bits and cost
            if name in flips[key]:
                assert flips[key][name] == value, (key, name)
    assert record["metrics"]["kl"] == 0 and all(flip["kl"] > 0 for flip in flips.values())
    cost = record["cost"]
    batches = len(list((tmp_path / "out" / "state").glob("chunk-*")))
    assert cost["block_forwards"] == batches * (2 + 2 * 29) and cost["plain_block_forwards"] == batches * 2 * 35
    ranks = record["rank_correlations"]  # first order is about weights, so where only they change
    assert ranks["W4A4KV4"]["fisher_window"]["kl"] > 0.6, ranks
    assert ranks["W4A8KV8"]["first_order"]["loss_increase"] > 0.6, ranks
    printed = capsys.readouterr().out
    assert "| W4A4KV4: transformer.h.0.attn.c_attn " in printed and "block forwards" in printed
    panels = [axes for axes in figures["sensitivity"].axes if axes.images]
    assert len(panels) == 2 * len(record["identity"]["low_bits"]) and (tmp_path / "out" / "sensitivity.png").is_file()
    for axes in panels:
        low, drop = axes.get_title().split()[-1], axes.get_title().startswith("EM drop")
        layers = [key for key in flips if key.startswith(f"{low}: transformer.")]
        assert sorted(axes.images[0].get_array().ravel().tolist()) == sorted(
            flips[key]["exact_match_drop" if drop else "kl"] for key in layers
        )


def test_interrupted_sweep_goes_on_without_repeating_work(run, monkeypatch, count, tmp_path):
    whole = comparable(run(sensitivity, *SWEEP, out="whole"))
    original, done = sensitivity.measure_chunk, []

    def stop_at_the_third(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(args)
        return original(*args)

    monkeypatch.setattr(sensitivity, "measure_chunk", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(sensitivity, *SWEEP)
    assert not (tmp_path / "out" / "sensitivity.json").exists()
    monkeypatch.setattr(sensitivity, "measure_chunk", original)
    again = count(sensitivity, "measure_chunk")
    assert comparable(run(sensitivity, *SWEEP)) == whole
    total = len(list((tmp_path / "whole" / "state").glob("chunk-*")))
    assert len(again) == total - 2
    with pytest.raises(ValueError, match="other settings.*low_bits.*--overwrite_output_dir"):
        run(sensitivity, *SWEEP, "--low_bits", "4")
    run(sensitivity, *SWEEP, "--low_bits", "4", "--overwrite_output_dir")
    assert len(again) == 2 * total - 2


OPERANDS = ("--chunk_batches", "1", "--num_bootstrap", "50", "--low_bits", "4", "--operands", "w", "a", "kv")


def test_sweep_of_single_operands_equals_separate_evaluations(run, figures, tmp_path, capsys):
    folder = run(sensitivity, *OPERANDS, "--num_gradient_batches", "2")
    record, printed = read(folder / "sensitivity.json"), capsys.readouterr().out
    flips, files = record["flips"], []
    picked = {
        "w: transformer.h.1.mlp.c_fc": "w_bits",
        "a: block 0": "a_bits",
        "a: mlp": "a_bits",
        "kv: all": "kv_bits",
    }
    for number, (key, field) in enumerate(picked.items()):
        flip = flips[f"W4A4KV4 {key}"]
        assert flip["operand"] == field.removesuffix("_bits") and f"| W4A4KV4 {key} " in printed
        files.append(str(tmp_path / f"{number}.json"))
        config = {"default": 8} | {layer: {field: 4} for layer in flip["layers"]}
        pathlib.Path(files[-1]).write_text(json.dumps(config))
    rows = rows_of(run(run_qa_eval, "--bit_configs", "8", *files, "--num_bootstrap", "50", out="eval"))
    for number, key in enumerate(picked):
        for name, value in rows[str(number)].items():
            if name in flips[f"W4A4KV4 {key}"]:
                assert flips[f"W4A4KV4 {key}"][name] == value, (key, name)
    assert record["identity"]["operands"] == ["w", "a", "kv"] and record["identity"]["quantizer"] == "minmax"
    assert record["bit_config"]["quantizer"] == "minmax"
    assert list(record["rank_correlations"]) == ["W4A4KV4 w", "W4A4KV4 a", "W4A4KV4 kv"]
    assert record["rank_correlations"]["W4A4KV4 w"]["fisher_window"]["kl"] > 0.6
    panels = [axes for axes in figures["sensitivity"].axes if axes.images]
    assert [axes.get_title().split("one linear at ")[1] for axes in panels[::2]] == list(record["rank_correlations"])
    for axes in panels:
        name, drop = axes.get_title().split("one linear at ")[1], axes.get_title().startswith("EM drop")
        shown = axes.images[0].get_array().compressed().tolist()
        expected = [flip for key, flip in flips.items() if key.startswith(f"{name}: transformer.")]
        assert sorted(shown) == sorted(flip["exact_match_drop" if drop else "kl"] for flip in expected)
        assert len(axes.texts) == len(expected) == (2 if name.endswith("kv") else 8)


def test_interrupted_sweep_of_single_operands_goes_on_and_is_not_that_of_others(run, monkeypatch, count):
    flags = (*OPERANDS, "--num_gradient_batches", "0")
    whole = comparable(run(sensitivity, *flags, out="whole"))
    original, done = sensitivity.measure_chunk, []

    def stop_at_the_second(*args):
        if done:
            raise KeyboardInterrupt
        done.append(args)
        return original(*args)

    monkeypatch.setattr(sensitivity, "measure_chunk", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(sensitivity, *flags)
    monkeypatch.setattr(sensitivity, "measure_chunk", original)
    again = count(sensitivity, "measure_chunk")
    folder = run(sensitivity, *flags)
    assert comparable(folder) == whole and len(again) == len(list((folder / "state").glob("chunk-*"))) - 1
    with pytest.raises(ValueError, match="other settings.*operands"):
        run(sensitivity, *flags, "--operands", "w", "a")


@pytest.mark.parametrize("name", ["identity.json", "chunk-00000.json"])
def test_damaged_state_of_a_sweep_is_named_and_measured_again(name, run, count, tmp_path, caplog):
    whole = comparable(run(sensitivity, *SWEEP))
    path, chunks = tmp_path / "out" / "state" / name, len(list((tmp_path / "out" / "state").glob("chunk-*")))
    again = count(sensitivity, "measure_chunk")
    for damage in damages(path.read_bytes()):
        path.write_bytes(damage)
        caplog.clear()
        del again[:]
        assert comparable(run(sensitivity, *SWEEP)) == whole
        assert len(again) == (chunks if name == "identity.json" else 1)
        named = [r for r in caplog.records if r.levelname == "WARNING" and str(path) in r.getMessage()]
        assert len(named) == 1


def test_sweep_of_a_changed_model_is_refused(run, bank, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(bank, other)
    run(sensitivity, *SWEEP, model=str(other))
    config = read(other / "config.json")
    (other / "config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] + 1}))
    with pytest.raises(ValueError, match="other settings .model_sha256: '[0-9a-f]+' then, '[0-9a-f]+' now"):
        run(sensitivity, *SWEEP, model=str(other))


@pytest.mark.slow
def test_killed_sweep_goes_on(run, bank, squad_files, tmp_path):
    whole = comparable(run(sensitivity, *SWEEP, out="whole"))
    command = [sys.executable, str(ROOT / "switch_precision" / "sensitivity.py"), "--model_name_or_path", bank]
    command += ["--validation_file", squad_files[1], *COMMON, *SWEEP, "--output_dir", str(tmp_path / "out")]
    process = subprocess.Popen(command)
    while len(list((tmp_path / "out").glob("state/chunk-*.json"))) < 2 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True)
    assert comparable(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--low_bits", "8"), "allowed are configs other than"),
        (("--low_bits", "5", "nothing.json"), r"(?s)w_bits = 5.*nothing\.json"),
        (("--measure_split", "test"), "allowed are validation, train"),
        (("--operands", "w", "k"), "--operands w k: allowed are together, or some of w a kv"),
        (("--operands", "together", "w"), "--operands together w: allowed are together, or some of"),
        (("--operands", "w", "a", "--low_bits", "W4A8KV8"), "--operands a: W4A8KV8 .*as --reference_config W8A8KV8"),
        (("--chunk_batches", "0"), "--chunk_batches 0: must be a number above 0"),
    ],
)
def test_sweep_refusals(flags, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(sensitivity, *flags)
    assert not (tmp_path / "out").exists()


# ---- gradient scores


def test_the_layer_alone_gives_what_the_flipped_model_gives(tools, configs):
    model, measures = tools
    inputs, _, _, _ = measures.tensors(measures.batches[0])
    name = "transformer.h.0.attn.c_attn"  # the first linear: its input does not depend on bits
    layer, seen = model.quant_layers()[name], []
    hook = layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    for config in (configs["W8A8KV8"], configs["W8A8KV8"] | {name: configs["W4A4KV4"][name]}):
        with model.at_bits(config), torch.no_grad():
            model(**inputs)
    hook.remove()
    with model.at_bits("W8A8KV8"):
        assert torch.equal(gradient_scores.alone(layer, seen[0][0], configs["W4A4KV4"][name]), seen[1][1])
        assert not torch.equal(seen[0][1], seen[1][1]) and layer.w_bits == layer.kv_bits == 8


def test_first_order_score_is_the_directional_derivative(tools, configs):
    """d loss / d e of y + e (y_low - y) at e = 0, at a float reference, where the network is smooth."""
    model, measures = tools
    model = copy.deepcopy(model).double()
    for layer in model.quant_layers().values():
        layer.lora_A["32"], layer.lora_B["32"] = layer.lora_A["8"], layer.lora_B["8"]
    reference = model.set_bit_config(32)
    found = gradient_scores.gradient_scores(model, measures, reference, {"low": configs["W4A4KV4"]}, 10**6, 0)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("lora_A" in name for name in trainable), "requires_grad is back"
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"):
        layer, losses = model.quant_layers()[name], []
        for step in (-1e-4, 1e-4):

            def mix(module, args, output, step=step, name=name):
                low = gradient_scores.alone(module, args[0], configs["W4A4KV4"][name])
                return output + step * (low - output)

            hook, loss = layer.register_forward_hook(mix), 0.0
            for batch in measures.batches:
                inputs, real, _, labels = measures.tensors(batch)
                with torch.no_grad():
                    output = model(**inputs)
                logits = torch.stack([output.start_logits, output.end_logits])
                loss += measure_set.span_nll(logits, real, labels).sum().item()
            hook.remove()
            losses.append(loss / len(measures.ids))
        slope = (losses[1] - losses[0]) / 2e-4
        assert found["low", name]["first_order"] == pytest.approx(slope, rel=1e-3, abs=1e-7)


# ---- search


@pytest.fixture(scope="session")
def swept(bank, squad_files, tmp_path_factory):
    """A sensitivity record of the bank."""
    folder = tmp_path_factory.mktemp("swept")
    argv = ["x.py", "--model_name_or_path", bank, "--validation_file", squad_files[1], *COMMON, *SWEEP]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*argv, "--num_gradient_batches", "0", "--output_dir", str(folder)])
        sensitivity.main()
    return str(folder / "sensitivity.json")


@pytest.fixture(scope="session")
def swept_operands(bank, squad_files, tmp_path_factory):
    """A sensitivity record of the bank, of single operands."""
    folder = tmp_path_factory.mktemp("swept_operands")
    argv = ["x.py", "--model_name_or_path", bank, "--validation_file", squad_files[1], *COMMON, *OPERANDS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*argv, "--num_gradient_batches", "0", "--output_dir", str(folder)])
        sensitivity.main()
    return str(folder / "sensitivity.json")


@pytest.mark.parametrize("module", [run_qa_eval, sensitivity, search])
def test_a_folder_of_another_run_is_refused_and_left_alone(module, run, swept, hold, tmp_path):
    flags = {run_qa_eval: (), sensitivity: SWEEP, search: ("--sensitivity_file", swept, "--average_bits", "6")}
    hold(tmp_path / "out")
    with pytest.raises(ValueError, match="another run .* is writing to it"):
        run(module, *flags[module])
    assert os.listdir(tmp_path / "out") == [".lock"]


def test_search_writes_and_evaluates_an_assignment_within_the_budget(run, figures, swept, bank, count, tmp_path):
    flags = ("--sensitivity_file", swept, "--bit_widths", "8", "4", "--average_bits", "6.4", "--num_random", "3",
             "--pareto", "--pareto_points", "4", "--output", str(tmp_path / "a.json"))  # fmt: skip
    predictions = count(run_qa_eval.QuestionAnsweringTrainer, "predict_texts")
    out = run(search, *flags)
    rows, record = rows_of(out), read(out / "record.json")
    assert list(rows)[:4] == ["W8A8KV8", "W4A4KV4", "found", "first_last"] and list(rows)[-1] == "hybrid"
    assert len(rows) == 2 + 3 * (1 + 1 + 3) + 1
    for name, report in record["search"].items():
        (value,) = report["budget"].values()
        randoms = [f"{name.replace('found', 'random')}_{index}" for index in range(3)]
        for config in [name, name.replace("found", "first_last"), *randoms]:
            assert rows[config]["average_w_bits"] <= value + 1e-9
        for metric in ("exact_match", "f1"):
            gains = [rows[name][metric] - rows[config][metric] for config in randoms]
            counts = report["random"][metric]
            assert counts["found_better"] == sum(gain > 0 for gain in gains)
            assert counts["equal"] == sum(gain == 0 for gain in gains)
            assert counts["found_minus_mean"] == pytest.approx(np.mean(gains))
        assert report["subset_kl"] <= report["subset_kl_before"] and report["random"]["number"] == 3
    written = read(tmp_path / "a.json")
    assert len(written) == 9 and "average_bits <= 6.4" in written["description"]
    model = QuantGPT2ForQuestionAnswering.from_pretrained(bank)
    assert model.set_bit_config(str(tmp_path / "a.json")) == record["bit_config"]["layers"]["found"]
    assert (out / "found_6.67.json").is_file() and (out / "pareto.png").is_file()
    groups = read(out / "pareto.json")["groups"]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in figures["pareto"].axes[0].lines}
    groups["hybrid"] = ["hybrid"]
    labels = {"found": "found", "uniform": "uniform width", "random": "random, same budget"}
    labels |= {"first_last": "first and last blocks high", "hybrid": "published hybrid"}
    for name, label in labels.items():
        points = [[rows[config]["average_w_bits"], rows[config]["exact_match"]] for config in groups[name]]
        assert sorted(drawn[label]) == sorted(points)
    assert groups["found"] == ["found", "found_5.33", "found_6.67"] and len(groups["random"]) == 9
    before = len(predictions)
    assert before <= len(rows)
    assert rows_of(run(search, *flags)) == rows and len(predictions) == before, "resumed from the records"


def test_search_with_three_options_per_linear_by_loss_on_training_data(run, swept, squad_files):
    flags = "--bitops 0.45 --score loss_increase --refine_by loss --refine_rounds 1 --refine_candidates 3"
    flags += f" --max_refine_samples 5 --measure_split train --train_file {squad_files[0]} --max_train_samples 16"
    out = run(search, "--sensitivity_file", swept, *flags.split())
    rows = rows_of(out)
    assert (
        set(rows) == {"W8A8KV8", "W4A4KV4", "W4A8KV8", "found", "first_last", "hybrid"}
        and rows["found"]["relative_bitops"] <= 0.45
    )
    assert read(out / "record.json")["search"]["found"]["measured"] == 4
    found = rows_of(run(search, "--sensitivity_file", swept, "--weight_mb", "0.08", "--refine_rounds", "0", out="mb"))
    assert found["found"]["weight_mb"] <= 0.08


def test_search_chooses_the_bits_of_every_operand_under_budgets_of_each(run, swept_operands, bank, capsys):
    limits = {"average_bits": 6.4, "average_a_bits": 5.5, "average_kv_bits": 6}
    flags = [f"--{kind}={value}" for kind, value in limits.items()]
    flags += ["--num_random", "3", "--pareto", "--pareto_points", "3", "--refine_rounds", "1"]
    out = run(search, "--sensitivity_file", swept_operands, *flags)
    rows, record, printed = rows_of(out), read(out / "record.json"), capsys.readouterr().out
    assert record["search"]["found"]["budget"] == limits and record["bit_config"]["quantizer"] == "minmax"
    grid = {"average_bits": 6, "average_a_bits": 5.5, "average_kv_bits": 6}
    assert list(record["search"]) == ["found", "found_6.00"] and record["search"]["found_6.00"]["budget"] == grid
    for name, budget in (("", limits), ("_6.00", grid)):
        found = record["search"][f"found{name}"]["average_bits"]
        for config in (f"found{name}", f"first_last{name}", *(f"random{name}_{index}" for index in range(3))):
            for kind, limit in budget.items():
                key = kind if kind != "average_bits" else "average_w_bits"
                assert rows[config][key] <= limit + 1e-9, (config, kind)
                assert not config.startswith("random") or rows[config][key] <= found[key] + 1e-9
    layers = record["bit_config"]["layers"]["found"]
    assert any(bits["w_bits"] != bits["a_bits"] for bits in layers.values()), "chosen separately"
    model = QuantGPT2ForQuestionAnswering.from_pretrained(bank)
    assert model.set_bit_config(str(out / "assignment.json")) == layers
    assert "average_bits <= 6.4 and average_a_bits <= 5.5" in read(out / "assignment.json")["description"]
    assert "found: average bits W " in printed and "EM: better than " in printed and "; F1: better than " in printed


def test_search_of_single_operands_under_bitops_only(run, swept_operands):
    flags = ("--bitops", "0.45", "--refine_rounds", "0", "--num_random", "1")
    out = run(search, "--sensitivity_file", swept_operands, *flags)
    rows, layers = rows_of(out), read(out / "record.json")["bit_config"]["layers"]["found"]
    for name in ("found", "first_last", "random_0"):
        assert rows[name]["relative_bitops"] <= 0.45 and rows[name]["average_kv_bits"] == 8
    assert any(bits["w_bits"] != bits["a_bits"] for bits in layers.values()), "chosen separately"


def test_refused_is_a_budget_of_an_operand_or_a_quantizer_that_was_not_swept(
    run, swept, swept_operands, squad_files, tmp_path
):
    with pytest.raises(ValueError, match="--average_a_bits 6: .*flips of together,.*--operands w a kv"):
        run(search, "--sensitivity_file", swept, "--average_bits", "6", "--average_a_bits", "6")
    rotated = ("--quantizer", "rotated", "--train_file", squad_files[0], "--calibration_samples", "4")
    with pytest.raises(ValueError, match="swept with --quantizer minmax, this search has rotated"):
        run(search, "--sensitivity_file", swept_operands, "--average_bits", "6", *rotated)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "one budget"),
        (("--average_bits", "6", "--bitops", "0.5"), "one budget"),
        (("--average_bits", "3.9"), "--average_bits 3.9: below .*allowed: 4 or more"),
        (("--average_bits", "6", "--sensitivity_file", "none.json"), r"none\.json: no such file; sweep\.sh"),
        (("--average_bits", "6", "--bit_widths", "8", "4", "W8A4KV4"), "W8A4KV4: the sensitivity file has only"),
        (("--average_bits", "6", "--bit_widths", "4"), "one more at least"),
        (("--average_bits", "6", "--score", "f2"), "--score f2: allowed are kl"),
        (("--average_bits", "6", "--score", "first_order"), "--num_gradient_batches"),
        (("--average_bits", "6", "--refine_by", "em"), "--refine_by em: allowed are kl, loss"),
        (("--average_bits", "6", "--max_refine_samples", "0"), "--max_refine_samples 0"),
    ],
)
def test_search_refusals(flags, message, run, swept, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(search, "--sensitivity_file", swept, *flags)
    assert not (tmp_path / "out").exists()


def test_sensitivity_file_of_another_checkpoint_or_kind_is_refused(run, swept, tiny_model, tmp_path):
    other = make_bank(tiny_model, tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match="swept a checkpoint with checksum"):
        run(search, "--sensitivity_file", swept, "--average_bits", "6", model=other)
    whole = pathlib.Path(swept).read_bytes()
    for damage in damages(whole):
        (tmp_path / "x.json").write_bytes(damage)
        with pytest.raises(ValueError, match=r"x\.json: not a record of sensitivity\.py \(damaged"):
            run(search, "--sensitivity_file", str(tmp_path / "x.json"), "--average_bits", "6")
    (tmp_path / "x.json").write_text('{"flips": 1}')
    with pytest.raises(ValueError, match=r"x\.json: not a record of sensitivity\.py"):
        run(search, "--sensitivity_file", str(tmp_path / "x.json"), "--average_bits", "6")


def test_byte_order_mark_of_a_sensitivity_file_and_names_of_the_search(run, swept, tmp_path):
    content = json.loads(pathlib.Path(swept).read_text())
    (tmp_path / "marked.json").write_text(json.dumps(content), encoding="utf-8-sig")
    assert problem.read_sensitivity(tmp_path / "marked.json") == {
        key: value for key, value in content.items() if key != "sha256"
    }
    low = content["identity"]["low_bits"]
    name = next(iter(low))
    content["identity"]["low_bits"] = {"found" if key == name else key: bits for key, bits in low.items()}
    for flip in content["flips"].values():
        flip["low_bits"] = "found" if flip["low_bits"] == name else flip["low_bits"]
    del content["sha256"]
    write_state(tmp_path / "named.json", content)
    with pytest.raises(ValueError, match="found is what the search calls its own"):
        run(search, "--sensitivity_file", str(tmp_path / "named.json"), "--average_bits", "6")


def test_long_and_replaced_names_of_configs(run, tmp_path):
    names = ["x" * 230 + ".json", "a b.json", "a_b.json", "A_b.json"]
    for bits, name in enumerate(names, 5):
        (tmp_path / name).write_text(
            json.dumps({"default": {"w_bits": 8, "a_bits": min(bits, 8), "kv_bits": bits - 2}})
        )
    folder = run(run_qa_eval, "--bit_configs", *(str(tmp_path / name) for name in names))
    assert len(rows_of(folder)) == len(names) == len(list(folder.glob("*/eval_predictions.json")))


# ---- command line


@pytest.mark.parametrize(("script", "arguments"), [("eval.sh", "EvalArguments"), ("sweep.sh", "SweepArguments")])
def test_shell_scripts_run_from_anywhere_and_pass_flags_on(script, arguments, python_stub, tmp_path):
    folder = tmp_path / "with space"
    folder.mkdir()
    for name in (script, "common.sh"):
        shutil.copy(ROOT / "switch_precision" / name, folder)
    assert subprocess.run(["bash", "-n", folder / script], check=True).returncode == 0
    environment, calls = python_stub
    environment |= {
        "NPROC_PER_NODE": "2",
        "MODEL": "my model",
        "VALIDATION_FILE": "my dev.json",
        "OUTPUT_DIR": "my out",
        "BIT_CONFIG": "my config.json",
    }
    subprocess.run(["bash", str(folder / script), "--seed", "7"], check=True, env=environment, cwd="/")
    (argv,) = calls()
    python = next(index for index, word in enumerate(argv) if word.endswith(".py"))
    assert os.path.isabs(argv[python]) and "--standalone" in argv[:python]
    assert f"--nproc_per_node={2 if script == 'eval.sh' else 1}" in argv
    module = run_qa_eval if script == "eval.sh" else sensitivity
    data = {"eval.sh": "EvalDataArguments", "sweep.sh": "DataTrainingArguments"}[script]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv[python:])
        model_args, data_args, training_args = module.parse_args(
            getattr(module, arguments), getattr(module, data), module.TrainingArguments
        )
    assert (model_args.model_name_or_path, data_args.validation_file) == ("my model", "my dev.json")
    assert (training_args.output_dir, training_args.seed, data_args.max_seq_length) == ("my out", 7, 786)
    if script == "eval.sh":
        assert model_args.bit_configs == ["my config.json"]


@pytest.mark.slow
def test_two_processes_make_the_table_of_one(run, bank, squad_files, tmp_path):
    one = rows_of(run(run_qa_eval, "--bit_configs", "8", "4", out="one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "switch_precision" / "run_qa_eval.py"), "--model_name_or_path", bank, *COMMON]
    command += ["--validation_file", squad_files[1], "--output_dir", str(tmp_path / "two"), "--bit_configs"]
    for configs in (["8"], ["8", "4"]):  # the second takes the record of the first
        subprocess.run([*command, *configs], check=True)
    assert rows_of(tmp_path / "two") == one
