"""What the records say about published findings: a difference, its interval, a verdict.

A verdict needs an interval that leaves out zero. It comes from seeds (paired, Student's t), from the record's paired
bootstrap, or from the questions of one model served in two ways. Two trainings of one seed give no verdict.
"""

import statistics

from scipy.stats import t as student_t

LEVEL = 0.025  # one-sided p of an exact test up to which an effect holds
MARGIN = 2.0  # points: a loss or gain whose interval stays below it counts as none
LEAST_F1 = 30.0  # of the float adapter: below it a model reads too little for any finding on its answers to be shown
LOW_BLOCKS = 1 / 3  # early blocks are the first third, late blocks the last


def wilson(share, n):
    """95 % interval of a share (0 to 100) of n questions, in percent."""
    z, p = 1.959964, share / 100
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return [100 * (middle - half) / (1 + z * z / n), 100 * (middle + half) / (1 + z * z / n)]


def newcombe(first, second, n):
    """[difference, low, high] of two shares of n questions each; conservative, as pairing is not used."""
    (l1, u1), (l2, u2) = wilson(first, n), wilson(second, n)
    difference = first - second
    low = difference - ((first - l1) ** 2 + (u2 - second) ** 2) ** 0.5
    return [difference, low, difference + ((u1 - first) ** 2 + (second - l2) ** 2) ** 0.5]


def over_seeds(first, second):
    """[mean difference, low, high] of values paired by seed; no interval for one seed."""
    found = [a - b for a, b in zip(first, second, strict=True)]
    mean = statistics.mean(found)
    if len(found) < 2:
        return [mean, None, None]
    half = student_t.ppf(0.975, len(found) - 1) * statistics.stdev(found) / len(found) ** 0.5
    return [mean, mean - half, mean + half]


def shown(gap):
    """ "+1.0 [-0.5, +2.5]" with a true minus; without an interval the number alone. gap: [difference, low, high]."""
    middle, low, high = gap
    return (f"{middle:+z.1f}" + ("" if low is None else f" [{low:+z.1f}, {high:+z.1f}]")).replace("-", "−")


def row_of(record, config):
    """The row of an evaluation that is named so, or begins so (hybrid, found); None where there is none."""
    rows = [row for row in record["rows"] if row["config"] == config]
    if config in ("hybrid", "found"):
        rows = [row for row in record["rows"] if row["config"].startswith(config) and "." not in row["config"]]
    return rows[0] if rows else None


def scores(record, config=None):
    """{exact_match, f1, n, interval, how, average_w_bits} of a record or of one of its configs; None if not there."""
    n = record["data"]["validation"]["examples"]
    if config is None:
        found = {key: record["metrics"][f"eval_{key}"] for key in ("exact_match", "f1")}
        found["average_w_bits"] = record["bit_config"].get("average_w_bits")
    elif (found := row_of(record, config)) is None:
        return None
    interval = found.get("exact_match_interval")
    kept = {key: found[key] for key in ("exact_match", "f1", "average_w_bits")}
    return kept | {"n": n, "interval": interval or wilson(found["exact_match"], n), "config": config}


def summarized(scale, step, config=None):
    """{seed: EM} of a step's config in the summary over seeds, empty where it has none."""
    if not scale["summary"]:
        return {}
    methods = scale["summary"]["methods"][max(scale["summary"]["methods"], key=float)]  # the largest outliers
    if step == "lora_fp32":
        method, config = "ptq_minmax", "W32A32KV32"
    elif step in ("static_w4_rotated", "static_w4_minmax"):
        method, config = step.replace("_w4", ""), "W4A4KV4"
    elif step in ("switch_eval", "switch_sequential_eval"):
        method = {"switch_eval": "joint", "switch_sequential_eval": "sequential"}[step]
    elif step in methods:
        method = step
    else:
        method, _, config = step.rpartition("_")
    found = methods.get(method, {}).get(config)
    return dict(zip(map(int, scale["summary"]["seeds"]), found["values"], strict=True)) if found else {}


def by_seed(scale, step, config=None):
    """{seed: EM} of a step's config in the records."""
    found = {seed: scores(record, config) for seed, record in scale["records"].get(step, {}).items()}
    return {seed: score["exact_match"] for seed, score in found.items() if score}


def compare(scale, first, second, same_model=False):
    """([difference, low, high], basis) of two (step, config), or None where one was not measured.

    Both from the summary over seeds or both from the records, as their trainings differ in length.
    same_model: one training served twice, so that one seed's questions give an interval.
    """
    for source, name in ((summarized, ", summary"), (by_seed, "")):
        values = source(scale, *first), source(scale, *second)
        seeds = [seed for seed in values[0] if seed in values[1]]
        if not seeds:
            continue
        pairs = [[found[seed] for seed in seeds] for found in values]
        if len(seeds) > 1:
            return over_seeds(*pairs), f"{len(seeds)} seeds{name}"
        if same_model:
            return newcombe(pairs[0][0], pairs[1][0], scale["n"]), f"1 seed, {scale['n']} questions"
        return over_seeds(*pairs), "1 seed: no interval"
    return None


def flips_of(scale, kind, names):
    """[drop, half width] averaged over flips: half widths add up at most so, however the flips go together."""
    record = first_record(scale, "sensitivity")
    flips = [flip for flip in low_flips(record) if flip["kind"] == kind and names(flip)] if record else []
    if not flips:
        return None
    halves = [
        max(abs(flip["exact_match_drop"] - bound) for bound in flip["exact_match_drop_interval"]) for flip in flips
    ]
    return statistics.mean(flip["exact_match_drop"] for flip in flips), statistics.mean(halves)


def low_flips(record):
    """The flips of a sweep to its lowest bits with all operands together, else of the weights."""
    flips = list(record["flips"].values())
    operand = "together" if any(flip["operand"] == "together" for flip in flips) else "w"
    names = list(dict.fromkeys(flip["low_bits"] for flip in flips))
    return [flip for flip in flips if flip["operand"] == operand and flip["low_bits"] == names[-1]]


def first_record(scale, step):
    """The record of a step's first seed, or None."""
    return next(iter(scale["records"].get(step, {}).values()), None)


def flip_gap(scale, first, second):
    """([difference of drops, low, high], basis); first and second: of `flips_of`."""
    first, second = flips_of(scale, *first), flips_of(scale, *second)
    if not first or not second:
        return None
    difference, half = first[0] - second[0], first[1] + second[1]
    n = first_record(scale, "sensitivity")["data"]
    n = next(iter(n.values()))["examples"]
    return [difference, difference - half, difference + half], f"1 seed, {n} questions, bound"


def third(flip, blocks):
    """The share of the depth at which a flip's first linear stands."""
    return int(flip["layers"][0].split(".")[2]) / blocks


def sensitivity_findings(scale):
    """{key: gap} of the findings about blocks and kinds of linears."""
    blocks = scale["blocks"]

    def early(flip):
        return third(flip, blocks) < LOW_BLOCKS

    def late(flip):
        return third(flip, blocks) >= 1 - LOW_BLOCKS - 1e-9

    def kind(name):
        return ("type", lambda flip: flip["name"] == name)

    worse = max(("attn", "mlp"), key=lambda name: (flips_of(scale, *kind(name)) or [0])[0])
    return {
        "late": flip_gap(scale, ("block", lambda flip: not late(flip)), ("block", late)),
        "attn_proj": flip_gap(scale, kind("attn.c_attn"), kind("attn.c_proj")),
        "mlp_proj": flip_gap(scale, kind("mlp.c_fc"), kind("mlp.c_proj")),
        "mlp_proj_early": flip_gap(
            scale,
            ("layer", lambda flip: early(flip) and flip["name"].endswith("mlp.c_fc")),
            ("layer", lambda flip: early(flip) and flip["name"].endswith("mlp.c_proj")),
        ),
        "mlp_attn": flip_gap(scale, kind("mlp"), kind("attn")),
        "partial": flip_gap(scale, kind(worse), ("all", lambda flip: True)),
    }


def attack_findings(record):
    """{key: gap} of the findings about robustness, from single samples. record: of random_precision_inference.py."""
    if not record:
        return dict.fromkeys(("low_bits", "transfer", "random", "eot"))
    cells, draws = record["matrices"]["single sample"], record["random_precision"]
    n = cells["no attack"]["W32A32KV32"]["n"]
    widths = [name for name in cells["no attack"] if name.startswith("W") and name in cells]
    low, full = min(widths, key=lambda name: int(name.partition("A")[0][1:])), "W32A32KV32"
    names = {name.partition("(")[0]: name for name in draws}

    def gap(first, second):
        return newcombe(first, second, n), f"1 seed, {n} texts"

    return {
        "low_bits": gap(cells[low][low]["accuracy"], cells[full][full]["accuracy"]),
        "transfer": gap(cells[full][low]["accuracy"], cells[full][full]["accuracy"]),
        "random": gap(draws[full]["expected"], cells[full][full]["accuracy"]),
        "eot": gap(draws[names["random"]]["expected"], draws[names["eot"]]["expected"]),
    }


def cpt_widths(scale, step):
    """([drop, low, high] of the lowest width below which none loses more than MARGIN, its name) of a CPT, or None."""
    if not (record := first_record(scale, step)):
        return None
    kept, rows = None, record["rows"]
    for row in rows[1:]:
        if row["exact_match_drop_interval"][1] > MARGIN:
            break
        kept = row
    row = kept or rows[1]
    interval = [row["exact_match_drop"], *row["exact_match_drop_interval"]]
    return interval, f"{row['config']}, 1 seed, {record['data']['validation']['examples']} questions"


def loss_of(scale, step, config):
    """([EM that a config loses against the record's first, low, high], basis), paired over questions; or None."""
    record = first_record(scale, step)
    if not record or not (row := row_of(record, config)):
        return None
    gap = [row["exact_match_drop"], *row["exact_match_drop_interval"]]
    return gap, f"1 seed, {record['data']['validation']['examples']} questions"


def rank_test(not_beaten, numbers):
    """Exact one-sided p: chance that so few random assignments do as well, if found ones were drawn like them.

    not_beaten: random ones as good as the found one or better, summed over searches; numbers: random ones of each.
    Under this hypothesis the rank of each found one is uniform, and the searches are independent.
    """
    ways = [1]
    for number in numbers:
        ways = [sum(ways[max(0, k - number) : k + 1]) for k in range(len(ways) + number)]
    return sum(ways[: not_beaten + 1]) / sum(ways)


def searched_over_seeds(scale, kind):
    """([found minus mean of random ones, low, high], basis) of a kind of search in the summary over seeds, or None."""
    searches = list((scale["summary"] or {}).get("searches", {}).get(kind, {}).values())
    if len(searches) < 2:
        return None
    pair = [[found[key] for found in searches] for key in ("found", "mean_exact_match")]
    counts = [found["exact_match"] for found in searches]
    not_beaten = sum(count["random_better"] + count["equal"] for count in counts)
    p = rank_test(not_beaten, [found["number"] for found in searches])
    total = sum(found["number"] for found in searches)
    basis = f"{len(searches)} seeds, summary: {not_beaten} of {total} random as good, p {p:.2g}"
    return over_seeds(*pair), basis, p


def searched(scale):
    """The same of the search's first budget, by the record of one seed where there is no summary."""
    if found := searched_over_seeds(scale, "search_joint"):
        return found
    record = first_record(scale, "search")
    random = next(iter(record["search"].values())).get("random") if record else None
    if not random:
        return None
    gap = random["exact_match"]
    return [gap["found_minus_mean"], *gap["found_minus_mean_interval"]], f"1 seed, {random['number']} random ones"


def verdict(gap, rule="above"):
    """holds, does not hold, not shown or not measured. rule: above zero, or none (below MARGIN).

    A third part of gap is the p of an exact test, which then decides.
    """
    if gap is None:
        return "not measured"
    if len(gap) == 3:
        return "holds" if gap[2] <= LEVEL else "does not hold" if gap[2] >= 1 - LEVEL else "not shown"
    _, low, high = gap[0]
    if low is None:
        return "not shown"
    if rule == "none":
        return "holds" if high <= MARGIN else "does not hold" if low > 0 else "not shown"
    return "holds" if low > 0 else "does not hold" if high < 0 else "not shown"


def findings(scale):
    """{key: {"gap", "measured", "basis", "verdict"}} of one scale; the template says what each key claims."""
    four, eight = "W4A4KV4", "W8A8KV8"
    minmax = bool(scale["records"].get("cpt_minmax_eval"))  # as published
    cyclic, quantizer = ("cpt_minmax_eval", "minmax") if minmax else ("cpt_eval", "rotated")
    static8, static4 = (f"static_w{bits}_{quantizer}" for bits in (8, 4))
    gaps = sensitivity_findings(scale) | attack_findings(first_record(scale, "attack_rpi"))
    gaps |= {
        "collapse": compare(scale, ("lora_fp32", None), (f"ptq_minmax_{four}", None), True),
        "eight_free": compare(scale, ("lora_fp32", None), (f"ptq_minmax_{eight}", None), True),
        "rotation": compare(scale, (f"ptq_rotated_{four}", None), (f"ptq_minmax_{four}", None), True),
        "rotation_free": compare(scale, ("lora_fp32", None), (f"ptq_rotated_{four}", None), True),
        "joint": compare(scale, ("switch_eval", four), ("static_w4_rotated", None)),
        "joint_ptq": compare(scale, ("switch_eval", four), (f"ptq_rotated_{four}", None)),
        "joint_three": compare(scale, ("joint3_early", "W3A3KV3"), ("ptq_rotated_W3A3KV3", None)),
        "static_minmax": compare(scale, ("static_w4_minmax", None), (f"ptq_minmax_{four}", None)),
        "static_rotated": compare(scale, ("static_w4_rotated", None), (f"ptq_rotated_{four}", None)),
        "sequential": compare(scale, ("switch_minmax_eval", four), ("switch_sequential_eval", four)),
        "recipe": compare(scale, ("switch_eval", four), ("switch_sequential_eval", four)),
        "hybrid": loss_of(scale, "switch_eval", "hybrid"),
        "cpt_gain": compare(scale, (cyclic, eight), (static8, None)),
        "cpt_four": compare(scale, (cyclic, four), (static4, None)),
        "cpt_widths": cpt_widths(scale, cyclic),
        "search": searched(scale),
        "search_mixed": searched_over_seeds(scale, "search_mixed"),
        "search_low": searched_over_seeds(scale, "search_lora"),
        "search_operands": searched_over_seeds(scale, "search_operands"),
        "separator": compare(scale, ("lora_fp32", None), ("separator_none", None)),
        "separator_space": compare(scale, ("separator_space", None), ("separator_none", None)),
    }
    for key in ("cpt_gain", "cpt_four", "cpt_widths"):
        gaps[key] = gaps[key] and (gaps[key][0], f"{'MinMax' if minmax else 'rotated'}, {gaps[key][1]}")
    none = ("cpt_gain", "cpt_widths", "eight_free", "rotation_free", "hybrid")
    adapter = first_record(scale, "lora_fp32")
    weak = bool(adapter) and scores(adapter)["f1"] < LEAST_F1
    attacks, found = attack_findings(None), {}
    for key, gap in gaps.items():
        measured, basis = (shown(gap[0]), gap[1]) if gap else ("", "")
        rule = "none" if key in none else "above"
        judged = "not shown" if gap and weak and key not in attacks else verdict(gap, rule)
        found[key] = {"measured": measured, "basis": basis, "verdict": judged, "gap": gap and gap[0]}
    return found
