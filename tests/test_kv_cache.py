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
    from models.quantization import dequantize, fake_quantize, quantize

MIXED = {"default": 8, "transformer.h.1.*": {"w_bits": 4, "a_bits": 8}, "transformer.h.1.attn.c_attn": {"kv_bits": 3}}
CONFIGS = [8, 4, "W8A8KV4", 32, "W32A32KV5", MIXED]


@pytest.fixture(scope="module")
def model(tiny_model):
    return QuantGPT2LMHeadModel.from_pretrained(tiny_model)


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


@pytest.mark.parametrize(
    "values", [torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([[1.0, torch.inf]])]
)
def test_values_that_are_not_quantized_are_refused(values):
    with pytest.raises(ValueError, match="not values of the 8-bit quantizer"):
        recover_codes(values, 8)
    with pytest.raises(ValueError, match="not values of the 8-bit quantizer"):
        recover_codes(fake_quantize(torch.linspace(-1, 1, 16)[None], 4), 8)


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


@pytest.fixture(scope="module")
def double(tiny_model):
    """In float64: float32's rounding, which differs between one row and many, may move an activation by a code."""
    return QuantGPT2LMHeadModel.from_pretrained(tiny_model).double()


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
        (8, 2 * 2 * (64 + 4)),  # 2 blocks x (K, V) x (64 codes of a byte + a float32 scale)
        (5, 2 * 2 * (64 + 4)),
        (4, 2 * 2 * (32 + 4)),
        ("W8A8KV2", 2 * 2 * (32 + 4)),
        (MIXED, 2 * (64 + 4) + 2 * (32 + 4)),
        (32, 2 * 2 * 64 * 4),
        ({"default": 8, "transformer.h.0.*": 16}, 2 * 64 * 4 + 2 * (64 + 4)),
    ],
    ids=str,
)
def test_memory(model, ids, config, per_token):
    with model.at_bits(config):
        cache, plain = QuantizedKVCache(model.config), DynamicCache(config=model.config)
        assert cache_bytes(cache) == 0
        decode(model, ids, cache, [5, 7])
        decode(model, ids, plain, [5, 7])
    assert cache_bytes(cache) == 2 * 12 * per_token  # batch x tokens
    assert cache_bytes(plain) == 2 * 12 * (2 * 2 * 64 * 4)
    tensors = [tensor for layer in cache.layers for tensor in vars(layer).values() if torch.is_tensor(tensor)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == cache_bytes(cache)  # and nothing else


def test_float_widths_are_kept_as_dynamic_cache_does(model):
    with model.at_bits({"default": 8, "transformer.h.0.*": 16}):
        cache = QuantizedKVCache(model.config)
    assert cache.kv_bits == [16, 8]
    assert type(cache.layers[0]) is DynamicLayer and isinstance(cache.layers[1], QuantizedKVLayer)


@pytest.mark.parametrize("bits", [8, 4])
def test_batch_and_length_operations_equal_those_of_the_float_cache(bits):
    generator = torch.Generator().manual_seed(3)

    def kv(batch, tokens):
        rows = fake_quantize(torch.randn(2, batch, tokens, 64, generator=generator), bits)
        return rows.unflatten(3, (4, 16)).transpose(2, 3).unbind(0)  # (batch, heads, tokens, head_dim) each

    layer, plain = QuantizedKVLayer(bits), DynamicLayer()

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
