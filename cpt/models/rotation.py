"""The balanced rotation of a linear layer, which spreads outlier channels before anything is rounded.

    x W^T = (x d H) (W / d H)^T,   d = sign / s,   s_j = (rms(x_j) / rms(W_j))^(1/2)

H is block-diagonal: normalized Hadamard matrices in Sylvester order, whose size is the largest power of two, 256 at
most, that divides the row. The random signs keep a mean that all channels share from collecting in one coordinate; s
splits the rounding error between tokens and weight: after a rotation it is proportional to |x / s| |W s|, whose
expectation is least at this s (Cauchy-Schwarz).
Sources: QuaRot (arXiv:2404.00456) for the rotation, SmoothRot (arXiv:2506.05413) for scaling before it, there by
maxima.
"""

import torch

from .errors import UserError
from .fast import kernels

MAX_BLOCK, MIN_BLOCK = 256, 16


def block_size(n):
    """Size of the Hadamard blocks of rows of n numbers: the largest power of two up to MAX_BLOCK that divides n."""
    return min(n & -n, MAX_BLOCK)


def check_block(n, what):
    """Refuse rows of n numbers whose blocks are too small to spread an outlier. what: the name of the rows."""
    if (block := block_size(n)) < min(MIN_BLOCK, n):
        need = f"the rotated quantizer needs a multiple of {MIN_BLOCK}"
        raise UserError(f"{what}: rows of {n} have Hadamard blocks of {block}; {need}")


def hadamard(x, block, before=None, after=None):
    """after * (before * x) H sqrt(block), block by block: Hadamard matrices of +1 and -1, in log2(block) passes.

    x: (..., n), n a multiple of block, a power of two; before, after: (n,) factors or None. Returns float32 (..., n).
    The additions are paired at distance 1, 2, 4, ... on every device, so that codes do not depend on it.
    """
    if block < 1 or block & (block - 1) or x.shape[-1] % block:
        raise UserError(
            f"rows of {x.shape[-1]} in Hadamard blocks of {block}: must be a power of two that divides them"
        )
    x = x.float()
    if kernels.can_take(x, *(factor for factor in (before, after) if factor is not None), autocast=True):
        return kernels.hadamard(x.reshape(-1, x.shape[-1]), block, before, after).view(x.shape)
    y = x if before is None else x * before
    for distance in (2**i for i in range(block.bit_length() - 1)):
        a, b = y.unflatten(-1, (-1, 2, distance)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).view(x.shape)
    return y if after is None else y * after


def rotate(x, d):
    """(x d) H. x: (..., n); d: (n,) float32. Returns float32 (..., n)."""
    block = block_size(len(d))
    return hadamard(x, block, before=d * block**-0.5)


def rotate_back(y, d):
    """(y H) d: what `rotate` is to gradients; with 1 / d its inverse. y: (..., n); d: (n,). Returns float32."""
    block = block_size(len(d))
    return hadamard(y, block, after=d * block**-0.5)


def rotate_weight(weight, d):
    """(W / d) H. weight: (out, in); d: (in,). Returns float32 (out, in)."""
    return rotate(weight, 1 / d)


def balance(x_rms, w_rms):
    """s: root of the ratio of the root mean squares, 1 where either is 0; its geometric mean is 1.

    x_rms: (n,) of the tokens, w_rms: (n,) of the weight's columns, both >= 0. Returns (n,) float64.
    """
    both = (x_rms > 0) & (w_rms > 0)
    logs = 0.5 * (x_rms.double().log() - w_rms.double().log())
    logs = torch.where(both, logs, 0.0)
    mean = logs.sum() / both.sum().clamp(min=1)
    return torch.where(both, logs - mean, 0.0).exp()


def make_rotation(x_rms, weight, generator):
    """d = sign / s of one linear, float32 (in,), its signs drawn by `generator`.

    x_rms: (in,) root mean square of every channel of the tokens; weight: (out, in).
    """
    s = balance(x_rms, weight.detach().float().square().mean(0).sqrt())
    signs = 2 * torch.randint(2, s.shape, generator=generator) - 1
    return (signs.to(s.device) / s).float()


def rotation_faults(name, rotation, n):
    """What is wrong with the vector d of a linear with rows of n, as a list of sentences. name: of the tensor."""
    if tuple(rotation.shape) != (n,) or rotation.dtype != torch.float32:
        found = f"{str(rotation.dtype).removeprefix('torch.')} {tuple(rotation.shape)}"
        return [f'"{name}" is {found}: allowed is float32 ({n},)']
    if not rotation.isfinite().all() or not rotation.all():
        return [f'"{name}" has entries that are 0 or not finite']
    return []
