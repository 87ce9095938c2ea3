#!/usr/bin/env python
"""Evaluate one checkpoint under any number of bit-width configs: one model load, one tokenization, one table.

    python run_qa_eval.py --model_name_or_path results/train --dataset_name squad --output_dir results/eval
    python run_qa_eval.py ... --bit_configs 8 4 W4A8KV8 ../configs/hybrid_25pct_4bit.json

Without --bit_configs: every width that the checkpoint was trained for, highest first. In --output_dir: table.md,
record.json (the run with all rows), and a folder per config with its record and predictions, written as it finishes.
The same command given again evaluates only what is missing.
"""

import dataclasses
import glob
import hashlib
import json
import logging
import os
import re
import tempfile
import time

from accelerate.utils import broadcast_object_list
from transformers import set_seed
from transformers.trainer_utils import EvalPrediction

from common.arguments import CheckpointArguments, DataTrainingArguments, option
from common.calibration import input_rms, outlier_ratios, quantizer_label
from common.checksums import data_identity, file_checksum, model_checksum, tokenizer_checksum
from common.data import (
    build_features,
    calibration_windows,
    load_data,
    make_collator,
    make_metric,
    set_qa_quantizer,
)
from common.flags import parse_args
from common.loading import describe_bits, load_model, load_tokenizer, resolve_configs, resolve_random, trained_configs
from common.noise import floor_cell, noise_floor
from common.outliers import draw_outliers, outlier_lines
from common.record import (
    plot_caption,
    read_state,
    relative_path,
    run_record,
    surroundings,
    write_json_atomic,
    write_state,
    write_text_atomic,
)
from common.resuming import run_lock
from common.script import plain_errors, setup_logging
from common.squad_v2 import PARTS
from common.statistics import METRICS, compare, markdown_table, spread_over_draws, with_interval
from common.training_args import TrainingArguments
from models.errors import UserError
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering
from trainer_qa import QuestionAnsweringTrainer

logger = logging.getLogger("run_qa_eval")


@dataclasses.dataclass
class EvalArguments(CheckpointArguments):
    """The checkpoint and the configs."""

    bit_configs: list[str] | None = option(
        None,
        'JSON files (configs/README.md), short forms as W4A8KV8, or uniform widths as 8; "checkpoint": as saved',
        aliases=["--eval_bit_widths", "--eval_bit_width", "--sp_config_path"],
    )
    reference_config: str | None = option(None, "config that the drops are against (default: the first)")
    random_precision: list[str] | None = option(
        None, "two or more configs: EM/F1 when each question is answered at one of them, drawn for it"
    )
    num_bootstrap: int = option(1000, "resamples of the 95 % intervals over questions (0: no intervals)")
    noise_floor: bool = option(
        False,
        "how far EM moves under changes that mean nothing: execution, embeddings perturbed by 1e-6 or in float16",
    )
    measure_outliers: bool = option(
        False, "size of the largest input channel of every linear over the median one, on calibration windows"
    )


@dataclasses.dataclass
class EvalDataArguments(DataTrainingArguments):
    """The data, the features and the answers."""

    n_best_size: int = option(1, "candidate answers kept in a config's n-best file (the answer itself is the first)")


class Evaluator:
    """Evaluates configs of one model on one tokenized validation set, and keeps a record and predictions of each."""

    def __init__(self, model, tokenizer, model_args, data_args, training_args, quantizer, overwrite):
        self.quantizer, self.model, self.model_args, self.training_args = quantizer, model, model_args, training_args
        self.folder, self.overwrite = training_args.output_dir, overwrite
        self.fresh = {}  # {digest: record} of this run
        examples, self.sources = load_data(data_args, ["validation"], model_args)
        self.examples, positions = examples["validation"], model.config.max_position_embeddings
        self.references = {row["id"]: row["answers"]["text"] for row in self.examples}
        self.features = build_features(
            self.examples, "validation", self.sources["validation"], tokenizer, data_args, training_args, positions
        )
        self.dtype = training_args.run_dtype
        names = ("max_seq_length", "doc_stride", "question_separator", "max_answer_length", "n_best_size")
        self.identity = {  # what answers and seconds depend on, besides the config
            **surroundings(),
            "model_sha256": model_checksum(model),
            "tokenizer_sha256": tokenizer_checksum(tokenizer),
            "data": data_identity(self.examples),
            "dtype": self.dtype,
            "execution": model_args.execution,
            "attention": model.config._attn_implementation,
            **{name: getattr(data_args, name) for name in names},
        }
        if data_args.version_2_with_negative:
            self.identity["null_score_diff_threshold"] = data_args.null_threshold
        self.trainer = QuestionAnsweringTrainer(
            model=model,
            args=training_args,
            processing_class=tokenizer,
            data_collator=make_collator(tokenizer, data_args, positions),
            compute_metrics=make_metric(data_args.version_2_with_negative),
            n_best_size=data_args.n_best_size,
            max_answer_length=data_args.max_answer_length,
            null_threshold=data_args.null_threshold,
        )

    def digest(self, resolved):
        """Of a config and all else that its answers depend on."""
        return hashlib.sha256(json.dumps([self.identity, resolved], sort_keys=True).encode()).hexdigest()[:12]

    def existing(self, digest):
        """The record of this digest with its predictions, whatever name the config had; None without a whole one."""
        if digest in self.fresh:
            return self.fresh[digest]
        found = None
        if self.trainer.is_world_process_zero() and not self.overwrite:  # rank 0 decides for all
            folders = sorted(glob.glob(os.path.join(glob.escape(self.folder), f"*-{digest}")))
            found = next(filter(None, map(load_record, folders)), None)
        return broadcast_object_list([found])[0]

    def evaluate_all(self, configs):
        """{name: record} of {name: resolved}; what has a record already is not evaluated again."""
        records = {}
        for name, resolved in configs.items():
            records[name] = self.existing(self.digest(resolved)) or self.evaluate(name, resolved)
        return records

    def evaluate(self, name, resolved):
        """The record of one config, with its predictions {id: text}."""
        start, digest = time.time(), self.digest(resolved)
        # the digest alone tells configs apart: names may agree in what is replaced or cut off
        folder = os.path.join(self.folder, f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)[:100]}-{digest}")
        with self.model.at_bits(resolved):
            texts, odds, _ = self.trainer.predict_texts(self.features, self.examples, "eval", folder)
        scores = self.scores(texts)
        metrics = {
            f"eval_{name}": 100.0 * sum(column) / len(scores)
            for name, column in zip(("exact_match", "f1"), zip(*scores), strict=True)
        }
        files = ["eval_predictions.json", "eval_nbest_predictions.json"]
        if odds is not None:
            prediction = EvalPrediction(predictions=texts, label_ids=self.references)
            found = self.trainer.compute_metrics(prediction, null_odds=odds)
            metrics |= {f"eval_{name}": value for name, value in found.items()}
            files.append("eval_null_odds.json")
        record = run_record(
            model=relative_path(self.model_args.model_name_or_path),
            bit_config={
                "name": name,
                **describe_bits(self.model, resolved),
                "lora_bank": self.model.config.lora_bank,
                **self.quantizer,
                "layers": resolved,
            },
            metrics=metrics,
            data=self.sources,
            seed=self.training_args.seed,
            wall_seconds=time.time() - start,
            dtype=self.dtype,
            identity=self.identity,
        )
        if self.trainer.is_world_process_zero():  # after the predictions: a folder with a record is complete
            record["files"] = {file: file_checksum(os.path.join(folder, file)) for file in files}
            write_state(os.path.join(folder, "record.json"), record)
        logger.info("%s: EM %.2f, F1 %.2f", name, metrics["eval_exact_match"], metrics["eval_f1"])
        self.fresh[digest] = {**record, "predictions": texts, "scores": scores}
        return self.fresh[digest]

    def noise_floor(self, record):
        """See noise.py; of the config of a record."""
        resolved = record["bit_config"]["layers"]

        def answer():
            with tempfile.TemporaryDirectory() as scratch, self.model.at_bits(resolved):
                return self.trainer.predict_texts(self.features, self.examples, "eval", scratch)[0]

        def score(texts):
            scores = self.scores(texts)
            return 100.0 * sum(em for em, _ in scores) / len(scores)

        return noise_floor(self.model, answer, score, record["predictions"], self.training_args.seed)

    def scores(self, predictions):
        """[(exact match, F1)] of all questions, each 0 to 1."""
        prediction = EvalPrediction(predictions=predictions, label_ids=self.references)
        return self.trainer.compute_metrics(prediction, per_example=True)["per_example"]

    def scores_of(self, record):
        """The same of a record, from its predictions where it was found."""
        return record.get("scores") or self.scores(record["predictions"])

    def table(self, records, reference, num_bootstrap):
        """One row per config: size, cost, scores with intervals, drops against `reference` (a name), seconds."""
        scores = {name: self.scores_of(record) for name, record in records.items()}
        statistics = compare(scores, reference, num_bootstrap, self.training_args.seed)
        unit = records[reference]["bit_config"]["bitops_per_token"]
        return [
            {
                "config": name,
                "average_w_bits": record["bit_config"]["average_w_bits"],
                "weight_mb": describe_bits(self.model, record["bit_config"]["layers"])["weight_bytes"] / 1e6,
                "relative_bitops": record["bit_config"]["bitops_per_token"] / unit,
                **statistics[name],
                **{key: record["metrics"][f"eval_{key}"] for key in PARTS if f"eval_{key}" in record["metrics"]},
                "seconds": record["wall_seconds"],
            }
            for name, record in records.items()
        ]


def load_record(folder):
    """A record with its predictions, as `Evaluator.evaluate` left them; None where a file lacks or is damaged."""
    record = read_state(os.path.join(folder, "record.json"))
    if record is None:
        return None
    for name, checksum in record["files"].items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path) or file_checksum(path) != checksum:
            logger.warning("%s: missing or damaged; its config is evaluated again", path)
            return None
    logger.info("%s has a record", folder)
    with open(os.path.join(folder, "eval_predictions.json"), encoding="utf-8") as file:
        return {**record, "predictions": json.load(file)}


def table_lines(rows, reference, quantizer):
    """The table as markdown, with its caption. quantizer: of `set_quantizer`."""
    parts = [key for key in PARTS if key in rows[0]]  # of v2
    header = ["config", "avg bits", "MB", "BitOPs", "EM", "F1", "EM drop", "F1 drop", "p", "seconds"]
    header += [PARTS[key] for key in parts]
    floors = [row.get("noise_floor") for row in rows]
    if all(floors):
        header.append("noise floor")
    cells = [
        [
            row["config"],
            f"{row['average_w_bits']:.2f}",
            f"{row['weight_mb']:.2f}",
            f"{row['relative_bitops']:.3f}",
            *(with_interval(row[key], row[f"{key}_interval"]) for key in ("exact_match", "f1")),
            *(with_interval(row[key], row[f"{key}_interval"]) for key in ("exact_match_drop", "f1_drop")),
            f"{row['mcnemar_p']:.2g}",
            f"{row['seconds']:.1f}",
            *(f"{row[key]:.2f}" for key in parts),
            *([floor_cell(floor)] if floor else []),
        ]
        for row, floor in zip(rows, floors, strict=True)
    ]
    quantizer = quantizer_label(quantizer)
    caption = (
        f"Quantizer: {quantizer}. Drops, BitOPs and p (exact McNemar test of EM) are against {reference}; [95 % "
        "bootstrap interval over questions]; MB: linear weights as they are stored, with scales (up to 4 bits two a "
        "byte, above that one)."
    )
    return [*markdown_table(header, cells), "", caption]


def main():
    start = time.time()
    model_args, data_args, training_args = parse_args(EvalArguments, EvalDataArguments, TrainingArguments)
    setup_logging(training_args)
    if training_args.do_train or training_args.do_predict:
        raise UserError("--do_train, --do_predict: this script only evaluates; run_qa.py trains and predicts")
    set_seed(training_args.seed)
    tokenizer = load_tokenizer(model_args)
    model = load_model(QuantGPT2ForQuestionAnswering, model_args, tokenizer)
    asked = model_args.bit_configs or trained_configs(model)
    first = model_args.reference_config or asked[0]
    drawn = resolve_random(model, model_args.random_precision)
    configs = resolve_configs(model, [first, *asked])
    reference = next(iter(configs))
    _lock = run_lock(training_args.output_dir)
    quantizer = set_qa_quantizer(model, tokenizer, model_args, data_args, training_args)
    outliers = quantizer.get("outliers")
    if model_args.measure_outliers and not outliers:
        windows = calibration_windows(model, tokenizer, model_args, data_args, training_args.seed)
        outliers = outlier_ratios(input_rms(model, windows))
    overwrite = data_args.overwrite_output_dir
    evaluator = Evaluator(model, tokenizer, model_args, data_args, training_args, quantizer, overwrite)
    # once the identity of the records has the checksum of the weights
    model.keep_only_codes([*configs.values(), *drawn.values()])
    records = evaluator.evaluate_all(configs)
    rows = evaluator.table(records, reference, model_args.num_bootstrap)
    if model_args.noise_floor:
        for row in rows:
            row["noise_floor"] = evaluator.noise_floor(records[row["config"]])
    found = {name: evaluator.scores_of(record) for name, record in evaluator.evaluate_all(drawn).items()}
    random, random_line = spread_over_draws(found, training_args.seed) if drawn else (None, None)
    if evaluator.trainer.is_world_process_zero():
        lines = table_lines(rows, reference, quantizer)
        if random:
            lines += ["", random_line]
        folder = training_args.output_dir
        if outliers:
            title = "Outliers: largest input channel over the median one (root mean squares over training windows)"
            lines += ["", title, "", *outlier_lines(outliers)]
            training = {"source": "training windows", "examples": model_args.calibration_samples}
            caption = plot_caption(model_args.model_name_or_path, training)
            draw_outliers(outliers, os.path.join(folder, "outliers.png"), caption)
        print("\n".join(lines), flush=True)
        write_text_atomic(os.path.join(folder, "table.md"), "\n".join(lines) + "\n")
        record = run_record(
            model=relative_path(model_args.model_name_or_path),
            bit_config={"reference": reference, **quantizer, "layers": configs},
            metrics={f"{row['config']}_{key}": row[key] for row in rows for key in [*METRICS, *PARTS] if key in row},
            data=evaluator.sources,
            seed=training_args.seed,
            wall_seconds=time.time() - start,
            dtype=evaluator.dtype,
            num_bootstrap=model_args.num_bootstrap,
            outliers=outliers,
            rows=rows,
            random_precision=random and {"configs": list(drawn), **random},
        )
        write_json_atomic(data_args.record_file or os.path.join(folder, "record.json"), record)


if __name__ == "__main__":
    with plain_errors():
        main()
