"""Statistics over questions: percentile bootstrap intervals, paired differences, McNemar's exact test.

Questions are the units of resampling. SQuAD asks several questions about one paragraph, so the true intervals are a
little wider than these; they hold the model fixed and say nothing about the spread over training seeds.
"""

import numpy as np
from scipy.stats import binomtest

METRICS = ("exact_match", "f1")
DRAWS = 1000  # of a precision for every question


def bootstrap_means(scores, num_bootstrap, seed):
    """Means of resampled questions.

    Args: scores: (questions, columns) float. Every column sees the same resamples, so differences of columns are
        paired. num_bootstrap: number of resamples. seed: of the generator.
    Returns: (num_bootstrap, columns).
    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), Sec. 13.3 (percentile interval).
    """
    generator, questions = np.random.default_rng(seed), len(scores)
    means = np.empty((num_bootstrap, scores.shape[1]))
    for row in range(num_bootstrap):
        # how often each question is drawn: one product then serves all columns
        means[row] = np.bincount(generator.integers(questions, size=questions), minlength=questions) @ scores
    return means / questions


def intervals(means):
    """95 % percentile intervals [[low, high], ...] of the columns of (num_bootstrap, columns); [None, ...] of none."""
    if not len(means):
        return [None] * means.shape[1]
    return np.percentile(means, [2.5, 97.5], axis=0).T.tolist()


def mcnemar(reference, other):
    """Exact two-sided p-value that two systems are right equally often (McNemar 1947, in its exact binomial form).

    reference, other: (questions,) right (1) or wrong (0). The sign test on those where they differ; 1.0 without any.
    """
    reference, other = np.asarray(reference, dtype=bool), np.asarray(other, dtype=bool)
    only_reference, only_other = int((reference & ~other).sum()), int((other & ~reference).sum())
    discordant = only_reference + only_other
    return float(binomtest(only_other, discordant).pvalue) if discordant else 1.0


def compare(scores, reference, num_bootstrap, seed):
    """Scores of several configs on the same questions, with intervals, and their drop against one of them.

    Args: scores: {config: (questions, 2) exact match and F1, 0..1}. reference: a key of it.
    Returns: {config: {"exact_match", "f1" (percent), "..._interval", "..._drop" (reference - config, points),
        "..._drop_interval", "mcnemar_p"}}; the intervals are None for num_bootstrap = 0.
    """
    arrays = {name: np.asarray(rows, dtype=np.float64) for name, rows in scores.items()}
    names = list(arrays)
    means = 100 * bootstrap_means(np.concatenate([arrays[name] for name in names], axis=1), num_bootstrap, seed)
    at = 2 * names.index(reference)
    own, drops = intervals(means), intervals(np.tile(means[:, at : at + 2], len(names)) - means)
    # the official order of operations (utils_qa.squad_em_f1), so that the numbers agree to the last digit
    totals = {name: [100.0 * sum(column) / len(rows) for column in rows.T.tolist()] for name, rows in arrays.items()}
    result = {}
    for index, name in enumerate(names):
        row = {}
        for column, metric in enumerate(METRICS):
            row[metric], row[f"{metric}_interval"] = totals[name][column], own[2 * index + column]
            row[f"{metric}_drop"] = totals[reference][column] - totals[name][column]
            row[f"{metric}_drop_interval"] = drops[2 * index + column]
        result[name] = {**row, "mcnemar_p": mcnemar(arrays[reference][:, 0], arrays[name][:, 0])}
    return result


def spread_over_draws(scores, seed):
    """Scores when every question is answered at one of several configs, drawn for it (random precision inference).

    Args: scores: as of `compare`. seed: of the generator.
    Returns: ({"exact_match": {"expected", "std", "min", "max"}, "f1": ...} in percent, exactly and over DRAWS draws; a
        line that says so). An answer depends on its own bits alone: to mix the configs' answers is to run at random.
    Source: Double-Win Quant (ICML 2021).
    """
    values = 100 * np.array(list(scores.values()), dtype=np.float64)  # (configs, questions, 2)
    generator, questions = np.random.default_rng(seed), np.arange(values.shape[1])
    drawn = [values[generator.integers(len(values), size=len(questions)), questions].mean(0) for _ in range(DRAWS)]
    found = {
        "expected": values.mean((0, 1)),
        "std": np.std(drawn, 0),
        "min": np.min(drawn, 0),
        "max": np.max(drawn, 0),
    }
    spread = {metric: {key: float(value[at]) for key, value in found.items()} for at, metric in enumerate(METRICS)}
    cells = [
        f"{label} {spread[metric]['expected']:.2f} ({spread[metric]['min']:.2f} - {spread[metric]['max']:.2f})"
        for metric, label in zip(METRICS, ("EM", "F1"), strict=True)
    ]
    line = f"Each question at one of {', '.join(scores)}, drawn for it: {', '.join(cells)} over {DRAWS} draws."
    return spread, line


def markdown_table(header, rows):
    """Lines of a markdown table whose columns are aligned in plain text too. header: [str]; rows: [[str]]."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]


def with_interval(value, interval, digits=2):
    """ "63.21 [62.30, 64.10]", or the value alone."""
    bounds = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    return f"{value:.{digits}f}{bounds}"
