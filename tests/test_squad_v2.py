"""SQuAD v2: its evaluation, where "no answer" is, made data, training, evaluation, sweep and search."""

import json
import random
import re
import string
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer

import run_qa
from common.answer_spans import null_odds
from common.record import load_state, write_state
from common.squad_data import load_qa_datasets, load_squad_json
from common.squad_v2 import squad_v2_per_example, squad_v2_scores
from conftest import experiment, load_script
from models.errors import UserError
from utils_qa import gold_labels, postprocess_qa_predictions, prepare_train_features, prepare_validation_features

with experiment("cpt"):
    import run_qa as cyclic
with experiment("switch_precision"):
    import run_qa as joint
    import run_qa_eval
    import search
    import sensitivity

V2 = "--version_2_with_negative"
NAMES = "exact f1 total HasAns_exact HasAns_f1 HasAns_total NoAns_exact NoAns_f1 NoAns_total".split()
NAMES += "best_exact best_exact_thresh best_f1 best_f1_thresh".split()


def read(path):
    return json.loads(path.read_text())


# ---- the evaluation


def independent(predictions, references, odds, threshold):
    """The v2 evaluation in another way: strings, lists that shrink, every number of answered questions tried."""

    def clean(text):
        kept = "".join(character for character in text.lower() if character not in string.punctuation)
        return " ".join(word for word in re.split(r"\s+", re.sub(r"\b(a|an|the)\b", " ", kept)) if word)

    def overlap(text, gold):
        words, pool = text.split(), gold.split()
        if not words or not pool:
            return 1.0 if words == pool else 0.0
        size, hits = len(words) + len(pool), 0
        for word in words:
            if word in pool:
                pool.remove(word)
                hits += 1
        return 2 * hits / size

    raw, final = {}, {}
    for key, texts in references.items():
        golds, found = [clean(text) for text in texts if clean(text)] or [""], clean(predictions[key])
        raw[key] = float(found in golds), max(overlap(found, gold) for gold in golds)
        final[key] = (0.0 if texts else 1.0,) * 2 if odds[key] > threshold else raw[key]
    result = {}
    for prefix, keys in (
        ("", list(final)),
        ("HasAns_", [key for key in final if references[key]]),
        ("NoAns_", [key for key in final if not references[key]]),
    ):
        if keys:
            result[f"{prefix}total"] = len(keys)
            for column, name in enumerate(("exact", "f1")):
                result[prefix + name] = 100 * np.mean([final[key][column] for key in keys])
    order = sorted(odds, key=lambda key: odds[key])
    for column, name in enumerate(("best_exact", "best_f1")):
        sums = []
        for answered in range(len(order) + 1):
            right = [raw[key][column] if references[key] else float(not predictions[key]) for key in order[:answered]]
            sums.append(sum(right) + sum(not references[key] for key in order[answered:]))
        # the first of the best ones; equal sums may differ in their last digit
        at = next(index for index, value in enumerate(sums) if value > max(sums) - 1e-9)
        result[name], result[f"{name}_thresh"] = 100 * sums[at] / len(order), odds[order[at - 1]] if at else 0.0
    return result


@pytest.mark.parametrize("seed", range(40))
def test_random_prediction_files(seed):
    rng = random.Random(seed)
    words = ["the", "a", "An", "red", "Red!", "kite", "drum.", "--", "ÉTÉ", "10", "kite"]

    def text():
        return rng.choice(["  ", " ", "\n"]).join(rng.choices(words, k=rng.choice([0, 1, 1, 2, 3])))

    kinds = rng.choice([(0, 1, 2, 3), (1, 2), (0,)])
    references = {f"q{n}": [text() for _ in range(rng.choice(kinds))] for n in range(rng.choice([1, 7, 60]))}
    right = {key: rng.choice([*golds, text(), ""]) for key, golds in references.items()}
    predictions = dict(rng.sample(list(right.items()), len(right))) | {"of another file": "x"}
    odds = {key: rng.gauss(0, 3) for key in predictions}
    threshold = rng.choice([1.0, 0.0, float("inf")])
    found = squad_v2_scores(predictions, references, odds, threshold)
    del odds["of another file"]
    expected = independent(predictions, references, odds, threshold)
    assert found == pytest.approx(expected, abs=1e-9) and list(found) == [name for name in NAMES if name in expected]
    plain = squad_v2_scores(predictions, references)
    zero = independent(predictions, references, {key: 0.0 for key in predictions if key in references}, 1.0)
    assert plain == pytest.approx(zero, abs=1e-9)
    per_example = squad_v2_per_example(predictions, references)
    assert list(per_example) == list(references)
    assert 100 * np.mean(list(per_example.values()), axis=0) == pytest.approx([plain["exact"], plain["f1"]])


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1"),
    [
        ("", [], 1, 1),
        ("The!", [], 1, 1),  # nothing is left of it
        ("red", [], 0, 0),
        ("", ["red"], 0, 0),
        ("", ["the", "red"], 0, 0),  # a gold text of no words does not count beside another
        ("", ["the"], 1, 1),
        ("a red kite", ["Red kite."], 1, 1),
        ("red kite", ["kite"], 0, 2 / 3),
    ],
)
def test_scores_by_hand(prediction, golds, exact, f1):
    assert squad_v2_per_example({"q": prediction}, {"q": golds}) == {"q": (exact, pytest.approx(f1))}
    scores = squad_v2_scores({"q": prediction}, {"q": golds})
    part = "HasAns" if golds else "NoAns"
    assert scores["total"] == scores[f"{part}_total"] == 1 and scores[f"{part}_exact"] == 100 * exact


def test_best_thresholds_by_hand():
    references = {"a": ["x"], "b": [], "c": ["y"], "d": []}
    predictions = {"a": "x", "b": "z", "c": "y", "d": "w"}
    scores = squad_v2_scores(predictions, references, {"a": -3.0, "b": 0.5, "c": -1.0, "d": 2.0}, float("inf"))
    assert scores["exact"] == 50 and (scores["best_exact"], scores["best_exact_thresh"]) == (100, -1.0)
    assert squad_v2_scores(predictions, references, {"a": -3, "b": 0.5, "c": -1, "d": 2}, 0.5)["exact"] == 75


def test_what_cannot_be_scored():
    for call, message in (
        (lambda: squad_v2_scores({}, {}), "found no references"),
        (lambda: squad_v2_scores({"a": "x"}, {"a": [], "b": []}), "prediction 'b' is None"),
        (lambda: squad_v2_scores({"a": 3}, {"a": []}), "prediction 'a' is 3"),
        (lambda: squad_v2_scores({"a": "x"}, {"a": "x"}), "reference 'a' is 'x'"),
        (lambda: squad_v2_scores({"a": "x"}, {"a": []}, {}), "no-answer probability of 'a' is missing"),
    ):
        with pytest.raises(UserError, match=message):
            call()


# ---- files, windows, answers


@pytest.fixture(scope="module")
def v2_file(squad_files, tmp_path_factory):
    """The tiny training file with a third of its questions asked of other paragraphs, by reproduce's script."""
    path = tmp_path_factory.mktemp("v2") / "train-v2.json"
    script = load_script("reproduce/make_squad_v2.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_squad_v2.py", "--input", squad_files[0], "--output", str(path)])
        script.main()
    return path


def test_made_data_has_the_official_form(v2_file, squad_files, monkeypatch, tmp_path, capsys):
    content, before = read(v2_file), load_squad_json(squad_files[0])
    assert content["version"] == "v2.0" and set(content["data"][0]) == {"title", "paragraphs"}
    qas = [(paragraph["context"], qa) for paragraph in content["data"][0]["paragraphs"] for qa in paragraph["qas"]]
    impossible = [(context, qa) for context, qa in qas if qa["is_impossible"]]
    assert all(set(qa) == {"question", "id", "answers", "is_impossible"} for _, qa in qas)
    assert len(qas) == len({qa["id"] for _, qa in qas}) and len(impossible) == round(64 * 0.33 / 0.67)
    by_id = {row["id"]: row for row in before}
    for context, qa in impossible:
        source = by_id[qa["id"].removesuffix("-impossible")]
        assert qa["answers"] == [] and qa["question"] == source["question"] and context != source["context"]
        assert not any(text in context for text in source["answers"]["text"])
    rows = load_squad_json(v2_file, version_2_with_negative=True)
    assert [row for row in rows if row["answers"]["text"]] == before, "nothing else has changed"

    script = load_script("reproduce/make_squad_v2.py")

    def make(*flags, output=tmp_path / "again.json"):
        words = ["make_squad_v2.py", "--input", squad_files[0], "--output", str(output), *flags]
        monkeypatch.setattr(sys, "argv", words)
        script.main()
        return output.read_bytes()

    assert make() == v2_file.read_bytes() and "64 questions with an answer, 32 without" in capsys.readouterr().out
    for flags, message in (
        (("--seed", "1"), "again.json: is there, with other content"),
        (("--share", "0.6"), "--share 0.6: allowed are above 0 up to 0.5"),
        (("--share", "nan"), "--share nan: must be a number that is finite"),
    ):
        with pytest.raises(script.UserError, match=message):
            make(*flags)
    alone = {"data": [{"title": "t", "paragraphs": content["data"][0]["paragraphs"][:1]}]}
    alone["data"][0]["paragraphs"][0]["qas"] = [qa for qa in alone["data"][0]["paragraphs"][0]["qas"] if qa["answers"]]
    (tmp_path / "alone.json").write_text(json.dumps(alone))
    with pytest.raises(script.UserError, match="only 0 of the 2 questions have another paragraph"):
        make("--input", str(tmp_path / "alone.json"), output=tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def test_empty_answers_are_read_under_the_flag_only(v2_file, tmp_path):
    with pytest.raises(UserError, match='"answers" is empty; allowed: .*--version_2_with_negative') as caught:
        load_squad_json(v2_file)
    assert "32 fault(s)" in str(caught.value)
    assert len(load_squad_json(v2_file, version_2_with_negative=True)) == 96
    rows = load_squad_json(v2_file, version_2_with_negative=True)
    del rows[3]["answers"]  # not known is not "no answer"
    (tmp_path / "lacking.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match='"answers" is missing'):
        load_squad_json(tmp_path / "lacking.json", version_2_with_negative=True)
    folder, cache = tmp_path / "hub", str(tmp_path / "cache")
    folder.mkdir()
    rows = load_squad_json(v2_file, version_2_with_negative=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_qa_datasets(str(folder), cache_dir=cache, splits=["train"], version_2_with_negative=True)
    assert loaded["train"].to_list() == rows
    with pytest.raises(UserError, match='"answers" is empty'):
        load_qa_datasets(str(folder), cache_dir=cache, splits=["train"])


@pytest.mark.parametrize("length", [22, 96])
def test_no_answer_is_at_the_last_position_of_a_window(length, v2_file, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = load_squad_json(v2_file, version_2_with_negative=True)
    examples = {key: [row[key] for row in rows] for key in rows[0]}
    settings = {"tokenizer": tokenizer, "max_seq_length": length, "doc_stride": 4, "separator": "\n"}
    trained = prepare_train_features(examples, **settings, version_2_with_negative=True)
    windows = prepare_validation_features(examples, **settings, version_2_with_negative=True)
    assert trained["input_ids"] == windows["input_ids"] and max(trained["length"]) <= length
    labels = gold_labels({key: windows[key] for key in ("example_id", "offset_mapping")}, rows, True)
    assert labels.tolist() == [list(pair) for pair in zip(trained["start_positions"], trained["end_positions"])]
    by_id, held = {row["id"]: row for row in rows}, set()
    for ids, mask, offsets, key, (start, end) in zip(
        windows["input_ids"], windows["attention_mask"], windows["offset_mapping"], windows["example_id"], labels
    ):
        assert len(ids) == len(mask) == len(offsets) and all(mask) and ids.count(tokenizer.eos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id and offsets[-1] is None and offsets[-2] is not None
        answers = by_id[key]["answers"]
        if start == len(ids) - 1:
            assert end == start
        else:
            held.add(key)
            assert by_id[key]["context"][offsets[start][0] : offsets[end][1]].strip() == answers["text"][0]
    assert held == {row["id"] for row in rows if row["answers"]["text"]}
    if length == 22:
        assert len(labels) > len(rows), "windows without the answer of a question that has one"

    # v1.1: the windows and labels are what they were
    answered = {key: [row[key] for row in rows if row["answers"]["text"]] for key in rows[0]}
    plain = prepare_train_features(answered, **settings)
    assert not any(tokenizer.eos_token_id in ids for ids in plain["input_ids"])
    assert (0 in plain["start_positions"]) == (length == 22)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="the tokenizer has no end-of-text token"):
        prepare_train_features(examples, **settings, version_2_with_negative=True)


def answer(starts, ends, threshold, windows=1, n_best=20):
    """(text, null odds, n-best) of "red kite" in windows of five tokens: two before it, two of it, the last one."""
    features = [{"example_id": "q", "offset_mapping": [None, None, [0, 3], [3, 8], None]}] * windows
    found = postprocess_qa_predictions(
        [{"id": "q", "context": "red kite"}], features, (np.array(starts), np.array(ends)), n_best, 30, threshold
    )
    return found[0]["q"], null_odds(found[1]["q"]), found[1]["q"]


def test_no_answer_beside_the_best_span():
    starts, ends = [[9.0, 9, 2, 1, 4]], [[9.0, 9, 0, 3, 2]]
    text, odds, entries = answer(starts, ends, 0.0)
    assert (text, odds) == ("", 1.0)
    assert [entry["text"] for entry in entries] == ["", "red kite", "kite", "red"]
    assert (entries[0]["start_logit"], entries[0]["end_logit"]) == (4, 2)
    weights = np.exp([6.0, 5, 4, 2])
    assert [entry["probability"] for entry in entries] == pytest.approx((weights / weights.sum()).tolist())
    assert answer(starts, ends, 1.0)[0] == "red kite", "not above the threshold"
    assert answer(starts, ends, 0.9)[:2] == ("", 1.0)
    assert [entry["text"] for entry in answer(starts, ends, -9.0, n_best=1)[2]] == ["", "red kite"]
    assert [entry["text"] for entry in answer(starts, ends, None)[2]] == ["red kite", "kite", "red"]

    # the least over the windows, each start + end of one window
    more = [[4.0, 4, 0, 0, 1], [4.0, 4, 2, 1, 4]], [[0.0, 0, 0, 0, 2], [0.0, 0, 0, 3, 0]]
    assert answer(*more, 0.0, windows=2)[:2] == ("red kite", 3.0 - 5.0)
    # no span at all: the logits of all tokens of the context are -inf
    nothing = [[0.0, 0, -np.inf, -np.inf, 1]]
    assert answer(nothing, nothing, 5.0)[:2] == ("", 2.0)
    with pytest.raises(UserError, match="found .* for no answer; allowed: finite"):
        answer([[0.0, 0, 0, 0, -np.inf]], [[0.0] * 5], 0.0)


# ---- from end to end


@pytest.fixture
def run(monkeypatch, qa_words, v2_file, tmp_path):
    """run(module, *flags, out=..., ...): main() of a script on the tiny model and the made file; its output folder."""

    def call(module, *flags, out="out", v2=True, **options):
        files = ("--train_file", v2_file, "--validation_file", v2_file, V2) if v2 else ()
        words = qa_words(*files, *flags, out=tmp_path / out, **options)
        monkeypatch.setattr(sys, "argv", ["x.py", *words])
        module.main()
        return tmp_path / out

    return call


def test_learns_that_some_questions_have_no_answer(run, caplog, v2_file, tmp_path):
    rows = load_squad_json(v2_file, version_2_with_negative=True)
    kinds = [[row for row in rows if bool(row["answers"]["text"]) is kind][:6] for kind in (True, False)]
    (tmp_path / "few.json").write_text(json.dumps(sum(kinds, [])))
    few = ("--train_file", tmp_path / "few.json", "--validation_file", tmp_path / "few.json")
    learn = ("--max_steps", "60", "--learning_rate", "3e-3", "--lr_scheduler_type", "cosine")
    out = run(run_qa, *few, *learn)
    metrics = read(out / "record.json")["metrics"]
    assert {f"eval_{name}" for name in [*NAMES, "exact_match", "loss"]} <= set(metrics)
    assert metrics["eval_exact"] == metrics["eval_exact_match"] and metrics["eval_total"] == 12
    assert metrics["eval_HasAns_exact"] >= 80 and metrics["eval_NoAns_exact"] >= 80, metrics
    texts, odds = read(out / "eval_predictions.json"), read(out / "eval_null_odds.json")
    assert {key: text == "" for key, text in texts.items()} == {key: value > 0 for key, value in odds.items()}

    # the same model with a threshold that nothing exceeds: the best thresholds are on the scale of the flag
    caplog.clear()
    never = run(run_qa, *few, "--null_score_diff_threshold", "1000", out="never", model=out, train=False)
    found = read(never / "record.json")["metrics"]
    assert found["eval_NoAns_exact"] == 0 and found["eval_best_exact"] >= metrics["eval_exact"]
    assert read(never / "eval_null_odds.json") == pytest.approx(odds, rel=1e-4) and "was trained" not in caplog.text
    best = ("--null_score_diff_threshold", str(found["eval_best_exact_thresh"]))
    again = run(run_qa, *few, *best, out="best", model=out, train=False)
    assert read(again / "record.json")["metrics"]["eval_exact"] == found["eval_best_exact"]

    # as v1.1: told, and no names of v2
    metrics = read(run(run_qa, out="v1", v2=False, model=out, train=False) / "record.json")["metrics"]
    assert "was trained with --version_2_with_negative, and is not evaluated so" in caplog.text
    assert not any("NoAns" in name or name == "eval_exact" for name in metrics)


def test_data_without_unanswerable_questions_is_a_warning(run, squad_files, v2_file, caplog):
    predict = ("--do_predict", "--test_file", v2_file, "--max_predict_samples", "24")
    out = run(run_qa, "--validation_file", squad_files[1], V2, *predict, v2=False, train=False)
    assert "--version_2_with_negative: every question of the validation data has an answer" in caplog.text
    metrics = read(out / "record.json")["metrics"]
    assert metrics["eval_HasAns_total"] == 14 and "eval_NoAns_total" not in metrics
    assert metrics["predict_HasAns_total"] + metrics["predict_NoAns_total"] == 24
    assert len(read(out / "predict_null_odds.json")) == 24


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--null_score_diff_threshold", "nan"), "--null_score_diff_threshold nan: must be a number that is finite"),
        (("--null_score_diff_threshold", "low"), "--null_score_diff_threshold.*: invalid float value: 'low'"),
    ],
)
def test_thresholds_that_are_no_numbers(flags, message, run, tmp_path):
    for module in (run_qa, run_qa_eval, sensitivity):
        with pytest.raises(ValueError, match=message):
            run(module, *flags, train=False)
    assert not (tmp_path / "out").exists()


def test_a_training_goes_on_under_its_own_version_only(run, tmp_path, squad_files):
    files = ("--train_file", squad_files[0], "--validation_file", squad_files[1])
    out = run(run_qa, "--add_lora", *files, v2=False)
    settings = load_state(out / "run_settings.json")
    older = {key: value for key, value in settings.items() if key != "version_2_with_negative"}
    write_state(out / "run_settings.json", older)
    assert read(run(run_qa, "--add_lora", *files, v2=False) / "record.json")["continues"] == "finished training"
    with pytest.raises(ValueError, match="version_2_with_negative: False then, True now"):
        run(run_qa, "--add_lora", *files, V2, v2=False)


def test_cyclic_training_has_the_same_metrics(run):
    out = run(cyclic, "--bit_widths", "4", "8", "--num_cyclic_period", "1", "--max_eval_samples", "9")
    assert {"eval_NoAns_exact_W8A8KV8", "eval_exact_match_W4A4KV4"} <= set(read(out / "record.json")["metrics"])


def test_bank_evaluation_sweep_and_search(run, tmp_path, v2_file):
    few = ("--max_eval_samples", "9", "--num_bootstrap", "20")
    bank = run(joint, "--bit_widths", "4", "8", "--quantizer", "minmax", "--max_eval_samples", "9", out="bank")
    metrics = read(bank / "record.json")["metrics"]
    assert {"eval_NoAns_exact_W8A8KV8", "eval_HasAns_f1_W4A4KV4", "eval_NoAns_exact"} <= set(metrics)
    around = sorted(read(bank / "eval_W8A8KV8_null_odds.json").values())[4:6]
    middle = ("--null_score_diff_threshold", str(sum(around) / 2))  # four of nine are ""

    out = run(run_qa_eval, *few, *middle, "--bit_configs", "8", "4", "--noise_floor", model=bank, train=False)
    record = read(out / "record.json")
    row = record["rows"][0]
    (folder,) = out.glob("W8A8KV8-*")
    single = read(folder / "record.json")
    assert single["files"].keys() >= {"eval_null_odds.json"}
    assert single["metrics"]["eval_exact"] == row["exact_match"] and single["metrics"]["eval_f1"] == row["f1"]
    rows = {row["id"]: row["answers"]["text"] for row in load_squad_json(v2_file, version_2_with_negative=True)[:9]}
    texts, odds = (read(folder / f"eval_{name}.json") for name in ("predictions", "null_odds"))
    assert list(texts.values()).count("") == 4
    expected = independent(texts, rows, odds, float("inf"))
    assert {name: single["metrics"][f"eval_{name}"] for name in NAMES} == pytest.approx(expected)
    assert row["NoAns_exact"] == expected["NoAns_exact"] == record["metrics"]["W8A8KV8_NoAns_exact"]
    assert row["noise_floor"]["exact_match"][0] <= row["exact_match"] <= row["noise_floor"]["exact_match"][1]
    table = (out / "table.md").read_text().splitlines()
    assert "| HasAns EM | HasAns F1 | NoAns EM | noise floor" in table[0]
    assert f"| {row['HasAns_exact']:.2f} " in table[2]

    gradients = ("--num_gradient_batches", "1")
    sens = run(sensitivity, *few, *middle, *gradients, out="sens", model=bank, train=False)
    found = read(sens / "sensitivity.json")
    assert found["metrics"]["exact_match"] == row["exact_match"] and found["metrics"]["f1"] == row["f1"]
    assert found["identity"]["null_score_diff_threshold"] == float(middle[1])
    assert found["flips"]["W4A4KV4: all"]["exact_match"] == record["rows"][1]["exact_match"]

    words = ("--sensitivity_file", str(sens / "sensitivity.json"), "--average_bits", "6", "--refine_rounds", "1")
    words += ("--refine_candidates", "2", "--max_refine_samples", "3", "--num_random", "1")
    rows = read(run(search, *few, *middle, *words, out="search", model=bank, train=False) / "record.json")["rows"]
    assert all({"HasAns_exact", "HasAns_f1", "NoAns_exact"} <= set(row) for row in rows)
    assert next(row for row in rows if row["config"] == "W8A8KV8")["exact_match"] == row["exact_match"]
