"""Cyclic precision training (CPT): the bit-width climbs and jumps back, cycle after cycle, on one set of weights.

In reading order: the schedule, its cost, the gradient quantizer, the trainer. The precision range test is in
precision_range_test.py. Source: CPT (ICLR 2021, arXiv:2101.09868) and its released code. Deviations: weights per
channel and activations per token, both symmetric (there: asymmetric, activations per tensor); K and V cycle too; only
adapters and head are trained; gradients stay float unless `gradient_bits` is given (there: 8 bits).
"""

import math
import os

import matplotlib
import torch

from common.record import atomic_path, write_json_atomic
from models.errors import UserError
from models.modeling_gpt2_quant import QuantLinear
from trainer_qa import QuestionAnsweringTrainer

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TENSORS = ("w", "a", "kv")
PERIODS = ("real", "floor")


# ---- schedule


def cyclic_bit_width(step, total_steps, num_cyclic_period, min_bits, max_bits, period="real"):
    """Bits of an optimizer step: half a cosine from min_bits up to max_bits, then a jump back.

    b(t) = rint(min + (max - min) / 2 * (1 - cos(pi * (t mod P) / P))), rounded half to even; step: t, from 0.
    period: "real" is P = total_steps / cycles, whose last step is at max_bits wherever a cycle is long enough; "floor"
    is the published P = total_steps // cycles, which starts one more cycle where steps are left over.
    Raises: UserError: more cycles than steps, min_bits above max_bits, a negative step, another period.
    Source: CPT Eq. 1; released code cpt_cifar/train.py.
    """
    if not 1 <= num_cyclic_period <= total_steps:
        raise UserError(f"num_cyclic_period = {num_cyclic_period}: allowed is 1 to the number of steps, {total_steps}")
    if min_bits > max_bits:
        raise UserError(f"min_bits = {min_bits} is above max_bits = {max_bits}")
    if step < 0:
        raise UserError(f"step = {step}: counted from 0")
    if period not in PERIODS:
        raise UserError(f"period = {period!r}: allowed are {', '.join(PERIODS)}")
    # Whole numbers only: t mod 31.25 in floats can miss the start of a cycle.
    if period == "floor" or total_steps % num_cyclic_period == 0:
        length = total_steps // num_cyclic_period
        position = step % length
    else:  # (t mod P) / P = (t * cycles mod total) / total
        length, position = total_steps, step * num_cyclic_period % total_steps
    return round(min_bits + 0.5 * (max_bits - min_bits) * (1 - math.cos(math.pi * position / length)))


def short_config(bits, cycle=TENSORS, fixed_bits=8):
    """The bit config of one width as LLM-QAT's short form: what cycles has `bits`, the rest `fixed_bits`."""
    return "".join(f"{tensor.upper()}{bits if tensor in cycle else fixed_bits}" for tensor in TENSORS)


def write_schedule(bits, folder, caption, **settings):
    """bits of every step -> schedule.json (with the settings) and schedule.png in `folder`. caption: of the plot."""
    counts, mean = {str(width): bits.count(width) for width in sorted(set(bits))}, sum(bits) / len(bits)
    write_json_atomic(os.path.join(folder, "schedule.json"), {**settings, "steps_per_width": counts, "bits": bits})
    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    axes.step(range(len(bits)), bits, where="post", linewidth=1)
    axes.set(xlabel="optimizer step", ylabel="bits", title=f"{caption}: mean {mean:.2f} bits")
    axes.title.set_fontsize(10)
    axes.yaxis.get_major_locator().set_params(integer=True)
    with atomic_path(os.path.join(folder, "schedule.png")) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


# ---- cost


def training_cost(w_bits, gradient_bits=32, a_bits=None):
    """BitOPs of training relative to float32, by CPT's model: each product of a step costs the product of its bits.

    Means over the steps of w a (forward), w g (error) and a g (weight gradient), each over 32^2; total is the mean of
    the three. It counts a weight gradient of every linear, as the paper's training has it: with a frozen base that
    product is not made, so these figures compare schedules and say nothing about seconds.

    Args: w_bits, a_bits: a width a step; a_bits: None where activations follow the weights. gradient_bits: g, 32 for
        gradients that stay float.
    Returns: {"forward", "error", "weight_gradient", "total"}.
    """
    steps, a_bits = len(w_bits), w_bits if a_bits is None else a_bits
    forward = sum(w * a for w, a in zip(w_bits, a_bits, strict=True)) / steps / 32**2
    error = sum(w * gradient_bits for w in w_bits) / steps / 32**2
    weight_gradient = sum(a * gradient_bits for a in a_bits) / steps / 32**2
    total = (forward + error + weight_gradient) / 3
    return {"forward": forward, "error": error, "weight_gradient": weight_gradient, "total": total}


# ---- gradient quantization


def quantize_gradient(grad, bits):
    """Asymmetric MinMax with stochastic rounding, one range for the whole tensor; unbiased.

    Draws from torch's global generator, whose state a Trainer checkpoint keeps: a resumed run rounds the same.

    Args: grad: float, any shape; bits: 2 to 16. Returns: the same shape and dtype; NaN or infinite input gives NaN.
    Source: CPT's quantizer (released code modules/quantize.py), without its floor of 1e-8 on the step: gradients of a
        mean loss are often smaller than that.
    """
    low, high = grad.float().aminmax()
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    codes = torch.floor((grad.float() - low) / step + torch.rand_like(grad, dtype=torch.float32))
    return (codes.clamp_(max=2**bits - 1) * step + low).to(grad.dtype)


def quantize_output_gradients(model, bits):
    """From now on, the gradient that arrives at the output of every QuantLinear is quantized to `bits`."""

    def on_forward(layer, args, output):
        if output.requires_grad:
            output.register_hook(lambda grad: quantize_gradient(grad, bits))

    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.register_forward_hook(on_forward)


# ---- trainer


class CyclicPrecisionTrainer(QuestionAnsweringTrainer):
    """Trains every optimizer step at the width that `schedule`, a list of bits, gives it; to_config: bits -> config.

    The width depends on the step alone: all processes, all micro-batches of a step and a resumed run agree. Between
    steps the model stands at the config it was given, so nothing that is saved or evaluated inherits a width.
    """

    def __init__(self, *args, schedule, to_config=short_config, **kwargs):
        super().__init__(*args, **kwargs)
        self.schedule, self.to_config = schedule, to_config
        self._steps_since_log = {}  # {step: bits}

    def training_step(self, model, inputs, num_items_in_batch=None):
        step = self.state.global_step
        bits = self._steps_since_log[step] = self.schedule[step]
        with self.accelerator.unwrap_model(model).at_bits(self.to_config(bits)):
            return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs, start_time=None):
        """Adds the bits beside the loss: like the loss, the mean since the last log."""
        if "loss" in logs and self._steps_since_log:
            logs = {**logs, "bits": sum(self._steps_since_log.values()) / len(self._steps_since_log)}
            self._steps_since_log = {}
        super().log(logs, start_time)
