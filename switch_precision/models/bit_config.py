# Copied from base_model/models/bit_config.py
"""Per-layer bit-width configs: load, validate, resolve, describe. The schema is in configs/README.md.

A *resolved* config names every linear: {"transformer.h.0.attn.c_attn": {"w_bits": 4, "a_bits": 8, "kv_bits": 8}, ...};
`kv_bits` exists on `attn.c_attn` only, the layer that produces K and V. A resolved config is itself a valid config.
"""

import difflib
import json
import os
import re
from fnmatch import fnmatchcase

from .errors import UserError
from .integer import PACKED_BITS
from .quantization import FLOAT_BITS, QUANTIZED_BITS

ALLOWED_BITS = QUANTIZED_BITS + FLOAT_BITS
FIELDS = ("w_bits", "a_bits", "kv_bits")
SHORT_FORM = re.compile(r"W(\d+)A(\d+)(?:KV(\d+))?")  # LLM-QAT's notation
ALLOWED_TEXT = "2 to 8, 16 or 32"


def has_kv(layer):
    """True for the layer whose output holds K and V."""
    return layer.endswith("attn.c_attn")


def read_bit_config(path):
    """Read a JSON config file without resolving it. Raises FileNotFoundError or ValueError naming the file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such bit-width config (expected a JSON file, see configs/README.md)")

    def no_duplicates(pairs):
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        if repeated:
            raise UserError(f"{path}: duplicate key {', '.join(map(json.dumps, repeated))}: keep one of them")
        return dict(pairs)

    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file, object_pairs_hook=no_duplicates)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None


def _parse_value(value):
    """Value of one key -> ({field: bits}, [faults])."""
    if isinstance(value, str) and (match := SHORT_FORM.fullmatch(value)):
        fields = {field: int(bits) for field, bits in zip(FIELDS, match.groups(), strict=True) if bits}
    elif isinstance(value, dict):
        fields = value
    else:
        fields = dict.fromkeys(FIELDS, value)
    faults = []
    for field, bits in fields.items():
        if field not in FIELDS:
            faults.append(f"unknown field {json.dumps(field)}: allowed are {', '.join(FIELDS)}")
        elif type(bits) is not int or bits not in ALLOWED_BITS:
            named = f"{field} = " if value is not bits else ""
            form = ', an object of fields, or "W4A8KV8"' if value is bits else ""
            faults.append(f"{named}{json.dumps(bits)} is not a bit-width: allowed is an int, {ALLOWED_TEXT}{form}")
    if fields == {}:
        faults.append(f"an empty object sets nothing: allowed are {', '.join(FIELDS)}")
    return fields, list(dict.fromkeys(faults))


def resolve_bit_config(config, layers):
    """Give every layer its bits.

    Args:
        config: path of a JSON file, a config as a dict, an int (uniform), or a short form such as "W4A8KV8".
        layers: names of the quantizable linears, in model order.
    Returns:
        {layer: {"w_bits", "a_bits" and, on attn.c_attn, "kv_bits"}} for all layers.
    Raises:
        FileNotFoundError: no such file.
        ValueError: all faults of the config at once, each with file, key, value and what is allowed.
    """
    source = "bit config"
    if isinstance(config, os.PathLike) or (isinstance(config, str) and not SHORT_FORM.fullmatch(config)):
        source, config = os.fspath(config), read_bit_config(config)
    elif not isinstance(config, dict):
        config = {"default": config}
    if not isinstance(config, dict):
        raise UserError(f"{source}: expected a JSON object of layer names and bits, found {type(config).__name__}")

    layers = list(layers)
    resolved = {layer: {} for layer in layers}
    faults = []
    if not isinstance(config.get("description", ""), str):
        faults.append(f'"description" = {json.dumps(config["description"])}: allowed is a string')
    # The default goes first wherever it stands in the file: everything else overrides it.
    keys = ["default"] * ("default" in config) + [key for key in config if key not in ("default", "description")]
    for key in keys:
        if key == "default":
            matched = layers
        else:  # the plain name first: a resolved config, set before every forward in joint training, has only those
            matched = [key] if key in resolved else [layer for layer in layers if fnmatchcase(layer, key)]
        if not matched:
            near = difflib.get_close_matches(key, layers, n=1, cutoff=0.0)
            blocks = sorted({int(part) for layer in layers for part in layer.split(".") if part.isdigit()})
            span = f" (the model has blocks {blocks[0]}-{blocks[-1]})" if blocks else ""
            hint = f"; did you mean {json.dumps(near[0])}?" if near else ""
            faults.append(f"{json.dumps(key)} matches no layer{span}{hint}")
            continue
        fields, value_faults = _parse_value(config[key])
        faults += [f"{json.dumps(key)}: {fault}" for fault in value_faults]
        if value_faults:
            continue
        if "kv_bits" in fields and type(config[key]) is not int and not any(map(has_kv, matched)):
            faults.append(f"{json.dumps(key)}: kv_bits on a layer without K and V; only attn.c_attn has them")
        for layer in matched:
            resolved[layer].update({f: b for f, b in fields.items() if f != "kv_bits" or has_kv(layer)})
    if not faults:
        for field in FIELDS:
            owners = [name for name in layers if field != "kv_bits" or has_kv(name)]
            bare = [name for name in owners if field not in resolved[name]]
            if bare:
                others = f" and {len(bare) - 1} more" if len(bare) > 1 else ""
                cure = 'name the layer or give a "default"'
                faults.append(f"{json.dumps(bare[0])}{others}: nothing sets {field}; {cure}")
    if faults:
        raise UserError("\n".join(f"{source}: {fault}" for fault in faults))
    return {layer: {f: bits[f] for f in FIELDS if f in bits} for layer, bits in resolved.items()}


def stored_bytes(w_bits, out, inp):
    """Bytes of a linear weight (out, inp) as it is kept: up to 4 bits two codes a byte, above that one, and a float32
    scale per output channel; plain float32 at 16 and 32 bits."""
    if w_bits in FLOAT_BITS:
        return 4 * out * inp
    return out * ((inp + 1) // 2 if w_bits <= PACKED_BITS else inp) + 4 * out


def describe_bit_config(resolved, shapes):
    """Size and cost of an assignment.

    Args:
        resolved: resolved config; shapes: {layer: (out, in)}.
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
    tags = dict(zip(FIELDS, ("W", "A", "KV"), strict=True))
    return "".join(tags[field] + str(*found) for field, found in values.items() if found)
