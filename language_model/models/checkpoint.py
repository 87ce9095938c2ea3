"""Checkpoints on disk: the config class, reading and writing; checkpoint_rules.py says what is allowed in them.

Nothing is built from a file before it is checked: config.json key by key, its sizes against the shapes that the
header of the weights lists, the weights against the checksum in config.json, dtype and finiteness of every tensor.
All faults of a file make one UserError. Keys that neither GPT-2 nor this repository uses are left out, and nothing a
folder contains is ever run.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tempfile
import time

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GPT2Config
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from . import checkpoint_rules as rules
from .disk import sync
from .errors import UserError
from .user_input import read_json, refuse

CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME = "config.json", "model.safetensors", "model.safetensors.index.json"
WHERE = "say where it is with --base_model_name_or_path"
MAX_JSON_BYTES = 8_000_000
TRIES, SECONDS_BETWEEN = 10, 0.1  # for a checkpoint that is being replaced while it is read
# Hub models that a checkpoint may name as its base and have downloaded; others are taken from the cache only.
KNOWN_BASES = {
    *(f"{owner}gpt2{size}" for owner in ("", "openai-community/") for size in ("", "-medium", "-large", "-xl")),
    *("distilgpt2", "distilbert/distilgpt2"),
}


class QuantGPT2Config(GPT2Config):
    """GPT2Config plus what a checkpoint needs to come back complete.

    lora_bank, lora_r, lora_alpha: the adapters; bit_config: the resolved bits; base_model_name_or_path,
    base_model_revision (commit on the hub) and base_checksum: the frozen base, which an adapter checkpoint refers to
    and does not contain; exported_widths: what widths of each linear a deployable checkpoint has (exported.py);
    trained_bit_configs: what is evaluated by default; quantizer: "minmax" or "rotated", see `set_rotations`;
    trained_weights: the linears' own weights were trained at their bits, see `QuantLinear`; base_quantization: "nf4"
    where the adapters were trained beside such a base, which is made anew from the float one (`quantize_base`).
    The own model_type keeps AutoModel from loading (out, in) weights as Conv1D.
    """

    model_type = "quant_gpt2"
    lora_bank: list | None = None
    lora_r: int = 0
    lora_alpha: int = 0
    bit_config: dict | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_checksum: str | None = None
    exported_widths: dict | None = None
    trained_bit_configs: list | None = None
    quantizer: str = "minmax"
    trained_weights: bool = False
    base_quantization: str | None = None


AutoConfig.register("quant_gpt2", QuantGPT2Config)


# ---- config.json


def read_object(path):
    """The object in a JSON file. Raises UserError: no file, not UTF-8, not JSON, duplicate keys, no object."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file, so this is no complete checkpoint")
    if os.path.getsize(path) > MAX_JSON_BYTES:
        raise UserError(f"{path}: more than {MAX_JSON_BYTES} bytes, which is no config")
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def read_config(name, hub):
    """(path of config.json, its checked content, whether it is of this repository, hub options of this commit).

    Args: name: folder or hub name; hub: {"cache_dir", "revision", "token", "local_files_only"}, as far as given.
    Raises: UserError for what is wrong with the file, OSError for a hub name that does not open.
    """
    if os.path.isdir(name):
        path = os.path.join(name, CONFIG_NAME)
    else:
        path = cached_file(name, CONFIG_NAME, **hub)
        if path is None:
            raise UserError(f"{name}: no {CONFIG_NAME} in it, so this is no model")
        hub = hub | {"revision": extract_commit_hash(path, None) or hub.get("revision")}
    raw = read_object(path)
    if (kind := raw.get("model_type")) not in ("gpt2", "quant_gpt2"):
        raise UserError(f"{path}: model_type is {kind!r:.60}, allowed are 'gpt2' and 'quant_gpt2'")
    own = kind == "quant_gpt2"
    refuse(path, rules.config_faults(raw, own))
    return path, raw, own, hub


# ---- weights


class _OtherWeights(Exception):
    """The weights are not those of config.json: both may have been replaced between the two reads."""


def read_safetensors(path, checksum, check):
    """{name: tensor} of a file. check(shapes): called with {name: shape} before any tensor is read."""
    if not os.path.isfile(path):
        folder, file = os.path.split(path)
        raise UserError(f"{folder}: no {file} in it, so this is no complete checkpoint")
    try:
        # The open file says whether the path was replaced while it was read.
        with open(path, "rb") as file, safe_open(path, framework="pt") as tensors:
            if checksum and hashlib.file_digest(file, "sha256").hexdigest() != checksum:
                raise _OtherWeights
            check({name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()})
            state = {name: tensors.get_tensor(name) for name in tensors.keys()}
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise _OtherWeights
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or truncated ({error}); use an earlier checkpoint") from None
    except (AttributeError, KeyError, TypeError) as error:  # a dtype that torch does not have
        raise UserError(f"{path}: a tensor of a dtype that cannot be read ({error})") from None
    return state


def _stock_name(name):
    """Name in our classes of a tensor of a GPT-2 file, which may be that of the bare body; None for a buffer."""
    if re.fullmatch(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", name):
        return None  # the causal mask
    return f"transformer.{name}" if re.match(r"(wte|wpe|h|ln_f)\.", name) else name


@dataclasses.dataclass
class Checkpoint:
    """name: folder or hub name; path: its config.json; fields: for QuantGPT2Config; state: {name in our classes:
    tensor}, linears (out, in); own: of this repository, not stock; commit: on the hub, None for a folder."""

    name: str
    path: str
    fields: dict
    state: dict
    own: bool
    commit: str | None


def open_checkpoint(name, hub):
    """Everything that a folder or hub name holds, checked; see `read_config` for the arguments.

    Raises: UserError with all faults of a file; OSError: nothing there.
    """
    for _ in range(TRIES):
        try:
            return _open_once(name, hub)
        except _OtherWeights:
            time.sleep(SECONDS_BETWEEN)
    _open_once(name, hub, compare=False)  # raises, if the weights themselves say what is wrong with them
    raise UserError(
        f"{name}: {CONFIG_NAME} and {WEIGHTS_NAME} belong to different checkpoints ({rules.CHECKSUM} is not the "
        "checksum of the weights): one of them was changed, or is still being copied; use another checkpoint"
    )


def _open_once(name, hub, compare=True):
    """As `open_checkpoint`. compare: the checksum of the weights with that in config.json. Raises _OtherWeights."""
    path, raw, own, hub = read_config(name, hub)
    fields = rules.config_fields(raw, own)
    weights, state = _read_weights(name, hub, raw.get(rules.CHECKSUM) if compare else None, path, fields, own)
    refuse(weights, rules.tensor_faults(fields, state))
    if not own:  # Conv1D has (in, out)
        transposed = {f"{linear}.weight" for linear in rules.linear_shapes(fields)}
        state = {key: t.t() if key in transposed and t.dim() == 2 else t for key, t in state.items()}
    return Checkpoint(name, path, fields, state, own, None if os.path.isdir(name) else hub.get("revision"))


def _read_weights(name, hub, checksum, config_path, fields, own):
    """(path, {name in our classes: tensor}) of a model whose sizes fit its config; stock models may have shards."""

    def find(file):
        if os.path.isdir(name):
            return path if os.path.isfile(path := os.path.join(name, file)) else None
        return cached_file(name, file, **hub, _raise_exceptions_for_missing_entries=False)

    def rename(entries):
        return entries if own else {new: entry for old, entry in entries.items() if (new := _stock_name(old))}

    def check(shapes):
        refuse(config_path, rules.size_faults(fields, rename(shapes)))

    weights = find(WEIGHTS_NAME)
    index = None if own or weights else find(INDEX_NAME)
    if index is None:
        weights = weights or os.path.join(name, WEIGHTS_NAME)
        return weights, rename(read_safetensors(weights, checksum, check))
    shards, state = read_object(index).get("weight_map"), {}
    if not (isinstance(shards, dict) and shards and all(map(rules.SHARD[0], shards.values()))):
        raise UserError(f'{index}: "weight_map": allowed is an object {{tensor: file of this folder}}')
    for file in sorted(set(shards.values())):
        state |= read_safetensors(find(file) or os.path.join(name, file), None, lambda shapes: None)
    check({key: tuple(tensor.shape) for key, tensor in state.items()})
    return index, rename(state)


def open_base(checkpoint, given, hub):
    """The frozen base of an adapter checkpoint, whose checksum is compared once it is in the model.

    Args: given: folder or hub name that the user says; else the one that the training recorded: a folder if the
        checkpoint is in a folder too, or a hub model at its commit. hub: see `read_config`.
    Raises: UserError.
    """
    path, recorded = checkpoint.path, checkpoint.fields["base_model_name_or_path"]
    name, is_folder = given or recorded, os.path.isabs(recorded)
    hub = {key: value for key, value in hub.items() if key != "revision"}
    if name == recorded and not is_folder:
        hub["revision"] = checkpoint.fields.get("base_model_revision")
    if not given:
        if is_folder and not os.path.isdir(checkpoint.name):
            raise UserError(f"{path}: its base is a folder of another machine, {recorded}; {WHERE}")
        if is_folder and not os.path.isdir(recorded):
            raise UserError(f"{path}: its base model {recorded} is not there any more; {WHERE}")
        if not is_folder and os.path.isdir(recorded):
            raise UserError(f"{path}: its base is {recorded} of the hub, but there is a folder of that name; {WHERE}")
        if not is_folder and recorded not in KNOWN_BASES:
            hub["local_files_only"] = True
    folder = os.path.realpath(os.path.dirname(path))
    if name == checkpoint.name or (os.path.isdir(name) and os.path.realpath(name) == folder):
        raise UserError(f"{path}: its base model is given as {name}, the checkpoint itself; {WHERE}")
    try:
        base = open_checkpoint(name, hub)
    except (OSError, UserError) as error:
        raise UserError(f"{path}: its base model {name} does not open ({error}); {WHERE}") from None
    if base.fields.get("base_model_name_or_path") or base.fields.get("exported_widths"):
        raise UserError(f"{path}: its base model {name} has no float weights of its own; {WHERE}")
    refuse(path, rules.base_faults(checkpoint.fields, base.fields, name, WHERE))
    return base


# ---- writing


@contextlib.contextmanager
def saving(folder):
    """A scratch folder whose files replace those of `folder` when the body ends, whole or not at all.

    They are on the disk before the first one is replaced. config.json comes last and gets the checksum of the weights,
    so that a reader never takes one of an old and one of a new checkpoint.
    """
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        yield scratch
        weights, config = os.path.join(scratch, WEIGHTS_NAME), os.path.join(scratch, CONFIG_NAME)
        with open(weights, "rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        content = read_json(config) | {rules.CHECKSUM: checksum}
        with open(config, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
        files = sorted(os.listdir(scratch), key=lambda name: (name == CONFIG_NAME, name))
        for path in [*(os.path.join(scratch, file) for file in files), scratch]:
            sync(path)
        for file in files:
            os.replace(os.path.join(scratch, file), os.path.join(folder, file))
        sync(folder)
