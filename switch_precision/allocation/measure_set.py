"""What the sweep and the search measure on: a tokenized set in chunks of batches, gold labels, span loss and KL.

The windows of a question lie in one chunk, so that a chunk's answers are final and its logits can go. `span_nll` and
`span_kl` are the two smooth measures beside EM and F1: a flip of one linear moves few answers, but every probability.
"""

import contextlib
import functools

import torch

from common.data import build_features, load_data, make_collator
from models.errors import UserError
from utils_qa import gold_labels, postprocess_qa_predictions


def _log_probabilities(logits, mask):
    return logits.masked_fill(~mask, -torch.inf).log_softmax(-1)


def span_nll(logits, real, labels):
    """Cross-entropy of the gold start and end over a window's own tokens: the training loss without padding.

    Args: logits: (2, batch, seq). real: (batch, seq) bool, False on padding. labels: (batch, 2) positions.
    Returns: (batch,) nats, the mean of start and end.
    """
    picked = _log_probabilities(logits, real).gather(-1, labels.t()[..., None])  # (2, batch, 1)
    return -picked.squeeze(-1).mean(0)


def span_kl(reference, logits, context):
    """KL(reference || other) of the start and end distributions over the context tokens.

    Args: reference, logits: (2, batch, seq). context: (batch, seq) bool; a window without context counts 0.
    Returns: (batch,) nats, the mean of start and end.
    """
    expected, found = _log_probabilities(reference, context), _log_probabilities(logits, context)
    return (expected.exp() * (expected - found)).masked_fill(~context, 0.0).sum(-1).mean(0)


class MeasureSet:
    """Windows of a set of questions in batches, with what the measures need.

    Args:
        features: of prepare_validation_features; examples: their questions. collator: pads a list of windows.
        batch_size: windows of a batch. chunk_batches: batches of a chunk, about. question_ids: None for all questions.
        max_answer_length: tokens of an answer, at most. null_threshold: see `postprocess_qa_predictions`.
    """

    def __init__(
        self,
        features,
        examples,
        collator,
        batch_size,
        chunk_batches,
        device,
        max_answer_length,
        question_ids=None,
        null_threshold=None,
    ):
        self.features, self.examples, self.collator = features, examples, collator
        self.device, self.max_answer_length = device, max_answer_length
        self.null_threshold = null_threshold
        self.labels = gold_labels(features, examples, null_threshold is not None)
        self.row_of = {example_id: row for row, example_id in enumerate(examples["id"])}
        self.ids, self.lengths = features["example_id"], features["length"]
        wanted, windows_of = None if question_ids is None else set(question_ids), {}
        for window, example_id in enumerate(self.ids):
            if wanted is None or example_id in wanted:
                windows_of.setdefault(example_id, []).append(window)
        # longest question first: batches need little padding, and memory runs out at once or never
        questions = sorted(windows_of.values(), key=lambda windows: -max(self.lengths[index] for index in windows))
        self.chunks, chunk = [], []
        for windows in questions:
            chunk += windows
            if len(chunk) >= batch_size * chunk_batches:
                self.chunks.append(self._batches(chunk, batch_size))
                chunk = []
        if chunk:
            self.chunks.append(self._batches(chunk, batch_size))

    def _batches(self, windows, batch_size):
        windows = sorted(windows, key=lambda index: -self.lengths[index])
        return [windows[at : at + batch_size] for at in range(0, len(windows), batch_size)]

    @property
    def batches(self):
        """All batches, chunk by chunk: lists of window numbers."""
        return [batch for chunk in self.chunks for batch in chunk]

    def tensors(self, batch):
        """Of a list of window numbers: inputs for the model (without a padding mask: see
        QuestionAnsweringTrainer.prediction_step), masks of what is no padding and of the context, in v2 with the
        position of "no answer" (batch, seq), labels (batch, 2)."""
        rows = [self.features[index] for index in batch]
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in rows[0]]
        inputs = self.collator([{name: row[name] for name in names} for row in rows])
        context = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
        for row, mask in zip(rows, context, strict=True):
            mask[: len(row["offset_mapping"])] = torch.tensor([pair is not None for pair in row["offset_mapping"]])
            if self.null_threshold is not None:
                mask[len(row["offset_mapping"]) - 1] = True
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        real = inputs.pop("attention_mask").bool()
        return inputs, real, context.to(self.device), torch.from_numpy(self.labels[batch]).to(self.device)

    def chunk_rows(self, chunk):
        """(question ids, their ids and contexts as columns, features in the order of the batches) of a chunk."""
        windows = [index for batch in chunk for index in batch]
        ids = list(dict.fromkeys(self.ids[index] for index in windows))
        examples = self.examples.select([self.row_of[example_id] for example_id in ids])
        return ids, examples.select_columns(["id", "context"])[:], self.features.select(windows)

    def texts(self, examples, features, logits):
        """Answers of a chunk's questions, in order. logits: per batch (2, batch, seq) on the CPU."""
        width = max(part.shape[-1] for part in logits)
        padded = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in logits]
        starts, ends = torch.cat(padded, dim=1).numpy()  # (2, windows, width)
        limits = 1, self.max_answer_length, self.null_threshold
        return list(postprocess_qa_predictions(examples, features, (starts, ends), *limits)[0].values())


def autocast_of(training_args):
    """Makes the autocast context of --bf16 and --fp16, as the trainer's evaluation has it."""
    if not (training_args.bf16 or training_args.fp16):
        return contextlib.nullcontext
    dtype = torch.bfloat16 if training_args.bf16 else torch.float16
    return functools.partial(torch.autocast, training_args.device.type, dtype=dtype)


def load_measure_set(model, tokenizer, model_args, data_args, training_args, chunk_batches, question_ids=None):
    """(MeasureSet of --measure_split, its source); `question_ids`: a function from all ids to those wanted."""
    split, positions = model_args.measure_split, model.config.max_position_embeddings
    if split not in ("validation", "train"):
        raise UserError(f"--measure_split {split}: allowed are validation, train")
    examples, sources = load_data(data_args, [split], model_args)
    # in the form of a validation set, whichever it is
    rows = examples[split]
    features = build_features(rows, "validation", sources[split], tokenizer, data_args, training_args, positions)
    collator, wanted = (
        make_collator(tokenizer, data_args, positions),
        question_ids(rows["id"]) if question_ids else None,
    )
    sizes = training_args.eval_batch_size, chunk_batches, training_args.device, data_args.max_answer_length
    return MeasureSet(features, rows, collator, *sizes, wanted, data_args.null_threshold), sources
