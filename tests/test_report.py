"""The report: numbers come from the records alone, what has none is said to be absent, same records same bytes."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from conftest import experiment, load_script

with experiment("report"):
    import findings
    import robustness
    import tables

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


def make(records, output, *more, **options):
    command = [sys.executable, ROOT / "report" / "make_report.py", "--records", records, "--output", output]
    return subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT, **options)


def built(records, folder, *more):
    """(data, bytes of the PDF) of a report that must be made."""
    done = make(records, folder / "report.pdf", *(more or ("--stand_in", records)))
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text()), (folder / "report.pdf").read_bytes()


@pytest.fixture
def records(tmp_path):
    """A copy of the committed records of the quick start, as results/quickstart."""
    return pathlib.Path(shutil.copytree(RESULTS / "quickstart", tmp_path / "results" / "quickstart"))


def change(records, name, edit):
    path = records / f"{name}.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


def test_report_of_the_quick_start_is_the_same_every_time(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    data, pdf = built(RESULTS / "quickstart", first)
    assert (data, pdf) == built(RESULTS / "quickstart", second) and pdf.startswith(b"%PDF")
    (scale,) = data["scales"]
    record = json.loads((RESULTS / "quickstart" / "lora_fp32.json").read_text())
    assert scale["served"]["float"] == f"{record['metrics']['eval_exact_match']:.1f}"
    assert all(data["pictures"].values()) and data["tables"]["accuracy"]["of"] == "tiny stand-in"


def test_changed_number_of_a_record_changes_the_report(records, tmp_path):
    before, pdf = built(records, tmp_path)
    change(records, "lora_fp32", lambda record: record["metrics"].update(eval_exact_match=12.3))
    after, changed = built(records, tmp_path)
    row = next(row for row in after["tables"]["accuracy"]["rows"] if row[0] == "LoRA, not quantized")
    assert row[3].startswith("12.3 [") and "12.3 / " in json.dumps(after["published"])
    assert "12.3" not in json.dumps(before) and pdf != changed


def test_template_holds_no_result():
    text = (ROOT / "report" / "report.typ").read_text()
    text = re.sub(r'arXiv:[\d.]+|"1\.1"|v1\.1|\d+(\.\d+)?(pt|em|cm|fr|%)', "", re.sub(r"//.*", "", text))
    assert not re.findall(r"\d+\.\d+|\d+ (?:points|EM\b|questions|texts|seeds|times|ms\b)", text)


def test_records_that_are_not_there_are_said_to_be_absent(records, tmp_path):
    for path in records.glob("*.json"):
        if path.stem not in ("lora_fp32", "ptq_minmax_W4A4KV4"):
            path.unlink()
    data, _ = built(records, tmp_path)
    (scale,) = data["scales"]
    found = data["tables"]
    assert (
        found["attack"] is found["assignments"] is found["widths"] is data["pictures"]["heat"] is data["trail"] is None
    )
    assert scale["findings"]["rotation"]["verdict"] == scale["findings"]["late"]["verdict"] == "not measured"
    assert (
        scale["findings"]["collapse"]["verdict"] == "holds"
    )  # one adapter served twice: the questions give an interval
    (records / "lora_fp32.json").unlink()
    assert built(records, tmp_path)[0]["scales"][0]["findings"]["collapse"]["verdict"] == "not measured"


def test_rank_correlation_that_is_not_defined(records, tmp_path):
    def edit(record):
        for scores in record["rank_correlations"].values():
            scores["first_order"]["kl"] = None

    change(records, "sensitivity", edit)
    data, _ = built(records, tmp_path)
    assert ["first order", "W4A4KV4", "-"] in [row[:3] for row in data["tables"]["ranks"]["rows"]]


def test_a_model_that_reads_too_little_shows_nothing(records, tmp_path):
    change(records, "lora_fp32", lambda record: record["metrics"].update(eval_f1=29.9))
    data, _ = built(records, tmp_path)
    found = {key: finding["verdict"] for key, finding in data["scales"][0]["findings"].items()}
    assert set(found.values()) == {"not shown", "not measured"} and found["cpt_widths"] == "not shown"
    change(records, "lora_fp32", lambda record: record["metrics"].update(eval_f1=30.0))
    data, _ = built(records, tmp_path)
    assert data["scales"][0]["findings"]["cpt_widths"]["verdict"] == "holds"


def test_two_scales_have_columns_of_their_own_and_seeds_give_verdicts(records, tmp_path):
    small = shutil.copytree(records, records.parent / "small")
    for seed, low in ((43, 79.0), (44, 78.0)):
        for name, score in (("static_w4_rotated", 80.5), ("switch_eval", low)):
            record = json.loads((small / f"{name}.json").read_text()) | {"seed": seed}
            record["metrics"]["eval_exact_match"] = score
            for row in record.get("rows", []):
                row["exact_match"] = score
            (small / f"{name}_{seed}.json").write_text(json.dumps(record))
    newline = json.loads((small / "lora_fp32.json").read_text())
    for name, points in {
        "lora_fp32": (83, 84, 85),
        "separator_none": (80, 81, 83),
        "separator_space": (80, 82, 82),
    }.items():
        for suffix, seed, score in zip(("", "_43", "_44"), (42, 43, 44), points, strict=True):
            record = newline | {"seed": seed, "metrics": newline["metrics"] | {"eval_exact_match": float(score)}}
            (small / f"{name}{suffix}.json").write_text(json.dumps(record))
    split = {"metrics": {}, "data": {}, "seed": 0, "model": None}  # of split_squad.py, which draws nothing
    (small / "split.json").write_text(json.dumps(split))
    data, _ = built(small, tmp_path, "--stand_in", records)
    assert data["scales"][0]["seeds"] == "42, 43, 44"
    assert data["published"]["header"][-2:] == ["small", "tiny stand-in"]
    found = {scale["key"]: scale["findings"]["joint"] for scale in data["scales"]}
    assert found["small"]["verdict"] == "does not hold" and found["small"]["basis"] == "3 seeds"
    assert found["quickstart"]["verdict"] == "not shown" and "no interval" in found["quickstart"]["basis"]
    separators = [data["scales"][0]["findings"][key] for key in ("separator", "separator_space")]
    assert [found["verdict"] for found in separators] == ["holds", "not shown"]
    assert separators[0]["gap"][0] == pytest.approx(8 / 3) and separators[1]["gap"][0] == pytest.approx(0)


def test_a_variant_beside_the_records_gets_a_column(records, tmp_path):
    variant = records.parent / "small_outliers"
    variant.mkdir()
    shutil.copytree(records, records.parent / "small")
    record = json.loads((records / "lora_fp32.json").read_text())
    record["metrics"]["eval_exact_match"] = 12.3
    (variant / "lora_fp32.json").write_text(json.dumps(record))
    data, _ = built(records.parent / "small", tmp_path, "--stand_in", records)
    assert [scale["variant"] for scale in data["scales"]] == [False, True, False]
    assert data["published"]["header"][-3:] == ["small", "small, outliers", "tiny stand-in"]
    assert any(row[-2].startswith("12.3 /") for row in data["published"]["rows"])
    accuracy = data["tables"]["accuracy"]
    assert accuracy["header"][3::3] == ["small: EM", "small, outliers: EM"]
    rows = {row[0]: row[3::3] for row in accuracy["rows"]}
    assert rows["LoRA, not quantized"][1].startswith("12.3 [") and rows["LoRA trained at 4 bits"][1] == "-"
    assert (
        data["pictures"]["accuracy"]["of"] == "small and small, outliers" and data["pictures"]["heat"]["of"] == "small"
    )


def test_what_the_first_scale_lacks_is_the_stand_ins_and_says_so(records, tmp_path):
    small = records.parent / "small"
    small.mkdir()
    shutil.copy(records / "lora_fp32.json", small)
    data, _ = built(small, tmp_path, "--stand_in", records)
    assert data["tables"]["accuracy"]["of"] == data["pictures"]["accuracy"]["of"] == "small"
    for found in (data["tables"]["widths"], data["pictures"]["heat"]):
        assert found["of"] == "tiny stand-in; small: not measured"


def test_tables_beside_each_other():
    """A row that only the second has stands after the row that precedes it there; what one lacks is a dash."""
    first = {"header": ["a", "x", "y"], "rows": [["1", "p", "q"], ["3", "r", "s"]]}
    second = {"header": ["a", "x", "y"], "rows": [["1", "t", "u"], ["2", "v", "w"]]}
    joined = tables.beside([("one", first), ("none", None), ("two", second)], 1)
    assert joined["header"] == ["a", "one: x", "y", "two: x", "y"] and joined["of"] == "one and two"
    assert joined["rows"] == [["1", "p", "q", "t", "u"], ["2", "-", "-", "v", "w"], ["3", "r", "s", "-", "-"]]
    twice = {"header": ["a", "x", "y"], "rows": [["1", "p", "q"], ["1", "r", "s"]]}
    joined = tables.beside([("one", twice), ("two", second)], 1)
    rows = [["1", "p", "q", "t", "u"], ["2", "-", "-", "v", "w"], ["1", "r", "s", "-", "-"]]
    assert joined["rows"] == rows, "no row hides another"
    assert tables.beside([("one", first), ("two", None)], 1) == first | {"of": "one"}
    assert tables.beside([("one", None)], 1) is None


SET = "W4A4KV4, W6A6KV6, W8A8KV8"


def pgd_record(seed, points, drawn=50.0, fixed=40.0, steps=20):
    gap = {"points": points, "interval": [points - 1, points + 1]}
    return {
        "metrics": {},
        "data": {"attacked": {"examples": 500}},
        "seed": seed,
        "model": "m",
        "settings": {"attack_steps": steps, "radius": 0.1},
        "bit_config": {"precision_set": ["W4A4KV4", "W6A6KV6", "W8A8KV8"]},
        "matrix": {
            a: {b: {"all": {"accuracy": value}} for b, value in zip(SET.split(", "), row, strict=True)}
            for a, row in zip(
                SET.split(", "), ((11.0, 12.0, 13.0), (21.0, 22.0, 23.0), (31.0, 32.0, 33.0)), strict=True
            )
        },
        "random_precision": {
            "no attack": {"expected": 90.0},
            "eot(4, 8)": {
                "expected": 30.0,
                "queries": {"10": 5.0},
                "per_layer": {"difference": {"points": 1.0, "interval": [-1.0, 3.0]}},
            },
        },
        "protection": {
            "best_fixed": {"name": "W8A8KV8", "accuracy": fixed},
            "mean_all": drawn,
            "published_protocol": gap,
            "adaptive_attacker": gap | {"points": -points},
        },
    }


def test_adversarial_training_is_told_from_its_records(records, tmp_path):
    """Beside the records of a scale, in the folder that ends with _robust: one row a way to train, over its seeds."""
    (records / "adv_classification_rpt_matrix.json").unlink()
    assert built(records, tmp_path)[0]["robust"]["table"] is None
    folder = records.parent / "quickstart_robust"
    folder.mkdir()
    for name, seed, points in (("", 42, 5.0), ("_43", 43, 6.0), ("_44", 44, 7.0)):
        (folder / f"adv_qa_rpt_matrix{name}.json").write_text(json.dumps(pgd_record(seed, points)))
    (folder / "adv_qa_8bit_matrix.json").write_text(json.dumps(pgd_record(42, -3.0, fixed=45.0, steps=10)))
    robust = built(records, tmp_path)[0]["robust"]
    assert robust["n"] == ["500"] and robust["about"] == {"radius": "0.1"}
    assert robust["table"]["rows"] == [
        [
            "questions",
            "at 8 bits",
            SET,
            "10",
            "90.0",
            "45.0",
            "50.0",
            "−3.0 [−4.0, −2.0]",
            "30.0",
            "+3.0 [−4.0, −2.0]",
            "1",
        ],
        [
            *("questions", "at random ones (RPT), updated at another", SET, "20", "90.0", "40.0", "50.0"),
            *("+6.0 [+3.5, +8.5]", "30.0", "−6.0 [−8.5, −3.5]", "3"),
        ],
    ]
    assert robust["needle"]["rows"][1][3:] == [SET, "50.0", "22.0", "30.0", "5.0", "+1.0 [+1.0, +1.0]", "3"]
    told = robust["findings"]["qa"]
    assert [told[claim]["verdict"] for claim in ("protects", "adaptive", "beats")] == [
        *("holds", "does not hold", "not shown")
    ]
    assert told["beats"] == {"measured": "+5.0", "basis": "1 seed: no interval", "verdict": "not shown"}


def evaluated(rows):
    """{42: record} of an evaluation. rows: {config: (EM, drop, [low, high])}."""
    rows = [
        {"config": name, "exact_match": em, "f1": em, "average_w_bits": 8, "exact_match_drop": drop}
        | {"exact_match_drop_interval": interval}
        for name, (em, drop, interval) in rows.items()
    ]
    return {42: {"rows": rows, "data": {"validation": {"examples": 100}}}}


def test_a_finding_compares_trainings_of_one_quantizer():
    none = [0.0, 0.0]
    switch = {
        "W8A8KV8": (80.0, 0.0, none),
        "hybrid_8blocks": (79.0, 1.0, [0.5, 1.5]),
        "W4A4KV4": (70.0, 10.0, [8, 12]),
    }
    cyclic = {"W8A8KV8": (80.0, 0.0, none), "W6A6KV6": (79.0, 1.0, [0.2, 1.8]), "W4A4KV4": (60.0, 20.0, [18, 22])}
    static = {
        bits: {42: {"metrics": {"eval_exact_match": em, "eval_f1": em}, "data": {"validation": {"examples": 100}}}}
        for bits, em in (("w8_minmax", 79.0), ("w4_minmax", 61.0), ("w8_rotated", 10.0), ("w4_rotated", 10.0))
    }
    for found in static.values():
        found[42]["bit_config"] = {}
    records = {
        "switch_eval": evaluated(switch),
        "switch_minmax_eval": evaluated({"W4A4KV4": (65.0, 0.0, none)}),
        "switch_sequential_eval": evaluated({"W4A4KV4": (64.0, 0.0, none)}),
        "cpt_eval": evaluated({name: (99.0, 0.0, none) for name in cyclic}),
        "cpt_minmax_eval": evaluated(cyclic),
        **{f"static_{name}": found for name, found in static.items()},
    }
    scale = {"records": records, "summary": None, "blocks": 8, "n": 100}
    found = findings.findings(scale)
    gaps = {key: found[key]["gap"] and found[key]["gap"][0] for key in found}
    assert (gaps["sequential"], gaps["recipe"], gaps["cpt_gain"], gaps["cpt_four"]) == (1.0, 6.0, 1.0, -1.0)
    assert gaps["cpt_widths"] == 1.0 and found["cpt_widths"]["basis"].startswith("MinMax, W6A6KV6")
    assert found["hybrid"]["gap"] == [1.0, 0.5, 1.5] and found["hybrid"]["verdict"] == "holds"
    del records["cpt_minmax_eval"]
    found = findings.findings(scale)
    assert found["cpt_gain"]["gap"][0] == 89.0 and found["cpt_four"]["basis"].startswith("rotated, ")


def test_what_the_search_keeps():
    low, high, names = {"w_bits": 4}, {"w_bits": 8}, ("0.attn.c_attn", "0.mlp.c_fc", "1.attn.c_attn", "1.mlp.c_fc")
    layers = {"W8A8KV8": {f"transformer.h.{name}": high for name in names}}
    layers["found"] = layers["W8A8KV8"] | {f"transformer.h.{name}": low for name in (names[1], names[3], names[0])}
    record = {"bit_config": {"reference": "W8A8KV8", "layers": layers}}
    found = tables.found_table({"records": {"search": {42: record}}})
    assert found["rows"] == [["attn.c_attn", "1"], ["mlp.c_fc", "none"]]


def test_a_gain_is_no_loss_and_a_model_made_elsewhere_is_named(tmp_path):
    flips = {
        name: {"kind": "layer", "operand": "together", "low_bits": "4", "exact_match_drop_interval": interval}
        for name, interval in {"a": [0.1, 0.9], "b": [-0.9, -0.1], "c": [-0.1, 0.1]}.items()
    }
    report = load_script("report/make_report.py")
    assert report.about_sweep({"data": {"train": {"examples": 9}}, "flips": flips})["clear"] == 1
    assert "goes on from a model pretrained elsewhere" in report.read_scale(RESULTS / "small", "small")["note"]
    assert "elsewhere" not in report.read_scale(RESULTS / "small_outliers", "small_outliers")["note"]


def test_verdicts_need_an_interval():
    cases = {(1.0, None, None): "not shown", (1.0, 0.1, 2.0): "holds", (-1.0, -2.0, -0.1): "does not hold"}
    cases |= {(1.0, -0.1, 2.0): "not shown"}
    for gap, verdict in cases.items():
        assert findings.verdict((list(gap), "")) == verdict
    assert findings.verdict(None) == "not measured"
    assert findings.verdict(([1.0, 0.5, 1.5], ""), "none") == "holds"  # small enough to count as none
    assert findings.verdict(([3.0, 0.5, 5.5], ""), "none") == "does not hold"
    assert findings.verdict(([1.0, -3.0, 5.0], ""), "none") == "not shown"


def test_intervals():
    assert findings.over_seeds([3.0, 4.0, 5.0], [1.0, 2.0, 3.0]) == [2.0, 2.0, 2.0]
    low, high = findings.wilson(25.0, 24)  # as in the record of the quick start's attack
    assert (round(low, 2), round(high, 2)) == (12.0, 44.9)
    difference, low, high = findings.newcombe(100.0, 0.0, 24)
    assert difference == 100.0 and 75 < low < high < 100.001
    assert findings.shown([-0.04, -1.0, 0.5]) == "+0.0 [−1.0, +0.5]"


def test_exact_rank_test_of_searches():
    """Chance that a found assignment is beaten so seldom: by hand, (n + 1) equally likely ranks each."""
    assert findings.rank_test(0, [1]) == 1 / 2 and findings.rank_test(0, [20, 20, 20]) == 1 / 21**3
    assert findings.rank_test(1, [20, 20, 20]) == 4 / 21**3 and findings.rank_test(1, [1, 1]) == 3 / 4
    assert findings.rank_test(60, [20, 20, 20]) == 1
    wide = [5.0, -3.0, 13.0]
    assert findings.verdict((wide, "")) == "not shown" and findings.verdict((wide, "", 0.001)) == "holds"
    assert findings.verdict((wide, "", 0.03)) == "not shown" and findings.verdict((wide, "", 0.99)) == "does not hold"


def test_published_figures_name_steps_of_the_protocol():
    rows = json.loads((ROOT / "reproduce" / "published.json").read_text())
    assert all({"source", "setting", "exact_match", "f1", "step", "config"} <= set(row) for row in rows)
    steps = load_script("reproduce/steps.py").STEPS
    assert {row["step"] for row in rows} <= {*steps, None}
    assert {*tables.LABELS, *tables.SWITCHABLE, *(step for step, _ in tables.UNPUBLISHED.values())} <= set(steps)
    assert len({(row["source"], row["setting"]) for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "lora_fp32.json: broken record: "),
        ("[]", "lora_fp32.json: broken record: it has no metrics, data, seed, model"),
        ('{"metrics": {}, "data": {}, "seed": 1, "model": ""}', "quickstart: broken record: KeyError: "),
    ],
)
def test_broken_record_is_one_line(records, tmp_path, text, message):
    (records / "lora_fp32.json").write_text(text)
    done = make(records, tmp_path / "report.pdf", "--stand_in", records)
    assert done.returncode == 1 and message in done.stderr and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "report.pdf").exists()


def test_folder_without_records_and_missing_typst_are_one_line(tmp_path):
    done = make(tmp_path, tmp_path / "report.pdf")
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path}: no records (*.json) there")
    (tmp_path / "typst.py").write_text("raise ImportError")
    done = make(RESULTS / "quickstart", tmp_path / "report.pdf", env={"PYTHONPATH": str(tmp_path)})
    assert (
        done.returncode == 1 and done.stderr == "error: the report needs typst: pip install -r requirements-dev.txt\n"
    )


def test_published_table_of_the_page_and_a_scale_that_fills_its_column(tmp_path):
    originals = [ROOT / page for page in ("reproduce/README.md", "README.md", "adv_attack/README.md")]
    pages = [shutil.copy(page, tmp_path / f"{number}.md") for number, page in enumerate(originals)]
    command = [sys.executable, ROOT / "reproduce" / "table.py"]
    done = subprocess.run([*command, "--pages", *pages], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page, original in zip(pages, originals, strict=True):
        assert page.read_text() == original.read_text(), "reproduce/README.md says how"
    found = subprocess.run([*command, "--gpt2", RESULTS / "quickstart"], capture_output=True, text=True).stdout
    lora = json.loads((RESULTS / "quickstart" / "lora_fp32.json").read_text())["metrics"]
    assert f"| `lora_fp32` | {lora['eval_exact_match']:.1f} / {lora['eval_f1']:.1f} |" in found
    assert "| ours | post-training in the rotated basis, 4 bits | - | `ptq_rotated_W4A4KV4` | 8" in found
    pages[1].write_text(originals[1].read_text())
    subprocess.run([*command, "--small", RESULTS / "quickstart", "--pages", pages[1]], check=True, capture_output=True)
    assert f"| LoRA, not quantized | 69.39 / 79.29 | {lora['eval_exact_match']:.1f} / {lora['eval_f1']:.1f} | 1 |" in (
        pages[1].read_text()
    )


def test_tables_of_attacks_are_those_of_the_records():
    """Of the quick start's own: words replaced at three precisions, tokens of questions found for all precisions."""
    records = {path.stem: {42: json.loads(path.read_text())} for path in (RESULTS / "quickstart").glob("*.json")}
    words, found = robustness.words_table(records), records["letters_minmax_eval"][42]
    assert [row[2] for row in words["rows"]] == found["bit_config"]["inference"]
    last = found["rows"][-1]
    assert last["attack"] == last["inference"] == words["rows"][-1][2] and last["texts"] == "optimized"
    assert words["rows"][-1][5] == f"{last['single']['accuracy']:.1f}" and words["rows"][0][6:] == ["-", "-"]
    gains = {(row["texts"], row["precision"]): row["clean_right"] for row in found["differences_from_float32"]}
    for place, texts in ((6, "each attacked at its own"), (7, "found at W32A32KV32")):
        gap = gains[texts, "W4A4KV4"]
        assert words["rows"][-1][place] == findings.shown([gap["points"], *gap["interval"]])
    assert words["rows"][-1][6] != words["rows"][-1][7]
    drawn = {"no attack": 88.0, "words replaced at random": 77.0, "random(W4A4KV4+W8A8KV8)": 33.0}
    drawn = {row: {"expected": value} for row, value in drawn.items()}
    rpi = {"bit_config": {"precision_set": ["W4A4KV4", "W8A8KV8"]}, "random_precision": drawn}
    *others, last = robustness.words_table(records | {"letters_minmax_rpi": {42: rpi}})["rows"]
    assert others == words["rows"] and last[2:] == ["drawn of W4A4KV4, W8A8KV8", "88.0", "-", "33.0", "-", "-"]
    tokens, found = robustness.tokens_table(records), records["tokens_question_hotflip_eot"][42]
    row = dict(zip(tokens["header"], tokens["rows"][0], strict=True))
    assert (row["changed"], row["attack"], row["found at"]) == ("question", "HotFlip", "all (EOT)")
    for name in ("W8A8KV8", "W4A4KV4"):
        assert row[name] == f"{found['matrix']['hotflip'][name]['all']['accuracy']:.1f}"
    assert row["random tokens"] == f"{found['matrix']['random tokens']['W8A8KV8']['all']['accuracy']:.1f}"
    assert robustness.words_table({}) is robustness.tokens_table({}) is robustness.training_table({}) is None
