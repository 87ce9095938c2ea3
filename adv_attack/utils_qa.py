"""Extractive question answering on SQuAD: build token windows, turn logits into text, score EM/F1 of v1.1.

In the order of a run: prepare_train_features or prepare_validation_features (for `Dataset.map(batched=True)`) -> the
model -> postprocess_qa_predictions -> squad_em_f1 (v2: common/squad_v2.py).
No model, trainer or command line here.
"""

import logging
import re
import string
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import itemgetter

import numpy as np

from common.answer_spans import best_spans, column, feature_offsets, merge_windows, null_odds
from models.errors import UserError

logger = logging.getLogger(__name__)

NULL_POSITION = 0  # label of a window that does not hold the whole answer, see prepare_train_features
_NOWHERE = -1, -1  # characters of the answer of a question without one: before any window


def prepare_train_features(
    examples: Mapping[str, list],
    tokenizer,
    max_seq_length: int,
    doc_stride: int,
    separator: str,
    version_2_with_negative: bool = False,
) -> dict[str, list]:
    """Token windows with start and end labels, for `Dataset.map(batched=True)`.

    A window is the question (left-stripped) + separator, then as much of the untouched context as fits; no padding.
    The label is the tightest token span that covers the first answer's characters (outer whitespace aside; GPT-2's
    tokens begin with their space). A window that does not hold the whole answer gets NULL_POSITION twice. GPT-2 has no
    CLS token, so the null position is token 0 of the window: the first token of the question, or the BOS/CLS that
    another tokenizer adds. It does not move with right padding, and is no context token, so never part of an answer.

    With version_2_with_negative (SQuAD v2) a question may have no answer, and a window says so by its last position:
    in a causal model the first has seen neither question nor context. Every window ends there with the end-of-text
    token, so that no context token means both; windows that do not hold the whole answer are labelled there too.

    Args: examples: a batch with id, question, context, answers. tokenizer: a fast one. max_seq_length: tokens in a
        window, at most. doc_stride: tokens that two neighbouring windows share. separator: text, any.
    Returns: input_ids, attention_mask (token_type_ids where the tokenizer has them), length (tokens), start_positions,
        end_positions (token indices in the window, inclusive); a row is a window, in the order of the examples.
    Raises: ValueError for a slow tokenizer, and naming the example: a question that leaves no more than doc_stride
        tokens for the context, no answer (but in v2), an answer that is not at its answer_start.
    """
    v2 = version_2_with_negative
    encoded, example_of = _tokenize_windows(examples, tokenizer, max_seq_length, doc_stride, separator, v2)
    rows = zip(*(examples[key] for key in ("id", "context", "answers")))
    answers = [_NOWHERE if v2 and not row[2]["text"] else _first_answer_span(*row) for row in rows]
    labels = []
    for window, offsets in enumerate(encoded.pop("offset_mapping")):
        first, stop = _context_token_range(encoded, window)
        char_start, char_end = answers[example_of[window]]
        if first == stop or offsets[first][0] > char_start or offsets[stop - 1][1] < char_end:
            labels.append((len(offsets) - 1 if v2 else NULL_POSITION,) * 2)
            continue
        # several tokens can be bytes of one character and have equal offsets: the label takes all of them
        start = bisect_right(offsets, char_start, first, stop, key=itemgetter(1))
        labels.append((start, bisect_left(offsets, char_end, first, stop, key=itemgetter(0)) - 1))
    starts, ends = zip(*labels)
    return {**encoded, "start_positions": list(starts), "end_positions": list(ends)}


def prepare_validation_features(
    examples: Mapping[str, list],
    tokenizer,
    max_seq_length: int,
    doc_stride: int,
    separator: str,
    version_2_with_negative: bool = False,
) -> dict[str, list]:
    """The windows of prepare_train_features, with what post-processing needs in place of labels.

    Args, Raises: as prepare_train_features; answers are not read.
    Returns: input_ids, attention_mask (token_type_ids), length (tokens), example_id, offset_mapping: a token's
        [start, end) in characters of the context, None for a token that is not context.
    """
    settings = max_seq_length, doc_stride, separator, version_2_with_negative
    encoded, example_of = _tokenize_windows(examples, tokenizer, *settings)
    for window, offsets in enumerate(encoded["offset_mapping"]):
        first, stop = _context_token_range(encoded, window)
        encoded["offset_mapping"][window] = [None] * first + offsets[first:stop] + [None] * (len(offsets) - stop)
    return {**encoded, "example_id": [examples["id"][index] for index in example_of]}


def _tokenize_windows(examples, tokenizer, max_seq_length, doc_stride, separator, ends_with_null):
    """Returns the encoding with offset_mapping and length, and for each window the index of its example."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} is a slow tokenizer, without character offsets; "
            "allowed: a fast one (AutoTokenizer.from_pretrained(..., use_fast=True))"
        )
    if ends_with_null and tokenizer.eos_token_id is None:
        raise UserError("--version_2_with_negative: the tokenizer has no end-of-text token, which ends every window")
    if max_seq_length < 1 or doc_stride < 0:
        raise UserError(f"max_seq_length={max_seq_length}, doc_stride={doc_stride}; allowed: 1 or more, 0 or more")
    # SQuAD has questions with leading spaces; they would only cost window
    prompts = [question.lstrip() + separator for question in examples["question"]]
    # measured first, because the tokenizer's own truncation panics (in Rust) where a window cannot advance
    room = max_seq_length - ends_with_null - tokenizer.num_special_tokens_to_add(pair=True)
    for index, ids in enumerate(tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]):
        if room - len(ids) <= doc_stride:
            raise UserError(
                f"example {examples['id'][index]!r}: question and separator take {len(ids)} of the {room} tokens that "
                f"--max_seq_length {max_seq_length} has for text and leave {max(0, room - len(ids))} for the context; "
                f"allowed: more than --doc_stride {doc_stride}. Raise --max_seq_length or lower --doc_stride."
            )
    encoded = tokenizer(
        prompts,
        list(examples["context"]),
        truncation="only_second",
        max_length=max_seq_length - ends_with_null,
        stride=doc_stride,
        padding=False,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    example_of = encoded.pop("overflow_to_sample_mapping")
    null = {"input_ids": tokenizer.eos_token_id, "attention_mask": 1, "token_type_ids": 0, "offset_mapping": (0, 0)}
    for name in null.keys() & encoded.keys() if ends_with_null else ():
        for row in encoded[name]:
            row.append(null[name])
    encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
    return encoded, example_of


def _context_token_range(encoded, window: int) -> tuple[int, int]:
    """First context token and one past the last; equal when the window holds none."""
    sequence_ids = encoded.sequence_ids(window)
    count = sequence_ids.count(1)
    first = sequence_ids.index(1) if count else 0
    return first, first + count


def _first_answer_span(example_id: str, context: str, answers: dict) -> tuple[int, int]:
    """Characters [start, end) of the first answer, without outer whitespace."""
    if not answers["text"]:
        raise UserError(f"example {example_id!r}: has no answer; allowed for training: at least one")
    text, start = answers["text"][0], answers["answer_start"][0]
    if not text.strip() or start < 0 or not context.startswith(text, start):
        there = context[max(start, 0) :][: len(text)]
        raise UserError(
            f"example {example_id!r}: answer_start={start}, where the context has {there!r}; "
            f"allowed: a position where it has the answer {text!r}, which must not be blank"
        )
    start += len(text) - len(text.lstrip())
    return start, start + len(text.strip())


def gold_labels(features, examples, version_2_with_negative: bool = False) -> np.ndarray:
    """Start and end token of the first gold answer in each window, labelled as prepare_train_features does.

    Args: features: of prepare_validation_features, in any order. examples: their Dataset or rows with id and answers.
    Returns: (num_features, 2) int64.
    """
    spans = {}
    for example_id, answers in zip(column(examples, "id"), column(examples, "answers"), strict=True):
        if version_2_with_negative and not answers["text"]:
            spans[example_id] = _NOWHERE
            continue
        text, start = answers["text"][0], answers["answer_start"][0]
        start += len(text) - len(text.lstrip())
        spans[example_id] = start, start + len(text.strip())
    example_ids, bounds, char_starts, char_ends = feature_offsets(features)
    labels = np.full((len(example_ids), 2), NULL_POSITION)
    if version_2_with_negative:
        labels += np.diff(bounds)[:, None] - 1
    for window, example_id in enumerate(example_ids):
        tokens = slice(bounds[window], bounds[window + 1])
        context = np.flatnonzero(char_starts[tokens] >= 0)  # without a gap
        if not context.size:
            continue
        starts, ends = char_starts[tokens][context], char_ends[tokens][context]
        char_start, char_end = spans[example_id]
        if starts[0] <= char_start and ends[-1] >= char_end:
            labels[window] = context[0] + np.array(
                [np.searchsorted(ends, char_start, "right"), np.searchsorted(starts, char_end, "left") - 1]
            )
    return labels


def postprocess_qa_predictions(
    examples,
    features,
    predictions,
    n_best_size: int = 20,
    max_answer_length: int = 30,
    null_threshold: float | None = None,
) -> tuple[dict[str, str], dict[str, list[dict]]]:
    """Turns start and end logits into answer texts.

    Candidates are all spans of context tokens with start <= end and at most max_answer_length tokens, over all windows
    of an example; the score is start logit + end logit. The search is exact, where the usual heuristic pairs only the
    n best starts with the n best ends. Ties go to the earlier start, then the earlier end, then the greater start
    logit, so neither padding nor the order of the features matters. Spans of whitespace are no candidates.

    Args: examples: Dataset or rows with id, context. features: Dataset, rows or columns with example_id and
        offset_mapping (prepare_validation_features), in any order, the same as that of the logits.
        predictions: (start_logits, end_logits), float arrays (num_features, T) with T no less than the longest
        feature's tokens; what lies past a feature's own tokens is not read, -inf excludes a token.
        null_threshold: None for v1.1. In v2 the last token of a feature stands for "no answer", as the training
        features have it; its score for a question is the least over the windows, and the text is "" where that is
        greater than the score of the best span by more than this. The n-best lists then hold it besides, as "".
    Returns: ({id: text}, {id: [{"text", "start_logit", "end_logit", "probability"}, ...]}) in the order of the
        examples. A text is a slice of the context without outer whitespace; the lists hold up to n_best_size different
        places, best first; probability is the softmax of the scores in the list. No candidate: "" and [].
    Raises: ValueError for other shapes, NaN or +inf logits, a feature of an unknown example.

    Example: context "red kite" in five tokens Q, newline, "red", " kite", padding: offset_mapping is [None, None,
        [0, 3], [3, 8]]. With start logits (9, 9, 2, 1, 9) and end logits (9, 9, 0, 3, 9) the spans are "red kite"
        2 + 3, "kite" 1 + 3 and "red" 2 + 0: question and padding are not read. The text is "red kite", its probability
        that of 5 among 5, 4 and 2.
    """
    if n_best_size < 1 or max_answer_length < 1:
        raise UserError(f"n_best_size={n_best_size}, max_answer_length={max_answer_length}; allowed: 1 or more")
    example_ids, bounds, char_starts, char_ends = feature_offsets(features)
    longest = int(np.diff(bounds).max(initial=0))
    logits = [np.asarray(array) for array in predictions]
    if len(logits) != 2 or any(
        array.ndim != 2 or len(array) != len(example_ids) or array.shape[1] < longest for array in logits
    ):
        raise UserError(
            f"predictions have the shapes {[array.shape for array in logits]}; allowed: start and end logits of shape "
            f"({len(example_ids)} features, {longest} tokens or more)"
        )
    ids, contexts = column(examples, "id"), column(examples, "context")
    windows_of: dict[str, list[int]] = {example_id: [] for example_id in ids}
    for window, example_id in enumerate(example_ids):
        if example_id not in windows_of:
            raise UserError(f"feature {window} is of {example_id!r}, which is not among the {len(ids)} examples")
        windows_of[example_id].append(window)
    without = sum(not windows for windows in windows_of.values())
    if without:
        logger.warning("%d of %d examples have no feature and get an empty answer", without, len(ids))

    texts, nbest, known_context = {}, {}, None
    for example_id, context in zip(ids, contexts, strict=True):
        if context != known_context:  # questions of one paragraph follow each other
            known_context = context
            # (characters + 1,): how many characters before this one are not whitespace
            visible = np.cumsum(np.array([False] + [not char.isspace() for char in context]))
        candidates, nulls = [], []
        for window in windows_of[example_id]:
            tokens = bounds[window] + np.flatnonzero(char_starts[bounds[window] : bounds[window + 1]] >= 0)
            begins, ends = char_starts[tokens], char_ends[tokens]
            start_logits, end_logits = (array[window, tokens - bounds[window]].astype(np.float64) for array in logits)
            if not ((start_logits < np.inf).all() and (end_logits < np.inf).all()):
                raise UserError(f"example {example_id!r}: found NaN or +inf logits; allowed: numbers, or -inf")
            first, last = best_spans(
                start_logits, end_logits, visible[begins], visible[ends], n_best_size, max_answer_length
            )
            candidates.append((begins[first], ends[last], start_logits[first], end_logits[last]))
            if null_threshold is not None:
                nulls.append([float(array[window, bounds[window + 1] - bounds[window] - 1]) for array in logits])
                if not np.isfinite(nulls[-1]).all():
                    raise UserError(f"example {example_id!r}: found {nulls[-1]} for no answer; allowed: finite logits")
        nbest[example_id] = merge_windows(context, candidates, n_best_size, min(nulls, key=sum, default=None))
        spans = [entry for entry in nbest[example_id] if entry["text"]]
        no_answer = null_threshold is not None and null_odds(nbest[example_id]) > null_threshold
        texts[example_id] = spans[0]["text"] if spans and not no_answer else ""
    return texts, nbest


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def squad_em_f1(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 in percent, as the official SQuAD v1.1 evaluation has them.

    Args: predictions: {id: text}; ids without reference are ignored. references: {id: [gold text, ...]}.
    Returns: {"exact_match", "f1"}: means over all references; a missing prediction counts 0.
    Raises: ValueError for no references, a reference without gold text, a prediction that is no text.
    Source: Rajpurkar et al. 2016 (arXiv:1606.05250) Sec. 6.1, and the rules of the published v1.1 evaluation.
    """
    scores = squad_em_f1_per_example(predictions, references).values()
    if not scores:
        raise UserError("found no references; allowed: at least one")
    # scaled once, after the sum: the official order of operations, so equal to the last digit
    return {name: 100.0 * sum(column) / len(scores) for name, column in zip(("exact_match", "f1"), zip(*scores))}


def squad_em_f1_per_example(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, tuple[float, float]]:
    """{id: (exact match, F1)}, each 0..1 and the best over the gold texts, in the order of the references.

    Args, Raises, Source: as squad_em_f1, which averages these.
    """
    scores = {}
    for example_id, golds in references.items():
        if isinstance(golds, str) or not len(golds) or not all(isinstance(gold, str) for gold in golds):
            raise UserError(f"reference {example_id!r} is {golds!r}; allowed: a list of at least one text")
        prediction = predictions.get(example_id)
        if prediction is not None and not isinstance(prediction, str):
            raise UserError(f"prediction {example_id!r} is {prediction!r}; allowed: a text")
        scores[example_id] = (0.0, 0.0)
        if prediction is not None:
            words, golds = answer_words(prediction), [answer_words(gold) for gold in golds]
            scores[example_id] = (float(words in golds), max(word_f1(words, gold) for gold in golds))
    return scores


def answer_words(text: str) -> list[str]:
    """Lower case, then no ASCII punctuation (other scripts' stays), then no articles, split at whitespace."""
    return _ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def word_f1(words: list[str], gold: list[str]) -> float:
    """F1 of two word multisets; without a common word 0, in v1.1 for two empty texts too, though their EM is 1."""
    common = sum((Counter(words) & Counter(gold)).values())
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(gold)
    return 2 * precision * recall / (precision + recall)
