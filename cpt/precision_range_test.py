"""Precision range test: which is the lowest width that is worth training at?

Training starts at 2 bits; every `steps_per_bit` optimizer steps the width rises by one bit, on the same weights. The
improvement at a width is the training accuracy over its last steps less that over its first steps; the first width
whose improvement exceeds a threshold is where cyclic training may begin (CPT, arXiv:2101.09868, Sec. 3.3; the paper's
threshold is not published). Both ends are measured at the same width, so the jump that comes with one bit more is no
improvement. The learning rate is constant and has no warmup: widths that come later must not learn more slowly.

What a width learned stays: a width that shows nothing after others have learned may be finished and not unable, which
is why the first one counts. And a width has only its own steps: where training at the highest width does not learn
clearly within as many steps from the start, the test measures time and not bits.
"""

import math
import os
import statistics

import matplotlib
import torch
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from cyclic_precision_trainer import CyclicPrecisionTrainer
from record import write_json_atomic

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LOWEST_BITS = 2


def range_test_bit_width(step, steps_per_bit):
    """Bits of an optimizer step (from 0) of the range test."""
    return LOWEST_BITS + step // steps_per_bit


def improvements(accuracies, steps_per_bit, window):
    """Training accuracy at both ends of every width.

    Args:
        accuracies: list of floats, one an optimizer step, `steps_per_bit` a width; window: steps averaged at an end.
    Returns:
        [{"bits", "first", "last", "improvement", "standard_error"}]; the error is that of the improvement, from the
        spread of the steps within the two windows.
    """
    rows = []
    for start in range(0, len(accuracies), steps_per_bit):
        block = accuracies[start : start + steps_per_bit]
        first, last = block[:window], block[-window:]
        error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / window)
        means = {"first": statistics.fmean(first), "last": statistics.fmean(last)}
        gain = means["last"] - means["first"]
        rows.append({"bits": range_test_bit_width(start, steps_per_bit), **means, "improvement": gain})
        rows[-1]["standard_error"] = error
    return rows


def find_min_bits(rows, threshold):
    """The first width whose improvement is above `threshold`, None without one."""
    return next((row["bits"] for row in rows if row["improvement"] > threshold), None)


def prepare_arguments(cyclic_args, training_args):
    """Turn the arguments of a training into those of its range test: constant learning rate, nothing else to do."""
    highest = cyclic_args.bit_widths[1]
    cyclic_args.bit_widths = [LOWEST_BITS, highest]
    training_args.max_steps = cyclic_args.range_test_steps * (highest - LOWEST_BITS + 1)
    training_args.lr_scheduler_type, training_args.warmup_steps = SchedulerType.CONSTANT, 0
    training_args.do_eval = training_args.do_predict = training_args.load_best_model_at_end = False
    training_args.eval_strategy = training_args.save_strategy = IntervalStrategy.NO


class RangeTestTrainer(CyclicPrecisionTrainer):
    """Also counts, at every optimizer step, the windows whose start and end are both predicted right.

    Windows of a long context that do not hold the answer are left out: predicting "not here" is no sign of learning.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._counts = {}  # {step: tensor of (right, all)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        padding = ~inputs["attention_mask"].bool()
        right = torch.ones_like(inputs["start_positions"], dtype=torch.bool)
        for side in ("start", "end"):
            logits = outputs[f"{side}_logits"].detach().masked_fill(padding, -torch.inf)
            right &= logits.argmax(-1) == inputs[f"{side}_positions"]
        # 0 is the label of a window without the answer, and the share of a duplicate
        answered = (inputs["end_positions"] > 0) & (inputs.get("share", 1.0) > 0)
        counts = torch.stack([(right & answered).sum(), answered.sum()])
        step = self.state.global_step
        self._counts[step] = self._counts.get(step, 0) + counts
        return (loss, outputs) if return_outputs else loss

    def accuracies(self):
        """Training accuracy of every optimizer step, over all processes."""
        counts = self.accelerator.reduce(torch.stack(list(self._counts.values())), "sum")
        return [right / max(number, 1) for right, number in counts.tolist()]


def report(accuracies, steps_per_bit, window, threshold, folder, write):
    """(min_bits or None, lines to print); with `write`, also range_test.json and range_test.png in `folder`."""
    rows = improvements(accuracies, steps_per_bit, window)
    min_bits = find_min_bits(rows, threshold)
    lines = ["| bits | accuracy, first steps | last steps | improvement | standard error |", "|---|---|---|---|---|"]
    for row in rows:
        values = (row["first"], row["last"], row["improvement"], row["standard_error"])
        lines.append(f"| {row['bits']} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    if min_bits is None:
        verdict = (
            f"no width improves by more than {threshold}: the test is not passed. Give every width more "
            "--range_test_steps, try another --learning_rate, or lower --range_test_threshold"
        )
    else:
        verdict = f"min_bits = {min_bits}: the first width that improves by more than {threshold}"
    found = next((row for row in rows if row["bits"] == min_bits), None)
    if found and found["improvement"] < 2 * found["standard_error"]:
        verdict += (
            "\nwarning: that improvement is less than twice its standard error, it may be noise: raise "
            "--range_test_window, the batch, or the threshold"
        )
    if write:
        settings = {"steps_per_bit": steps_per_bit, "window": window, "threshold": threshold}
        content = {"min_bits": min_bits, **settings, "rows": rows, "accuracies": accuracies}
        write_json_atomic(os.path.join(folder, "range_test.json"), content)
        plot(rows, accuracies, steps_per_bit, window, min_bits, os.path.join(folder, "range_test.png"))
    return min_bits, [*lines, "", verdict]


def plot(rows, accuracies, steps_per_bit, window, min_bits, path):
    """Accuracy of every step, the means at both ends of each width, and the width that was found."""
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    axes.plot(accuracies, color="0.75", linewidth=0.8, label="training accuracy of a step")
    for number, row in enumerate(rows):
        left, right = number * steps_per_bit, (number + 1) * steps_per_bit
        found = row["bits"] == min_bits
        axes.hlines(row["first"], left, left + window, color="C0", label=None if number else "mean at both ends")
        axes.hlines(row["last"], right - window, right, color="C0")
        axes.axvline(left, color="0.85", linewidth=0.6)
        text = f"{row['bits']} bits\n{row['improvement']:+.3f}"
        place = {"xy": ((left + right) / 2, 1), "xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
        axes.annotate(text, **place, fontsize=8, fontweight="bold" if found else "normal")
    axes.set(xlabel="optimizer step", ylabel="start and end right", xlim=(0, len(accuracies)))
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
