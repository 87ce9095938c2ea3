#!/usr/bin/env python
"""Show what a bit-width config gives every linear: blocks by layer types, average bits, MB and BitOPs.

    python configs/show.py configs/hybrid_25pct_4bit.json --model gpt2-medium
    python configs/show.py configs/hybrid_25pct_4bit.json 4 --png results/hybrid_and_4.png

A second config is compared with the first: cells that differ have a *, and the differences are listed. The sizes of
the GPT-2 family are known here; of another model its config.json is read, and nothing else.
"""

import argparse
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "base_model"))

from common.flags import check_output  # noqa: E402
from common.record import atomic_path  # noqa: E402
from common.script import plain_errors  # noqa: E402
from models.bit_config import block_of, config_name, describe_bit_config, resolve_bit_config  # noqa: E402
from models.checkpoint import KNOWN_BASES, read_config  # noqa: E402
from models.checkpoint_rules import linear_shapes  # noqa: E402
from models.errors import UserError  # noqa: E402

SIZES = {  # n_layer, n_embd
    "distilgpt2": (6, 768),
    "gpt2": (12, 768),
    "gpt2-medium": (24, 1024),
    "gpt2-large": (36, 1280),
    "gpt2-xl": (48, 1600),
}
COLORS = {  # of w_bits: in a terminal of 256 colours, in the picture
    2: (203, "#ff5f5f"),
    3: (209, "#ff875f"),
    4: (215, "#ffaf5f"),
    5: (221, "#ffd75f"),
    6: (228, "#ffff87"),
    7: (192, "#d7ff87"),
    8: (150, "#afd787"),
    16: (153, "#afd7ff"),
    32: (252, "#d0d0d0"),
}
NUMBERS = (  # (what, key of describe_bit_config, unit)
    ("average weight bits", "average_w_bits", 1),
    ("linear weights, MB", "weight_bytes", 1e6),
    ("BitOPs a token, 1e9", "bitops_per_token", 1e9),
)
SHORT = (" bits", " MB", "e9 BitOPs a token")


def model_shapes(name):
    """{linear: (out, in)} of a folder, a model of the family, or another hub model. Raises OSError, UserError."""
    known = name.rpartition("/")[2] if name in KNOWN_BASES else None
    if known and not os.path.isdir(name):
        return linear_shapes(dict(zip(("n_layer", "n_embd"), SIZES[known], strict=True)))
    return linear_shapes(read_config(name, {})[1])


def kind_of(layer):
    """ "mlp.c_fc" of "transformer.h.3.mlp.c_fc"."""
    return ".".join(layer.split(".")[-2:])


def cell(bits):
    """W-A-KV notation of one linear."""
    return "".join(f"{field.removesuffix('_bits').upper()}{value}" for field, value in bits.items())


def grid(config, other, color):
    """Lines of a table, a row per block. other: config of the cells without a *; color: whether for a terminal."""
    kinds = list(dict.fromkeys(map(kind_of, config)))
    texts = {layer: cell(bits) + "*" * (bits != other[layer]) for layer, bits in config.items()}
    width = 2 + max(map(len, [*kinds, *texts.values()]))
    lines = ["block  " + "".join(kind.ljust(width) for kind in kinds)]
    for block in range(len(config) // len(kinds)):
        line = f"{block:5d}  "
        for layer in (layer for layer in config if block_of(layer) == block):
            text = texts[layer].ljust(width - 1)
            line += (f"\033[30;48;5;{COLORS[config[layer]['w_bits']][0]}m{text}\033[0m" if color else text) + " "
        lines.append(line)
    return [line.rstrip() for line in lines]


def spans(numbers):
    """ "0-3, 7" of ascending numbers."""
    found = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def differences(before, after):
    """Lines that say which fields of which linears differ; blocks with the same change stand in one line."""
    changes = {}
    for layer in sorted(before, key=kind_of):
        old, new = before[layer], after[layer]
        if fields := [f"{field} {old[field]} to {new[field]}" for field in old if old[field] != new[field]]:
            changes.setdefault((kind_of(layer), ", ".join(fields)), []).append(block_of(layer))
    number = sum(map(len, changes.values()))
    lines = [f"{kind} of block {spans(blocks)}: {fields}" for (kind, fields), blocks in changes.items()]
    return [f"{number} of {len(before)} linears differ{':' if lines else ''}", *(f"  {line}" for line in lines)]


def numbers(configs, shapes):
    """Lines of average bits, MB and BitOPs of every config, and of their difference."""
    found = [describe_bit_config(config, shapes) for config in configs.values()]
    names = [*configs, "difference"][: len(found) + (len(found) == 2)]
    lines = [" " * 20 + "".join(f"  {name:>12}" for name in names)]
    for what, key, unit in NUMBERS:
        values = [f"{numbers[key] / unit:.3f}" for numbers in found]
        values += [f"{(found[1][key] - found[0][key]) / unit:+.3f}"] if len(found) == 2 else []
        lines.append(f"{what:20}" + "".join(f"  {v:>{max(12, len(n))}}" for n, v in zip(names, values, strict=True)))
    return lines


def draw(configs, shapes, model, path):
    """The tables as a picture; cells of the second config that differ from the first have a frame."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    order, first = list(COLORS), next(iter(configs.values()))
    colors = ListedColormap([color for _, color in COLORS.values()])
    kinds = list(dict.fromkeys(map(kind_of, shapes)))
    blocks = len(shapes) // len(kinds)
    size = (0.8 + 4.6 * len(configs), 1.6 + 0.26 * blocks)
    figure, row = plt.subplots(1, len(configs), figsize=size, squeeze=False, layout="constrained")
    for (name, config), axes in zip(configs.items(), row[0], strict=True):
        widths = [order.index(bits["w_bits"]) for bits in config.values()]
        image = [widths[start : start + len(kinds)] for start in range(0, len(widths), len(kinds))]
        axes.imshow(image, cmap=colors, vmin=-0.5, vmax=len(order) - 0.5, aspect="auto")
        for layer, bits in config.items():
            x, y = kinds.index(kind_of(layer)), block_of(layer)
            axes.text(x, y, cell(bits), ha="center", va="center", fontsize=8)
            if bits != first[layer]:
                axes.add_patch(plt.Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, fill=False, linewidth=1.5))
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set_yticks(range(blocks))
        about = describe_bit_config(config, shapes)
        values = [f"{about[key] / unit:.2f}{what}" for (_, key, unit), what in zip(NUMBERS, SHORT, strict=True)]
        axes.set_ylabel("block")
        axes.set_title(f"{name}: {', '.join(values)}", fontsize=9)
    framed = "; a frame: not as in the first" if len(configs) == 2 else ""
    figure.suptitle(f"bits of {model}; the colour is that of the weights{framed}", fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help="one or two: JSON file, short form as W4A8KV8, or a width as 8")
    parser.add_argument("--model", default="gpt2", help="hub name, or folder whose config.json is read")
    parser.add_argument("--png", help="draw the tables into this file as well")
    args = parser.parse_args()
    if len(args.configs) > 2:
        raise UserError(f"{len(args.configs)} configs: allowed are one, or two that are compared")
    if args.png is not None:
        check_output("png", args.png)
    shapes = model_shapes(args.model)
    names = [config_name(text) for text in args.configs]
    names = names if len(set(names)) == len(names) else args.configs
    configs = {name: resolve_bit_config(text, shapes) for name, text in zip(names, args.configs, strict=True)}
    first = next(iter(configs.values()))
    for name, config in configs.items():
        print(f"{name}, {args.model}", *grid(config, first, sys.stdout.isatty()), "", sep="\n")
    print(*numbers(configs, shapes), sep="\n")
    if len(args.configs) == 2:
        print("", *differences(first, [*configs.values()][-1]), sep="\n")
    if args.png is not None:
        draw(configs, shapes, args.model, args.png)


if __name__ == "__main__":
    with plain_errors():
        main()
