"""Per-layer bit-width configs: load, validate, resolve, describe. The schema is in configs/README.md.

A *resolved* config names every linear: {"transformer.h.0.attn.c_attn": {"w_bits": 4, "a_bits": 8, "kv_bits": 8}, ...};
`kv_bits` exists on `attn.c_attn` only, the layer that produces K and V. A resolved config is itself a valid config.
"""

import difflib
import os
import re
from fnmatch import fnmatchcase

from .errors import UserError
from .fast.integer import PACKED_BITS
from .quantization import FLOAT_BITS, QUANTIZED_BITS
from .user_input import read_json, refuse, show

ALLOWED_BITS = QUANTIZED_BITS + FLOAT_BITS
FIELDS = ("w_bits", "a_bits", "kv_bits")
_NUMBER = "(0|[1-9][0-9]{0,5})"
WIDTH = re.compile(_NUMBER)
SHORT_FORM = re.compile(f"W{_NUMBER}A{_NUMBER}(?:KV{_NUMBER})?")  # LLM-QAT's notation
ALLOWED_TEXT = "2 to 8, 16 or 32"
BLOCK_RANGE = re.compile(r"\{([0-9]{1,3})%-([0-9]{1,3})%\}")  # stands for the number of a block
RANGE_TEXT = "{FROM%-TO%} in place of a block's number, whole percents of the blocks, 0 <= FROM < TO <= 100"
MAX_FAULTS_SHOWN = 20
MAX_KEYS = 1000  # besides a listing of all layers: a wildcard takes about 0.1 ms
MAX_KEY_LENGTH = 100  # characters


def has_kv(layer):
    """True for the layer whose output holds K and V."""
    return layer.endswith("attn.c_attn")


def block_of(layer):
    """Number of the block that a layer is in; None outside of blocks."""
    return next((int(part) for part in layer.split(".") if part.isdecimal()), None)


def read_bit_config(path):
    """Read a JSON config file without resolving it. Raises FileNotFoundError or ValueError naming the file."""
    if not os.path.isfile(path):
        shown = path if path.isprintable() and 0 < len(path) <= MAX_KEY_LENGTH else show(path)
        expected = "a JSON file, see configs/README.md, a width as 8, or W4A8KV8"
        raise FileNotFoundError(f"{shown}: no such bit-width config (expected {expected})")
    return read_json(path)


def config_name(config):
    """How tables and files call what the user typed: a file by its stem, a width by its W-A-KV notation."""
    if WIDTH.fullmatch(config):
        return f"W{config}A{config}KV{config}"
    return config if SHORT_FORM.fullmatch(config) else os.path.splitext(os.path.basename(config))[0]


def _parse_value(value):
    """Value of one key -> ({field: bits}, [faults])."""
    if isinstance(value, str) and (match := SHORT_FORM.fullmatch(value)):
        fields = {field: int(bits) for field, bits in zip(FIELDS, match.groups(), strict=True) if bits}
    elif isinstance(value, dict):
        fields = value
    else:
        fields = dict.fromkeys(FIELDS, value)
    faults = []
    if unknown := [field for field in fields if field not in FIELDS]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        faults.append(f"unknown field {show(unknown[0])}{more}: allowed are {', '.join(FIELDS)}")
    for field in FIELDS:
        if field in fields and (type(fields[field]) is not int or fields[field] not in ALLOWED_BITS):
            named = f"{field} = " if value is not fields[field] else ""
            form = ', an object of fields, or "W4A8KV8"' if value is fields[field] else ""
            shown = show(fields[field])
            faults.append(f"{named}{shown} is not a bit-width: allowed is an int, {ALLOWED_TEXT}{form}")
    if fields == {}:
        faults.append(f"an empty object sets nothing: allowed are {', '.join(FIELDS)}")
    return fields, list(dict.fromkeys(faults))


def _block_range(key):
    """(percent from, percent to) of a key with a block range; None without a valid one."""
    match = BLOCK_RANGE.search(key)
    low, high = map(int, match.groups()) if match else (0, 0)
    return (low, high) if low < high <= 100 else None


def _tries_range(key):
    """Whether a key has a sign of a block range, which no layer's name has; [0%-33%] would be a set of characters."""
    return "{" in key or "%" in key


def _matching(key, layers):
    """The layers that a wildcard matches; {0%-33%} in it stands for the blocks of that part, one at least."""
    if not (percents := _block_range(key)):
        return [] if _tries_range(key) else [layer for layer in layers if fnmatchcase(layer, key)]
    numbers = {layer: number for layer in layers if (number := block_of(layer)) is not None}
    blocks = 1 + max(numbers.values(), default=-1)
    low, high = ((2 * blocks * percent + 99) // 200 for percent in percents)  # rounded, half down
    low = min(low, blocks - 1)
    chosen = range(low, max(high, low + 1))
    key = BLOCK_RANGE.sub("{}", key, count=1)
    return [n for n, b in numbers.items() if b in chosen and fnmatchcase(n.replace(f".{b}.", ".{}.", 1), key)]


def _no_match(key, layers):
    """The fault of a key that matches no layer."""
    if not isinstance(key, str):
        return f"{show(key)} ({type(key).__name__}): keys are layer names or wildcards"
    if len(key) > MAX_KEY_LENGTH:
        return f"{show(key)} matches no layer: longer than {MAX_KEY_LENGTH} characters"
    if _tries_range(key) and not _block_range(key):
        return f"{show(key)} matches no layer: allowed is {RANGE_TEXT}"
    near = difflib.get_close_matches(key, layers, n=1, cutoff=0.0)
    blocks = sorted({block_of(layer) for layer in layers} - {None})
    span = f" (the model has blocks {blocks[0]}-{blocks[-1]})" if blocks else ""
    hint = f"; did you mean {show(near[0])}?" if near else ""
    return f"{show(key)} matches no layer{span}{hint}"


def resolve_bit_config(config, layers):
    """{layer: {"w_bits", "a_bits" and, on attn.c_attn, "kv_bits"}} for all layers.

    Args:
        config: path of a JSON file, a config as a dict, an int (uniform; also as text), or a short form as "W4A8KV8".
        layers: names of the quantizable linears, in model order.
    Raises: FileNotFoundError; ValueError: all faults at once (20 in full), each with file, key, value and what is
        allowed.
    """
    source = "bit config"
    if isinstance(config, str) and WIDTH.fullmatch(config):
        config = int(config)
    if isinstance(config, os.PathLike) or (isinstance(config, str) and not SHORT_FORM.fullmatch(config)):
        source = os.fsdecode(config)
        config = read_bit_config(source)
    elif not isinstance(config, dict):
        config = {"default": config}
    if not isinstance(config, dict):
        raise UserError(f"{source}: expected a JSON object of layer names and bits, found {type(config).__name__}")

    layers = list(layers)
    resolved = {layer: {} for layer in layers}
    faults = []
    if not isinstance(config.get("description", ""), str):
        faults.append(f'"description" = {show(config["description"])}: allowed is a string')
    # The default goes first wherever it stands in the file: everything else overrides it.
    keys = ["default"] * ("default" in config) + [key for key in config if key not in ("default", "description")]
    if len(keys) > (most := len(layers) + MAX_KEYS):
        faults.append(f"found {len(keys)} keys; allowed are {most} at most (the first {most} are checked)")
    for key in keys[:most]:
        if key == "default":
            matched = layers
        elif not isinstance(key, str) or len(key) > MAX_KEY_LENGTH:
            matched = []
        else:  # the plain name first: a resolved config, set before every forward in joint training, has only those
            matched = [key] if key in resolved else _matching(key, layers)
        if not matched:
            faults.append(_no_match(key, layers) if len(faults) < MAX_FAULTS_SHOWN else "")
            continue
        fields, value_faults = _parse_value(config[key])
        faults += [f"{show(key)}: {fault}" for fault in value_faults]
        if value_faults:
            continue
        if "kv_bits" in fields and type(config[key]) is not int and not any(map(has_kv, matched)):
            faults.append(f"{show(key)}: kv_bits on a layer without K and V; only attn.c_attn has them")
        for layer in matched:
            resolved[layer].update({f: b for f, b in fields.items() if f != "kv_bits" or has_kv(layer)})
    for field in FIELDS if not faults else ():
        owners = [name for name in layers if field != "kv_bits" or has_kv(name)]
        if bare := [name for name in owners if field not in resolved[name]]:
            others = f" and {len(bare) - 1} more" if len(bare) > 1 else ""
            faults.append(f'{show(bare[0])}{others}: nothing sets {field}; name the layer or give a "default"')
    refuse(source, faults, MAX_FAULTS_SHOWN)
    return {layer: {f: bits[f] for f in FIELDS if f in bits} for layer, bits in resolved.items()}


def stored_bytes(w_bits, out, inp):
    """Bytes of a linear weight (out, inp) as it is kept: up to 4 bits two codes a byte, above that one, and a float32
    scale per output channel; plain float32 at 16 and 32 bits."""
    if w_bits in FLOAT_BITS:
        return 4 * out * inp
    return out * ((inp + 1) // 2 if w_bits <= PACKED_BITS else inp) + 4 * out


def describe_bit_config(resolved, shapes):
    """Size and cost of an assignment: a resolved config, of layers with `shapes` {layer: (out, in)}.

    Returns:
        average_w_bits: mean over weights; weight_bytes: what is stored of the linear weights (`stored_bytes`);
        bitops_per_token: sum of MACs x w_bits x a_bits over the linears (32 where a tensor stays float32);
        layers_per_w_bits: {bits: number of layers}.
    """
    weights = {layer: out * inp for layer, (out, inp) in shapes.items()}
    bits_total = sum(weights[layer] * bits["w_bits"] for layer, bits in resolved.items())
    widths = sorted(bits["w_bits"] for bits in resolved.values())
    return {
        "average_w_bits": bits_total / sum(weights.values()),
        "weight_bytes": sum(stored_bytes(bits["w_bits"], *shapes[layer]) for layer, bits in resolved.items()),
        "bitops_per_token": sum(weights[layer] * b["w_bits"] * b["a_bits"] for layer, b in resolved.items()),
        "layers_per_w_bits": {str(width): widths.count(width) for width in dict.fromkeys(widths)},
    }


def short_name(resolved):
    """W-A-KV notation of a uniform config ("W8A8KV8"), else "mixed"."""
    values = {field: {bits[field] for bits in resolved.values() if field in bits} for field in FIELDS}
    if any(len(found) > 1 for found in values.values()):
        return "mixed"
    return "".join(f"{field.removesuffix('_bits').upper()}{[*found][0]}" for field, found in values.items() if found)
