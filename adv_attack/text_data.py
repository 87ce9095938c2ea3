"""Labelled texts: a data set of the hub, or a local JSON-lines or CSV file with "text" and "label"."""

import csv
import os
import re

import datasets

from models.errors import UserError
from models.user_input import parse_json, show

SUFFIXES = (".jsonl", ".json", ".csv")
CSV_FIELD_LIMIT = 1 << 24  # characters of one CSV field; Python's own limit is shorter than long reviews
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell lone ones, tokenizers cannot read them


def load_texts(*, dataset_name=None, dataset_config_name=None, files, splits, columns=("text", "label"), **hub):
    """{split: [{"text": str, "label": int}, ...]} of the splits that a run needs.

    Args: files: {split: path or None}; a local file goes before the hub. columns: of text and label. hub: cache_dir,
        token.
    Raises: ValueError naming file, line, key and what is allowed. FileNotFoundError.
    """
    rows = {}
    for split in splits:
        if files.get(split):
            rows[split] = read_text_file(files[split], columns)
        elif dataset_name:
            rows[split] = _from_hub(dataset_name, dataset_config_name, split, columns, hub)
        else:
            raise UserError(f"no data for {split}: pass --{split}_file or --dataset_name")
    return rows


def read_text_file(path, columns=("text", "label")):
    """[{"text", "label"}] of one local file; see `load_texts`."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    if not path.endswith(SUFFIXES):
        raise UserError(f"{path}: allowed are {', '.join(SUFFIXES)} (JSON: one object a line)")
    reader = _csv_rows if path.endswith(".csv") else _json_rows
    return _checked(((f"{path}, line {line}", row) for line, row in reader(path)), path, columns)


def _json_rows(path):
    with open(path, encoding="utf-8-sig") as file:
        for line, text in enumerate(_decoded(file, path), 1):
            if text.strip():
                yield line, parse_json(text, f"{path}, line {line}")


def _csv_rows(path):
    csv.field_size_limit(CSV_FIELD_LIMIT)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(_decoded(file, path), strict=True)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _decoded(file, path):
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None


def _checked(rows, source, columns):
    """[{"text", "label"}] of (place, row) pairs: the one door of files and hub data."""
    checked = [_check(row, place, columns) for place, row in rows]
    if not checked:
        raise UserError(f"{source}: no rows in it")
    return checked


def _check(row, place, columns):
    if not isinstance(row, dict):
        raise UserError(f"{place}: want an object with {' and '.join(columns)}, found {type(row).__name__}")
    if absent := [key for key in columns if row.get(key) is None]:
        found = ", ".join(str(key)[:80] for key in list(row)[:10]) or "nothing"
        raise UserError(f"{place}: no {show(absent[0])}; found {found}{', ...' if len(row) > 10 else ''}")
    if None in row:  # csv.DictReader keeps there what has no name: an unquoted comma has cut a text in two
        raise UserError(f"{place}: more fields than the header names, from {show(row[None][0])} on; quote texts")
    text, label = (row[key] for key in columns)
    if not isinstance(text, str) or not text.strip() or SURROGATE.search(text):
        allowed = "allowed is a text that is not empty, in valid Unicode"
        raise UserError(f"{place}: {show(columns[0])} = {show(text)}: {allowed}")
    if isinstance(label, str) and re.fullmatch("[0-9]{1,9}", label):
        label = int(label)  # CSV knows only strings
    if type(label) is not int or label < 0:
        raise UserError(f"{place}: {show(columns[1])} = {show(label)}: allowed are the integers 0, 1, ...")
    return {"text": text, "label": label}


def _from_hub(name, config, split, columns, hub):
    try:
        found = datasets.load_dataset(name, config, **hub)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise UserError(f"--dataset_name {name}: cannot be read ({error.__cause__ or error})") from error
    if split == "validation" and split not in found:
        split = "test"  # ag_news, imdb and dbpedia have no validation split
    if split not in found:
        raise UserError(f"{name}: no split {split}; found {', '.join(found)}")
    if absent := [key for key in columns if key not in found[split].column_names]:
        names = ", ".join(found[split].column_names)
        raise UserError(f"{name}: no column {absent[0]}; found {names} (--text_column, --label_column)")
    pairs = zip(*(found[split][key] for key in columns), strict=True)
    rows = ((f"{name}, {split} row {n}", dict(zip(columns, pair, strict=True))) for n, pair in enumerate(pairs))
    return _checked(rows, f"{name}, {split}", columns)


def number_of_classes(rows, source):
    """Number of labels 0, 1, ...; every one must occur in the training rows. Raises ValueError."""
    labels = {row["label"] for row in rows}
    if max(labels) >= len(labels) or len(labels) < 2:
        wanted = "the labels must be 0 to K-1, at least two, each with a row"
        raise UserError(f"{source}: labels {show(sorted(labels)[:10])}: {wanted}")
    return len(labels)


def check_labels(rows, num_labels, source):
    """Raise ValueError for a label that the classifier does not have."""
    for number, row in enumerate(rows):
        if row["label"] >= num_labels:
            found = f"{source}, row {number + 1}: label {show(row['label'])}"
            raise UserError(f"{found}: the classifier has 0 to {num_labels - 1}")
