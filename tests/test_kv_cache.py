"""The KV cache of integer codes: the same values, the same logits, less memory."""

import json

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

from conftest import experiment

with experiment("language_model"):
    from models.kv_cache import QuantizedKVCache, QuantizedKVLayer, cache_bytes, recover_codes
    from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering, QuantGPT2LMHeadModel
    from models.quantization import dequantize, fake_quantize, fake_quantize_kv_, head_values, quantize
    from models.rotation import block_size, hadamard

MIXED = {"default": 8, "transformer.h.1.*": {"w_bits": 4, "a_bits": 8}, "transformer.h.1.attn.c_attn": {"kv_bits": 3}}
CONFIGS = [8, 4, "W8A8KV4", 32, "W32A32KV5", MIXED]


def with_quantizer(model, quantizer):
    """Rotated: by a d of signs and scales from 1/3 to 3."""
    if quantizer == "rotated":
        generator = torch.Generator().manual_seed(7)
        shapes = {name: layer.in_features for name, layer in model.quant_layers().items()}
        rows = {name: torch.randn(n, generator=generator) for name, n in shapes.items()}
        model.set_rotations({name: row.sign() * torch.exp(row.clamp(-1, 1)) for name, row in rows.items()})
    return model


@pytest.fixture(scope="module", params=["minmax", "rotated"])
def model(tiny_model, request):
    return with_quantizer(QuantGPT2LMHeadModel.from_pretrained(tiny_model), request.param)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def ids(model):
    return torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def decode(model, ids, cache, pieces, **kwargs):
    """Logits of all tokens, fed in pieces of these lengths."""
    logits = [model(piece, past_key_values=cache, **kwargs).logits for piece in ids.split(pieces, 1)]
    return torch.cat(logits, 1)


def random_rows(rows, n, dtype, generator):
    """Rows of very different sizes; every seventh is zero."""
    spread = 2 if dtype == torch.float16 else 12
    x = torch.randn(rows, n, generator=generator) * torch.exp(spread * torch.randn(rows, 1, generator=generator))
    x[::7] = 0
    return x.clamp(-6e4, 6e4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_come_back_exactly(bits, dtype):
    generator = torch.Generator().manual_seed(bits)
    for n in (2, 7, 64, 768):
        x = random_rows(300, n, dtype, generator)
        values = fake_quantize(x, bits)
        codes, scale = recover_codes(values, bits)
        assert torch.equal(codes, quantize(x, bits)[0])
        assert torch.equal(dequantize(codes, scale).to(dtype), values)
        assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (300, 1)


def test_codes_of_the_smallest_and_the_largest_rows():
    for bits in (2, 4, 8):
        for size in (1e-40, 1e-38, 3e-37, 1e-36, 3e38):
            x = torch.linspace(-1, 1, 33) * size
            values = fake_quantize(x[None], bits)
            codes, scale = recover_codes(values, bits)
            assert torch.equal(codes, quantize(x[None], bits)[0])
            assert torch.equal(codes * scale, values)


def quantized_heads(heads, bits):
    """(values as c_attn hands them out, codes) of heads: (rows, n)."""
    qkv = torch.cat([heads, heads, heads], 1)
    values = fake_quantize_kv_(qkv.clone(), bits, heads.shape[1])[:, -heads.shape[1] :]
    return values, quantize(hadamard(heads, block_size(heads.shape[1])), bits)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rotated_codes_come_back_exactly(bits, dtype):
    generator = torch.Generator().manual_seed(bits)
    for n in (1, 2, 16, 48, 64, 80, 256):
        x = random_rows(300, n, dtype, generator)
        x[1::7] = 0
        x[1::7, n // 2] = torch.randn(len(x[1::7]), generator=generator).to(dtype)  # one entry
        x[2::7] = x[2::7, :1]  # all the same: one entry in the Hadamard basis
        values, expected = quantized_heads(x, bits)
        if dtype == torch.float16:
            finite = values.isfinite().all(1)
            values, expected = values[finite], expected[finite]
        codes, scale = recover_codes(values, bits, rotated=True)
        assert torch.equal(codes, expected)
        assert torch.equal(head_values(codes, scale).to(dtype), values)
        assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (len(values), 1)


@pytest.mark.parametrize(("n", "heads"), [(16, 20_000), (64, 50_000), (80, 5_000)])
def test_heads_that_bfloat16_moves_by_more_than_half_a_code(n, heads):
    """One of ten thousand, of 8 bits; more where large codes abound (the second kind)."""
    generator = torch.Generator().manual_seed(3)
    for x in (torch.randn(heads, n, generator=generator), torch.rand(heads // 50, n, generator=generator) - 0.5):
        x = x if len(x) == heads else hadamard(x, block_size(n))
        values, expected = quantized_heads(x.bfloat16(), 8)
        grid = hadamard(values, block_size(n))
        assert ((grid / grid.abs().amax(1, keepdim=True) * 127).round() != expected).any(), "no such head is here"
        codes, scale = recover_codes(values, 8, rotated=True)
        assert torch.equal(head_values(codes, scale).bfloat16(), values)


def test_rows_that_bfloat16_moves_by_half_a_code():
    """The largest entry and another one, each by a quarter."""
    codes = torch.arange(128, dtype=torch.int8)[None].expand(20_000, -1)
    scale = 1 + torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    values = dequantize(codes, scale).bfloat16()
    assert ((values / values[:, -1:].float() * 127).round() != codes).any(), "no such row is here"
    found = recover_codes(values, 8)
    assert torch.equal(found[0], codes) and torch.equal(dequantize(*found).bfloat16(), values)


def test_rotated_codes_of_the_smallest_and_the_largest_heads():
    generator = torch.Generator().manual_seed(1)
    for bits in range(2, 9):
        for size in (1e-44, 1e-40, 1e-38, 1e-37, 3e-37, 1e-36, 1e-35, 1e36):
            x = torch.randn(50, 64, generator=generator).clamp(-4, 4) * size
            x[0] = size
            x[1], x[1, 5] = 0, size
            values, expected = quantized_heads(x, bits)
            codes, scale = recover_codes(values, bits, rotated=True)
            assert torch.equal(codes, expected)
            assert torch.equal(head_values(codes, scale), values)


@pytest.mark.parametrize(
    "values", [torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([[1.0, torch.inf]])]
)
def test_values_that_are_not_quantized_are_refused(values):
    with pytest.raises(ValueError, match="not values of the 8-bit quantizer"):
        recover_codes(values, 8)
    with pytest.raises(ValueError, match="not values of the 8-bit quantizer"):
        recover_codes(fake_quantize(torch.linspace(-1, 1, 16)[None], 4), 8)
    with pytest.raises(ValueError, match="not values of the 8-bit quantizer"):
        recover_codes(values, 8, rotated=True)
    with pytest.raises(ValueError, match="not values of the 8-bit quantizer"):
        recover_codes(fake_quantize(torch.randn(3, 16), 8), 8, rotated=True)
    with pytest.raises(ValueError, match="not values of the 8-bit quantizer"):
        recover_codes(quantized_heads(torch.randn(3, 16), 8)[0], 8)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("attention", "execution"), [("sdpa", "integer"), ("eager", "fake")])
def test_logits_equal_those_of_the_float_cache_bit_for_bit(model, ids, config, attention, execution):
    model.set_execution(execution)
    model.set_attn_implementation(attention)
    try:
        with model.at_bits(config):
            for pieces in ([1] * 12, [7, 1, 1, 3]):
                quantized = decode(model, ids, QuantizedKVCache(model.config), pieces)
                assert torch.equal(quantized, decode(model, ids, DynamicCache(config=model.config), pieces))
    finally:
        model.set_execution("fake")
        model.set_attn_implementation("sdpa")


@pytest.fixture(scope="module", params=["minmax", "rotated"])
def double(tiny_model, request):
    """In float64: float32's rounding, which differs between one row and many, may move an activation by a code."""
    return with_quantizer(QuantGPT2LMHeadModel.from_pretrained(tiny_model).double(), request.param)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("cached", [QuantizedKVCache, lambda config: DynamicCache(config=config)])
def test_logits_equal_those_of_one_forward(double, ids, config, cached):
    with double.at_bits(config), torch.no_grad():
        full = double(ids, use_cache=False).logits
        for pieces in ([12], [1] * 12, [7, 1, 1, 3]):
            logits = decode(double, ids, cached(double.config), pieces)
            torch.testing.assert_close(logits, full, rtol=0, atol=1e-9)


def test_left_padding(double, ids):
    """A padded row decodes as it does alone."""
    alone = ids[:1, 4:]
    padded = torch.cat([ids[1:], torch.cat([torch.zeros(1, 4, dtype=torch.long), alone], 1)])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with double.at_bits(8), torch.no_grad():
        cache, logits = QuantizedKVCache(double.config), []
        for start, end in ((0, 9), (9, 10), (10, 12)):
            inputs = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            logits.append(double(padded[:, start:end], past_key_values=cache, **inputs).logits)
        logits = torch.cat(logits, 1)
        for found, row in ((logits[1, 4:], alone), (logits[0], ids[1:])):
            torch.testing.assert_close(found, double(row, use_cache=False).logits[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("config", [8, 4, MIXED], ids=str)
def test_generation_equals_that_with_the_float_cache(model, tokenizer, config, options):
    prompts = tokenizer(["Ada has the kite.", "What does Ben have? Cleo"], return_tensors="pt", padding=True)
    found = []
    with model.at_bits(config):
        for cache in (QuantizedKVCache(model.config), DynamicCache(config=model.config)):
            torch.manual_seed(0)
            pad = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": None}
            found.append(model.generate(**prompts, past_key_values=cache, max_new_tokens=16, **pad, **options))
    assert torch.equal(*found)
    assert found[0].shape[1] == prompts["input_ids"].shape[1] + 16


def test_autocast_keeps_bfloat16(model, ids):
    with model.at_bits(8), torch.autocast("cpu", torch.bfloat16):
        cache = QuantizedKVCache(model.config)
        quantized = decode(model, ids, cache, [5, 1, 6])
        assert cache.layers[0].dtype == torch.bfloat16
        assert torch.equal(quantized, decode(model, ids, DynamicCache(config=model.config), [5, 1, 6]))


@pytest.mark.parametrize(
    ("config", "per_token"),
    [
        (8, lambda scales: 2 * 2 * (64 + scales)),  # 2 blocks x (K, V) x (64 codes of a byte + float32 scales)
        (5, lambda scales: 2 * 2 * (64 + scales)),
        (4, lambda scales: 2 * 2 * (32 + scales)),
        ("W8A8KV2", lambda scales: 2 * 2 * (32 + scales)),
        (MIXED, lambda scales: 2 * (64 + scales) + 2 * (32 + scales)),
        (32, lambda scales: 2 * 2 * 64 * 4),
        ({"default": 8, "transformer.h.0.*": 16}, lambda scales: 2 * 64 * 4 + 2 * (64 + scales)),
    ],
    ids=["8", "5", "4", "W8A8KV2", "mixed", "32", "float block"],
)
def test_memory(model, ids, config, per_token):
    per_token = per_token(4 * (4 if model.config.quantizer == "rotated" else 1))  # a scale a head
    with model.at_bits(config):
        cache, plain = QuantizedKVCache(model.config), DynamicCache(config=model.config)
        assert cache_bytes(cache) == 0
        decode(model, ids, cache, [5, 7])
        decode(model, ids, plain, [5, 7])
    assert cache_bytes(cache) == 2 * 12 * per_token  # batch x tokens
    assert cache_bytes(plain) == 2 * 12 * (2 * 2 * 64 * 4)
    tensors = [tensor for layer in cache.layers for tensor in vars(layer).values() if torch.is_tensor(tensor)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == cache_bytes(cache)  # and nothing else


@pytest.mark.parametrize(
    ("quantizer", "bits", "per_token"),
    [("minmax", 8, 18_528), ("minmax", 4, 9_312), ("rotated", 8, 19_584), ("rotated", 4, 10_368)],
)
def test_bytes_a_token_of_gpt2(quantizer, bits, per_token):
    """12 blocks x (K, V) x 768 codes, and a scale for each or for each of 12 heads."""
    layer, tokens = QuantizedKVLayer(bits, quantizer == "rotated"), 3
    rows = torch.randn(2 * tokens, 3 * 768)
    rows = fake_quantize_kv_(rows, bits, 64 if quantizer == "rotated" else None)[:, 768:]
    keys, values = rows.view(2, tokens, 2, 12, 64).permute(2, 0, 3, 1, 4)
    assert all(map(torch.equal, layer.update(keys, values), (keys, values)))
    assert 12 * (layer.codes.nbytes + layer.scale.nbytes) == 2 * tokens * per_token


def test_float_widths_are_kept_as_dynamic_cache_does(model):
    with model.at_bits({"default": 8, "transformer.h.0.*": 16}):
        cache = QuantizedKVCache(model.config)
    assert cache.kv_bits == [16, 8]
    assert type(cache.layers[0]) is DynamicLayer and isinstance(cache.layers[1], QuantizedKVLayer)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_batch_and_length_operations_equal_those_of_the_float_cache(bits, rotated):
    generator = torch.Generator().manual_seed(3)

    def kv(batch, tokens):
        rows = torch.randn(2 * batch * tokens, 3 * 64, generator=generator)
        rows = fake_quantize_kv_(rows, bits, 16 if rotated else None)[:, 64:128].reshape(2, batch, tokens, 64)
        return rows.unflatten(3, (4, 16)).transpose(2, 3).unbind(0)  # (batch, heads, tokens, head_dim) each

    layer, plain = QuantizedKVLayer(bits, rotated), DynamicLayer()

    def check(new):
        for found, expected in zip(layer.update(*new), plain.update(*new), strict=True):
            assert torch.equal(found, expected)
        assert layer.get_seq_length() == plain.get_seq_length()
        assert layer.get_mask_sizes(2) == plain.get_mask_sizes(2)

    check(kv(3, 5))
    for batch, change in (
        (3, lambda one: one.reorder_cache(torch.tensor([2, 0, 0]))),
        (3, lambda one: one.crop(-2)),
        (3, lambda one: one.crop(0)),
        (2, lambda one: one.batch_select_indices(torch.tensor([1, 2]))),
        (4, lambda one: one.batch_repeat_interleave(2)),
        (3, lambda one: one.batch_select_indices(torch.tensor([0, 1, 3]))),
        (1, lambda one: one.reset()),
    ):
        change(layer), change(plain)
        check(kv(batch, 2))
    layer.crop(-1)
    assert layer.codes.untyped_storage().nbytes() == layer.codes.nbytes  # what was removed takes no memory
    layer.crop(-99)
    assert layer.get_seq_length() == 0


def test_refusals(model, ids):
    with model.at_bits(8):
        cache = QuantizedKVCache(model.config)
        with pytest.raises(ValueError, match="torch.no_grad"):
            model(ids, past_key_values=cache)
        decode(model, ids, cache, [12])
        with pytest.raises(ValueError, match="negative"):
            cache.crop(3)
    with model.at_bits(4), pytest.raises(ValueError, match="bits of the model were changed"):
        decode(model, ids[:, :1], cache, [1])


def test_bits_of_more_than_ten_blocks_after_saving(tmp_path):
    """config.json sorts its keys as text: block 10 stands before block 2."""
    from transformers import GPT2Config

    small = GPT2Config(n_layer=12, n_embd=8, n_head=2, n_positions=16, vocab_size=11, bos_token_id=0, eos_token_id=0)
    model = QuantGPT2LMHeadModel(small)
    model.set_bit_config({"default": 8, "transformer.h.2.attn.c_attn": {"kv_bits": 3}})
    model.save_pretrained(tmp_path)
    keys = list(json.loads((tmp_path / "config.json").read_text())["bit_config"])
    again = QuantGPT2LMHeadModel.from_pretrained(str(tmp_path))
    assert QuantizedKVCache(again.config).kv_bits == [8, 8, 3] + [8] * 9, keys


def test_question_answering_keeps_no_cache(tiny_model):
    assert not QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model).config.use_cache
