"""SQuAD-format data as the QA scripts take them: examples, token windows, collator, metric."""

import contextlib
import logging
import os
import random

import datasets
import evaluate
from datasets.fingerprint import Hasher
from transformers import DataCollatorWithPadding

import utils_qa
from common import squad_v2
from common.calibration import set_quantizer
from common.checksums import file_checksum, json_checksum, tokenizer_checksum
from common.record import load_state, relative_path
from common.resuming import SETTINGS_FILE
from common.squad_data import load_qa_datasets
from models.errors import UserError

logger = logging.getLogger(__name__)


def needed_splits(training_args):
    """The splits that the run reads."""
    evaluates = training_args.do_eval or (training_args.do_train and training_args.eval_strategy != "no")
    wanted = {"train": training_args.do_train, "validation": evaluates, "test": training_args.do_predict}
    return [split for split, use in wanted.items() if use]


def load_data(data_args, splits, model_args):
    """({split: examples}, {split: source, number and checksum}) for the splits that the run needs."""
    files = {flag: getattr(data_args, flag) for flag in ("train_file", "validation_file", "test_file")}
    options = {"cache_dir": model_args.cache_dir, "token": model_args.token}
    options |= {"splits": splits, "version_2_with_negative": data_args.version_2_with_negative}
    raw = load_qa_datasets(data_args.dataset_name, data_args.dataset_config_name, **files, **options)
    if "train" not in splits:
        tell_other_version(data_args.version_2_with_negative, model_args.model_name_or_path)
    limits = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}
    examples, sources = {}, {}
    for split in splits:
        limit, path = getattr(data_args, limits[split]), files[f"{split}_file"]
        examples[split] = raw[split].select(range(min(limit, len(raw[split])))) if limit else raw[split]
        sources[split] = {
            "source": relative_path(path) if path else data_args.dataset_name,
            "examples": len(examples[split]),
            "sha256": file_checksum(path) if path else json_checksum(examples[split][:]),
        }
        if data_args.version_2_with_negative and all(answers["text"] for answers in examples[split]["answers"]):
            logger.warning("--version_2_with_negative: every question of the %s data has an answer", split)
    return examples, sources


def tell_other_version(v2, model):
    """Log where an evaluation reads SQuAD in another version than the training that the folder `model` is of."""
    with contextlib.suppress(UserError, OSError):  # not known of every model
        trained = load_state(os.path.join(model, SETTINGS_FILE)).get("version_2_with_negative", False)
        if trained != v2:
            how = "with" if trained else "without"
            logger.warning("%s was trained %s --version_2_with_negative, and is not evaluated so", model, how)


def feature_settings(data_args, max_positions):
    """How windows are cut: keywords of `utils_qa.prepare_*_features`."""
    return {
        "max_seq_length": min(data_args.max_seq_length, max_positions),
        "doc_stride": data_args.doc_stride,
        "separator": data_args.question_separator.encode("latin-1", "backslashreplace").decode("unicode_escape"),
        "version_2_with_negative": data_args.version_2_with_negative,
    }


def calibration_windows(model, tokenizer, model_args, data_args, seed, examples=None):
    """Token ids of --calibration_samples windows of training questions, drawn with `seed`.

    examples: the training examples where they are loaded already. Raises UserError: no training data, or too few.
    """
    if examples is None:
        if not (data_args.train_file or data_args.dataset_name):
            who = "--quantizer rotated where the checkpoint has no rotation, and --measure_outliers"
            raise UserError(f"{who}, need training questions: pass --train_file or --dataset_name")
        examples = load_data(data_args, ["train"], model_args)[0]["train"]
    if (wanted := model_args.calibration_samples) > len(examples):
        raise UserError(f"--calibration_samples {wanted}: allowed are up to {len(examples)}, the training questions")
    chosen = examples.select(random.Random(seed).sample(range(len(examples)), wanted))
    settings = feature_settings(data_args, model.config.max_position_embeddings)
    return utils_qa.prepare_validation_features(chosen[:], tokenizer, **settings)["input_ids"][:wanted]


def set_qa_quantizer(model, tokenizer, model_args, data_args, training_args, folder=None, examples=None):
    """`calibration.set_quantizer` with questions. folder: the OutputFolder of a training; examples: its questions."""

    def windows():
        return calibration_windows(model, tokenizer, model_args, data_args, training_args.seed, examples)

    return set_quantizer(model, model_args, training_args.seed, windows, folder and folder.weights_folder)


def build_features(examples, split, source, tokenizer, data_args, training_args, max_positions):
    """Token windows of a split; those to evaluate are sorted by length, so that batches need little padding.

    Features of a local file are kept in the datasets cache, where other ranks and later runs find them; the name of
    the cache file covers all that they depend on.
    """
    build = utils_qa.prepare_train_features if split == "train" else utils_qa.prepare_validation_features
    settings = feature_settings(data_args, max_positions)
    code = file_checksum(utils_qa.__file__)
    parts = [split, source["sha256"], len(examples), sorted(settings.items()), code, tokenizer_checksum(tokenizer)]
    folder = os.path.join(datasets.config.HF_DATASETS_CACHE, "qa_features")
    os.makedirs(folder, exist_ok=True)
    with training_args.main_process_first(desc=f"features of {split}"):
        features = examples.map(
            build,
            batched=True,
            remove_columns=examples.column_names,
            fn_kwargs={"tokenizer": tokenizer, **settings},
            num_proc=data_args.preprocessing_num_workers,
            cache_file_name=os.path.join(folder, f"{Hasher.hash(parts)}.arrow"),
            load_from_cache_file=not data_args.overwrite_cache,
            desc=f"features of {split}",
        )
    logger.info("%s: %d questions, %d windows", split, len(examples), len(features))
    return features if split == "train" else features.sort("length", reverse=True)


def make_collator(tokenizer, data_args, max_positions):
    """Pads to the longest of the batch, or to max_seq_length."""
    length = min(data_args.max_seq_length, max_positions)
    padding = {"padding": "max_length", "max_length": length} if data_args.pad_to_max_length else {}
    return DataCollatorWithPadding(tokenizer, **padding)


def make_metric(version_2_with_negative=False):
    """compute_metrics for the trainer: EM/F1 through the `evaluate` module beside this file; the hub is not asked.

    v2: see squad_v2.compute_metrics, which takes the odds of no answer besides.
    """
    if version_2_with_negative:
        return squad_v2.compute_metrics
    metric = evaluate.load(os.path.join(os.path.dirname(__file__), "squad_metric"), keep_in_memory=True)

    def compute_metrics(prediction, **options):
        return metric.compute(
            predictions=[{"id": key, "prediction_text": text} for key, text in prediction.predictions.items()],
            references=[
                {"id": key, "answers": {"text": texts, "answer_start": [0] * len(texts)}}
                for key, texts in prediction.label_ids.items()
            ],
            **options,
        )

    return compute_metrics


def trainer_arguments(model, tokenizer, data_args, training_args, examples, features):
    """What every QA trainer is made from, as keywords. examples, features: {split: ...}."""
    return {
        "model": model,
        "args": training_args,
        "train_dataset": features.get("train"),
        "eval_dataset": features.get("validation"),
        "eval_examples": examples.get("validation"),
        "processing_class": tokenizer,
        "data_collator": make_collator(tokenizer, data_args, model.config.max_position_embeddings),
        "compute_metrics": make_metric(data_args.version_2_with_negative),
        "n_best_size": data_args.n_best_size,
        "max_answer_length": data_args.max_answer_length,
        "null_threshold": data_args.null_threshold,
    }


def load_features(model, tokenizer, model_args, data_args, training_args):
    """({split: examples}, {split: token windows}, {split: source and checksum}) of the splits that the run reads."""
    examples, sources = load_data(data_args, needed_splits(training_args), model_args)
    rest = (tokenizer, data_args, training_args, model.config.max_position_embeddings)
    features = {split: build_features(rows, split, sources[split], *rest) for split, rows in examples.items()}
    return examples, features, sources
