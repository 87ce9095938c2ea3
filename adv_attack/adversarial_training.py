#!/usr/bin/env python
"""Adversarial training of a classifier or of extractive question answering, at one precision or at random ones.

    bash adv_train.sh --task classification --precision_set 8      # plain adversarial training at W8A8KV8
    bash adv_train.sh --task qa --precision_set 4 5 6 7 8          # random precision training (RPT)
    python adversarial_training.py --task qa --pgd_steps 0 --precision_set 8 --do_train --do_eval \\
        --train_file train.json --validation_file dev.json --output_dir results/control    # no attack

Every step draws a precision of --precision_set, attacks the batch with PGD (embedding_pgd.py) and descends the
cross-entropy on the perturbed batch. Double-Win Quant (ICML 2021) attacks and updates at the same precision, other
attacks at another one of the set. Trained are one shared adapter and the head on a frozen base, so that all arms of a
comparison have the same capacity; --train_all_weights: everything (classification).
"""

import contextlib
import dataclasses
import random
import time

from transformers import DataCollatorWithPadding, set_seed

import text_classification
import utils_qa
from classifier import load_rows, set_text_quantizer
from common import arguments
from common.arguments import DataTrainingArguments, option
from common.data import build_features, feature_settings, load_data, needed_splits, set_qa_quantizer, trainer_arguments
from common.flags import parse_args
from common.loading import describe_model, load_tokenizer, open_model
from common.record import write_run_record
from common.resuming import OutputFolder, input_checksums, run_settings
from common.script import plain_errors, setup_logging
from common.training_args import TrainingArguments
from embedding_pgd import perturbed, pgd
from models.bit_config import describe_bit_config, short_name
from models.errors import UserError
from models.quantization import QUANTIZED_BITS
from pgd_tasks import (
    CLASSES,
    FREE_TOKENS,
    LOSSES,
    PGDArguments,
    asked_task,
    check_ball,
    noise_generator,
    question_lengths,
    resolve_set,
)
from text_classification import (
    ClassificationTrainer,
    ClassifierTrainingArguments,
    TrainingTextArguments,
    classification_metrics,
)
from text_data import check_labels, number_of_classes
from trainer_qa import QuestionAnsweringTrainer

DATA = {
    "classification": (TrainingTextArguments, ClassifierTrainingArguments),
    "qa": (DataTrainingArguments, TrainingArguments),
}


@dataclasses.dataclass
class ModelArguments(arguments.ModelArguments):
    """The model."""

    train_all_weights: bool = option(False, "classification: train all weights, without an adapter")


@dataclasses.dataclass
class AdversarialArguments(PGDArguments):
    """The attack in training."""

    attack_precision: str | None = option(
        None, "attack at the same precision as the update, or at another one of the set (other, the default)"
    )
    pgd_steps: int = option(7, "steps of the attack; 0: none, training on clean inputs")


def check_args(args, model_args, training_args):
    """Refuse what cannot work, before anything is loaded; sets the defaults that depend on other flags."""
    if not (training_args.do_train or training_args.do_eval):
        raise UserError("nothing to do: pass --do_train or --do_eval")
    if training_args.do_predict:
        raise UserError("--do_predict: give the data as --validation_file with --do_eval")
    check_ball(args)
    if args.pgd_steps < 0:
        raise UserError(f"--pgd_steps {args.pgd_steps}: must be 0 or more")
    alone = len(args.precision_set) == 1
    args.attack_precision = args.attack_precision or ("same" if alone else "other")
    if args.attack_precision not in ("same", "other"):
        raise UserError(f"--attack_precision {args.attack_precision}: allowed are same, other")
    if args.attack_precision == "other" and alone:
        raise UserError(f"--attack_precision other: --precision_set {args.precision_set[0]} has no other: give two")
    if model_args.train_all_weights and args.task == "qa":
        raise UserError("--train_all_weights: allowed with --task classification alone")
    if training_args.fsdp or training_args.deepspeed:
        raise UserError("--fsdp and --deepspeed shard the model; the attack needs all of it on every process")


def build_model(model_args, args, training, tokenizer, num_labels):
    """(model at the highest precision of the set, {name: config} of the set, highest first)."""
    labels = {"num_labels": num_labels} if num_labels else {}
    model = open_model(CLASSES[args.task], model_args, tokenizer, training, **labels)
    model.config.pad_token_id = tokenizer.pad_token_id
    if training and not model.config.lora_bank and not model_args.train_all_weights:
        model.add_lora(["shared"], model_args.lora_r, model_args.lora_alpha)
    if model.config.lora_bank and model_args.train_all_weights:
        raise UserError(f"--train_all_weights: {model_args.model_name_or_path} has adapters, which are trained")
    found, shapes = resolve_set(model, args.precision_set), model.layer_shapes()
    by_bits = sorted(found, key=lambda name: -describe_bit_config(found[name], shapes)["average_w_bits"])
    precisions = {name: found[name] for name in by_bits}
    model.set_bit_config(precisions[by_bits[0]])
    if training:
        uniform = [name for name in map(short_name, precisions.values()) if name != "mixed"]
        model.config.trained_bit_configs = uniform or None
    if training and not model.config.lora_bank:
        bits = {layer["w_bits"] for config in precisions.values() for layer in config.values()}
        model.config.trained_weights = not bits.isdisjoint(QUANTIZED_BITS)
        for layer in model.quant_layers().values():
            layer.trained = model.config.trained_weights
    if model.config.lora_bank and not model.config.base_model_name_or_path:
        model.set_base(model_args.model_name_or_path)
    model.set_execution(model_args.execution or "fake", model_args.backward_dtype)
    return model, precisions


def precisions_of_step(step, seed, names, attack_precision):
    """(precision of the update, precision of the attack) of an optimizer step: the same on all ranks and on resume.

    names: of the set; attack_precision: "same", or "other": a draw among the others.
    """
    rng, names = random.Random(f"{seed}-{step}"), sorted(names)
    update = rng.choice(names)
    return update, update if attack_precision == "same" else rng.choice([name for name in names if name != update])


class AdversarialTraining:
    """What both trainers add to theirs: each micro-batch is attacked, and trained at the precision of its step.

    precisions: {name: config}; adversarial: `AdversarialArguments`. The start of an attack is a function of seed, step
    and batch.
    """

    def __init__(self, *, precisions, adversarial, **kwargs):
        super().__init__(**kwargs)
        self.precisions, self.adversarial = precisions, adversarial

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "question_tokens" not in self._signature_columns:
            self._signature_columns.append("question_tokens")

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs, args, step = self._prepare_inputs(dict(inputs)), self.adversarial, self.state.global_step
        plain = self.accelerator.unwrap_model(model)
        update, attack = precisions_of_step(step, self.args.seed, self.precisions, args.attack_precision)
        with contextlib.ExitStack() as stack:
            if args.pgd_steps:
                stack.enter_context(perturbed(plain, self.attack(plain, inputs, attack)))
            stack.enter_context(plain.at_bits(self.precisions[update]))
            inputs.pop("question_tokens", None)
            return super().training_step(model, inputs, num_items_in_batch)

    def attack(self, model, inputs, precision):
        """The perturbation of a micro-batch, found at a precision of the set."""
        args = self.adversarial
        start = noise_generator(self.args.seed, self.state.global_step, inputs["input_ids"].tolist())
        ball = {"steps": args.pgd_steps, "step_size": args.step_size, "radius": args.radius}
        with self.compute_loss_context_manager():
            free = FREE_TOKENS[args.task](inputs)
            configs = [self.precisions[precision]]
            return pgd(model, inputs, LOSSES[args.task], configs, **ball, free=free, generator=start)


class AdversarialClassificationTrainer(AdversarialTraining, ClassificationTrainer):
    def run(self, folder, examples, features):
        """Train and evaluate as asked for, at every precision of the set; returns all metrics."""
        metrics = self.train_or_load(folder) if self.args.do_train else {}
        scores = {}
        for name, config in self.precisions.items() if self.args.do_eval else ():
            with self.model.at_bits(config):
                scores |= {f"{key}_{name}": value for key, value in self.evaluate().items()}
        if scores:
            self.log_metrics("eval", scores)
            self.save_metrics("eval", scores)
        return metrics | scores


class AdversarialQuestionAnsweringTrainer(AdversarialTraining, QuestionAnsweringTrainer):
    pass


def training_windows(examples, tokenizer, **settings):
    """`utils_qa.prepare_train_features` with question_tokens, the number of a window's tokens that may move."""
    windows = utils_qa.prepare_train_features(examples, tokenizer, **settings)
    ids = utils_qa.prepare_validation_features(examples, tokenizer, **settings)["example_id"]  # of the same windows
    lengths = question_lengths(examples["question"], tokenizer, settings["separator"])
    of_id = dict(zip(examples["id"], lengths, strict=True))
    return windows | {"question_tokens": [of_id[key] for key in ids]}


def prepare_texts(groups, tokenizer, folder):
    """(model, precisions, description of the bits, sources, keywords of the trainer, examples, features)."""
    model_args, data_args, args, training_args = groups
    rows, sources = load_rows(data_args, needed_splits(training_args), model_args)
    training = training_args.do_train
    number = number_of_classes(rows["train"], sources["train"]["source"]) if training else None
    model, precisions = build_model(model_args, args, training, tokenizer, number)
    if "validation" in rows:
        check_labels(rows["validation"], model.config.num_labels, sources["validation"]["source"])
    data = data_args, training_args.seed, folder, rows.get("train")
    bits = describe_model(model) | set_text_quantizer(model, tokenizer, model_args, *data)
    length = min(data_args.max_seq_length, model.config.max_position_embeddings)
    features = {split: text_classification.build_features(texts, tokenizer, length) for split, texts in rows.items()}
    options = {"model": model, "args": training_args, "compute_metrics": classification_metrics}
    options |= {"processing_class": tokenizer, "data_collator": DataCollatorWithPadding(tokenizer)}
    options |= {"train_dataset": features.get("train"), "eval_dataset": features.get("validation")}
    return model, precisions, bits, sources, options, rows, features


def prepare_questions(groups, tokenizer, folder):
    """As `prepare_texts`."""
    model_args, data_args, args, training_args = groups
    model, precisions = build_model(model_args, args, training_args.do_train, tokenizer, None)
    examples, sources = load_data(data_args, needed_splits(training_args), model_args)
    data = data_args, training_args, folder, examples.get("train")
    bits = describe_model(model) | set_qa_quantizer(model, tokenizer, model_args, *data)
    positions, features = model.config.max_position_embeddings, {}
    if "validation" in examples:
        rest = sources["validation"], tokenizer, data_args, training_args, positions
        features["validation"] = build_features(examples["validation"], "validation", *rest)
    if training_args.do_train:
        settings = {"tokenizer": tokenizer, **feature_settings(data_args, positions)}
        names = examples["train"].column_names
        options = {"batched": True, "remove_columns": names, "num_proc": data_args.preprocessing_num_workers}
        features["train"] = examples["train"].map(training_windows, fn_kwargs=settings, **options)
    options = trainer_arguments(model, tokenizer, data_args, training_args, examples, features)
    return model, precisions, bits, sources, options | {"configs": list(precisions.items())}, examples, features


TRAINERS = {
    "classification": (prepare_texts, AdversarialClassificationTrainer),
    "qa": (prepare_questions, AdversarialQuestionAnsweringTrainer),
}


def main():
    start = time.time()
    data_arguments, training_arguments = DATA[asked_task()]
    groups = parse_args(ModelArguments, data_arguments, AdversarialArguments, training_arguments)
    model_args, data_args, args, training_args = groups
    setup_logging(training_args)
    check_args(args, model_args, training_args)
    folder = OutputFolder(training_args, data_args.overwrite_output_dir, run_settings(*groups))
    set_seed(training_args.seed)
    prepare, trainer_class = TRAINERS[args.task]
    tokenizer = load_tokenizer(model_args)
    model, precisions, bits, sources, options, examples, features = prepare(groups, tokenizer, folder)
    if training_args.do_train:
        folder.start(**input_checksums(model, tokenizer, sources, precisions))
    trainer = trainer_class(**options, precisions=precisions, adversarial=args)
    metrics = trainer.run(folder, examples, features)
    details = {"bit_config": bits, "metrics": metrics, "data": sources, "adversarial": dataclasses.asdict(args)}
    write_run_record(trainer, folder, model_args, data_args, start, **details)


if __name__ == "__main__":
    with plain_errors():
        main()
