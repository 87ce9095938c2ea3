"""utils_qa.py: the refusals of the reader, windows and labels, logits to text, EM/F1 against the official rules."""

import json
import os
import random
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common import squad_data
from common.record import write_json_atomic
from common.squad_data import SQUAD_FEATURES, load_qa_datasets, load_squad_json
from models.errors import UserError
from utils_qa import (
    NULL_POSITION,
    postprocess_qa_predictions,
    prepare_train_features,
    prepare_validation_features,
    squad_em_f1,
    squad_em_f1_per_example,
)

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"
DEV_FILE, TRAIN_FILE = SHARED / "squad" / "dev-v1.1.json", SHARED / "squad" / "train-v1.1.json"
needs_squad = pytest.mark.skipif(not DEV_FILE.exists(), reason=f"no {DEV_FILE}")

NORMANS = (
    "The Normans were the people who gave their name to Normandy, a region in France. "
    "They were descended from Norse raiders of Denmark, Iceland and Norway (10th – 11th centuries)."
)
RIVER = "  The river R\u00f4ne is 813 km long \U0001f30a and flows through Geneva.\nIt was named by the Celts.  "
LABELS = [
    ("q0", NORMANS, "What is Normandy?", ["a region in France", "region in France"]),
    ("q1", NORMANS, "  Who were the raiders? ", ["Norse"]),
    ("q2", NORMANS, "When?", ["10th – 11th centuries"]),
    ("q3", RIVER, "How long is it?", ["813 km"]),
    ("q4", RIVER, "What is wet?", ["\U0001f30a"]),
    ("q5", RIVER, "Who named it?", ["the Celts"]),
]


def flat_row(example_id, context, question, texts):
    answers = {"text": list(texts), "answer_start": [context.index(text) for text in texts]}
    return {"id": example_id, "title": "T", "context": context, "question": question, "answers": answers}


def flat_rows():
    return [flat_row(*label) for label in LABELS]


def nested(rows):
    paragraphs = {}
    for row in rows:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"])
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
        qa = {"id": row["id"], "question": row["question"], "answers": answers}
        paragraphs.setdefault(row["context"], []).append(qa)
    paragraphs = [{"context": context, "qas": qas} for context, qas in paragraphs.items()]
    return {"version": "1.1", "data": [{"title": "T", "paragraphs": paragraphs}]}


def batch(rows):
    return {key: [row[key] for row in rows] for key in rows[0]}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def train_tokenizer(**post):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([NORMANS, "What is the river? Who were they?"] * 4, trainer)
    for name, value in post.items():
        setattr(tokenizer, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


# ---- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["nested", "list", "data", "lines", "bom"])
def test_all_forms_give_the_same_rows(tmp_path, form):
    rows = flat_rows()
    content = {
        "nested": nested(rows),
        "list": rows,
        "data": {"data": rows, "version": "x"},
        "lines": "\n".join(json.dumps(row) for row in rows) + "\n\n",
        "bom": "\ufeff" + json.dumps(nested(rows)),
    }[form]
    assert load_squad_json(write(tmp_path / "squad.json", content)) == rows


def test_one_line_of_json_lines_and_no_title(tmp_path):
    row = flat_rows()[0]
    del row["title"]
    assert load_squad_json(write(tmp_path / "one.json", row)) == [{**row, "title": ""}]


def test_answers_are_optional_only_where_asked(tmp_path):
    row = {key: value for key, value in flat_rows()[0].items() if key != "answers"}
    path = write(tmp_path / "test.json", [row])
    assert load_squad_json(path, require_answers=False)[0]["answers"] == {"text": [], "answer_start": []}
    with pytest.raises(ValueError, match='"answers" is missing'):
        load_squad_json(path)
    qa = {"id": "x", "question": "y"}
    path = write(tmp_path / "nested.json", {"data": [{"paragraphs": [{"context": "c", "qas": [qa]}]}]})
    assert load_squad_json(path, require_answers=False)[0]["answers"]["text"] == []


def edited(**changes):
    """A flat row with changes; a change to ... removes the key."""
    row = {**flat_rows()[0], **changes}
    return {key: value for key, value in row.items() if value is not ...}


def edited_answers(texts, starts):
    return [edited(answers={"text": texts, "answer_start": starts})]


def edited_nested(edit):
    content = nested(flat_rows())
    edit(content["data"][0])
    return content


REFUSED = {
    "empty": (" \n", ["is empty"]),
    "no json": ("{'data': []}", ["is not JSON"]),
    "truncated": (json.dumps(nested(flat_rows()))[:-9], ["is not JSON"]),
    "truncated lines": (json.dumps(edited()) + '\n{"id": "b"', ["line 2 is not JSON"]),
    "too deep": ("[" * 200_000, ["is not JSON"]),
    "number": ("3", ["found 3 instead of a list"]),
    "other keys": ({"train": [], "x": 1}, ["found the keys ['train', 'x']", '"data"']),
    "data no list": ({"data": {"a": 1}}, ["instead of a list"]),
    "no records": ({"data": []}, ["found no question"]),
    "no questions": ({"data": [{"title": "t", "paragraphs": []}]}, ["found no question"]),
    "record no object": ([edited(), "x"], ["record[1]: found 'x'"]),
    "line no object": (json.dumps(edited()) + "\n3", ["line 2: found 3"]),
    "unknown columns": ({"data": [{"text": "a", "label": 1}]}, ["data[0]", "columns ['label', 'text']"]),
    "nested in flat": ([edited(), *nested(flat_rows())["data"]], ["record[1]", "['paragraphs', 'title']"]),
    "nested outside data": (nested(flat_rows())["data"], ["record[0]", "paragraphs", 'under "data"']),
    "flat in nested": ({"data": nested(flat_rows())["data"] + [edited()]}, ["data[1]", "'question'"]),
    "paragraphs no list": (edited_nested(lambda a: a.update(paragraphs={})), ['data[0]: "paragraphs" is {}']),
    "paragraph no object": (edited_nested(lambda a: a["paragraphs"].append(1)), ["data[0].paragraphs[2]: found 1"]),
    "qas missing": (edited_nested(lambda a: a["paragraphs"][1].pop("qas")), ['paragraphs[1]: "qas" is missing']),
    "qa no object": (edited_nested(lambda a: a["paragraphs"][0]["qas"].append(None)), ["qas[3]: found None"]),
    "nested context": (edited_nested(lambda a: a["paragraphs"][0].pop("context")), ['[0]: "context" is missing']),
    "nested answers flat": (
        edited_nested(lambda a: a["paragraphs"][0]["qas"][1].update(answers={"text": []})),
        ["data[0].paragraphs[0].qas[1]", '"answers" is', "list of objects"],
    ),
    "nested answer key": (
        edited_nested(lambda a: a["paragraphs"][0]["qas"][1]["answers"][0].pop("text")),
        ["data[0].paragraphs[0].qas[1] (id 'q1')", '"answers.text[0]" is missing'],
    ),
    "squad v2": (
        edited_nested(lambda a: a["paragraphs"][0]["qas"][0].update(answers=[], is_impossible=True)),
        ["(id 'q0')", '"answers" is empty', "v1.1"],
    ),
    "id missing": ([edited(id=...)], ['record[0] (id missing): "id" is missing']),
    "id number": ([edited(id=7)], ['"id" is 7', "text"]),
    "question blank": ([edited(question=" ")], ["""(id 'q0'): "question" is ' '"""]),
    "context blank": ([edited(context="")], ["""(id 'q0'): "context" is ''"""]),
    "context list": ([edited(context=["a"])], ["""(id 'q0'): "context" is ['a']"""]),
    "title number": ([edited(title=0)], ["""(id 'q0'): "title" is 0"""]),
    "surrogate": ([edited(question="a\ud800")], ['"question" is', "\\ud800", "Unicode"]),
    "answers missing": ([edited(answers=...)], ['"answers" is missing']),
    "answers list": ([edited(answers=[{"text": "a", "answer_start": 0}])], ['"answers" is [{', '{"text": [...]']),
    "answers empty": (edited_answers([], []), ['"answers" is empty', "at least one"]),
    "answer lengths": (edited_answers(["Norse"], [1, 2]), ["{'text': 1, 'answer_start': 2}"]),
    "answer number": (edited_answers([10], [0]), ['"answers.text[0]" is 10']),
    "answer blank": (edited_answers(["The", ""], [0, 0]), ["""answers.text[1]" is ''"""]),
    "start string": (edited_answers(["The"], ["0"]), ["""answer_start[0]" is '0'""", "integer"]),
    "start bool": (edited_answers(["The"], [False]), ['answer_start[0]" is False', "integer"]),
    "start negative": (edited_answers([NORMANS[-3:]], [-3]), ['answer_start[0]" is -3', "0 or more"]),
    "start off": (edited_answers(["Normans"], [3]), ['answer_start[0]" is 3', "' Norman'", "'Normans'"]),
    "start past end": (edited_answers(["Normans"], [9999]), ['answer_start[0]" is 9999', "''"]),
    "duplicate id": ([edited(), edited(question="b")], ["record[1] (id 'q0'): \"id\" is that of record[0]"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_file_record_key_found_allowed(tmp_path, name):
    content, parts = REFUSED[name]
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(ValueError) as error:
        load_squad_json(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "allowed: " in message
    for part in parts:
        assert part in message, message


def test_faults_are_collected(tmp_path):
    rows = [edited(id=f"x{index}", question="") for index in range(14)]
    with pytest.raises(ValueError) as error:
        load_squad_json(write(tmp_path / "bad.json", rows))
    message = str(error.value)
    assert "14 fault(s)" in message and "'x9'" in message and "'x10'" not in message and "and 4 more" in message


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        load_squad_json(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="is a folder"):
        load_squad_json(tmp_path)
    (tmp_path / "latin").write_bytes(b'["\xe9"]')
    with pytest.raises(ValueError, match="not UTF-8"):
        load_squad_json(tmp_path / "latin")


def test_datasets_from_files(tmp_path):
    path = str(write(tmp_path / "squad.json", nested(flat_rows())))
    loaded = load_qa_datasets(train_file=path, validation_file=path, test_file=path)
    assert set(loaded) == {"train", "validation", "test"}
    assert loaded["train"].features == SQUAD_FEATURES and loaded["train"][:] == batch(flat_rows())
    # a split that the run does not need is not even opened
    assert set(load_qa_datasets(train_file="nowhere", validation_file=path, splits=["validation"])) == {"validation"}
    with pytest.raises(ValueError, match="--train_file"):
        load_qa_datasets(validation_file=path, splits=["train", "validation"])
    with pytest.raises(ValueError, match="--dataset_name"):
        load_qa_datasets()
    with pytest.raises(ValueError, match="--validation_file"):
        load_qa_datasets(train_file=path, splits=["validation"])


def test_datasets_by_name(tmp_path):
    folder = tmp_path / "by_name"
    folder.mkdir()
    rows = flat_rows()
    for row in rows:
        del row["title"]
    write(folder / "train.jsonl", "\n".join(json.dumps({**row, "extra": 1}) for row in rows))
    write(folder / "validation.jsonl", json.dumps({**rows[0], "extra": 1}))
    cache = str(tmp_path / "cache")
    loaded = load_qa_datasets(str(folder), cache_dir=cache)
    assert loaded["train"].features == SQUAD_FEATURES and loaded["train"]["title"][0] == ""
    assert loaded["train"][3]["answers"] == rows[3]["answers"] and len(loaded["validation"]) == 1
    # a file replaces the split of its name
    path = str(write(tmp_path / "own.json", flat_rows()))
    loaded = load_qa_datasets(str(folder), validation_file=path, cache_dir=cache)
    assert len(loaded["validation"]) == len(LABELS) and len(loaded["train"]) == len(LABELS)

    official = tmp_path / "official"
    official.mkdir()
    write(official / "train.jsonl", json.dumps(nested(flat_rows())["data"][0]))
    with pytest.raises(ValueError, match="found the columns .*paragraphs.*--train_file"):
        load_qa_datasets(str(official), cache_dir=cache)


HUB_FAULTS = {
    "duplicate id": (dict(id="q1", question="other"), "\"id\" is that of row 1 (id 'q1')"),
    "no answer": (dict(answers={"text": [], "answer_start": []}), '"answers" is empty'),
    "null answers": (dict(answers=None), '"answers" is None'),
    "null id": (dict(id=None), '"id" is None'),
    "blank question": (dict(question=" "), "\"question\" is ' '"),
    "answer elsewhere": (dict(answers={"text": ["Normans"], "answer_start": [5]}), '"answers.answer_start[0]" is 5'),
    "answer lengths": (dict(answers={"text": ["Normans"], "answer_start": [4, 5]}), "as many starts as texts"),
    "negative start": (dict(answers={"text": ["Normans"], "answer_start": [-1]}), "0 or more"),
    "fraction": (dict(answers={"text": ["Normans"], "answer_start": [4.5]}), "columns of other types"),
}


@pytest.mark.parametrize("name", HUB_FAULTS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_hub_data_passes_the_checks_of_files(tmp_path, name, split):
    change, message = HUB_FAULTS[name]
    rows = [*flat_rows(), {**flat_rows()[0], "id": "new", **change}]
    write(tmp_path / f"{split}.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError) as caught:
        load_qa_datasets(str(tmp_path), cache_dir=str(tmp_path / "cache"), splits=[split])
    assert message in str(caught.value) and f"{tmp_path}, split {split}" in str(caught.value)


def test_hub_test_split_may_lack_answers(tmp_path):
    rows = [*flat_rows(), {**flat_rows()[0], "id": "new", "answers": {"text": [], "answer_start": []}}]
    write(tmp_path / "test.jsonl", "\n".join(map(json.dumps, rows)))
    loaded = load_qa_datasets(str(tmp_path), cache_dir=str(tmp_path / "cache"), splits=["test"])
    assert len(loaded["test"]) == len(rows)


def test_hub_data_that_cannot_be_read_is_one_error(tmp_path):
    write(tmp_path / "train.jsonl", '{"id": "a"}\n{"id"')
    with pytest.raises(UserError, match="--dataset_name .*cannot be read"):
        load_qa_datasets(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole" / "train.jsonl", "\n".join(map(json.dumps, flat_rows())))
    with pytest.raises(UserError, match="no_such_config"):
        load_qa_datasets(str(tmp_path / "whole"), "no_such_config", cache_dir=str(tmp_path / "cache"))


def test_check_of_hub_data_is_fast():
    """SQuAD has 87,599 training questions: a second or two in all."""
    row = {**flat_rows()[0], "answers": {"text": ["Normans"], "answer_start": [4]}}
    many = datasets.Dataset.from_list([{**row, "id": f"x{n}"} for n in range(20_000)], features=SQUAD_FEATURES)
    start = time.process_time()
    assert sum(1 for _ in squad_data._checked("x", squad_data._rows_of(many), True, [])) == len(many)
    assert time.process_time() - start < 2


def test_hub_out_of_reach(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'squad' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConnectionError, match="--dataset_name squad.*--train_file, --validation_file"):
        load_qa_datasets("squad")
    path = str(write(tmp_path / "squad.json", flat_rows()))
    assert set(load_qa_datasets("squad", validation_file=path, splits=["validation"])) == {"validation"}


# ---- features ----------------------------------------------------------------------------------------------------


def char_offsets(tokenizer, row, max_seq_length, doc_stride, separator="\n"):
    return prepare_validation_features(batch([row]), tokenizer, max_seq_length, doc_stride, separator)


def test_question_comes_first_then_separator_then_context(tokenizer):
    rows = flat_rows()
    features = prepare_validation_features(batch(rows), tokenizer, 512, 16, " |")
    assert features["example_id"] == [row["id"] for row in rows]
    for row, ids, offsets, length in zip(rows, features["input_ids"], features["offset_mapping"], features["length"]):
        assert tokenizer.decode(ids) == row["question"].lstrip() + " |" + row["context"]
        prompt = len(tokenizer(row["question"].lstrip() + " |")["input_ids"])
        assert offsets[:prompt] == [None] * prompt and None not in offsets[prompt:]
        assert (offsets[prompt][0], offsets[-1][1]) == (0, len(row["context"])) and length == len(ids) == len(offsets)


@pytest.mark.parametrize("separator", ["", " ", "\n", "<|endoftext|>"])
@pytest.mark.parametrize("max_seq_length, doc_stride", [(400, 32), (48, 16), (40, 0)])
def test_gold_answers_map_back(tokenizer, max_seq_length, doc_stride, separator):
    rows = flat_rows()
    examples = batch(rows)
    windows = prepare_validation_features(examples, tokenizer, max_seq_length, doc_stride, separator)
    labels = prepare_train_features(examples, tokenizer, max_seq_length, doc_stride, separator)
    assert labels["input_ids"] == windows["input_ids"] and labels["length"] == windows["length"]
    assert max(windows["length"]) <= max_seq_length
    by_id = {row["id"]: row for row in rows}
    found = dict.fromkeys(by_id, 0)
    for example_id, offsets, start, end in zip(
        windows["example_id"], windows["offset_mapping"], labels["start_positions"], labels["end_positions"]
    ):
        row = by_id[example_id]
        text, char_start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        char_end = char_start + len(text)
        context_tokens = [index for index, offset in enumerate(offsets) if offset]
        # by definition, one token at a time: all context tokens that share a character with the answer
        touching = [i for i in context_tokens if offsets[i][0] < char_end and offsets[i][1] > char_start]
        whole = offsets[context_tokens[0]][0] <= char_start and offsets[context_tokens[-1]][1] >= char_end
        assert (start, end) == ((touching[0], touching[-1]) if whole else (NULL_POSITION, NULL_POSITION))
        if whole:
            found[example_id] += 1
            covered = row["context"][offsets[start][0] : offsets[end][1]]
            assert text in covered and covered.strip() == text
    if doc_stride:
        assert min(found.values()) >= 1


def test_windows_cover_the_context_and_overlap_by_the_stride(tokenizer):
    row = flat_row("long", NORMANS * 5, "Who?", ["Normans"])
    for doc_stride in (0, 7, 30):
        offsets = char_offsets(tokenizer, row, 50, doc_stride)["offset_mapping"]
        whole = [offset for offset in char_offsets(tokenizer, row, 5000, 0)["offset_mapping"][0] if offset]
        windows = [[offset for offset in window if offset] for window in offsets]
        assert len(windows) > 3
        joined = list(windows[0])
        for before, window in zip(windows, windows[1:]):
            assert window[:doc_stride] == before[len(before) - doc_stride :]
            joined += window[doc_stride:]
        assert joined == whole


def test_first_answer_is_the_label_and_outer_whitespace_is_not(tokenizer):
    row = flat_row("q", RIVER, "q?", [" 813 km ", "Geneva"])
    offsets = char_offsets(tokenizer, row, 400, 8)["offset_mapping"][0]
    labels = prepare_train_features(batch([row]), tokenizer, 400, 8, "\n")
    start, end = labels["start_positions"][0], labels["end_positions"][0]
    assert RIVER[offsets[start][0] : offsets[end][1]].strip() == "813 km"
    assert offsets[end][1] == RIVER.index(" long")


def test_null_position_is_token_zero_and_never_an_answer(tokenizer):
    row = flat_row("q", NORMANS * 3, "Who?", ["Norse"])
    labels = prepare_train_features(batch([row]), tokenizer, 50, 10, "\n")
    spans = list(zip(labels["start_positions"], labels["end_positions"]))
    assert NULL_POSITION == 0 and (0, 0) in spans and any(start > 0 for start, _ in spans)
    assert all((start == 0) == (end == 0) for start, end in spans)
    assert char_offsets(tokenizer, row, 50, 10)["offset_mapping"][0][NULL_POSITION] is None


def test_other_fast_tokenizers():
    """Special tokens in front, between and behind, and offsets without the leading space."""
    template = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>",
        pair="<|endoftext|> $A <|endoftext|> $B <|endoftext|>",
        special_tokens=[("<|endoftext|>", 0)],
    )
    trimmed = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    special = train_tokenizer(post_processor=trimmed)
    rows = flat_rows()
    windows = prepare_validation_features(batch(rows), special, 48, 16, " ")
    labels = prepare_train_features(batch(rows), special, 48, 16, " ")
    assert max(windows["length"]) <= 48
    by_id = {row["id"]: row for row in rows}
    found = set()
    for index, example_id in enumerate(windows["example_id"]):
        offsets = windows["offset_mapping"][index]
        assert offsets[0] is None and offsets[-1] is None
        start, end = labels["start_positions"][index], labels["end_positions"][index]
        if start:
            found.add(example_id)
            row = by_id[example_id]
            assert row["context"][offsets[start][0] : offsets[end][1]] == row["answers"]["text"][0]
    assert found == set(by_id)


def test_question_too_long_is_one_error(tokenizer):
    rows = [flat_rows()[0], flat_row("long-one", NORMANS, NORMANS, ["Norse"])]
    taken = len(tokenizer(NORMANS + "\n")["input_ids"])
    for prepare in (prepare_train_features, prepare_validation_features):
        for max_seq_length in (40, taken, taken + 16):
            with pytest.raises(ValueError, match=f"'long-one'.* {taken} of the {max_seq_length} .*--doc_stride 16"):
                prepare(batch(rows), tokenizer, max_seq_length, 16, "\n")
        assert len(prepare(batch(rows), tokenizer, taken + 17, 16, "\n")["input_ids"]) >= 2


def test_other_refusals_of_the_features(tokenizer):
    class Slow:
        is_fast = False

    rows = flat_rows()
    with pytest.raises(ValueError, match="Slow is a slow tokenizer"):
        prepare_train_features(batch(rows), Slow(), 64, 8, "\n")
    with pytest.raises(ValueError, match="doc_stride=-1"):
        prepare_train_features(batch(rows), tokenizer, 64, -1, "\n")
    rows[2]["answers"] = {"text": [], "answer_start": []}
    with pytest.raises(ValueError, match="'q2': has no answer"):
        prepare_train_features(batch(rows), tokenizer, 64, 8, "\n")
    assert prepare_validation_features(batch(rows), tokenizer, 64, 8, "\n")
    rows[2]["answers"] = {"text": ["Norse"], "answer_start": [3]}
    with pytest.raises(ValueError, match="'q2': answer_start=3, .*' Norm'.*'Norse'"):
        prepare_train_features(batch(rows), tokenizer, 64, 8, "\n")


def test_features_through_dataset_map(tokenizer, tmp_path):
    rows = datasets.Dataset.from_list(flat_rows(), features=SQUAD_FEATURES)
    options = {"tokenizer": tokenizer, "max_seq_length": 48, "doc_stride": 16, "separator": "\n"}
    direct = prepare_validation_features(rows[:], **options)
    mapped = rows.map(
        prepare_validation_features, batched=True, batch_size=2, remove_columns=rows.column_names, fn_kwargs=options
    )
    assert mapped["input_ids"][:] == direct["input_ids"] and mapped["example_id"][:] == direct["example_id"]
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, len(mapped), 48)).astype(np.float32)
    expected = postprocess_qa_predictions(flat_rows(), direct, logits)
    assert postprocess_qa_predictions(rows, mapped, logits) == expected
    order = rng.permutation(len(mapped))
    assert postprocess_qa_predictions(rows, mapped.select(order), logits[:, order]) == expected
    columns = [dict(zip(direct, values)) for values in zip(*direct.values())]
    assert postprocess_qa_predictions(flat_rows(), columns, logits) == expected


# ---- post-processing ---------------------------------------------------------------------------------------------

WORDS = "one two three four five six seven eight"
WORD_OFFSETS = [(0, 3), (3, 7), (7, 13), (13, 18), (18, 23), (23, 27), (27, 33), (33, 39)]  # spaces lead, as in GPT-2


def window(first=0, stop=8, question=2, example_id="e"):
    return {"example_id": example_id, "offset_mapping": [None] * question + WORD_OFFSETS[first:stop]}


def logits(rows, width=None):
    """(start, end) arrays from ({position: start}, {position: end}, length) a feature; else -10, padding 99."""
    width = width or max(length for _, _, length in rows)
    arrays = np.full((2, len(rows), width), 99.0, dtype=np.float32)
    for index, (starts, ends, length) in enumerate(rows):
        arrays[:, index, :length] = -10
        for array, values in zip(arrays, (starts, ends)):
            for position, value in values.items():
                array[index, position] = value
    return arrays[0], arrays[1]


def answer(rows, features, n_best_size=20, max_answer_length=30, width=None, context=WORDS):
    examples = [{"id": "e", "context": context}]
    texts, nbest = postprocess_qa_predictions(examples, features, logits(rows, width), n_best_size, max_answer_length)
    return texts["e"], nbest["e"]


def test_best_span_and_probabilities():
    text, nbest = answer([({4: 5, 3: 4}, {5: 3, 6: 2}, 10)], [window()], n_best_size=3)
    assert text == "three four"
    assert [(entry["text"], entry["start_logit"] + entry["end_logit"]) for entry in nbest] == [
        ("three four", 8),
        ("two three four", 7),
        ("three four five", 7),
    ]
    weights = np.exp([0.0, -1.0, -1.0])
    np.testing.assert_allclose([entry["probability"] for entry in nbest], weights / weights.sum(), rtol=1e-12)
    json.dumps(nbest)


@pytest.mark.parametrize(
    "starts, ends, max_answer_length, expected",
    [
        ({2: 9, 5: 5}, {9: 9, 6: 5}, 30, "one two three four five six seven eight"),
        ({2: 9, 5: 5}, {9: 9, 6: 5}, 8, "one two three four five six seven eight"),
        ({2: 9, 5: 9}, {9: 9, 6: 5}, 7, "four five six seven eight"),
        ({2: 9, 5: 5}, {9: 9, 6: 9}, 4, "four five"),
        ({6: 9, 3: 1}, {4: 9, 6: -9}, 30, "two three"),  # 6..4 would score 18 and ends before it starts
        ({0: 50, 4: 1}, {1: 50, 4: 1}, 30, "three"),  # the question scores 100
        ({1: 50, 4: 1}, {4: 3, 5: 2}, 30, "three"),  # a start in the question
        ({2: 9}, {2: 9}, 1, "one"),
    ],
)
def test_valid_spans_only(starts, ends, max_answer_length, expected):
    assert answer([(starts, ends, 10)], [window()], max_answer_length=max_answer_length)[0] == expected


def test_exact_where_the_best_starts_and_ends_do_not_pair():
    """The two best starts stand after the two best ends: the pairing heuristic with n = 2 finds nothing."""
    rows = [({8: 9, 9: 9, 4: 8}, {2: 9, 3: 9, 5: 8}, 10)]
    assert answer(rows, [window()], n_best_size=2)[0] == "three four"


def test_best_over_all_windows_once_a_place():
    features = [window(0, 5), window(3, 8)]  # "four", "five" stand in both
    rows = [({2: 1, 5: 3}, {2: 1, 5: 3}, 7), ({2: 4, 6: 1}, {2: 4, 6: 1}, 7)]
    text, nbest = answer(rows, features)
    assert text == "four"
    assert len({entry["text"] for entry in nbest}) == len(nbest)
    assert nbest[0]["start_logit"] == 4.0


def test_ties_go_to_the_earliest_and_shortest():
    flat = [({}, {}, 10)]
    text, nbest = answer(flat, [window()], n_best_size=4)
    assert text == "one"
    assert [entry["text"] for entry in nbest] == ["one", "one two", "one two three", "one two three four"]


@pytest.mark.parametrize("seed", range(6))
def test_against_all_pairs(seed):
    """Small integer logits (many ties), overlapping windows, padding and feature order at random."""
    rng = np.random.default_rng(seed)
    spans = [(0, 5), (3, 8), (2, 6)]
    examples = [{"id": f"e{i}", "context": WORDS} for i in range(5)]
    features = [
        window(*span, question=int(rng.integers(1, 4)), example_id=row["id"]) for row in examples for span in spans
    ]
    values = rng.integers(-3, 4, size=(2, len(features), 12)).astype(np.float32)
    n_best, longest = int(rng.integers(1, 12)), int(rng.integers(1, 5))

    expected = {}
    for row in examples:
        found = {}
        for index, feature in enumerate(features):
            if feature["example_id"] != row["id"]:
                continue
            offsets = feature["offset_mapping"]
            for first in range(len(offsets)):
                for last in range(first, min(first + longest, len(offsets))):
                    if offsets[first] and offsets[last]:
                        place = offsets[first][0], offsets[last][1]
                        start, end = values[0, index, first], values[1, index, last]
                        found[place] = min(found.get(place, (99,)), (-float(start + end), *place, -float(start)))
        ranked = sorted(found.values())[:n_best]
        expected[row["id"]] = [(WORDS[begin:stop].strip(), -negative) for negative, begin, stop, _ in ranked]

    def answers_in(order, arrays):
        texts, nbest = postprocess_qa_predictions(examples, [features[i] for i in order], arrays, n_best, longest)
        assert list(texts) == [row["id"] for row in examples]
        assert all(texts[key] == nbest[key][0]["text"] for key in texts)
        return nbest

    straight = answers_in(range(len(features)), values)
    found = {key: [(e["text"], e["start_logit"] + e["end_logit"]) for e in best] for key, best in straight.items()}
    assert found == expected
    order = rng.permutation(len(features))
    padded = np.concatenate([values, np.full((2, len(features), 7), np.nan, dtype=np.float32)], axis=2)
    assert answers_in(order, padded[:, order]) == straight


def test_whitespace_is_no_answer_and_is_stripped():
    context = "one  \n two"
    offsets = [(0, 3), (3, 4), (4, 5), (5, 6), (6, 10)]
    features = [{"example_id": "e", "offset_mapping": [None, *offsets]}]
    text, nbest = answer([({2: 9, 3: 8}, {3: 9, 5: 1}, 6)], features, context=context)
    assert text == "two" and [entry["text"] for entry in nbest].count("two") == 1
    assert "" not in [entry["text"] for entry in nbest]


def test_no_candidate_gives_the_empty_string():
    examples = [{"id": "a", "context": WORDS}, {"id": "b", "context": WORDS}, {"id": "c", "context": WORDS}]
    features = [{"example_id": "a", "offset_mapping": [None, None, None]}, window(example_id="b")]
    arrays = np.zeros((2, 2, 10), dtype=np.float16)
    arrays[0, 1] = -np.inf
    assert postprocess_qa_predictions(examples, features, arrays) == (
        {"a": "", "b": "", "c": ""},
        {"a": [], "b": [], "c": []},
    )


def test_refusals_of_post_processing():
    examples, features = [{"id": "e", "context": WORDS}], [window()]
    good = np.zeros((2, 1, 10))
    for bad in (good[:1], good[:, :, :9], np.zeros((2, 2, 10)), np.zeros((2, 10))):
        with pytest.raises(ValueError, match="shape.*10 tokens or more"):
            postprocess_qa_predictions(examples, features, bad)
    for value in (np.nan, np.inf):
        bad = good.copy()
        bad[1, 0, 5] = value
        with pytest.raises(ValueError, match="'e'.*NaN or"):
            postprocess_qa_predictions(examples, features, bad)
    with pytest.raises(ValueError, match="feature 0 is of 'x'"):
        postprocess_qa_predictions(examples, [window(example_id="x")], good)
    with pytest.raises(ValueError, match="n_best_size=0"):
        postprocess_qa_predictions(examples, features, good, n_best_size=0)


# ---- EM and F1 ---------------------------------------------------------------------------------------------------

SCORES = {  # prediction, gold texts, exact match, F1
    "same": ("Denver Broncos", ["Denver Broncos"], 1, 1),
    "case, article, punctuation": ("The  denver-BRONCOS!", ["denverbroncos"], 1, 1),
    "half": ("Denver Broncos", ["Denver"], 0, 2 / 3),
    "best of several": ("in Denver", ["Colorado", "Denver", "in Denver, Colorado"], 0, 0.8),
    "em and f1 from different golds": ("x y", ["x y", "x"], 1, 1),
    "multiset": ("a b b c", ["b c c"], 0, 2 / 3),
    "articles are whole words": ("another theory", ["theory"], 0, 2 / 3),
    "article inside a hyphen": ("the-end", ["end"], 0, 0),
    "article at an apostrophe": ("the's", ["thes"], 1, 1),
    "unicode punctuation stays": ("10th – 11th", ["10th 11th"], 0, 0.8),
    "article beside unicode punctuation": ("the–end", ["–end"], 1, 1),
    "quotes of other scripts stay": ("“cat”", ["cat"], 0, 0),
    "no-break space is whitespace": ("red\u00a0cat", ["red cat"], 1, 1),
    "empty prediction": ("", ["cat"], 0, 0),
    "both empty after normalisation": ("The.", ["a"], 1, 0),
    "empty gold": ("cat", ["the"], 0, 0),
    "accents count": ("cafe", ["café"], 0, 0),
    "underscore is punctuation": ("a_b", ["ab"], 1, 1),
    "upper case beyond ASCII": ("ÉCOLE", ["école"], 1, 1),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_by_hand(name):
    prediction, golds, exact, overlap = SCORES[name]
    assert squad_em_f1_per_example({"x": prediction}, {"x": golds})["x"] == (exact, pytest.approx(overlap, abs=1e-15))
    scores = squad_em_f1({"x": prediction}, {"x": golds})
    assert scores == {"exact_match": 100.0 * exact, "f1": pytest.approx(100 * overlap, abs=1e-12)}


def test_missing_counts_zero_and_surplus_nothing():
    references = {"a": ["x"], "b": ["y"], "c": ["z"], "d": ["w"]}
    predictions = {"a": "x", "b": "y q", "surplus": "x"}
    assert squad_em_f1(predictions, references) == {"exact_match": 25.0, "f1": pytest.approx(100 * (1 + 2 / 3) / 4)}
    assert list(squad_em_f1_per_example(predictions, references)) == ["a", "b", "c", "d"]


def test_refusals_of_the_metric():
    for references in ({}, {"a": []}, {"a": "text"}, {"a": [1]}):
        with pytest.raises(ValueError, match="allowed"):
            squad_em_f1({}, references)
    with pytest.raises(ValueError, match="prediction 'a' is 3"):
        squad_em_f1({"a": 3}, {"a": ["x"]})


def slow_words(text):
    """The rules one character at a time, without regular expressions."""
    text = "".join(char for char in text.lower() if not (char.isascii() and unicodedata.category(char)[0] in "PS"))
    pieces, run = [], ""
    for char in text + " ":
        if char.isalnum():
            run += char
            continue
        pieces.append(" " if run in ("a", "an", "the") else run)
        pieces.append(char)
        run = ""
    words, word = [], ""
    for char in "".join(pieces):
        if not char.isspace():
            word += char
        elif word:
            words.append(word)
            word = ""
    return words


def slow_scores(prediction, golds):
    exact, overlap = 0, 0
    words = slow_words(prediction)
    for gold in map(slow_words, golds):
        exact = max(exact, int(" ".join(words) == " ".join(gold)))
        left = list(gold)
        common = 0
        for word in words:
            if word in left:
                left.remove(word)
                common += 1
        if common:
            overlap = max(overlap, 2 * common / (len(words) + len(gold)))
    return exact, overlap


def test_scores_against_a_slow_checker():
    rng = random.Random(0)
    pieces = [
        "a",
        "an",
        "the",
        "The",
        "A",
        "cat",
        "dog",
        "-",
        "'s",
        ",",
        "–",
        "”",
        " ",
        " ",
        "  ",
        "\t",
        "\u00a0",
        "_",
    ]
    pieces += ["$", "^", "`", "é", "e\u0301", "a\u0301", "10", "½", "İ", "\u200b", "東京"]

    def text():
        return "".join(rng.choice(pieces) for _ in range(rng.randrange(0, 9)))

    exact_count = 0
    for _ in range(8_000):
        prediction, golds = text(), [text() for _ in range(rng.randrange(1, 4))]
        exact, overlap = slow_scores(prediction, golds)
        ours = squad_em_f1_per_example({"x": prediction}, {"x": golds})["x"]
        assert ours == (exact, pytest.approx(overlap, abs=1e-12)), (prediction, golds)
        exact_count += exact
    assert exact_count > 100


METRIC_IN_TWO_PROCESSES = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import evaluate
second = os.fork()
metric = evaluate.load(os.path.join(sys.argv[1], "common/squad_metric"), keep_in_memory=True)
predictions, references = json.load(open(sys.argv[2]))
for _ in range(2):
    scores = metric.compute(predictions=predictions, references=references)
with open("first.json" if second else "second.json", "w") as handle:
    json.dump(scores, handle)
if second:
    assert os.waitpid(second, 0)[1] == 0
"""


@pytest.fixture
def metric_case():
    texts, golds = {"a": "the Denver", "b": "x y"}, {"a": ["Denver Broncos", "Denver"], "b": ["x y z"]}
    predictions = [{"id": key, "prediction_text": text} for key, text in texts.items()]
    references = [{"id": key, "answers": {"text": t, "answer_start": [0] * len(t)}} for key, t in golds.items()]
    return predictions, references, squad_em_f1(texts, golds)


def test_metric_module_from_another_folder(tmp_path, monkeypatch, metric_case):
    import evaluate  # here, because it takes seconds

    monkeypatch.chdir(tmp_path)
    metric = evaluate.load(str(REPO / "base_model" / "common" / "squad_metric"), keep_in_memory=True)
    predictions, references, expected = metric_case
    assert expected == {"exact_match": 50.0, "f1": pytest.approx(90.0)}
    for _ in range(2):
        assert metric.compute(predictions=predictions, references=references) == expected


@pytest.mark.slow
def test_metric_module_offline_in_two_processes(tmp_path, metric_case):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    data = write(tmp_path / "data.json", metric_case[:2])
    command = [sys.executable, "-c", METRIC_IN_TWO_PROCESSES, str(REPO / "base_model"), str(data)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("first.json", "second.json"):
        assert json.loads((tmp_path / name).read_text()) == metric_case[2]


# ---- files -------------------------------------------------------------------------------------------------------


def test_write_json_atomic(tmp_path, monkeypatch):
    path = tmp_path / "new" / "predictions.json"
    write_json_atomic(path, {"q": "R\u00f4ne"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"q": "R\u00f4ne"} and "R\u00f4ne" in path.read_text(
        "utf-8"
    )
    for bad in ({"x": object()}, {"x": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            write_json_atomic(path, bad)

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_json_atomic(path, {})
    assert json.loads(path.read_text(encoding="utf-8")) == {"q": "R\u00f4ne"}
    assert os.listdir(path.parent) == ["predictions.json"]


# ---- the real data -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2_tokenizer():
    if not (SHARED / "gpt2-tokenizer").exists():
        pytest.skip("no GPT-2 tokenizer")
    return AutoTokenizer.from_pretrained(SHARED / "gpt2-tokenizer")


def check_real_data(dataset, gpt2_tokenizer, max_seq_length, min_exact):
    """Labels of the first answers as one-hot logits come back as the answers; returns the share that is exact."""
    options = {"tokenizer": gpt2_tokenizer, "max_seq_length": max_seq_length, "doc_stride": 128, "separator": "\n"}
    common = {"batched": True, "remove_columns": dataset.column_names, "fn_kwargs": options}
    windows = dataset.map(prepare_validation_features, **common)
    labels = dataset.map(prepare_train_features, **common)
    starts, ends = np.array(labels["start_positions"]), np.array(labels["end_positions"])
    arrays = np.zeros((2, len(windows), max(windows["length"])), dtype=np.float32)
    arrays[0, np.arange(len(windows)), starts] = 1
    arrays[1, np.arange(len(windows)), ends] = 1
    texts, _ = postprocess_qa_predictions(dataset, windows, arrays, n_best_size=1, max_answer_length=200)
    golds = {row["id"]: row["answers"]["text"][0] for row in dataset}
    assert set(texts) == set(golds)
    answered = {example_id for example_id, start in zip(windows["example_id"], starts) if start}
    assert len(answered) >= 0.999 * len(golds)
    # where an answer begins or ends inside a token, the span is a little wider, never off
    assert all(golds[example_id].strip() in texts[example_id] for example_id in answered)
    exact = np.mean([golds[example_id].strip() == texts[example_id] for example_id in answered])
    assert exact >= min_exact
    scores = squad_em_f1(texts, {row["id"]: row["answers"]["text"] for row in dataset})
    assert scores["exact_match"] >= 100 * min_exact and scores["f1"] > scores["exact_match"]


@needs_squad
def test_real_data_subset(gpt2_tokenizer):
    dataset = load_qa_datasets(validation_file=str(DEV_FILE))["validation"]
    assert len(dataset) == 10570
    check_real_data(dataset.select(range(0, len(dataset), 40)), gpt2_tokenizer, 256, 0.95)


@needs_squad
@pytest.mark.slow
@pytest.mark.parametrize("split", ["dev", "train"])
def test_real_data_full(gpt2_tokenizer, split):
    path = {"dev": DEV_FILE, "train": TRAIN_FILE}[split]
    dataset = load_qa_datasets(validation_file=str(path))["validation"]
    assert len(dataset) == {"dev": 10570, "train": 87599}[split]
    check_real_data(dataset, gpt2_tokenizer, 384, 0.95)
