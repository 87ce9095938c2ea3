"""The plots of sensitivity.py (heat map of a sweep) and search.py (EM against average weight bits)."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm

from allocation.flips import TYPES, title
from common.record import atomic_path
from models.bit_config import block_of

PANELS = (("exact_match_drop", "EM drop (points)", "{:.1f}"), ("kl", "KL (nats)", "{:.1e}"))
STYLES = {
    "random": {"label": "random, same budget", "marker": ".", "color": "0.6", "linestyle": ""},
    "first_last": {"label": "first and last blocks high", "marker": "^", "color": "C2", "linestyle": ""},
    "uniform": {"label": "uniform width", "marker": "s", "color": "C1", "linestyle": "--"},
    "found": {"label": "found", "marker": "o", "color": "C0", "linestyle": "-"},
    "hybrid": {"label": "published hybrid", "marker": "*", "color": "C3", "linestyle": "", "markersize": 12},
}


def save(figure, path):
    """Write the PNG whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def draw_heat_map(flips, path, caption):
    """Blocks by layer types, EM drop and KL side by side, one row of panels per low width and operand.

    Args: flips: of `make_flips`, with "exact_match_drop" and "kl". path: of the PNG. caption: its title.
    """
    layers = [flip for flip in flips.values() if flip["kind"] == "layer"]
    maps = {}
    for flip in layers:
        maps.setdefault(title(flip["low_bits"], flip["operand"]), []).append(flip)
    blocks = 1 + max(block_of(flip["name"]) for flip in layers)
    size = (11, 1.6 + len(maps) * (1.2 + 0.36 * blocks))
    figure, grid = plt.subplots(len(maps), 2, figsize=size, squeeze=False, layout="constrained")
    for (name, members), row in zip(maps.items(), grid, strict=True):
        for axes, (measure, words, form) in zip(row, PANELS, strict=True):
            values = np.full((blocks, len(TYPES)), np.nan)
            for flip in members:
                kind = next(index for index, kind in enumerate(TYPES) if flip["name"].endswith(kind))
                values[block_of(flip["name"]), kind] = flip[measure]
            if measure == "exact_match_drop":  # zero is white: red loses, blue gains
                bound = np.nanmax(np.abs(values)) or 1.0
                image = axes.imshow(values, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
                dark = np.abs(values) > 0.65 * bound
            else:  # spans orders of magnitude
                scale = LogNorm() if np.nanmin(values) > 0 else None
                image = axes.imshow(values, cmap="viridis_r", norm=scale, aspect="auto")
                dark = image.norm(values) > 0.5
            for block, kind in np.argwhere(~np.isnan(values)):  # K/V belong to one of the types
                color = "white" if dark[block, kind] else "black"
                shown = form.format(values[block, kind])
                axes.text(kind, block, shown, ha="center", va="center", color=color, fontsize=8)
            axes.set_xticks(range(len(TYPES)), TYPES)
            axes.set_yticks(range(blocks))
            axes.set(ylabel="block", title=f"{words}, one linear at {name}")
            figure.colorbar(image, ax=axes)
    figure.suptitle(caption, fontsize=10)
    save(figure, path)


def draw_pareto(rows, groups, path, caption):
    """EM with intervals against average bits.

    Args: rows: of the evaluation table. groups: {key of STYLES: config names}; a row that is in none is the hybrid.
    path: of the PNG. caption: its title.
    """
    grouped = {name for names in groups.values() for name in names}
    groups = groups | {"hybrid": [row["config"] for row in rows if row["config"] not in grouped]}
    figure, axes = plt.subplots(figsize=(8.5, 4.5), layout="constrained")
    for group, style in STYLES.items():
        members = [row for row in rows if row["config"] in groups[group]]
        members.sort(key=lambda row: row["average_w_bits"])
        if not members:
            continue
        x, y = [row["average_w_bits"] for row in members], [row["exact_match"] for row in members]
        axes.plot(x, y, **style)
        if members[0]["exact_match_interval"] and group != "random":
            low, high = zip(*(row["exact_match_interval"] for row in members))
            axes.vlines(x, low, high, color=style["color"], alpha=0.4)
    axes.set(xlabel="average bits of the linear weights", ylabel="exact match (%)")
    axes.grid(alpha=0.3)
    axes.set_title(caption, fontsize=10)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the axes: nothing is under it
    save(figure, path)
