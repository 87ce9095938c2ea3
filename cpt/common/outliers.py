"""Outlier channels: how much larger the largest input channel of every linear is than the median one.

They set a token's MinMax scale, and are what the rotated quantizer spreads (calibration.py).
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from common.record import atomic_path  # noqa: E402
from common.statistics import markdown_table  # noqa: E402


def as_grid(ratios):
    """(names of the linears of a block, rows: their ratios block by block). ratios: of `outlier_ratios`."""
    kinds = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in ratios))
    values = list(ratios.values())
    return kinds, [values[at : at + len(kinds)] for at in range(0, len(values), len(kinds))]


def outlier_lines(ratios):
    """The ratios as a markdown table, a row per block."""
    kinds, rows = as_grid(ratios)
    return markdown_table(["block", *kinds], [[str(n), *(f"{x:.1f}" for x in row)] for n, row in enumerate(rows)])


def draw_outliers(ratios, path, caption):
    """The ratios as a block x linear map, PNG."""
    kinds, rows = as_grid(ratios)
    figure, axes = plt.subplots(figsize=(5.5, 1.5 + 0.35 * len(rows)), layout="constrained")
    image = axes.imshow(rows, aspect="auto", norm=matplotlib.colors.LogNorm(vmin=1), cmap="viridis")
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_yticks(range(len(rows)), range(len(rows)))
    axes.set(ylabel="block", title="largest input channel over the median one (rms)")
    dark = max(map(max, rows)) ** 0.6
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.1f}", ha="center", va="center", color="white" if value < dark else "black")
    figure.colorbar(image)
    figure.supxlabel(caption, fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
