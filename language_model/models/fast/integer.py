"""Linear layers on integers: int8 codes of the tokens times int8 codes of the weight, then one rescale.

With codes q and scales s of `quantization.quantize`, Q(x) Q(W)^T = (q_x q_W^T) * s_x * s_W: the sum runs exactly in
int32 (`torch._int_mm`), and only the rescale rounds. Codes are bit-identical to those of fake quantization, outputs
agree to float rounding. Weights of at most 4 bits are stored two codes a byte and unpacked for the product.

On a CPU the tokens go through in pieces of PIECE_TOKENS: everything between the product and the finished output stays
in the cache, and the temporaries are small enough for malloc to hand out again (glibc maps anything above 32 MiB anew,
and the page faults then cost as much as the product). What is done to a piece besides the product is in
`quantize_rows` and `finish_rows`: here in torch's operators, for float32 on a CPU compiled, in one pass each
(kernels.py).
"""

import functools
import logging

import torch
import torch.nn.functional as F

from ..errors import UserError
from ..quantization import codes_as_float, fake_quantize_kv_, output_dtype, row_scale
from ..rotation import block_size, hadamard
from . import kernels

PIECE_TOKENS = 512  # on a CPU
PACKED_BITS = 4  # weights of at most so many bits are stored two a byte
logger = logging.getLogger(__name__)


def pack_int4(codes):
    """Two codes a byte: the first half of a row in the low four bits, the second half in the high four.

    codes: (..., n) int8 in -8..7, else ValueError -> (..., ceil(n / 2)) uint8; with n odd the last high half is 0.
    """
    if codes.numel() and (codes.amin() < -8 or codes.amax() > 7):
        raise UserError(f"codes from {codes.amin().item()} to {codes.amax().item()} do not fit in four bits (-8..7)")
    half = (codes.shape[-1] + 1) // 2
    high = F.pad(codes[..., half:], (0, 2 * half - codes.shape[-1]))
    return ((codes[..., :half] & 15) | (high << 4)).view(torch.uint8)


def unpack_int4(packed, n):
    """The inverse of `pack_int4`: (..., ceil(n / 2)) uint8 -> (..., n) int8."""
    packed = packed.view(torch.int8)  # so that a right shift carries the sign along
    half = packed.shape[-1]
    codes = torch.empty((*packed.shape[:-1], n), dtype=torch.int8, device=packed.device)
    torch.bitwise_right_shift(packed << 4, 4, out=codes[..., :half])
    torch.bitwise_right_shift(packed[..., : n - half], 4, out=codes[..., half:])
    return codes


def quantize_rows(x, bits, lora_A=None, scaling=1.0, factors=None, block=1):
    """Codes of the tokens, and what the LoRA branch has to do with their unquantized values.

    x: (tokens, in); bits: 2 to 8; lora_A: (r, in) or None; factors: (in,), quantize (x factors) H in Hadamard blocks
    of `block`. Returns codes: (tokens, in) int8 and scale: (tokens, 1) as of `quantization.quantize`, and low_rank:
    (tokens, r), scaling * x A^T, with r = 0 without lora_A.
    """
    rotated = x if factors is None else hadamard(x, block, before=factors)
    scale = row_scale(rotated, bits)
    codes = codes_as_float(rotated, scale).to(torch.int8)
    # A x^T is faster than x A^T while A has few rows.
    low_rank = x.new_empty(len(x), 0) if lora_A is None else torch.mm(lora_A, x.t()).mul_(scaling).t()
    return codes, scale, low_rank


def finish_rows(acc, row_scales, column_scale, bias, low_rank, lora_Bt, kv_bits, head_size, out):
    """out = acc * row_scales * column_scale + bias + low_rank B^T, with K and V fake-quantized at `kv_bits`, rotated
    in heads of `head_size` if that is not None.

    acc: (tokens, out) int32; row_scales: (tokens, 1); column_scale, bias: (out,) float32; low_rank: (tokens, r);
    lora_Bt: (r, out) or None; out: (tokens, out).
    """
    torch.addcmul(bias, acc.float().mul_(column_scale), row_scales, out=out)
    if lora_Bt is not None:
        out.addmm_(low_rank.to(out.dtype), lora_Bt.to(out.dtype))
    fake_quantize_kv_(out, kv_bits, head_size)


def int_mm(codes, weight_codes):
    """(tokens, in) int8 x (out, in) int8 -> (tokens, out) int32."""
    tokens = codes.shape[0]
    if codes.is_cuda and tokens <= 16:  # cuBLAS wants more than 16 rows
        return torch._int_mm(F.pad(codes, (0, 0, 0, 32 - tokens)), weight_codes.t())[:tokens]
    return torch._int_mm(codes, weight_codes.t())


@functools.cache
def is_supported(device, inp, out):
    """Whether `torch._int_mm` on this device computes (tokens, inp) x (inp, out) exactly; if not, the log says why.

    Extreme codes are tried: int8 products of processors without VNNI may saturate.
    """
    rows, columns = (torch.full((n, inp), 127, dtype=torch.int8, device=device) for n in (32, out))
    rows[::2, 1::2] = -127
    columns[1::2] = -127
    try:
        found, expected = torch._int_mm(rows, columns.t()).long().cpu(), rows.cpu().long() @ columns.cpu().long().t()
        reason = "" if torch.equal(found, expected) else "its sums are not exact"
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
    if reason:
        logger.warning("no int8 product %d x %d on %s (%s): such layers run fake-quantized", inp, out, device, reason)
    return not reason


def integer_linear(x, codes, scale, bias, a_bits, d=None, lora=None, kv_bits=None, head_size=None):
    """Linear layer on integers, without gradients.

    Args:
        x: (tokens, in) activations; codes: (out, in) int8 and scale: (out, 1) float32 of the weight; bias: (out,).
        a_bits: bits of x, 2 to 8; d: (in,) of the rotation that the codes are of, or None.
        lora: (A, B, scaling) adds scaling * x A^T B^T, with x unquantized and unrotated.
        kv_bits, head_size: of K and V, the last two thirds of the output, see `quantization.fake_quantize_kv_`.
    Returns:
        (tokens, out) in x's dtype, or in the autocast dtype under autocast (codes and rescale stay float32).
    """
    y = torch.empty(len(x), len(codes), dtype=output_dtype(x), device=x.device)
    bias, scale = bias.float(), scale.view(-1)
    lora_A, lora_Bt, scaling = (None, None, 1.0) if lora is None else (lora[0], lora[1].t().contiguous(), lora[2])
    quantize, finish = quantize_rows, finish_rows
    if kernels.can_take(x, y, *(() if lora is None else (lora_A, lora_Bt))):
        quantize, finish = kernels.quantize_rows, kernels.finish_rows
    elif lora is None and kernels.can_take(x, autocast=True):
        quantize = kernels.quantize_rows
    block = block_size(x.shape[-1])
    factors = None if d is None else d * block**-0.5
    piece = max(len(x), 1) if x.is_cuda else PIECE_TOKENS
    for rows, out in zip(x.split(piece), y.split(piece), strict=True):
        row_codes, row_scales, low_rank = quantize(rows, a_bits, lora_A, scaling, factors, block)
        finish(int_mm(row_codes, codes), row_scales, scale, bias, low_rank, lora_Bt, kv_bits, head_size, out)
    return y
