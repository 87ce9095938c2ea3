"""What all scripts of this folder share: rows, token ids, the quantizer, the classifier's answer, its interval."""

import random

import torch
import torch.nn.functional as F
from scipy.stats import binomtest

from common.calibration import set_quantizer
from common.checksums import file_checksum, json_checksum
from common.record import relative_path
from models.errors import UserError
from text_data import load_texts


def load_rows(data_args, splits, model_args):
    """({split: rows}, {split: source, number and checksum}) for the splits that the run needs."""
    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    rows = load_texts(
        dataset_name=data_args.dataset_name,
        dataset_config_name=data_args.dataset_config_name,
        files=files,
        splits=splits,
        columns=(data_args.text_column, data_args.label_column),
        cache_dir=model_args.cache_dir,
        token=model_args.token,
    )
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    rows = {split: texts[: limits[split]] for split, texts in rows.items()}
    sources = {
        split: {
            "source": relative_path(files[split]) if files[split] else data_args.dataset_name,
            "examples": len(texts),
            "sha256": file_checksum(files[split]) if files[split] else json_checksum(texts),
        }
        for split, texts in rows.items()
    }
    return rows, sources


def encode(tokenizer, texts, max_length):
    """Token ids of every text, cut at max_length. A text without tokens becomes one end-of-text token."""
    lists = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"] if texts else []
    return [ids or [tokenizer.eos_token_id] for ids in lists]


def calibration_texts(model, tokenizer, model_args, data_args, seed, rows=None):
    """Token ids of --calibration_samples training texts, drawn with `seed`.

    rows: the training texts where they are loaded already. Raises UserError: no training data, or too few.
    """
    if rows is None:
        if not (data_args.train_file or data_args.dataset_name):
            why = "the checkpoint has no rotation, and it is calibrated on training texts"
            raise UserError(f"--quantizer rotated: {why}: pass --train_file or --dataset_name")
        rows = load_rows(data_args, ["train"], model_args)[0]["train"]
    if (wanted := model_args.calibration_samples) > len(rows):
        raise UserError(f"--calibration_samples {wanted}: allowed are up to {len(rows)}, the training texts")
    texts = [row["text"] for row in random.Random(seed).sample(rows, wanted)]
    return encode(tokenizer, texts, min(data_args.max_seq_length, model.config.max_position_embeddings))


def set_text_quantizer(model, tokenizer, model_args, data_args, seed, folder=None, rows=None):
    """`calibration.set_quantizer` with texts. folder: the OutputFolder of a training; rows: its texts."""

    def windows():
        return calibration_texts(model, tokenizer, model_args, data_args, seed, rows)

    return set_quantizer(model, model_args, seed, windows, folder and folder.weights_folder)


def pad_right(lists, value):
    """(ids (N, T), lengths (N,)) of token lists. Causal attention makes padding on the right harmless."""
    longest = max(map(len, lists))
    ids = torch.tensor([tokens + [value] * (longest - len(tokens)) for tokens in lists])
    return ids, torch.tensor([len(tokens) for tokens in lists])


def hidden_states(model, embeds):
    """Last hidden states, after the final LayerNorm, of any of our models. embeds (N, T, H) -> (N, T, H)."""
    return model.transformer(inputs_embeds=embeds, use_cache=False).last_hidden_state


def last_position_logits(model, lengths, embeds):
    """Class logits (N, classes) at the last position of each text: upstream takes that of the padding.

    Args: lengths (N,); embeds (N, T, H): token embeddings, padded on the right.
    """
    hidden = hidden_states(model, embeds)
    return model.score(hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1])


@torch.no_grad()
def class_logits(model, tokenizer, texts, max_length, batch_size=64):
    """Logits (N, classes) of N texts, under the bits that are set; equal texts are classified once."""
    distinct = list(dict.fromkeys(texts))
    tokens = encode(tokenizer, distinct, max_length)
    order = sorted(range(len(distinct)), key=lambda index: len(tokens[index]))
    found = {}
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        ids, lengths = pad_right([tokens[index] for index in chosen], tokenizer.pad_token_id)
        embeds = model.transformer.wte(ids.to(model.device))
        logits = last_position_logits(model, lengths.to(model.device), embeds)
        found |= {distinct[index]: row for index, row in zip(chosen, logits, strict=True)}
    return torch.stack([found[text] for text in texts])


def predict(model, tokenizer, texts, max_length):
    """Predicted class of every text, under the bits that are set."""
    return class_logits(model, tokenizer, texts, max_length).argmax(-1).tolist()


@torch.no_grad()
def negative_log_likelihood(model, tokenizer, text):
    """[sum in nats, number of tokens] that a language model predicts of a text: all but the first."""
    (tokens,) = encode(tokenizer, [text], model.config.max_position_embeddings)
    ids = torch.tensor([tokens], device=model.device)
    logits = model(input_ids=ids).logits[0, :-1].float()
    return [F.cross_entropy(logits, ids[0, 1:], reduction="sum").item(), len(tokens) - 1]


def accuracy_row(correct):
    """{"n", "correct", "accuracy" (percent), "interval" (Wilson, 95 %, percent)} of booleans; None fields for none.

    Source: Wilson 1927, score interval of a binomial proportion (scipy's binomtest).
    """
    hits, number = int(sum(map(bool, correct))), len(correct)
    if not number:
        return {"n": 0, "correct": 0, "accuracy": None, "interval": None}
    interval = binomtest(hits, number).proportion_ci(0.95, method="wilson")
    percent = {"accuracy": 100 * hits / number, "interval": [100 * float(bound) for bound in interval]}
    return {"n": number, "correct": hits, **percent}
