"""Precision range test: which is the lowest width that is worth training at?

Every width from 2 bits to the highest trains the same number of optimizer steps from the same start, on the same
batches. Its improvement is the training accuracy over its last steps less that before the first one, both at this
width. min_bits, where cyclic training may begin, is the lowest width with at least a given share of the improvement of
the highest. The learning rate is constant and has no warmup: the first steps of a training, at their full speed.

Source: CPT, arXiv:2101.09868, Sec. 3.3, with a deviation. There the width rises while one set of weights trains, and
the first width counts whose improvement exceeds a threshold, which is not published. That asks when training takes off
and not at how many bits: whichever width is in use then shows the improvement. A start of its own and the comparison
with the highest width leave the width as the only difference.
"""

import itertools
import math
import os
import statistics

import matplotlib
import torch
from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from common.record import atomic_path, write_json_atomic
from cyclic_precision_trainer import CyclicPrecisionTrainer

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LOWEST_BITS = 2


def standard_error(values):
    """Of the mean of a list; 0 for a single batch before training, since there is no other."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def improvements(starts, accuracies, window):
    """Training accuracy at both ends of every width, from LOWEST_BITS up.

    Args: a list a width: starts, accuracies of some batches before training; accuracies, those of all steps; window:
        steps averaged at the end.
    Returns: [{"bits", "first", "last", "improvement", "standard_error"}]; the error is that of the improvement, from
        the spread of the batches before training and of the last steps.
    """
    rows = []
    for bits, (first, steps) in enumerate(zip(starts, accuracies, strict=True), LOWEST_BITS):
        last = steps[-window:]
        error = math.hypot(standard_error(first), standard_error(last))
        means = {"first": statistics.fmean(first), "last": statistics.fmean(last)}
        rows.append({"bits": bits, **means, "improvement": means["last"] - means["first"], "standard_error": error})
    return rows


def find_min_bits(rows, threshold, share):
    """The lowest width that improves by `share` of what the highest one does.

    Args: rows: of `improvements`; each gets "share" and "share_error" (first order). threshold: what the highest width
        has to improve by, for the shares to mean something.
    Returns: (min_bits, clear): None where the highest width fails; clear where that width and all below it are at
        least two standard errors away from the share.
    """
    highest = rows[-1]
    if highest["improvement"] <= max(threshold, 2 * highest["standard_error"]):
        return None, False
    for row in rows:
        row["share"] = row["improvement"] / highest["improvement"]
        error = math.hypot(row["standard_error"], row["share"] * highest["standard_error"]) / highest["improvement"]
        row["share_error"] = 0.0 if row is highest else error
    at = next(index for index, row in enumerate(rows) if row["share"] >= share)
    clear = all(abs(row["share"] - share) >= 2 * row["share_error"] for row in rows[: at + 1])
    return rows[at]["bits"], clear


def prepare_arguments(cyclic_args, training_args):
    """Turn the arguments of a training into those of one width: constant learning rate, nothing else to do."""
    cyclic_args.bit_widths = [LOWEST_BITS, cyclic_args.bit_widths[1]]
    training_args.max_steps = cyclic_args.range_test_steps
    training_args.lr_scheduler_type, training_args.warmup_steps = SchedulerType.CONSTANT, 0
    training_args.do_eval = training_args.do_predict = training_args.load_best_model_at_end = False
    training_args.eval_strategy = training_args.save_strategy = IntervalStrategy.NO


class RangeTestTrainer(CyclicPrecisionTrainer):
    """Trains width after width from the same start and on the same batches, `args.max_steps` each; `schedule` is that
    of one width after the other.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._counts = {}  # {step: tensor of (right, all)} of the width that trains

    def train_widths(self, window):
        """Train all widths. Returns: (accuracies of `window` batches before training, accuracies of all steps, seconds
        of training), both a list a width.
        """
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        start = {name: value.detach().clone() for name, value in trained.items()}
        whole, steps, starts, accuracies, seconds = self.schedule, self.args.max_steps, [], [], 0.0
        for first in range(0, len(whole), steps):
            with torch.no_grad():
                for name, value in trained.items():
                    value.copy_(start[name])
            self.schedule, self._counts = whole[first : first + steps], {}
            self.optimizer = self.lr_scheduler = None  # what Adam knows is of the width before
            set_seed(self.args.seed)  # the same batches, dropout and rounding for every width
            starts.append(self.start_accuracies(window))
            set_seed(self.args.seed)
            seconds += self.train().metrics["train_runtime"]
            accuracies.append(self.accuracies(self._counts.values()))
        return starts, accuracies, seconds

    @torch.no_grad()
    def start_accuracies(self, window):
        """Accuracies of the first `window` batches, or of all where there are fewer, without training."""
        counts = []
        self.model.train()
        with self.model.at_bits(self.to_config(self.schedule[0])), self.compute_loss_context_manager():
            for inputs in itertools.islice(self.get_train_dataloader(), window):
                inputs = self._prepare_inputs(inputs)
                counts.append(count_right(inputs, self.model(**inputs), self.null_threshold is not None))
        return self.accuracies(counts)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        step = self.state.global_step
        self._counts[step] = self._counts.get(step, 0) + count_right(inputs, outputs, self.null_threshold is not None)
        return (loss, outputs) if return_outputs else loss

    def accuracies(self, counts):
        """Training accuracy of each of the counts, over all processes."""
        counts = self.accelerator.reduce(torch.stack(list(counts)), "sum")
        return [right / max(number, 1) for right, number in counts.tolist()]


def count_right(inputs, outputs, v2=False):
    """(windows whose start and end are both predicted right, windows) of a batch, as a tensor.

    Windows of a long context that do not hold the answer are left out: predicting "not here" is no sign of learning.
    """
    padding = ~inputs["attention_mask"].bool()
    right = torch.ones_like(inputs["start_positions"], dtype=torch.bool)
    for side in ("start", "end"):
        logits = outputs[f"{side}_logits"].detach().masked_fill(padding, -torch.inf)
        right &= logits.argmax(-1) == inputs[f"{side}_positions"]
    # the label of a window without the answer: its last token in v2, else 0
    absent = inputs["attention_mask"].sum(-1) - 1 if v2 else 0
    answered = (inputs["end_positions"] != absent) & (inputs.get("share", 1.0) > 0)  # 0: a duplicate
    return torch.stack([(right & answered).sum(), answered.sum()])


def report(starts, accuracies, window, threshold, share, folder, caption, write):
    """(min_bits or None, lines to print); with `write`, also range_test.json and range_test.png in `folder`."""
    rows = improvements(starts, accuracies, window)
    min_bits, clear = find_min_bits(rows, threshold, share)
    header = ["bits", "accuracy before training", "last steps", "improvement", "standard error"]
    header += ["share of the highest", "standard error"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        values = [row.get(key) for key in ("first", "last", "improvement", "standard_error", "share", "share_error")]
        lines.append(f"| {row['bits']} | " + " | ".join("-" if v is None else f"{v:.3f}" for v in values) + " |")
    highest = f"{rows[-1]['bits']} bits"
    verdict = f"min_bits = {min_bits}: the lowest width with at least {share} of the improvement of {highest}"
    if min_bits is None:
        verdict = (
            f"{highest} do not improve by more than {threshold} and two standard errors: within so few steps no width "
            "can be told from another. Raise --range_test_steps or the batch, or try another --learning_rate"
        )
    if min_bits and not clear:
        verdict += (
            "\nnot clear: this width or one below it is less than two standard errors away from that share. Raise "
            "--range_test_steps, --range_test_window or the batch"
        )
    if write:
        content = {"min_bits": min_bits, "clear": clear, "window": window, "threshold": threshold, "share": share}
        content |= {"rows": rows, "start_accuracies": starts, "accuracies": accuracies}
        write_json_atomic(os.path.join(folder, "range_test.json"), content)
        plot(rows, accuracies, window, min_bits, os.path.join(folder, "range_test.png"), caption)
    return min_bits, [*lines, "", verdict]


def plot(rows, accuracies, window, min_bits, path, caption):
    """Accuracy of every width over its steps, averaged over `window` steps; the width that was found is drawn bold."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, (row, values) in enumerate(zip(rows, accuracies, strict=True)):
        ends = range(window, len(values) + 1)
        means = [statistics.fmean(values[end - window : end]) for end in ends]
        style = {"color": plt.cm.viridis(1 - number / len(rows)), "linewidth": 3 if row["bits"] == min_bits else 1}
        axes.plot(ends, means, label=f"{row['bits']} bits: {row['improvement']:+.3f}", **style)
    axes.set(xlabel=f"optimizer step from the same start (mean of {window})", ylabel="start and end right")
    axes.set_title(caption, fontsize=10)
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)
