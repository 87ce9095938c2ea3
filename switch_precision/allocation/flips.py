"""The flips of a sweep: which linears go to low bits, and with which operands: W, A and K/V together, or one alone."""

from models.bit_config import FIELDS, block_of

TYPES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
OPERANDS = ("w", "a", "kv")


def fields_of(operand, bits):
    """The fields of a linear's entry `bits` that an operand ("w", "a", "kv", or "together": all) sets."""
    return [field for field in FIELDS if field in bits and operand in ("together", field.removesuffix("_bits"))]


def lowered(reference, lows, operands):
    """{(low, operand): resolved config}: the reference with that operand of all linears as in that low config.

    One operand alone is left out where this changes nothing, or what an earlier low config changes too.
    """
    found = {}
    for low, config in lows.items():
        for operand in operands:
            changed = {
                layer: bits | {field: config[layer][field] for field in fields_of(operand, bits)}
                for layer, bits in reference.items()
            }
            if operand == "together" or changed not in (reference, *found.values()):
                found[low, operand] = changed
    return found


def title(low, operand):
    """How tables and keys call a low config with an operand: "W4A4KV4", or "W4A4KV4 w" for its weights alone."""
    return low if operand == "together" else f"{low} {operand}"


def make_flips(reference, low_configs):
    """All flips as {key: {"low_bits", "operand", "kind", "name", "layers"}}; low_configs: of `lowered`."""
    layers = list(reference)
    groups = {("layer", layer): [layer] for layer in layers}
    for block in sorted({block_of(layer) for layer in layers}):
        groups["block", f"block {block}"] = [layer for layer in layers if block_of(layer) == block]
    for kind in (*TYPES, "attn", "mlp"):
        prefix = f".{kind}" if "." in kind else f".{kind}."
        groups["type", kind] = [layer for layer in layers if prefix in layer]
    groups["all", "all"] = layers
    flips = {}
    for low, operand in low_configs:
        for (kind, name), members in groups.items():
            members = [layer for layer in members if fields_of(operand, reference[layer])]
            # K/V belong to one linear per block: a block or a type would say again what a layer or all says
            if members and (operand != "kv" or kind in ("layer", "all")):
                flip = {"low_bits": low, "operand": operand, "kind": kind, "name": name, "layers": members}
                flips[f"{title(low, operand)}: {name}"] = flip
    return flips
