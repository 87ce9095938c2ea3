"""KV cache of integer codes for generation: int8, two a byte up to 4 bits; a float32 scale per token of K and of V.

`attn.c_attn` hands out K and V fake-quantized already (quantization.fake_quantize_kv_: one scale per token, shared by
the heads, as LLM-QAT, arXiv:2305.17888; with the rotated quantizer one per head, codes in the head's Hadamard basis).
Every such value is code * scale, or a sum of codes * scale, so the cache takes codes and scale back out of the values
and gives the same values again, bit for bit: a token is never quantized a second time.

    cache = QuantizedKVCache(model.config)
    model.generate(**inputs, past_key_values=cache)
    cache_bytes(cache)
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .errors import UserError
from .fast.integer import PACKED_BITS
from .quantization import FLOAT_BITS, dequantize, head_values
from .rotation import block_size, hadamard

CORRECTIONS = 16  # tries of a row whose values do not come back


def recover_codes(values, bits, rotated=False):
    """Codes and scale of values that `fake_quantize` made, or `fake_quantize_kv_` of heads: the inverse of its last
    step.

    The largest entry of a row (rotated: of its Hadamard transform) has code qmax, hence the other codes. A value is a
    whole number (the code, or a sum of codes) * scale rounded to its dtype, so each entry leaves an interval of scales
    that round to it. All of them meet in the scale that was used, and the float32 next to the middle of what they
    share gives back every value, or one of its neighbours does where two roundings fell on each other.
    In bfloat16 and float16 all entries together say what the scale is nearly. What bfloat16 rounds off may still move
    a code of 8 bits by half and more, in one head of a hundred thousand: such codes are corrected one by one until
    every value comes back.

    values: (..., n) float; bits: 2 to 8; rotated: rows are heads. Returns codes: (..., n) int8 and scale: (..., 1)
    float32, with dequantize(codes, scale), or head_values, .to(values.dtype) == values. Raises ValueError for values
    that are not on a grid of `bits` (quantized at other bits, not at all, or not finite).
    """
    if values.dtype == torch.float64:
        values = values.float()  # exact: the quantizer computes in float32
    magnitude, block, qmax = values.abs(), block_size(values.shape[-1]) if rotated else 1, 2 ** (bits - 1) - 1
    restore, tiny = head_values if rotated else dequantize, torch.finfo(torch.float32).tiny
    below = torch.nextafter(magnitude, torch.zeros_like(magnitude)).double()
    above = torch.nextafter(magnitude, torch.full_like(magnitude, torch.inf)).double()
    grid = hadamard(values, block).double()
    amax = grid.abs().amax(-1, keepdim=True)
    step = (amax / qmax).clamp(min=tiny)  # the smallest scale there is
    codes = (grid / step).round_()
    for _ in range(0 if values.dtype == torch.float32 else 3):  # all entries tell more than the largest
        step = (grid * codes).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True).clamp(min=1)
        codes = (grid / step.clamp_(min=tiny)).round_().clamp_(-qmax, qmax)
    for _ in range(CORRECTIONS):
        count = (hadamard(codes, block).double() / block).abs()
        zero = count == 0
        low = ((below + magnitude) / 2 / count).masked_fill_(zero, 0).amax(-1, keepdim=True)
        high = ((above + magnitude) / 2 / count).masked_fill_(zero, torch.inf).amin(-1, keepdim=True)
        scale = middle = torch.where(amax == 0, 0, (low + high) / 2).float()
        for neighbour in (0, torch.inf, None):
            wrong = (restore(codes.to(torch.int8), scale).to(values.dtype) != values).any(-1, keepdim=True)
            if not wrong.any():
                return codes.to(torch.int8), scale
            if neighbour is not None:
                scale = torch.where(wrong, torch.nextafter(middle, torch.full_like(middle, neighbour)), scale)
        wrong = wrong[..., 0]
        codes[wrong] = _corrected(codes[wrong], values[wrong], (above - magnitude)[wrong], step[wrong], block)
        codes.clamp_(-qmax, qmax)
    raise UserError(
        f"K/V are not values of the {bits}-bit quantizer, which this cache was made for: either the bits of the "
        "model were changed after the cache was made, or K/V are not finite"
    )


def _corrected(codes, values, spacing, step, block):
    """Codes of rows with one code changed by 1: the one that brings the sums of codes nearest to the values.

    Small values count most: they were rounded least. codes, values: (rows, n); spacing: (rows, n) of the values' dtype
    around them; step: (rows, 1), their scale, nearly; block: of the Hadamard transform, 1: none.
    """
    count, found = hadamard(codes, block).double(), values.double() * block / step
    weight = (1 + spacing * block / step) ** -2
    found /= (weight * found * count).sum(-1, keepdim=True) / (weight * count * count).sum(-1, keepdim=True)
    share = weight.unflatten(-1, (-1, block)).mean(-1).repeat_interleave(block, -1)
    change = hadamard(weight * (found - count), block) / share
    most = change.abs().argmax(-1, keepdim=True)
    return codes.scatter_add(-1, most, change.gather(-1, most).sign().double())


class QuantizedKVLayer(CacheLayerMixin):
    """K and V of one attention layer.

    `codes`: (2, batch, heads, tokens, head_dim) int8; up to 4 bits (1, ...), each byte with the code of K in its low
    and that of V in its high half. `scale`: (2, batch, 1, tokens, 1) float32, shared by the heads; rotated:
    (2, batch, heads, tokens, 1), and the codes are in the Hadamard basis of their head.
    Every update dequantizes the history of this layer once, for attention to read; nobody keeps that copy.
    """

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, bits, rotated=False):
        super().__init__()
        self.bits, self.packed, self.rotated = bits, bits <= PACKED_BITS, rotated
        self.reset()

    def reset(self):
        self.codes = self.scale = None
        self.is_initialized = False

    def lazy_initialization(self, key_states, value_states):
        self.dtype, self.is_initialized = key_states.dtype, True

    def update(self, key_states, value_states, *args, **kwargs):
        """Append K and V of new tokens, (batch, heads, tokens, head_dim) each; returns those of all tokens."""
        if key_states.requires_grad:
            raise UserError("the quantized KV cache is for decoding: use torch.no_grad(); to train, use_cache=False")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        kv = torch.stack([key_states, value_states]).transpose(2, 3)  # (2, batch, tokens, heads, head_dim)
        codes, scale = recover_codes(kv if self.rotated else kv.flatten(3), self.bits, self.rotated)
        codes = codes.view(kv.shape).transpose(2, 3).contiguous()
        scale = scale.transpose(2, 3) if self.rotated else scale.unsqueeze(2)
        if self.packed:
            codes = (codes[:1] & 15) | (codes[1:] << 4)
        if self.codes is not None:  # the copy of codes that cat makes is a fraction of what dequantizing moves
            codes, scale = torch.cat([self.codes, codes], 3), torch.cat([self.scale, scale], 3)
        self.codes, self.scale = codes, scale
        keys, values = ((codes[0] << 4) >> 4, codes[0] >> 4) if self.packed else codes  # a right shift keeps the sign
        restore = head_values if self.rotated else dequantize
        return restore(keys, scale[0]).to(self.dtype), restore(values, scale[1]).to(self.dtype)

    def get_seq_length(self):
        return 0 if self.codes is None else self.codes.shape[3]

    def get_max_length(self):
        return -1  # no maximum

    def get_mask_sizes(self, query_length):
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove):
        """Forget the last tokens; a negative number, as everywhere in transformers 5."""
        if tokens_to_remove > 0:
            raise UserError(f"crop({tokens_to_remove}): pass the number of tokens to remove as a negative number")
        length = max(self.get_seq_length() + tokens_to_remove, 0)
        self._replace(lambda tensor: tensor[:, :, :, :length].clone())  # a view would keep the memory

    def reorder_cache(self, beam_idx):
        self._replace(lambda tensor: tensor.index_select(1, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats):
        self._replace(lambda tensor: tensor.repeat_interleave(repeats, dim=1))

    def batch_select_indices(self, indices):
        self._replace(lambda tensor: tensor[:, indices])

    def _replace(self, change):
        if self.codes is not None:
            self.codes, self.scale = change(self.codes), change(self.scale)


class QuantizedKVCache(Cache):
    """`past_key_values` for a model of ours: each layer at the `kv_bits` that its `attn.c_attn` has now.

    Layers at 16 or 32 bits stay float, as in transformers' DynamicCache. config: `model.config`; change the bits of
    the model, and a new cache is needed (an old one refuses to work).
    """

    def __init__(self, config):
        names = [f"transformer.h.{block}.attn.c_attn" for block in range(config.n_layer)]
        self.kv_bits = [config.bit_config[name]["kv_bits"] for name in names]
        rotated = config.quantizer == "rotated"
        layers = [DynamicLayer() if bits in FLOAT_BITS else QuantizedKVLayer(bits, rotated) for bits in self.kv_bits]
        super().__init__(layers)


def cache_bytes(cache):
    """Bytes of the tensors that a QuantizedKVCache or a DynamicCache holds."""
    kept = [(x.codes, x.scale) if isinstance(x, QuantizedKVLayer) else (x.keys, x.values) for x in cache.layers]
    return sum(tensor.nbytes for tensors in kept for tensor in tensors if tensor is not None)
