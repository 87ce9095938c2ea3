"""The C files against torch in float64, the fallback to torch's operators, and where neither may be mixed up."""

import logging
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import models.fast.attention as attention
import models.fast.integer as integer
import models.fast.kernels as kernels
from models.execution import Execution
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering, TanhGELU
from models.quantization import fake_quantize_kv_, quantize
from test_modeling import batch, tiny_config

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"], autouse=True)
def threads(request):
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ---- the passes of a linear


@pytest.mark.parametrize("r", [1, 3, 4, 8, 13])
@pytest.mark.parametrize(("rows", "n"), [(1, 5), (40, 37), (17, 768)])
def test_low_rank_half_of_lora(rows, n, r):
    x, A = torch.randn(rows, n + 3)[:, :n], torch.randn(r, n)  # rows of x further apart than n
    expected = 2.5 * x.double() @ A.double().t()
    for passes in (kernels, integer):
        codes, scale, low_rank = passes.quantize_rows(x, 4, A, 2.5)
        assert relative_error(low_rank, expected) < 1e-6
        assert all(map(torch.equal, (codes, scale), quantize(x, 4)))


@pytest.mark.parametrize(("kv_bits", "rotated"), [(None, 1), (32, 1), (8, 0), (8, 1), (4, 0), (4, 1), (2, 0)])
@pytest.mark.parametrize("r", [0, 1, 8, 11])
@pytest.mark.parametrize(
    ("rows", "n", "head_size"), [(1, 3, 1), (17, 36, 12), (33, 1536, 64), (5, 1536, 512), (5, 4800, 64)]
)
def test_finish(rows, n, head_size, r, kv_bits, rotated):
    """What it adds up against float64; K and V are those of the oracle, bit for bit."""
    acc = torch.randint(-100_000, 100_000, (rows, n), dtype=torch.int32)
    row_scale, column_scale, bias = torch.rand(rows, 1), torch.rand(n) * 1e-3, torch.randn(n)
    low_rank, B = torch.randn(rows, r), torch.randn(n, r)
    expected = acc * row_scale.double() * column_scale + bias + low_rank.double() @ B.double().t()
    third = n // 3
    for passes in (kernels, integer):
        plain, out = torch.full((rows, n + 5), 7.0), torch.full((rows, n + 5), 7.0)
        arguments = (acc, row_scale, column_scale, bias, low_rank, B.t().contiguous() if r else None)
        passes.finish_rows(*arguments, None, None, plain[:, :n])
        heads = head_size if rotated else None
        passes.finish_rows(*arguments, kv_bits, heads, out[:, :n])
        assert relative_error(plain[:, :n], expected) < 1e-6
        assert (out[:, n:] == 7).all() and torch.equal(out[:, :third], plain[:, :third])
        assert torch.equal(out[:, :n], fake_quantize_kv_(plain[:, :n].clone(), kv_bits, heads))


def test_nan_goes_through_a_layer():
    x = torch.randn(4, 24)
    x[2, 5] = torch.nan
    codes, scale, low_rank = kernels.quantize_rows(x, 8, torch.randn(3, 24))
    assert scale.isnan().flatten().tolist() == low_rank.isnan().any(1).tolist() == [False, False, True, False]
    out = torch.empty(4, 6)
    acc = torch.ones(4, 6, dtype=torch.int32)
    kernels.finish_rows(acc, scale, torch.ones(6), torch.ones(6), torch.zeros(4, 0), None, 8, None, out)
    assert out.isnan().all(1).tolist() == [False, False, True, False]


# ---- GELU and attention


def test_gelu():
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, -1e4, 1e4, 1e-30, -90.0, 90.0])])
    expected = F.gelu(x.double(), approximate="tanh")
    found = kernels.gelu(x[None])[0]
    torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=1e-6)
    assert kernels.gelu(torch.full((1, 3), torch.nan)).isnan().all()


def heads(batch_size, length, fused, features=64):
    """Query, key and value of 2 heads: parts of one tensor as c_attn makes it, or three tensors."""
    if fused:
        parts = torch.randn(batch_size, length, 6 * features).split(2 * features, -1)
        return [part.view(batch_size, length, 2, features).transpose(1, 2) for part in parts]
    return [torch.randn(batch_size, 2, length, features) for _ in range(3)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 63, 64, 65, 130])
def test_attention(length, fused, threads):
    query, key, value = heads(3, length, fused)
    query *= 4  # scores up to about 25
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=0.2, is_causal=True)
    found = kernels.causal_attention(query, key, value, 0.2)
    assert found.shape == (3, length, 2, 64)
    # A score of 25 has a rounding error of some 1e-6, which its exponential takes over.
    torch.testing.assert_close(found.transpose(1, 2).double(), expected, rtol=0, atol=2e-5)
    torch.set_num_threads(3 - threads)
    assert torch.equal(kernels.causal_attention(query, key, value, 0.2), found), "threads change nothing"


def test_attention_with_far_scores_and_nan():
    query, key, value = heads(1, 70, True)
    query[0, 0, 40] *= 1e4  # one key takes all
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(kernels.causal_attention(query, key, value, 0.125), expected, rtol=0, atol=4e-6)
    key[0, 1, 50] = torch.nan
    found = kernels.causal_attention(query, key, value, 0.125).isnan()
    assert found[0, 50:, 1].all() and not found[0, :50].any() and not found[:, :, 0].any()


@pytest.mark.parametrize("case", ["mask", "one query", "32 features", "float64", "gradient"])
def test_attention_elsewhere_is_sdpa(case, monkeypatch):
    monkeypatch.setattr(kernels, "causal_attention", None)
    query, key, value = heads(2, 9, False, 32 if case == "32 features" else 64)
    if case == "one query":
        query = query[:, :, -1:]
    if case == "float64":
        query, key, value = query.double(), key.double(), value.double()
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None] if case == "mask" else None
    with torch.set_grad_enabled(case == "gradient"):
        found, _ = attention.attention_forward(torch.nn.Module(), query, key, value, mask, scaling=0.2)
    expected = F.scaled_dot_product_attention(
        query, key, value, mask, scale=0.2, is_causal=case in ("float64", "gradient", "32 features")
    )
    assert torch.equal(found, expected.transpose(1, 2))


# ---- a model


def wide_model():
    """2 heads of 64 features, so that every kernel is used."""
    torch.manual_seed(4)
    model = QuantGPT2ForQuestionAnswering(tiny_config(n_embd=128, n_head=2, initializer_range=0.2)).eval()
    model.add_lora([4, 8])
    for name, parameter in model.named_parameters():
        if ".lora_" in name or name.endswith("bias"):
            parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("bits", [32, 8])
def test_a_model_uses_them_on_integers_only(bits, monkeypatch):
    # Other tests import other folders' copies, which register theirs under the same name.
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention.NAME, attention.attention_forward)
    called = []
    for name in ("quantize_rows", "finish_rows", "gelu", "causal_attention"):
        function = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, n=name, f=function: called.append(n) or f(*a))
    model, inputs = wide_model(), {"input_ids": batch()["input_ids"]}
    if bits == 32:
        model = QuantGPT2ForQuestionAnswering(model.config.__class__(n_embd=128, n_head=2, n_layer=2)).eval()
        inputs["input_ids"] = inputs["input_ids"] % 50257
    fake = model(**inputs).start_logits
    assert not called and model.config._attn_implementation == "sdpa"
    model.set_execution("integer")
    found = model(**inputs).start_logits
    per_block = {"causal_attention": 1, "gelu": 1} | ({"quantize_rows": 4, "finish_rows": 4} if bits == 8 else {})
    assert {name: called.count(name) / 2 for name in called} == per_block
    assert relative_error(found, fake) < (1e-5 if bits == 32 else 0.02)
    model.set_execution("fake")
    assert torch.equal(model(**inputs).start_logits, fake)
    with torch.enable_grad():
        model.set_execution("integer")
        called.clear()
        model(**inputs)
        assert set(called) == ({"quantize_rows", "finish_rows"} if bits == 8 else set()), "the others have no gradient"


def test_padding_on_the_right_needs_no_mask():
    model, inputs = wide_model(), batch()
    assert not inputs["attention_mask"].all()
    real = inputs["attention_mask"].bool()
    for execution in ("fake", "integer"):
        model.set_execution(execution)
        masked, plain = model(**inputs).start_logits, model(input_ids=inputs["input_ids"]).start_logits
        # Rounding moves an activation to the next code now and then.
        assert relative_error(plain[real], masked[real]) < 0.02
        assert relative_error(plain[~real], masked[~real]) > 0.05, "these are not read"


# ---- without a compiler


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_without_a_compiler_torch_computes_the_same(compiler, monkeypatch, caplog):
    monkeypatch.setenv("CC", compiler)
    kernels.compiled.cache_clear()
    x = torch.randn(5, 6)
    with caplog.at_level(logging.WARNING):
        assert not kernels.can_take(x) and not kernels.can_take(x)
    kernels.compiled.cache_clear()
    (record,) = caplog.records
    assert f"no compiled kernels, so integer execution and rotation take longer: {compiler}" in record.message
    gelu = TanhGELU(Execution("integer"))
    monkeypatch.setattr(kernels, "compiled", lambda: None)
    torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"), rtol=1e-6, atol=2e-7)


def test_what_the_kernels_take():
    x = torch.randn(4, 8)
    assert kernels.can_take(x, x[:, :5], x[::2])
    assert not kernels.can_take(x, x.double()) and not kernels.can_take(x.bfloat16()) and not kernels.can_take(x.t())
    with torch.enable_grad():
        assert not kernels.can_take(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.can_take(x) and kernels.can_take(x, autocast=True)


def test_torch_compile_gets_torchs_operators(monkeypatch):
    monkeypatch.setattr(kernels, "gelu", None)
    gelu, x = TanhGELU(Execution("integer")), torch.randn(5, 6)
    found = torch.compile(gelu, backend="eager")(x)
    torch.testing.assert_close(found, F.gelu(x, approximate="tanh"), rtol=1e-6, atol=2e-7)


def test_the_c_file_compiles_without_warnings(tmp_path):
    strict = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command = ["cc", *kernels.FLAGS, *strict, *kernels.SOURCES, "-o", str(tmp_path / "k.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
