"""Figures of the report, as SVG with the same bytes for the same records."""

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
    """Every figure is a function of (scale, path) that returns whether there was anything to draw."""
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


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


def accuracy(scale, path):
    """EM against average bits and, where a benchmark gives the time, against milliseconds."""
    times = scale["times"]
    series = {name: (*style, points(scale, steps)) for name, (*style, steps) in SERIES.items()}
    series = {name: values for name, values in series.items() if values[2]}
    if not series:
        return False
    widths = (3, 2) if times else (1,)
    layout = {"sharey": True, "squeeze": False, "width_ratios": widths, "layout": "constrained"}
    figure, ((bits, *more),) = plt.subplots(1, len(widths), figsize=(WIDTH, 3.5), **layout)
    for number, (name, (colour, marker, found)) in enumerate(series.items()):
        shift = number - len(series) / 2  # sideways, so that points of one width do not hide each other
        draw(bits, [min(score["average_w_bits"], 10) + 0.09 * shift for score in found], found, colour, marker, name)
        timed = [score for score in found if score["config"] in times]
        for axes in more:
            draw(axes, [times[score["config"]] * 1.07**shift for score in timed], timed, colour, marker, None)
    bits.set(xlabel="average bits of the weights (hollow: activations at 8 bits)", ylabel="EM, 95 % intervals")
    bits.set_xticks([4, 5, 6, 7, 8, 10], ["4", "5", "6", "7", "8", "32"])
    for axes in more:
        axes.set(xlabel="ms a forward (see caption)", xscale="log")
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    figure.legend(loc="outside lower center", ncols=3)
    return save(figure, path)


def heat_map(scale, path):
    """KL and loss of EM where one linear alone falls to the low bits, block by linear."""
    if not (record := first_record(scale, "sensitivity")):
        return False
    flips = [flip for flip in low_flips(record) if flip["kind"] == "layer"]
    blocks = 1 + max(int(flip["layers"][0].split(".")[2]) for flip in flips)
    measures = {
        "kl": ("KL divergence of the answers x 1000", "{:.1f}", 1000),
        "exact_match_drop": ("loss of EM, points", "{:z.1f}", 1),
    }
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 0.9 + 0.2 * blocks), layout="constrained")
    for axes, (measure, (title, form, unit)) in zip(panels, measures.items()):
        cells = [[float("nan")] * len(KINDS) for _ in range(blocks)]
        for flip in flips:
            _, _, block, kind = flip["layers"][0].split(".", 3)
            cells[int(block)][KINDS.index(kind)] = unit * flip[measure]
        top = max(abs(value) for row in cells for value in row) or 1
        signed = measure == "exact_match_drop"
        axes.imshow(cells, cmap="RdBu_r" if signed else "Reds", vmin=-top if signed else 0, vmax=top, aspect="auto")
        for block, row in enumerate(cells):
            for column, value in enumerate(row):
                colour = "white" if abs(value) > 0.65 * top else "black"
                axes.text(column, block, form.format(value), ha="center", va="center", color=colour, fontsize=7)
        axes.set_xticks(range(len(KINDS)), KINDS)
        axes.set_yticks(range(blocks))
        axes.tick_params(length=0)
        axes.set(title=title, ylabel="block")
    return save(figure, path)


def pareto(scale, path):
    """EM of the search's assignments against their average bits."""
    if not (record := first_record(scale, "search")):
        return False
    groups = {"found": (GREEN, "o"), "random": (GREY, "x"), "first_last": (ORANGE, "s"), "hybrid": (RED, "P")}
    figure, axes = plt.subplots(figsize=(WIDTH, 2.7), layout="constrained")
    n = record["data"]["validation"]["examples"]
    kinds = {
        row["config"]: next((name for name in groups if row["config"].startswith(name)), "uniform")
        for row in record["rows"]
    }
    for number, (kind, (colour, marker)) in enumerate((groups | {"uniform": (BLUE, "D")}).items()):
        rows = [scores(record, row["config"]) for row in record["rows"] if kinds[row["config"]] == kind]
        rows = [row for row in rows if row]
        shift = 0.04 * (number - 2)
        label = {"first_last": "first and last blocks high", "hybrid": "published hybrid, by depth"}.get(kind, kind)
        x = [row["average_w_bits"] + shift for row in rows]
        draw(axes, x, rows, colour, marker, label, bars=kind != "random")
    axes.set(xlabel="average bits of the weights", ylabel=f"EM on {n} questions, 95 %")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return save(figure, path)


def cyclic(scale, path):
    """EM of one cyclically trained adapter by width, beside trainings at one width and quantization afterwards."""
    if not (first_record(scale, "cpt_eval") or first_record(scale, "cpt_minmax_eval")):
        return False
    lines = {
        "CPT, rotated": (GREEN, "o", [("cpt_eval", "*")]),
        "CPT, MinMax": ("#8c5ca8", "o", [("cpt_minmax_eval", "*")]),
        **{name: SERIES[name] for name in SERIES if name.startswith(("trained at", "post-training"))},
    }
    figure, axes = plt.subplots(figsize=(WIDTH, 2.8), layout="constrained")
    for number, (name, (colour, marker, steps)) in enumerate(lines.items()):
        found = [score for score in points(scale, steps) if not score["config"].startswith("W4A8")]
        if found:
            x = [score["average_w_bits"] + 0.05 * (number - 2.5) for score in found]
            draw(axes, x, found, colour, marker, name, connect=name.startswith("CPT"))
    axes.set(xlabel="bits of W, A and K/V", ylabel="EM, 95 % intervals")
    axes.set_xticks([4, 5, 6, 7, 8])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return save(figure, path)


def outliers(scale, path):
    """Largest channel of a token over its root mean square, linear by linear, in four bases."""
    if not (record := first_record(scale, "outlier_channels")):
        return False
    rows = record["largest_over_rms"]
    styles = {"plain": (RED, "v"), "balanced": (ORANGE, "s"), "rotated": (LIGHT, "^"), "both": (BLUE, "o")}
    names = [name for kind in KINDS for name in rows if name.endswith(kind)]
    figure, axes = plt.subplots(figsize=(WIDTH, 2.6), layout="constrained")
    for base, (colour, marker) in styles.items():
        axes.plot([rows[name][base] for name in names], marker, color=colour, label=base)
    each = len(names) // len(KINDS)
    for kind in range(1, len(KINDS)):
        axes.axvline(kind * each - 0.5, color="#cccccc", linewidth=0.8)
    blocks = [name.split(".")[2] for name in names]
    axes.set_xticks(range(len(names)), [block if each <= 6 or int(block) % 3 == 0 else "" for block in blocks])
    for number, kind in enumerate(KINDS):
        axes.text((number + 0.5) * each - 0.5, 1.02, kind, transform=axes.get_xaxis_transform(), ha="center")
    axes.set(xlabel="block, by kind of linear", ylabel="largest / rms of a token", yscale="log")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return save(figure, path)


ALL = {"accuracy": accuracy, "heat": heat_map, "pareto": pareto, "cyclic": cyclic, "outliers": outliers}
