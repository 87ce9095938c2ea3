"""The same checks on the CPU and, marked gpu, on a CUDA device: products, heads, training steps, cache, export."""

import itertools

import pytest
import torch
from transformers import GPT2LMHeadModel

from conftest import experiment
from models.exported import save_exported, served_widths
from models.fast.integer import int_mm, integer_linear, is_supported
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering, QuantGPT2LMHeadModel, QuantLinear
from models.quantization import fake_quantize, quantize
from test_modeling import PAIRS, batch, tiny_config

with experiment("language_model"):
    from models.kv_cache import QuantizedKVCache
with experiment("switch_precision"):
    import adaptive_lora_trainer as training

GPT2_SHAPES = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return torch.device(request.param)


@pytest.fixture
def model(device):
    """A tiny model for question answering with adapters at 4 and 8 bits that are not zero."""
    torch.manual_seed(0)
    model = QuantGPT2ForQuestionAnswering(tiny_config(initializer_range=0.2, resid_pdrop=0.0, embd_pdrop=0.0))
    model.add_lora([4, 8])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(device).eval()


def on(device, tensors):
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def assert_close_to_scale(found, expected, tolerance):
    """Relative to the largest entry."""
    assert torch.isfinite(found).all()
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    assert difference <= tolerance, f"{difference:.1e} of the largest entry"


# ---- integer products


@pytest.mark.parametrize(("inp", "out"), GPT2_SHAPES)
def test_integer_products_are_supported_and_exact(inp, out, device):
    assert is_supported(device, inp, out), "GPT-2's layers would fall back to fake quantization here"
    for tokens in (1, 16, 17, 33, 384):
        codes, weight = (torch.randint(-127, 128, (n, inp), dtype=torch.int8) for n in (tokens, out))
        expected = codes.double() @ weight.double().t()
        assert torch.equal(int_mm(codes.to(device), weight.to(device)).cpu().double(), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_those_of_the_cpu(dtype, bits, device):
    torch.manual_seed(bits)
    x = (torch.randn(65, 768) * torch.exp(torch.randn(65, 1))).to(dtype)
    for found, expected in zip(quantize(x.to(device), bits), quantize(x, bits), strict=True):
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize(("w_bits", "a_bits", "kv_bits"), [(8, 8, 8), (4, 8, 8), (4, 4, 4), (3, 5, 6)])
def test_integer_execution_agrees_with_fake_quantization(w_bits, a_bits, kv_bits, device):
    """The codes are equal by the test above; the sums then agree to float rounding."""
    torch.manual_seed(0)
    layer = QuantLinear(768, 2304, head_size=64)
    layer.add_lora([str(w_bits)], r=8, lora_alpha=16)
    torch.nn.init.normal_(layer.lora_B[str(w_bits)].weight, std=0.02)
    torch.nn.init.normal_(layer.bias)
    layer.requires_grad_(False).to(device)
    layer.w_bits, layer.a_bits = w_bits, a_bits
    x = torch.randn(40, 768, device=device)
    codes, scale = layer.quantized_weight()
    lora = (layer.lora_A[str(w_bits)].weight, layer.lora_B[str(w_bits)].weight, layer.scaling)
    found = integer_linear(x, codes, scale, layer.bias, a_bits, lora=lora)
    expected = fake_quantize(x, a_bits) @ fake_quantize(layer.weight, w_bits).t() + layer.bias
    expected += layer.scaling * (x @ lora[0].t()) @ lora[1].t()
    assert_close_to_scale(found, expected, 1e-5)
    layer.kv_bits = kv_bits
    outputs = []
    for layer.execution.kind in ("fake", "integer"):
        with torch.no_grad():
            outputs.append(layer(x[None])[0])
    step = expected[:, 768:].abs().max() / (2 ** (kv_bits - 1) - 1)  # rounding may move K and V by one code
    assert_close_to_scale(outputs[1][:, :768], outputs[0][:, :768], 1e-5)
    assert (outputs[1] - outputs[0]).abs().max() <= 1.01 * step


def test_a_whole_model_on_integers(model, device):
    inputs = on(device, batch())
    for bits in (8, 4, "W4A8KV8"):
        model.set_bit_config(bits)
        logits = []
        for execution in ("fake", "integer"):
            model.set_execution(execution)
            with torch.no_grad():
                logits.append(model(**inputs).start_logits)
        assert_close_to_scale(logits[1], logits[0], 0.2)  # single codes may differ, which later layers see
    cpu = model.cpu()
    with torch.no_grad():
        assert torch.isfinite(cpu(**batch()).start_logits).all(), "a model that moved computes on its new device"


# ---- heads


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("upstream", "ours", "outputs"), PAIRS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_head_equals_upstream_at_32_bits(upstream, ours, outputs, attention, device, tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(tiny_config(initializer_range=0.2)).save_pretrained(tmp_path)
    models = []
    for head in (upstream, ours):
        torch.manual_seed(7)  # the same random head
        models.append(head.from_pretrained(tmp_path, attn_implementation=attention).eval().to(device))
    inputs = on(device, batch())
    with torch.no_grad():
        expected, found = (model(**inputs) for model in models)
    for output in outputs:
        torch.testing.assert_close(found[output], expected[output], rtol=0, atol=1e-5)


# ---- training steps


def joint_step(model, device, widths, dtype=None, execution=("fake",)):
    """(losses, gradients) of one step over the widths with cascade distillation; gradients as one vector."""
    model.set_execution(*execution)
    model.zero_grad()
    ids = batch()["input_ids"].to(device)
    labels = torch.tensor([[3, 4, 5], [6, 4, 9]], device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    scale = 1024.0 if dtype == torch.float16 else 1.0  # what a gradient scaler does

    def forward(bits):
        model.set_bit_config(bits)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            output = model(input_ids=ids)
        return torch.stack([output.start_logits, output.end_logits]).float()

    found, teachers = [], []
    for bits in widths:
        logits = forward(bits)
        loss = training.qa_cross_entropy(logits, labels, mask)
        loss = loss + sum(training.qa_distillation_kl(*logits, *teacher, mask) for teacher in teachers)
        (loss * scale / len(widths)).backward()
        found.append(loss.item())
        teachers.append(logits.detach())
    gradients = {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    return torch.tensor(found), gradients


def flat(gradients):
    return torch.cat([gradient.flatten().cpu() for gradient in gradients.values()])


@pytest.mark.parametrize("widths", [(8,), (8, 4)], ids=["static", "joint"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_steps_are_finite_and_close_to_float32(dtype, widths, model, device):
    if dtype == torch.float16 and device.type == "cpu":
        pytest.skip("fp16 is for CUDA")
    losses, gradients = joint_step(model, device, widths, dtype)
    expected_losses, expected = joint_step(model, device, widths)
    torch.testing.assert_close(losses, expected_losses, rtol=0.1, atol=0.05)
    assert torch.cosine_similarity(flat(gradients), flat(expected), dim=0) > 0.9


def test_joint_step_trains_the_adapters_of_its_widths_as_on_the_cpu(model, device):
    losses, gradients = joint_step(model, device, (8, 4))
    for side, width in itertools.product("AB", "48"):
        assert any(f".lora_{side}.{width}." in name and grad.any() for name, grad in gradients.items())
    assert not any("c_attn.weight" in name for name in gradients), "the base is frozen"
    expected_losses, expected = joint_step(model.cpu(), torch.device("cpu"), (8, 4))
    torch.testing.assert_close(losses, expected_losses, rtol=0.02, atol=0.02)
    assert torch.cosine_similarity(flat(gradients), flat(expected), dim=0) > 0.98


@pytest.mark.parametrize("backward", ["fp32", "bf16"])
def test_integer_training_step_is_close_to_the_fake_one(backward, model, device):
    losses, gradients = joint_step(model, device, (8, 4), execution=("integer", backward))
    expected_losses, expected = joint_step(model, device, (8, 4))
    torch.testing.assert_close(losses, expected_losses, rtol=0.05, atol=0.05)
    assert torch.cosine_similarity(flat(gradients), flat(expected), dim=0) > 0.95


# ---- generation, export


@pytest.mark.parametrize("bits", [8, 4, "W8A8KV4"])
def test_generation_with_the_quantized_cache_equals_none(bits, device):
    torch.manual_seed(0)
    model = QuantGPT2LMHeadModel(tiny_config(initializer_range=0.2)).to(device).double().eval()  # see Limitations
    model.set_bit_config(bits)
    ids = torch.randint(1, 101, (2, 9), device=device)
    length = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = model.generate(**inputs, past_key_values=QuantizedKVCache(model.config), **length)
    assert found.shape == (2, 25)
    assert torch.equal(found, model.generate(**inputs, use_cache=False, **length))


def test_an_exported_model_computes_what_it_was_made_from(model, device, tmp_path):
    resolved = [model.set_bit_config(bits) for bits in (8, "W4A8KV8")]
    model.set_execution("integer")
    save_exported(model, tmp_path, served_widths(resolved), resolved[0])
    loaded = QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path).to(device).eval()
    loaded.set_execution("integer")
    inputs = on(device, batch())
    for bits in (8, "W4A8KV8"):
        logits = []
        for net in (model, loaded):
            net.set_bit_config(bits)
            with torch.no_grad():
                logits.append(net(**inputs).start_logits)
        torch.testing.assert_close(*logits, rtol=0, atol=1e-6)
