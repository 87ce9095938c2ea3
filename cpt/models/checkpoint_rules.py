"""What a checkpoint may contain: allowed values of every key of config.json, sizes, dtypes and codes of its tensors.

The functions say what is wrong as a list of sentences, which `user_input.refuse` makes one UserError.
"""

import json
import re

import torch
from transformers import GPT2Config
from transformers.activations import ACT2FN

from .bit_config import ALLOWED_BITS, SHORT_FORM, resolve_bit_config
from .errors import UserError
from .fast.integer import PACKED_BITS, unpack_int4
from .nf4 import METHOD as NF4
from .quantization import QUANTIZED_BITS
from .rotation import rotation_faults
from .user_input import show

CHECKSUM = "weights_sha256"  # key of config.json: sha256 of the bytes of model.safetensors
QUANTIZERS = ("minmax", "rotated")
ROTATION = ".rotation"  # what follows a linear's name in the name of its vector d
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_base(name):
    """True for the weights of the pretrained body, False for adapters, rotations and heads."""
    own = ".lora_" in name or name.endswith(ROTATION)
    return (name.startswith("transformer.") and not own) or name.startswith("lm_head.")


def linear_shapes(fields):
    """{quantizable linear: (out, in)} of a config, in model order."""
    width, inner = fields["n_embd"], fields.get("n_inner") or 4 * fields["n_embd"]
    shapes = {"attn.c_attn": (3 * width, width), "attn.c_proj": (width, width)}
    shapes |= {"mlp.c_fc": (inner, width), "mlp.c_proj": (width, inner)}
    return {f"transformer.h.{block}.{name}": shapes[name] for block in range(fields["n_layer"]) for name in shapes}


# ---- config.json


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
WIDTH_KEYS = list_of(one_of(*map(str, ALLOWED_BITS)))
NAME = matching(r"(?=.{1,4096}\Z)(/.*|\w[\w.-]*(/\w[\w.-]*)?)", "an absolute folder or a hub name")
SHARD = matching(r"\w[\w.-]*\.safetensors", "a file of this folder")
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
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), number(0, 1)),
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
        lambda value: value in (None, ["shared"]) or (WIDTH_KEYS[0](value) and len(set(value)) == len(value) > 0),
        'different bit-widths as strings ("2" to "8", "16", "32"), or ["shared"], or null',
    ),
    "lora_r": whole(0, 100_000),
    "lora_alpha": whole(0, 1_000_000),
    "base_model_name_or_path": or_null((lambda value: NAME[0](value) and value.isprintable(), NAME[1])),
    "base_model_revision": or_null(matching(r"[0-9a-f]{40}", "a commit, 40 hex digits")),
    "base_checksum": or_null(matching(r"[0-9a-f]{64}", "a sha256, 64 hex digits")),
    CHECKSUM: matching(r"[0-9a-f]{64}", "a sha256, 64 hex digits"),
    "trained_bit_configs": or_null(
        list_of(matching(r"checkpoint|[0-9]{1,2}|" + SHORT_FORM.pattern, '"8", "W4A8KV8" or "checkpoint"'))
    ),
    "bit_config": or_null((lambda value: isinstance(value, dict), "an object with the bits of every linear")),
    "quantizer": one_of(*QUANTIZERS),
    "trained_weights": FLAG,
    "base_quantization": or_null(one_of(NF4)),
    "exported_widths": or_null((lambda value: isinstance(value, dict), "an object with the widths of every linear")),
}


def _label_faults(raw):
    """id2label numbers the classes "0", "1", ...; label2id is its inverse."""
    labels, inverse = raw.get("id2label"), raw.get("label2id")
    if labels is None:
        return []
    numbered = isinstance(labels, dict) and list(labels) == [str(index) for index in range(len(labels))]
    if not (numbered and labels and all(isinstance(label, str) for label in labels.values())):
        return [f'"id2label" = {show(labels)}: allowed is an object {{"0": name, "1": name, ...}}']
    if inverse is not None and not (isinstance(inverse, dict) and all(type(i) is int for i in inverse.values())):
        return [f'"label2id" = {show(inverse)}: allowed is an object {{name: number}}']
    return []


def _bit_faults(raw, layers):
    """Of bit_config, trained_bit_configs and exported_widths, which name the linears of this model."""
    faults = []
    if (bits := raw.get("bit_config")) is not None and (different := sorted(set(bits) ^ set(layers))):
        faults.append(f'"bit_config": {show(different[0])}: allowed are the linears of "n_layer" = {raw["n_layer"]}')
    elif bits is not None:
        try:
            resolve_bit_config(bits, layers)
        except UserError as error:
            faults += [f'"bit_config": {line.removeprefix("bit config: ")}' for line in str(error).splitlines()]
    for text in raw.get("trained_bit_configs") or ():
        if text != "checkpoint":
            try:
                resolve_bit_config(int(text) if text.isdigit() else text, layers)
            except UserError as error:
                faults.append(f'"trained_bit_configs": {show(text)}: {str(error).splitlines()[0]}')
    if (exported := raw.get("exported_widths")) is not None:
        good = list_of(one_of(*QUANTIZED_BITS))[0]
        wrong = sorted(set(exported) ^ set(layers))
        wrong += [name for name in layers if name in exported and not (good(exported[name]) and exported[name])]
        faults += [
            f'"exported_widths": {show(name)} = {show(exported.get(name))}: allowed is a list of widths, 2 to 8, '
            f'for each linear of "n_layer" = {raw["n_layer"]}'
            for name in wrong
        ]
    return faults


def config_faults(raw, own):
    """What is wrong with the keys of a config.json, as a list of sentences. own: of this repository, not stock."""
    rules = OWN_RULES if own else RULES
    faults = [f'"{key}" is missing: allowed is {rules[key][1]}' for key in REQUIRED if key not in raw]
    wrong = [key for key, (test, _) in rules.items() if key in raw and not test(raw[key])]
    faults += [f'"{key}" = {show(raw[key])}: allowed is {rules[key][1]}' for key in wrong]
    faults += _label_faults(raw)
    sound = not {*wrong, *(key for key in REQUIRED if key not in raw)}.intersection(REQUIRED)
    if sound and raw["n_embd"] % raw["n_head"]:
        faults.append(f'"n_head" = {raw["n_head"]}: allowed are divisors of "n_embd" = {raw["n_embd"]}')
    if not own:
        return faults
    if raw.get("lora_bank") and "lora_bank" not in wrong:
        faults += [
            f'"{key}" = {show(raw[key]) if key in raw else "missing"}: the adapters of "lora_bank" need '
            f"{OWN_RULES[key][1].replace('0 to', '1 to')}"
            for key in ("lora_r", "lora_alpha")
            if key not in wrong and not raw.get(key)
        ]
    if raw.get("base_model_name_or_path") and not raw.get("base_checksum"):
        faults.append('"base_checksum" is missing: a base is opened only if it is the one of the training')
    if raw.get("base_quantization") and not (raw.get("base_model_name_or_path") and raw.get("lora_bank")):
        faults.append('"base_quantization": the base needs "base_model_name_or_path" and, beside it, "lora_bank"')
    if sound and not {"bit_config", "trained_bit_configs", "exported_widths"}.intersection(wrong):
        faults += _bit_faults(raw, linear_shapes(raw))
    return faults


def config_fields(raw, own):
    """The keys of a checked config.json that a QuantGPT2Config takes."""
    fields = {key: raw[key] for key in (OWN_RULES if own else RULES) if key in raw and key != CHECKSUM}
    fields |= {key: float(fields[key]) for key in ("layer_norm_epsilon", "initializer_range") if key in fields}
    if raw.get("id2label"):
        fields.pop("num_labels", None)
        fields["id2label"] = {int(index): label for index, label in raw["id2label"].items()}
        fields["label2id"] = {label: index for index, label in fields["id2label"].items()}
    return fields


def base_faults(fields, base_fields, name, cure):
    """Where the architecture of a checkpoint differs from that of its base. name: of the base; cure: what helps."""
    defaults = GPT2Config()
    pairs = {key: [f.get(key, getattr(defaults, key)) for f in (fields, base_fields)] for key in ARCHITECTURE}
    return [
        f'"{key}" = {show(ours)}, but its base model {name} has {show(theirs)}; if it is another one, {cure}'
        for key, (ours, theirs) in pairs.items()
        if ours != theirs
    ]


# ---- tensors


def size_faults(fields, shapes):
    """Where the sizes in the checked config differ from the shapes of the tensors, {name in our classes: shape}."""
    faults = []

    def compare(tensor, axis, key, value):
        if tensor not in shapes:
            faults.append(f'no tensor "{tensor}", which "{key}" = {value} needs')
        elif len(shapes[tensor]) <= axis or shapes[tensor][axis] != value:
            faults.append(f'the weights do not fit "{key}" = {value}: "{tensor}" is {shapes[tensor]}')

    width, mlp = fields["n_embd"], "transformer.h.0.mlp.c_fc"
    inner = "n_inner", fields.get("n_inner") or 4 * width
    if not fields.get("base_model_name_or_path"):
        compare("transformer.wte.weight", 0, "vocab_size", fields["vocab_size"])
        compare("transformer.wte.weight", 1, "n_embd", width)
        compare("transformer.wpe.weight", 0, "n_positions", fields["n_positions"])
        compare(f"{mlp}.bias", 0, *inner)
    elif base := sorted(filter(is_base, shapes)):
        faults.append(f'"{base[0]}" belongs to the base, which an adapter checkpoint does not contain')
    bank = fields.get("lora_bank") or ()
    for key in bank if not fields.get("exported_widths") else ():
        compare(f"{mlp}.lora_A.{key}.weight", 1, "n_embd", width)
        compare(f"{mlp}.lora_B.{key}.weight", 0, *inner)
    adapters = {name: shape for name, shape in shapes.items() if ".lora_A." in name}
    if not {name.split(".")[-2] for name in adapters} <= set(bank):
        faults.append(f'"lora_bank" = {show(list(bank))}, but the weights have "{max(adapters)}"')
    elif wrong := [name for name, shape in adapters.items() if shape[:1] != (fields["lora_r"],)]:
        compare(wrong[0], 0, "lora_r", fields["lora_r"])
    blocks = {int(match[1]) for name in shapes if (match := re.match(r"transformer\.h\.(\d{1,9})\.", name))}
    if len(blocks) != fields["n_layer"] or max(blocks, default=-1) != fields["n_layer"] - 1:
        faults.append(f'the weights do not fit "n_layer" = {fields["n_layer"]}: they have {len(blocks)} blocks')
    return faults


def tensor_faults(fields, state):
    """What is wrong with the tensors {name: tensor}, as a list of sentences: codes first, then floats."""
    faults = []
    for linear, widths in (fields.get("exported_widths") or {}).items():
        for bits in widths:
            pair = [state.get(f"{linear}.{kind}.{bits}") for kind in ("codes", "scale")]
            faults += _code_faults(linear, linear_shapes(fields)[linear], bits, *pair)
    rotated = fields.get("quantizer") == "rotated"
    for linear, (_, n) in linear_shapes(fields).items():
        name, rotation = linear + ROTATION, state.get(linear + ROTATION)
        if rotation is not None and rotated:
            faults += rotation_faults(name, rotation, n)
        elif (rotation is not None) != rotated:
            found = "missing" if rotated else "there"
            faults.append(f'"{name}" is {found}, but "quantizer" is "{QUANTIZERS[rotated]}"')
    floats = [name for name in state if not (".codes." in name or ".scale." in name or name.endswith(ROTATION))]
    return faults + float_faults({name: state[name] for name in floats})


def float_faults(state):
    """What is wrong with the float tensors {name: tensor}, as a list of sentences."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
    faults = []
    for name, tensor in state.items():
        if tensor.dtype not in FLOAT_DTYPES:
            faults.append(f'"{name}" is {str(tensor.dtype).removeprefix("torch.")}: allowed are {names}')
        elif tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            faults.append(f'"{name}" is not finite')
    return faults


def _code_faults(name, shape, bits, codes, scale):
    """What is wrong with the codes and scales of a linear at one width, as a list of sentences.

    `quantize` gives codes within -qmax..qmax and a positive scale; a scale of 0 stands for a row of zeros.
    Args: shape: (out, in) of the linear; codes, scale: tensors, None where there is none.
    """
    qmax, packed = 2 ** (bits - 1) - 1, bits <= PACKED_BITS
    columns = (shape[1] + 1) // 2 if packed else shape[1]
    faults, dtype = [], "uint8" if packed else "int8"
    for kind, tensor, allowed in (
        ("codes", codes, f"{dtype} {(shape[0], columns)}"),
        ("scale", scale, f"float32 {(shape[0], 1)}"),
    ):
        found = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.")
        if found != allowed:
            faults.append(f'"{name}.{kind}.{bits}" is {found}: allowed is {allowed}')
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
