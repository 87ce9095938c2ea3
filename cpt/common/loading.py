"""Opening a tokenizer, a model and the bit configs that a user typed, with every check before any compute."""

import json
import logging
import os

from transformers import AutoTokenizer

from models.bit_config import config_name, describe_bit_config, short_name
from models.checkpoint import read_config
from models.errors import UserError

logger = logging.getLogger(__name__)


def load_tokenizer(model_args):
    """The tokenizer; GPT-2 has no pad token, so padding uses its end-of-text token (masked, never scored).

    Raises ValueError for tokenizer files, or a config.json beside them, that do not work; OSError for none.
    """
    name = model_args.tokenizer_name or model_args.model_name_or_path
    options = {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision, "token": model_args.token}
    if not model_args.tokenizer_name:
        read_config(str(name), options)  # the tokenizer's class may come from it
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, UserError):
        raise
    except Exception as error:  # faulty files raise any class, that of tokenizers is Exception itself
        what = " ".join(f"{type(error).__name__}: {error}".split())  # theirs may have several lines
        raise UserError(f"{name}: its tokenizer does not open ({what})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"  # where a causal model does not look; positions count from the text's start
    return tokenizer


def open_model(model_class, model_args, tokenizer, training=False, **overrides):
    """The model of --model_name_or_path, complete with its adapters. Raises ValueError for a tokenizer that is not
    the model's, for adapters of another --lora_r or --lora_alpha, and for training on an exported checkpoint."""
    options = {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision, "token": model_args.token}
    if model_args.attn_implementation:
        options["attn_implementation"] = model_args.attn_implementation
    name, base = model_args.model_name_or_path, model_args.base_model_name_or_path
    model = model_class.from_pretrained(name, base_model_name_or_path=base, **options, **overrides)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the embedding of {name} {model.config.vocab_size}: they do "
            "not belong together (--tokenizer_name)"
        )
    for key in ("lora_r", "lora_alpha") if model.config.lora_bank else ():
        asked, found = getattr(model_args, key, None), getattr(model.config, key)
        if asked not in (None, found):
            raise UserError(
                f"--{key} {asked}, but the adapters of {name} have {key} {found}: leave the flag out, or start from a "
                "model without adapters"
            )
    if training and model.config.exported_widths:
        raise UserError(
            f"{name} is an exported checkpoint without float weights: it can be evaluated; train the checkpoint that "
            "it was made from"
        )
    if not training:  # only of frozen weights codes are kept from one forward to the next
        for layer in model.quant_layers().values():
            if layer.weight is not None:
                layer.weight.requires_grad_(False)
    return model


def load_model(model_class, model_args, tokenizer):
    """The checkpoint, ready to be evaluated."""
    model = open_model(model_class, model_args, tokenizer)
    model.set_execution(model_args.execution or "integer")
    return model


def describe_bits(model, resolved):
    """`describe_bit_config` of one of the model's configs. An NF4 base is counted with all its scales."""
    found = describe_bit_config(resolved, model.layer_shapes())
    if method := model.config.base_quantization:
        layers, size = model.quant_layers().values(), model.quantized_bytes()
        bits = 8 * size / sum(layer.in_features * layer.out_features for layer in layers)
        found |= {"average_w_bits": bits, "weight_bytes": size, "layers_per_w_bits": {method: len(layers)}}
    return found


def describe_model(model):
    """{"name", "layers" (resolved config), average bits, sizes, trainable parameters}; logged and recorded."""
    resolved = model.config.bit_config
    name = model.config.base_quantization or short_name(resolved)
    description = {"name": name, **describe_bits(model, resolved)}
    trainable, total = model.num_parameters(only_trainable=True), model.num_parameters()
    logger.info("bits: %s", json.dumps(description))
    logger.info("LoRA bank: %s; trainable: %d of %d parameters", model.config.lora_bank, trainable, total)
    return {**description, "lora_bank": model.config.lora_bank, "layers": resolved}


def trained_configs(model):
    """What the checkpoint serves, highest first: of its training or export, else its bank, else as it was saved."""
    widths = sorted((int(key) for key in model.config.lora_bank or () if key != "shared"), reverse=True)
    return model.config.trained_bit_configs or [str(bits) for bits in widths] or ["checkpoint"]


def resolve_configs(model, texts):
    """{name: resolved config} of what the user typed; all faults of all configs in one ValueError.

    A file is named by its stem (by its path where two stems agree), a width by its W-A-KV notation.
    """
    resolved, faults = {}, []
    for text in dict.fromkeys(texts):
        try:
            with model.at_bits(model.config.bit_config if text == "checkpoint" else text) as found:
                resolved[text] = found
        except (ValueError, OSError) as error:
            faults += fault_lines(text, error)
    if faults:
        raise UserError("nothing was evaluated; bit configs with faults:\n  " + "\n  ".join(faults))
    return name_configs(resolved)


def resolve_random(model, texts):
    """{name: resolved config} of --random_precision, {} without it. Raises UserError: a set without a choice."""
    configs = resolve_configs(model, texts) if texts else {}
    if len(configs) == 1:
        raise UserError(f"--random_precision {' '.join(texts)}: one precision is no choice: pass two or more")
    return configs


def fault_lines(text, error):
    """The first faults of a config, a line each, and how many more there are."""
    lines = str(error).splitlines()
    more = [f"... and {len(lines) - 3} more of this config"] if len(lines) > 4 else lines[3:]
    return [line if line.startswith(text) else f"{text}: {line}" for line in lines[:3] + more]


def name_configs(resolved):
    """{name: config} of {what the user typed: config}; two different configs never share a name."""
    names, configs = [config_name(text) for text in resolved], {}
    for (text, config), name in zip(resolved.items(), names, strict=True):
        if names.count(name) > 1 and text != "checkpoint" and os.path.isfile(text):
            name = text
        configs[name if configs.get(name, config) == config else text] = config
    return configs
