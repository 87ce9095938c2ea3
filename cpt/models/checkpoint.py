"""Checkpoints on disk: the config class, reading and checking them, writing them.

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

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GPT2Config
from transformers.activations import ACT2FN
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from .bit_config import ALLOWED_BITS, SHORT_FORM, resolve_bit_config
from .errors import UserError
from .fast.integer import PACKED_BITS, unpack_int4
from .quantization import QUANTIZED_BITS
from .user_input import read_json

CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME = "config.json", "model.safetensors", "model.safetensors.index.json"
CHECKSUM = "weights_sha256"  # key of config.json: sha256 of the bytes of model.safetensors
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WHERE = "say where it is with --base_model_name_or_path"
MAX_JSON_BYTES, MAX_FAULTS = 8_000_000, 12
TRIES, SECONDS_BETWEEN = 5, 0.1  # for a checkpoint that is being replaced while it is read
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
    trained_bit_configs: what is evaluated by default.
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


AutoConfig.register("quant_gpt2", QuantGPT2Config)


def is_base(name):
    """True for the weights of the pretrained body, False for adapters and heads."""
    return name.startswith("transformer.") and ".lora_" not in name or name.startswith("lm_head.")


def linear_names(n_layer):
    """Names of the quantizable linears, in model order."""
    return [f"transformer.h.{block}.{linear}" for block in range(n_layer) for linear in LINEARS]


def refuse(path, faults):
    """Raise one UserError with all faults of a file; nothing without faults."""
    if faults:
        more = [f"... and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
        raise UserError("\n".join(f"{path}: {fault}" for fault in [*faults[:MAX_FAULTS], *more]))


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


def whole(low, high):
    return (lambda value: type(value) is int and low <= value <= high), f"a whole number, {low} to {high}"


def number(low, high):
    return (lambda value: type(value) in (int, float) and low <= value <= high), f"a number, {low} to {high}"


def one_of(*values):
    names = ", ".join(map(json.dumps, values))
    return (lambda value: any(type(value) is type(v) and value == v for v in values)), names


def matching(pattern, words):
    return (lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None), words


def or_null(rule):
    return (lambda value: value is None or rule[0](value)), f"{rule[1]}, or null"


def list_of(rule):
    test = rule[0]
    return (lambda value: isinstance(value, list) and all(map(test, value))), f"a list; each entry {rule[1]}"


TOKEN, TEXT, FLAG = whole(0, 2**31 - 1), matching(r"(?s).{0,1000}", "a string"), one_of(True, False)
REQUIRED = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
# What a base and the adapters trained on it must agree in: all that changes the output of a forward pass.
ARCHITECTURE = {
    "vocab_size": whole(1, 10_000_000),
    "n_positions": whole(1, 10_000_000),
    "n_embd": whole(1, 100_000),
    "n_layer": whole(1, 1000),
    "n_head": whole(1, 100_000),
    "n_inner": or_null(whole(1, 1_000_000)),
    "activation_function": one_of(*(name for name in ACT2FN if name not in ("prelu", "xielu"))),  # have weights
    "layer_norm_epsilon": number(0, 1),
    "scale_attn_weights": FLAG,
    "scale_attn_by_inverse_layer_idx": FLAG,
}
# {key: (test of the value, what is allowed)}
RULES = ARCHITECTURE | {
    "reorder_and_upcast_attn": FLAG,
    "add_cross_attention": one_of(False),
    "tie_word_embeddings": one_of(True),
    "use_cache": FLAG,
    "resid_pdrop": number(0, 1),
    "embd_pdrop": number(0, 1),
    "attn_pdrop": number(0, 1),
    "initializer_range": number(0, 100),
    "bos_token_id": or_null(TOKEN),
    "eos_token_id": (
        lambda value: value is None or TOKEN[0](value) or (bool(value) and list_of(TOKEN)[0](value)),
        f"{TOKEN[1]}, a list of them, or null",
    ),
    "pad_token_id": or_null(TOKEN),
    "num_labels": whole(1, 100_000),
    "problem_type": or_null(one_of("regression", "single_label_classification", "multi_label_classification")),
    "architectures": or_null(list_of(TEXT)),
}
OWN_RULES = RULES | {
    "lora_bank": (
        lambda value: (
            value is None
            or value == ["shared"]
            or (list_of(one_of(*map(str, ALLOWED_BITS)))[0](value) and len(set(value)) == len(value) > 0)
        ),
        'different bit-widths as strings ("2" to "8", "16", "32"), or ["shared"], or null',
    ),
    "lora_r": whole(0, 100_000),
    "lora_alpha": whole(0, 1_000_000),
    "base_model_name_or_path": or_null(
        (
            lambda value: (
                isinstance(value, str)
                and len(value) <= 4096
                and value.isprintable()
                and (os.path.isabs(value) or re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", value) is not None)
            ),
            "an absolute folder or a hub name",
        )
    ),
    "base_model_revision": or_null(matching(r"[0-9a-f]{40}", "a commit, 40 hex digits")),
    "base_checksum": or_null(matching(r"[0-9a-f]{64}", "a sha256, 64 hex digits")),
    CHECKSUM: matching(r"[0-9a-f]{64}", "a sha256, 64 hex digits"),
    "trained_bit_configs": or_null(
        list_of(
            (
                lambda value: (
                    isinstance(value, str)
                    and (value == "checkpoint" or re.fullmatch(r"[0-9]{1,2}|" + SHORT_FORM.pattern, value) is not None)
                ),
                '"8", "W4A8KV8" or "checkpoint"',
            )
        )
    ),
    "bit_config": or_null((lambda value: isinstance(value, dict), "an object with the bits of every linear")),
    "exported_widths": or_null((lambda value: isinstance(value, dict), "an object with the widths of every linear")),
}


def _shown(value):
    try:
        text = json.dumps(value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= 80 else text[:77] + "..."


def _label_faults(raw):
    """id2label numbers the classes "0", "1", ...; label2id is its inverse."""
    labels = raw.get("id2label")
    if labels is None:
        return []
    numbered = isinstance(labels, dict) and list(labels) == [str(index) for index in range(len(labels))]
    if not (numbered and labels and all(isinstance(label, str) for label in labels.values())):
        return [f'"id2label" = {_shown(labels)}: allowed is an object {{"0": name, "1": name, ...}}']
    inverse = raw.get("label2id")
    if inverse is not None and (
        not isinstance(inverse, dict) or any(type(index) is not int for index in inverse.values())
    ):
        return [f'"label2id" = {_shown(inverse)}: allowed is an object {{name: number}}']
    return []


def _bit_faults(raw, layers):
    """Of bit_config, trained_bit_configs and exported_widths, which name the linears of this model."""
    faults = []
    if (bits := raw.get("bit_config")) is not None:
        if set(bits) != set(layers):
            different = _shown(sorted(set(bits) ^ set(layers))[0])
            faults.append(f'"bit_config": {different}: allowed are the linears of "n_layer" = {raw["n_layer"]}')
        else:
            try:
                resolve_bit_config(bits, layers)
            except UserError as error:
                faults += [f'"bit_config": {line.removeprefix("bit config: ")}' for line in str(error).splitlines()]
    for text in raw.get("trained_bit_configs") or ():
        if text != "checkpoint":
            try:
                resolve_bit_config(int(text) if text.isdigit() else text, layers)
            except UserError as error:
                faults.append(f'"trained_bit_configs": {_shown(text)}: {str(error).splitlines()[0]}')
    if (exported := raw.get("exported_widths")) is not None:
        good = list_of(one_of(*QUANTIZED_BITS))[0]
        wrong = sorted(set(exported) ^ set(layers))
        wrong += [name for name in layers if name in exported and not (good(exported[name]) and exported[name])]
        faults += [
            f'"exported_widths": {_shown(name)} = {_shown(exported.get(name))}: allowed is a list of widths, 2 to 8, '
            f'for each linear of "n_layer" = {raw["n_layer"]}'
            for name in wrong
        ]
    return faults


def config_faults(raw, own):
    """What is wrong with the keys of a config.json, as a list of sentences. own: of this repository, not stock."""
    rules = OWN_RULES if own else RULES
    faults = [f'"{key}" is missing: allowed is {rules[key][1]}' for key in REQUIRED if key not in raw]
    wrong = [key for key, (test, _) in rules.items() if key in raw and not test(raw[key])]
    faults += [f'"{key}" = {_shown(raw[key])}: allowed is {rules[key][1]}' for key in wrong]
    faults += _label_faults(raw)
    sound = not {*wrong, *(key for key in REQUIRED if key not in raw)}.intersection(REQUIRED)
    if sound and raw["n_embd"] % raw["n_head"]:
        faults.append(f'"n_head" = {raw["n_head"]}: allowed are divisors of "n_embd" = {raw["n_embd"]}')
    if not own:
        return faults
    if raw.get("lora_bank") and "lora_bank" not in wrong:
        faults += [
            f'"{key}" = {_shown(raw[key]) if key in raw else "missing"}: the adapters of "lora_bank" need '
            f"{OWN_RULES[key][1].replace('0 to', '1 to')}"
            for key in ("lora_r", "lora_alpha")
            if key not in wrong and not raw.get(key)
        ]
    if raw.get("base_model_name_or_path") and not raw.get("base_checksum"):
        faults.append('"base_checksum" is missing: a base is opened only if it is the one of the training')
    if sound and not {"bit_config", "trained_bit_configs", "exported_widths"}.intersection(wrong):
        faults += _bit_faults(raw, linear_names(raw["n_layer"]))
    return faults


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
    refuse(path, config_faults(raw, own))
    return path, raw, own, hub


def config_fields(raw, own):
    """The keys of a checked config.json that a QuantGPT2Config takes."""
    fields = {key: raw[key] for key in (OWN_RULES if own else RULES) if key in raw and key != CHECKSUM}
    fields |= {key: float(fields[key]) for key in ("layer_norm_epsilon", "initializer_range") if key in fields}
    if raw.get("id2label"):
        fields.pop("num_labels", None)
        fields["id2label"] = {int(index): label for index, label in raw["id2label"].items()}
        fields["label2id"] = {label: index for index, label in fields["id2label"].items()}
    return fields


# ---- weights


class _OtherWeights(Exception):
    """The weights are not those of config.json: both may have been replaced between the two reads."""


def _read_safetensors(path, checksum, check):
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


def size_faults(fields, shapes, own):
    """Where the sizes in the config differ from the shapes of the tensors.

    Args: fields: checked config; shapes: {name in our classes: shape}; own: linears are (out, in) or codes.
    """
    faults = []

    def compare(tensor, axis, key, value):
        if tensor not in shapes:
            faults.append(f'no tensor "{tensor}", which "{key}" = {value} needs')
        elif len(shapes[tensor]) <= axis or shapes[tensor][axis] != value:
            faults.append(f'the weights do not fit "{key}" = {value}: "{tensor}" is {shapes[tensor]}')

    width, mlp = fields["n_embd"], "transformer.h.0.mlp.c_fc"
    inner = "n_inner", fields.get("n_inner") or 4 * width
    if not (own and fields.get("base_model_name_or_path")):
        compare("transformer.wte.weight", 0, "vocab_size", fields["vocab_size"])
        compare("transformer.wte.weight", 1, "n_embd", width)
        compare("transformer.wpe.weight", 0, "n_positions", fields["n_positions"])
        compare(f"{mlp}.bias", 0, *inner)
    elif base := sorted(filter(is_base, shapes)):
        faults.append(f'"{base[0]}" belongs to the base, which an adapter checkpoint does not contain')
    bank = own and fields.get("lora_bank") or ()
    for key in bank if not (own and fields.get("exported_widths")) else ():
        compare(f"{mlp}.lora_A.{key}.weight", 1, "n_embd", width)
        compare(f"{mlp}.lora_B.{key}.weight", 0, *inner)
    adapters = {name: shape for name, shape in shapes.items() if ".lora_A." in name}
    if not {name.split(".")[-2] for name in adapters} <= set(bank):
        faults.append(f'"lora_bank" = {_shown(list(bank))}, but the weights have "{max(adapters)}"')
    elif wrong := [name for name, shape in adapters.items() if shape[:1] != (fields["lora_r"],)]:
        compare(wrong[0], 0, "lora_r", fields["lora_r"])
    blocks = {int(match[1]) for name in shapes if (match := re.match(r"transformer\.h\.(\d{1,9})\.", name))}
    if len(blocks) != fields["n_layer"] or max(blocks, default=-1) != fields["n_layer"] - 1:
        faults.append(f'the weights do not fit "n_layer" = {fields["n_layer"]}: they have {len(blocks)} blocks')
    return faults


def tensor_faults(state):
    """What is wrong with float tensors {name: tensor}, as a list of sentences."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
    faults = []
    for name, tensor in state.items():
        if tensor.dtype not in FLOAT_DTYPES:
            faults.append(f'"{name}" is {str(tensor.dtype).removeprefix("torch.")}: allowed are {names}')
        elif tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            faults.append(f'"{name}" is not finite')
    return faults


def code_faults(name, shape, bits, codes, scale):
    """What is wrong with the codes and scales of a linear at one width, as a list of sentences.

    `quantize` gives codes within -qmax..qmax and a positive scale; a scale of 0 stands for a row of zeros.
    Args: shape: (out, in) of the linear; codes, scale: tensors, None where there is none.
    """
    qmax, packed = 2 ** (bits - 1) - 1, bits <= PACKED_BITS
    columns = (shape[1] + 1) // 2 if packed else shape[1]
    expected = {
        "codes": (codes, torch.uint8 if packed else torch.int8, (shape[0], columns)),
        "scale": (scale, torch.float32, (shape[0], 1)),
    }
    faults = []
    for kind, (tensor, *wanted) in expected.items():
        found = None if tensor is None else [tensor.dtype, tuple(tensor.shape)]
        if found != wanted:
            words = "missing" if tensor is None else f"{found[0]} {found[1]}".removeprefix("torch.")
            wanted = f"{wanted[0]} {wanted[1]}".removeprefix("torch.")
            faults.append(f'"{name}.{kind}.{bits}" is {words}: allowed is {wanted}')
    if faults:
        return faults
    codes = unpack_int4(codes, shape[1]) if packed else codes
    low, high = codes.aminmax()
    if low < -qmax or high > qmax:
        faults.append(f'"{name}.codes.{bits}" has codes from {low} to {high}: allowed are {-qmax} to {qmax}')
    if not (scale * qmax).isfinite().all() or (scale < 0).any():
        faults.append(f'"{name}.scale.{bits}" has a scale that is negative or not finite')
    elif codes[scale.view(-1) == 0].any():
        faults.append(f'"{name}.scale.{bits}" has a scale of 0 for codes that are not')
    return faults


def linear_shapes(fields):
    """{linear: (out, in)} of a checked config."""
    width, inner = fields["n_embd"], fields.get("n_inner") or 4 * fields["n_embd"]
    shapes = dict(zip(LINEARS, ((3 * width, width), (width, width), (inner, width), (width, inner)), strict=True))
    return {name: shapes[name.split(".", 3)[3]] for name in linear_names(fields["n_layer"])}


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
        f"{name}: {CONFIG_NAME} and {WEIGHTS_NAME} belong to different checkpoints ({CHECKSUM} is not the checksum of "
        "the weights): one of them was changed, or is still being copied; use another checkpoint"
    )


def _open_once(name, hub, compare=True):
    path, raw, own, hub = read_config(name, hub)
    fields = config_fields(raw, own)
    weights, state = _read_weights(name, hub, raw.get(CHECKSUM) if compare else None, path, fields, own)
    faults = []
    codes = dict.fromkeys(key for key in state if ".codes." in key or ".scale." in key)
    for linear, widths in (fields.get("exported_widths") or {}).items():
        for bits in widths:
            pair = [f"{linear}.{kind}.{bits}" for kind in ("codes", "scale")]
            faults += code_faults(linear, linear_shapes(fields)[linear], bits, *map(state.get, pair))
    faults += tensor_faults({key: tensor for key, tensor in state.items() if key not in codes})
    refuse(weights, faults)
    if not own:  # Conv1D has (in, out)
        transposed = {f"{linear}.weight" for linear in linear_names(fields["n_layer"])}
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
        refuse(config_path, size_faults(fields, rename(shapes), own))

    weights = find(WEIGHTS_NAME)
    index = None if own or weights else find(INDEX_NAME)
    if index is None:
        weights = weights or os.path.join(name, WEIGHTS_NAME)
        return weights, rename(_read_safetensors(weights, checksum, check))
    shards, state = read_object(index).get("weight_map"), {}
    if not isinstance(shards, dict) or not shards or not _are_files(shards.values()):
        raise UserError(f'{index}: "weight_map": allowed is an object {{tensor: file of this folder}}')
    for file in sorted(set(shards.values())):
        state |= _read_safetensors(find(file) or os.path.join(name, file), None, lambda shapes: None)
    check({key: tuple(tensor.shape) for key, tensor in state.items()})
    return index, rename(state)


def _are_files(names):
    return all(isinstance(name, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", name) for name in names)


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
    if name == checkpoint.name or (os.path.isdir(name) and os.path.realpath(name) == _folder(checkpoint)):
        raise UserError(f"{path}: its base model is given as {name}, the checkpoint itself; {WHERE}")
    try:
        base = open_checkpoint(name, hub)
    except (OSError, UserError) as error:
        raise UserError(f"{path}: its base model {name} does not open ({error}); {WHERE}") from None
    if base.fields.get("base_model_name_or_path") or base.fields.get("exported_widths"):
        raise UserError(f"{path}: its base model {name} has no float weights of its own; {WHERE}")
    defaults = GPT2Config()
    pairs = [(key, *(c.fields.get(key, getattr(defaults, key)) for c in (checkpoint, base))) for key in ARCHITECTURE]
    refuse(
        path,
        [
            f'"{key}" = {_shown(ours)}, but its base model {name} has {_shown(theirs)}; if it is another one, {WHERE}'
            for key, ours, theirs in pairs
            if ours != theirs
        ],
    )
    return base


def _folder(checkpoint):
    return os.path.realpath(os.path.dirname(checkpoint.path))


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
        with open(config, encoding="utf-8") as file:
            content = json.load(file) | {CHECKSUM: checksum}
        with open(config, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, sort_keys=True)
            file.write("\n")
        files = sorted(os.listdir(scratch), key=lambda name: (name == CONFIG_NAME, name))
        for path in [*(os.path.join(scratch, file) for file in files), scratch]:
            _sync(path)
        for file in files:
            os.replace(os.path.join(scratch, file), os.path.join(folder, file))
        _sync(folder)


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
