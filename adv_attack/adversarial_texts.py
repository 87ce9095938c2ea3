"""Reads what an attack wrote and measures it, for eval.py and random_precision_inference.py.

Every text is tokenized again before it is classified or measured: scores on the sampled ids would overstate success.
"""

import logging
import os

import numpy as np
import torch

import gbda
from attack_setup import ROTATION_FILE, set_attack_quantizer
from classifier import accuracy_row, encode, hidden_states, pad_right, predict
from common.checksums import model_checksum, tokenizer_checksum
from common.record import differences, load_state
from models.errors import UserError
from text_data import check_labels
from whitebox_attack import RESULT_FILE

logger = logging.getLogger("adversarial_texts")


def set_attacked_quantizer(model, model_args, folders):
    """--quantizer of a classifier that attacks are measured on: without a rotation it takes that of the first one."""

    def windows():
        need = f"the checkpoint has no rotation, and {folders[0]} no {ROTATION_FILE}"
        raise UserError(f"--quantizer rotated: {need}: attack with --quantizer rotated first")

    return set_attack_quantizer(model, model_args, folders[0], windows)


def load_attacks(folders, model, quantizer, tokenizer, samples):
    """{attacked precision: attack} of output folders of one method; all must have attacked the same texts and labels,
    with the tokens of this tokenizer, within the classes of this model and its quantizer.

    Args: quantizer: of `set_attacked_quantizer`. Raises: UserError or FileNotFoundError naming the folder.
    """
    attacks, checksums = {}, (model_checksum(model), tokenizer_checksum(tokenizer))
    for folder in folders:
        path = os.path.join(folder, RESULT_FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such file; the attack is not finished or was never run (attack.sh)")
        try:
            attack = load_state(path)
            settings, _ = attack["settings"], attack["texts"]
        except (UserError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); run the attack again") from None
        name = attack_name(settings)
        if name in attacks:
            raise UserError(f"{folder}: a second attack at {name}; give one a precision")
        first = next(iter(attacks.values()), attack)
        if method_name(attack) != method_name(first):
            found = f"{folder}: attacked by {method_name(attack)}, {folders[0]} by {method_name(first)}"
            raise UserError(f"{found}: evaluate them by themselves")
        if attacked_texts(attack) != attacked_texts(first):
            flags = "(--num_samples, --start_index, the data, --max_seq_length)"
            raise UserError(f"{folder}: attacked other texts or labels than {folders[0]} {flags}")
        if settings["tokenizer_sha256"] != checksums[1]:
            tokens = f"{folder}: attacked the tokens of a tokenizer with checksum"
            found, now = settings["tokenizer_sha256"][:16], checksums[1][:16]
            raise UserError(f"{tokens} {found}..., this one has {now}... (--tokenizer_name)")
        check_labels(attack["texts"], model.config.num_labels, path)
        if settings["gumbel_samples"] < (samples or 1):
            raise UserError(f"--best_of {samples}: {folder} holds {settings['gumbel_samples']} samples a text")
        if (attacked := settings.get("quantizer", "minmax")) != model.config.quantizer:
            now = f"this evaluation has {model.config.quantizer} (--quantizer)"
            raise UserError(f"{folder}: attacked the {attacked} quantizer, {now}")
        other = settings["model_sha256"] != checksums[0]
        if other and "rotation_of" in quantizer:
            found = f"attacked another classifier or rotation than this one with the rotation of {folders[0]}"
            raise UserError(f"{folder}: {found}: evaluate it by itself, with its own classifier")
        if other:
            logger.warning("%s attacked another classifier: its rows are transfer between models", folder)
        attacks[name] = attack
    return attacks


def attacked_texts(attack):
    """What the texts of an attack are, and how they were cut."""
    texts = [(text["index"], text["text"], text["label"], text["tokens"]) for text in attack["texts"]]
    return attack["settings"]["max_seq_length"], texts


def check_bits(name, attack, configs):
    """Refuse a config with the name and the layers of an attacked one and other bits: its file was edited."""
    for config, attacked in attack["settings"]["precisions"].items():
        now = configs.get(config, attacked)
        if now.keys() == attacked.keys() and (changed := differences(attacked, now)):
            raise UserError(f"attack {name}: {config} has other bits than when it was attacked ({changed[0]})")


def attack_name(settings):
    """The attacked precision: "W4A4KV4", "random(W4A4KV4+W8A8KV8)", "eot(...)"."""
    names = "+".join(settings["precisions"])
    return f"{settings['attack_bits']}({names})" if settings["attack_bits"] in ("random", "eot") else names


def method_name(attack):
    """The kind of attack: GBDA, or what word_attack.py did."""
    return attack["settings"].get("method", "GBDA")


def baseline_name(attack):
    """What its "initial_samples" are: texts of an attacker who optimizes nothing."""
    return attack["settings"].get("baseline", "initial Theta")


def correct_table(model, tokenizer, texts, key, samples, max_length):
    """(texts, samples) bool: is each of the first hard samples of each text classified right, at the bits now set?

    Args: texts: rows of an attack; key: "samples", "initial_samples", or "text" for the clean text (one column).
    """
    lists = [[text["text"]] if key == "text" else text[key][:samples] for text in texts]
    answers = predict(model, tokenizer, [one for texts_of in lists for one in texts_of], max_length)
    labels = np.repeat([text["label"] for text in texts], len(lists[0]))
    return (np.array(answers) == labels).reshape(len(texts), -1)


def accuracies(correct, clean):
    """Both ways of counting: all inputs (a clean error counts as broken, as in the paper), and only clean-right ones.

    Args: correct (texts, samples) bool; clean (texts,) bool, at the same inference precision.
    Returns: {"single" and "best_of_n": accuracy against the first sample alone, and against the attacker who wins with
        any sample; "..._clean_right": the same among the inputs that are right without an attack}.
    """
    # Every sample of a clean-wrong input would have to be wrong too for this to be implied, so it is said.
    rows = {"single": correct[:, 0] & clean, "best_of_n": correct.all(1) & clean}
    right = {f"{name}_clean_right": accuracy_row(row[clean]) for name, row in rows.items()}
    return {name: accuracy_row(row) for name, row in rows.items()} | right


def edit_distance(first, second):
    """Levenshtein distance of two sequences."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        above, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1]


@torch.no_grad()
def text_quality(reference, tokenizer, texts, adversarial, max_length, batch_size=32):
    """How far adversarial texts are from the originals.

    Args: reference: language model; texts: rows of an attack; adversarial: one text for each.
    Returns: {"token_error_rate": edit distance of tokens / original tokens (percent); "perplexity": of all tokens but
        each text's first; "similarity": mean idf-weighted BERTScore recall under the reference model, 1 if identical}.
    """
    tokens, nll, counted, alike = encode(tokenizer, adversarial, max_length), 0.0, 0, []
    edits = sum(edit_distance(text["tokens"], ids) for text, ids in zip(texts, tokens, strict=True))
    order = sorted(range(len(texts)), key=lambda index: len(tokens[index]))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        ids, lengths = pad_right([tokens[index] for index in chosen], tokenizer.eos_token_id)
        old, old_lengths = pad_right([texts[index]["tokens"] for index in chosen], tokenizer.eos_token_id)
        weights = pad_right([texts[index]["idf"] for index in chosen], 0.0)[0].to(reference.device)
        ids, lengths, old, old_lengths = (tensor.to(reference.device) for tensor in (ids, lengths, old, old_lengths))
        embedding = reference.transformer.wte.weight
        hidden, before = hidden_states(reference, embedding[ids]), hidden_states(reference, embedding[old])
        losses = gbda.tied_soft_negative_log_likelihood(hidden, embedding[ids], embedding, lengths)
        nll += float((losses * (lengths - 1)).sum())
        counted += int((lengths - 1).sum())
        own = gbda.similarity(before, before, weights, old_lengths)
        score = gbda.similarity(before, hidden, weights, old_lengths, lengths)
        alike += (score / own)[own > 0].tolist()
    return {
        "token_error_rate": 100 * edits / sum(len(text["tokens"]) for text in texts),
        "perplexity": float(np.exp(nll / counted)) if counted else None,
        "similarity": float(np.mean(alike)) if alike else None,
    }
