"""Figures of the report, as SVG with the same bytes for the same records.

Every figure is a function of (scales, path): one panel or row a scale, of those that have its records. It returns the
scales that it shows.
"""

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from findings import first_record, low_flips, scores  # noqa: E402

plt.rcParams |= {"svg.hashsalt": "report", "font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "lines.markersize": 4}
WIDTH = 6.5  # inches, that of the page's text
KINDS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
BLUE, LIGHT, RED, ORANGE, GREEN, GREY = "#1f5a94", "#7fb2d9", "#b5382a", "#e39a3b", "#3f8f4f", "#808080"
# {series: (colour, marker, [(step, config)])}; a config "*" is every row of an evaluation
SERIES = {
    "full fine-tuning, float": (GREY, "D", [("full_fp32", None)]),
    "LoRA, float": ("black", "D", [("lora_fp32", None)]),
    "post-training, MinMax": (RED, "v", [(f"ptq_minmax_{bits}", None) for bits in ("W8A8KV8", "W4A8KV8", "W4A4KV4")]),
    "post-training, rotated": (
        BLUE,
        "^",
        [(f"ptq_rotated_{bits}", None) for bits in ("W8A8KV8", "W4A8KV8", "W4A4KV4")],
    ),
    "trained at one width, MinMax": (ORANGE, "s", [("static_w8_minmax", None), ("static_w4_minmax", None)]),
    "trained at one width, rotated": (LIGHT, "s", [("static_w8_rotated", None), ("static_w4_rotated", None)]),
    "switchable, rotated": (GREEN, "o", [("switch_eval", "*")]),
    "switchable, MinMax": ("#8c5ca8", "o", [("switch_minmax_eval", "*")]),
    "sequential, as published": ("#8a6d3b", "P", [("switch_sequential_eval", "*")]),
}


def save(figure, path):
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def having(scales, *steps):
    """The scales with a record of one of the steps."""
    return [scale for scale in scales if any(first_record(scale, step) for step in steps)]


def panels(scales, rows, height):
    """(figure, [axes]), one a scale: below each other (rows) or side by side, named where there are several."""
    shape = (len(scales), 1) if rows else (1, len(scales))
    figure, grid = plt.subplots(*shape, figsize=(WIDTH, height), squeeze=False, layout="constrained")
    for axes, scale in zip(grid.flat, scales):
        axes.set_title(scale["title"] if len(scales) > 1 else "", loc="left")
    return figure, list(grid.flat)


def legend(figure, ncols):
    """One legend below, every series once."""
    found = {}
    for axes in figure.axes:
        found |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(found.values(), found, loc="outside lower center", ncols=ncols)


def points(scale, steps):
    """[scores] of (step, config) of a scale's first seed, what is not there left out; "config" is its name."""
    found = []
    for step, config in steps:
        if record := first_record(scale, step):
            names = [row["config"] for row in record["rows"]] if config == "*" else [config]
            for name in names:
                found.append(scores(record, name) | {"config": name or record["bit_config"]["name"]})
    return found


def draw(axes, x, found, colour, marker, label, connect=False, bars=True):
    """EM, with intervals or without; hollow where activations have more bits than weights."""
    em = [score["exact_match"] for score in found]
    if not bars:
        axes.plot(x, em, marker, color=colour, label=label)
        return
    errors = [[abs(e - score["interval"][side]) for e, score in zip(em, found)] for side in (0, 1)]
    line = "-" if connect else "none"
    axes.errorbar(x, em, errors, color=colour, elinewidth=0.8, capsize=1.5, linestyle=line, linewidth=0.8)
    for first, (place, score) in enumerate(zip(x, found)):
        hollow = score["config"].startswith("W4A8")
        style = {"markerfacecolor": "white" if hollow else colour, "color": colour, "linestyle": "none"}
        axes.plot(place, score["exact_match"], marker, label=None if first else label, **style)


def accuracy(scales, path):
    """EM against average bits and, where a benchmark gives the time, against milliseconds."""
    rows = {}
    for scale in scales:
        series = {name: (*style, points(scale, steps)) for name, (*style, steps) in SERIES.items()}
        if series := {name: values for name, values in series.items() if values[2]}:
            rows[scale["key"]] = scale, series
    if not rows:
        return []
    widths = (3, 2) if scales[0]["times"] else (1,)
    layout = {"sharey": "row", "squeeze": False, "width_ratios": widths, "layout": "constrained"}
    size = (WIDTH, 0.9 + 2.0 * len(rows))
    figure, grid = plt.subplots(len(rows), len(widths), figsize=size, **layout)
    for (bits, *more), (scale, series) in zip(grid, rows.values()):
        times = scale["times"]
        for number, (name, (colour, marker, found)) in enumerate(series.items()):
            shift = number - len(series) / 2  # sideways, so that points of one width do not hide each other
            x = [min(score["average_w_bits"], 10) + 0.09 * shift for score in found]
            draw(bits, x, found, colour, marker, name)
            timed = [score for score in found if score["config"] in times]
            for axes in more:
                draw(axes, [times[score["config"]] for score in timed], timed, colour, marker, None)
        bits.set(ylabel="EM, 95 % intervals")
        bits.set_title(scale["title"] if len(rows) > 1 else "", loc="left")
        bits.set_xticks([4, 5, 6, 7, 8, 10], ["4", "5", "6", "7", "8", "32"])
        for axes in more:
            axes.set(xscale="log")
            axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    for axes, label in zip(grid[-1], ("average bits of the weights (hollow: activations at 8 bits)", "ms a forward")):
        axes.set_xlabel(label)
    legend(figure, 3)
    save(figure, path)
    return [scale for scale, _ in rows.values()]


def heat_map(scales, path):
    """KL and loss of EM where one linear alone falls to the low bits, block by linear."""
    if not (scales := having(scales, "sensitivity")):
        return []
    found = [low_flips(first_record(scale, "sensitivity")) for scale in scales]
    found = [[flip for flip in flips if flip["kind"] == "layer"] for flips in found]
    blocks = [1 + max(int(flip["layers"][0].split(".")[2]) for flip in flips) for flips in found]
    measures = {
        "kl": ("KL divergence of the answers x 1000", "{:.1f}", 1000),
        "exact_match_drop": ("loss of EM, points", "{:z.1f}", 1),
    }
    size = (WIDTH, sum(0.45 + 0.16 * number for number in blocks))
    figure, grid = plt.subplots(len(scales), 2, figsize=size, squeeze=False, layout="constrained")
    for row, scale, flips, number in zip(grid, scales, found, blocks):
        for axes, (measure, (title, form, unit)) in zip(row, measures.items()):
            cells = [[float("nan")] * len(KINDS) for _ in range(number)]
            for flip in flips:
                _, _, block, kind = flip["layers"][0].split(".", 3)
                cells[int(block)][KINDS.index(kind)] = unit * flip[measure]
            top = max(abs(value) for line in cells for value in line) or 1
            signed = measure == "exact_match_drop"
            colours = {"cmap": "RdBu_r" if signed else "Reds", "vmin": -top if signed else 0, "vmax": top}
            axes.imshow(cells, aspect="auto", **colours)
            for block, line in enumerate(cells):
                for column, value in enumerate(line):
                    colour = "white" if abs(value) > 0.65 * top else "black"
                    axes.text(column, block, form.format(value), ha="center", va="center", color=colour, fontsize=6.5)
            axes.set_xticks(range(len(KINDS)), KINDS)
            axes.set_yticks(range(number))
            axes.tick_params(length=0)
            axes.set(title=f"{scale['title']}: {title}" if len(scales) > 1 else title, ylabel="block")
    save(figure, path)
    return scales


def pareto(scales, path):
    """EM of the search's assignments against their average bits."""
    if not (scales := having(scales, "search")):
        return []
    groups = {"found": (GREEN, "o"), "random": (GREY, "x"), "first_last": (ORANGE, "s"), "hybrid": (RED, "P")}
    labels = {"first_last": "first and last blocks high", "hybrid": "published hybrid, by depth"}
    figure, all_axes = panels(scales, False, 2.4)
    for axes, scale in zip(all_axes, scales):
        record = first_record(scale, "search")
        kinds = {
            row["config"]: next((name for name in groups if row["config"].startswith(name)), "uniform")
            for row in record["rows"]
        }
        for number, (kind, (colour, marker)) in enumerate((groups | {"uniform": (BLUE, "D")}).items()):
            rows = [scores(record, row["config"]) for row in record["rows"] if kinds[row["config"]] == kind]
            rows = [row for row in rows if row]
            x = [row["average_w_bits"] + 0.04 * (number - 2) for row in rows]
            draw(axes, x, rows, colour, marker, labels.get(kind, kind), bars=kind != "random")
        axes.set(xlabel="average bits of the weights")
    all_axes[0].set_ylabel("EM, 95 %")
    legend(figure, 5)
    save(figure, path)
    return scales


def cyclic(scales, path):
    """EM of one cyclically trained adapter by width, beside trainings at one width and quantization afterwards."""
    if not (scales := having(scales, "cpt_eval", "cpt_minmax_eval")):
        return []
    lines = {
        "CPT, rotated": (GREEN, "o", [("cpt_eval", "*")]),
        "CPT, MinMax": ("#8c5ca8", "o", [("cpt_minmax_eval", "*")]),
        **{name: SERIES[name] for name in SERIES if name.startswith(("trained at", "post-training"))},
    }
    figure, all_axes = panels(scales, False, 2.6)
    for axes, scale in zip(all_axes, scales):
        for number, (name, (colour, marker, steps)) in enumerate(lines.items()):
            found = [score for score in points(scale, steps) if not score["config"].startswith("W4A8")]
            if found:
                x = [score["average_w_bits"] + 0.05 * (number - 2.5) for score in found]
                draw(axes, x, found, colour, marker, name, connect=name.startswith("CPT"))
        axes.set(xlabel="bits of W, A and K/V")
        axes.set_xticks([4, 5, 6, 7, 8])
    all_axes[0].set_ylabel("EM, 95 % intervals")
    legend(figure, 3)
    save(figure, path)
    return scales


def outliers(scales, path):
    """Largest channel of a token over its root mean square, linear by linear, in four bases."""
    if not (scales := having(scales, "outlier_channels")):
        return []
    styles = {"plain": (RED, "v"), "balanced": (ORANGE, "s"), "rotated": (LIGHT, "^"), "both": (BLUE, "o")}
    figure, all_axes = panels(scales, True, 0.5 + 1.6 * len(scales))
    for axes, scale in zip(all_axes, scales):
        rows = first_record(scale, "outlier_channels")["largest_over_rms"]
        names = [name for kind in KINDS for name in rows if name.endswith(kind)]
        for base, (colour, marker) in styles.items():
            axes.plot([rows[name][base] for name in names], marker, color=colour, label=base)
        each = len(names) // len(KINDS)
        for kind in range(1, len(KINDS)):
            axes.axvline(kind * each - 0.5, color="#cccccc", linewidth=0.8)
        blocks = [name.split(".")[2] for name in names]
        axes.set_xticks(range(len(names)), [block if each <= 6 or int(block) % 3 == 0 else "" for block in blocks])
        for number, kind in enumerate(KINDS):
            middle = (number + 0.5) * each - 0.5
            axes.text(middle, 0.98, kind, transform=axes.get_xaxis_transform(), ha="center", va="top")
        axes.set(ylabel="largest / rms", yscale="log")
        axes.set_ylim(top=axes.get_ylim()[1] * 1.3)  # room for the kinds' names
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    all_axes[-1].set_xlabel("block, by kind of linear")
    legend(figure, 4)
    save(figure, path)
    return scales


ALL = {"accuracy": accuracy, "heat": heat_map, "pareto": pareto, "cyclic": cyclic, "outliers": outliers}
