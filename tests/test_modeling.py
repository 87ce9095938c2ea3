"""The quantized model: equality with upstream, bits per layer, weight cache, LoRA bank, checkpoints and refusals."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from models.modeling_gpt2_quant import (
    QuantGPT2ForQuestionAnswering,
    QuantGPT2ForSequenceClassification,
    QuantGPT2LMHeadModel,
    QuantLinear,
)
from models.quantization import fake_quantize

PAIRS = [
    (GPT2ForQuestionAnswering, QuantGPT2ForQuestionAnswering, ("start_logits", "end_logits")),
    (GPT2ForSequenceClassification, QuantGPT2ForSequenceClassification, ("logits",)),
    (GPT2LMHeadModel, QuantGPT2LMHeadModel, ("logits",)),
]
C_ATTN, C_PROJ = "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"
C_FC, MLP_PROJ = "transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"


def tiny_config(**kwargs):
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 101, "n_positions": 48}
    return GPT2Config(**sizes | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0} | kwargs)


def batch(seed=0):
    ids = torch.randint(1, 101, (3, 20), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[1, 15:], mask[1, 15:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Folder of stock GPT-2 weights whose biases and LayerNorms are not trivial."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("stock")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(stock):
    torch.manual_seed(1)
    return QuantGPT2ForQuestionAnswering.from_pretrained(stock)


def loss_of(model):
    labels = {"start_positions": torch.tensor([3, 4, 5]), "end_positions": torch.tensor([6, 4, 9])}
    return model(**batch(), **labels).loss


def start_logits(model, **kwargs):
    with torch.no_grad():
        return model.eval()(**batch(**kwargs)).start_logits


# ---- equality with upstream


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("upstream", "ours", "outputs"), PAIRS, ids=lambda value: getattr(value, "__name__", ""))
def test_equals_upstream_at_32_bits(upstream, ours, outputs, attention, stock):
    torch.manual_seed(7)
    reference = upstream.from_pretrained(stock, attn_implementation=attention).eval()
    torch.manual_seed(7)  # the same random head
    found = ours.from_pretrained(stock, attn_implementation=attention)
    assert found.config._attn_implementation == attention
    for fresh_lora in (False, True):
        if fresh_lora:
            found.add_lora(["shared"])
        with torch.no_grad():
            expected, got = reference(**batch()), found.eval()(**batch())
        for output in outputs:
            torch.testing.assert_close(got[output], expected[output], rtol=0, atol=1e-6)
    from_config = ours(tiny_config(attn_implementation=attention))
    assert torch.isfinite(from_config(**batch())[outputs[0]]).all()


def test_gradients_equal_upstream(stock):
    torch.manual_seed(7)
    reference = GPT2ForQuestionAnswering.from_pretrained(stock).eval()
    torch.manual_seed(7)
    found = QuantGPT2ForQuestionAnswering.from_pretrained(stock)
    for net in (reference, found):
        loss_of(net).backward()
    ours = dict(found.named_parameters())
    for name, parameter in reference.named_parameters():
        grad, layer = ours[name].grad, found.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, QuantLinear) and grad.dim() == 2:
            grad = grad.t()
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", [C_ATTN, C_PROJ, C_FC, MLP_PROJ])
def test_each_linear_against_conv1d(name, model, stock):
    """Square and non-square layers: the output of the layer, and per-channel quantization on the right axis."""
    conv, layer = GPT2LMHeadModel.from_pretrained(stock).get_submodule(name), model.get_submodule(name)
    x = torch.randn(2, 5, conv.weight.shape[0])
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-6)
    assert torch.equal(layer.weight, conv.weight.t())
    layer.weight.requires_grad_(False)
    layer.w_bits = 4
    expected = torch.stack([fake_quantize(column, 4) for column in conv.weight.t()])  # one scale per output
    torch.testing.assert_close(layer(x), F.linear(x, expected, conv.bias), rtol=0, atol=1e-5)


def test_cached_decoding_equals_one_forward(stock):
    net = QuantGPT2LMHeadModel.from_pretrained(stock)
    net.set_bit_config("W4A8KV4")
    ids = batch()["input_ids"]
    with torch.no_grad():
        whole = net(ids).logits
        first = net(ids[:, :7], use_cache=True)
        rest = net(ids[:, 7:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, rtol=0, atol=1e-5)


# ---- bits


def test_bits_change_exactly_the_named_layers(model):
    resolved = model.set_bit_config({"default": 32, C_FC: 4, C_ATTN: "W8A32KV3"})
    assert resolved == model.config.bit_config
    for name, layer in model.quant_layers().items():
        others = (32, 32, 32 if name.endswith("c_attn") else None)
        expected = {C_FC: (4, 4, None), C_ATTN: (8, 32, 3)}.get(name, others)
        assert (layer.w_bits, layer.a_bits, layer.kv_bits) == expected
    assert len(model.quant_layers()) == 8 and "w_bits=4" in repr(model.get_submodule(C_FC))


def test_w_a_and_kv_bits_are_independent(model):
    names = ("W4A32KV32", "W32A4KV32", "W32A32KV4", 32)
    outputs = []
    for name in names:
        model.set_bit_config(name)
        outputs.append(start_logits(model))
    for i, first in enumerate(outputs):
        assert all(not torch.equal(first, other) for other in outputs[i + 1 :])


def test_whole_model_against_a_hand_written_block(model):
    """The first block's attention input and MLP at W4A4KV4, recomputed from the definition."""
    model.set_bit_config(4)
    block = model.transformer.h[0]
    x = torch.randn(1, 6, 32)
    with torch.no_grad():
        hidden = F.layer_norm(x, (32,), block.ln_1.weight, block.ln_1.bias)
        attn = block.attn.c_attn
        qkv = F.linear(fake_quantize(hidden, 4), fake_quantize(attn.weight, 4), attn.bias)
        q, k, v = qkv.split(32, dim=-1)
        expected = torch.cat([q, fake_quantize(k, 4), fake_quantize(v, 4)], dim=-1)
        torch.testing.assert_close(attn(hidden), expected, rtol=0, atol=1e-5)
        mlp = block.mlp
        inner = F.linear(fake_quantize(x, 4), fake_quantize(mlp.c_fc.weight, 4), mlp.c_fc.bias)
        inner = F.gelu(inner, approximate="tanh")
        outer = F.linear(fake_quantize(inner, 4), fake_quantize(mlp.c_proj.weight, 4), mlp.c_proj.bias)
        torch.testing.assert_close(mlp(x), outer, rtol=0, atol=1e-5)


def test_context_manager_restores_even_after_an_error(model):
    before = model.set_bit_config({"default": 8, C_FC: "W4A6"})
    reference = start_logits(model)
    with pytest.raises(RuntimeError, match="body"), model.at_bits(2) as resolved:
        assert model.config.bit_config == resolved != before
        raise RuntimeError("body")
    assert model.config.bit_config == before and torch.equal(start_logits(model), reference)
    with pytest.raises(ValueError, match="not a bit-width"), model.at_bits(9):
        pass
    assert model.config.bit_config == before


def test_kv_scale_does_not_look_ahead(stock):
    net = QuantGPT2LMHeadModel.from_pretrained(stock)
    net.set_bit_config(4)
    first, second = batch()["input_ids"], batch()["input_ids"]
    second[:, 10:] = 5
    with torch.no_grad():
        assert torch.equal(net(first).logits[:, :10], net(second).logits[:, :10])


def test_gradient_checkpointing_gives_the_same_gradients(model):
    model.add_lora([4])
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        torch.manual_seed(0)
        loss_of(model).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=1e-7, msg=name)


def test_bf16_autocast_keeps_float32_scales(model):
    model.add_lora([8])
    exact = start_logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        low = start_logits(model)
        codes, scale = model.get_submodule(C_FC).quantized_weight()
    weight = model.get_submodule(C_FC).weight
    assert scale.dtype == torch.float32 and torch.equal(codes * scale, fake_quantize(weight, 8))
    torch.testing.assert_close(low.float(), exact, rtol=0.05, atol=0.1)


# ---- the weight cache


def count_quantize(monkeypatch):
    import models.quant_linear as module

    calls = []
    original = module.quantize
    monkeypatch.setattr(module, "quantize", lambda weight, bits: calls.append(bits) or original(weight, bits))
    return calls


def test_frozen_weights_are_quantized_once_per_width(model, monkeypatch):
    calls = count_quantize(monkeypatch)
    model.add_lora(["shared"])
    for bits in (8, 4, 8, 4):
        model.set_bit_config(bits)
        loss_of(model.train()).backward()
        start_logits(model)
    assert sorted(calls) == [4] * 8 + [8] * 8


def test_cache_sees_every_change_of_the_weight(model, tmp_path):
    layer = model.get_submodule(C_FC)
    layer.weight.requires_grad_(False)
    layer.w_bits = 4
    x = torch.randn(3, 32)

    def is_current():
        expected = F.linear(x.to(layer.weight.dtype), fake_quantize(layer.weight, 4), layer.bias)
        tolerance = 1e-5 if layer.weight.dtype == torch.float32 else 0.1
        torch.testing.assert_close(layer(x.to(layer.weight.dtype)), expected, rtol=0, atol=tolerance)

    is_current()
    with torch.no_grad():
        layer.weight.mul_(2)
    is_current()
    layer.load_state_dict({name: value * 3 for name, value in layer.state_dict().items()})
    is_current()
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()}, assign=True)
    is_current()
    layer.weight.data = torch.randn_like(layer.weight)
    is_current()
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)
    is_current()
    layer.to(torch.bfloat16)
    is_current()
    layer.float()
    is_current()
    layer.weight.data[0] *= 5
    layer.clear_quantized()
    is_current()


def test_trained_weights_are_quantized_anew_each_step(model):
    """Quantization-aware training of all weights: STE gradient, and the step is seen by the next forward."""
    model.set_bit_config(4)
    layer = model.get_submodule(C_FC)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = start_logits(model)
    loss_of(model).backward()
    assert layer.weight.grad.abs().sum() > 0
    optimizer.step()
    assert not torch.equal(start_logits(model), before)
    codes, scale = layer.quantized_weight()
    assert torch.equal(codes * scale, fake_quantize(layer.weight.detach(), 4))


@pytest.mark.parametrize("execution", ["fake", "integer"])
@pytest.mark.parametrize("bits", [4, 8])
def test_fused_optimizers_leave_no_stale_codes(bits, execution):
    """torch's fused AdamW changes a weight without raising its version counter."""
    torch.manual_seed(0)
    layer, x = QuantLinear(8, 4), torch.randn(3, 8)
    layer.w_bits, layer.a_bits, layer.execution.kind = bits, 8, execution
    optimizer = torch.optim.AdamW([layer.weight], lr=1.0, fused=True)

    def is_current():
        expected = F.linear(fake_quantize(x, 8), fake_quantize(layer.weight.detach(), bits), layer.bias)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected.detach(), rtol=1e-5, atol=1e-5)
        codes, scale = layer.stored_codes((8,))[8]
        assert torch.equal(codes * scale, fake_quantize(layer.weight.detach(), 8))

    def step():
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    is_current()
    step()
    is_current()
    for width in (bits, 32):  # frozen, thawed, trained, frozen again
        layer.weight.requires_grad_(False)
        is_current()
        layer.weight.requires_grad_(True)
        layer.w_bits = width
        step()
        layer.w_bits = bits
        layer.weight.requires_grad_(False)
        is_current()
        layer.weight.requires_grad_(True)
    step()
    expected = fake_quantize(layer.weight.detach(), bits)
    layer.set_stored_codes(layer.stored_codes((bits,)))
    codes, scale = layer.quantized_weight()
    assert torch.equal(codes * scale, expected)


@pytest.mark.parametrize("execution", ["fake", "integer"])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_made_in_inference_mode_serve_a_training(bits, execution):
    model = QuantGPT2ForQuestionAnswering(tiny_config())
    model.add_lora([bits])
    model.set_bit_config(bits)
    model.set_execution(execution)
    with torch.inference_mode():
        model(torch.arange(6)[None])
    model(torch.arange(6)[None]).start_logits.sum().backward()
    assert any(layer.lora_B[str(bits)].weight.grad is not None for layer in model.quant_layers().values())


def test_codes_of_weights_that_can_train_are_not_kept(model, monkeypatch):
    calls = count_quantize(monkeypatch)
    model.set_bit_config(8)
    for execution in ("fake", "integer"):
        model.set_execution(execution)
        start_logits(model)
        start_logits(model)
    assert calls == [8] * 8 * 4 and all(not layer.stored_codes() for layer in model.quant_layers().values())
    model.drop_float_weights((8,))
    assert all(list(layer.stored_codes()) == [8] for layer in model.quant_layers().values())


# ---- LoRA


def test_fresh_adapters_change_nothing_at_any_width(model):
    plain = {}
    for bits in (4, 8, 32):
        with model.at_bits(bits):
            plain[bits] = start_logits(model)
    model.add_lora([4, 8, 32])
    for bits, expected in plain.items():
        with model.at_bits(bits):
            assert torch.equal(start_logits(model), expected)


def test_w_bits_select_the_adapter_and_only_it_learns(model):
    model.add_lora([4, 8], r=2, lora_alpha=6)
    model.set_bit_config({"default": 8, C_FC: {"w_bits": 4}})
    layers = model.quant_layers()
    assert layers[C_FC].active_adapter == "4" and layers[C_ATTN].active_adapter == "8" and layers[C_FC].scaling == 3.0
    loss_of(model).backward()
    for name, layer in layers.items():
        for key in ("4", "8"):
            assert (layer.lora_B[key].weight.grad is not None) == (key == layer.active_adapter), name
        assert layer.weight.grad is None and layer.bias.grad is None
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or name.startswith("qa_outputs.") for name in trained)
    assert len(trained) == 8 * 2 * 2 + 2


def test_shared_adapter_serves_every_width(model):
    model.add_lora(["shared"])
    for bits in (2, 5, 8, 16, 32):
        model.set_bit_config(bits)
        assert {layer.active_adapter for layer in model.quant_layers().values()} == {"shared"}


def test_adapters_of_a_bank_start_equal_and_are_separate(model):
    model.add_lora([4, 8])
    layer = model.get_submodule(C_FC)
    assert torch.equal(layer.lora_A["4"].weight, layer.lora_A["8"].weight) and layer.lora_A["4"].weight.std() > 0
    with torch.no_grad():
        layer.lora_A["4"].weight.zero_()
    assert layer.lora_A["8"].weight.any()


def test_bits_without_adapter_are_refused_and_nothing_changes(model):
    model.add_lora([4, 8])
    before = model.set_bit_config(8)
    with pytest.raises(ValueError) as caught:
        model.set_bit_config({"default": 8, C_FC: 5})
    assert C_FC in str(caught.value) and "w_bits = 5" in str(caught.value) and "['4', '8']" in str(caught.value)
    assert model.config.bit_config == before and model.get_submodule(C_FC).w_bits == 8
    with pytest.raises(ValueError, match="w_bits = 32"):
        model.set_bit_config(32)


@pytest.mark.parametrize("bank", [[], [9], ["4", "4"], ["shared", 4], ["x"]])
def test_refused_banks(bank, model):
    with pytest.raises(ValueError, match="LoRA bank"):
        model.add_lora(bank)


def test_refused_lora_arguments(model):
    with pytest.raises(ValueError, match="r = 0"):
        model.add_lora([4], r=0)
    model.add_lora([4])
    with pytest.raises(ValueError, match="LoRA bank already"):
        model.add_lora([8])


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_training_the_adapters_lowers_the_loss(bits, model):
    model.add_lora([bits])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses[::10]


# ---- checkpoints


def test_adapter_checkpoint_comes_back_complete(model, stock, tmp_path):
    model.add_lora([4, 8])
    model.set_base(stock)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.set_bit_config({"default": 8, C_FC: "W4A6"})
    expected = start_logits(model)
    model.save_pretrained(tmp_path / "own")
    size = (tmp_path / "own" / "model.safetensors").stat().st_size
    assert size < sum(p.numel() for p in model.parameters() if p.requires_grad) * 4 + 10_000, "the base is not in it"
    assert sorted(p.name for p in (tmp_path / "own").iterdir()) == ["config.json", "model.safetensors"]
    loaded = QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path / "own")
    assert torch.equal(start_logits(loaded), expected)
    assert loaded.config.bit_config == model.config.bit_config and loaded.config.lora_bank == ["4", "8"]
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert AutoConfig.from_pretrained(tmp_path / "own").model_type == "quant_gpt2"
    assert torch.equal(start_logits(AutoModelForQuestionAnswering.from_pretrained(tmp_path / "own")), expected)


@pytest.mark.parametrize("ours", [pair[1] for pair in PAIRS], ids=lambda value: value.__name__)
def test_full_checkpoint_comes_back_and_serves_as_base(ours, stock, tmp_path):
    model = ours.from_pretrained(stock)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.set_bit_config(6)
    model.save_pretrained(tmp_path / "full")
    loaded = ours.from_pretrained(tmp_path / "full")
    output = "start_logits" if ours is QuantGPT2ForQuestionAnswering else "logits"
    with torch.no_grad():
        assert torch.equal(loaded(**batch())[output], model.eval()(**batch())[output])
    assert all(p.requires_grad for p in loaded.parameters())
    loaded.add_lora([4])
    loaded.set_base(str(tmp_path / "full"))
    loaded.save_pretrained(tmp_path / "adapters")
    again = ours.from_pretrained(tmp_path / "adapters")
    with torch.no_grad():
        assert torch.equal(again(**batch())[output], loaded.eval()(**batch())[output])


@pytest.fixture
def checkpoint(model, stock, tmp_path):
    """(adapter checkpoint, its base), both in folders of the test's own."""
    base = tmp_path / "base"
    shutil.copytree(stock, base)
    model.add_lora([4])
    model.set_base(str(base))
    model.save_pretrained(tmp_path / "own")
    return tmp_path / "own", base


def test_changed_base_is_refused(checkpoint):
    own, base = checkpoint
    other = GPT2LMHeadModel.from_pretrained(base)
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.weight[0, 0] += 1e-3
    other.save_pretrained(base)
    with pytest.raises(ValueError, match="checksum"):
        QuantGPT2ForQuestionAnswering.from_pretrained(own)


def test_moved_base(checkpoint, tmp_path):
    own, base = checkpoint
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="not there any more.*--base_model_name_or_path"):
        QuantGPT2ForQuestionAnswering.from_pretrained(own)
    QuantGPT2ForQuestionAnswering.from_pretrained(own, base_model_name_or_path=str(tmp_path / "elsewhere"))


@pytest.mark.parametrize("which", ["own", "base"])
def test_truncated_weights_are_refused(which, checkpoint):
    folder = checkpoint[which == "base"]
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        QuantGPT2ForQuestionAnswering.from_pretrained(checkpoint[0])


def test_incomplete_checkpoints_are_refused(checkpoint):
    own, base = checkpoint
    (own / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model.safetensors"):
        QuantGPT2ForQuestionAnswering.from_pretrained(own)
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model.safetensors"):
        QuantGPT2ForQuestionAnswering.from_pretrained(base)


def test_weights_of_another_shape_are_refused(checkpoint):
    own, _ = checkpoint
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"lora_r": 3}))
    with pytest.raises(ValueError, match="do not fit"):
        QuantGPT2ForQuestionAnswering.from_pretrained(own)


def test_missing_layers_of_stock_weights_are_refused(stock, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "partial"
    shutil.copytree(stock, folder)
    state = load_file(folder / "model.safetensors")
    state.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights are missing: transformer.h.1.mlp.c_fc.weight"):
        QuantGPT2ForQuestionAnswering.from_pretrained(folder)


def test_other_architecture_is_refused(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type is 'bert', allowed are 'gpt2'"):
        QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_checkpoint(checkpoint, model, monkeypatch):
    own, _ = checkpoint
    before = (own / "model.safetensors").read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(own)
    assert (own / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in own.iterdir()) == ["config.json", "model.safetensors"]
