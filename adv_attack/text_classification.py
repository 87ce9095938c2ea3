#!/usr/bin/env python
"""Fine-tune and evaluate a quantizable GPT-2 text classifier, the target of the attacks.

    bash train.sh                                          # AG News, full fine-tuning, float32
    python text_classification.py --model_name_or_path gpt2 --dataset_name ag_news --do_train --do_eval \\
        --add_lora --output_dir results/lora
    python text_classification.py ... --bit_widths 4 6 8 --random_precision_training      # RPT, an adapter per width

What is trained: everything without --add_lora / --bit_widths / --bit_config; with one of them the adapters and the
class head, on a frozen base (--train_all_weights: everything after all). Random precision training (RPT, Double-Win
Quant, ICML 2021): each optimizer step draws one of --bit_widths. Double-Win trains on adversarial inputs; here the
inputs are clean.
"""

import contextlib
import dataclasses
import logging
import random
import time

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithPadding, set_seed

from classifier import accuracy_row, encode, load_rows, set_text_quantizer
from common import arguments
from common.arguments import option
from common.flags import parse_args
from common.loading import describe_model, load_tokenizer, open_model
from common.record import write_run_record
from common.resuming import OutputFolder, input_checksums, run_settings
from common.script import plain_errors, setup_logging
from common.trainer import StepMeanTrainer
from common.training_args import TrainingArguments
from models.errors import UserError
from models.modeling_gpt2_quant import QuantGPT2ForSequenceClassification
from models.quantization import QUANTIZED_BITS
from text_data import check_labels, number_of_classes

logger = logging.getLogger("text_classification")


@dataclasses.dataclass
class ModelArguments(arguments.ModelArguments):
    """The model, its adapters and its bits."""

    add_lora: bool = option(False, "one shared adapter, which serves any bits; alone: trained in full precision")
    bit_widths: list[int] | None = option(None, "width of W, A and KV trained with LoRA; several with RPT")
    bit_config: str | None = option(
        None,
        'per-layer bits: JSON file (configs/README.md), "W4A8KV8", or a width; training: static, with LoRA; else PTQ',
    )
    train_all_weights: bool = option(False, "train all weights at the bits that are given, without adapters")
    random_precision_training: bool = option(False, "RPT: every step trains one of --bit_widths", aliases=["--rpt"])


@dataclasses.dataclass
class TextArguments:
    """The texts."""

    dataset_name: str | None = option(None, "hub data set with a text and a label column, for example ag_news")
    dataset_config_name: str | None = option(None, "its configuration")
    text_column: str = option("text", "name of the text column or key")
    label_column: str = option("label", "name of the label column or key (integers 0, 1, ...)")
    train_file: str | None = option(None, "local training data: .jsonl or .csv with text and label")
    validation_file: str | None = option(None, "local data to evaluate on and to attack, same forms")
    max_seq_length: int = option(256, "tokens of a text, at most; longer texts are cut")
    max_train_samples: int | None = option(None, "use only so many training texts (quick tests)")
    max_eval_samples: int | None = option(None, "use only so many validation texts")
    record_file: str | None = option(None, "where the run's JSON record goes (default: record.json in --output_dir)")


@dataclasses.dataclass
class TrainingTextArguments(TextArguments):
    overwrite_output_dir: bool = option(False, "start over in a used --output_dir; deletes its checkpoints")


class ClassifierTrainingArguments(TrainingArguments):
    metrics = ("accuracy", "accuracy_low", "accuracy_high", "loss")


def check_args(model_args, training_args):
    """Refuse what cannot work, before anything is loaded."""
    if not (training_args.do_train or training_args.do_eval):
        raise UserError("nothing to do: pass --do_train or --do_eval")
    if training_args.do_predict:
        raise UserError("--do_predict: give the texts as --validation_file with --do_eval")
    widths, rpt = model_args.bit_widths or [], model_args.random_precision_training
    if widths and model_args.bit_config:
        raise UserError("--bit_widths and --bit_config both say the bits: pass one of them")
    if rpt and len(set(widths)) < 2:
        raise UserError("--random_precision_training draws one of --bit_widths: pass at least two different ones")
    if len(set(widths)) < len(widths):
        raise UserError(f"--bit_widths {' '.join(map(str, widths))}: every width once")
    if len(widths) > 1 and not rpt:
        raise UserError("several --bit_widths need --random_precision_training")
    if model_args.train_all_weights and model_args.add_lora:
        raise UserError("--train_all_weights and --add_lora contradict each other")
    if rpt and (training_args.fsdp or training_args.deepspeed):
        raise UserError("--fsdp and --deepspeed shard the model; random precision needs all of it on every process")


def build_model(model_args, training, tokenizer, num_labels):
    """The classifier with its adapters and bits set. num_labels: None keeps the checkpoint's."""
    labels = {"num_labels": num_labels} if num_labels else {}
    model = open_model(QuantGPT2ForSequenceClassification, model_args, tokenizer, training, **labels)
    model.config.pad_token_id = tokenizer.pad_token_id
    widths = model_args.bit_widths or []
    bits = model_args.bit_config if model_args.bit_config is not None else max(widths, default=None)
    lora = model_args.add_lora or (bits is not None and not model_args.train_all_weights)
    if training and lora and not model.config.lora_bank:
        with model.at_bits(bits or 32) as resolved:
            bank = widths or sorted({layer["w_bits"] for layer in resolved.values()})
        model.add_lora(["shared"] if model_args.add_lora else bank, model_args.lora_r, model_args.lora_alpha)
    if bits is not None:
        model.set_bit_config(bits)
    if training and not model.config.lora_bank:
        layers = model.quant_layers().values()
        trained = set(widths) or {layer.w_bits for layer in layers}
        model.config.trained_weights = not trained.isdisjoint(QUANTIZED_BITS)
        for layer in layers:
            layer.trained = model.config.trained_weights
    if model.config.lora_bank and not model.config.base_model_name_or_path:
        model.set_base(model_args.model_name_or_path)
    return model


def width_for_step(step, seed, bit_widths):
    """The width that optimizer step `step` trains: the same on all ranks and on resume."""
    return random.Random(f"{seed}-{step}").choice(sorted(bit_widths))


class ClassificationTrainer(StepMeanTrainer):
    """Trainer that stops at a loss that is not finite. random_widths: those of RPT; None: the bits that are set."""

    def __init__(self, *args, random_widths=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.random_widths = random_widths

    def training_step(self, model, inputs, num_items_in_batch=None):
        plain = self.accelerator.unwrap_model(model)
        bits = plain.config.bit_config
        if self.random_widths:
            bits = width_for_step(self.state.global_step, self.args.seed, self.random_widths)
        with plain.at_bits(bits):  # what is saved stands at the bits that were set
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.stop_unless_finite(loss)
        return loss


def classification_metrics(prediction):
    """compute_metrics: accuracy in percent with its Wilson interval, and the mean cross-entropy over the texts."""
    row = accuracy_row(np.argmax(prediction.predictions, -1) == prediction.label_ids)
    low, high = row["interval"]
    logits, labels = torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids)
    # In place of the Trainer's own "loss", which weights the last batch like a full one.
    loss = F.cross_entropy(logits.float(), labels.long()).item()
    return {"accuracy": row["accuracy"], "accuracy_low": low, "accuracy_high": high, "loss": loss}


def build_features(rows, tokenizer, max_length):
    """Token ids and labels of {"text", "label"} rows."""
    tokens = encode(tokenizer, [row["text"] for row in rows], max_length)
    inputs = ({"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in tokens)
    return datasets.Dataset.from_list([{**ids, "labels": row["label"]} for ids, row in zip(inputs, rows)])


def run(trainer, folder, training_args, widths):
    """Train and evaluate as asked for, at every width of RPT; returns all metrics."""
    metrics = {}
    if training_args.do_train:
        metrics |= trainer.train_or_load(folder)
    if training_args.do_eval:
        for bits in widths or [None]:
            prefix = f"eval_{bits}bit" if bits else "eval"
            with trainer.model.at_bits(bits) if bits else contextlib.nullcontext():
                scores = trainer.evaluate(metric_key_prefix=prefix)
            metrics |= scores
            trainer.log_metrics(prefix, scores)
            trainer.save_metrics(prefix, scores)
    return metrics


def main():
    start = time.time()
    groups = ModelArguments, TrainingTextArguments, ClassifierTrainingArguments
    model_args, data_args, training_args = settings = parse_args(*groups)
    setup_logging(training_args)
    check_args(model_args, training_args)
    folder = OutputFolder(training_args, data_args.overwrite_output_dir, run_settings(*settings))
    set_seed(training_args.seed)

    evaluates = training_args.do_eval or training_args.eval_strategy != "no"
    splits = ["train"] * training_args.do_train + ["validation"] * evaluates
    rows, sources = load_rows(data_args, splits, model_args)
    num_labels = number_of_classes(rows["train"], sources["train"]["source"]) if training_args.do_train else None
    tokenizer = load_tokenizer(model_args)
    model = build_model(model_args, training_args.do_train, tokenizer, num_labels)
    if "validation" in rows:
        check_labels(rows["validation"], model.config.num_labels, sources["validation"]["source"])
    data = data_args, training_args.seed, folder, rows.get("train")
    bits = describe_model(model) | set_text_quantizer(model, tokenizer, model_args, *data)
    length = min(data_args.max_seq_length, model.config.max_position_embeddings)
    features = {split: build_features(texts, tokenizer, length) for split, texts in rows.items()}
    if training_args.do_train:
        folder.start(**input_checksums(model, tokenizer, sources))
    widths = model_args.bit_widths if model_args.random_precision_training else None
    data = {"train_dataset": features.get("train"), "eval_dataset": features.get("validation")}
    data |= {"processing_class": tokenizer, "data_collator": DataCollatorWithPadding(tokenizer)}
    options = {"compute_metrics": classification_metrics, "random_widths": widths}
    trainer = ClassificationTrainer(model=model, args=training_args, **data, **options)
    metrics = run(trainer, folder, training_args, widths)
    details = {"bit_config": bits, "metrics": metrics, "data": sources, "random_precision_training": widths}
    write_run_record(trainer, folder, model_args, data_args, start, **details)


if __name__ == "__main__":
    with plain_errors():
        main()
