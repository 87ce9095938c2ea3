"""Tables and findings about attacks and adversarial training, from records alone; None where there are none."""

import statistics

from findings import first_record, over_seeds, scores, shown, verdict
from tables import em, table

FLOAT = "W32A32KV32"
TASKS = {"classification": "classifier", "qa": "questions"}
ARMS = {
    "plain": "not",
    "8bit": "at 8 bits",
    "rpt": "at random ones (RPT), updated at another",
    "rpt_same": "at random ones (RPT), updated at the same",
}
WORDS = {"words": "synonyms", "pwws": "synonyms, PWWS's order", "letters": "letters edited"}
QUANTIZERS = {"minmax": "MinMax", "rotated": "rotated"}
METHODS = {"hotflip": "HotFlip", "pgd": "PGD"}
EFFECTS = ("published_protocol", "adaptive_attacker")


def attack_table(record):
    """Accuracy under attack by attack and by inference precision, one sample a text."""
    if not record:
        return None
    matrix = record["matrices"]["single sample"]
    columns = [name for name in matrix["no attack"] if name.startswith("W")]
    n = next(iter(matrix["no attack"].values()))["n"]
    rows = []
    for attack, cells in matrix.items():
        random = record["random_precision"][attack]
        found = [
            "{:.1f} [{:.1f}, {:.1f}]".format(cells[name]["accuracy"], *cells[name]["interval"]) for name in columns
        ]
        rows.append([attack, *found, f"{random['expected']:.1f}", f"{random['mcnemar']['median']:.2g}"])
    means = {key: f"{value:.1f}" for key, value in record["summary"]["single sample"].items()}
    found = table(["attacked at", *columns, "random precision", "McNemar p"], rows)
    return found | {"n": n, "means": means, "draws": record["repetitions"]}


DISTRACTED = {"plain": "switch_eval", "control": "distract_control_eval", "distractor": "distract_eval"}


def distractor_table(scale):
    """EM of the joint model by config: as asked, with a sentence about something else, with a distractor."""
    records = {name: first_record(scale, step) for name, step in DISTRACTED.items()}
    if not (attacked := records["distractor"]):
        return None
    paired = first_record(scale, "distract_paired")
    pairs = {(row["config"], row["first"], row["second"]): row for row in paired["rows"]} if paired else {}
    rows = []
    for name in [row["config"] for row in attacked["rows"]]:
        found = [record and scores(record, name) for record in records.values()]
        row = pairs.get((name, "control", "distractor"))
        lost = shown([row["exact_match_drop"], *row["exact_match_drop_interval"]]) if row else "-"
        rows.append([name, *(em([score]) if score else "-" for score in found), lost])
    random, cells = attacked["random_precision"], []
    for record in records.values():
        drawn = (record or {}).get("random_precision")
        spread = drawn and drawn["exact_match"]
        cells.append("{expected:.1f} ({min:.1f} – {max:.1f})".format(**spread) if spread else "-")
    rows.append([f"drawn of {', '.join(random['configs'])}", *cells, ""])
    header = ["served as", "EM as asked", "with a sentence about something else", "with a distractor"]
    return table([*header, "the distractor costs more, paired"], rows)


def effect(values, interval):
    """([difference, low, high], basis): over seeds, or of one seed over its paired inputs."""
    if len(values) > 1:
        return over_seeds(values, [0.0] * len(values)), f"{len(values)} seeds"
    return [values[0], *interval], "1 seed"


def measured(records):
    """{(task, arm): {seed: record}} of the matrices that are there. records: of `read_records`."""
    names = [(task, arm) for task in TASKS for arm in ARMS]
    return {key: records[name] for key in names if (name := "adv_{}_{}_matrix".format(*key)) in records}


def about_matrix(record):
    """[precision set, steps of an attack] of a matrix, as text."""
    return [", ".join(record["bit_config"]["precision_set"]), str(record["settings"]["attack_steps"])]


def accuracies(record):
    """Accuracy of one matrix in percent: {"clean", "fixed", "drawn", "adaptive"}.

    clean: without attack, mean over the set; fixed: the best single precision, attacked at its own; drawn: a random
    one, whose attacker draws too; adaptive: a random one, whose attacker averages over the set (EOT).
    """
    protected, random = record["protection"], record["random_precision"]
    return {
        "clean": random["no attack"]["expected"],
        "fixed": protected["best_fixed"]["accuracy"],
        "drawn": protected["mean_all"],
        "adaptive": next(found["expected"] for row, found in random.items() if row.startswith("eot")),
    }


def training_table(records):
    """What each way to train stands, at one precision and at a random one. None without records."""
    rows = []
    for (task, arm), found in measured(records).items():
        each = [accuracies(record) for record in found.values()]
        means = [f"{statistics.mean(one[key] for one in each):.1f}" for key in ("clean", "fixed", "drawn", "adaptive")]
        gaps = []
        for name in EFFECTS:
            of_seeds = [record["protection"][name] for record in found.values()]
            gap, _ = effect([one["points"] for one in of_seeds], of_seeds[0]["interval"])
            gaps.append(shown(gap))
        about = about_matrix(next(iter(found.values())))
        rows.append([TASKS[task], ARMS[arm], *about, *means[:3], gaps[0], means[3], gaps[1], str(len(found))])
    header = ["task", "attacked in training", "set", "steps", "no attack", "best fixed, attacked at its own"]
    header += ["random, attacker draws"]
    return table([*header, "minus best fixed", "random, attacker knows (EOT)", "minus best fixed", "seeds"], rows)


def needle_table(records):
    """What changes a random precision's worth: its set, k queries, a precision a layer, quantizer. None without."""
    found = {(*key, "MinMax"): each for key, each in measured(records).items()}
    if rotated := records.get("adv_classification_rpt_rotated_matrix"):
        found["classification", "rpt", "rotated"] = rotated
    rows = []
    for (task, arm, quantizer), each in found.items():
        cells, layers = [], []
        for record in each.values():
            members, random = record["bit_config"]["precision_set"], record["random_precision"]
            ends = members[0], members[-1]
            pair = [record["matrix"][attacked][served]["all"]["accuracy"] for attacked in ends for served in ends]
            known = next(one for row, one in random.items() if row.startswith("eot"))
            cells.append([record["protection"]["mean_all"], statistics.mean(pair), known["expected"]])
            cells[-1].append(known["queries"]["10"])
            layers += [known["per_layer"]["difference"]] if known["per_layer"] else []
        means = [f"{statistics.mean(column):.1f}" for column in zip(*cells, strict=True)]
        gap = effect([one["points"] for one in layers], layers[0]["interval"])[0] if layers else None
        about = about_matrix(next(iter(each.values())))
        rows.append([TASKS[task], ARMS[arm], quantizer, about[0], *means, shown(gap) if gap else "-", str(len(each))])
    header = ["task", "attacked in training", "quantizer", "set", "attacker draws", "of lowest and highest alone"]
    header += ["knows (EOT)", "knows, asks 10 times", "one a layer minus one a model, EOT", "seeds"]
    return table(header, rows)


def training_findings(records):
    """{task: {claim: {"measured", "basis", "verdict"}}} of the claims of Double-Win Quant, where RPT is there.

    protects: after RPT, a random precision stands more than the best fixed one, the attacker drawing too; adaptive:
    the same against EOT; beats: RPT served at a random precision stands more than training on attacks at 8 bits
    served at its best fixed precision, where that is there too.
    """
    found, told = measured(records), {}
    for task in TASKS:
        rpt, fixed = found.get((task, "rpt")), found.get((task, "8bit"))
        if not rpt:
            continue
        gaps = {}
        for claim, name in zip(("protects", "adaptive"), EFFECTS, strict=True):
            of_seeds = [record["protection"][name] for record in rpt.values()]
            gaps[claim] = effect([one["points"] for one in of_seeds], of_seeds[0]["interval"])
        if seeds := [seed for seed in rpt if seed in (fixed or {})]:
            pair = (
                [accuracies(rpt[seed])["drawn"] for seed in seeds],
                [accuracies(fixed[seed])["fixed"] for seed in seeds],
            )
            gaps["beats"] = over_seeds(*pair), f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed: no interval"
        told[task] = {
            claim: {"measured": shown(gap[0]), "basis": gap[1], "verdict": verdict(gap)} for claim, gap in gaps.items()
        }
    return told


def words_table(records):
    """Attacks that see probabilities alone, first seed: accuracy at each precision, and what it has over float32."""
    rows = []
    for kind, label in WORDS.items():
        for quantizer, quantized in QUANTIZERS.items():
            if not (record := first_record({"records": records}, f"{kind}_{quantizer}_eval")):
                continue
            cells = {(row["attack"], row["inference"], row["texts"]): row["single"] for row in record["rows"]}
            gains = {
                (row["texts"], row["precision"]): row["clean_right"] for row in record["differences_from_float32"]
            }
            for name in record["bit_config"]["inference"]:
                own = [cell for (attack, served, _), cell in cells.items() if attack == served == name]
                found = [f"{cell['accuracy']:.1f}" for cell in own]  # no attack, replaced at random, attacked
                compared = [gains.get((texts, name)) for texts in ("each attacked at its own", f"found at {FLOAT}")]
                over = [shown([one["points"], *one["interval"]]) if one else "-" for one in compared]
                rows.append([label, quantized, name, *found, *over])
            if rpi := first_record({"records": records}, f"{kind}_{quantizer}_rpi"):
                drawn = {row.partition("(")[0]: one["expected"] for row, one in rpi["random_precision"].items()}
                served = f"drawn of {', '.join(rpi['bit_config']['precision_set'])}"
                rows.append(
                    [label, quantized, served, f"{drawn['no attack']:.1f}", "-", f"{drawn['random']:.1f}", "-", "-"]
                )
    header = ["replaced", "quantizer", "served at", "no attack", "at random", "attacked anew", "minus float32"]
    return table([*header, "found in float32, minus float32"], rows)


def tokens_table(records):
    """Attacks on questions with gradients, first seed: EM at each precision, at a random one, beside random tokens."""
    rows, served = [], []
    for surface in ("question", "distractor"):
        for method, label in METHODS.items():
            for bits in ("8", "4", "eot"):
                if not (record := first_record({"records": records}, f"tokens_{surface}_{method}_{bits}")):
                    continue
                cells, random = record["matrix"], record["random_precision"]
                served = list(cells[method])
                first = served[0]
                gap = record["comparisons"][method]["random precision (RPI)"]["reference"]
                rows.append(
                    [
                        surface,
                        label,
                        "all (EOT)" if bits == "eot" else record["bit_config"]["attacked"],
                        *(f"{cells[row][first]['all']['accuracy']:.1f}" for row in ("no attack", "random tokens")),
                        *(f"{cells[method][name]['all']['accuracy']:.1f}" for name in served),
                        f"{random[method]['expected']:.1f}",
                        shown([gap["points"], *gap["interval"]]),
                    ]
                )
    header = ["changed", "attack", "found at", "no attack", "random tokens", *served, "random precision"]
    return table([*header, f"minus {served[0]}" if served else ""], rows)
