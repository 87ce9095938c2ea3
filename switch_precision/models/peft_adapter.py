"""Adapters in the files of peft (adapter_config.json, adapter_model.safetensors), written and read without peft.

peft names the tensors after the stock model, which has Conv1D layers of the same names; A (r, in) and B (out, r) are
stored as here.
"""

import logging
import os

import torch
from safetensors import safe_open

from .checkpoint import KNOWN_BASES, read_object, read_safetensors
from .checkpoint_rules import ROTATION, float_faults, is_base, one_of, whole
from .errors import UserError
from .user_input import refuse, show

logger = logging.getLogger(__name__)
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX, BASE_CHECKSUM = "base_model.model.", "base_checksum"
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
TASKS = {
    "QuantGPT2ForQuestionAnswering": "QUESTION_ANS",
    "QuantGPT2LMHeadModel": "CAUSAL_LM",
    "QuantGPT2ForSequenceClassification": "SEQ_CLS",
}
RULES = {
    "peft_type": one_of("LORA"),
    "r": whole(1, 100_000),
    "lora_alpha": whole(1, 1_000_000),
    "bias": one_of("none"),
    "init_lora_weights": one_of(True, False, "gaussian"),  # the others change the base
}
REQUIRED = ("peft_type", "r", "lora_alpha")
# Do not change what the adapter computes: the tensors say which layers it has. All other keys must be off.
IGNORED = set(
    "auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode layers_pattern "
    "layers_to_transform lora_dropout megatron_core modules_to_save peft_version qalora_group_size revision "
    "runtime_config target_modules task_type".split()
)


def _heads(model):
    """Names of the tensors of the task's head, which trains with the adapters."""
    return [n for n in model.state_dict() if not (is_base(n) or ".lora_" in n or n.endswith(ROTATION))]


def _own_name(name, key):
    """Name in our classes of a tensor in peft's files, which is of the adapter `key` of the bank or of the head."""
    layer, lora, matrix = name.removeprefix(PREFIX).partition(".lora_")  # "A.weight"
    return layer + lora + matrix.replace(".", f".{key}.")


def peft_files(model, key, base):
    """(content of CONFIG_FILE, tensors of WEIGHTS_FILE, their metadata) of one adapter of the bank.

    key: of the adapter, "8" or "shared"; base: name or folder of the stock weights. Raises UserError: no such adapter.
    """
    bank = model.config.lora_bank or []
    if key not in bank:
        raise UserError(f"--peft {key}: the checkpoint has the adapters {', '.join(bank) or 'none'}")
    state, heads = model.state_dict(), _heads(model)
    tensors = {PREFIX + name: state[name] for name in heads}
    for name in model.quant_layers():
        tensors |= {f"{PREFIX}{name}.lora_{m}.weight": state[f"{name}.lora_{m}.{key}.weight"] for m in "AB"}
    config = {
        "peft_type": "LORA",
        "task_type": TASKS[type(model).__name__],
        "base_model_name_or_path": base,
        "revision": model.config.base_model_revision,
        "r": model.config.lora_r,
        "lora_alpha": model.config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": True,
        "target_modules": list(LINEARS),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in heads}) or None,
        "inference_mode": True,
    }
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt"}
    if "lm_head.weight" not in state:  # a part of the base's checksum: it would not be that of another task's model
        metadata[BASE_CHECKSUM] = model.base_checksum()
    return config, tensors, metadata


def start_lora(model, bank, model_args):
    """`model.add_lora`, with --from_peft every adapter starting from that one of peft, and the head from its head.

    bank: as `add_lora` takes it; model_args: flags of a script that trains adapters. Linears and a head that the
    files lack start anew. Raises UserError: files that are missing or faulty, an adapter of another rank, alpha or
    base than the flags say, or of another model.
    """
    folder, r, alpha = model_args.from_peft, model_args.lora_r, model_args.lora_alpha
    if folder is None:
        return model.add_lora(bank, r, alpha)
    config, tensors, checksum = _read(folder)
    for flag, asked, key in (("lora_r", r, "r"), ("lora_alpha", alpha, "lora_alpha")):
        if asked not in (None, config[key]):
            raise UserError(f"--{flag} {asked}, but the adapter of --from_peft {folder} has {config[key]}")
    if model.config.lora_bank:
        name = model_args.model_name_or_path
        raise UserError(f"--from_peft {folder}: {name} has adapters of its own; start from the model without them")
    _check_base(folder, config, checksum, model, model_args)
    model.add_lora(bank, config["r"], config["lora_alpha"])
    state, weights = model.state_dict(), os.path.join(folder, WEIGHTS_FILE)
    faults, new = [], {}
    for name, tensor in tensors.items():
        other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        own = [_own_name(name, key) for key in model.config.lora_bank]
        if not name.startswith(PREFIX) or own[0] not in state or is_base(own[0]):
            faults.append(f'"{name}" is no adapter of the four linears of a block, and no part of the head')
        elif tensor.shape != state[own[0]].shape:
            faults.append(f'"{name}" is {tuple(tensor.shape)}: allowed is {tuple(state[own[0]].shape)}')
        elif other not in tensors:
            faults.append(f'"{name}" is there without "{other}"')
        new |= dict.fromkeys(own, tensor)
    if not any(".lora_" in name for name in tensors):
        faults.append("no adapter in it")
    refuse(weights, faults)
    with torch.no_grad():
        for name, tensor in new.items():
            state[name].copy_(tensor)
    if missing := [name for name in _heads(model) if name not in new]:
        logger.warning("%s: no %s in it, which starts anew", weights, missing[0].rpartition(".")[0])


def _read(folder):
    """(checked config, tensors, checksum of the base or None) of a folder."""
    path, weights = os.path.join(folder, CONFIG_FILE), os.path.join(folder, WEIGHTS_FILE)
    if not os.path.isfile(path):
        raise UserError(f"--from_peft {folder}: no {CONFIG_FILE} in it; allowed is a folder that peft wrote")
    config = read_object(path)
    faults = [f'"{key}" is missing: allowed is {RULES[key][1]}' for key in REQUIRED if key not in config]
    for key, value in config.items():
        test, allowed = RULES.get(key, (lambda value: not value, "null or false: nothing else is supported"))
        if key not in IGNORED and not test(value):
            faults.append(f'"{key}" = {show(value)}: allowed is {allowed}')
    refuse(path, faults)
    if not os.path.isfile(weights):
        raise UserError(f"--from_peft {folder}: no {WEIGHTS_FILE} in it (an adapter_model.bin is a pickle: not read)")
    tensors = read_safetensors(weights, None, lambda shapes: None)
    refuse(weights, float_faults(tensors))
    with safe_open(weights, framework="pt") as file:
        return config, tensors, (file.metadata() or {}).get(BASE_CHECKSUM)


def _plain(name):
    """A base's name for comparison: a folder by its real path, a known hub model without its owner."""
    if os.path.isdir(name):
        return os.path.realpath(name)
    return name.rpartition("/")[2] if name in KNOWN_BASES else name


def _check_base(folder, config, checksum, model, model_args):
    """Refuse the adapter of another base: by the checksum that export.py wrote, else by its name."""
    name, recorded = model_args.model_name_or_path, config.get("base_model_name_or_path")
    confirmed = model_args.base_model_name_or_path == name
    if checksum:
        if checksum != model.base_checksum():
            raise UserError(f"--from_peft {folder}: the weights of {name} are not those of its base, {recorded}")
    elif not confirmed and not (isinstance(recorded, str) and _plain(recorded) == _plain(name)):
        raise UserError(
            f"--from_peft {folder}: its base is {show(recorded)}, not {name}; if they are the same weights, say so "
            f"with --base_model_name_or_path {name}"
        )
