"""The rotated quantizer: its transform and scales, layers on every path, gradients, kept codes, invariance."""

import copy
import itertools
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import block_diag
from scipy.linalg import hadamard as sylvester
from scipy.optimize import minimize

import models.fast.integer as integer
import models.fast.kernels as kernels
from common.calibration import calibrate, input_rms
from models.errors import UserError
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering, QuantLinear
from models.quantization import (
    dequantize,
    fake_quantize,
    fake_quantize_kv_,
    head_values,
    least_squares_scale,
    quantize,
    quantize_least_squares,
    row_scale,
)
from models.rotation import (
    balance,
    block_size,
    check_block,
    hadamard,
    make_rotation,
    rotate,
    rotate_back,
    rotate_weight,
)
from test_modeling import tiny_config

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
# Of an independent numpy script: x' = (x d) H, W' = (W / d) H with d = sign / s, in float64.
BALANCED_8 = {
    "x": [
        [0.03, 27.2, 1.22, -0.51, -0.3, -0.53, 0.57, -0.06],
        [0.75, -37.0, 1.57, -0.1, 0.68, -0.14, -0.38, 0.46],
        [0.82, -4.0, -0.15, 0.69, -0.87, -1.51, 0.39, -0.67],
        [-1.92, -16.2, -0.47, -1.19, -1.49, 0.04, 0.9, -0.23],
    ],
    "W": [
        [-0.149, 0.0038, 0.143, -0.06, 0.109, 0.209, -0.041, -0.163],
        [0.07, 0.0025, 0.22, -0.257, -0.132, -0.168, -0.347, 0.025],
        [0.106, -0.0074, 0.277, 0.164, 0.125, 0.08, 0.191, -0.266],
    ],
    "sign": [1, -1, 1, 1, -1, 1, 1, -1],
    "s": [0.945157142, 21.058613149, 0.650611569, 0.610822854, 0.83591064, 0.672850893, 0.486690702, 0.461846245],
    "x_rotated": [
        [0.23073339, 2.19956759, -1.4248213, -0.45304432, -0.38606549, 0.6525277, -0.20160332, -0.52751784],
        [0.70766555, 0.43244908, 0.37347645, -1.5418262, 2.68639059, 0.70835868, -0.16055313, -0.96155081],
        [1.06250802, 0.69050846, -1.16565684, 2.11147137, 0.32101574, -1.17313817, 1.27770159, -0.67052166],
        [0.09066699, 0.53010591, 0.31931982, -1.29212025, -2.87151694, -1.643725, 0.67661328, -1.55503396],
    ],
    "W_rotated": [
        [-0.02108057, -0.09125008, -0.1000748, -0.11561102, -0.09521237, 0.13995641, -0.09596294, -0.01908752],
        [-0.06486256, 0.17146179, 0.07251043, 0.07050073, 0.06462748, 0.12476189, -0.05316301, -0.19870519],
        [0.24803998, -0.05791654, -0.10282879, -0.09337885, 0.13126252, 0.07516809, 0.0855938, -0.00256956],
    ],
    "product": [
        [0.14689, 0.39892, 0.10113],
        [-0.03638, 0.40822, 0.65065],
        [-0.51743, 0.05351, 0.21129],
        [0.07525, -0.10056, -0.35896],
    ],
}
BALANCED_12 = {  # three blocks of 4
    "x": [
        [0.61, 12.0, -1.77, 0.35, -0.25, 0.78, -0.44, -0.02, 0.34, -0.88, 0.6, -0.1],
        [0.49, -10.4, 1.09, 0.61, -0.18, 0.63, 1.26, 1.79, -1.57, 0.88, 0.47, -0.09],
        [-1.01, 25.2, -1.26, 0.57, 1.3, -1.6, -0.3, -1.31, 0.24, 1.51, 2.02, -1.78],
    ],
    "W": [
        [-0.115, 0.007, 0.316, 0.084, -0.149, 0.059, -0.003, -0.041, -0.147, 0.077, 0.062, -0.019],
        [-0.044, -0.0128, -0.097, 0.241, -0.038, -0.288, 0.267, 0.106, 0.422, 0.013, -0.092, -0.29],
    ],
    "sign": [1, -1, 1, 1, -1, 1, 1, -1, 1, 1, -1, 1],
    "s": [
        *(0.879911751, 12.342784743, 0.740750519, 0.51445973, 0.805173971, 0.692285535),
        *(0.618275162, 1.206799676, 0.520778669, 1.367391057, 1.205038649, 0.676995076),
    ],
    "x_rotated": [
        [
            *(-0.99405984, -0.70215728, 0.71508326, 2.36763654, 0.37105507, -0.77222041),
            *(1.06613956, -0.04399041, -0.31815685, 0.47311603, 0.32746405, 0.82331381),
        ],
        [
            *(2.02833102, 2.358e-05, -0.62885946, -0.28574709, 0.84412448, 1.41735727),
            *(0.28945882, -2.10383222, -1.44706224, -1.95768316, -0.92409285, -1.70059458),
        ],
        [
            *(-1.89127007, -0.95754986, -1.29825096, 1.85138612, -1.66272407, -0.43705469),
            *(-2.26301892, 1.13368187, -1.37020974, 0.15476333, 2.93535084, -0.79820769),
        ],
    ],
    "W_rotated": [
        [
            *(0.04485122, 0.08803609, -0.23244056, -0.10282645, 0.10421986, 0.01389623),
            *(0.0565959, 0.06522984, -0.02942033, -0.12184653, 0.05815497, -0.05999704),
        ],
        [
            *(0.08570176, -0.19627068, 0.03356977, -0.00043308, -0.06581146, 0.26148754),
            *(-0.10297016, -0.03151269, 0.07603983, 0.25459232, 0.16150485, -0.05259981),
        ],
    ],
    "product": [[-0.5093, -0.1533], [0.58275, -0.16384], [-0.05117, 0.62518]],
}
ROW = [0.31, -0.12, 0.05, -0.44, 0.27, 0.09, -0.18, 1.0, -0.33, 0.21, 0.02, -0.07, 0.15, -0.26, 0.38, -0.51]
LEAST_SQUARES = {  # bits: scale, codes, squared error of ROW
    4: (0.139285714, [2, -1, 0, -3, 2, 1, -1, 7, -2, 2, 0, -1, 1, -2, 3, -4], 0.025797959),
    3: (0.283333333, [1, 0, 0, -2, 1, 0, -1, 3, -1, 1, 0, 0, 1, -1, 1, -2], 0.118844444),
}


@pytest.fixture(params=["compiled", "operators"])
def passes(request, monkeypatch):
    """Both ways to compute: kernels.c, and torch's operators."""
    if request.param == "operators":
        monkeypatch.setattr(kernels, "can_take", lambda *tensors, **options: False)
    elif not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    return request.param


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def operators(function, *args):
    """function(*args) on torch's operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "can_take", lambda *tensors, **options: False)
        return function(*args)


def signs_matrix(n, block):
    """The blocks of +1 and -1 for rows of n, float64."""
    return torch.from_numpy(block_diag(*[sylvester(block)] * (n // block))).double()


def matrix(n, block):
    """H of rows of n: orthogonal."""
    return signs_matrix(n, block) / block**0.5


def random_d(n, seed=0):
    """Signs and scales of both kinds, in float32."""
    generator = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(2, (n,), generator=generator) - 1
    return signs * torch.exp(torch.randn(n, generator=generator))


def assert_close_to_scale(found, expected, tolerance=1e-5):
    """Relative to the largest entry: sums cancel, so single entries may be near zero."""
    assert found.shape == expected.shape
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    assert difference <= tolerance, f"{difference:.1e} of the largest entry"


# ---- reference cases


@pytest.mark.parametrize("case", [BALANCED_8, BALANCED_12], ids=["8", "12"])
def test_reference_balanced_rotation(case, passes, no_gradients):
    x, W, sign, s = (torch.tensor(case[key], dtype=torch.float64) for key in ("x", "W", "sign", "s"))
    found = balance(x.square().mean(0).sqrt(), W.square().mean(0).sqrt())
    torch.testing.assert_close(found / found[0], s / s[0], rtol=1e-8, atol=0)
    d = (sign / found).float()
    rotated, weight = rotate(x.float(), d), rotate_weight(W.float(), d)
    ratio = (found[0] / s[0]).item()  # any common factor is right
    expected = [torch.tensor(case[key]) for key in ("x_rotated", "W_rotated", "product")]
    torch.testing.assert_close(rotated * ratio, expected[0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(weight / ratio, expected[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(rotated @ weight.t(), expected[2], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("case", [BALANCED_8, BALANCED_12], ids=["8", "12"])
def test_the_d_of_a_linear_is_sign_over_s(case):
    x, W, s = (torch.tensor(case[key]) for key in ("x", "W", "s"))
    draws = []
    for seed in range(60):
        d = make_rotation(x.square().mean(0).sqrt(), W, torch.Generator().manual_seed(seed))
        assert d.dtype == torch.float32
        torch.testing.assert_close(d.abs() * s, torch.full_like(d, (d[0].abs() * s[0]).item()), rtol=1e-6, atol=0)
        draws.append(d.sign())
        assert torch.equal(d, make_rotation(x.square().mean(0).sqrt(), W, torch.Generator().manual_seed(seed)))
    shares = (torch.stack(draws) > 0).float().mean(0)
    assert ((shares > 0.2) & (shares < 0.8)).all(), "every sign is drawn, each for itself"
    generator = torch.Generator().manual_seed(0)
    one, other = (make_rotation(torch.ones(64), torch.ones(2, 64), generator) for _ in range(2))
    assert not torch.equal(one, other), "linears of one size have signs of their own"


@pytest.mark.parametrize("bits", LEAST_SQUARES)
def test_reference_least_squares(bits):
    scale, codes, error = LEAST_SQUARES[bits]
    row = torch.tensor([ROW])
    assert least_squares_scale(row, bits).item() == pytest.approx(scale, rel=1e-6)
    found, found_scale = quantize_least_squares(row, bits)
    assert found.dtype == torch.int8 and found[0].tolist() == codes
    assert found_scale.shape == (1, 1) and found_scale.item() == pytest.approx(scale, rel=1e-6)
    assert (dequantize(found, found_scale) - row).square().sum().item() == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("bits", range(2, 9))
def test_least_squares_equals_all_tries_in_float64(bits):
    """Rows of several pieces; rows with an outlier profit most."""
    rows = torch.randn(300, 512, generator=torch.Generator().manual_seed(bits))
    rows[::3, 5] *= 6
    rows[7] = 0
    qmax, x = 2 ** (bits - 1) - 1, rows.double().numpy()
    largest = np.abs(x).max(1, keepdims=True) / qmax
    errors = []
    for share in np.linspace(0.4, 1, 25):
        step = np.where(largest > 0, largest * share, 1)
        errors.append(((np.clip(np.rint(x / step), -qmax, qmax) * step - x) ** 2).sum(1))
    codes, scale = quantize_least_squares(rows, bits)
    assert codes.abs().amax() <= qmax and (scale <= row_scale(rows, bits)).all()
    error = (dequantize(codes, scale).double() - rows).square().sum(1)
    torch.testing.assert_close(error, torch.from_numpy(np.min(errors, 0)), rtol=1e-5, atol=1e-12)
    plain = (fake_quantize(rows, bits) - rows).square().sum(1)
    assert (error <= plain * (1 + 1e-6)).all() and (bits > 5 or error.sum() < 0.9 * plain.sum())
    assert not codes[7].any() and scale[7] == 0


# ---- the transform

ROWS = [(768, 256), (3072, 256), (1600, 64), (96, 32), (12, 4), (7, 1), (1, 1), (64, 64), (1024, 256)]


@pytest.mark.parametrize(("n", "block"), ROWS)
def test_blocks(n, block):
    assert block_size(n) == block


@pytest.mark.parametrize("n", [768, 3072, 1600, 96, 12, 16, 1, 7, 5])
def test_rows_that_can_be_rotated(n):
    """An outlier is spread over 16 channels at least, or over the whole row."""
    if n in (12, 7, 5):
        with pytest.raises(UserError, match=f"the rows: rows of {n} have Hadamard blocks of [14]; .* multiple of 16"):
            check_block(n, "the rows")
    else:
        check_block(n, "the rows")


def cases():
    """(n, block): every block size that divides these rows."""
    return [(n, 2**k) for n in (768, 3072, 1600, 96, 12) for k in range(9) if n % 2**k == 0]


@pytest.mark.parametrize(("n", "block"), cases())
def test_hadamard_is_the_matrix_of_scipy(n, block, passes, no_gradients):
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(n))
    before, after = random_d(n, 1), random_d(n, 2)
    H = signs_matrix(n, block)
    assert_close_to_scale(hadamard(x, block).double(), x.double() @ H, 1e-6)
    assert_close_to_scale(
        hadamard(x, block, before, after).double(), (x.double() * before.double()) @ H * after.double(), 1e-6
    )
    assert hadamard(x.view(1, 5, n).double(), block).shape == (1, 5, n)
    assert hadamard(x.double(), block).dtype == hadamard(x.half(), block).dtype == torch.float32
    assert hadamard(x[:0], block).shape == (0, n)


@pytest.mark.parametrize("block", [0, 3, 24, 64, -4])
def test_faulty_blocks_are_refused(block, passes, no_gradients):
    with pytest.raises(UserError, match="rows of 96 in Hadamard blocks of"):
        hadamard(torch.zeros(2, 96), block)


@needs_compiler
@pytest.mark.parametrize(("n", "block"), cases())
def test_kernel_equals_torch_bit_for_bit(n, block, threads, no_gradients, monkeypatch):
    """Codes must not depend on which of them ran."""
    calls, compiled = [], kernels.hadamard
    monkeypatch.setattr(kernels, "hadamard", lambda *args: calls.append(1) or compiled(*args))
    x = torch.randn(9, n + 3, generator=torch.Generator().manual_seed(block))[:, :n]  # rows further apart than n
    for before, after in itertools.product((None, random_d(n, 1)), (None, random_d(n, 2))):
        assert torch.equal(hadamard(x, block, before, after), operators(hadamard, x, block, before, after))
    assert len(calls) == 4


@needs_compiler
@pytest.mark.parametrize(("n", "block"), [case for case in cases() if case[1] in (1, 4, 16, 64, 256)])
def test_codes_of_the_kernel_equal_those_of_torch(n, block, threads, no_gradients):
    x = torch.randn(9, n + 3, generator=torch.Generator().manual_seed(block))[:, :n]
    x[4] = 0
    A, factors = torch.randn(3, n, generator=torch.Generator().manual_seed(1)), random_d(n)
    for bits in (2, 4, 8):
        found = kernels.quantize_rows(x, bits, A, 0.5, factors, block)
        expected = operators(integer.quantize_rows, x, bits, A, 0.5, factors, block)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert_close_to_scale(found[2], expected[2])
        assert torch.equal(found[0], quantize(operators(hadamard, x, block, factors), bits)[0])
        assert_close_to_scale(found[2], 0.5 * x @ A.t()), "LoRA reads x as it came"


@pytest.mark.parametrize("n", [n for n, _ in ROWS])
def test_rotate_back_is_transpose_and_inverse(n, passes, no_gradients):
    x, d = torch.randn(4, n, generator=torch.Generator().manual_seed(n)), random_d(n)
    R = d.double()[:, None] * matrix(n, block_size(n))
    assert_close_to_scale(rotate(x, d).double(), x.double() @ R, 1e-6)
    assert_close_to_scale(rotate_back(x, d).double(), x.double() @ R.t(), 1e-6)
    assert_close_to_scale(rotate_back(rotate(x, d), 1 / d), x, 1e-5)
    assert_close_to_scale(rotate(rotate_back(x, 1 / d), d), x, 1e-5)
    W = torch.randn(3, n, generator=torch.Generator().manual_seed(9))
    assert_close_to_scale(rotate_weight(W, d).double(), W.double() @ torch.linalg.inv(R).t(), 1e-6)
    assert_close_to_scale(rotate(x, d) @ rotate_weight(W, d).t(), x @ W.t(), 1e-5)


def test_the_transform_has_a_gradient():
    x, d = torch.randn(3, 48, requires_grad=True), random_d(48)
    g = torch.randn(3, 48)
    rotate(x, d).backward(g)
    torch.testing.assert_close(x.grad, rotate_back(g, d))


# ---- balance


def test_balance_is_the_minimum():
    """Of E |x / s|^2 |W s|^2 over s, found numerically; one common factor is free."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64) * torch.tensor([1, 30, 0.1, 2, 5, 1])
    W = torch.randn(8, 6, generator=generator, dtype=torch.float64) * torch.tensor([1, 0.1, 3, 2, 0.5, 7])

    def loss(logs):
        s = np.exp(logs)
        return np.log(((x.numpy() / s) ** 2).sum(1).mean()) + np.log(((W.numpy() * s) ** 2).sum())

    s = balance(x.square().mean(0).sqrt(), W.square().mean(0).sqrt())
    found = minimize(loss, np.zeros(6), tol=1e-12)
    logs = s.log().numpy()
    assert loss(logs) <= found.fun + 1e-9
    np.testing.assert_allclose(logs - logs.mean(), found.x - found.x.mean(), atol=1e-4)
    assert abs(logs.mean()) < 1e-12, "geometric mean 1"


def test_balance_with_channels_of_zeros():
    x = torch.tensor([0.0, 4.0, 1.0, 0.0, 9.0])
    w = torch.tensor([2.0, 1.0, 0.0, 0.0, 4.0])
    s = balance(x, w)
    assert s.dtype == torch.float64 and s[[0, 2, 3]].tolist() == [1, 1, 1]
    assert s.log().mean().abs() < 1e-12 and (s[4] / s[1]).item() == pytest.approx((9 / 4 / 4) ** 0.5)
    assert balance(torch.zeros(3), torch.ones(3)).tolist() == [1, 1, 1]
    tiny = balance(torch.tensor([1e-45, 1e30]), torch.tensor([1e30, 1e-38]))
    assert tiny.isfinite().all() and tiny.all()


# ---- a linear

BITS = [2, 3, 4, 5, 6, 7, 8]
COMBINATIONS = [(8, 8), (4, 8), (4, 4), (2, 3), (7, 5), (8, 16), (4, 32), (32, 4), (16, 8)]


def make_layer(inp=96, heads=2, head_size=16, lora=True, kv=True, seed=0):
    """A frozen, rotated layer with outlier channels in x's second column, an adapter, and K and V in heads."""
    torch.manual_seed(seed)
    layer = QuantLinear(inp, 3 * heads * head_size, head_size if kv else None)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    if lora:
        layer.add_lora(["shared"], r=3, lora_alpha=6)
        torch.nn.init.normal_(layer.lora_B["shared"].weight, std=0.1)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    layer.set_rotation(random_d(inp, seed))
    return layer


def tokens(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 1] *= 30
    return x


def at(layer, w_bits, a_bits, kv_bits=32):
    layer.w_bits, layer.a_bits, layer.kv_bits = w_bits, a_bits, kv_bits
    return layer


def run(layer, x, execution):
    layer.execution.kind = execution
    with torch.no_grad():
        return layer(x)


def explicit(layer, x):
    """The layer's output from the matrix form in float64, and its codes: (y, codes of x, codes of W)."""
    rotated, weight = rotate(x, layer.rotation), rotate_weight(layer.weight.detach(), layer.rotation)
    x_codes = w_codes = None
    if layer.a_bits <= 8:
        x_codes, x_scale = quantize(rotated, layer.a_bits)
        rotated = dequantize(x_codes, x_scale)
    if layer.w_bits <= 8:
        w_codes, w_scale = quantize_least_squares(weight, layer.w_bits)
        weight = dequantize(w_codes, w_scale)
    y = rotated.double() @ weight.double().t() + layer.bias.double()
    if layer.lora_A:
        A, B = layer.lora_A["shared"].weight, layer.lora_B["shared"].weight
        y += layer.scaling * x.double() @ A.double().t() @ B.double().t()
    return y.detach(), x_codes, w_codes


@pytest.mark.parametrize(("w_bits", "a_bits"), COMBINATIONS)
@pytest.mark.parametrize(("inp", "lora"), [(96, True), (48, False), (256, True), (768, True)])
def test_layer_is_the_matrix_form_on_every_path(inp, lora, w_bits, a_bits, passes):
    layer, x = at(make_layer(inp, lora=lora), w_bits, a_bits), tokens(7, inp)
    expected, x_codes, w_codes = explicit(layer, x)
    with torch.no_grad():
        for execution in ("fake", "integer"):
            assert_close_to_scale(
                run(layer, x, execution).double(), expected, 2e-5 if w_bits > 8 or a_bits > 8 else 1e-5
            )
        block = block_size(inp)
        if a_bits <= 8:
            rows = (kernels if passes == "compiled" else integer).quantize_rows
            found = rows(x, a_bits, factors=layer.rotation * block**-0.5, block=block)
            assert torch.equal(found[0], x_codes)
        if w_bits <= 8:
            assert torch.equal(layer.quantized_weight()[0], w_codes)
        layer.set_rotation(None)
        assert (run(layer, x, "fake") - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("bits", BITS)
def test_an_outlier_channel_costs_less(bits):
    layer, x = at(make_layer(lora=False), bits, bits), tokens(50, 96)
    with torch.no_grad():
        exact = F.linear(x, layer.weight, layer.bias)
        layer.set_rotation(make_rotation(x.square().mean(0).sqrt(), layer.weight, torch.Generator().manual_seed(0)))
        rotated = (run(layer, x, "integer") - exact).square().mean()
        layer.set_rotation(None)
        assert rotated < 0.4 * (run(layer, x, "integer") - exact).square().mean()


@pytest.mark.parametrize("kv_bits", [8, 4, 2])
@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (4, 4), (4, 32), (32, 32), (16, 16)])
@pytest.mark.parametrize("head_size", [16, 48])
def test_k_and_v_have_a_scale_a_head(head_size, w_bits, a_bits, kv_bits, passes):
    layer, x = at(make_layer(head_size=head_size), w_bits, a_bits), tokens(2, 9, 96)
    x[0, 3] = 0
    for execution in ("fake", "integer"):
        plain = run(at(layer, w_bits, a_bits), x, execution)
        found = run(at(layer, w_bits, a_bits, kv_bits), x, execution)
        width = 2 * head_size
        assert torch.equal(found[..., :width], plain[..., :width])
        heads = plain[..., width:].unflatten(-1, (4, head_size))
        H = signs_matrix(head_size, block_size(head_size))
        codes, scale = quantize(operators(hadamard, heads, block_size(head_size)), kv_bits)
        expected = (codes * scale.double()) @ H / block_size(head_size)
        assert_close_to_scale(found[..., width:].unflatten(-1, (4, head_size)).double(), expected, 1e-6)
    layer.set_rotation(None)
    for execution in ("fake", "integer"):
        plain = run(at(layer, w_bits, a_bits), x, execution).flatten(0, 1)
        shared = fake_quantize_kv_(plain, kv_bits).view(2, 9, -1)
        assert torch.equal(run(at(layer, w_bits, a_bits, kv_bits), x, execution), shared), "MinMax: one for all heads"


@pytest.mark.parametrize("bits", [(16, 16), (16, 32), (32, 16), (32, 32)])
def test_16_and_32_bits_are_those_of_the_unrotated_layer(bits, passes):
    layer, x = at(make_layer(), *bits), tokens(2, 5, 96)
    rotated = [run(layer, x, execution) for execution in ("fake", "integer")]
    grads = [gradients(layer, x, execution) for execution in ("fake", "integer")]
    layer.set_rotation(None)
    for execution, found, gradient in zip(("fake", "integer"), rotated, grads, strict=True):
        assert torch.equal(found, run(layer, x, execution))
        assert all(map(torch.equal, gradient, gradients(layer, x, execution)))


def test_bfloat16_and_autocast(passes):
    layer, x = at(make_layer(kv=False), 8, 8), tokens(9, 96)
    exact = run(layer, x, "fake")
    with torch.autocast("cpu", torch.bfloat16):
        fake, found = (run(layer, x, execution) for execution in ("fake", "integer"))
    assert fake.dtype == found.dtype == torch.bfloat16
    assert_close_to_scale(fake.float(), exact, 0.02), assert_close_to_scale(found.float(), exact, 0.02)
    layer.bfloat16()
    assert layer.rotation.dtype == torch.float32
    assert run(layer, x.bfloat16(), "integer").dtype == torch.bfloat16
    assert_close_to_scale(run(layer, x.bfloat16(), "integer").float(), exact, 0.03)


# ---- gradients


@needs_compiler
@pytest.mark.parametrize("execution", ["fake", "integer"])
@pytest.mark.parametrize("kv", [False, True])
def test_training_under_autocast_takes_the_kernels_and_changes_nothing(execution, kv, monkeypatch):
    layer, x = at(make_layer(kv=kv), 4, 4, 4), tokens(9, 96)
    calls = []
    for name in ("hadamard", "quantize_rows"):
        compiled = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, f=compiled, n=name: calls.append(n) or f(*a))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = gradients(layer, x, execution), operators(gradients, layer, x, execution)
    assert found[0].dtype == torch.bfloat16 and all(map(torch.equal, found, expected))
    tokens_by = "quantize_rows" if execution == "integer" else "hadamard"
    heads = ["hadamard", "hadamard"] if kv else []
    assert calls == [tokens_by, *heads, "hadamard"], "the last is of the gradient"


def gradients(layer, x, execution, backward_dtype=None):
    """[y, dL/dx, dL/dA, dL/dB] of L = sum of y times fixed numbers."""
    layer.execution.kind, layer.execution.backward_dtype = execution, backward_dtype
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    A, B = layer.lora_A["shared"].weight, layer.lora_B["shared"].weight
    return [y.detach(), x.grad, A.grad.clone(), B.grad.clone()]


@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (4, 8), (4, 4), (3, 6), (4, 32), (8, 16), (32, 4)])
@pytest.mark.parametrize("execution", ["fake", "integer"])
def test_gradient_is_that_of_the_matrix_form(execution, w_bits, a_bits):
    """Autograd of Q(x R) Q(W R^-T)^T + b + scaling x A^T B^T, where Q of the tokens is the identity backwards."""
    layer, x = at(make_layer(), w_bits, a_bits), tokens(2, 9, 96)
    found = gradients(layer, x, execution)
    d = layer.rotation.double()
    R = d[:, None] * matrix(96, 32)
    wanted = x.double().requires_grad_()
    rotated = wanted @ R
    if a_bits <= 8:
        rotated = rotated + (fake_quantize(rotate(x, layer.rotation), a_bits) - rotated).detach()
    weight = rotate_weight(layer.weight, layer.rotation).double()
    if w_bits <= 8:
        weight = dequantize(*quantize_least_squares(weight.float(), w_bits)).double()
    A, B = (part["shared"].weight.detach().double().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    y = rotated @ weight.t() + layer.bias.double() + layer.scaling * wanted @ A.t() @ B.t()
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    for one, other in zip(found, (y.detach(), wanted.grad, A.grad, B.grad), strict=True):
        assert_close_to_scale(one.double(), other, 2e-5)


def test_backward_in_bfloat16_and_the_gradient_of_a_bias():
    layer, x = at(make_layer(), 4, 8), tokens(2, 9, 96)
    rms = x.flatten(0, 1).square().mean(0).sqrt()
    layer.set_rotation(make_rotation(rms, layer.weight, torch.Generator().manual_seed(0)))
    expected = gradients(layer, x, "integer")
    low = gradients(layer, x, "integer", torch.bfloat16)
    assert torch.equal(low[0], expected[0]) and low[1].dtype == torch.float32
    assert 0 < (low[1] - expected[1]).norm() < 0.005 * expected[1].norm()
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 18))


@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (4, 4), (32, 4), (4, 32)])
def test_a_weight_that_trains(w_bits, a_bits):
    """Its MinMax codes, in training and afterwards; straight-through gradients to weight and tokens."""
    layer, x = at(make_layer(lora=False, kv=False), w_bits, a_bits), tokens(7, 96)
    layer.weight.requires_grad_()
    layer.execution.kind = "integer"
    x.requires_grad_()
    y, d = layer(x), layer.rotation
    weight = layer.weight.detach()
    if w_bits <= 8:
        assert torch.equal(layer.quantized_weight()[0], quantize(rotate_weight(weight, d), w_bits)[0])
        weight = rotate_back(dequantize(*quantize(rotate_weight(weight, d), w_bits)), d)
        assert not torch.allclose(weight, layer.weight, atol=1e-4)
    values = x.detach()
    if a_bits <= 8:
        values = rotate_back(dequantize(*quantize(rotate(values, d), a_bits)), 1 / d)
    assert_close_to_scale(y.detach(), F.linear(values, weight, layer.bias), 1e-5)
    g = torch.linspace(-1, 1, y.numel()).view(y.shape)
    y.backward(g)
    assert_close_to_scale(x.grad, g @ weight)
    assert_close_to_scale(layer.weight.grad, g.t() @ values)
    for execution in ("fake", "integer"):
        assert_close_to_scale(run(layer, x, execution), y.detach(), 1e-5)


def test_fake_quantize_in_a_rotation():
    x, d = tokens(5, 96), random_d(96)
    for bits in (8, 3):
        expected = rotate_back(dequantize(*quantize(rotate(x, d), bits)), 1 / d)
        assert torch.equal(fake_quantize(x, bits, d), expected)
        assert fake_quantize(x.double(), bits, d).dtype == torch.float64
    assert fake_quantize(x, 16, d) is x
    x.requires_grad_()
    fake_quantize(x, 4, d).backward(torch.ones(5, 96))
    assert torch.equal(x.grad, torch.ones(5, 96))


# ---- kept codes, moving, saving


def test_another_d_makes_other_codes():
    layer, x = at(make_layer(lora=False), 4, 4), tokens(5, 96)
    first = layer.quantized_weight()
    assert layer.quantized_weight()[1] is first[1], "kept"
    output = run(layer, x, "integer")
    layer.set_rotation(random_d(96, seed=5))
    assert not torch.equal(layer.quantized_weight()[0], first[0])
    assert_close_to_scale(run(layer, x, "integer").double(), explicit(layer, x)[0])
    layer.set_rotation(None)
    assert torch.equal(layer.quantized_weight()[0], quantize(layer.weight, 4)[0])
    layer.set_rotation(random_d(96, seed=0))
    assert torch.equal(run(layer, x, "integer"), output)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.load_state_dict({"rotation": random_d(96, seed=5)}, strict=False),
        lambda layer: layer.load_state_dict(layer.state_dict() | {"weight": layer.weight + 0.5}),
        lambda layer: layer.weight.mul_(torch.linspace(1, 2, 96)),
        lambda layer: layer.double().float(),
    ],
    ids=["rotation", "weight", "in place", "moved"],
)
def test_codes_follow_what_they_are_made_of(change):
    layer, x = at(make_layer(lora=False), 4, 4), tokens(5, 96)
    run(layer, x, "integer")
    with torch.no_grad():
        change(layer)
    assert_close_to_scale(run(layer, x, "integer").double(), explicit(layer, x)[0])


def test_a_layer_that_began_to_train_gets_minmax_codes_and_back():
    layer = at(make_layer(lora=False), 3, 8)
    rotated = rotate_weight(layer.weight, layer.rotation)
    frozen, trained = quantize_least_squares(rotated, 3), quantize(rotated, 3)
    assert not torch.equal(frozen[1], trained[1])
    for trains, expected in ((False, frozen), (True, trained), (False, frozen)):
        layer.weight.requires_grad_(trains)
        layer.execution.kind = "integer"
        layer(tokens(2, 96))
        assert all(map(torch.equal, layer.quantized_weight(), expected))


def test_half_and_back_keeps_d():
    layer, d = at(make_layer(), 8, 8), random_d(96)
    for move in (
        lambda: layer.half(),
        lambda: layer.to(torch.bfloat16),
        lambda: layer.double(),
        lambda: layer.float(),
    ):
        move()
        assert layer.rotation.dtype == torch.float32 and torch.equal(layer.rotation, d)
    assert layer.to("meta").rotation.is_meta


def test_d_is_part_of_the_state_and_of_copies():
    layer, x = at(make_layer(lora=False), 4, 4, 4), tokens(5, 96)
    expected = run(layer, x, "integer")
    state = layer.state_dict()
    assert torch.equal(state["rotation"], random_d(96))
    assert "rotation" not in QuantLinear(96, 96).state_dict()
    other = at(make_layer(lora=False, seed=3), 4, 4, 4)
    run(other, x, "integer")
    other.load_state_dict(state)
    assert torch.equal(run(other, x, "integer"), expected)
    twin = copy.deepcopy(layer)
    assert torch.equal(run(twin, x, "integer"), expected)
    twin.set_rotation(None)
    assert layer.rotation is not None and torch.equal(run(layer, x, "integer"), expected)
    with pytest.raises(RuntimeError, match="rotation"):
        twin.load_state_dict(state)
    assert "rotated" in repr(layer) and "rotated" not in repr(twin)


def test_the_layer_keeps_a_d_of_its_own():
    layer, d = make_layer(), random_d(96)
    layer.set_rotation(d)
    d.zero_()
    assert layer.rotation.all()


@pytest.mark.parametrize(
    ("d", "told"),
    [
        (torch.ones(95), r'"rotation" is float32 \(95,\): allowed is float32 \(96,\)'),
        (torch.ones(1, 96), r"float32 \(1, 96\)"),
        (torch.ones(96).double(), r"float64 \(96,\): allowed is float32"),
        (torch.ones(96).half(), r"float16 \(96,\): allowed is float32"),
        (torch.linspace(-1, 0, 96), "0 or not finite"),
        (torch.full((96,), torch.nan), "0 or not finite"),
        (torch.tensor([1.0] * 95 + [torch.inf]), "0 or not finite"),
    ],
)
def test_a_faulty_d_is_refused_and_changes_nothing(d, told):
    layer = make_layer()
    with pytest.raises(UserError, match=told):
        layer.set_rotation(d)
    assert torch.equal(layer.rotation, random_d(96))


@pytest.mark.parametrize(("inp", "head_size", "what"), [(24, 16, "this linear"), (96, 24, "the heads of K and V")])
def test_sizes_that_cannot_be_rotated(inp, head_size, what):
    layer = QuantLinear(inp, 3 * head_size, head_size)
    with pytest.raises(UserError, match=f"{what}: rows of 24 have Hadamard blocks of 8; .* a multiple of 16"):
        layer.set_rotation(torch.ones(inp))
    assert layer.rotation is None
    QuantLinear(8, 24, 8).set_rotation(torch.ones(8))  # a block is the whole row


# ---- K and V


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "head_size"), [(64, 16), (12, 12), (512, 256), (6, 1), (1024, 512), (96, 24)])
def test_values_of_k_and_v(hidden, head_size, dtype, passes, no_gradients):
    qkv = tokens(11, 3 * hidden).to(dtype)
    qkv[2, hidden : 2 * hidden] = 0
    block = block_size(head_size)
    for bits in (2, 4, 8):
        found = fake_quantize_kv_(qkv.clone(), bits, head_size)
        assert found.dtype == dtype and torch.equal(found[:, :hidden], qkv[:, :hidden])
        heads = qkv[:, hidden:].unflatten(-1, (-1, head_size))
        codes, scale = quantize(operators(hadamard, heads, block), bits)
        assert codes.shape[1] == 2 * hidden // head_size
        expected = codes.double() @ signs_matrix(head_size, block) * (scale / block).double()
        expected = expected.float().to(dtype)  # the sums are exact: one rounding
        assert torch.equal(found[:, hidden:].unflatten(-1, (-1, head_size)), expected)
        assert torch.equal(head_values(codes, scale).to(dtype), expected)
        assert not found[2, hidden : 2 * hidden].any()
    for bits in (None, 16, 32):
        assert torch.equal(fake_quantize_kv_(qkv.clone(), bits, head_size), qkv)


def test_k_and_v_pass_the_gradient():
    qkv = torch.randn(4, 48, requires_grad=True)
    g = torch.randn(4, 48)
    fake_quantize_kv_(qkv * 1.0, 4, 16).backward(g)
    assert torch.equal(qkv.grad, g)


def test_one_loud_head_does_not_cost_the_others():
    qkv = tokens(8, 3 * 64)
    qkv[:, 64:80] *= 1000
    qkv[:, 128:144] *= 1000
    for bits in (4, 8):
        shared, own = (fake_quantize_kv_(qkv.clone(), bits, size) for size in (None, 16))
        quiet = torch.cat([qkv[:, 80:128], qkv[:, 144:]], 1)
        errors = [(torch.cat([x[:, 80:128], x[:, 144:]], 1) - quiet).square().mean() for x in (shared, own)]
        assert errors[1] < 0.1 * errors[0]


# ---- a model


def make_model(seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = {"n_embd": 64, "n_head": 4, "initializer_range": 0.2} | sizes
    model = QuantGPT2ForQuestionAnswering(tiny_config(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or ".ln_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def windows(number=8, length=24, seed=0):
    return torch.randint(1, 101, (number, length), generator=torch.Generator().manual_seed(seed)).tolist()


def logits(model, bits, execution="integer"):
    model.set_execution(execution)
    with torch.no_grad(), model.at_bits(bits):
        found = model(input_ids=torch.tensor(windows(4, seed=1)))
    return torch.stack([found.start_logits, found.end_logits])


def rescale(model, factors=(30.0, 15.0, 10.0), channels=(5, 17, 40)):
    """The same function, with outlier channels: LayerNorm's output times f, the columns that read it divided by f."""
    for block in model.transformer.h:
        for norm, linear in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc)):
            for channel, factor in zip(channels, factors, strict=True):
                norm.weight[channel] *= factor
                norm.bias[channel] *= factor
                linear.weight[:, channel] /= factor
                linear.clear_quantized()


@pytest.mark.parametrize("bits", ["W8A8KV8", "W4A4KV4"])
def test_outliers_by_rescaling_change_nothing(bits):
    """s_j becomes f s_j, so x / s and W s stay the same: an invariance of balance, by construction."""
    model, scaled = make_model(), make_model()
    rescale(scaled)
    torch.testing.assert_close(logits(scaled, 32), logits(model, 32), rtol=1e-4, atol=1e-4)
    spread = logits(model, 32).std()
    for one in (model, scaled):
        one.set_rotations(calibrate(one, windows(), seed=3)[0])
    for name, layer in model.quant_layers().items():
        codes = [m.quant_layers()[name]._quantize_weight(4)[0] for m in (model, scaled)]
        assert (codes[0] != codes[1]).float().mean() < 1e-3, name
        assert (layer.rotation.sign() == scaled.quant_layers()[name].rotation.sign()).all()
    difference = (logits(scaled, bits) - logits(model, bits)).abs()
    assert difference.median() < 1e-3 * spread and difference.mean() < 0.02 * spread
    for one in (model, scaled):
        one.set_rotations(None)
    assert (logits(scaled, bits) - logits(model, bits)).abs().median() > 0.05 * spread, "MinMax sees them"


def test_signs_depend_on_the_seed_and_nothing_else():
    model = make_model()
    first, ratios = calibrate(model, windows(), seed=3)
    assert list(first) == list(ratios) == list(model.quant_layers())
    again, other = calibrate(model, windows(), seed=3)[0], calibrate(model, windows(), seed=4)[0]
    for name, d in first.items():
        assert torch.equal(d, again[name]) and torch.equal(d.abs(), other[name].abs())
        assert not torch.equal(d, other[name])


def test_calibration_reads_tokens_as_they_come_in_float():
    """Root mean squares over all tokens in float, with the adapters of the highest width; bits, mode, device stay."""
    model = make_model()
    model.add_lora([4, 8], r=2)
    torch.nn.init.normal_(model.quant_layers()["transformer.h.0.mlp.c_fc"].lora_B["4"].weight)
    inputs = {}
    for name, layer in model.quant_layers().items():
        layer.register_forward_pre_hook(lambda _, x, name=name: inputs.setdefault(name, []).append(x[0].double()))
    uneven = [window[: 5 + 3 * number] for number, window in enumerate(windows())]
    found = {}
    for bits in (4, 8):
        model.set_bit_config(bits)
        model.train()
        inputs.clear()
        found[bits] = input_rms(model, uneven)
        assert model.training and model.execution.kind == "fake"
        for name, rms in found[bits].items():
            seen = torch.cat([x.flatten(0, -2) for x in inputs[name]])
            assert len(seen) == sum(map(len, uneven))
            torch.testing.assert_close(rms.double(), seen.square().mean(0).sqrt(), rtol=1e-6, atol=0)
        assert all(len(layer._forward_pre_hooks) == 1 for layer in model.quant_layers().values()), "the test's own"
        assert {layer.w_bits for layer in model.quant_layers().values()} == {bits}
    linear = "transformer.h.0.mlp.c_proj"  # reads what the adapter of c_fc changes
    assert torch.equal(found[4][linear], found[8][linear]), "the adapter of 4 bits, which is not zero, is not active"
    torch.nn.init.normal_(model.quant_layers()["transformer.h.0.mlp.c_fc"].lora_B["8"].weight)
    assert not torch.allclose(input_rms(model, uneven)[linear], found[8][linear]), "that of the highest width is"
    model = make_model()
    exact = input_rms(model, uneven)
    model.set_bit_config(2)
    assert all(torch.equal(rms, exact[name]) for name, rms in input_rms(model, uneven).items())


def test_quantization_off_leaves_nothing_quantized():
    model = make_model()
    model.set_rotations(calibrate(model, windows(), seed=3)[0])
    expected, inputs = logits(model, 32, "fake"), {"input_ids": torch.tensor(windows(4, seed=1))}
    for execution in ("fake", "integer"):
        model.set_execution(execution)
        with torch.no_grad(), model.at_bits("W4A4KV4"), model.quantization_off():
            found = model(**inputs)
        torch.testing.assert_close(torch.stack([found.start_logits, found.end_logits]), expected)
        with pytest.raises(KeyError), model.quantization_off():
            raise KeyError
        assert model.execution.kind == execution


def test_setting_and_leaving_the_quantizer():
    model = make_model()
    minmax = logits(model, 4)
    rotations = calibrate(model, windows(), seed=3)[0]
    assert model.rotations() is None and model.config.quantizer == "minmax"
    model.set_rotations(rotations)
    assert model.config.quantizer == "rotated"
    assert all(torch.equal(d, rotations[name]) for name, d in model.rotations().items())
    rotated = logits(model, 4)
    assert not torch.allclose(rotated, minmax, atol=1e-3)
    model.set_rotations(calibrate(model, windows(), seed=4)[0])
    assert not torch.equal(logits(model, 4), rotated), "codes of another d"
    model.set_rotations(rotations)
    assert torch.equal(logits(model, 4), rotated)
    model.set_rotations(None)
    assert model.config.quantizer == "minmax" and torch.equal(logits(model, 4), minmax)


def test_faulty_rotations_change_nothing():
    model = make_model()
    rotations = calibrate(model, windows(), seed=3)[0]
    model.set_rotations(rotations)
    rotated = logits(model, 4)
    last = list(rotations)[-1]
    other = {name: random_d(len(d)) for name, d in rotations.items()}
    for faulty, told in (
        ({name: d for name, d in other.items() if name != last}, f"{last}: allowed are all 8 linears"),
        (other | {"x": torch.ones(64)}, "x: allowed are all 8 linears"),
        (other | {last: torch.ones(64)}, rf"{last}: set_rotation: \"rotation\" is float32 \(64,\)"),
    ):
        with pytest.raises(UserError, match=told):
            model.set_rotations(faulty)
        assert model.config.quantizer == "rotated"
        assert all(torch.equal(d, rotations[name]) for name, d in model.rotations().items())
        assert torch.equal(logits(model, 4), rotated)


@pytest.mark.parametrize("rotated", [False, True])
def test_codes_without_float_weights_are_of_one_quantizer(rotated):
    model = make_model()
    rotations = calibrate(model, windows(), seed=3)[0]
    if rotated:
        model.set_rotations(rotations)
    expected = logits(model, 4)
    model.set_bit_config(4)
    model.drop_float_weights([4])
    for asked in (rotations, None) if rotated else (rotations,):
        with pytest.raises(UserError, match="of one quantizer"):
            model.set_rotations(asked)
    assert torch.equal(logits(model, 4), expected)


def test_32_bits_stay_those_of_gpt2():
    model = make_model()
    expected = logits(model, 32), logits(model, "W16A32KV16")
    model.set_rotations(calibrate(model, windows(), seed=3)[0])
    assert torch.equal(logits(model, 32), expected[0])
    assert torch.equal(logits(model, "W16A32KV16"), expected[1])


@pytest.mark.parametrize("bits", ["W8A8KV8", "W4A8KV4", {"default": 8, "transformer.h.1.*": 32}])
def test_model_on_integers_equals_the_fake_one(bits, passes):
    model = make_model()
    model.set_rotations(calibrate(model, windows(), seed=3)[0])
    fake, found = logits(model, bits, "fake"), logits(model, bits)
    # Rounding moves an activation to the next code now and then.
    assert (fake - found).abs().median() < 1e-3 * fake.std() and (fake - found).abs().mean() < 0.02 * fake.std()
