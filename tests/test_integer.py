"""Integer execution against fake quantization: codes, outputs, gradients, packing, stored codes, refusals."""

import itertools
import logging
import shutil

import pytest
import torch
import torch.nn.functional as F

import models.fast.integer as integer
import models.fast.kernels as kernels
import models.quant_linear as quant_linear
from models.execution import Execution
from models.fast.integer import integer_linear, pack_int4, unpack_int4
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering, QuantLinear, TanhGELU
from models.quantization import quantize
from test_modeling import C_ATTN, C_FC, MLP_PROJ, batch, loss_of, tiny_config

BITS = range(2, 9)


@pytest.fixture(scope="module")
def trained():
    """A tiny model with adapters at 4 and 8 bits that are not zero."""
    torch.manual_seed(0)
    model = QuantGPT2ForQuestionAnswering(tiny_config(initializer_range=0.2)).eval()
    model.add_lora([4, 8])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


@pytest.fixture
def model(trained):
    trained.set_bit_config(8)
    trained.set_execution("fake")
    trained.zero_grad()
    return trained.eval()


def make_layer(inp=24, out=36, kv=True, lora=True, seed=0):
    torch.manual_seed(seed)
    layer = QuantLinear(inp, out, head_size=4 if kv else None)
    torch.nn.init.normal_(layer.bias)
    if lora:
        layer.add_lora(["shared"], r=3, lora_alpha=6)
        torch.nn.init.normal_(layer.lora_B["shared"].weight, std=0.1)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    return layer


@pytest.fixture(params=["compiled", "operators"])
def passes(request, monkeypatch):
    """Both ways to compute what is around the product: kernels.c, and torch's operators."""
    if request.param == "operators":
        monkeypatch.setattr(kernels, "can_take", lambda *tensors, **options: False)


def both(layer, x):
    """Outputs of the fake and of the integer path, without gradients."""
    outputs = []
    for layer.execution.kind in ("fake", "integer"):
        with torch.no_grad():
            outputs.append(layer(x))
    return outputs


def assert_close_to_scale(found, expected, tolerance=1e-5):
    """Relative to the largest entry: sums cancel, so single entries may be near zero."""
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    assert difference <= tolerance, f"{difference:.1e} of the largest entry"


# ---- packing


@pytest.mark.parametrize("shape", [(5, 8), (5, 7), (3, 1), (1, 2), (4, 0), (2, 3, 9)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packing_round_trip(bits, shape):
    qmax = 2 ** (bits - 1) - 1
    codes = torch.randint(-qmax, qmax + 1, shape, generator=torch.Generator().manual_seed(bits)).to(torch.int8)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], (shape[-1] + 1) // 2)
    unpacked = unpack_int4(packed, shape[-1])
    assert torch.equal(unpacked, codes) and unpacked.is_contiguous()


def test_packed_layout_is_fixed():
    codes = torch.tensor([[-8, 7, -1, 3, 5]], dtype=torch.int8)
    assert pack_int4(codes).tolist() == [[0x38, 0x57, 0x0F]]
    assert unpack_int4(pack_int4(codes), 5).tolist() == codes.tolist()


def test_codes_that_need_more_than_four_bits_are_refused():
    with pytest.raises(ValueError, match="from -2 to 8 do not fit in four bits"):
        pack_int4(torch.tensor([[8, -2]], dtype=torch.int8))


# ---- one layer


@pytest.mark.parametrize("passes", [integer, kernels], ids=lambda module: module.__name__)
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_bit_identical(bits, passes):
    if passes is kernels and not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    x = torch.randn(300, 37, generator=torch.Generator().manual_seed(bits)) * torch.logspace(-8, 8, 300)[:, None]
    x[::3, 0] = x[::3].abs().amax(-1) / 2  # exact ties
    x[7], x[8] = 0, 1e-44
    codes, scale, low_rank = passes.quantize_rows(x, bits)
    assert low_rank.shape == (300, 0)
    expected_codes, expected_scale = quantize(x, bits)
    assert torch.equal(codes, expected_codes) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize(("w_bits", "a_bits"), list(itertools.product(BITS, BITS)))
def test_layer_agrees_with_fake_quantization(w_bits, a_bits, passes):
    layer = make_layer(kv=False)
    layer.w_bits, layer.a_bits = w_bits, a_bits
    for tokens in (1, 3, 17):
        fake, found = both(layer, torch.randn(tokens, 24))
        assert_close_to_scale(found, fake)


@pytest.mark.parametrize(("inp", "out"), [(1, 3), (7, 9), (33, 12), (64, 192)])
def test_odd_shapes_zero_rows_kv_bits_and_more_than_one_piece(inp, out, passes, monkeypatch):
    monkeypatch.setattr(integer, "PIECE_TOKENS", 8)
    layer = make_layer(inp, out)
    x = torch.randn(2, 21, inp)
    x[0, 3] = x[1, 20] = 0
    for layer.w_bits, layer.a_bits, layer.kv_bits in ((8, 8, 32), (4, 8, 4), (3, 5, 8)):
        fake, found = both(layer, x)
        assert found.shape == (2, 21, out)
        third = out // 3
        assert_close_to_scale(found[..., :third], fake[..., :third])  # Q; K and V may differ by one step of their grid
        step = fake[..., third:].abs().max() / (2 ** (min(layer.kv_bits, 8) - 1) - 1)
        differs = (found - fake)[..., third:].abs() > 1e-5 * fake.abs().max()
        assert differs.float().mean() < 0.01 and ((found - fake).abs() <= 1.01 * step).all()
        assert torch.equal(found[0, 3, :third], layer.bias[:third])
    assert layer(x[:, :0]).shape == (2, 0, out)


def test_float_layers_run_as_before():
    layer = make_layer(kv=False)
    x = torch.randn(5, 24)
    for layer.w_bits, layer.a_bits in ((32, 8), (8, 32), (16, 16)):
        assert torch.equal(*both(layer, x))


def test_bfloat16(model):
    layer = make_layer(kv=False)
    layer.w_bits = layer.a_bits = 8
    x = torch.randn(9, 24)
    exact = both(layer, x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        fake, found = both(layer, x)
    assert fake.dtype == found.dtype == torch.bfloat16
    assert (found - exact).abs().max() <= 1.5 * (fake - exact).abs().max()  # codes and rescale stay float32
    layer.bfloat16()
    assert both(layer, x.bfloat16())[1].dtype == torch.bfloat16


def test_a_changed_weight_is_seen():
    layer = make_layer(kv=False)
    layer.w_bits = layer.a_bits = 4
    x = torch.randn(5, 24)
    before = both(layer, x)[1]
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(-1, 2, 24))
    fake, found = both(layer, x)
    assert_close_to_scale(found, fake)
    assert (found - before).abs().max() > 0.01


def test_gelu_equals_torch():
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -1e4, 1e4, 1e-30])])
    with torch.no_grad():
        torch.testing.assert_close(TanhGELU(Execution())(x), F.gelu(x, approximate="tanh"), rtol=1e-6, atol=2e-7)
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        TanhGELU(Execution()), torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    )


# ---- where int8 products are missing


@pytest.mark.parametrize("failure", ["refused", "saturating"])
def test_fallback_is_logged_once_and_gives_the_fake_result(failure, monkeypatch, caplog):
    def broken(codes, weight):
        if failure == "refused":
            raise RuntimeError("no such product here")
        return (codes.int() @ weight.int()).clamp(-32768, 32767)

    monkeypatch.setattr(torch, "_int_mm", broken)
    integer.is_supported.cache_clear()
    layer = make_layer()
    layer.w_bits = layer.a_bits = 8
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            fake, found = both(layer, torch.randn(4, 24))
            assert torch.equal(found, fake)
        layer(torch.randn(4, 24, requires_grad=True)).sum().backward()
    integer.is_supported.cache_clear()
    (record,) = caplog.records
    reason = "no such product here" if failure == "refused" else "sums are not exact"
    assert "24 x 36 on cpu" in record.message and reason in record.message


# ---- training


def gradients(layer, x, execution, backward_dtype=None):
    layer.execution.kind, layer.execution.backward_dtype = execution, backward_dtype
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, layer.lora_A["shared"].weight.grad, layer.lora_B["shared"].weight.grad]


@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (4, 8), (4, 4), (3, 6)])
def test_gradients_agree_with_fake_quantization(w_bits, a_bits):
    layer = make_layer()
    layer.w_bits, layer.a_bits, layer.kv_bits = w_bits, a_bits, 32
    x = torch.randn(2, 9, 24)
    expected = gradients(layer, x, execution="fake")
    for found, wanted in zip(gradients(layer, x, execution="integer"), expected, strict=True):
        assert_close_to_scale(found, wanted)
    for execution in ("integer", "fake"):
        low = gradients(layer, x, execution=execution, backward_dtype=torch.bfloat16)
        assert torch.equal(low[0], gradients(layer, x, execution=execution)[0]) and low[1].dtype == torch.float32
        assert_close_to_scale(low[1], expected[1], 0.01)
        assert not torch.equal(low[1], expected[1])


def test_gradients_of_a_bias_and_of_bf16_autocast():
    layer = make_layer(kv=False)
    layer.bias.requires_grad_()
    layer.w_bits = layer.a_bits = 8
    x = torch.randn(6, 24)
    for layer.execution.kind, layer.execution.backward_dtype in itertools.product(
        ("fake", "integer"), (None, torch.bfloat16)
    ):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x.requires_grad_())
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and x.grad.dtype == layer.bias.grad.dtype == torch.float32
        assert torch.equal(layer.bias.grad, torch.full((36,), 6.0))


def test_a_trainable_weight_stays_fake():
    layer = make_layer(kv=False, lora=False)
    layer.weight.requires_grad_()
    layer.w_bits = layer.a_bits = 4
    x = torch.randn(5, 24)
    results = []
    for layer.execution.kind in ("fake", "integer"):
        layer.zero_grad()
        y = layer(x)
        y.sum().backward()
        results.append((y, layer.weight.grad.clone()))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# ---- the model


@pytest.mark.parametrize(
    "config", [8, 4, "W4A8KV8", {"default": 8, C_FC: "W4A4", C_ATTN: {"a_bits": 32}, MLP_PROJ: {"w_bits": 4}}]
)
def test_every_layer_of_a_model_agrees_on_its_own_input(config, model, monkeypatch):
    monkeypatch.setattr(integer, "PIECE_TOKENS", 7)
    model.set_bit_config(config)
    model.set_execution("integer")
    compared = []

    def compare(layer, args, output):
        kv_bits, layer.kv_bits = layer.kv_bits, 32  # K and V may fall on the other side of a rounding boundary
        found, layer.execution.kind = layer.forward(*args), "fake"
        assert_close_to_scale(found, layer.forward(*args))
        layer.kv_bits, layer.execution.kind = kv_bits, "integer"
        compared.append(len(args[0].flatten(0, -2)))

    hooks = [layer.register_forward_hook(compare) for layer in model.quant_layers().values()]
    with torch.no_grad():
        model(**batch())
    for hook in hooks:
        hook.remove()
    assert sum(compared) == 8 * 60 and 7 in compared and 60 in compared  # the MLP works piecewise


def test_answers_equal_those_of_fake_quantization(model):
    logits = {}
    for execution in ("fake", "integer"):
        model.set_execution(execution)
        with torch.no_grad():
            output = model(**batch())
        logits[execution] = torch.stack([output.start_logits, output.end_logits])
    # A difference of 1e-7 moves a code to its neighbour now and then, so a whole model differs by more than a layer.
    assert_close_to_scale(logits["integer"], logits["fake"], 0.02)
    assert torch.equal(logits["integer"].argmax(-1), logits["fake"].argmax(-1))


def test_training_on_integers_gives_the_same_gradients(model):
    grads = {}
    for execution, backward_dtype in (("fake", "fp32"), ("integer", "fp32"), ("integer", "bf16")):
        model.set_execution(execution, backward_dtype)
        model.zero_grad()
        loss_of(model).backward()
        grads[execution, backward_dtype] = torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )
    expected = grads.pop(("fake", "fp32"))
    for found in grads.values():
        assert F.cosine_similarity(found, expected, dim=0) > 0.999
        assert (found.norm() / expected.norm() - 1).abs() < 0.02


def test_integers_are_used_where_they_should(model, monkeypatch):
    shapes = []

    def spy(x, codes, *args):
        shapes.append(tuple(codes.shape))
        return integer_linear(x, codes, *args)

    monkeypatch.setattr(quant_linear, "integer_linear", spy)
    with torch.no_grad():
        model(**batch())
        assert not shapes, "fake is the default"
        model.set_execution("integer")
        model.set_bit_config({"default": 8, C_FC: {"a_bits": 32}})
        model(**batch())
        assert len(shapes) == 7
    loss_of(model)
    assert len(shapes) == 14, "in training as well"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("int8",), "execution = 'int8': allowed are integer, fake"), (("fake", "fp8"), "backward_dtype = 'fp8'")],
)
def test_refused_execution(arguments, message, model):
    with pytest.raises(ValueError, match=message):
        model.set_execution(*arguments)


# ---- codes without float weights


def served(config=(4, 8)):
    torch.manual_seed(3)
    model = QuantGPT2ForQuestionAnswering(tiny_config(n_embd=128, n_layer=1, initializer_range=0.2)).eval()
    floats = model.quantized_bytes()
    model.drop_float_weights(config)
    return model, model.quantized_bytes() / floats


def test_memory_of_the_weights():
    # At width 768 a float32 scale per output channel is a sixth of what it is here.
    for widths, limit in (((8,), 0.25), ((4,), 0.125), ((2,), 0.125), ((4, 8), 0.375)):
        assert limit < served(widths)[1] < limit + 0.01 * len(widths)


@pytest.mark.parametrize("execution", ["fake", "integer"])
def test_stored_codes_serve_their_widths_and_no_other(execution, tmp_path):
    torch.manual_seed(3)
    whole = QuantGPT2ForQuestionAnswering(tiny_config(n_embd=128, n_layer=1, initializer_range=0.2)).eval()
    small, _ = served()
    small.load_state_dict(whole.state_dict(), strict=False)
    for config in (8, "W4A8KV4", {"default": 8, "transformer.h.0.mlp.*": 4}):
        for net in (whole, small):
            net.set_execution(execution)
            net.set_bit_config(config)
        with torch.no_grad():
            assert torch.equal(small(**batch()).end_logits, whole(**batch()).end_logits)
    before = small.config.bit_config
    for bits in (6, 32):
        with pytest.raises(ValueError, match=rf'c_attn".w_bits = {bits}, but of this layer only .* \[4, 8\] bits'):
            small.set_bit_config(bits)
    assert small.config.bit_config == before
    layer = small.get_submodule("transformer.h.0.mlp.c_fc")
    layer.w_bits = 5
    with pytest.raises(ValueError, match=r"w_bits = 5: only codes of \[4, 8\]"):
        small(**batch())
    with pytest.raises(ValueError, match="float weights were dropped"):
        small.save_pretrained(tmp_path)


def test_stored_codes_go_into_another_layer_and_move_with_it():
    layer, other = make_layer(inp=25, kv=False, lora=False), make_layer(inp=25, kv=False, lora=False, seed=5)
    other.bias.data.copy_(layer.bias)
    stored = layer.stored_codes((3, 8))
    assert stored[3][0].shape == (36, 13) and stored[8][0].shape == (36, 25)
    other.set_stored_codes(stored)
    other.half().float().to("cpu")
    x = torch.randn(4, 25)
    for bits in (3, 8):
        for net in (layer, other):
            net.w_bits = net.a_bits = bits
        other.bias.data.copy_(layer.bias)
        assert torch.equal(both(other, x)[1], both(layer, x)[1])
    assert "weight" not in other.state_dict()


@pytest.mark.parametrize("fault", ["unpacked", "shape", "scale", "bits"])
def test_refused_codes(fault):
    layer = make_layer(kv=False, lora=False)
    codes, scale = layer.stored_codes((4,))[4]
    stored = {
        "unpacked": {4: (unpack_int4(codes, 24), scale)},
        "shape": {4: (codes[1:], scale)},
        "scale": {4: (codes, scale.t())},
        "bits": {32: (codes, scale)},
    }[fault]
    with pytest.raises(ValueError, match="bits = 32" if fault == "bits" else "codes at 4 bits are torch"):
        layer.set_stored_codes(stored)
    assert layer.weight is not None
