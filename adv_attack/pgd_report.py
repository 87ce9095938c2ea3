"""What a PGD matrix says about random precision inference: statistics and tables, no model.

`tables`: {row: {"right": {column: [0 or 1 an item]}, "f1" (qa): {column: [...]}, "per_layer": [[...] a draw]}}; the
first row is CLEAN. All inputs count, and what is wrong without an attack counts as broken under every attack (not so
in F1, which is that of the answers given).
"""

import types

import numpy as np

from classifier import accuracy_row
from common.statistics import bootstrap_means, intervals, markdown_table, mcnemar, with_interval
from random_precision_inference import matrix_summary, random_precision

CLEAN, RANDOM, RPI = "no attack", "random delta", "random precision (RPI)"


def paired_difference(first, second):
    """{"points", "interval" (95 %)} of the mean of first - second over the same items, in percentage points.

    first, second: (items,), 0 to 1: outcomes, or their expectation over draws. One item more is counted for either
    side, so that the interval does not vanish where no item differs. Source: Bonett & Price 2012, adjusted Wald
    interval for paired proportions.
    """
    found = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    adjusted = np.append(found, [1.0, -1.0])
    half = 1.959964 * adjusted.std() / len(adjusted) ** 0.5
    bounds = [max(adjusted.mean() - half, -1), min(adjusted.mean() + half, 1)]
    return {"points": 100 * float(found.mean()), "interval": [100 * float(bound) for bound in bounds]}


def verdict(difference, margin):
    """What may be said of a difference. margin: in points."""
    low, high = difference["interval"]
    if -margin <= low and high <= margin:
        return f"no effect larger than {margin:g} points"
    if low > 0 or high < 0:
        return "higher" if low > 0 else "lower"
    return "not decided"


def compare(first, second, margin):
    """`paired_difference` with its `verdict`."""
    difference = paired_difference(first, second)
    return difference | {"verdict": verdict(difference, margin)}


def effective(tables):
    """{row: {column: (items,) bool}}: right under the attack and without it."""
    clean = {column: np.array(right, dtype=bool) for column, right in tables[CLEAN]["right"].items()}
    return {
        row: {column: np.array(right, dtype=bool) & clean[column] for column, right in table["right"].items()}
        for row, table in tables.items()
    }


def transfer_matrix(tables):
    """{row: {column: {"all": accuracy row, "clean_right": the same among items right without attack, "f1" (qa)}}}."""
    right = effective(tables)
    matrix = {row: {} for row in tables}
    for row, table in tables.items():
        for column, found in right[row].items():
            cell = {"all": accuracy_row(found), "clean_right": accuracy_row(found[right[CLEAN][column]])}
            if "f1" in table:
                cell["f1"] = 100 * float(np.mean(table["f1"][column]))
            matrix[row][column] = cell
    return matrix


def random_inference(tables, row, members, args):
    """What one attack does to random precision inference, whole-model and per layer.

    members: the columns of the precision set; args: queries, repetitions, seed, margin of pgd_matrix.py.
    Returns: of `random_precision`, with mcnemar against the best fixed precision of the row; clean_right: expected
        accuracy among items that are right without attack at every precision; f1 (qa); best_fixed; difference: RPI
        minus best fixed; queries: {k: accuracy against an attacker who sends the input k times, each with a draw of
        its own, and wins with any}; per_layer: a random assignment per query, None without draws.
    """
    right = effective(tables)
    correct = np.array([right[row][name] for name in members])  # (precisions, items)
    clean = np.array([right[CLEAN][name] for name in members]).all(0)
    expected, best = correct.mean(0), members[int(correct.mean(1).argmax())]
    found = random_precision(correct[:, :, None], right[row][best][:, None], args.repetitions, args.seed)
    for name in ("best_of_n_mean", "best_of_n_std"):  # one sample an input
        del found[name]
    test = found["mcnemar"]
    test["only_best_fixed_right"] = test.pop("only_full_precision_right")
    among_clean = 100 * float(expected[clean].mean()) if clean.any() else None
    found |= {
        "clean_right": {"n": int(clean.sum()), "expected": among_clean},
        "best_fixed": best,
        "difference": compare(expected, right[row][best], args.margin),
        "queries": {str(k): 100 * float((expected**k).mean()) for k in args.queries},
        "per_layer": per_layer(tables, row, expected, args.margin),
    }
    if "f1" in tables[row]:
        found["f1"] = 100 * float(np.mean([tables[row]["f1"][name] for name in members]))
    return found


def per_layer(tables, row, whole, margin):
    """Accuracy with a random precision in every layer: over the draws, and against `whole`, the expected accuracy
    (items,) with one for the whole model."""
    if not tables[row]["per_layer"]:
        return None
    draws = np.array(tables[row]["per_layer"], dtype=bool) & np.array(tables[CLEAN]["per_layer"], dtype=bool)
    means = 100 * draws.mean(1)
    spread = float(means.std(ddof=1)) if len(means) > 1 else 0.0
    return {
        **{"draws": len(means), "mean": float(means.mean()), "std": spread},
        "difference": compare(draws.mean(0), whole, margin),
    }


def protection(tables, members, eot, margin):
    """Random precision against the best fixed one, each under its own attacker: the claim of Double-Win Quant.

    members: attacks and columns of the set; eot: row of the attacker who knows of the defence. The best fixed
    precision is the one that stands an attack at its own precision best; chosen on the same items, it is favoured.
    Returns: of `matrix_summary`; best_fixed; published_protocol: RPI whose attacker draws a precision too, minus best
        fixed; adaptive_attacker: RPI under `eot`, minus best fixed.
    """
    right = effective(tables)
    diagonal = {name: right[name][name] for name in members}
    best = max(members, key=lambda name: diagonal[name].mean())
    drawn = np.mean([right[attack][name] for attack in members for name in members], axis=0)
    adaptive = np.mean([right[eot][name] for name in members], axis=0)
    cells = [[100 * right[attack][name].mean() for name in members] for attack in members]
    return matrix_summary(cells) | {
        "best_fixed": {"name": best, **accuracy_row(diagonal[best])},
        "published_protocol": compare(drawn, diagonal[best], margin),
        "adaptive_attacker": compare(adaptive, diagonal[best], margin),
    }


def token_results(rows, members, reference, control, args):
    """{"matrix", "random_precision", "comparisons", "perplexity"} of attacks with tokens (token_attack.py).

    rows: {row: {"scores": {column: scores of each item}, "likelihoods"}}; members: columns of the precision set;
    reference, control: as of `comparisons`.
    """
    tables, perplexity = {}, {}
    for row, found in rows.items():
        scores = {column: np.array(values) for column, values in found["scores"].items()}
        tables[row] = {"per_layer": []}
        for place, key in enumerate(("right", "f1")[: next(iter(scores.values())).shape[1]]):
            tables[row][key] = {column: values[:, place].tolist() for column, values in scores.items()}
        if args.fluency_model:
            total, number = np.array(found["likelihoods"]).sum(0)
            perplexity[row] = float(np.exp(total / number)) if number else None
    options = types.SimpleNamespace(repetitions=args.repetitions, seed=args.seed, margin=args.margin, queries=[])
    return {
        "matrix": transfer_matrix(tables),
        "random_precision": {row: random_inference(tables, row, members, options) for row in tables},
        "comparisons": comparisons(tables, members, reference, control, args),
        "perplexity": perplexity,
    }


def comparisons(tables, members, reference, control, args):
    """{row: {column: cell}} of attacks with tokens, and of random precision, the column RPI.

    reference: the column that the others of a row are compared with; control: the row of random tokens; args:
    num_bootstrap, seed.
    Returns cells: clean_right: accuracy row among items right without attack; reference, control: paired differences
        from these with mcnemar_p (None where outcomes are expectations, or are the same); f1, f1_interval (qa).
    """
    right, found = effective(tables), {}
    for row in tables:
        found[row] = {}
        for column, own in right[row].items():
            pairs = {"reference": right[row][reference], "control": right[control][column]}
            found[row][column] = cell = {"clean_right": accuracy_row(own[right[CLEAN][column]])}
            for name, other in pairs.items():
                cell[name] = paired_difference(own, other) | {"mcnemar_p": mcnemar(other, own)}
        expected, controlled = (
            np.mean([right[name][column] for column in members], axis=0) for name in (row, control)
        )
        found[row][RPI] = {"clean_right": None} | {
            name: paired_difference(expected, other) | {"mcnemar_p": None}
            for name, other in {"reference": right[row][reference], "control": controlled}.items()
        }
        if "f1" in tables[row]:
            scores = {column: np.array(values) for column, values in tables[row]["f1"].items()}
            scores[RPI] = np.mean([scores[column] for column in members], axis=0)
            bounds = intervals(
                100 * bootstrap_means(np.stack(list(scores.values()), 1), args.num_bootstrap, args.seed)
            )
            for (column, values), interval in zip(scores.items(), bounds, strict=True):
                found[row][column] |= {"f1": 100 * float(values.mean()), "f1_interval": interval}
    return found


# ---- tables


def _difference(found):
    return f"{with_interval(found['points'], found['interval'], 1)}: {found['verdict']}"


def matrix_lines(matrix, rpi):
    """Markdown of the transfer matrix."""
    columns, lines = list(next(iter(matrix.values()))), []
    for row, cells in matrix.items():
        texts = [with_interval(cell["all"]["accuracy"], cell["all"]["interval"], 1) for cell in cells.values()]
        f1 = [f" / {cell['f1']:.1f}" if "f1" in cell else "" for cell in [*cells.values(), rpi[row]]]
        texts.append(f"{rpi[row]['expected']:.1f} (s.d. {rpi[row]['std']:.1f})")
        lines.append([row, *(text + more for text, more in zip(texts, f1, strict=True))])
    return markdown_table(["attack \\ inference", *columns, RPI], lines)


def token_lines(results, reference, control, task, about):
    """The whole table.md of token_attack.py. results: of `token_results`; about: the attack, in words."""
    perplexity = results["perplexity"]
    header = ["attack", "served at", "right of those right without attack", "F1 [95 %]"]
    header += [f"minus {control} (p)", f"minus {reference} (p)"] + ["perplexity"] * bool(perplexity)
    lines = []
    for row, cells in results["comparisons"].items():
        for column, cell in cells.items():
            kept = cell["clean_right"]
            among = kept and kept["n"] and f"{with_interval(kept['accuracy'], kept['interval'], 1)} of {kept['n']}"
            f1 = with_interval(cell["f1"], cell["f1_interval"], 1) if "f1" in cell else "-"
            texts = [row, column, among or "-", f1]
            for same, name in ((row == control, "control"), (column == reference, "reference")):
                p = cell[name]["mcnemar_p"]
                shown = with_interval(cell[name]["points"], cell[name]["interval"], 1)
                texts.append("-" if same else shown + ("" if p is None else f" ({p:.2g})"))
            lines.append(texts + ([f"{perplexity[row]:.0f}" if perplexity[row] else "-"] if perplexity else []))
    scores = "exact match [Wilson 95 %] / F1" if task == "qa" else "accuracy [Wilson 95 %]"
    return [
        *matrix_lines(results["matrix"], results["random_precision"]),
        "",
        *markdown_table(header, lines),
        "",
        f"{about}; {scores} in percent, all inputs counted, a clean error counts as broken. RPI: a precision of the "
        "set per query. Differences in points, paired [95 %, Bonett-Price], with McNemar's exact p.",
    ]


def inference_lines(rpi, queries):
    """Markdown of what each attack does to random precision."""
    header = ["attack", *(f"{k} queries" for k in queries), "best fixed", "RPI - best fixed", "McNemar p (median)"]
    lines = []
    for row, found in rpi.items():
        layers, test = found["per_layer"], found["mcnemar"]
        cells = [row, *(f"{found['queries'][str(k)]:.1f}" for k in queries), found["best_fixed"]]
        cells += [_difference(found["difference"]), f"{test['first']:.2g} ({test['median']:.2g})"]
        layered = ["-", "-"]
        if layers:
            layered = [f"{layers['mean']:.1f} (s.d. {layers['std']:.1f})", _difference(layers["difference"])]
        lines.append([*cells, *layered])
    return markdown_table([*header, "RPI per layer", "per layer - whole model"], lines)


def report_lines(matrix, rpi, protected, args, about):
    """The whole table.md. about: {"items", "quantizer"} in words."""
    best = protected["best_fixed"]
    fixed = f"{best['name']}, attacked at its own precision: {with_interval(best['accuracy'], best['interval'], 1)}"
    means = ", ".join(f"{key} {protected[key]:.1f}" for key in ("mean_all", "mean_diagonal", "mean_off_diagonal"))
    scores = "exact match [Wilson 95 %] / F1" if args.task == "qa" else "accuracy [Wilson 95 %]"
    return [
        *matrix_lines(matrix, rpi),
        "",
        *inference_lines(rpi, args.queries),
        "",
        f"Attacks at the set x inference at the set: {means}.",
        f"Best fixed precision: {fixed}.",
        f"RPI, the attacker draws a precision too, minus best fixed: {_difference(protected['published_protocol'])}.",
        f"RPI, the attacker knows of it (EOT), minus best fixed: {_difference(protected['adaptive_attacker'])}.",
        "",
        f"Quantizer: {about['quantizer']}. {about['items']}; {scores} in percent, all inputs counted, a clean error "
        f"counts as broken. PGD on word embeddings: {args.attack_steps} steps of {args.step_size:g}, radius "
        f"{args.radius:g} of the mean embedding norm. RPI: a precision of {', '.join(args.precision_set)} per query, "
        f"expected accuracy and standard deviation over {args.repetitions} sequences of draws; k queries: broken if "
        "any of k draws breaks it. Differences in points, paired [95 %, Bonett-Price]. McNemar: exact, best fixed "
        "precision of the row against RPI.",
    ]
