"""Symmetric MinMax quantization and the linear product on quantized operands.

One rule serves weights (one scale per output channel), activations and K/V (one scale per token), because all of
them are reduced over the last axis:

    qmax = 2**(bits-1) - 1,   scale = max|x| / qmax,   code = round_half_even(x / scale),   value = code * scale

Source: LLM-QAT (arXiv:2305.17888) Sec. 2.2, Eq. 3, in its exact form. The code released with that paper adds 1e-6 to
max|x| and to 1/scale, and zeroes the gradient outside [-2, 2]; both are left out here: the exact form is idempotent,
and the straight-through estimator (STE) is the plain identity.

The rotated quantizer puts a balanced rotation (rotation.py) before the same rounding, of tokens and weight of a linear
and of K and V within their heads, and scales frozen weights by least squares.
"""

import torch
import torch.nn.functional as F

from .errors import UserError
from .rotation import block_size, hadamard, rotate, rotate_back

QUANTIZED_BITS = (2, 3, 4, 5, 6, 7, 8)
FLOAT_BITS = (16, 32)  # "not quantized": the tensor is used as it is
CLIPS = [1 - i / 40 for i in range(25)]  # of least_squares_scale: 1 to 0.4


def check_bits(bits, allowed=QUANTIZED_BITS + FLOAT_BITS):
    """Raise ValueError unless `bits` is an int (no bool, float or string) out of `allowed`."""
    if type(bits) is not int or bits not in allowed:
        raise UserError(f"bits = {bits!r} is not allowed: choose one of {', '.join(map(str, allowed))}")
    return bits


def row_scale(x, bits):
    """Scale of every row of `x`: max|x| / qmax. x: (..., n) -> (..., 1) float32; 0 for a row of zeros.

    Where float32 cannot hold the quotient it is rounded towards zero: an entry of exactly max|x| / 2 is a tie at every
    bit-width (qmax is odd), and x / scale resolves it as exact arithmetic does only if the scale is not too large.
    """
    qmax = 2 ** (bits - 1) - 1
    amax = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).float()
    # Dividing by a tensor: CUDA turns a division by a Python number into a product with its rounded reciprocal.
    scale = amax / torch.full_like(amax, qmax)
    scale = torch.where(scale.double() * qmax > amax, torch.nextafter(scale, torch.zeros_like(scale)), scale)
    # A denormal scale has too few digits: rows below 1e-36 share the smallest normal scale, codes stay in range.
    return torch.where(amax == 0, amax, scale.clamp(min=torch.finfo(torch.float32).tiny))


def codes_as_float(x, scale):
    """round_half_even(x / scale), float32."""
    # A row of zeros has scale 0, all others at least `tiny`. The quotient is fresh, so it may be rounded in place.
    return torch.div(x.float(), scale.clamp(min=torch.finfo(torch.float32).tiny)).round_()


def quantize(x, bits):
    """Integer codes and scale of x: (..., n) float, one scale per row. Raises ValueError for bits outside 2..8.

    Returns codes: (..., n) int8 in -qmax..qmax, and scale: (..., 1) float32, so that x ~ codes * scale.
    """
    check_bits(bits, QUANTIZED_BITS)
    x = x.detach()
    scale = row_scale(x, bits)
    return codes_as_float(x, scale).to(torch.int8), scale


def least_squares_scale(x, bits):
    """Scale of every row out of CLIPS * max|x| / qmax that leaves the least squared error; codes then need a clamp.

    x: (rows, n) float; bits: 2 to 8. Returns (rows, 1) float32.
    """
    qmax, largest = 2 ** (bits - 1) - 1, row_scale(x, bits)
    best, least = largest, torch.full_like(largest, torch.inf)
    for share in CLIPS:
        scale = largest * share
        codes = codes_as_float(x, scale).clamp_(-qmax, qmax)
        error = (codes.mul_(scale) - x).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def quantize_least_squares(x, bits):
    """As `quantize`, with the scales of `least_squares_scale`. x: (rows, n)."""
    check_bits(bits, QUANTIZED_BITS)
    qmax, pieces = 2 ** (bits - 1) - 1, []
    for piece in x.detach().split(max(2**16 // max(x.shape[-1], 1), 1)):  # the tries of a piece stay in the cache
        scale = least_squares_scale(piece, bits)
        pieces.append((codes_as_float(piece, scale).clamp_(-qmax, qmax).to(torch.int8), scale))
    return tuple(map(torch.cat, zip(*pieces, strict=True)))


def dequantize(codes, scale):
    """codes: (..., n) int8, scale: (..., 1) float32 -> (..., n) float32."""
    return codes * scale


def _fake_quantize(x, bits):
    """The values of `fake_quantize`, computed in float32 (under autocast too), in x's dtype."""
    scale = row_scale(x, bits)
    return codes_as_float(x, scale).mul_(scale).to(x.dtype)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bits, d):
        if d is None:
            return _fake_quantize(x, bits)
        return rotate_back(_fake_quantize(rotate(x, d), bits), 1 / d).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def fake_quantize(x, bits, d=None):
    """Quantize and dequantize the rows of `x`; the gradient is the identity (STE).

    x: (..., n) float: (out, in) weights or (batch, seq, hidden) activations; bits: 2 to 8, or 16 / 32, which return
    `x` itself; d: (n,) of the rotation in which the rows are quantized, or None; that of a weight is 1 / d of its
    tokens. Returns (..., n) in the dtype of x, rotated back. Raises ValueError for other bits.
    """
    if check_bits(bits) in FLOAT_BITS:
        return x
    return _FakeQuantize.apply(x, bits, d)


def head_values(codes, scale):
    """Values of a head from codes in its Hadamard basis: sums of codes, which are exact, then one rounding.

    codes: (..., head_size) int8 or float; scale: (..., 1) float32, of `quantize`. Returns float32.
    """
    block = block_size(codes.shape[-1])
    return hadamard(codes, block) * (scale / block)


class _FakeQuantizeKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, bits, head_size):
        ctx.mark_dirty(qkv)
        kv = qkv.unflatten(-1, (3, -1))[..., 1:, :]  # (tokens, 2, hidden)
        if head_size is None:
            kv.copy_(_fake_quantize(kv, bits))
        else:
            heads = hadamard(kv.unflatten(-1, (-1, head_size)), block_size(head_size))
            scale = row_scale(heads, bits)
            kv.copy_(head_values(codes_as_float(heads, scale), scale).flatten(-2))
        return qkv

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def fake_quantize_kv_(qkv, bits, head_size=None):
    """Fake-quantize, in place, K and V in the fused output of `c_attn`; Q is left alone.

    One scale per token for K and one for V, shared by the heads, as LLM-QAT does before its head split; with
    `head_size` one for each head, which is rotated before and back after. This is where K and V are produced, so a
    cache that stores them never quantizes a token twice.

    qkv: (tokens, 3 * hidden) float; bits: 2 to 8, or 16 / 32 or None, which return `qkv` itself.
    """
    if bits is None or bits in FLOAT_BITS:
        return qkv
    return _FakeQuantizeKV.apply(qkv, bits, head_size)


class _FrozenLinear(torch.autograd.Function):
    """y = Q(x) W^T + b with a frozen W held as int8 codes, both in the basis of a rotation where there is one.

    Neither Q(x) nor the dequantized weight is kept for the backward pass: dL/dx = dL/dy W (STE through Q), and W comes
    back from its codes in 1-2 % of the time of a product, so memory does not grow with the number of widths.
    """

    @staticmethod
    def forward(ctx, x, codes, scale, bias, a_bits, d, product, backward_dtype):
        ctx.save_for_backward(codes, scale, d)
        ctx.x_dtype, ctx.backward_dtype = x.dtype, backward_dtype
        if product is not None:
            return product(x, codes, scale, bias, a_bits, d)
        dtype = output_dtype(x)
        x = x if d is None else rotate(x, d)
        x = x if a_bits in FLOAT_BITS else _fake_quantize(x, a_bits)
        return F.linear(x.to(dtype), dequantize(codes, scale).to(dtype), bias.to(dtype))

    @staticmethod
    def backward(ctx, grad):
        """grad: dL/dy (tokens, out) -> dL/dx (tokens, in) in x's dtype, dL/db (out,) float32, where they are asked."""
        codes, scale, d = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            if ctx.backward_dtype is None:
                grad_x = grad @ dequantize(codes, scale).to(grad.dtype)
            else:  # codes are exact in bfloat16, so the scale goes to the other operand
                grad_x = (grad * scale.t()).to(ctx.backward_dtype) @ codes.to(ctx.backward_dtype)
            grad_x = (grad_x if d is None else rotate_back(grad_x, d)).to(ctx.x_dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.float().sum(0)
        return grad_x, None, None, grad_bias, None, None, None, None


def output_dtype(x):
    """dtype of a linear layer's output: x's, or the autocast dtype."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def frozen_linear(x, codes, scale, bias, a_bits, d=None, product=None, backward_dtype=None):
    """Linear layer on fake-quantized activations and a frozen weight given by its codes.

    Args:
        x: (tokens, in) activations; codes: (out, in) int8; scale: (out, 1) float32; bias: (out,); a_bits: bits of x.
        d: (in,) of the rotation that the codes are of, or None.
        product: what computes the forward pass from these (`integer.integer_linear`); None: a float product.
        backward_dtype: dtype of the product dL/dx = dL/dy W; None: that of dL/dy.
    Returns:
        (tokens, out) in x's dtype, or in the autocast dtype under autocast (scales and rounding stay float32).
    """
    return _FrozenLinear.apply(x, codes, scale, bias, check_bits(a_bits), d, product, backward_dtype)
