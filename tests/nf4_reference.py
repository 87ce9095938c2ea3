"""NF4 with double quantization from its definition (QLoRA, arXiv:2305.14314, Sec. 3; arXiv:1511.04561 for the scales).

Plain and slow: what bitsandbytes computes is held against it. Everything is float32 where rounding shows in a code.
"""

import torch
from scipy.stats import norm

BLOCK, SCALE_BLOCK = 64, 256
OFFSET = 0.9677083  # 1 - (1/30 + 1/32) / 2: where the outermost quantile lies


def nf4_levels():
    """The 16 levels, ascending, (16,) float32: quantiles of N(0, 1), 8 above zero and 7 below, over the largest."""
    positive = norm.ppf(torch.linspace(OFFSET, 0.5, 9)[:-1])
    negative = -norm.ppf(torch.linspace(OFFSET, 0.5, 8)[:-1])
    levels = torch.tensor(sorted([*positive, 0.0, *negative]))
    return (levels / levels.max()).float()


def dynamic_levels():
    """The 256 levels of the 8-bit dynamic map, ascending: sign, 0 to 6 leading zeros for the power of ten, a fraction.

    2**i fractions at 10**(i - 6), i = 0 to 6: midpoints between 0.1 and 1, with both signs; and 0 and 1.
    """
    found = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1)
        middle = ((bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        found += [*middle, *(-value for value in middle)]
    return torch.tensor(sorted(found))


def quantize_blocks(x, levels, block):
    """(codes (n,) int64 of the nearest level, the lower of two; scales (ceil(n / block),) float32) of x: (n,)."""
    rows = torch.nn.functional.pad(x, (0, -len(x) % block)).view(-1, block)
    scale = rows.abs().amax(1)
    unit = rows * (1 / scale)[:, None]
    distance = (unit[..., None].double() - levels.double()).abs()
    return distance.argmin(-1).view(-1)[: len(x)], scale


def nf4(weight):
    """{"codes": packed (ceil(n / 2),) uint8, the first in the high half; "scale_codes": (blocks,) uint8;
    "scale_scales": float32, one for 256 of them; "scales": before that; "offset": their mean; "values": of weight}."""
    flat, levels, dynamic = weight.reshape(-1), nf4_levels(), dynamic_levels()
    codes, scales = quantize_blocks(flat, levels, BLOCK)
    offset = scales.mean()
    scale_codes, scale_scales = quantize_blocks(scales - offset, dynamic, SCALE_BLOCK)
    rounded = dynamic[scale_codes] * scale_scales.repeat_interleave(SCALE_BLOCK)[: len(scale_codes)] + offset
    values = levels[codes] * rounded.repeat_interleave(BLOCK)[: len(codes)]
    zero = int((levels == 0).nonzero())  # fills up the last byte
    pairs = torch.nn.functional.pad(codes, (0, len(codes) % 2), value=zero).view(-1, 2)
    return {
        "codes": (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8),
        "scale_codes": scale_codes.to(torch.uint8),
        "scale_scales": scale_scales,
        "scales": scales,
        "offset": offset,
        "values": values.view(weight.shape),
    }
