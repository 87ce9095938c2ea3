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
import itertools
import json
import logging
import os
import random
import sys
import time
import warnings

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    set_seed,
)
from transformers.utils.versions import require_version

from classifier import accuracy_row, encode, load_rows
from flags import parse_args
from models.bit_config import describe_bit_config, short_name
from models.checkpoint import read_config
from models.errors import UserError, is_disk_error
from models.modeling_gpt2_quant import QuantGPT2ForSequenceClassification
from record import hide_tokens, relative_path, run_record, write_json_atomic
from resuming import OutputFolder, ResumableTrainer, input_checksums, run_settings
from text_data import check_labels, number_of_classes
from training_args import TrainingArguments

require_version("transformers>=5.23", "pip install -r requirements.txt")

logger = logging.getLogger("text_classification")


# Copied from base_model/run_qa.py:option
def option(default, text, **kwargs):
    """A dataclass field with a help text."""
    aliases = {"aliases": kwargs.pop("aliases")} if "aliases" in kwargs else {}
    factory = {"default_factory": lambda: default} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**factory, metadata={"help": text.replace("%", "%%"), **aliases}, **kwargs)


@dataclasses.dataclass
class ModelArguments:
    """The model, its adapters and its bits."""

    model_name_or_path: str = option("gpt2", "hub name or folder: stock GPT-2 weights, or a checkpoint of this script")
    base_model_name_or_path: str | None = option(None, "where the frozen base of an adapter checkpoint lies, if moved")
    tokenizer_name: str | None = option(None, "tokenizer, if it is not the model's")
    cache_dir: str | None = option(None, "cache of hub downloads")
    model_revision: str = option("main", "branch, tag or commit on the hub")
    token: str | None = option(None, "hub token (default: the one of `hf auth login`)")
    attn_implementation: str | None = option(None, "eager, sdpa or another attention of transformers")
    add_lora: bool = option(False, "one shared adapter, which serves any bits; alone: trained in full precision")
    lora_r: int | None = option(None, "rank of the adapters (default: 8, or that of the checkpoint)")
    lora_alpha: int | None = option(None, "scaling is lora_alpha / lora_r (default: 16, or that of the checkpoint)")
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
    """The texts, and the output folder."""

    overwrite_output_dir: bool = option(False, "start over in a used --output_dir; deletes its checkpoints")


class ClassifierTrainingArguments(TrainingArguments):
    """TrainingArguments with the metrics of `classification_metrics`."""

    metrics = ("accuracy", "accuracy_low", "accuracy_high", "loss")


# Copied from base_model/run_qa.py:setup_logging
def setup_logging(training_args):
    """INFO on rank 0, warnings elsewhere."""
    level = logging.INFO if training_args.process_index == 0 else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=level)
    for name in ("httpx", "datasets", "bitsandbytes", "evaluate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.set_verbosity_warning()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")  # of torch, on machines without a GPU
    warnings.filterwarnings("ignore", message=".*null_placement.*")  # of pyarrow, raised inside datasets
    if training_args.process_index != 0:
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


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


# Copied from base_model/run_qa.py:load_tokenizer
def load_tokenizer(model_args):
    """The tokenizer; GPT-2 has no pad token, so padding uses its end-of-text token (masked, never scored).

    Raises ValueError for tokenizer files, or a config.json beside them, that do not work; OSError for none.
    """
    name = model_args.tokenizer_name or model_args.model_name_or_path
    options = {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision, "token": model_args.token}
    if not model_args.tokenizer_name:
        read_config(str(name), options)  # the tokenizer's class may come from it
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, UserError):
        raise
    except Exception as error:  # faulty files raise any class, that of tokenizers is Exception itself
        raise UserError(f"{name}: its tokenizer does not open ({type(error).__name__}: {error})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"  # where a causal model does not look; positions count from the text's start
    return tokenizer


# Copied from base_model/run_qa.py:open_model
def open_model(model_class, model_args, tokenizer, training=False, **overrides):
    """The model of --model_name_or_path, complete with its adapters.

    Raises ValueError for a tokenizer that is not the model's, for adapters of another --lora_r or --lora_alpha, and
    for training on an exported checkpoint.
    """
    options = {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision, "token": model_args.token}
    if model_args.attn_implementation:
        options["attn_implementation"] = model_args.attn_implementation
    model = model_class.from_pretrained(
        model_args.model_name_or_path,
        base_model_name_or_path=model_args.base_model_name_or_path,
        **options,
        **overrides,
    )
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the embedding of {model_args.model_name_or_path} "
            f"{model.config.vocab_size}: they do not belong together (--tokenizer_name)"
        )
    for key in ("lora_r", "lora_alpha") if model.config.lora_bank else ():
        asked, found = getattr(model_args, key, None), getattr(model.config, key)
        if asked not in (None, found):
            raise UserError(
                f"--{key} {asked}, but the adapters of {model_args.model_name_or_path} have {key} {found}: leave the "
                "flag out, or start from a model without adapters"
            )
    if training and model.config.exported_widths:
        raise UserError(
            f"{model_args.model_name_or_path} is an exported checkpoint without float weights: it can be evaluated; "
            "train the checkpoint that it was made from"
        )
    if not training:  # only of frozen weights codes are kept from one forward to the next
        for layer in model.quant_layers().values():
            if layer.weight is not None:
                layer.weight.requires_grad_(False)
    return model


def build_model(model_args, training, tokenizer, num_labels):
    """The classifier with its adapters and bits set. num_labels: None keeps the checkpoint's."""
    labels = {"num_labels": num_labels} if num_labels else {}
    model = open_model(QuantGPT2ForSequenceClassification, model_args, tokenizer, training, **labels)
    model.config.pad_token_id = tokenizer.pad_token_id
    widths = model_args.bit_widths or []
    bits = model_args.bit_config if model_args.bit_config is not None else max(widths, default=None)
    lora = model_args.add_lora or (bits is not None and not model_args.train_all_weights)
    if training and lora and not model.config.lora_bank:
        with model.bit_config(bits or 32) as resolved:
            bank = widths or sorted({layer["w_bits"] for layer in resolved.values()})
        model.add_lora(["shared"] if model_args.add_lora else bank, model_args.lora_r, model_args.lora_alpha)
    if bits is not None:
        model.set_bit_config(bits)
    if model.config.lora_bank and not model.config.base_model_name_or_path:
        model.set_base(model_args.model_name_or_path)
    return model


# Copied from base_model/run_qa.py:describe_model
def describe_model(model):
    """{"name", "layers" (resolved config), average bits, sizes, trainable parameters}; logged and recorded."""
    shapes, resolved = model.layer_shapes(), model.config.bit_config
    description = {"name": short_name(resolved), **describe_bit_config(resolved, shapes)}
    trainable, total = model.num_parameters(only_trainable=True), model.num_parameters()
    logger.info("bits: %s", json.dumps(description))
    logger.info("LoRA bank: %s; trainable: %d of %d parameters", model.config.lora_bank, trainable, total)
    return {**description, "lora_bank": model.config.lora_bank, "layers": resolved}


def width_for_step(step, seed, bit_widths):
    """The width that optimizer step `step` trains: the same on all ranks and on resume."""
    return random.Random(f"{seed}-{step}").choice(sorted(bit_widths))


# Copied from base_model/trainer_qa.py:StepMeanTrainer
class StepMeanTrainer(ResumableTrainer):
    """Trainer whose optimizer step descends the mean loss of its samples: all micro-batches, all processes, each once.

    So N processes with batch b do what one does with batch N b, and k accumulated batches what one of k times the size
    does, at the ragged end of an epoch too. Losses and gradients are averaged over the processes, as DDP does.
    """

    loss_is_scaled_for_ga = True  # by the share of a micro-batch
    configs = ()

    def __init__(self, *, model, args, **kwargs):
        if len(model.config.lora_bank or ()) > 1:
            args.ddp_find_unused_parameters = True  # of the adapters a step uses some; checkpointing turns it off
        super().__init__(model=model, args=args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step, each with its "share": its part of the samples of the step, times
        the processes.

        Accelerate hands every process full batches. Those that end an epoch it fills up with duplicates: of the last
        ones only the first samples, in the order of the ranks, are new.
        """
        batches = [dict(batch) for batch in itertools.islice(epoch_iterator, num_batches)]
        counts, world = [len(batch["input_ids"]) for batch in batches], self.args.world_size
        complete = self.args.dataloader_drop_last or self.args.train_sampling_strategy == "batch_rebalance"
        if batches and world > 1 and not complete and self.accelerator.gradient_state.end_of_dataloader:
            size = counts[-1]
            # Not gradient_state.remainder: a resumed epoch does not have it.
            new = len(self.train_dataset) % (size * world) or size * world
            counts[-1] = min(max(new - self.args.process_index * size, 0), size)
            # A process without a new sample computes a duplicate, whose share is 0.
            batches[-1] = {key: value[: max(counts[-1], 1)] for key, value in batches[-1].items()}
        total = sum(counts)
        if world > 1:
            total = self.accelerator.reduce(torch.tensor(float(total), device=device), "mean")
        for batch, count in zip(batches, counts, strict=True):
            batch["share"] = count / total
        return batches, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        share = inputs.pop("share", 1.0)  # evaluation has none
        loss, outputs = self.mean_loss(model, inputs)
        return (loss * share, outputs) if return_outputs else loss * share

    def mean_loss(self, model, inputs):
        """(mean loss of the samples of a micro-batch, outputs)."""
        return super().compute_loss(model, inputs, return_outputs=True)

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if not len(loader):
            raise UserError(
                f"--dataloader_drop_last: the {len(self.train_dataset)} training samples do not fill one batch of "
                f"{self.args.train_batch_size} on each of {self.args.world_size} processes"
            )
        return loader

    def get_eval_dataloader(self, eval_dataset=None):
        """Without --dataloader_drop_last, which is about training: every sample is evaluated."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def train(self, *args, **kwargs):
        """Refuses a --metric_for_best_model that no evaluation will have."""
        metric, metrics = self.args.metric_for_best_model, self.args.metrics
        known = [*metrics, *(f"{name}_{config}" for name in metrics for config, _ in self.configs)]
        if metric and metric.removeprefix("eval_") not in known:
            raise UserError(f"--metric_for_best_model {metric}: allowed are {', '.join(known)}")
        return super().train(*args, **kwargs)


class ClassificationTrainer(StepMeanTrainer):
    """Trainer with random precision training, which also stops before a loss that is not finite is used.

    Args: random_widths: the widths to draw from, None to train at the bits that are set.
    """

    def __init__(self, *args, random_widths=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.random_widths = random_widths

    def training_step(self, model, inputs, num_items_in_batch=None):
        plain = self.accelerator.unwrap_model(model)
        bits = plain.config.bit_config
        if self.random_widths:
            bits = width_for_step(self.state.global_step, self.args.seed, self.random_widths)
        with plain.bit_config(bits) as resolved:  # what is saved stands at the bits that were set
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss.item()} at step {self.state.global_step + 1} (bits: {short_name(resolved)}); try a "
                "lower --learning_rate or --bf16 instead of --fp16"
            )
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
    features = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": row["label"]} for ids, row in zip(tokens, rows)
    ]
    return datasets.Dataset.from_list(features)


def run(trainer, folder, training_args, widths):
    """Train and evaluate as asked for, at every width of RPT; returns all metrics."""
    metrics = {}
    if training_args.do_train:
        metrics |= trainer.train_or_load(folder)
    if training_args.do_eval:
        for bits in widths or [None]:
            prefix = f"eval_{bits}bit" if bits else "eval"
            with trainer.model.bit_config(bits) if bits else contextlib.nullcontext():
                scores = trainer.evaluate(metric_key_prefix=prefix)
            metrics |= scores
            trainer.log_metrics(prefix, scores)
            trainer.save_metrics(prefix, scores)
    return metrics


# Copied from base_model/run_qa.py:plain_errors
@contextlib.contextmanager
def plain_errors():
    """What a user or a disk did ends the script with one message; any other error shows its traceback."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, UserError | FloatingPointError) or is_disk_error(error)):
            raise
        sys.exit(hide_tokens(f"error: {error}"))


def main():
    start = time.time()
    model_args, data_args, training_args = parse_args(
        ModelArguments, TrainingTextArguments, ClassifierTrainingArguments
    )
    setup_logging(training_args)
    check_args(model_args, training_args)
    settings = run_settings(model_args, data_args, training_args)
    folder = OutputFolder(training_args, data_args.overwrite_output_dir, settings)
    set_seed(training_args.seed)

    evaluates = training_args.do_eval or training_args.eval_strategy != "no"
    splits = ["train"] * training_args.do_train + ["validation"] * evaluates
    rows, sources = load_rows(data_args, splits, model_args)
    num_labels = number_of_classes(rows["train"], sources["train"]["source"]) if training_args.do_train else None
    tokenizer = load_tokenizer(model_args)
    model = build_model(model_args, training_args.do_train, tokenizer, num_labels)
    if "validation" in rows:
        check_labels(rows["validation"], model.config.num_labels, sources["validation"]["source"])
    bits = describe_model(model)
    length = min(data_args.max_seq_length, model.config.max_position_embeddings)
    features = {split: build_features(texts, tokenizer, length) for split, texts in rows.items()}
    if training_args.do_train:
        folder.start(**input_checksums(model, tokenizer, sources))
    widths = model_args.bit_widths if model_args.random_precision_training else None
    trainer = ClassificationTrainer(
        model=model,
        args=training_args,
        train_dataset=features.get("train"),
        eval_dataset=features.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=classification_metrics,
        random_widths=widths,
    )
    metrics = run(trainer, folder, training_args, widths)
    if trainer.is_world_process_zero():
        record = run_record(
            model=relative_path(model_args.model_name_or_path),
            bit_config=bits,
            metrics=metrics,
            data=sources,
            seed=training_args.seed,
            wall_seconds=time.time() - start,
            steps=trainer.state.global_step,
            continues=folder.continues,
            random_precision_training=widths,
            dtype=training_args.run_dtype,
        )
        write_json_atomic(data_args.record_file or os.path.join(training_args.output_dir, "record.json"), record)


if __name__ == "__main__":
    with plain_errors():
        main()
