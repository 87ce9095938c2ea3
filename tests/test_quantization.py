"""Numerics of the quantizer, against hand-computed rows, independent reference cases and numpy."""

import json
import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.quantization import dequantize, fake_quantize, fake_quantize_kv_, frozen_linear, quantize

REFERENCE = pathlib.Path(__file__).with_name("reference_cases.json")
BITS = range(2, 9)


def reference_cases(kind):
    cases = json.loads(REFERENCE.read_text())["cases"]
    return [pytest.param(case, id=case["id"]) for case in cases if case["kind"] == kind]


def numpy_minmax(x, bits):
    """Independent float64 form: (codes, scale, values)."""
    x = np.asarray(x, dtype=np.float64)
    scale = np.abs(x).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    codes = np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0))
    return codes, scale, codes * scale


@pytest.mark.parametrize(
    ("bits", "codes"),
    [(2, [0, 0, 1, -1, 1, 0]), (3, [0, -1, 2, -3, 2, 1]), (4, [1, -2, 4, -7, 5, 2]), (8, [13, -33, 66, -127, 94, 42])],
)
def test_hand_computed_row(bits, codes):
    found, scale = quantize(torch.tensor([[0.1, -0.26, 0.52, -1.0, 0.74, 0.33]]), bits)
    assert found.dtype == torch.int8 and found.tolist() == [codes]
    assert scale.dtype == torch.float32 and scale.shape == (1, 1)
    assert scale.item() == pytest.approx(1 / (2 ** (bits - 1) - 1))


@pytest.mark.parametrize("case", reference_cases("per_token_symmetric_minmax"))
def test_reference_rows(case):
    for bits, expected in case["bits"].items():
        x = torch.tensor(case["input"])
        codes, scale = quantize(x, int(bits))
        exact = torch.tensor(expected["exact_codes"])
        free = torch.ones_like(exact, dtype=torch.bool)
        for position in expected["tie_positions"]:
            free[tuple(np.atleast_1d(position)) if free.dim() == np.size(position) else (..., position)] = False
        assert torch.equal(codes.long()[free], exact[free])
        torch.testing.assert_close(scale, torch.tensor(expected["exact_alpha"]), rtol=1e-6, atol=0)
        out = torch.tensor(expected["exact_out"])
        torch.testing.assert_close(fake_quantize(x, int(bits))[free], out[free], rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", reference_cases("idempotence"))
def test_reference_idempotence(case):
    x = torch.tensor(case["input"])
    for bits in map(int, case["bits"]):
        once = fake_quantize(x, bits)
        torch.testing.assert_close(fake_quantize(once, bits), once, rtol=2e-7, atol=0)


@pytest.mark.parametrize("case", reference_cases("weight"))
def test_reference_weight_axis(case):
    codes, scale = quantize(torch.tensor(case["weight_out_in"]), case["bits"])
    torch.testing.assert_close(scale.squeeze(-1), torch.tensor(case["correct_alpha"]), rtol=1e-6, atol=0)
    torch.testing.assert_close(dequantize(codes, scale), torch.tensor(case["correct_out"]), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("case", reference_cases("kv"))
def test_reference_kv(case):
    k = torch.tensor(case["input_BTC"])[0]
    qkv = torch.cat([k, k, 2 * k], dim=-1)  # Q, K, V: V has its own scale
    out = fake_quantize_kv_(qkv.clone(), case["bits"])
    expected = torch.tensor(case["per_token_all_heads"])[0]
    assert torch.equal(out[:, :4], k)
    torch.testing.assert_close(out[:, 4:8], expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(out[:, 8:], 2 * expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("case", reference_cases("lora"))
def test_reference_lora_order(case):
    from models.modeling_gpt2_quant import QuantLinear

    weight = torch.tensor(case["W_out_in"])
    layer = QuantLinear(weight.shape[1], weight.shape[0])
    layer.add_lora(["shared"], r=len(case["A"]), lora_alpha=case["scaling"] * len(case["A"]))
    layer.load_state_dict(
        {"weight": weight, "bias": torch.zeros(len(weight)), "lora_A.shared.weight": torch.tensor(case["A"]),
         "lora_B.shared.weight": torch.tensor(case["B"])}
    )  # fmt: skip
    for trainable in (True, False):
        layer.weight.requires_grad_(trainable)
        for bits, expected in case["bits"].items():
            layer.w_bits = layer.a_bits = int(bits)
            found = layer(torch.tensor(case["x"]))
            torch.testing.assert_close(found, torch.tensor(expected["lora_on_unquantized_x"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_random_rows_equal_numpy(bits):
    x = torch.randn(200, 37, generator=torch.Generator().manual_seed(bits)) * torch.logspace(-6, 6, 200)[:, None]
    codes, scale = quantize(x, bits)
    expected_codes, expected_scale, _ = numpy_minmax(x, bits)
    assert np.array_equal(codes.numpy(), expected_codes)
    np.testing.assert_allclose(scale.numpy(), expected_scale, rtol=1e-6)
    assert codes.abs().max() == 2 ** (bits - 1) - 1  # never -2**(bits-1)
    assert torch.equal(fake_quantize(x, bits), dequantize(codes, scale))


@pytest.mark.parametrize("bits", BITS)
def test_properties(bits):
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    out = fake_quantize(x, bits)
    assert all(len(row.unique()) <= 2**bits - 1 for row in out)
    assert torch.equal(fake_quantize(-x, bits), -out), "odd symmetry"
    assert torch.equal(quantize(out, bits)[0], quantize(x, bits)[0]), "idempotent in codes"
    changed = x.clone()
    changed[1:] *= 3
    assert torch.equal(fake_quantize(changed, bits)[0], out[0]), "a row does not see other rows"


@pytest.mark.parametrize("bits", BITS)
def test_half_of_the_maximum_is_rounded_to_even_as_in_exact_arithmetic(bits):
    amax = torch.rand(500, 1, generator=torch.Generator().manual_seed(bits)) + 0.01
    codes, _ = quantize(torch.cat([amax / 2, -amax / 2, amax], dim=1), bits)
    half = round((2 ** (bits - 1) - 1) / 2)  # Python rounds half to even
    assert torch.equal(codes[:, :2], torch.tensor([[half, -half]], dtype=torch.int8).expand(500, 2))


def test_zero_tiny_and_huge_rows():
    x = torch.tensor([[0.0, 0.0, 0.0], [1e-44, -1e-45, 0.0], [190e-45, 1e-45, 0.0], [3e38, -1e38, 1.0]])
    for bits in BITS:
        codes, scale = quantize(x, bits)
        assert codes[0].tolist() == [0, 0, 0] and scale[0] == 0
        assert codes.abs().max() <= 2 ** (bits - 1) - 1
        assert torch.isfinite(fake_quantize(x, bits)).all()
        assert torch.equal(fake_quantize(x, bits)[0], torch.zeros(3))


def test_nan_is_not_hidden():
    assert torch.isnan(fake_quantize(torch.tensor([[1.0, float("nan")]]), 8)).any()


@pytest.mark.parametrize("bits", [16, 32])
def test_float_bits_return_the_input_itself(bits):
    x = torch.randn(3, 4)
    assert fake_quantize(x, bits) is x
    with pytest.raises(ValueError, match=f"bits = {bits}"):
        quantize(x, bits)


@pytest.mark.parametrize("bits", [0, 1, 9, 12, 15, 17, -4, 4.0, "8", True, None])
def test_refused_bits(bits):
    for function in (quantize, fake_quantize):
        with pytest.raises(ValueError, match="bits = "):
            function(torch.randn(2, 2), bits)


def test_low_precision_input_is_computed_in_float32():
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        codes, scale = quantize(low, 8)
        assert torch.equal(codes, quantize(low.float(), 8)[0]) and scale.dtype == torch.float32
        assert fake_quantize(low, 8).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fake_quantize(x, 8), dequantize(*quantize(x, 8)))


def test_gradient_is_the_identity_outside_plus_minus_two_as_well():
    x = torch.tensor([[5.0, -3.0, 0.2, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    (fake_quantize(x, 3) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


@pytest.mark.parametrize("a_bits", [4, 8, 32])
def test_frozen_linear_equals_fake_quantization(a_bits):
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((5, 7), (6, 7), (6,)))
    grad = torch.randn(5, 6, generator=generator)
    results = []
    for frozen in (True, False):
        x_, bias_ = x.clone().requires_grad_(), bias.clone().requires_grad_()
        if frozen:
            y = frozen_linear(x_, *quantize(weight, 4), bias_, a_bits)
        else:
            y = F.linear(fake_quantize(x_, a_bits), fake_quantize(weight, 4), bias_)
        y.backward(grad)
        results.append((y.detach(), x_.grad, bias_.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_frozen_linear_under_autocast():
    x, weight, bias = torch.randn(5, 64), torch.randn(6, 64), torch.randn(6)
    exact = frozen_linear(x, *quantize(weight, 8), bias, 8)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen_linear(x, *quantize(weight, 8), bias, 8)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.2)


def test_kv_leaves_q_alone_and_gradient_passes():
    qkv = torch.randn(4, 9, requires_grad=True)
    out = fake_quantize_kv_(qkv * 1.0, 4)
    assert torch.equal(out[:, :3], qkv[:, :3])
    assert torch.equal(out[:, 3:6], fake_quantize(qkv[:, 3:6].detach(), 4))
    assert torch.equal(out[:, 6:], fake_quantize(qkv[:, 6:].detach(), 4))
    out.sum().backward()
    assert torch.equal(qkv.grad, torch.ones(4, 9))
    assert fake_quantize_kv_(out, 32) is out and fake_quantize_kv_(out, None) is out
