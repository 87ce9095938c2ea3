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

import contextlib
import dataclasses
import functools
import json
import logging
import os
import sys
import time
import warnings

import datasets
import evaluate
import transformers
from datasets.fingerprint import Hasher
from transformers import AutoTokenizer, DataCollatorWithPadding, set_seed
from transformers.utils.versions import require_version

import precision_range_test
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
from flags import parse_args
from models.bit_config import describe_bit_config, short_name
from models.checkpoint import read_config
from models.errors import UserError, is_disk_error
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering
from models.quantization import FLOAT_BITS, QUANTIZED_BITS
from record import file_checksum, hide_tokens, json_checksum, relative_path, run_record, write_json_atomic
from resuming import OutputFolder, input_checksums, run_settings, tokenizer_checksum
from squad_data import load_qa_datasets
from training_args import TrainingArguments
from utils_qa import prepare_train_features, prepare_validation_features

require_version("transformers>=5.23", "pip install -r requirements.txt")

logger = logging.getLogger("run_qa")
HERE = os.path.dirname(os.path.abspath(__file__))


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
    lora_r: int | None = option(None, "rank of the adapters (default: 8, or that of the checkpoint)")
    lora_alpha: int | None = option(None, "scaling is lora_alpha / lora_r (default: 16, or that of the checkpoint)")
    execution: str | None = option(
        None,
        "how layers with W and A of at most 8 bits compute: integer (int8 products) or fake (quantized values in "
        "float); default: fake in training, integer in evaluation",
    )
    backward_dtype: str = option("fp32", "backward products with frozen quantized weights: fp32 or bf16")


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


# Copied from base_model/run_qa.py:DataTrainingArguments
@dataclasses.dataclass
class DataTrainingArguments:
    """The data, the features and the answers."""

    dataset_name: str | None = option(None, "hub data set in SQuAD's format, for example squad")
    dataset_config_name: str | None = option(None, "its configuration")
    train_file: str | None = option(None, "local training data: official nested SQuAD JSON, or flat rows")
    validation_file: str | None = option(None, "local validation data, same forms")
    test_file: str | None = option(None, "local data for --do_predict, same forms")
    overwrite_cache: bool = option(False, "build the features anew instead of taking them from the datasets cache")
    overwrite_output_dir: bool = option(False, "start over in a used --output_dir; deletes its checkpoints")
    preprocessing_num_workers: int | None = option(None, "processes that build the features")
    max_seq_length: int = option(786, "tokens of question, separator and context together; longer contexts are split")
    doc_stride: int = option(128, "tokens that two windows of a long context share")
    question_separator: str = option(
        "\\n", "text between question and context (backslash escapes are read: '\\n', '' for none)"
    )
    pad_to_max_length: bool = option(False, "pad to max_seq_length instead of the longest of the batch (same metrics)")
    max_train_samples: int | None = option(None, "use only so many training questions (quick tests)")
    max_eval_samples: int | None = option(None, "use only so many validation questions")
    max_predict_samples: int | None = option(None, "use only so many questions for --do_predict")
    n_best_size: int = option(20, "candidate answers kept in the n-best file")
    max_answer_length: int = option(30, "tokens of an answer, at most")
    record_file: str | None = option(None, "where the run's JSON record goes (default: record.json in --output_dir)")


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
            raise UserError(
                f"--range_test_window {cyclic_args.range_test_window}: allowed are 2 to half of --range_test_steps "
                f"{cyclic_args.range_test_steps}"
            )
        if not 0 < cyclic_args.range_test_share <= 1 or not cyclic_args.range_test_threshold >= 0:
            raise UserError(
                f"--range_test_share {cyclic_args.range_test_share}, --range_test_threshold "
                f"{cyclic_args.range_test_threshold}: allowed are above 0 up to 1, and 0 or more"
            )
        if widths[1] in FLOAT_BITS:
            raise UserError(
                f"--precision_range_test ends at the highest of --bit_widths: {widths[1]} is no such width"
            )
    elif training_args.do_train:
        if training_args.max_steps < 1:
            raise UserError("--max_steps is missing: the cycles divide it")
        if not 1 <= cyclic_args.num_cyclic_period <= training_args.max_steps:
            raise UserError(
                f"--num_cyclic_period {cyclic_args.num_cyclic_period}: allowed is 1 to --max_steps "
                f"{training_args.max_steps}, a cycle needs a step"
            )


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


def build_model(model_args, cyclic_args, training, tokenizer, to_config):
    """(model at the highest width, [(name, config)] to evaluate); `to_config`: bits -> short form."""
    model = open_model(QuantGPT2ForQuestionAnswering, model_args, tokenizer, training)
    low, high = cyclic_args.bit_widths
    evaluated = list(dict.fromkeys(cyclic_args.eval_bit_widths or (low, high)))
    if training and not model.config.lora_bank:
        model.add_lora(["shared"], model_args.lora_r, model_args.lora_alpha)
    trained = range(low, high + 1) if training else ()
    for bits in [*evaluated, max(evaluated), *trained]:
        model.set_bit_config(to_config(bits))  # refuses what the bank of a checkpoint has no adapter for
    if training:  # what run_qa_eval.py evaluates when it is not told
        model.config.trained_bit_configs = [to_config(bits) for bits in reversed(trained)]
    if model.config.lora_bank and not model.config.base_model_name_or_path:
        model.set_base(model_args.model_name_or_path)
    model.set_execution(model_args.execution or ("fake" if training else "integer"), model_args.backward_dtype)
    return model, [(to_config(bits), to_config(bits)) for bits in evaluated]


# Copied from base_model/run_qa.py:describe_model
def describe_model(model):
    """{"name", "layers" (resolved config), average bits, sizes, trainable parameters}; logged and recorded."""
    shapes, resolved = model.layer_shapes(), model.config.bit_config
    description = {"name": short_name(resolved), **describe_bit_config(resolved, shapes)}
    trainable, total = model.num_parameters(only_trainable=True), model.num_parameters()
    logger.info("bits: %s", json.dumps(description))
    logger.info("LoRA bank: %s; trainable: %d of %d parameters", model.config.lora_bank, trainable, total)
    return {**description, "lora_bank": model.config.lora_bank, "layers": resolved}


# Copied from base_model/run_qa.py:load_data
def load_data(data_args, splits, model_args):
    """({split: examples}, {split: source, number and checksum}) for the splits that the run needs."""
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_predict_samples,
    }
    raw = load_qa_datasets(
        data_args.dataset_name,
        data_args.dataset_config_name,
        **{f"{split}_file": path for split, path in files.items()},
        cache_dir=model_args.cache_dir,
        splits=splits,
        token=model_args.token,
    )
    examples, sources = {}, {}
    for split in splits:
        limit = limits[split]
        examples[split] = raw[split].select(range(min(limit, len(raw[split])))) if limit else raw[split]
        path = files[split]
        sources[split] = {
            "source": relative_path(path) if path else data_args.dataset_name,
            "examples": len(examples[split]),
            "sha256": file_checksum(path) if path else json_checksum(examples[split][:]),
        }
    return examples, sources


# Copied from base_model/run_qa.py:build_features
def build_features(examples, split, source, tokenizer, data_args, training_args, max_positions):
    """Token windows of a split; those to evaluate are sorted by length, so that batches need little padding.

    Features of a local file are kept in the datasets cache, where other ranks and later runs find them; the name of
    the cache file covers all that they depend on.
    """
    build = prepare_train_features if split == "train" else prepare_validation_features
    settings = {
        "max_seq_length": min(data_args.max_seq_length, max_positions),
        "doc_stride": data_args.doc_stride,
        "separator": data_args.question_separator.encode("latin-1", "backslashreplace").decode("unicode_escape"),
    }
    cache_file = None
    if source["sha256"]:
        code = file_checksum(os.path.join(HERE, "utils_qa.py"))
        parts = [split, source["sha256"], len(examples), sorted(settings.items()), code, tokenizer_checksum(tokenizer)]
        name = Hasher.hash(parts)
        cache_file = os.path.join(datasets.config.HF_DATASETS_CACHE, "qa_features", f"{name}.arrow")
        os.makedirs(os.path.dirname(cache_file), exist_ok=True)
    with training_args.main_process_first(desc=f"features of {split}"):
        features = examples.map(
            build,
            batched=True,
            remove_columns=examples.column_names,
            fn_kwargs={"tokenizer": tokenizer, **settings},
            num_proc=data_args.preprocessing_num_workers,
            cache_file_name=cache_file,
            load_from_cache_file=not data_args.overwrite_cache,
            desc=f"features of {split}",
        )
    logger.info("%s: %d questions, %d windows", split, len(examples), len(features))
    return features if split == "train" else features.sort("length", reverse=True)


# Copied from base_model/run_qa.py:make_collator
def make_collator(tokenizer, data_args, max_positions):
    """Pads to the longest of the batch, or to max_seq_length."""
    if data_args.pad_to_max_length:
        length = min(data_args.max_seq_length, max_positions)
        return DataCollatorWithPadding(tokenizer, padding="max_length", max_length=length)
    return DataCollatorWithPadding(tokenizer)


# Copied from base_model/run_qa.py:make_metric
def make_metric():
    """compute_metrics for the trainer: EM/F1 through the `evaluate` module in this folder; the hub is not asked."""
    metric = evaluate.load(os.path.join(HERE, "squad_metric"), keep_in_memory=True)

    def compute_metrics(prediction):
        return metric.compute(
            predictions=[{"id": key, "prediction_text": text} for key, text in prediction.predictions.items()],
            references=[
                {"id": key, "answers": {"text": texts, "answer_start": [0] * len(texts)}}
                for key, texts in prediction.label_ids.items()
            ],
        )

    return compute_metrics


# Copied from base_model/run_qa.py:needed_splits
def needed_splits(training_args):
    """The splits that the run reads."""
    evaluates = training_args.do_eval or (training_args.do_train and training_args.eval_strategy != "no")
    wanted = {"train": training_args.do_train, "validation": evaluates, "test": training_args.do_predict}
    return [split for split, use in wanted.items() if use]


# Copied from base_model/run_qa.py:run
def run(trainer, folder, examples, features, training_args):
    """Train, evaluate, predict as asked for; returns all metrics."""
    metrics = {}
    if training_args.do_train:
        batch, accumulated = training_args.train_batch_size, training_args.gradient_accumulation_steps
        processes = training_args.world_size
        logger.info(
            f"batch: {batch} a process x {accumulated} accumulated x {processes} processes = "
            f"{batch * accumulated * processes} windows a step"
        )
        metrics |= trainer.train_or_load(folder)
    if training_args.do_eval:
        scores = trainer.evaluate()
        metrics |= scores
        trainer.log_metrics("eval", scores)
        trainer.save_metrics("eval", scores)
    if training_args.do_predict:
        _, scores = trainer.predict(features["test"], examples["test"], metric_key_prefix="predict")
        metrics |= scores
        trainer.log_metrics("predict", scores)
        trainer.save_metrics("predict", scores)
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


def make_schedule(cyclic_args, steps):
    """[bits] of all optimizer steps; `steps`: --max_steps."""
    cycles, (low, high) = cyclic_args.num_cyclic_period, cyclic_args.bit_widths
    if cyclic_args.precision_range_test:  # so many steps for each width
        return [bits for bits in range(low, high + 1) for _ in range(steps)]
    return [cyclic_bit_width(t, steps, cycles, low, high, cyclic_args.period) for t in range(steps)]


def describe_training(schedule, cyclic_args, training_args):
    """What a record says about the training: its settings, and its cost by CPT's model."""
    tensors = {
        tensor: schedule if tensor in cyclic_args.cycle else [cyclic_args.fixed_bits] * len(schedule)
        for tensor in TENSORS
    }
    batch = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    return {
        "cyclic": dataclasses.asdict(cyclic_args) | {"mean_bits": sum(schedule) / len(schedule)},
        "training_cost": training_cost(tensors["w"], cyclic_args.gradient_bits, tensors["a"]),
        "training": {
            "max_steps": training_args.max_steps,
            "windows_per_step": batch,
            "learning_rate": training_args.learning_rate,
            "lr_scheduler_type": str(training_args.lr_scheduler_type.value),
        },
    }


def run_range_test(trainer, cyclic_args, training_args):
    """Train the widths and report; returns the metrics of the record."""
    starts, accuracies, seconds = trainer.train_widths(cyclic_args.range_test_window)
    min_bits, lines = precision_range_test.report(
        starts,
        accuracies,
        cyclic_args.range_test_window,
        cyclic_args.range_test_threshold,
        cyclic_args.range_test_share,
        training_args.output_dir,
        write=trainer.is_world_process_zero(),
    )
    if trainer.is_world_process_zero():
        print("\n".join(lines), flush=True)
    return {"train_runtime": seconds, "min_bits": min_bits}


def main():
    start = time.time()
    model_args, data_args, cyclic_args, training_args = parse_args(
        ModelArguments, DataTrainingArguments, CyclicArguments, TrainingArguments
    )
    setup_logging(training_args)
    check_args(cyclic_args, training_args)
    if cyclic_args.precision_range_test:
        precision_range_test.prepare_arguments(cyclic_args, training_args)
    settings = run_settings(model_args, data_args, cyclic_args, training_args)
    folder = OutputFolder(training_args, data_args.overwrite_output_dir, settings)
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(model_args)
    to_config = functools.partial(short_config, cycle=cyclic_args.cycle, fixed_bits=cyclic_args.fixed_bits)
    model, evaluated = build_model(model_args, cyclic_args, training_args.do_train, tokenizer, to_config)
    bits = describe_model(model)
    examples, sources = load_data(data_args, needed_splits(training_args), model_args)
    positions = model.config.max_position_embeddings
    features = {
        split: build_features(rows, split, sources[split], tokenizer, data_args, training_args, positions)
        for split, rows in examples.items()
    }
    if cyclic_args.gradient_bits < 32:
        quantize_output_gradients(model, cyclic_args.gradient_bits)
    if training_args.do_train:
        folder.start(**input_checksums(model, tokenizer, sources))
    range_test = cyclic_args.precision_range_test
    schedule = make_schedule(cyclic_args, training_args.max_steps) if training_args.do_train else []
    trainer_class = precision_range_test.RangeTestTrainer if range_test else CyclicPrecisionTrainer
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=features.get("train"),
        eval_dataset=features.get("validation"),
        eval_examples=examples.get("validation"),
        processing_class=tokenizer,
        data_collator=make_collator(tokenizer, data_args, positions),
        compute_metrics=make_metric(),
        n_best_size=data_args.n_best_size,
        max_answer_length=data_args.max_answer_length,
        configs=evaluated,
        schedule=schedule,
        to_config=to_config,
    )
    training = describe_training(schedule, cyclic_args, training_args) if schedule else {}
    if schedule and trainer.is_world_process_zero():
        write_schedule(schedule, training_args.output_dir, **training["cyclic"])
    if range_test:
        metrics = run_range_test(trainer, cyclic_args, training_args)
    else:
        metrics = run(trainer, folder, examples, features, training_args)
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
            dtype=training_args.run_dtype,
            **training,
        )
        write_json_atomic(data_args.record_file or os.path.join(training_args.output_dir, "record.json"), record)


if __name__ == "__main__":
    with plain_errors():
        main()
