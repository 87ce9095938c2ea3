"""NF4 as a frozen base: bitsandbytes against the definition, gradients, checkpoints, training end to end, refusals."""

import copy
import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config

import run_qa
import run_qa_eval
from common import resuming
from common.checksums import model_checksum
from conftest import NAMES, ROOT, THINGS, experiment
from models.bitsandbytes_ptq import quantize_with_bitsandbytes
from models.errors import UserError
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering
from models.nf4 import NF4Weight
from nf4_reference import BLOCK, SCALE_BLOCK, dynamic_levels, nf4, nf4_levels

with experiment("language_model"):
    import run_clm
with experiment("switch_precision"):
    import export

NF4 = ("--add_lora", "--base_quantization", "nf4")
SMALL_GPT2 = ROOT.parent / "shared" / "small-gpt2" / "model.safetensors"


# ---- codes, against the definition


def test_levels_are_those_of_the_definition_and_of_bitsandbytes():
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    assert torch.equal(nf4_levels(), get_4bit_type("nf4", "cpu"))
    assert nf4_levels()[[0, 1, 6, 7, 8, 14, 15]].tolist() == pytest.approx(
        [-1, -0.6961928, -0.0910500, 0, 0.0795803, 0.7229568, 1], abs=1e-7
    )
    assert torch.equal(dynamic_levels(), create_dynamic_map()) and len(dynamic_levels()) == 256


def assert_equals_reference(weight):
    found, expected = NF4Weight(weight), nf4(weight)
    state, levels = found.state, dynamic_levels()
    assert torch.equal(found.codes.flatten(), expected["codes"])
    assert torch.equal(state.offset, expected["offset"])
    assert torch.equal(state.state2.absmax, expected["scale_scales"])
    # On a CPU bitsandbytes looks an 8-bit code up in a table of 2**16 entries over -1 to 1: close to the middle of two
    # levels it may take the other one.
    ours, theirs = expected["scale_codes"].long(), state.absmax.long()
    rest = expected["scales"] - expected["offset"]
    largest = expected["scale_scales"].repeat_interleave(SCALE_BLOCK)[: len(ours)]
    assert ((rest - levels[theirs] * largest).abs() <= (rest - levels[ours] * largest).abs() + 2**-15 * largest).all()
    assert (ours != theirs).float().mean() < 0.01
    # The values are those of bitsandbytes' own scales, in float32 and rounded once to bfloat16.
    scale = levels[theirs] * state.state2.absmax.repeat_interleave(SCALE_BLOCK)[: len(theirs)] + state.offset
    codes = torch.stack([found.codes.flatten() // 16, found.codes.flatten() % 16], 1).flatten()[: weight.numel()]
    values = (nf4_levels()[codes.long()] * scale.repeat_interleave(BLOCK)[: weight.numel()]).view(weight.shape)
    assert torch.equal(found.dequantize(torch.float32), values)
    assert torch.equal(found.dequantize(torch.bfloat16), values.bfloat16())
    assert (
        (values - weight).abs() <= 0.17 * scale.repeat_interleave(BLOCK)[: weight.numel()].view(weight.shape)
    ).all()


@pytest.mark.parametrize(
    "shape", [(3, 64), (64, 192), (5, 96), (48, 16), (7, 30), (129, 770), (40, 33), (3, 5), (2, 1)], ids=str
)
def test_codes_scales_and_values_are_those_of_the_definition(shape):
    """Rows that are no multiple of a block, short last blocks, an odd number of weights."""
    torch.manual_seed(0)
    for scale in (0.02, 3):
        assert_equals_reference(torch.randn(shape) * scale)


@pytest.mark.skipif(not SMALL_GPT2.exists(), reason="no ../shared/small-gpt2")
def test_codes_of_real_weights():
    state = load_file(SMALL_GPT2)
    for name in ("attn.c_attn", "mlp.c_proj"):
        (key,) = [key for key in state if key.endswith(f"h.1.{name}.weight")]
        assert_equals_reference(state[key].float().t().contiguous())


def test_a_row_of_zeros_and_the_size():
    weight = torch.randn(64, 1024)
    weight[3] = 0
    held = NF4Weight(weight)
    assert held.dequantize(torch.float32)[3].abs().max() == 0
    assert 8 * held.nbytes / weight.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)


# ---- the model


def tiny(n_embd=64, bank=("shared",), **sizes):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "vocab_size": 101, "n_positions": 48} | sizes
    config = GPT2Config(n_embd=n_embd, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, initializer_range=0.2, **sizes)
    model = QuantGPT2ForQuestionAnswering(config)
    model.add_lora(list(bank))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1)
    return model.train()


def loss_and_gradients(model, bf16=False):
    torch.manual_seed(1)
    ids = torch.randint(0, 101, (2, 12))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model(input_ids=ids, start_positions=torch.tensor([1, 5]), end_positions=torch.tensor([3, 7]))
    output.loss.backward()
    return output.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("n_embd", [48, 24, 15], ids=lambda width: f"width {width}")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_a_step_equals_a_float_step_on_the_dequantized_weights(bf16, n_embd):
    model = tiny(n_embd, n_head=3)
    values = copy.deepcopy(model)
    model.quantize_base("nf4")
    for name, layer in values.quant_layers().items():
        layer.weight.data.copy_(model.quant_layers()[name].nf4.dequantize(torch.float32))
    before = {name: layer.weight for name, layer in tiny(n_embd, n_head=3).quant_layers().items()}
    assert all((layer.weight - before[name]).abs().max() > 0.01 for name, layer in values.quant_layers().items())
    loss, gradients = loss_and_gradients(model, bf16)
    expected_loss, expected = loss_and_gradients(values, bf16)
    assert torch.equal(loss, expected_loss) and gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-6, msg=name)
    assert sum(".lora_" in name for name in gradients) == 16


def test_no_float_weight_is_kept_from_forward_to_backward():
    model = tiny()
    model.quantize_base("nf4")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        loss_and_gradients(model)
    shapes = {(layer.out_features, layer.in_features) for layer in model.quant_layers().values()}
    assert saved and not shapes & {shape for found in saved for shape in (found, found[::-1])}
    assert all(layer.weight is None for layer in model.quant_layers().values())


def test_casts_and_copies_leave_codes_and_scales_as_they_are():
    model = tiny()
    model.quantize_base("nf4")
    values = {name: layer.nf4.dequantize(torch.float32) for name, layer in model.quant_layers().items()}
    cast = copy.deepcopy(model).to(torch.bfloat16)
    for name, layer in cast.quant_layers().items():
        assert layer.nf4 is not model.quant_layers()[name].nf4
        assert layer.nf4.state.state2.absmax.dtype == torch.float32
        assert torch.equal(layer.nf4.dequantize(torch.float32), values[name])
    assert cast(input_ids=torch.arange(9)[None]).start_logits.dtype == torch.bfloat16


def refuses(model, message, method="nf4"):
    weights = {name: layer.weight for name, layer in model.quant_layers().items()}
    with pytest.raises(UserError, match=message) as caught:
        model.quantize_base(method)
    assert len(str(caught.value).splitlines()) == 1
    assert all(layer.weight is weights[name] for name, layer in model.quant_layers().items())
    assert model.config.base_quantization is None


def test_bases_that_are_refused(monkeypatch):
    refuses(tiny(), "base_quantization = fp4: allowed is nf4", "fp4")
    refuses(QuantGPT2ForQuestionAnswering(GPT2Config(n_layer=1, n_embd=16, n_head=2)), "the model has none")
    refuses(tiny(bank=("4", "8")), "bits of its own, W8A8KV8; allowed are 16 and 32")
    model = tiny()
    model.set_bit_config("W32A8KV32")
    refuses(model, "bits of its own, W32A8KV32")
    model = tiny()
    model.set_rotations({name: torch.ones(layer.in_features) for name, layer in model.quant_layers().items()})
    refuses(model, "the model has the rotated quantizer")
    model = tiny(bank=("8",))
    model.drop_float_weights([8])
    model.config.bit_config = {name: dict.fromkeys(bits, 32) for name, bits in model.config.bit_config.items()}
    refuses(model, "the model has no float weights")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="bitsandbytes is not installed: pip install"):
        tiny().quantize_base("nf4")


def test_what_an_nf4_base_refuses_afterwards(tmp_path):
    model = tiny()
    model.quantize_base("nf4")
    model.quantize_base("nf4")  # is that already
    for bits in ("8", "W4A16KV16", "W16A8KV16", "W16A16KV8"):
        with pytest.raises(UserError, match="the base of this model is nf4: allowed are 16 and 32 bits") as caught:
            model.set_bit_config(bits)
        assert len(str(caught.value).splitlines()) == 1
    assert model.set_bit_config("W16A16KV16")
    ones = {name: torch.ones(layer.in_features) for name, layer in model.quant_layers().items()}
    with pytest.raises(UserError, match="an nf4 base is not rotated"):
        model.set_rotations(ones)
    with pytest.raises(UserError, match="one of an nf4 base has none"):
        quantize_with_bitsandbytes(model, "8bit")
    with pytest.raises(UserError, match="set_base comes before quantize_base"):
        model.set_base("gpt2")
    with pytest.raises(UserError, match="the float weights were dropped"):
        model.save_pretrained(tmp_path)  # no base that the checkpoint could name


# ---- training and evaluation


@pytest.fixture
def call(monkeypatch, qa_words, tmp_path):
    """call(script, *flags, **options): a small run of run_qa or run_qa_eval; returns its record."""

    def run(script, *flags, out="out", **options):
        words = qa_words(*flags, out=tmp_path / out, **options)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
        script.main()
        return json.loads((tmp_path / out / "record.json").read_text())

    return run


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def predictions(folder):
    return json.loads((folder / "eval_predictions.json").read_text())


def test_learns_and_is_evaluated_as_it_was_trained(call, squad_files, monkeypatch, tmp_path):
    """The checkpoint has adapters, head and a note; its base is quantized again when it is opened."""
    same = ("--validation_file", squad_files[0], "--max_eval_samples", "8")
    learn = ("--max_train_samples", "8", "--learning_rate", "1e-2", "--lr_scheduler_type", "cosine", *same)
    trained = call(run_qa, *NF4, *learn, "--max_steps", "80", "--quantizer", "minmax")
    assert trained["metrics"]["eval_exact_match"] >= 87.5
    bits = trained["bit_config"]
    assert bits["name"] == "nf4" and 4.1 < bits["average_w_bits"] < 4.3 and bits["layers_per_w_bits"] == {"nf4": 8}
    assert bits["quantizer"] == "nf4"

    out = tmp_path / "out"
    config, state = config_of(out), load_file(out / "model.safetensors")
    assert config["base_quantization"] == "nf4" and config["base_model_name_or_path"] and config["base_checksum"]
    assert all(".lora_" in name or name.startswith("qa_outputs.") for name in state)

    again = call(run_qa, *same, "--execution", "fake", out="again", model=out, train=False)
    assert predictions(tmp_path / "again") == predictions(out)
    # on integers attention and GELU are other kernels: answers as good, sums equal to rounding
    table = call(run_qa_eval, *same, out="table", model=out, train=False)
    for record, prefix in ((again, "eval"), (table, "checkpoint")):
        for metric in ("exact_match", "f1"):
            assert record["metrics"][f"{prefix}_{metric}"] == trained["metrics"][f"eval_{metric}"]
    assert "Quantizer: nf4." in (tmp_path / "table" / "table.md").read_text()
    (row,) = table["rows"]
    assert row["average_w_bits"] == bits["average_w_bits"] and row["weight_mb"] == bits["weight_bytes"] / 1e6

    # the note decides: on the float base the same adapters compute something else
    model = QuantGPT2ForQuestionAnswering.from_pretrained(out)
    edited = shutil.copytree(out, tmp_path / "float")
    (edited / "config.json").write_text(json.dumps(config | {"base_quantization": None}))
    other, ids = QuantGPT2ForQuestionAnswering.from_pretrained(edited), torch.arange(20)[None]
    with torch.no_grad():
        assert (model(input_ids=ids).start_logits - other(input_ids=ids).start_logits).abs().max() > 0.01
    assert model_checksum(model) != model_checksum(other)

    with pytest.raises(UserError, match="the base of this model is nf4"):
        call(run_qa, *same, "--bit_config", "8", out="bits", model=out, train=False)
    with pytest.raises(UserError, match="the base of this model is nf4"):
        call(run_qa_eval, *same, "--bit_configs", "32", "8", out="bits", model=out, train=False)
    with pytest.raises(UserError, match="--quantizer rotated: the base of this model is nf4"):
        call(run_qa, *same, "--quantizer", "rotated", out="bits", model=out, train=False)
    words = ["--model_name_or_path", out, "--bit_configs", "8", "--output_dir", tmp_path / "bits"]
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    with pytest.raises(ValueError, match="the base of this model is nf4"):
        export.main()


def test_a_killed_run_resumes_to_the_same_weights_and_with_the_same_base(call, tmp_path):
    steps = (*NF4, "--max_steps", "4", "--save_steps", "2", "--bf16")
    call(run_qa, *steps)
    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copytree(tmp_path / "out" / "checkpoint-2", killed / "checkpoint-2")
    shutil.copy(tmp_path / "out" / resuming.SETTINGS_FILE, killed)
    with pytest.raises(UserError, match="base_quantization"):
        call(run_qa, "--add_lora", *steps[3:], out="killed")
    record = call(run_qa, *steps, out="killed")
    assert record["steps"] == 4 and record["continues"].endswith("killed/checkpoint-2")
    expected, found = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", killed))
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    # another training may go on from its checkpoint, which stays one of an nf4 base
    call(run_qa, "--add_lora", out="more", model=killed)
    assert config_of(tmp_path / "more")["base_quantization"] == "nf4"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (NF4[1:], "pass --add_lora"),
        ((*NF4[1:], "--bit_widths", "4"), "the only quantization of a run"),
        ((*NF4, "--bit_config", "W32A8KV32"), "the only quantization of a run"),
        ((*NF4, "--quantizer", "rotated"), "the only quantization of a run"),
        ((*NF4, "--bitsandbytes", "nf4"), "no --do_train"),
        ((*NF4, "--do_train", "False"), "is for --do_train"),
        (("--add_lora", "--base_quantization", "fp4"), "--base_quantization fp4: allowed are nf4"),
        ((*NF4, "--optim", "paged_adamw_32bit"), "memory that CUDA shares"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refused_before_any_compute(flags, message, call, tmp_path):
    with pytest.raises(UserError, match=message):
        call(run_qa, *flags)
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == [resuming.LOCK_FILE]


def test_checkpoints_that_are_quantized_already_are_refused(call, monkeypatch, tmp_path):
    call(run_qa, "--bit_widths", "4")
    with pytest.raises(UserError, match="bits of its own, W4A4KV4; allowed are 16 and 32"):
        call(run_qa, *NF4, out="again", model=tmp_path / "out")
    words = ["--model_name_or_path", tmp_path / "out", "--bit_configs", "4", "--output_dir", tmp_path / "exported"]
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    export.main()
    with pytest.raises(UserError, match="an exported checkpoint without float weights"):
        call(run_qa, *NF4, out="again", model=tmp_path / "exported")
    assert os.listdir(tmp_path / "again") == [resuming.LOCK_FILE]


def test_notes_in_a_checkpoint_that_cannot_be(call, monkeypatch, tmp_path):
    call(run_qa, *NF4)
    config, path = config_of(tmp_path / "out"), tmp_path / "out" / "config.json"

    def refused(message, **changes):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message) as caught:
            QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path / "out")
        assert str(path) in str(caught.value)

    refused('"base_quantization" = "int4": allowed is "nf4", or null', base_quantization="int4")
    refused('needs "base_model_name_or_path" and, beside it, "lora_bank"', base_model_name_or_path=None)
    bits = {name: dict.fromkeys(layer, 8) for name, layer in config["bit_config"].items()}
    refused("bits of its own, W8A8KV8", bit_config=bits)
    path.write_text(json.dumps(config))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="bitsandbytes is not installed"):
        QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path / "out")


# ---- language model


@pytest.fixture
def clm(monkeypatch, tiny_model, tmp_path):
    """clm(*words, out, model): a small run of run_clm.py; returns its record."""
    (tmp_path / "text.txt").write_text("".join(f"{name} has the {thing}.\n" for thing in THINGS for name in NAMES) * 3)

    def run(*words, out="out", model=tiny_model):
        values = {"model_name_or_path": model, "output_dir": tmp_path / out, "block_size": 32, "use_cpu": True}
        values |= {"validation_file": tmp_path / "text.txt", "do_eval": True, "disable_tqdm": True}
        flags = [str(word) for key, value in values.items() for word in (f"--{key}", value)]
        monkeypatch.setattr(sys, "argv", ["run_clm.py", *flags, *map(str, words)])
        run_clm.main()
        return json.loads((tmp_path / out / "record.json").read_text())

    def train(*words, **options):
        learn = (
            "--max_steps",
            6,
            "--learning_rate",
            1e-2,
            "--per_device_train_batch_size",
            4,
            "--save_strategy",
            "no",
        )
        return run("--do_train", "--train_file", tmp_path / "text.txt", *learn, *words, **options)

    run.train = train
    return run


def test_language_model_learns_and_is_evaluated_as_it_was_trained(clm, tmp_path):
    before = clm("--eval_bit_configs", 32, out="before")["rows"][0]
    (row,) = clm.train("--base_quantization", "nf4", "--bit_widths", 32)["rows"]
    assert row["perplexity"] < before["perplexity"] / 2 and 4.1 < row["average_w_bits"] < 4.3
    config = config_of(tmp_path / "out")
    assert config["base_quantization"] == "nf4" and config["lora_bank"] == ["32"]
    (again,) = clm("--execution", "fake", out="again", model=tmp_path / "out")["rows"]
    assert again["perplexity"] == pytest.approx(row["perplexity"], rel=1e-6)
    assert again["average_w_bits"] == row["average_w_bits"]


@pytest.mark.parametrize(
    "words", [(), ("--bit_widths", "32", "--bit_configs", "8"), ("--bit_widths", "32", "8")], ids=str
)
def test_language_model_refuses_other_bits(words, clm, tmp_path):
    with pytest.raises(ValueError, match="--base_quantization nf4 is the only quantization of a run: --bit_widths 32"):
        clm.train("--base_quantization", "nf4", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--train_all_weights",), "a base in 4 bits does not train: no --train_all_weights"),
        (("--objective", "kd"), "a base in 4 bits is no full-precision teacher: pass --teacher_name_or_path"),
    ],
)
def test_language_model_refuses_to_train_or_to_distil_from_nf4(words, message, clm, tmp_path):
    with pytest.raises(ValueError, match=message):
        clm.train("--base_quantization", "nf4", "--bit_widths", "32", *words)
    assert not (tmp_path / "out").exists()


def test_language_model_refuses_without_training_and_rotated(clm):
    with pytest.raises(ValueError, match="--base_quantization nf4 is for --do_train"):
        clm("--base_quantization", "nf4")
    with pytest.raises(ValueError, match="no rotated quantizer"):
        clm.train("--base_quantization", "nf4", "--bit_widths", 32, "--quantizer", "rotated")
    with pytest.raises(ValueError, match="memory that CUDA shares"):
        clm.train("--optim", "paged_adamw_32bit")


@pytest.mark.parametrize("method", ["8bit", "nf4"])
def test_bitsandbytes_computes_in_the_mode_of_the_model(method, tiny_model):
    """In training mode a CPU dequantizes the weights, also of 8bit, which else rounds activations too."""
    for training in (False, True):
        model = QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model).train(training)
        quantize_with_bitsandbytes(model, method)
        assert {module.training for module in model.modules()} == {training}
