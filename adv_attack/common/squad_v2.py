"""EM and F1 of SQuAD v2, where a question may have no answer: its prediction is then "".

Written from Rajpurkar et al. 2018 (arXiv:1806.03822) and the rules of the published v2 evaluation, in its order of
operations, so that the numbers are equal to the last digit.
"""

import math
from collections.abc import Mapping, Sequence

from models.errors import UserError
from utils_qa import answer_words, word_f1

PARTS = {"HasAns_exact": "HasAns EM", "HasAns_f1": "HasAns F1", "NoAns_exact": "NoAns EM"}  # columns of a table


def squad_v2_per_example(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, tuple[float, float]]:
    """{id: (exact match, F1)}, each 0..1 and the best over the gold texts, in the order of the references.

    Gold texts without a word once normalized do not count; where none is left, the gold text is "".

    Args: predictions: {id: text}, "" for no answer; ids without reference are ignored. references: {id: [gold text,
        ...]}, [] for a question without answer.
    Raises: UserError for a question without prediction, a prediction or a gold text that is no text.
    """
    scores = {}
    for example_id, golds in references.items():
        if isinstance(golds, str) or not all(isinstance(gold, str) for gold in golds):
            raise UserError(f"reference {example_id!r} is {golds!r}; allowed: a list of texts, [] for no answer")
        if not isinstance(prediction := predictions.get(example_id), str):
            raise UserError(f'prediction {example_id!r} is {prediction!r}; allowed: a text, "" for no answer')
        words = answer_words(prediction)
        gold_words = [found for found in map(answer_words, golds) if found] or [[]]
        scores[example_id] = (float(words in gold_words), max(_overlap(words, gold) for gold in gold_words))
    return scores


def _overlap(words: list[str], gold: list[str]) -> float:
    return word_f1(words, gold) if words and gold else float(words == gold)


def squad_v2_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    no_answer_probabilities: Mapping[str, float] | None = None,
    no_answer_threshold: float = 1.0,
) -> dict[str, float]:
    """The numbers of the v2 evaluation, under the names of Hugging Face's metric.

    Args: predictions, references: as squad_v2_per_example. no_answer_probabilities: {id: number, the greater the less
        an answer is likely}, on any scale; None: 0 for all. no_answer_threshold: what is above it counts as "".
    Returns: exact, f1 (percent, means over all references), total; the same with HasAns_ and NoAns_ before it, where
        there are such questions; best_exact, best_f1 and their thresholds ..._thresh: the best that answering up to
        some probability, and no further, would have given. A prediction that is "" stays "" there.
    Raises: UserError for no references, a question without probability, and as squad_v2_per_example.
    """
    raw = squad_v2_per_example(predictions, references)
    if not raw:
        raise UserError("found no references; allowed: at least one")
    odds = dict.fromkeys(predictions, 0.0) if no_answer_probabilities is None else no_answer_probabilities
    if lacking := [example_id for example_id in raw if example_id not in odds]:
        raise UserError(f"no-answer probability of {lacking[0]!r} is missing; allowed: one for each question")
    answerable = {example_id: len(references[example_id]) > 0 for example_id in raw}
    scores = {}
    for example_id, pair in raw.items():
        unanswered = odds[example_id] > no_answer_threshold
        scores[example_id] = (float(not answerable[example_id]),) * 2 if unanswered else pair
    result = _means(list(scores.values()), "")
    for prefix, kind in (("HasAns_", True), ("NoAns_", False)):
        if chosen := [pair for example_id, pair in scores.items() if answerable[example_id] is kind]:
            result |= _means(chosen, prefix)
    for column, name in enumerate(("best_exact", "best_f1")):
        values = {example_id: pair[column] for example_id, pair in raw.items()}
        result[name], result[f"{name}_thresh"] = _best(values, predictions, answerable, odds)
    return result


def _means(pairs, prefix):
    exact, f1 = (100.0 * sum(column) / len(pairs) for column in zip(*pairs))
    return {f"{prefix}exact": exact, f"{prefix}f1": f1, f"{prefix}total": len(pairs)}


def _best(values, predictions, answerable, odds):
    """(percent, threshold): questions are answered by ascending odds, equal ones in the order of their keys."""
    best = current = sum(not known for known in answerable.values())  # none is answered
    threshold = 0.0
    for example_id in sorted(odds, key=odds.get):
        if example_id in values:
            current += values[example_id] if answerable[example_id] else -bool(predictions[example_id])
            if current > best:
                best, threshold = current, odds[example_id]
    return 100.0 * best / len(values), threshold


def compute_metrics(prediction, per_example=False, null_odds=None):
    """What `data.make_metric` gives for v2: `squad_v2_scores`, with exact_match, the name in v1.1, beside exact.

    null_odds: {id: odds}, by which the predictions have decided already; the best thresholds are on their scale.
    """
    texts, references = prediction.predictions, prediction.label_ids
    if per_example:
        return {"per_example": list(squad_v2_per_example(texts, references).values())}
    scores = squad_v2_scores(texts, references, null_odds, math.inf)
    return {"exact_match": scores["exact"], **scores}
