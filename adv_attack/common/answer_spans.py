"""The parts of `utils_qa.postprocess_qa_predictions`: token offsets, the best spans of a window, windows merged."""

import math
from collections.abc import Mapping

import datasets
import numpy as np
import pyarrow as pa
from numpy.lib.stride_tricks import sliding_window_view


def feature_offsets(features):
    """Returns example_ids, bounds (num_features + 1,), and start and end characters of all tokens, -1 off the context.

    The tokens of feature i are bounds[i]:bounds[i + 1]. Read through Arrow: no Python object for each token.
    """
    if isinstance(features, datasets.Dataset):
        table = features.select_columns(["example_id", "offset_mapping"]).with_format("arrow")[:]
        example_ids, offsets = table["example_id"].to_pylist(), table["offset_mapping"].combine_chunks()
    else:
        example_ids = column(features, "example_id")
        offsets = pa.array(column(features, "offset_mapping"), type=pa.list_(pa.list_(pa.int64())))
    pairs = offsets.values
    is_context = pairs.is_valid().to_numpy(zero_copy_only=False)
    position = pairs.offsets.to_numpy()[:-1][is_context]
    characters = pairs.values.to_numpy(zero_copy_only=False)
    starts, ends = np.full(len(pairs), -1), np.full(len(pairs), -1)
    starts[is_context], ends[is_context] = characters[position], characters[position + 1]
    return example_ids, offsets.offsets.to_numpy(), starts, ends


def best_spans(start_logits, end_logits, visible_before, visible_until, n_best: int, max_tokens: int):
    """The n best spans of one window, ties by (first, last) token.

    Args: start_logits, end_logits: (tokens,) float64. visible_before, visible_until: (tokens,) how many characters of
        the context that are not whitespace come before the token's start, and before its end.
    Returns: first and last token of each span, two arrays of at most n_best, in no particular order.
    """
    width = min(max_tokens, len(start_logits))
    if not width:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    # (tokens, width): row i, column k is the span from token i to token i + k
    scores = start_logits[:, None] + sliding_window_view(np.append(end_logits, np.full(width - 1, -np.inf)), width)
    if (visible_until <= visible_before).any():
        until = sliding_window_view(np.append(visible_until, np.zeros(width - 1, dtype=np.int64)), width)
        scores[until <= visible_before[:, None]] = -np.inf
    scores = scores.ravel()
    picked = np.arange(scores.size)
    if scores.size > n_best:
        threshold = np.partition(scores, scores.size - n_best)[scores.size - n_best]
        above = np.flatnonzero(scores > threshold)
        # raveled order is (first, last) order: of equal scores the earliest are taken
        picked = np.append(above, np.flatnonzero(scores == threshold)[: n_best - above.size])
    picked = picked[scores[picked] > -np.inf]
    return picked // width, picked // width + picked % width


def merge_windows(context: str, candidates: list[tuple], n_best: int, null=None) -> list[dict]:
    """The n best of the windows' (begin characters, end characters, start logits, end logits), a place only once.

    null: (start logit, end logit) of "no answer", which gets an entry with the text "" in its place by score.
    """
    if not candidates:
        return []
    begins, ends, start_logits, end_logits = map(np.concatenate, zip(*candidates))
    scores = start_logits + end_logits
    entries = {}
    for index in np.lexsort((-start_logits, ends, begins, -scores)).tolist():
        span = context[begins[index] : ends[index]]
        text = span.strip()
        # windows overlap, and whitespace tokens give several spans of the same text
        place = (begins[index] + len(span) - len(span.lstrip()), len(text))
        if len(entries) < n_best and place not in entries:
            entries[place] = (text, float(start_logits[index]), float(end_logits[index]), scores[index])
    best = list(entries.values())
    if null is not None:
        best = sorted([*best, ("", *null, sum(null))], key=lambda entry: -entry[-1])
    weights = [math.exp(score - best[0][-1]) for *_, score in best]
    total = sum(weights)
    return [
        {"text": text, "start_logit": start, "end_logit": end, "probability": weight / total}
        for (text, start, end, _), weight in zip(best, weights)
    ]


def null_odds(entries: list[dict]) -> float:
    """Score of "no answer" less that of the best span, from a question's n-best list; what is not there scores 0."""
    scores = [(entry["text"] == "", entry["start_logit"] + entry["end_logit"]) for entry in entries]
    null, span = (max((score for is_null, score in scores if is_null is kind), default=0.0) for kind in (True, False))
    return null - span


def column(rows, name: str) -> list:
    if isinstance(rows, datasets.Dataset | Mapping):
        return list(rows[name])
    return [row[name] for row in rows]
