"""What the scripts beside run_qa.py share: the flags of a checkpoint, loading it, reading configs."""

import dataclasses
import hashlib
import json
import os

from models.bit_config import config_name
from models.errors import UserError
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering
from record import json_checksum
from run_qa import open_model, option


@dataclasses.dataclass
class CheckpointArguments:
    """Where the checkpoint and its tokenizer are."""

    model_name_or_path: str = dataclasses.field(metadata={"help": "checkpoint of run_qa.py, or stock GPT-2 weights"})
    base_model_name_or_path: str | None = option(None, "where the frozen base of an adapter checkpoint lies, if moved")
    tokenizer_name: str | None = option(None, "tokenizer, if it is not the model's")
    cache_dir: str | None = option(None, "cache of hub downloads")
    model_revision: str = option("main", "branch, tag or commit on the hub")
    token: str | None = option(None, "hub token (default: the one of `hf auth login`)")
    attn_implementation: str | None = option(None, "eager, sdpa or another attention of transformers")
    execution: str = option(
        "integer",
        "how layers with W and A of at most 8 bits compute: integer (int8 products) or fake (quantized values in "
        "float); codes are the same, sums agree to float rounding",
    )


def load_model(model_args, tokenizer, model_class=QuantGPT2ForQuestionAnswering):
    """The checkpoint, ready to be evaluated."""
    model = open_model(model_class, model_args, tokenizer)
    model.set_execution(model_args.execution or "integer")
    return model


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


def tokenizer_checksum(tokenizer):
    """sha256 over what turns text into token ids, without the truncation and padding of the last call."""
    if not tokenizer.is_fast:
        return json_checksum(tokenizer.get_vocab())
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return json_checksum(rules | {"truncation": None, "padding": None})


def trained_configs(model):
    """What the checkpoint serves, highest first: what the training or the export left in its config, else the widths
    of its bank, else what it was saved with.
    """
    widths = sorted((int(key) for key in model.config.lora_bank or () if key != "shared"), reverse=True)
    return model.config.trained_bit_configs or [str(bits) for bits in widths] or ["checkpoint"]


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


def data_identity(examples):
    """What tells data sets apart, wherever they come from: number and checksum of the examples."""
    digest = hashlib.sha256()
    for batch in examples.iter(1000):
        digest.update(json_checksum(batch).encode())
    return {"examples": len(examples), "sha256": digest.hexdigest()}
