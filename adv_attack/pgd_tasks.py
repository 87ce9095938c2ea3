"""The two tasks of adversarial training and of the PGD matrix: flags, losses, tokens that may move, items, scores.

classification: all tokens of a text may move. qa (extractive question answering): the tokens of the question may, so
the answer in the context stays right by construction. Padding never moves.
"""

import argparse
import copy
import dataclasses
import json
import math
import random
import sys
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from attack_setup import DEVICE
from classifier import encode, last_position_logits, load_rows, pad_right
from common.arguments import option
from common.data import feature_settings, load_data
from common.flags import words_of
from common.loading import resolve_configs
from models.errors import UserError
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering, QuantGPT2ForSequenceClassification
from models.user_input import read_json
from text_data import check_labels
from trainer_qa import qa_cross_entropy
from utils_qa import (
    answer_words,
    gold_labels,
    postprocess_qa_predictions,
    prepare_validation_features,
    squad_em_f1_per_example,
)

CLASSES = {"classification": QuantGPT2ForSequenceClassification, "qa": QuantGPT2ForQuestionAnswering}


# ---- flags


@dataclasses.dataclass
class PGDArguments:
    """The task, and the ball of the attack."""

    task: str = dataclasses.field(kw_only=True, metadata={"help": f"{' or '.join(CLASSES)}"})
    precision_set: list[str] = option(["4", "5", "6", "7", "8"], "the precisions: widths or bit configs")
    radius: float = option(0.1, "L2 length of a token's perturbation, at most; 1 is the mean norm of the embeddings")
    step_size: float | None = option(None, "length of a step of the attack, same unit (default: radius / 4)")


def asked_task():
    """--task of the command line or the JSON file: the flags of the data depend on it. Raises UserError: unknown."""
    words = sys.argv[1:]
    if len(words) == 1 and words[0].endswith(".json"):
        words = words_of(read_json(words[0]), words[0])
    parser = argparse.ArgumentParser(add_help=False)
    # Where it is missing, the parser of all flags says so.
    parser.add_argument("--task", nargs="?", default="classification", const="")
    task = parser.parse_known_args(words)[0].task
    if task not in CLASSES:
        raise UserError(f"--task {task}: allowed are {', '.join(CLASSES)}")
    return task


def check_ball(args):
    """Refuse faulty values of `PGDArguments`, and set the default of the step size."""
    for flag in ("radius", "step_size"):
        value = getattr(args, flag)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{flag} {value}: must be a number above 0")
    if args.step_size is None:
        args.step_size = args.radius / 4


def resolve_set(model, precision_set):
    """{name: resolved config} of --precision_set. Raises UserError: faulty, or not all different."""
    found = resolve_configs(model, precision_set)
    different = {json.dumps(config) for config in found.values()}
    if len(different) < len(precision_set):
        raise UserError(f"--precision_set {' '.join(precision_set)}: every precision once")
    return found


# ---- what an attack needs to know of a batch


def text_loss(model, inputs):
    """Summed cross-entropy of a batch of texts: input_ids, attention_mask (batch, tokens), labels (batch,)."""
    return F.cross_entropy(text_logits(model, inputs).float(), inputs["labels"], reduction="sum")


def text_logits(model, inputs):
    """Class logits (batch, classes); no mask is needed, padding lies where a causal model does not look."""
    embeds = model.transformer.wte(inputs["input_ids"])
    return last_position_logits(model, inputs["attention_mask"].sum(-1), embeds)


def qa_loss(model, inputs):
    """Summed cross-entropy of start and end: input_ids, attention_mask, start_positions, end_positions (batch,)."""
    positions = torch.stack([inputs["start_positions"], inputs["end_positions"]])
    mask = inputs["attention_mask"].bool()
    return qa_cross_entropy(qa_logits(model, inputs), positions, mask) * positions.numel()


def qa_logits(model, inputs):
    """Start and end logits (2, batch, tokens)."""
    output = model(input_ids=inputs["input_ids"])
    return torch.stack([output.start_logits, output.end_logits])


def free_text_tokens(inputs):
    """(batch, tokens) bool: all tokens of the texts."""
    return inputs["attention_mask"].bool()


def free_question_tokens(inputs):
    """(batch, tokens) bool: the tokens of the questions. inputs: question_tokens (batch,), how many they are."""
    positions = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)
    return positions < inputs["question_tokens"][:, None]


LOSSES = {"classification": text_loss, "qa": qa_loss}
FREE_TOKENS = {"classification": free_text_tokens, "qa": free_question_tokens}


def question_lengths(questions, tokenizer, separator):
    """How many of the first tokens of a window are the question's; those of the separator after it are not."""
    questions = [question.lstrip() for question in questions]
    prompts = [question + separator for question in questions]
    found = tokenizer(prompts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        sum(start < len(question) for start, _ in offsets) for question, offsets in zip(questions, found, strict=True)
    ]


def noise_generator(*parts):
    """A generator of torch that is a function of `parts`: the same on all ranks and on resume."""
    return torch.Generator().manual_seed(random.Random("-".join(map(str, parts))).getrandbits(63))


# ---- the inputs that a matrix is measured on


class Items:
    """What both kinds share."""

    def replaced(self, items):
        """The same with other items, which `batch` and `score` number from 0."""
        other = copy.copy(self)
        other.items = items
        return other


class TextItems(Items):
    """Texts of two tokens at least: a text of one token is nothing but the position that is read.

    `items`: [{"index" in the file, "tokens", "label"}]; `left_out`: how many were too short; `source`: for the record.
    """

    scores = ("accuracy",)

    def __init__(self, model, tokenizer, model_args, data_args, args):
        rows, sources = load_rows(data_args, ["validation"], model_args)
        rows, self.source = rows["validation"], sources["validation"]
        self.tokenizer, self.padding = tokenizer, tokenizer.pad_token_id
        check_labels(rows, model.config.num_labels, self.source["source"])
        self.length = min(data_args.max_seq_length, model.config.max_position_embeddings)
        items = self.read(range(len(rows)), rows)
        order = random.Random(args.data_seed).sample(range(len(items)), len(items))
        usable = [index for index in order if len(items[index]["tokens"]) > 1]
        if not usable:
            raise UserError(f"{self.source['source']}: every text is one token; allowed is two or more")
        self.left_out = len(order) - len(usable)
        self.items = [items[index] for index in usable[: args.num_samples]]

    def read(self, indices, rows):
        """Items of rows {"text", "label"}."""
        tokens = encode(self.tokenizer, [row["text"] for row in rows], self.length)
        return [
            {"index": index, "tokens": ids, "label": row["label"]}
            for index, ids, row in zip(indices, tokens, rows, strict=True)
        ]

    def batch(self, positions):
        """Tensors of some items, padded on the right."""
        inputs = _padded([self.items[position]["tokens"] for position in positions], self.padding)
        labels = torch.tensor([self.items[position]["label"] for position in positions])
        return inputs | {"labels": labels.to(DEVICE)}

    def score(self, model, inputs, positions):
        """(batch, 1) float: 1 for a right answer."""
        return (text_logits(model, inputs).argmax(-1) == inputs["labels"]).float().cpu().numpy()[:, None]


class QuestionItems(Items):
    """Questions whose context fits one window, with the window; see `TextItems`. room: free tokens in it, at least."""

    scores = ("exact_match", "f1")

    def __init__(self, model, tokenizer, model_args, data_args, args, room=0):
        examples, sources = load_data(data_args, ["validation"], model_args)
        examples, self.source = examples["validation"], sources["validation"]
        self.tokenizer, self.padding = tokenizer, tokenizer.pad_token_id
        self.max_answer_length = data_args.max_answer_length
        self.settings = feature_settings(data_args, model.config.max_position_embeddings)
        order = random.Random(args.data_seed).sample(range(len(examples)), len(examples))
        self.items, self.left_out = [], 0
        while order and len(self.items) < args.num_samples:
            indices, order = order[: args.num_samples], order[args.num_samples :]
            found = self.read(indices, list(examples.select(indices)), room)
            self.items += filter(None, found)
            self.left_out += found.count(None)
        self.items = self.items[: args.num_samples]
        if not self.items:
            where = f"--max_seq_length {self.settings['max_seq_length']}"
            raise UserError(f"{self.source['source']}: no context fits one window; allowed are more tokens ({where})")

    def read(self, indices, rows, room=0):
        """Items of rows of the data; None for one whose context does not fit one window."""
        columns = {key: [row[key] for row in rows] for key in ("id", "question", "context", "answers")}
        windows = prepare_validation_features(columns, self.tokenizer, **self.settings)
        lengths = question_lengths(columns["question"], self.tokenizer, self.settings["separator"])
        labels = gold_labels(windows, rows).tolist()
        of_id, number = {key: place for place, key in enumerate(windows["example_id"])}, Counter(windows["example_id"])
        items = []
        for index, row, question_tokens in zip(indices, rows, lengths, strict=True):
            window = of_id[row["id"]]
            tokens = windows["input_ids"][window]
            if number[row["id"]] > 1 or len(tokens) + room > self.settings["max_seq_length"]:
                items.append(None)
                continue
            feature = {"example_id": row["id"], "offset_mapping": windows["offset_mapping"][window]}
            item = {"index": index, "tokens": tokens, "question_tokens": question_tokens}
            items.append(item | {"row": row, "feature": feature, "labels": labels[window]})
        return items

    def batch(self, positions):
        chosen = [self.items[position] for position in positions]
        starts, ends = torch.tensor([item["labels"] for item in chosen]).T.to(DEVICE)
        numbers = torch.tensor([item["question_tokens"] for item in chosen]).to(DEVICE)
        inputs = _padded([item["tokens"] for item in chosen], self.padding)
        return inputs | {"start_positions": starts, "end_positions": ends, "question_tokens": numbers}

    def score(self, model, inputs, positions):
        """(batch, 2) float: exact match and F1, 0 to 1."""
        chosen = [self.items[position] for position in positions]
        rows, features = ([item[key] for item in chosen] for key in ("row", "feature"))
        logits = qa_logits(model, inputs).float().cpu().numpy()
        answers, _ = postprocess_qa_predictions(rows, features, logits, 1, self.max_answer_length)
        found = squad_em_f1_per_example(answers, {row["id"]: row["answers"]["text"] for row in rows})
        return np.array([found[row["id"]] for row in rows])


def contains_answer(text, golds):
    """Whether the words of a gold answer, as the evaluation compares them, follow each other in a text."""
    words = f" {' '.join(answer_words(text))} "
    return any(f" {' '.join(found)} " in words for gold in golds if (found := answer_words(gold)))


ITEMS = {"classification": TextItems, "qa": QuestionItems}


def _padded(lists, padding):
    ids, lengths = pad_right(lists, padding)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.long().to(DEVICE)}


def single(inputs, row):
    """One row of a batch, without its padding."""
    length = int(inputs["attention_mask"][row].sum())
    return {
        key: value[row : row + 1, :length] if value.dim() > 1 else value[row : row + 1]
        for key, value in inputs.items()
    }
