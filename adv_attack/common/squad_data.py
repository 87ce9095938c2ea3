"""Read SQuAD data from the hub or from local files, and refuse broken records with one message."""

import json
import logging
import os
import re

import datasets
import pyarrow as pa

from models.errors import UserError

logger = logging.getLogger(__name__)

MAX_FAULTS_SHOWN = 10
COLUMNS = ["id", "title", "context", "question", "answers"]
_STRING = datasets.Value("string")
_ANSWERS = {"text": datasets.List(_STRING), "answer_start": datasets.List(datasets.Value("int32"))}
SQUAD_FEATURES = datasets.Features({column: _ANSWERS if column == "answers" else _STRING for column in COLUMNS})
_FLAT_ROW = '{"id", "context", "question", "answers": {"text": [...], "answer_start": [...]}}'
_NESTED = '{"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers": [...]}]}]}]}'
_FORMS = f'the official SQuAD form {_NESTED}, or rows {_FLAT_ROW} as a list, as {{"data": [...]}} or one a line'


_MISSING = type("Missing", (), {"__repr__": lambda self: "missing"})()  # in place of a value
_SURROGATE = re.compile("[\ud800-\udfff]")


def load_squad_json(
    path: str | os.PathLike, require_answers: bool = True, version_2_with_negative: bool = False
) -> list[dict]:
    """Reads a SQuAD file, nested or flat, and checks every record.

    Args: path: the official nested JSON, or flat rows (a JSON list, {"data": [rows]}, JSON lines).
        require_answers: False accepts questions without answer (a test set); they get empty lists.
        version_2_with_negative: True accepts questions whose list of answers is empty: there is no answer (SQuAD v2).
    Returns: rows {"id", "title", "context", "question", "answers": {"text": [str], "answer_start": [int]}} in file
        order; `answer_start` counts characters of the context.
    Raises: FileNotFoundError; ValueError with all faults of the file (10 in full), each naming record, key, what was
        found and what is allowed.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such data file; allowed: {_FORMS}")
    faults: list[str] = []
    rows = []
    least = _least_answers(require_answers, version_2_with_negative)
    for record in _checked(path, _flatten(_read_records(path), faults), least, faults):
        answers = {key: record["answers"][key] if "answers" in record else [] for key in _ANSWERS}
        rows.append({**{key: record.get(key) or "" for key in COLUMNS}, "answers": answers})
    return rows


def _least_answers(require_answers: bool, version_2_with_negative: bool) -> int | None:
    """How many answers a record must have; None where it may lack them altogether."""
    return (0 if version_2_with_negative else 1) if require_answers else None


def _checked(source: str, records, least_answers: int | None, faults: list[str]):
    """Yields the good ones of (where, record) pairs, and raises all faults at the end: of files and hub data alike."""
    first_with_id = {}
    for where, record in records:
        where += f" (id {_show(record.get('id', _MISSING))})"
        if found := _record_faults(where, record, least_answers):
            faults += found
            continue
        first = first_with_id.setdefault(record["id"], where)
        if first != where:
            faults.append(f'{where}: "id" is that of {first}; allowed: an id that no other record has')
        yield record
    if faults:
        more = [f"... and {len(faults) - MAX_FAULTS_SHOWN} more"] if len(faults) > MAX_FAULTS_SHOWN else []
        lines = "\n  - ".join(faults[:MAX_FAULTS_SHOWN] + more)
        raise UserError(f"{source}: {len(faults)} fault(s) in the records:\n  - {lines}")
    if not first_with_id:
        raise UserError(f"{source}: found no question; allowed: at least one, in {_FORMS}")


def _read_records(path: str) -> list[tuple[str, object]]:
    """The top-level records as (where, record)."""

    def refuse(found, cause=None):
        raise UserError(f"{path}: {found}; allowed: {_FORMS}") from cause

    if os.path.isdir(path):
        refuse("is a folder")
    try:
        with open(path, encoding="utf-8-sig") as handle:
            text = handle.read()
    except UnicodeDecodeError as error:
        refuse(f"is not UTF-8 text ({error})", error)
    if not text.strip():
        refuse("is empty")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        records = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                records += [(f"line {number}", json.loads(line))] if line.strip() else []
            except (ValueError, RecursionError) as line_error:
                # one JSON object on the first line is what tells JSON lines from a broken JSON file
                if records and isinstance(records[0][1], dict):
                    refuse(f"line {number} is not JSON ({line_error})", line_error)
                refuse(f"is not JSON ({error})", error)
        return records
    label = "record"
    if isinstance(content, dict) and "data" in content:
        content, label = content["data"], "data"
    elif isinstance(content, dict) and {"context", "question"} & set(content):
        content = [content]  # JSON lines with a single line
    elif isinstance(content, dict):
        refuse(f'found the keys {_show(sorted(content))} and no "data"')
    if not isinstance(content, list):
        refuse(f"found {_show(content)} instead of a list of records")
    return [(f"{label}[{index}]", record) for index, record in enumerate(content)]


def _flatten(records: list[tuple[str, object]], faults: list[str]):
    """Yields (where, flat record) for each question; a record of no form, or not of the first one's, is a fault."""
    first_kind = None
    for where, record in records:
        if not isinstance(record, dict):
            faults.append(f"{where}: found {_show(record)}; allowed: an object {{...}}")
            continue
        kind = "nested" if "paragraphs" in record else "flat" if {"context", "question"} & set(record) else None
        first_kind = first_kind or kind
        if kind is None or kind != first_kind or (kind == "nested" and not where.startswith("data")):
            allowed = 'articles with "paragraphs" (under "data"), or rows with "context", "question"; one form a file'
            faults.append(f"{where}: found the columns {_show(sorted(record))}; allowed: {allowed}")
        elif kind == "flat":
            yield where, record
        else:
            for where_paragraph, paragraph in _objects_at(where, record, "paragraphs", faults):
                context = paragraph.get("context", _MISSING)
                if not _is_text(context):  # one fault, not one for each question of the paragraph
                    faults.append(_text_fault(where_paragraph, "context", context))
                    continue
                for where_qa, qa in _objects_at(where_paragraph, paragraph, "qas", faults):
                    flat = {**qa, "context": context, "title": record.get("title")}
                    if "answers" in qa:
                        known = len(faults)
                        answers = [answer for _, answer in _objects_at(where_qa, qa, "answers", faults)]
                        if len(faults) > known:
                            continue
                        flat["answers"] = {key: [answer.get(key, _MISSING) for answer in answers] for key in _ANSWERS}
                    yield where_qa, flat


def _objects_at(where: str, record: dict, key: str, faults: list[str]):
    """Yields (where, object) for the list of objects at record[key]."""
    items = record.get(key, _MISSING)
    if not isinstance(items, list):
        faults.append(f'{where}: "{key}" is {_show(items)}; allowed: a list of objects')
        return
    for index, item in enumerate(items):
        if isinstance(item, dict):
            yield f"{where}.{key}[{index}]", item
        else:
            faults.append(f"{where}.{key}[{index}]: found {_show(item)}; allowed: an object {{...}}")


def _record_faults(where: str, record: dict, least_answers: int | None) -> list[str]:
    texts = [(key, record.get(key, _MISSING)) for key in ("id", "question", "context")]
    texts += [("title", record["title"])] if record.get("title") not in (None, "") else []
    faults = [_text_fault(where, key, value) for key, value in texts if not _is_text(value)]
    answers = record.get("answers", _MISSING)
    if answers is _MISSING and least_answers is None:
        return faults
    if not isinstance(answers, dict) or not all(isinstance(answers.get(key), list) for key in _ANSWERS):
        return [*faults, f'{where}: "answers" is {_show(answers)}; allowed: {{"text": [...], "answer_start": [...]}}']
    counts = {key: len(answers[key]) for key in _ANSWERS}
    if len(set(counts.values())) > 1:
        return [*faults, f'{where}: "answers" has the lengths {counts}; allowed: as many starts as texts']
    if least_answers and not answers["text"]:
        allowed = "at least one answer (SQuAD v1.1), or none with --version_2_with_negative (SQuAD v2)"
        faults.append(f'{where}: "answers" is empty; allowed: {allowed}')
    for index, (text, start) in enumerate(zip(answers["text"], answers["answer_start"], strict=True)):
        if not _is_text(text):
            faults.append(_text_fault(where, f"answers.text[{index}]", text))
            continue
        place = f'{where}: "answers.answer_start[{index}]" is {_show(start)}'
        if type(start) is not int or start < 0:
            faults.append(f"{place}; allowed: an integer, 0 or more")
        elif isinstance(record.get("context"), str) and not record["context"].startswith(text, start):
            there = _show(record["context"][start : start + len(text)])
            allowed = f"a position where it has the answer {_show(text)}"
            faults.append(f"{place}, where the context has {there}; allowed: {allowed}")
    return faults


def _is_text(value) -> bool:
    """A string, not blank, without lone surrogates: JSON can spell those, tokenizers and Arrow cannot hold them."""
    return isinstance(value, str) and bool(value.strip()) and (value.isascii() or not _SURROGATE.search(value))


def _text_fault(where: str, key: str, value) -> str:
    return f'{where}: "{key}" is {_show(value)}; allowed: a text that is not blank, in valid Unicode'


def _show(value) -> str:
    try:
        shown = ascii(value) if isinstance(value, str) and _SURROGATE.search(value) else repr(value)
    except RecursionError:
        shown = f"a {type(value).__name__}, nested too deeply"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def load_qa_datasets(
    dataset_name=None,
    config_name=None,
    train_file=None,
    validation_file=None,
    test_file=None,
    splits=None,
    version_2_with_negative=False,
    **options,
) -> datasets.DatasetDict:
    """Loads SQuAD-format data from the hub, from local files, or both: a file replaces the hub's split of its name.

    Args: dataset_name, config_name, options (cache_dir, token, revision): for `datasets.load_dataset`.
        train_file, validation_file, test_file: read by load_squad_json; the test split may lack answers.
        splits: what the run needs; nothing else is read, and the hub is asked only for a split without file.
            None takes every file given and every split of the hub's.
        version_2_with_negative: questions may have an empty list of answers.
    Returns: DatasetDict with the columns id, title, context, question, answers (SQUAD_FEATURES).
    Raises: ValueError (no data for a split, other columns, faulty records), FileNotFoundError, ConnectionError.
    """
    given = {"train": train_file, "validation": validation_file, "test": test_file}
    files = {split: path for split, path in given.items() if path and (splits is None or split in splits)}
    result = {}
    if dataset_name and (splits is None or not set(splits) <= set(files)):
        try:
            on_hub = datasets.load_dataset(dataset_name, config_name, **options)
        except ConnectionError as error:
            raise ConnectionError(
                f"--dataset_name {dataset_name}: the hub cannot be reached, and the cache has no copy ({error}); "
                "offline, pass SQuAD files with --train_file, --validation_file (and --test_file) instead"
            ) from error
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
            raise UserError(f"--dataset_name {dataset_name}: cannot be read ({error.__cause__ or error})") from error
        for split in on_hub:
            if split not in files and (splits is None or split in splits):
                name = f"--dataset_name {dataset_name}, split {split}"
                result[split] = _as_squad_columns(on_hub[split], name)
                least = _least_answers(split != "test", version_2_with_negative)
                for _ in _checked(name, _rows_of(result[split]), least, []):
                    pass
    for split, path in files.items():
        rows = load_squad_json(path, split != "test", version_2_with_negative)
        result[split] = datasets.Dataset.from_list(rows, features=SQUAD_FEATURES)
    for split in splits or (() if result else ("train",)):
        if split not in result:
            raise UserError(
                f"no data for the split {split} (dataset_name={dataset_name!r}, {split}_file={given.get(split)!r}); "
                f"pass --dataset_name (for example squad) or --{split}_file"
            )
    for split, dataset in result.items():
        logger.info("%s: %d questions of %s", split, len(dataset), files.get(split, dataset_name))
    return datasets.DatasetDict(result)


def _as_squad_columns(dataset: datasets.Dataset, name: str) -> datasets.Dataset:
    answers = dataset.features.get("answers")
    lacking = set(COLUMNS) - {"title"} - set(dataset.column_names)
    if lacking or not isinstance(answers, dict) or not set(_ANSWERS) <= set(answers):
        raise UserError(
            f"{name}: found the columns {_show(dataset.column_names)}, answers as {_show(answers)}; allowed: "
            f"{_FLAT_ROW}. The official nested JSON goes to --train_file or --validation_file."
        )
    if "title" not in dataset.column_names:
        dataset = dataset.add_column("title", [""] * len(dataset))
    dataset = dataset.select_columns(COLUMNS)
    if dataset.features == SQUAD_FEATURES:
        return dataset
    try:
        return dataset.cast(SQUAD_FEATURES)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"{name}: columns of other types ({error}); allowed: {_FLAT_ROW}") from error


def _rows_of(dataset: datasets.Dataset):
    """Yields (where, row); through Arrow in batches, which takes a second for SQuAD."""
    batches = dataset.with_format("arrow").iter(batch_size=1000)
    for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
        yield f"row {number}", row
