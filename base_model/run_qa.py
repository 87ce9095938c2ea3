#!/usr/bin/env python
"""Fine-tune and evaluate GPT-2 on SQuAD v1.1: full precision, LoRA, one static bit-width config, post-training.

    python run_qa.py --model_name_or_path gpt2 --dataset_name squad --do_train --do_eval --output_dir results/fp32
    bash train.sh --bit_widths 4          # LoRA at W4A4KV4, all GPUs, the published hyper-parameters
    MODEL=results/fp32 BIT_CONFIG=../configs/uniform_8.json bash eval.sh     # post-training quantization

What is trained: everything without --add_lora / --bit_widths / --bit_config; with one of them the adapters and the QA
head, on a frozen base. The flags are those of Hugging Face's question-answering example (SQuAD v1.1 part) plus ours;
`--help` lists them, and one JSON file with the same keys may stand in their place.
"""

import contextlib
import dataclasses
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

from flags import parse_args
from models.bit_config import describe_bit_config, short_name
from models.bitsandbytes_ptq import LABELS, METHODS, quantize_with_bitsandbytes
from models.checkpoint import read_config
from models.errors import UserError, is_disk_error
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering
from record import file_checksum, hide_tokens, json_checksum, relative_path, run_record, write_json_atomic
from resuming import OutputFolder, input_checksums, run_settings, tokenizer_checksum
from squad_data import load_qa_datasets
from trainer_qa import QuestionAnsweringTrainer
from training_args import TrainingArguments
from utils_qa import prepare_train_features, prepare_validation_features

require_version("transformers>=5.23", "pip install -r requirements.txt")

logger = logging.getLogger("run_qa")
HERE = os.path.dirname(os.path.abspath(__file__))


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
    add_lora: bool = option(False, "LoRA without quantized training: one shared adapter, which serves any bits later")
    lora_r: int | None = option(None, "rank of the adapters (default: 8, or that of the checkpoint)")
    lora_alpha: int | None = option(None, "scaling is lora_alpha / lora_r (default: 16, or that of the checkpoint)")
    bit_widths: list[int] | None = option(None, "static width of W, A and KV, trained with LoRA (here one: 2 to 8)")
    bit_config: str | None = option(
        None,
        'per-layer bits: JSON file (configs/README.md), "W4A8KV8", or a width as 8; training: static, with LoRA; '
        "evaluation: PTQ",
        aliases=["--sp_config_path"],
    )
    execution: str | None = option(
        None,
        "how layers with W and A of at most 8 bits compute: integer (int8 products) or fake (quantized values in "
        "float); default: fake in training, integer in evaluation",
    )
    backward_dtype: str = option("fp32", "backward products with frozen quantized weights: fp32 or bf16")
    bitsandbytes: str | None = option(
        None, "evaluate with the linears quantized by bitsandbytes: 8bit or nf4 (weight-only)", aliases=["--bnb"]
    )


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


def check_args(model_args, data_args, training_args):
    """Refuse what cannot work, before anything is loaded."""
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise UserError("nothing to do: pass --do_train, --do_eval or --do_predict")
    if model_args.bit_widths and model_args.bit_config:
        raise UserError("--bit_widths and --bit_config both say the bits: pass one of them")
    if model_args.bit_widths and len(model_args.bit_widths) > 1:
        raise UserError(
            f"--bit_widths {' '.join(map(str, model_args.bit_widths))}: base_model trains one static width; "
            "several at once are trained in switch_precision"
        )
    if model_args.bitsandbytes not in (None, *METHODS):
        raise UserError(f"--bitsandbytes {model_args.bitsandbytes}: allowed are {', '.join(METHODS)}")
    if model_args.bitsandbytes and (training_args.do_train or model_args.bit_widths or model_args.bit_config):
        raise UserError("--bitsandbytes is weight-only quantization after training: no --do_train, no bits of ours")


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


def build_model(model_args, training, tokenizer):
    """The model with its adapters and bits set."""
    model = open_model(QuantGPT2ForQuestionAnswering, model_args, tokenizer, training)
    bits = model_args.bit_config
    if bits is None and model_args.bit_widths:
        bits = model_args.bit_widths[0]
    if bits is not None and (model.config.lora_bank or not training):
        model.set_bit_config(bits)
    elif bits is not None:
        with model.bit_config(bits) as resolved:
            widths = sorted({layer["w_bits"] for layer in resolved.values()})
        model.add_lora(widths, model_args.lora_r, model_args.lora_alpha)
        name = short_name(model.set_bit_config(bits))
        # one assignment, whatever widths its bank has: what run_qa_eval.py evaluates when it is not told
        model.config.trained_bit_configs = ["checkpoint" if name == "mixed" else name]
    elif model_args.add_lora and not model.config.lora_bank:
        model.add_lora(["shared"], model_args.lora_r, model_args.lora_alpha)
    if model.config.lora_bank and not model.config.base_model_name_or_path:
        model.set_base(model_args.model_name_or_path)
    model.set_execution(model_args.execution or ("fake" if training else "integer"), model_args.backward_dtype)
    return model


def describe_model(model):
    """{"name", "layers" (resolved config), average bits, sizes, trainable parameters}; logged and recorded."""
    shapes, resolved = model.layer_shapes(), model.config.bit_config
    description = {"name": short_name(resolved), **describe_bit_config(resolved, shapes)}
    trainable, total = model.num_parameters(only_trainable=True), model.num_parameters()
    logger.info("bits: %s", json.dumps(description))
    logger.info("LoRA bank: %s; trainable: %d of %d parameters", model.config.lora_bank, trainable, total)
    return {**description, "lora_bank": model.config.lora_bank, "layers": resolved}


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


def make_collator(tokenizer, data_args, max_positions):
    """Pads to the longest of the batch, or to max_seq_length."""
    if data_args.pad_to_max_length:
        length = min(data_args.max_seq_length, max_positions)
        return DataCollatorWithPadding(tokenizer, padding="max_length", max_length=length)
    return DataCollatorWithPadding(tokenizer)


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


def needed_splits(training_args):
    """The splits that the run reads."""
    evaluates = training_args.do_eval or (training_args.do_train and training_args.eval_strategy != "no")
    wanted = {"train": training_args.do_train, "validation": evaluates, "test": training_args.do_predict}
    return [split for split, use in wanted.items() if use]


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
    model_args, data_args, training_args = parse_args(ModelArguments, DataTrainingArguments, TrainingArguments)
    setup_logging(training_args)
    check_args(model_args, data_args, training_args)
    settings = run_settings(model_args, data_args, training_args)
    folder = OutputFolder(training_args, data_args.overwrite_output_dir, settings)
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(model_args)
    model = build_model(model_args, training_args.do_train, tokenizer)
    bits = describe_model(model)
    examples, sources = load_data(data_args, needed_splits(training_args), model_args)
    positions = model.config.max_position_embeddings
    features = {
        split: build_features(rows, split, sources[split], tokenizer, data_args, training_args, positions)
        for split, rows in examples.items()
    }
    if model_args.bitsandbytes:
        quantize_with_bitsandbytes(model, model_args.bitsandbytes)
        bits = {"name": LABELS[model_args.bitsandbytes]}
    elif not training_args.do_train:
        model.keep_only_codes([model.config.bit_config])
    if training_args.do_train:
        folder.start(**input_checksums(model, tokenizer, sources))
    trainer = QuestionAnsweringTrainer(
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
        )
        write_json_atomic(data_args.record_file or os.path.join(training_args.output_dir, "record.json"), record)


if __name__ == "__main__":
    with plain_errors():
        main()
