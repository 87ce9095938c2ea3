"""What the attack and the evaluations share: flags and loading of a trained classifier and its reference model."""

import dataclasses
import os

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.arguments import CheckpointArguments, option
from common.calibration import set_quantizer
from common.checksums import tensors_checksum
from common.loading import open_model
from common.record import relative_path
from models.errors import UserError
from models.modeling_gpt2_quant import QuantGPT2ForSequenceClassification, QuantGPT2LMHeadModel

ROTATION_FILE = "rotation.safetensors"  # of an attack on a classifier that has none of its own
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass
class ClassifierArguments(CheckpointArguments):
    """The classifier under attack, and the reference language model."""

    reference_model: str | None = option(
        None, "GPT-2 language model for fluency and similarity, same tokenizer (default: the frozen base, else gpt2)"
    )


def load_classifier(model_args, tokenizer):
    """The trained classifier, in evaluation mode and without gradients of its own weights."""
    model = open_model(QuantGPT2ForSequenceClassification, model_args, tokenizer)
    if model.config.architectures != ["QuantGPT2ForSequenceClassification"]:
        name = model_args.model_name_or_path
        raise UserError(f"{name}: not a classifier of text_classification.py; train one first (train.sh)")
    model.set_execution(model_args.execution)
    return model.requires_grad_(False).eval().to(DEVICE)


def set_attack_quantizer(model, model_args, folder, windows, seed=None):
    """`calibration.set_quantizer`, but a classifier without a rotation takes that of the attack in `folder`.

    folder: None where nothing is to be taken; windows: makes calibration windows, or refuses, where there is nothing.
    Raises UserError for a damaged file.
    """
    path = os.path.join(folder or "", ROTATION_FILE)
    without = model.config.quantizer == "minmax" and not model.config.exported_widths
    if not (model_args.quantizer == "rotated" and without and folder and os.path.isfile(path)):
        return set_quantizer(model, model_args, seed, windows)
    try:
        model.set_rotations(load_file(path))
    except (SafetensorError, UserError) as error:
        raise UserError(f"{path}: {error}; run the attack again with --overwrite_output_dir") from None
    about = {"quantizer": "rotated", "checkpoint_quantizer": "minmax", "rotation_of": relative_path(folder)}
    return about | {"rotation_sha256": tensors_checksum(model.rotations())}


def load_reference(model_args, classifier):
    """(name, reference language model); it must have the classifier's vocabulary."""
    name = model_args.reference_model or model_args.base_model_name_or_path
    name = name or classifier.config.base_model_name_or_path or "gpt2"
    revision = name == classifier.config.base_model_name_or_path and classifier.config.base_model_revision
    return name, load_language_model("reference_model", name, classifier, model_args, revision or None)


def load_language_model(flag, name, model, model_args, revision=None):
    """The frozen language model `name` of a flag. Raises UserError: it has not the vocabulary of `model`."""
    hub = {"cache_dir": model_args.cache_dir, "token": model_args.token} | ({"revision": revision} if revision else {})
    found = QuantGPT2LMHeadModel.from_pretrained(name, **hub)
    if found.config.vocab_size != model.config.vocab_size:
        raise UserError(
            f"--{flag} {name}: vocabulary of {found.config.vocab_size}, the attacked model has "
            f"{model.config.vocab_size}: both read the same tokens"
        )
    return found.requires_grad_(False).eval().to(DEVICE)
