"""Does a precision withstand an attack better than float32? Paired over the same inputs, for eval.py."""

from common.statistics import markdown_table, mcnemar, with_interval
from pgd_report import paired_difference

FLOAT = "W32A32KV32"
CLEAN, OWN = "no attack", "each attacked at its own"
CAPTION = (
    "Accuracy at a precision minus that in float32 on the same inputs, points [95 %, paired, Bonett-Price]; relative "
    "to float32, in percent; McNemar's exact test. Each attacked at its own: the attack is run anew at every "
    "precision; found at: the texts of one attack, classified at both (found in float32: transferred). All: every "
    "input counts, a clean error as broken; right: only inputs that are right without attack at both."
)


def comparison(found, in_float):
    """What one paired comparison says. found, in_float: (items,) bool. None for no items."""
    if not len(found):
        return None
    base = 100 * float(in_float.mean())
    difference = paired_difference(found, in_float)
    return {
        "n": len(found),
        "accuracy": 100 * float(found.mean()),
        "float32": base,
        **difference,
        "relative": 100 * difference["points"] / base if base else None,
        "only_here_right": int((found & ~in_float).sum()),
        "only_float32_right": int((in_float & ~found).sum()),
        "mcnemar_p": mcnemar(in_float, found),
    }


def gains(attacks, right, clean):
    """[{"texts", "precision", "all" and "clean_right": of `comparison`}], for all that was measured in float32 too.

    Args: attacks: {name: attack}; right: {attack: {config: (texts,) bool}} under attack and without it; clean:
        {config: (texts,) bool} without attack.
    """
    pairs = [(CLEAN, name, found, clean[FLOAT]) for name, found in clean.items() if FLOAT in clean]
    if FLOAT in attacks and FLOAT in right[FLOAT]:
        own = {name: right[name].get(name) for name in attacks}
        pairs += [(OWN, name, found, right[FLOAT][FLOAT]) for name, found in own.items() if found is not None]
    for attack, columns in right.items():
        pairs += [(f"found at {attack}", name, found, columns[FLOAT]) for name, found in columns.items()
                  if FLOAT in columns]  # fmt: skip
    rows = []
    for texts, name, found, in_float in pairs:
        if name != FLOAT:
            both = clean[name] & clean[FLOAT]
            counted = {"all": comparison(found, in_float), "clean_right": comparison(found[both], in_float[both])}
            rows.append({"texts": texts, "precision": name, **counted})
    return rows


def gain_lines(rows):
    """Markdown table of `gains` with its caption; nothing without rows."""
    if not rows:
        return []

    def cells(found):
        if found is None:
            return ["-", "-", "-"]
        relative = "-" if found["relative"] is None else f"{found['relative']:+.1f}"
        return [with_interval(found["points"], found["interval"], 1), relative, f"{found['mcnemar_p']:.2g}"]

    header = ["texts", "precision", "points, all", "relative %", "p", "points, right", "relative %", "p", "n, right"]
    table = [
        [row["texts"], row["precision"], *cells(row["all"]), *cells(row["clean_right"]),
         str(row["clean_right"]["n"] if row["clean_right"] else 0)]
        for row in rows
    ]  # fmt: skip
    return ["", *markdown_table(header, table), "", CAPTION]
