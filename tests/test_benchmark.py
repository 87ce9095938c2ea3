"""benchmark/benchmark.py and its peers, on tiny models: records, sizes, errors; never a time."""

import argparse
import dataclasses
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import GPT2ForQuestionAnswering

from conftest import ROOT, experiment, load_script

with experiment("benchmark"):
    import benchmark
    import memory
    import peers
    from models.bit_config import describe_bit_config
    from models.exported import save_exported, served_widths
    from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering

TINY = "n_layer=2,n_embd=64,n_head=4,vocab_size=320,n_positions=128,initializer_range=0.2"
RANDOM = ["--random_weights", "--config_overrides", TINY]


@pytest.fixture
def main(monkeypatch, tmp_path):
    """main(*flags) runs the script, two rounds and no memory unless told otherwise; returns the record."""

    def call(*flags, start=("--rounds", "2", "--no_measure_memory", "--device", "cpu", "--shapes", "2x16")):
        out = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "--output_dir", str(out), "--threads", "1", *start, *flags])
        benchmark.main()
        return json.loads((out / "record.json").read_text())

    return call


def settings(**changed):
    """What benchmark.py hands to peers.py."""
    values = {field.name: field.default for field in dataclasses.fields(benchmark.BenchmarkArguments)}
    values |= {"random_weights": True, "config_overrides": TINY, "bit_configs": ["8", "W4A8KV8"], "shapes": ["2x16"]}
    values |= {"device": "cpu", "threads": 1, "config": None, "onnx_file": None, "output_dir": ""}
    return argparse.Namespace(**values | changed)


@pytest.fixture
def bank(tiny_model, tmp_path):
    """(folder, resolved config of W8A8KV8) of a checkpoint with adapters for 4 and 8 bits."""
    torch.manual_seed(0)
    model = QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model)
    model.add_lora([4, 8])
    model.set_base(tiny_model)
    model.save_pretrained(tmp_path / "bank")
    return str(tmp_path / "bank"), model.set_bit_config(8)


# ---- whole runs


def test_record_table_and_plot_of_a_checkpoint(main, bank, figures, tmp_path, capsys):
    folder, resolved = bank
    evaluated = {
        "bit_config": {"layers": {"any name": resolved, "not measured": {}}},
        "rows": [{"config": "any name", "exact_match": 50.0}, {"config": "not measured", "exact_match": 1.0}],
    }
    (tmp_path / "eval.json").write_text(json.dumps(evaluated))
    flags = ["--model_name_or_path", folder, "--bit_configs", "8", "W4A8KV8", "--eval_record", tmp_path / "eval.json"]
    record = main(*map(str, flags), "--peers", "bf16", "fake", "integer", "--shapes", "2x16", "1x7")
    rows = record["rows"]
    expected = [("fp32", None), ("bf16", None), ("fake", "W8A8KV8"), ("fake", "W4A8KV8")]
    expected += [("integer", "W8A8KV8"), ("integer", "W4A8KV8")]
    assert [(row["peer"], row["config"]) for row in rows] == 2 * expected
    assert [row["shape"] for row in rows] == 6 * ["2x16"] + 6 * ["1x7"]
    for row in rows:
        assert len(row["rounds_seconds"]) == len(row["rounds_ratio"]) == 2
        assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["per_second"] == pytest.approx(int(row["shape"][0]) / row["seconds"])
        if row["peer"] == "fp32":
            assert row["rounds_ratio"] == [1.0, 1.0]
    assert record["metrics"]["integer W4A8KV8 1x7"] == rows[-1]["ratio"]
    assert record["bit_config"]["W8A8KV8"]["layers"] == resolved and record["lora_bank"] == ["4", "8"]
    assert record["rounds"] == 2 and set(record["disturbed_rounds"]) == {"2x16", "1x7"} and not record["left_out"]
    assert record["peer_versions"]["torch"] == torch.__version__
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("| ours, integer ") == 4 and "One exported checkpoint that serves W8A8KV8, W4A8KV8" in table
    axes = figures["accuracy_latency"].axes[0]
    drawn = [(x, y) for line in axes.lines for x, y in zip(*line.get_data())]
    expected = [(1000 * row["seconds"], 50.0) for row in rows[:6] if row["config"] == "W8A8KV8"]
    assert drawn == expected and [text.get_text() for text in axes.texts] == ["W8A8KV8", "W8A8KV8"]
    points = benchmark.accuracy_points([(resolved, 50.0), ({}, 1.0)], rows, {"W8A8KV8": resolved}, "1x7")
    assert [(label, config, score) for label, config, _, score in points] == [
        ("ours, fake quantization", "W8A8KV8", 50.0),
        ("ours, integer", "W8A8KV8", 50.0),
    ]
    assert points[1][2] == 1000 * rows[-2]["seconds"]


def test_training_step(main):
    record = main(*RANDOM, "--training", "--bit_configs", "8", "W4A8KV8")
    found = [(row["peer"], row["config"]) for row in record["rows"]]
    others = [(name, config) for name in ("fake", "integer", "integer_bf16") for config in ("W8A8KV8", "W4A8KV8")]
    assert found == [("fp32", None), *others] and record["ratio"] == "time / time of fp32"


def test_missing_packages_leave_one_line(main, monkeypatch, capsys):
    original = importlib.import_module

    def import_module(name, *args):
        if name in ("torchao", "onnx"):
            raise ModuleNotFoundError(f"No module named '{name}'")
        return original(name, *args)

    monkeypatch.setitem(sys.modules, "onnxruntime", sys)
    monkeypatch.setattr(importlib, "import_module", import_module)
    record = main(*RANDOM, "--peers", "torchao", "onnxruntime", "integer")
    assert [row["peer"] for row in record["rows"]] == ["fp32", "integer"]
    assert list(record["left_out"]) == ["torchao", "onnxruntime"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert lines == [
        "left out: torchao, not installed (pip install torchao): No module named 'torchao'",
        "left out: onnxruntime, not installed (pip install onnxruntime onnx onnxscript): No module named 'onnx'",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either --model_name_or_path or --random_weights"),
        ([*RANDOM, "--model_name_or_path", "x"], "either --model_name_or_path or --random_weights"),
        (["--model_name_or_path", "x", "--config_overrides", "n_layer=2"], "--config_overrides"),
        (["--random_weights", "--config_overrides", "layers=2"], "--config_overrides layers=2: expected fields of"),
        (["--random_weights", "--config_overrides", "n_layer"], "--config_overrides n_layer: expected fields of"),
        ([*RANDOM, "--shapes", "2x16", "8y3"], "--shapes 8y3: expected batch x tokens, as 8x384"),
        ([*RANDOM, "--shapes", "0x3"], "--shapes 0x3"),
        ([*RANDOM, "--shapes", "1x129"], "--shapes 1x129: the model has 128 positions"),
        ([*RANDOM, "--rounds", "0"], "--rounds 0: at least 1"),
        ([*RANDOM, "--runs_per_round", "0"], "--runs_per_round 0: at least 1"),
        ([*RANDOM, "--threads", "-1"], "--threads -1: at least 1"),
        ([*RANDOM, "--device", "tpu"], "--device tpu: allowed are cpu"),
        ([*RANDOM, "--peers", "int8", "fp32"], "--peers int8: allowed are fp32, bf16"),
        ([*RANDOM, "--peers", "onnxruntime", "--training"], "--peers onnxruntime: allowed are fp32, fake, integer"),
        ([*RANDOM, "--bit_configs", "8", "9"], "9 is not a bit-width"),
        ([*RANDOM, "--bit_configs", "none.json"], "none.json: no such bit-width config"),
        ([*RANDOM, "--eval_record", "none.json"], "--eval_record none.json: no such file"),
        ([*RANDOM, "--eval_record", __file__], "not a record.json of run_qa_eval.py"),
        ([*RANDOM, "--eval_record", __file__, "--training"], "--eval_record: accuracy belongs to"),
    ],
)
def test_errors_come_before_any_work(main, monkeypatch, flags, message):
    monkeypatch.setattr(peers, "build", lambda *args: pytest.fail("built a peer"))
    with pytest.raises((ValueError, OSError)) as error:
        main(*flags)
    assert message in str(error.value)


def test_evaluation_of_other_configs_is_refused(main, bank, tmp_path):
    record = {"bit_config": {"layers": {"x": bank[1]}}, "rows": [{"config": "x", "exact_match": 1.0}]}
    (tmp_path / "eval.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="none of its configs is one of W4A8KV8"):
        main(*RANDOM, "--bit_configs", "W4A8KV8", "--eval_record", str(tmp_path / "eval.json"))


# ---- times


def test_rounds_are_interleaved_and_begin_with_another_peer():
    calls = []
    entries = {
        key: peers.Peer(lambda ids, key=key: calls.append(key), None, None, lambda key=key: calls.append(key.upper()))
        for key in "abc"
    }
    seconds = benchmark.measure_times(entries, torch.zeros(1, 1), rounds=3, runs=2, training=False)
    assert "".join(calls) == "AaaBbbCcc" + "BbbCccAaa" + "CccAaaBbb" + "AaaBbbCcc"
    assert {key: len(taken) for key, taken in seconds.items()} == {"a": 3, "b": 3, "c": 3}  # without the warm-up


def test_ratios_are_taken_within_rounds():
    row = benchmark.time_row([1.0, 4.0, 1.0], [2.0, 2.0, 3.0], 8, training=False)
    assert row["rounds_ratio"] == [2.0, 0.5, 3.0] and (row["ratio_min"], row["ratio"], row["ratio_max"]) == (0.5, 2, 3)
    assert (row["seconds"], row["per_second"]) == (1.0, 8.0)
    assert benchmark.time_row([1.0, 4.0], [2.0, 2.0], 4, training=True)["rounds_ratio"] == [0.5, 2.0]


# ---- the peers


@pytest.mark.parametrize("name", peers.names_of(training=False))
def test_every_peer_computes_the_same_function(name, tmp_path):
    if name in peers.COMPILED or (why := peers.why_missing(name, "cpu")):
        pytest.skip("compiled" if name in peers.COMPILED else why)
    args = settings(onnx_file=str(tmp_path / "int8.onnx"))
    model, configs = peers.load(args)
    model.qa_outputs.weight.data.normal_()
    if name == "onnxruntime":
        peers.export_onnx(model, args.onnx_file)
    ids = torch.randint(0, 320, (3, 40))
    with torch.no_grad():
        expected = peers.build("fp32", model, None, args).run(ids).start_logits
        peer = peers.build(name, model, configs["W8A8KV8"], args)
        peer.prepare()
        output = peer.run(ids)
    found = torch.as_tensor(output[0]) if name == "onnxruntime" else output.start_logits.float()
    error = ((found - expected).norm() / expected.norm()).item()
    # Another function would be at 1.4; 4-bit weights are coarse for these random ones.
    assert error < {"fp32": 1e-6, "bnb_nf4": 0.6}.get(name, 0.06), error


def test_peers_carry_the_weights_of_the_checkpoint(bank, tiny_model):
    model, _ = peers.load(settings(random_weights=False, config_overrides=None, model_name_or_path=bank[0]))
    stock = GPT2ForQuestionAnswering.from_pretrained(tiny_model).transformer.state_dict()
    found = peers.stock_gpt2(model)
    assert all(torch.equal(value, stock[name]) for name, value in found.transformer.state_dict().items())
    assert torch.equal(found.qa_outputs.weight, model.qa_outputs.weight)
    assert model.config.lora_bank == ["4", "8"]


def test_exported_checkpoints(main, bank, tmp_path):
    model = QuantGPT2ForQuestionAnswering.from_pretrained(bank[0])
    model.config.trained_bit_configs = ["8"]  # as export.py leaves it
    save_exported(model, tmp_path / "exported", served_widths([bank[1]]), bank[1])
    record = main("--model_name_or_path", str(tmp_path / "exported"), "--peers", "bf16", "integer")
    assert [row["config"] for row in record["rows"]] == [None, None, "W8A8KV8"]
    exported = QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path / "exported")
    weight = peers.stock_gpt2(exported).transformer.h[0].mlp.c_fc.weight
    expected = model.transformer.h[0].mlp.c_fc.weight.t()
    assert (weight - expected).abs().max() <= 0.51 * expected.abs().amax() / 127


@pytest.fixture
def only_sizes(monkeypatch):
    """No peaks: in the tests' own process they mean nothing and take seconds."""
    monkeypatch.setattr(memory, "peak_of", lambda run, cuda: 0)


@pytest.mark.parametrize("config", ["W8A8KV8", "W4A8KV8"])
def test_sizes_of_ours(config, only_sizes, tmp_path):
    args = settings(peer="integer", config=config)
    found = memory.measure_memory(args)
    model, configs = peers.load(args)
    assert found["linear_bytes"] == describe_bit_config(configs[config], model.layer_shapes())["weight_bytes"]
    save_exported(model, tmp_path, served_widths([configs[config]]), configs[config])
    assert abs(found["stored_bytes"] - os.path.getsize(tmp_path / "model.safetensors")) < 100
    floats = sum(4 * out * inp for out, inp in model.layer_shapes().values())
    fake = memory.measure_memory(settings(peer="fake", config=config))
    assert floats < fake["linear_bytes"] and fake["stored_bytes"] > floats
    reference = memory.measure_memory(settings(peer="fp32"))
    assert reference["linear_bytes"] == floats
    assert memory.measure_memory(settings(peer="bf16"))["linear_bytes"] == floats // 2
    parameters = 4 * sum(p.numel() for p in peers.stock_gpt2(model).parameters())
    assert parameters < reference["stored_bytes"] < parameters + 8000


def test_configs_with_float_linears_are_sized_as_float_checkpoints(only_sizes):
    found = memory.measure_memory(settings(peer="integer", config="W32A32KV32", bit_configs=["32"]))
    assert found["stored_bytes"] > memory.measure_memory(settings(peer="fp32"))["stored_bytes"]


def test_memory_is_measured_in_a_process_of_its_own():
    wide = "n_layer=1,n_embd=768,n_head=12,vocab_size=320,n_positions=128"
    found = benchmark.memory_of("bf16", None, settings(config_overrides=wide, peers=["bf16"]))
    weights = 2 * (12 * 768 * 768)
    assert found["linear_bytes"] == weights
    assert weights < found["peak_bytes"]["2x16"] < weights + 200 * 2**20


def test_a_failing_memory_process_says_why(monkeypatch, tmp_path):
    stub = tmp_path / "python"
    stub.write_text("#!/usr/bin/env bash\necho out of memory >&2\nexit 3\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    with pytest.raises(RuntimeError, match="memory of fp32: its process ended with 3\nout of memory"):
        benchmark.memory_of("fp32", None, settings())


def test_without_lora_the_weights_are_quantized_once(monkeypatch, tmp_path):
    module, kept = load_script("benchmark/bench_forward.py"), []
    tiny = {"n_embd": 64, "n_head": 4, "vocab_size": 320, "n_positions": 180}
    monkeypatch.setattr(module, "GPT2Config", functools.partial(module.GPT2Config, **tiny))

    def timed(variants, *rest, original=module.timed_rounds):
        seconds = original(variants, *rest)
        plain = variants["integer W8A8KV8"][0]
        kept.extend(list(layer.stored_codes()) for layer in plain.quant_layers().values())
        return seconds

    monkeypatch.setattr(module, "timed_rounds", timed)
    words = ["--layers", "1", "--length", "16", "--batch_size", "2", "--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(
        sys, "argv", ["bench_forward", *words, "--device", "cpu", "--output", str(tmp_path / "r.json")]
    )
    module.main()
    assert kept == [[8]] * 4


# ---- the rotated quantizer beside MinMax


@pytest.mark.parametrize(
    ("script", "flags", "pair"),
    [
        ("bench_forward", ["--calibration_windows", "2"], "integer W8A8KV8 + LoRA"),
        ("bench_step", [], "W8A8KV8 + LoRA, integer"),
        ("bench_step", ["--joint"], "joint, integer"),
    ],
)
def test_rotated_is_timed_in_the_rounds_of_minmax(script, flags, pair, monkeypatch, tmp_path, capsys):
    module = load_script(f"benchmark/{script}.py")
    tiny = {"n_embd": 64, "n_head": 4, "vocab_size": 320, "n_positions": 180}
    monkeypatch.setattr(module, "GPT2Config", functools.partial(module.GPT2Config, **tiny))
    words = ["--layers", "1", "--length", "16", "--batch_size", "2", "--rounds", "3", "--threads", "1", "--rotated"]
    monkeypatch.setattr(sys, "argv", [script, *words, "--device", "cpu", "--output", str(tmp_path / "r.json"), *flags])
    module.main()
    metrics, printed = json.loads((tmp_path / "r.json").read_text())["metrics"], capsys.readouterr().out
    kind = "speeds" if script == "bench_forward" else "ratios"
    given = metrics["rotated_over_minmax"]
    given = {f"{pair}, rotated": given} if kind == "speeds" else given
    assert list(given) == [f"{pair}{bf16}, rotated" for bf16 in ("", ", --bf16")[: len(given)]]
    assert len(given) == (1 if kind == "speeds" else 2)
    for name, ratios in given.items():
        minmax = name.removesuffix(", rotated")
        over = [metrics["variants"][variant][kind] for variant in (name, minmax)]
        found = [(b / a if kind == "speeds" else a / b) for a, b in zip(*over, strict=True)]
        assert ratios == pytest.approx(found) and len(found) == 3
        assert f"{name} / {minmax}: " in printed
    if flags[:-1]:
        assert f"calibration on 2 windows of 180 tokens: {metrics['calibration_seconds']:.1f} s" in printed


# ---- memory of a training step


SIZES = ["--layers", "2", "--width", "64", "--batch_size", "2", "--length", "8", "--threads", "1", "--device", "cpu"]


def test_memory_of_a_step_beside_its_parts(monkeypatch, tmp_path, capsys):
    bench = load_script("benchmark/bench_memory.py")

    def measured(name, args):
        return bench.measure(argparse.Namespace(**vars(args) | {"variant": name}))

    monkeypatch.setattr(bench, "measured_in_its_own_process", measured)
    monkeypatch.setattr(bench, "peak_of", lambda run, cuda: run() or 10**9)
    monkeypatch.setattr(sys, "argv", ["bench_memory.py", *SIZES, "--output", str(tmp_path / "r.json")])
    bench.main()
    metrics, rows = json.loads((tmp_path / "r.json").read_text())["metrics"], bench.VARIANTS
    assert list(metrics["variants"]) == list(rows) and "QLoRA, nf4 base" in capsys.readouterr().out
    assert metrics["nf4_scale_bits"] == pytest.approx({"without": 0.5, "with": 0.127, "saved": 0.373}, abs=4e-3)
    for name, (widths, base) in rows.items():
        row, model = metrics["variants"][name], bench.make_model(bench.config_of(2, 64), widths, base)
        trainable = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert row["parts"]["trainable"] == row["parts"]["gradients"] == row["parts"]["states"] / 2 == trainable
        others = 4 * sum(
            p.numel() for n, p in model.named_parameters() if n.removesuffix(".weight") not in linears(model)
        )
        assert row["parts"]["base"] + trainable == others + row["linear_bytes"], name
        assert row["xl_parts_bytes"] == sum(row["xl_parts_computed"].values()) > 50 * row["parts_bytes"]
    full, lora, qlora = (metrics["variants"][name]["xl_parts_bytes"] for name in list(rows)[:3])
    assert full == 16 * 1_557_614_402 and qlora < lora / 3 < full / 9


def linears(model):
    return model.quant_layers().keys()


@pytest.mark.slow
def test_memory_of_a_step_is_measured_in_a_process_of_its_own():
    bench = load_script("benchmark/bench_memory.py")
    args = argparse.Namespace(layers=1, width=64, batch_size=2, length=8, threads=1, device="cpu")
    found = bench.measured_in_its_own_process("QLoRA, nf4 base", args)
    assert found["linear_bytes"] < 64 * 64 * 12 and found["peak_bytes"] > 50_304 * 64 * 4
    args.length = 2000  # more than the model has positions
    with pytest.raises(RuntimeError, match="LoRA: its process ended with 1\n"):
        bench.measured_in_its_own_process("LoRA", args)


# ---- command line


@pytest.mark.parametrize("model", ["my model", None])
def test_shell_script_runs_from_anywhere_and_passes_flags_on(model, python_stub, tmp_path):
    folder = tmp_path / "with space" / "benchmark"
    for name in ("benchmark/bench.sh", "base_model/common.sh"):
        (folder.parent / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, folder.parent / name)
    environment, calls = python_stub
    environment |= {"MODEL": model, "OUTPUT_DIR": "my out", "BIT_CONFIG": "my config.json"} if model else {}
    subprocess.run(["bash", str(folder / "bench.sh"), "--rounds", "3"], check=True, env=environment, cwd="/")
    (argv,) = calls()
    assert argv[0] == str(folder / "benchmark.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        (args,) = benchmark.parse_args(benchmark.BenchmarkArguments)
    assert args.rounds == 3
    if model:
        assert (args.model_name_or_path, args.output_dir, args.bit_configs) == (model, "my out", ["my config.json"])
    else:
        assert args.random_weights and args.bit_configs == ["8", "W4A8KV8"]
    benchmark.check_args(args)
