#!/usr/bin/env python
"""Cyclic precision training (CPT) of GPT-2 + LoRA on SQuAD v1.1: one run, one adapter, every width.

    bash train.sh                                          # 32 cycles from 4 to 8 bits in 1000 steps
    bash train.sh --bit_widths 4 4                         # static training at 4 bits, for comparison
    bash train.sh --precision_range_test                   # find the lowest width that is worth training at
    python run_qa_eval.py --model_name_or_path results/train --dataset_name squad --eval_bit_widths 4 5 6 7 8 32 \\
        --output_dir results/eval

One shared adapter per linear serves all widths; base frozen, adapters and QA head trained. The bits of a step are a
function of the step alone (cyclic_precision_trainer.py); every evaluation names its own bits.
What differs from base_model/run_qa.py: the flags, `check_args`, `build_model`, the trainer.
"""

import dataclasses
import functools
import time

from transformers import set_seed

import precision_range_test
from common import arguments
from common.arguments import DataTrainingArguments, option
from common.data import load_features, set_qa_quantizer, trainer_arguments
from common.flags import parse_args
from common.loading import describe_model, load_tokenizer, open_model
from common.record import plot_caption, write_run_record
from common.resuming import OutputFolder, input_checksums, run_settings
from common.script import plain_errors, setup_logging
from common.training_args import TrainingArguments
from cyclic_precision_trainer import (
    PERIODS,
    TENSORS,
    CyclicPrecisionTrainer,
    cyclic_bit_width,
    quantize_output_gradients,
    short_config,
    training_cost,
    write_schedule,
)
from models.errors import UserError
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering
from models.quantization import FLOAT_BITS, QUANTIZED_BITS


@dataclasses.dataclass
class CyclicArguments:
    """The schedule of the bits, and the range test that finds its lower end."""

    bit_widths: list[int] = option([4, 8], "lowest and highest width of a cycle; the same twice is static training")
    num_cyclic_period: int = option(32, "cycles in --max_steps")
    period: str = option(
        "real", "real: max_steps / cycles, the last step is at the highest width; floor: the published whole number"
    )
    cycle: list[str] = option(["w", "a", "kv"], "which tensors follow the schedule: w, a, kv")
    fixed_bits: int = option(8, "bits of the tensors that do not follow it")
    gradient_bits: int = option(
        32, "bits of the gradient at every linear's output, rounded stochastically: 8 as in the paper; 32: float, off"
    )
    eval_bit_widths: list[int] | None = option(
        None,
        "widths that every evaluation scores, during and after training (default: the lowest and the highest)",
        aliases=["--eval_bit_width"],
    )
    precision_range_test: bool = option(
        False, "no cycles: train each width from 2 bits up from the same start, report the lowest that learns"
    )
    range_test_steps: int = option(100, "range test: optimizer steps a width (these replace --max_steps)")
    range_test_window: int = option(25, "range test: first batches and last steps whose accuracy is averaged")
    range_test_threshold: float = option(0.02, "range test: accuracy that the highest width must gain, or no verdict")
    range_test_share: float = option(0.6, "range test: the lowest width gains so much of what the highest one gains")


def check_args(cyclic_args, training_args):
    """Refuse what cannot work, before anything is loaded."""
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise UserError("nothing to do: pass --do_train, --do_eval or --do_predict")
    widths = cyclic_args.bit_widths
    if len(widths) != 2 or not (set(widths) <= set(QUANTIZED_BITS) or widths[0] == widths[1] in FLOAT_BITS):
        raise UserError(
            f"--bit_widths {' '.join(map(str, widths))}: allowed are the lowest and the highest width of a cycle, "
            "2 to 8, or twice 16 or 32"
        )
    if widths[0] > widths[1]:
        raise UserError(f"--bit_widths {widths[0]} {widths[1]}: the lowest width comes first")
    if not cyclic_args.cycle or not set(cyclic_args.cycle) <= set(TENSORS):
        raise UserError(f"--cycle {' '.join(cyclic_args.cycle)}: allowed are {', '.join(TENSORS)}")
    if cyclic_args.period not in PERIODS:
        raise UserError(f"--period {cyclic_args.period}: allowed are {', '.join(PERIODS)}")
    if cyclic_args.gradient_bits != 32 and not 2 <= cyclic_args.gradient_bits <= 16:
        raise UserError(f"--gradient_bits {cyclic_args.gradient_bits}: allowed are 2 to 16, or 32 for float")
    if cyclic_args.precision_range_test:
        if not training_args.do_train or training_args.resume_from_checkpoint:
            raise UserError("--precision_range_test needs --do_train and starts afresh: no --resume_from_checkpoint")
        if not 2 <= cyclic_args.range_test_window <= cyclic_args.range_test_steps // 2:
            window = f"--range_test_window {cyclic_args.range_test_window}"
            raise UserError(f"{window}: allowed are 2 to half of --range_test_steps {cyclic_args.range_test_steps}")
        if not 0 < cyclic_args.range_test_share <= 1 or not cyclic_args.range_test_threshold >= 0:
            raise UserError(
                f"--range_test_share {cyclic_args.range_test_share}, --range_test_threshold "
                f"{cyclic_args.range_test_threshold}: allowed are above 0 up to 1, and 0 or more"
            )
        if widths[1] in FLOAT_BITS:
            where = "--precision_range_test ends at the highest of --bit_widths"
            raise UserError(f"{where}: {widths[1]} is no such width")
    elif training_args.do_train:
        if training_args.max_steps < 1:
            raise UserError("--max_steps is missing: the cycles divide it")
        if not 1 <= cyclic_args.num_cyclic_period <= training_args.max_steps:
            allowed = f"allowed is 1 to --max_steps {training_args.max_steps}, a cycle needs a step"
            raise UserError(f"--num_cyclic_period {cyclic_args.num_cyclic_period}: {allowed}")


def build_model(model_args, cyclic_args, training, tokenizer, to_config):
    """(model at its highest width, [(name, config)] to evaluate); `to_config`: bits -> short form."""
    model = open_model(QuantGPT2ForQuestionAnswering, model_args, tokenizer, training)
    low, high = cyclic_args.bit_widths
    evaluated = list(dict.fromkeys(cyclic_args.eval_bit_widths or (low, high)))
    if training and not model.config.lora_bank:
        model.add_lora(["shared"], model_args.lora_r, model_args.lora_alpha)
    trained = range(low, high + 1) if training else ()
    for bits in [*evaluated, *trained]:
        model.set_bit_config(to_config(bits))  # refuses what the bank of a checkpoint has no adapter for
    model.set_bit_config(to_config(high if training else max(evaluated)))  # as it is described and saved
    if training:  # what run_qa_eval.py evaluates when it is not told
        model.config.trained_bit_configs = [to_config(bits) for bits in reversed(trained)]
    if model.config.lora_bank and not model.config.base_model_name_or_path:
        model.set_base(model_args.model_name_or_path)
    model.set_execution(model_args.execution or ("fake" if training else "integer"), model_args.backward_dtype)
    return model, [(to_config(bits), to_config(bits)) for bits in evaluated]


def make_schedule(cyclic_args, steps):
    """[bits] of all optimizer steps; `steps`: --max_steps."""
    cycles, (low, high) = cyclic_args.num_cyclic_period, cyclic_args.bit_widths
    if cyclic_args.precision_range_test:  # so many steps for each width
        return [bits for bits in range(low, high + 1) for _ in range(steps)]
    return [cyclic_bit_width(t, steps, cycles, low, high, cyclic_args.period) for t in range(steps)]


def describe_training(schedule, cyclic_args, training_args):
    """What a record says about the training: its settings, and its cost by CPT's model."""
    fixed = [cyclic_args.fixed_bits] * len(schedule)
    w_bits, a_bits = (schedule if tensor in cyclic_args.cycle else fixed for tensor in ("w", "a"))
    batch = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    return {
        "cyclic": dataclasses.asdict(cyclic_args) | {"mean_bits": sum(schedule) / len(schedule)},
        "training_cost": training_cost(w_bits, cyclic_args.gradient_bits, a_bits),
        "training": {
            "max_steps": training_args.max_steps,
            "windows_per_step": batch,
            "learning_rate": training_args.learning_rate,
            "lr_scheduler_type": str(training_args.lr_scheduler_type.value),
        },
    }


def run_range_test(trainer, cyclic_args, training_args, caption):
    """Train the widths and report; returns the metrics of the record."""
    starts, accuracies, seconds = trainer.train_widths(cyclic_args.range_test_window)
    writes = trainer.is_world_process_zero()
    limits = cyclic_args.range_test_window, cyclic_args.range_test_threshold, cyclic_args.range_test_share
    min_bits, lines = precision_range_test.report(
        starts, accuracies, *limits, training_args.output_dir, caption, writes
    )
    if writes:
        print("\n".join(lines), flush=True)
    return {"train_runtime": seconds, "min_bits": min_bits}


def main():
    start = time.time()
    groups = parse_args(arguments.ModelArguments, DataTrainingArguments, CyclicArguments, TrainingArguments)
    model_args, data_args, cyclic_args, training_args = groups
    setup_logging(training_args)
    check_args(cyclic_args, training_args)
    range_test = cyclic_args.precision_range_test
    if range_test:
        precision_range_test.prepare_arguments(cyclic_args, training_args)
    folder = OutputFolder(training_args, data_args.overwrite_output_dir, run_settings(*groups))
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(model_args)
    to_config = functools.partial(short_config, cycle=cyclic_args.cycle, fixed_bits=cyclic_args.fixed_bits)
    model, evaluated = build_model(model_args, cyclic_args, training_args.do_train, tokenizer, to_config)
    bits = describe_model(model)
    examples, features, sources = load_features(model, tokenizer, model_args, data_args, training_args)
    data = data_args, training_args, folder, examples.get("train")
    bits |= set_qa_quantizer(model, tokenizer, model_args, *data)
    if cyclic_args.gradient_bits < 32:
        quantize_output_gradients(model, cyclic_args.gradient_bits)
    if training_args.do_train:
        folder.start(**input_checksums(model, tokenizer, sources))

    schedule = make_schedule(cyclic_args, training_args.max_steps) if training_args.do_train else []
    trainer_class = precision_range_test.RangeTestTrainer if range_test else CyclicPrecisionTrainer
    trainer = trainer_class(
        **trainer_arguments(model, tokenizer, data_args, training_args, examples, features),
        configs=evaluated,
        schedule=schedule,
        to_config=to_config,
    )
    training = describe_training(schedule, cyclic_args, training_args) if schedule else {}
    caption = plot_caption(model_args.model_name_or_path, sources["train"]) if schedule else ""
    if schedule and trainer.is_world_process_zero():
        write_schedule(schedule, training_args.output_dir, caption, **training["cyclic"])
    if range_test:
        metrics = run_range_test(trainer, cyclic_args, training_args, caption)
    else:
        metrics = trainer.run(folder, examples, features)
    details = {"bit_config": bits, "metrics": metrics, "data": sources, **training}
    write_run_record(trainer, folder, model_args, data_args, start, **details)


if __name__ == "__main__":
    with plain_errors():
        main()
