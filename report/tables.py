"""Tables of the report, from records, their numbers as text: {"header", "rows"}, None without rows."""

import statistics

from findings import first_record, over_seeds, row_of, scores, shown

LABELS = {
    "full_fp32": "full fine-tuning, not quantized",
    "lora_fp32": "LoRA, not quantized",
    **{
        f"ptq_{q}_{bits}": f"LoRA, then {bits}"
        for bits in ("W8A8KV8", "W4A8KV8", "W4A4KV4", "hybrid")
        for q in ("minmax", "rotated")
    },
    "bnb_8bit": "LoRA, then bitsandbytes LLM.int8()",
    "bnb_nf4": "LoRA, then bitsandbytes nf4 (weights only)",
    **{f"static_w{bits}_{q}": f"LoRA trained at {bits} bits" for bits in (8, 4) for q in ("minmax", "rotated")},
    "qlora_nf4": "LoRA beside an nf4 base (QLoRA; weights only)",
    **{f"qlora_w4_{q}": "LoRA beside a base at W4A16KV16 (weights only)" for q in ("minmax", "rotated")},
    "separator_none": "LoRA, not quantized, nothing after the question (else a newline)",
    "separator_space": "LoRA, not quantized, a space after the question",
}
SWITCHABLE = {
    "switch_eval": "joint, 4 bits join late",
    "switch_minmax_eval": "joint, from the start",
    "switch_sequential_eval": "sequential, as published",
}
OBJECTIVES = {
    "LoRA, quantized afterwards, rotated": ("ptq_rotated_W8A8KV8", "ptq_rotated_W4A4KV4"),
    "LoRA, quantized afterwards, MinMax": ("ptq_minmax_W8A8KV8", "ptq_minmax_W4A4KV4"),
    "one training a width, rotated": ("static_w8_rotated", "static_w4_rotated"),
    "one training a width, MinMax": ("static_w8_minmax", "static_w4_minmax"),
}
TRAININGS = {
    "switch_eval": "switch_train",
    "switch_minmax_eval": "switch_minmax",
    "switch_sequential_eval": "switch_sequential",
}

UNPUBLISHED = {  # nobody has published these of GPT-2
    "post-training in the rotated basis, 8 bits": ("ptq_rotated_W8A8KV8", None),
    "post-training in the rotated basis, 4 bits": ("ptq_rotated_W4A4KV4", None),
    "4-bit static in the rotated basis": ("static_w4_rotated", None),
    **{
        f"joint, rotated, 4 bits join late, {name}": ("switch_eval", config)
        for name, config in (("8 bits", "W8A8KV8"), ("hybrid", "hybrid"), ("found", "found"), ("4 bits", "W4A4KV4"))
    },
    **{f"CPT, rotated, served at {bits} bits": ("cpt_eval", f"W{bits}A{bits}KV{bits}") for bits in (8, 7, 6, 5, 4)},
}


def em(found):
    """EM of one seed with its interval, or the mean over seeds with its range. found: [scores]."""
    values = [score["exact_match"] for score in found]
    if len(found) == 1:
        low, high = found[0]["interval"]
        return f"{values[0]:.1f} [{low:.1f}, {high:.1f}]"
    return f"{statistics.mean(values):.1f} ({min(values):.1f} – {max(values):.1f})"


def quantizer_of(records):
    """Of the records of a step, as the tables write it."""
    name = next(iter(records.values()))["bit_config"].get("quantizer", "")
    return {"minmax": "MinMax"}.get(name, name)


def score_row(label, records, config=None):
    """A row of the accuracy table, None where the config is not in the records. records: {seed: record}."""
    found = [score for record in records.values() if (score := scores(record, config))]
    if not found:
        return None
    bits = found[0]["average_w_bits"]
    quantizer = "" if bits is None or bits >= 16 else quantizer_of(records)
    f1 = f"{statistics.mean(score['f1'] for score in found):.1f}"
    return [
        label,
        quantizer,
        "" if bits is None else f"{bits:.2f}".rstrip("0").rstrip("."),
        em(found),
        f1,
        str(len(found)),
    ]


ACCURACY = ["configuration", "quantizer", "bits of W", "EM", "F1", "seeds"]


def accuracy_table(scale):
    """Trainings, post-training quantization, and the switchable models under every config."""
    rows = [score_row(label, scale["records"][step]) for step, label in LABELS.items() if step in scale["records"]]
    for step, label in SWITCHABLE.items():
        if record := first_record(scale, step):
            names = [row["config"] for row in record["rows"]]
            rows += [score_row(f"{label}; served {name}", scale["records"][step], name) for name in names]
    return table(ACCURACY, [row for row in rows if row])


def table(header, rows):
    """{"header", "rows"} for the template, None without rows."""
    return {"header": header, "rows": rows} if rows else None


def numbered(rows, keys):
    """[(first cells, how many rows before have the same)] of the rows, so that none hides another."""
    names = [tuple(row[:keys]) for row in rows]
    return [(name, names[:place].count(name)) for place, name in enumerate(names)]


def beside(found, keys):
    """One table of several scales: rows joined on their first cells, the other columns once a scale.

    found: [(title, table or None)]; keys: how many leading columns say what a row is. None where no scale has it.
    """
    found = [(title, one) for title, one in found if one]
    if len(found) < 2:
        return found[0][1] | {"of": found[0][0]} if found else None
    order, header = [], found[0][1]["header"][:keys]
    values = [dict(zip(numbered(one["rows"], keys), one["rows"], strict=True)) for _, one in found]
    for (title, one), own in zip(found, values, strict=True):
        place = 0
        for key in own:
            if key in order:
                place = order.index(key) + 1
            else:  # after the row that stands before it in its own table
                order.insert(place, key)
                place += 1
        first, *others = one["header"][keys:]
        header = [*header, f"{title}: {first}", *others]
    rows = [list(key[0]) for key in order]
    for (_, one), own in zip(found, values, strict=True):
        none = ["-"] * len(one["header"])
        rows = [row + own.get(key, none)[keys:] for key, row in zip(order, rows, strict=True)]
    return {"header": header, "rows": rows, "of": " and ".join(title for title, _ in found)}


def search_tables(scale):
    """(assignments, found against random ones by budget, rank correlations of gradient scores)."""
    record, sweep = first_record(scale, "search"), first_record(scale, "sensitivity")
    rows, budgets, ranks, drawn = [], [], [], []
    for row in record["rows"] if record else []:
        bits = f"{row['average_w_bits']:.2f}"
        if row["config"].startswith("random_") and "." not in row["config"]:
            drawn.append((row["exact_match"], row["exact_match_drop"], bits))
        elif "." not in row["config"]:  # the first budget alone; the figure shows all
            drop = shown([row["exact_match_drop"], *row["exact_match_drop_interval"]])
            rows.append([row["config"], bits, em([scores(record, row["config"])]), drop])
    if drawn:
        spans = [f"{statistics.mean(v):.1f} ({min(v):.1f} – {max(v):.1f})" for v in list(zip(*drawn, strict=True))[:2]]
        rows.append([f"{len(drawn)} random ones, mean (min – max)", drawn[0][2], *spans])
    for found in record["search"].values() if record else []:
        if random := found.get("random"):
            gap = random["exact_match"]
            gap = shown([gap["found_minus_mean"], *gap["found_minus_mean_interval"]])
            better = f"{random['better_than_found']} of {random['number']}"
            budgets.append(
                [f"{found['average_bits']['average_w_bits']:.2f}", str(found["linears_changed"]), gap, better]
            )
    for low, found in sweep["rank_correlations"].items() if sweep else []:
        ranks += [
            [
                name.replace("_", " "),
                low,
                *("-" if value is None else f"{value:+.2f}".replace("-", "−") for value in values.values()),
            ]
            for name, values in found.items()
        ]
    measures = next(iter(next(iter(sweep["rank_correlations"].values())).values())) if ranks else []
    header = ["gradient score", "low bits", *(name.replace("_", " ") for name in measures)]
    budget = ["bits of W", "moved by measured swaps", "EM of found minus mean of random", "random better"]
    assignments = table(["assignment", "bits of W", "EM", "loss of EM against the reference"], rows)
    return assignments, table(budget, budgets), table(header, ranks)


def found_table(scale):
    """Blocks whose linear keeps the reference's weight bits in the first found assignment, by kind of linear."""
    record = first_record(scale, "search")
    layers = record["bit_config"]["layers"] if record else {}
    if "found" not in layers:
        return None
    high, kept = layers[record["bit_config"]["reference"]], {}
    for name, bits in layers["found"].items():
        block, _, kind = name.removeprefix("transformer.h.").partition(".")
        kept.setdefault(kind, []).extend([block] * (bits["w_bits"] == high[name]["w_bits"]))
    return table(["linear", "blocks"], [[kind, " ".join(blocks) or "none"] for kind, blocks in kept.items()])


def objectives_table(scale):
    """EM at 8 and at 4 bits of every way to train, over seeds, and the passes that it cost."""
    rows = []
    for label, steps in OBJECTIVES.items():
        records = scale["records"]
        cells = [
            em([scores(record) for record in records[step].values()]) if step in records else "-" for step in steps
        ]
        if cells != ["-", "-"]:
            rows.append([label, "", *cells])
    for step, label in SWITCHABLE.items():
        if records := scale["records"].get(step):
            found = [[s for r in records.values() if (s := scores(r, name))] for name in ("W8A8KV8", "W4A4KV4")]
            training = first_record(scale, TRAININGS[step]) or {}
            label = f"{label}, {quantizer_of(records)}"
            rows.append([label, str(training.get("passes", "")), *(em(values) if values else "-" for values in found)])
    return table(["training", "passes", "EM at 8 bits", "EM at 4 bits"], rows)


def summary_tables(scale):
    """Of the summary over seeds: trainings, loss by operand, quantizers by outliers' size, EM by passes, searches."""
    summary = scale["summary"]
    if not summary:
        return None, None, None, None, None
    trainings, operands, sizes, passes, searches = [], [], [], [], []
    for factor, methods in summary["methods"].items():
        for name, configs in methods.items():
            cells = [configs.get(config) for config in ("W8A8KV8", "W4A4KV4", "W3A3KV3")]
            cells = [f"{c['mean']:.1f} ({c['min']:.1f} – {c['max']:.1f})" if c else "-" for c in cells]
            trainings.append([factor, summary["labels"][name], str(summary["steps"][name][1]), *cells])
        for config in ("W8A8KV8", "W4A32KV32", "W32A4KV32", "W32A32KV4", "W4A8KV8", "W4A4KV4"):
            found = [methods[name] for name in ("ptq_minmax", "ptq_rotated")]
            losses = [shown(over_seeds(f["W32A32KV32"]["values"], f[config]["values"])) for f in found if config in f]
            operands.append([factor, config, *losses])
    for factor, row in summary["outliers"].items():
        worst = max(row["outliers"][name][1] for name in ("attn.c_attn", "mlp.c_fc"))  # where they were put in
        cells = [row["float"], row["minmax"]["W8A8KV8"], row["minmax"]["W4A4KV4"], row["rotated"]["W4A4KV4"]]
        sizes.append([factor, f"{worst:.1f}", *(f"{value:.1f}" for value in cells)])
    for number, found in summary["curves"].items():
        adapter, joint = found["ptq_rotated"], found["joint"]
        cells = [adapter["W32A32KV32"], adapter["W8A8KV8"], adapter["W4A4KV4"], joint["W8A8KV8"], joint["W4A4KV4"]]
        passes.append([number, *(f"{c['mean']:.1f} ({c['min']:.1f} – {c['max']:.1f})" for c in cells)])
    for kind, by_seed in summary["searches"].items():
        for seed, row in by_seed.items():
            bits = " / ".join(f"{row['average_bits'][f'average_{operand}_bits']:.2f}" for operand in ("w", "a", "kv"))
            random = f"{row['mean_exact_match']:.1f}", f"{row['better_than_found']} of {row['number']}"
            searches.append([summary["labels"][kind], seed, bits, f"{row['found']:.1f}", *random])
    seeds = f"{len(summary['seeds'])} seeds"
    return (
        table(["factor", "method", "passes", f"EM at 8 bits, {seeds}", "at 4 bits", "at 3 bits"], trainings),
        table(["outlier factor", "bits", "loss of EM, MinMax [95 %]", "loss of EM, rotated [95 %]"], operands),
        table(
            ["outlier factor", "largest / median", "float", "MinMax, 8 bits", "MinMax, 4 bits", "rotated, 4 bits"],
            sizes,
        ),
        table(["passes", "float32 adapter", "its 8 bits", "its 4 bits", "joint, 8 bits", "joint, 4 bits"], passes),
        table(["widths, model", "seed", "bits of W / A / KV", "found, EM", "random, EM", "random better"], searches),
    )


def cyclic_tables(scale):
    """(CPT by width, the range test)."""
    rows, widths = [], []
    for step, label in {"cpt_eval": "CPT, rotated", "cpt_minmax_eval": "CPT, MinMax"}.items():
        if record := first_record(scale, step):
            for row in record["rows"]:
                drop = shown([row["exact_match_drop"], *row["exact_match_drop_interval"]])
                rows.append(
                    [
                        label,
                        row["config"],
                        em([s for r in scale["records"][step].values() if (s := scores(r, row["config"]))]),
                        drop,
                    ]
                )
    if record := first_record(scale, "range_test"):
        bits = record["metrics"]["min_bits"]
        share = record["cyclic"]["range_test_share"]
        widths = [[str(record["steps"]), f"{share:.2f}", "none" if bits is None else str(bits)]]
    header = ["training", "served as", "EM", "loss of EM against its 8 bits"]
    return table(header, rows), table(
        ["steps a width", "share of the gain asked for", "lowest width that learns"], widths
    )


def benchmark(record, rotated):
    """Table and {config: ms} of a forward at the first shape, what the rotation costs. The records may be None."""
    found = {"table": None, "shape": "", "model": "", "device": "", "rotated": None, "calibration": None, "times": {}}
    if record:
        shape, cells, times = record["rows"][0]["shape"], [], {}
        for row in [row for row in record["rows"] if row["shape"] == shape]:
            speed = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} – {row['ratio_max']:.2f})"
            size = f"{row['stored_bytes'] / 2**20:.0f}"
            cells.append([row["label"], row["config"] or "", f"{1000 * row['seconds']:.0f}", speed, size])
            if row["peer"] in ("integer", "fp32"):
                times[row["config"] or "W32A32KV32"] = 1000 * row["seconds"]
        header = ["implementation", "bits", "ms", "speed / float32 (min – max)", "file MiB"]
        found |= {"table": table(header, cells), "times": times, "shape": shape, "model": record["model"]}
        found["device"] = f"{record['device']}, {record['threads']} threads"
    if rotated:
        found["rotated"] = f"{statistics.median(rotated['metrics']['rotated_over_minmax']):.2f}"
        found["calibration"] = f"{rotated['metrics']['calibration_seconds']:.0f}"
    return found


def trail_table(path):
    """The first table of the trail: ways to train that were looked at once."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    first = next((number for number, line in enumerate(lines) if line.startswith("|")), len(lines))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return table(rows[0], rows[2:]) if rows else None


def short(source):
    """The owner of a repository, or the source as it is."""
    return source.partition("/")[0] if " " not in source else source


def ours_of(scale, step, config):
    """ "EM / F1" of a step's first record, empty where it was not measured."""
    record = first_record(scale, step) if step else None
    found = scores(record, config) if record and (not config or row_of(record, config)) else None
    return f"{found['exact_match']:.1f} / {found['f1']:.1f}" if found else ""


def published_tables(published, scales):
    """(EM and F1 published beside ours, other published figures). published: of reproduce/published.json."""
    rows, others = [], {"cpt": [], "attack": [], "rest": []}
    for row in published:
        if "measure" in row:
            group = (row["step"] or "rest").partition("_")[0]
            values = ", ".join(f"{name} {value}" for name, value in row["values"].items())
            others[group if group in others else "rest"].append(
                [short(row["source"]), row["setting"], row["measure"], values]
            )
            continue
        if row["step"] is None:
            continue
        theirs = " / ".join("-" if row[key] is None else f"{row[key]:.2f}" for key in ("exact_match", "f1"))
        cells = [ours_of(scale, row["step"], row["config"]) for scale in scales]
        rows.append([short(row["source"]), row["setting"], theirs, *cells])
    for setting, (step, config) in UNPUBLISHED.items():
        rows.append(["ours", setting, "-", *(ours_of(scale, step, config) for scale in scales)])
    header = ["source", "setting", "GPT-2 124M, published", *(scale["title"] for scale in scales)]
    names = ["source", "setting", "measure", "published"]
    return table(header, rows), {group: table(names, found) for group, found in others.items()}
