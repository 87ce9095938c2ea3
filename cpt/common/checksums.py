"""Checksums by which a run knows its inputs again: files, JSON, rows, tokenizer, model."""

import hashlib
import json

import torch


def json_checksum(obj) -> str:
    """sha256 of what `obj` is after a way through JSON: the order of keys and the layout do not matter."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(obj)), sort_keys=True).encode()).hexdigest()


def file_checksum(path):
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_identity(examples):
    """What tells data sets apart, wherever they come from: number and checksum of the examples."""
    digest = hashlib.sha256()
    for batch in examples.iter(1000):
        digest.update(json_checksum(batch).encode())
    return {"examples": len(examples), "sha256": digest.hexdigest()}


def tokenizer_checksum(tokenizer):
    """sha256 over what turns text into token ids, without the truncation and padding of the last call."""
    if not tokenizer.is_fast:
        return json_checksum(tokenizer.get_vocab())
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return json_checksum(rules | {"truncation": None, "padding": None})


def model_checksum(model):
    """sha256 over all that answers depend on: the config but for names, versions and bits; names and float32 bytes of
    the weights: base (or its exported codes), adapters and head.
    """
    tensors, config = model.state_dict(), model.config.to_dict()
    names = "transformers_version architectures _name_or_path base_model_name_or_path base_model_revision "
    for key in f"{names} base_checksum bit_config trained_bit_configs quantizer".split():  # its vectors are weights
        config.pop(key, None)
    for key in ("trained_weights", "base_quantization"):
        if not config.get(key):  # as in checkpoints that are older than this key
            config.pop(key, None)
    for name, layer in model.quant_layers().items() if model.config.base_quantization else ():
        tensors[f"{name}.weight"] = layer.nf4.dequantize(torch.float32)
    for name, layer in model.quant_layers().items() if model.config.exported_widths else ():
        for bits, (codes, scale) in layer.stored_codes().items():
            tensors |= {f"{name}.codes.{bits}": codes, f"{name}.scale.{bits}": scale}
    return tensors_checksum(tensors, json_checksum(config))


def tensors_checksum(tensors, start=""):
    """sha256 over `start`, names and float32 bytes of {name: tensor}."""
    digest = hashlib.sha256(start.encode())
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()
