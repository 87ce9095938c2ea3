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
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    SchedulerType,
    set_seed,
)
from transformers.utils.versions import require_version

from adaptive_lora_trainer import (
    AdaptiveLoRATrainer,
    bit_configs_for_step,
    qa_distillation_kl,
    qa_distillation_mse,
    uniform_configs,
)
from flags import check_file_name, parse_args
from models.bit_config import (
    config_name,
    describe_bit_config,
    resolve_bit_config,
    short_name,
)
from models.checkpoint import read_config
from models.errors import UserError, is_disk_error
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering
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
    bit_widths: list[int] = option([4, 8], "widths to serve, W = A = KV; each has its own adapter in every linear")
    bit_configs: list[str] | None = option(
        None,
        'train and evaluate these configs instead: JSON files (configs/README.md), "W4A8KV8", or widths as 8; '
        "adapters for their w_bits",
    )
    execution: str | None = option(
        None,
        "how layers with W and A of at most 8 bits compute: integer (int8 products) or fake (quantized values in "
        "float); default: fake in training, integer in evaluation",
    )
    backward_dtype: str = option("fp32", "backward products with frozen quantized weights: fp32 or bf16")


@dataclasses.dataclass
class ObjectiveArguments:
    """What a training step does. Highest precision always goes first."""

    objective: str = option(
        "joint",
        "joint: highest width, mixed configs, lowest width in every step; random: one random config a step; "
        "sequential: one width after the other, --max_steps / widths each (as published)",
    )
    num_mixed_configs: int = option(1, "random per-layer assignments a step; 0 for uniform widths only")
    sample_widths: int = option(0, "random widths a step between the highest and the lowest, as passes of their own")
    curriculum: float = option(0.0, "lower widths join one after the other over this fraction of the steps")
    teacher: bool = option(False, "a full-precision pass with its own adapter goes first and teaches the others")
    distill_loss: str = option("kl", "distillation from the higher passes: kl, mse (raw logits, InstantNet) or none")
    distill_weight: float | None = option(
        None,
        "weight of each higher pass beside cross-entropy (default 0.25); sequential: w gives (CE + w KL) / (1 + w) "
        "(default 1, as published)",
    )
    distill_temperature: float = option(2.0, "temperature of --distill_loss kl, whose gradient scale is kept by T^2")

    def __post_init__(self):
        if self.distill_weight is None:
            self.distill_weight = 1.0 if self.objective == "sequential" else 0.25


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


def check_args(model_args, objective_args, training_args):
    """Refuse what cannot work, before anything is loaded."""
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise UserError("nothing to do: pass --do_train, --do_eval or --do_predict")
    named_configs(model_args.bit_configs or [])
    widths = model_args.bit_widths
    if len(set(widths)) < len(widths):
        raise UserError(f"--bit_widths {' '.join(map(str, widths))}: every width once")
    for flag, allowed in {
        "objective": ("joint", "random", "sequential"),
        "distill_loss": ("kl", "mse", "none"),
    }.items():
        if getattr(objective_args, flag) not in allowed:
            raise UserError(f"--{flag} {getattr(objective_args, flag)}: allowed are {', '.join(allowed)}")
    for flag in ("num_mixed_configs", "sample_widths", "distill_weight"):
        if getattr(objective_args, flag) < 0:
            raise UserError(f"--{flag} {getattr(objective_args, flag)}: must not be negative")
    if not 0 <= objective_args.curriculum <= 1:
        raise UserError(f"--curriculum {objective_args.curriculum}: a fraction of the steps, 0 to 1")
    if objective_args.distill_temperature <= 0:
        raise UserError(f"--distill_temperature {objective_args.distill_temperature}: must be positive")
    if objective_args.sample_widths and (objective_args.objective != "joint" or model_args.bit_configs):
        raise UserError("--sample_widths adds widths to a joint step of --bit_widths: no other objective or configs")
    if objective_args.sample_widths > max(len(widths) - 2, 0):
        raise UserError(
            f"--sample_widths {objective_args.sample_widths}: --bit_widths has {max(len(widths) - 2, 0)} widths "
            "between the highest and the lowest"
        )
    if objective_args.objective == "sequential" and (objective_args.teacher or objective_args.curriculum):
        raise UserError("--objective sequential has its own teachers and order: no --teacher, no --curriculum")
    if objective_args.teacher and not model_args.bit_configs and 32 in widths:
        raise UserError("--teacher is the width 32, which --bit_widths has already")
    if training_args.fsdp or training_args.deepspeed:
        raise UserError("--fsdp and --deepspeed shard the model; here every process needs all of it")


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


def named_configs(sources):
    """{name: source} of --bit_configs; refuses two whose names agree or whose predictions would go to one file."""
    named, files = {}, {}
    for source in sources:
        named[config_name(source)] = source
        for kind in ("", "_nbest"):
            file = f"eval_{config_name(source)}{kind}_predictions.json"
            check_file_name("--bit_configs writes", f"{file}.{os.getpid()}.tmp")
            if (key := file.casefold()) in files:
                raise UserError(
                    f"--bit_configs {files[key]} {source}: two configs are called {config_name(source)}, or both "
                    f"would write {file}; results could not tell them apart"
                )
            files[key] = source
    return named


def target_configs(model_args, shapes):
    """[(name, resolved config)] to train and evaluate, highest precision first.

    The name is that of the JSON file, or W8A8KV8. `shapes`: {layer: (out, in)}.
    """
    if not model_args.bit_configs:
        return uniform_configs(shapes, model_args.bit_widths)
    targets = {
        name: resolve_bit_config(source, shapes) for name, source in named_configs(model_args.bit_configs).items()
    }

    def average_bits(pair):
        weights = describe_bit_config(pair[1], shapes)["average_w_bits"]
        return weights, sum(bits["a_bits"] for bits in pair[1].values())

    return sorted(targets.items(), key=average_bits, reverse=True)


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


def build_model(model_args, objective_args, training, tokenizer):
    """(model with its bank and at its highest config, [(name, resolved config)] to train and evaluate)."""
    model = open_model(QuantGPT2ForQuestionAnswering, model_args, tokenizer, training)
    targets = target_configs(model_args, model.layer_shapes())
    teacher = [32] if training and objective_args.teacher else []
    if training and not model.config.lora_bank:
        widths = {layer["w_bits"] for _, config in targets for layer in config.values()}
        model.add_lora(sorted(widths.union(teacher)), model_args.lora_r, model_args.lora_alpha)
    for config in [*teacher, *(config for _, config in reversed(targets))]:
        model.set_bit_config(config)  # refuses what the bank of a checkpoint has no adapter for
    if model.config.lora_bank and not model.config.base_model_name_or_path:
        model.set_base(model_args.model_name_or_path)
    model.set_execution(model_args.execution or ("fake" if training else "integer"), model_args.backward_dtype)
    return model, targets


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


def main():
    start = time.time()
    model_args, data_args, objective_args, training_args = parse_args(
        ModelArguments, DataTrainingArguments, ObjectiveArguments, TrainingArguments
    )
    setup_logging(training_args)
    check_args(model_args, objective_args, training_args)
    settings = run_settings(model_args, data_args, objective_args, training_args)
    folder = OutputFolder(training_args, data_args.overwrite_output_dir, settings)
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(model_args)
    model, targets = build_model(model_args, objective_args, training_args.do_train, tokenizer)
    bits = describe_model(model)
    examples, sources = load_data(data_args, needed_splits(training_args), model_args)
    positions = model.config.max_position_embeddings
    features = {
        split: build_features(rows, split, sources[split], tokenizer, data_args, training_args, positions)
        for split, rows in examples.items()
    }
    if objective_args.objective == "sequential" and training_args.lr_scheduler_type == "cosine":
        # Each phase is a run of its own in the published code: the cosine starts again with it.
        training_args.lr_scheduler_type = SchedulerType.COSINE_WITH_RESTARTS
        training_args.lr_scheduler_kwargs = {"num_cycles": len(targets)}
    if training_args.do_train:
        folder.start(**input_checksums(model, tokenizer, sources))
    else:
        model.keep_only_codes(config for _, config in targets)
    shapes = model.layer_shapes()
    sampler = functools.partial(
        bit_configs_for_step,
        seed=training_args.seed,
        layers=shapes,
        bit_widths=model_args.bit_widths,
        num_mixed_configs=objective_args.num_mixed_configs,
        objective=objective_args.objective,
        curriculum=objective_args.curriculum,
        sample_widths=objective_args.sample_widths,
        explicit=targets if model_args.bit_configs else None,
        teacher=objective_args.teacher,
    )
    trainer = AdaptiveLoRATrainer(
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
        configs=targets,
        sampler=sampler,
        sequential=objective_args.objective == "sequential",
        distance={
            "kl": functools.partial(qa_distillation_kl, temperature=objective_args.distill_temperature),
            "mse": qa_distillation_mse,
            "none": None,
        }[objective_args.distill_loss],
        distill_weight=objective_args.distill_weight,
    )
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
            bit_widths=None if model_args.bit_configs else model_args.bit_widths,
            bit_configs={name: {**describe_bit_config(config, shapes), "layers": config} for name, config in targets},
            objective=dataclasses.asdict(objective_args) if training_args.do_train else None,
            passes=trainer.forward_passes() if training_args.do_train else 0,
        )
        write_json_atomic(data_args.record_file or os.path.join(training_args.output_dir, "record.json"), record)


if __name__ == "__main__":
    with plain_errors():
        main()
