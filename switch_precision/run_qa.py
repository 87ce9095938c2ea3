#!/usr/bin/env python
"""Train one GPT-2 to serve several bit-widths on SQuAD v1.1 (switchable precision), and evaluate it at each of them.

    bash train.sh                                              # widths 4 and 8, jointly, all GPUs
    python run_qa.py --model_name_or_path gpt2 --dataset_name squad --do_train --do_eval --max_steps 1000 \\
        --bit_widths 4 6 8 --output_dir results/joint468
    python run_qa.py ... --bit_configs ../configs/uniform_8.json ../configs/hybrid_25pct_4bit.json W4A8KV8

Every linear gets one LoRA adapter per width; base frozen, adapters and QA head trained. One step runs the same batch
at several configs and takes one optimizer step on the mean of their losses (adaptive_lora_trainer.py).
What differs from base_model/run_qa.py: the flags, `check_args`, `build_model`, the trainer.
"""

import dataclasses
import time

from transformers import set_seed
from transformers.trainer_utils import SchedulerType

from adaptive_lora_trainer import AdaptiveLoRATrainer, ObjectiveArguments
from common.arguments import DataTrainingArguments, option
from common.data import load_features, set_qa_quantizer, trainer_arguments
from common.flags import parse_args
from common.loading import describe_model, load_tokenizer, open_model
from common.record import write_run_record
from common.resuming import OutputFolder, input_checksums, run_settings
from common.script import plain_errors, setup_logging
from common.step_configs import BankArguments, check_bank, note_targets, target_configs
from common.training_args import TrainingArguments
from models.bit_config import describe_bit_config
from models.errors import UserError
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering
from models.peft_adapter import start_lora


@dataclasses.dataclass
class ModelArguments(BankArguments):
    """The model and its bank."""

    from_peft: str | None = option(None, "folder of a peft adapter (LoRA) that all adapters and the head start from")


def check_args(model_args, objective_args, training_args):
    """Refuse what cannot work, before anything is loaded."""
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise UserError("nothing to do: pass --do_train, --do_eval or --do_predict")
    check_bank(model_args)
    objective_args.check(None if model_args.bit_configs else model_args.bit_widths)
    if training_args.fsdp or training_args.deepspeed:
        raise UserError("--fsdp and --deepspeed shard the model; here every process needs all of it")


def build_model(model_args, objective_args, training, tokenizer):
    """(model with its bank and at its highest config, [(name, resolved config)] to train and evaluate)."""
    model = open_model(QuantGPT2ForQuestionAnswering, model_args, tokenizer, training)
    targets = target_configs(model_args, model.layer_shapes())
    teacher = [32] if training and objective_args.teacher else []
    if model_args.from_peft and (model.config.lora_bank or not training):
        start_lora(model, ["shared"], model_args)  # to evaluate it; refuses a model that has adapters
    if training and not model.config.lora_bank:
        widths = {layer["w_bits"] for _, config in targets for layer in config.values()}
        start_lora(model, sorted(widths.union(teacher)), model_args)
    if training and model_args.bit_configs:
        note_targets(model, targets)
    for config in [*teacher, *(config for _, config in reversed(targets))]:
        model.set_bit_config(config)  # refuses what the bank of a checkpoint has no adapter for
    if model.config.lora_bank and not model.config.base_model_name_or_path:
        model.set_base(model_args.model_name_or_path)
    model.set_execution(model_args.execution or ("fake" if training else "integer"), model_args.backward_dtype)
    return model, targets


def main():
    start = time.time()
    groups = parse_args(ModelArguments, DataTrainingArguments, ObjectiveArguments, TrainingArguments)
    model_args, data_args, objective_args, training_args = groups
    setup_logging(training_args)
    check_args(model_args, objective_args, training_args)
    folder = OutputFolder(training_args, data_args.overwrite_output_dir, run_settings(*groups))
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(model_args)
    model, targets = build_model(model_args, objective_args, training_args.do_train, tokenizer)
    bits = describe_model(model)
    examples, features, sources = load_features(model, tokenizer, model_args, data_args, training_args)
    data = data_args, training_args, folder, examples.get("train")
    bits |= set_qa_quantizer(model, tokenizer, model_args, *data)
    if objective_args.objective == "sequential" and training_args.lr_scheduler_type == "cosine":
        # Each phase is a run of its own in the published code: the cosine starts again with it.
        training_args.lr_scheduler_type = SchedulerType.COSINE_WITH_RESTARTS
        training_args.lr_scheduler_kwargs = {"num_cycles": len(targets)}
    if training_args.do_train:
        folder.start(**input_checksums(model, tokenizer, sources, targets))
    else:
        model.keep_only_codes(config for _, config in targets)

    bit_widths = None if model_args.bit_configs else model_args.bit_widths
    trainer = AdaptiveLoRATrainer(
        **trainer_arguments(model, tokenizer, data_args, training_args, examples, features),
        configs=targets,
        bit_widths=bit_widths,
        objective=objective_args,
    )
    metrics = trainer.run(folder, examples, features)
    configs = {name: {**describe_bit_config(config, trainer.layers), "layers": config} for name, config in targets}
    details = {"bit_config": bits, "metrics": metrics, "data": sources}
    details |= {"bit_widths": bit_widths, "bit_configs": configs, "objective": None, "passes": 0}
    if training_args.do_train:
        details |= {"objective": dataclasses.asdict(objective_args), "passes": trainer.forward_passes()}
    write_run_record(trainer, folder, model_args, data_args, start, **details)


if __name__ == "__main__":
    with plain_errors():
        main()
