"""A frozen weight held as NF4 codes by bitsandbytes, as QLoRA (arXiv:2305.14314) trains LoRA beside it.

16 levels at quantiles of a normal distribution, blocks of 64 over the weight (out, in) in the order of memory, the
largest |w| of each block as its scale; the scales are rounded to 8 bits themselves, in blocks of 256 (double
quantization). Weight-only: every forward pass dequantizes to the dtype that it computes in, every backward pass again.
"""

import torch
import torch.nn.functional as F

from .errors import UserError
from .quantization import output_dtype

METHOD, BLOCK = "nf4", 64


def import_bitsandbytes():
    """The module. Raises UserError where it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("bitsandbytes is not installed: pip install -r requirements.txt") from error
    return bitsandbytes


class NF4Weight:
    """Codes and scales of a weight (out, in) float; they are made where it lies and moved with `to`."""

    def __init__(self, weight):
        self.shape = weight.shape
        # One long row: on a CPU bitsandbytes dequantizes rows that are no multiple of a block wrongly, or not at all.
        flat = weight.detach().reshape(1, -1)
        options = {"blocksize": BLOCK, "quant_type": METHOD, "compress_statistics": True}
        self.codes, self.state = import_bitsandbytes().functional.quantize_4bit(flat, **options)
        self.state.shape = torch.Size((1, 2 * self.codes.numel()))  # with the code that fills up the last byte

    def dequantize(self, dtype):
        """The weight's values, (out, in) in `dtype`."""
        self.state.dtype = dtype
        flat = import_bitsandbytes().functional.dequantize_4bit(self.codes, self.state).view(-1)
        return flat[: self.shape.numel()].view(self.shape)

    def to(self, device):
        self.codes = self.codes.to(device)
        self.state.to(device)

    @property
    def nbytes(self):
        """Bytes of codes and scales; the tables of levels, the same for all weights, are not counted."""
        state = self.state
        return sum(tensor.nbytes for tensor in (self.codes, state.absmax, state.state2.absmax, state.offset))


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight, ctx.x_dtype, dtype = weight, x.dtype, output_dtype(x)
        return F.linear(x.to(dtype), weight.dequantize(dtype), bias.to(dtype))

    @staticmethod
    def backward(ctx, grad):
        return (grad @ ctx.weight.dequantize(grad.dtype)).to(ctx.x_dtype), None, None


def nf4_linear(x, weight, bias):
    """Linear layer on a frozen NF4Weight and a frozen bias (out,); the values of the weight are not kept for the
    backward pass. x: (tokens, in) -> (tokens, out) in x's dtype, or in the autocast dtype under autocast."""
    return _NF4Linear.apply(x, weight, bias)
