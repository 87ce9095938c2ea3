"""The Trainer of all question-answering experiments: span post-processing, EM/F1 on every rank, exact resume.

Training itself is Hugging Face's Trainer. Added: the loss of an optimizer step is the mean over its windows, however
they are split into batches and over processes; evaluate/predict turn logits into text and score it on every rank (so
that `--metric_for_best_model f1` works under torchrun); a loss that is not finite stops the run before the optimizer
uses it.
"""

import logging
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from transformers.trainer_utils import EvalPrediction, speed_metrics

from common.answer_spans import null_odds
from common.record import write_json_atomic
from common.trainer import StepMeanTrainer
from utils_qa import gold_labels, postprocess_qa_predictions

logger = logging.getLogger(__name__)


def qa_cross_entropy(logits, positions, mask):
    """Mean cross-entropy of start and end; padding is no class, so the loss does not depend on how a batch is padded.

    Args: logits (2, batch, seq), positions (2, batch), mask (batch, seq) true on tokens.
    """
    logits = logits.float().masked_fill(~mask, torch.finfo(torch.float32).min)
    return F.cross_entropy(logits.flatten(0, 1), positions.flatten())


class QuestionAnsweringTrainer(StepMeanTrainer):
    """Trainer whose evaluation set is (examples, features), as `utils_qa` makes them.

    Args:
        eval_examples: rows with id, context and answers that belong to `eval_dataset` (the features).
        compute_metrics: maps EvalPrediction({id: text}, {id: [gold text, ...]}) to {"exact_match", "f1"}; in v2 to
            the names of `squad_v2_scores` besides, with null_odds={id: odds of no answer}.
        n_best_size, max_answer_length, null_threshold (None: v1.1): see `postprocess_qa_predictions`.
        configs: [(name, config)] that `evaluate` scores; without any, the model as it is.
    """

    def __init__(
        self,
        *,
        eval_examples=None,
        n_best_size=20,
        max_answer_length=30,
        null_threshold=None,
        configs=(),
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.null_threshold = null_threshold
        self.eval_examples, self.configs = eval_examples, configs
        self.n_best_size, self.max_answer_length = n_best_size, max_answer_length
        self._labelled = None, None  # features of an evaluation and their labels

    def mean_loss(self, model, inputs):
        positions = torch.stack([inputs.pop("start_positions"), inputs.pop("end_positions")])
        output = model(**inputs)
        logits = torch.stack([output["start_logits"], output["end_logits"]])
        return qa_cross_entropy(logits, positions, inputs["attention_mask"].bool()), output

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.stop_unless_finite(loss)
        return loss

    def prediction_step(self, model, inputs, *args, **kwargs):
        """Without the padding mask: padding is on the right, where causal attention does not look, its own logits are
        not read, and with a mask the fast kernels of attention do not apply."""
        inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix="eval"):
        """EM/F1 and loss of `eval_dataset` (features) on every rank; rank 0 writes `<prefix>_predictions.json` and
        n-best (v2: `<prefix>_null_odds.json` too). The loss is that of training, on the first gold answers, mean over
        the windows.

        With configs: those of each (`eval_f1_W8A8KV8`) and their means (`eval_f1`); predictions in a file per config.
        """
        features = self.eval_dataset if eval_dataset is None else eval_dataset
        examples = self.eval_examples if eval_examples is None else eval_examples
        start, scores = time.time(), {}

        def score(prefix):
            texts, odds, output = self.predict_texts(features, examples, prefix, ignore_keys=ignore_keys)
            loss = self._loss(output.predictions, features, examples)
            return self._score(texts, odds, examples, metric_key_prefix) | {f"{metric_key_prefix}_loss": loss}

        for name, config in self.configs:
            with self.accelerator.unwrap_model(self.model).at_bits(config):
                scores[name] = score(f"{metric_key_prefix}_{name}")
        metrics = {f"{key}_{name}": value for name, found in scores.items() for key, value in found.items()}
        passes = list(scores.values()) or [score(metric_key_prefix)]
        metrics |= {key: sum(found[key] for found in passes) / len(passes) for key in passes[0]}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(examples) * len(passes))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, predict_dataset, predict_examples, ignore_keys=None, metric_key_prefix="test"):
        """({id: text}, metrics); the metrics are empty where the examples have no answers."""
        predictions, odds, _ = self.predict_texts(
            predict_dataset, predict_examples, metric_key_prefix, ignore_keys=ignore_keys
        )
        answered = [bool(answers["text"]) for answers in predict_examples["answers"]]
        has_answers = all(answered) if odds is None else any(answered)
        return predictions, self._score(predictions, odds, predict_examples, metric_key_prefix) if has_answers else {}

    def run(self, folder, examples, features):
        """Train, evaluate, predict as the arguments ask for; returns all metrics. folder: of `OutputFolder`."""
        args, metrics = self.args, {}
        if args.do_train:
            batch, accumulated, processes = args.train_batch_size, args.gradient_accumulation_steps, args.world_size
            logger.info(
                f"batch: {batch} a process x {accumulated} accumulated x {processes} processes = "
                f"{batch * accumulated * processes} windows a step"
            )
            metrics |= self.train_or_load(folder)
        if args.do_eval:
            metrics |= self._logged_scores("eval", self.evaluate())
        if args.do_predict:
            _, scores = self.predict(features["test"], examples["test"], metric_key_prefix="predict")
            metrics |= self._logged_scores("predict", scores)
        return metrics

    def _logged_scores(self, prefix, scores):
        self.log_metrics(prefix, scores)
        self.save_metrics(prefix, scores)
        return scores

    def predict_texts(self, features, examples, prefix, folder=None, ignore_keys=None):
        """({id: text}, {id: odds of no answer} or None in v1.1, output with the logits); rank 0 writes texts, odds and
        n-best to `folder` (default: output_dir)."""
        output = self.evaluation_loop(
            self.get_eval_dataloader(features),
            description=f"Evaluation ({prefix})",
            prediction_loss_only=False,
            ignore_keys=ignore_keys,
            metric_key_prefix=prefix,
        )
        # Closes the progress bar of this evaluation; the next one would go on counting in it.
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, output.metrics)
        texts, nbest = postprocess_qa_predictions(
            examples, features, output.predictions, self.n_best_size, self.max_answer_length, self.null_threshold
        )
        v2 = self.null_threshold is not None
        odds = {key: null_odds(entries) for key, entries in nbest.items()} if v2 else None
        if self.is_world_process_zero():
            folder = folder or self.args.output_dir
            write_json_atomic(os.path.join(folder, f"{prefix}_predictions.json"), texts)
            write_json_atomic(os.path.join(folder, f"{prefix}_nbest_predictions.json"), nbest)
            if v2:
                write_json_atomic(os.path.join(folder, f"{prefix}_null_odds.json"), odds)
        return texts, odds, output

    def _loss(self, predictions, features, examples):
        """The training loss of (start logits, end logits), each (windows, seq) as `evaluation_loop` returns them."""
        if self._labelled[0] is not features:
            self._labelled = features, gold_labels(features, examples, self.null_threshold is not None)
        logits, positions = torch.from_numpy(np.stack(predictions)), torch.from_numpy(self._labelled[1].T)
        mask = torch.arange(logits.shape[-1]) < torch.tensor(features["length"][:])[:, None]
        return qa_cross_entropy(logits, positions, mask).item()

    def _score(self, predictions, odds, examples, prefix):
        references = {row["id"]: row["answers"]["text"] for row in examples}
        options = {} if odds is None else {"null_odds": odds}
        scores = self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=references), **options)
        return {f"{prefix}_{name}": value for name, value in scores.items()}
