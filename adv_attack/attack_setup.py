"""What the attack and the evaluations share: flags and loading of a trained classifier, configs, small statistics."""

import dataclasses
import hashlib
import json
import os

import numpy as np
import torch
from scipy.stats import binomtest

from models.bit_config import config_name
from models.errors import UserError
from models.modeling_gpt2_quant import QuantGPT2ForSequenceClassification, QuantGPT2LMHeadModel
from record import json_checksum
from text_classification import open_model, option

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass
class ClassifierArguments:
    """The classifier under attack, and the reference language model."""

    model_name_or_path: str = dataclasses.field(metadata={"help": "classifier that text_classification.py trained"})
    base_model_name_or_path: str | None = option(None, "where the frozen base of an adapter checkpoint lies, if moved")
    reference_model: str | None = option(
        None, "GPT-2 language model for fluency and similarity, same tokenizer (default: the frozen base, else gpt2)"
    )
    tokenizer_name: str | None = option(None, "tokenizer, if it is not the model's")
    cache_dir: str | None = option(None, "cache of hub downloads")
    model_revision: str = option("main", "branch, tag or commit on the hub")
    token: str | None = option(None, "hub token (default: the one of `hf auth login`)")
    attn_implementation: str | None = option(None, "eager, sdpa or another attention of transformers")
    execution: str = option(
        "integer",
        "how layers with W and A of at most 8 bits compute: integer (int8 products) or fake (quantized values in "
        "float); codes and gradients are the same to float rounding",
    )


def load_classifier(model_args, tokenizer):
    """The trained classifier, in evaluation mode and without gradients of its own weights."""
    model = open_model(QuantGPT2ForSequenceClassification, model_args, tokenizer)
    if model.config.architectures != ["QuantGPT2ForSequenceClassification"]:
        raise UserError(
            f"{model_args.model_name_or_path}: not a classifier of text_classification.py; train one first (train.sh)"
        )
    model.set_execution(model_args.execution)
    return model.requires_grad_(False).eval().to(DEVICE)


def load_reference(model_args, classifier):
    """(name, reference language model); it must have the classifier's vocabulary."""
    name = model_args.reference_model or model_args.base_model_name_or_path
    name = name or classifier.config.base_model_name_or_path or "gpt2"
    hub = {"cache_dir": model_args.cache_dir, "token": model_args.token}
    if name == classifier.config.base_model_name_or_path:
        hub["revision"] = classifier.config.base_model_revision
    reference = QuantGPT2LMHeadModel.from_pretrained(name, **hub)
    if reference.config.vocab_size != classifier.config.vocab_size:
        raise UserError(
            f"--reference_model {name}: vocabulary of {reference.config.vocab_size}, the classifier has "
            f"{classifier.config.vocab_size}: both read the same tokens"
        )
    return name, reference.requires_grad_(False).eval().to(DEVICE)


# Copied from switch_precision/eval_setup.py:model_checksum
def model_checksum(model):
    """sha256 over all that answers depend on: the config but for names, versions and bits; names and float32 bytes of
    the weights: base (or its exported codes), adapters and head.
    """
    tensors, config = model.state_dict(), model.config.to_dict()
    for key in ("transformers_version", "architectures", "_name_or_path", "base_model_name_or_path", "base_checksum"):
        config.pop(key, None)
    for key in ("bit_config", "trained_bit_configs"):
        config.pop(key, None)
    for name, layer in model.quant_layers().items() if model.config.exported_widths else ():
        for bits, (codes, scale) in layer.stored_codes().items():
            tensors |= {f"{name}.codes.{bits}": codes, f"{name}.scale.{bits}": scale}
    digest = hashlib.sha256(json_checksum(config).encode())
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


# Copied from switch_precision/eval_setup.py:tokenizer_checksum
def tokenizer_checksum(tokenizer):
    """sha256 over what turns text into token ids, without the truncation and padding of the last call."""
    if not tokenizer.is_fast:
        return json_checksum(tokenizer.get_vocab())
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return json_checksum(rules | {"truncation": None, "padding": None})


# Copied from switch_precision/eval_setup.py:resolve_configs
def resolve_configs(model, texts):
    """{name: resolved config} of what the user typed; all faults of all configs in one ValueError.

    A file is named by its stem (by its path where two stems agree), a width by its W-A-KV notation.
    """
    texts = list(dict.fromkeys(texts))
    names = [config_name(text) for text in texts]
    saved, configs, faults = model.config.bit_config, {}, []
    for text, name in zip(texts, names, strict=True):
        try:
            with model.bit_config(saved if text == "checkpoint" else text) as resolved:
                if names.count(name) > 1 and text != "checkpoint" and os.path.isfile(text):
                    name = text
                configs[name if configs.get(name, resolved) == resolved else text] = resolved
        except (ValueError, OSError) as error:
            lines = str(error).splitlines()
            more = [f"... and {len(lines) - 3} more of this config"] if len(lines) > 4 else lines[3:]
            faults += [line if line.startswith(text) else f"{text}: {line}" for line in lines[:3] + more]
    if faults:
        raise UserError("nothing was evaluated; bit configs with faults:\n  " + "\n  ".join(faults))
    return configs


# Copied from switch_precision/eval_stats.py:mcnemar
def mcnemar(reference, other):
    """Exact two-sided p-value that two systems are right equally often.

    Args: reference, other: (questions,) right (1) or wrong (0).
    Returns: p of the sign test on the questions where they differ; 1.0 where they never do.
    Source: McNemar 1947, in its exact binomial form.
    """
    reference, other = np.asarray(reference, dtype=bool), np.asarray(other, dtype=bool)
    only_reference, only_other = int((reference & ~other).sum()), int((other & ~reference).sum())
    discordant = only_reference + only_other
    return float(binomtest(only_other, discordant).pvalue) if discordant else 1.0


# Copied from switch_precision/eval_stats.py:markdown_table
def markdown_table(header, rows):
    """Lines of a markdown table whose columns are aligned in plain text too. header: [str]; rows: [[str]]."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
