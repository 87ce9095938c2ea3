"""What a search chooses among: options, costs and resources of every linear, from a sensitivity record.

A sweep of W, A and K/V together gives every linear its swept configs as options. A sweep of single operands gives it
every combination of the swept `w_bits`, `a_bits` and `kv_bits`, at the sum of the costs of their flips: as one option
per combination, also a product w_bits x a_bits (BitOPs) is linear in the choice, and the integer program stays exact.
"""

import itertools
import os

import numpy as np

from allocation.flips import fields_of
from common.loading import resolve_configs
from common.record import load_state
from models.bit_config import FIELDS, stored_bytes
from models.errors import UserError

BUDGETS = {  # kind of budget: the operands of which one at least must have been swept
    "average_bits": ("together", "w"),
    "weight_mb": ("together", "w"),
    "bitops": ("together", "w", "a"),
    "average_a_bits": ("a",),
    "average_kv_bits": ("kv",),
}
OF_WEIGHTS = tuple(BUDGETS)[:3]  # one of these at most
AVERAGED = {"average_bits": "w_bits", "average_a_bits": "a_bits", "average_kv_bits": "kv_bits"}


def amounts(shape):
    """What the averages over W, A and K/V of a linear (out, in) count: weights; MACs per token; values of K and V.

    Inputs count by the MACs they enter, not by features: they are not kept, and their bits cost in the products. So W
    and A have the same weights, and uniform bits mean the same share of BitOPs in both.
    """
    out, inp = shape
    return {"w_bits": out * inp, "a_bits": out * inp, "kv_bits": 2 * out // 3}


def averages(resolved, shapes):
    """{"average_w_bits", "average_a_bits", "average_kv_bits"} of a resolved config, over `amounts`."""
    found = {}
    for field in FIELDS:
        pairs = [(bits[field], amounts(shapes[layer])[field]) for layer, bits in resolved.items() if field in bits]
        found[f"average_{field}"] = sum(bits * size for bits, size in pairs) / sum(size for _, size in pairs)
    return found


def resource(kind, bits, shape):
    """Integer resource of one linear at `bits`: bits, bytes as stored, or MACs x w_bits x a_bits."""
    if kind == "weight_mb":
        return stored_bytes(bits["w_bits"], *shape)
    if kind == "bitops":
        return shape[0] * shape[1] * bits["w_bits"] * bits["a_bits"]
    return amounts(shape)[AVERAGED[kind]] * bits.get(AVERAGED[kind], 0)


def unit_of(kind, reference, shapes):
    """How many resources one unit of a budget is. reference: the config whose BitOPs are 1."""
    if kind == "weight_mb":
        return 1e6
    if kind == "bitops":
        return sum(resource(kind, bits, shapes[layer]) for layer, bits in reference.items())
    field = AVERAGED[kind]
    return sum(amounts(shapes[layer])[field] for layer, bits in reference.items() if field in bits)


def read_sensitivity(path):
    """The record of sensitivity.py; refused when it is missing, damaged or something else."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--sensitivity_file {path}: no such file; sweep.sh (sensitivity.py) makes it")
    try:
        record = load_state(path)
        record["flips"], [record["identity"][key] for key in ("model_sha256", "operands", "quantizer")]
    except (UserError, KeyError, TypeError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise UserError(f"--sensitivity_file {path}: not a record of sensitivity.py ({reason})") from None
    return record


def refuse_other_checkpoint(path, record, model, checksum):
    """Refuse a record of read_sensitivity that is of another quantizer, or of other weights, than this model's."""
    found, other = record["identity"]["model_sha256"], record["identity"]["quantizer"]
    if other != model.config.quantizer:
        swept = f"--sensitivity_file {path}: swept with --quantizer {other}"
        raise UserError(f"{swept}, this search has {model.config.quantizer}: run sweep.sh with it")
    if found != checksum:
        swept = f"--sensitivity_file {path}: swept a checkpoint with checksum {found[:16]}..."
        raise UserError(f"{swept}, this one has {checksum[:16]}...: run sweep.sh on it")


class Problem:
    """`options` {linear: [its entries in a resolved config]} and `cost` [(options,) per linear], most bits first."""

    def __init__(self, sensitivity, model, bit_widths, score):
        identity, flips = sensitivity["identity"], sensitivity["flips"]
        self.reference, self.operands = identity["reference_config"], identity["operands"]
        swept = {sensitivity["bit_config"]["name"]: self.reference, **identity["low_bits"]}
        if bit_widths:
            asked = resolve_configs(model, bit_widths)
            if missing := [name for name, resolved in asked.items() if resolved not in swept.values()]:
                has = f"--bit_widths {' '.join(missing)}: the sensitivity file has only {', '.join(swept)}"
                raise UserError(f"{has}; sweep them with sensitivity.py --low_bits")
            self.names = [name for name, resolved in swept.items() if resolved in asked.values()]
            if len(self.names) < 2 or self.reference not in asked.values():
                raise UserError(f"--bit_widths: allowed are {next(iter(swept))} (the reference) and one more at least")
        else:
            self.names = list(swept)
        if lacking := [key for key, flip in flips.items() if flip["kind"] == "layer" and score not in flip]:
            raise UserError(f"--score {score}: {lacking[0]!r} has none; sweep with --num_gradient_batches 1 or more")
        self.configs, self.shapes = [swept[name] for name in self.names], model.layer_shapes()
        self.options, self.cost = {}, []
        for layer in self.shapes:
            mine = [flip for flip in flips.values() if flip["kind"] == "layer" and flip["name"] == layer]
            sides = [self._side(layer, operand, mine, swept, score) for operand in self.operands]
            pairs = [
                (self.reference[layer] | {field: bits for change, _ in parts for field, bits in change.items()},
                 sum(cost for _, cost in parts))
                for parts in itertools.product(*sides)
            ]  # fmt: skip
            pairs.sort(key=lambda pair: -sum(pair[0].values()))  # of equal resources, the first has the most bits
            self.options[layer] = [entry for entry, _ in pairs]
            self.cost.append(np.array([cost for _, cost in pairs], dtype=float))

    def _side(self, layer, operand, flips, swept, score):
        """[({field: bits} of an operand, cost of its flip)] of a linear, the reference's first."""
        own = self.reference[layer]
        fields = fields_of(operand, own)
        allowed, costs = [[config[layer][field] for field in fields] for config in self.configs], {}
        for flip in flips:
            bits = [swept[flip["low_bits"]][layer][field] for field in fields]
            if flip["operand"] == operand and bits in allowed and bits != [own[field] for field in fields]:
                costs.setdefault(tuple(bits), flip[score])
        return [({}, 0.0), *((dict(zip(fields, bits, strict=True)), cost) for bits, cost in costs.items())]

    def resolved(self, choice):
        """The resolved config of a choice."""
        return {layer: entries[index] for (layer, entries), index in zip(self.options.items(), choice, strict=True)}

    def bounds(self, kind):
        """Least and most that assignments can have of a kind of budget, in its unit."""
        rows = [[resource(kind, bits, self.shapes[layer]) for bits in own] for layer, own in self.options.items()]
        unit = unit_of(kind, self.reference, self.shapes)
        return sum(map(min, rows)) / unit, sum(map(max, rows)) / unit

    def limits(self, budget):
        """(resources [(options, kinds) int64 per linear], (kinds,) int64 limits) of a budget {kind: value}.

        Raises: UserError for an operand that was not swept, and for a value below the least assignment.
        """
        for kind, value in budget.items():
            if not set(BUDGETS[kind]) & set(self.operands):
                has, wanted = " ".join(self.operands), " or ".join(BUDGETS[kind])
                raise UserError(
                    f"--{kind} {value:g}: the sensitivity file has flips of {has}, and this budget needs flips of "
                    f"{wanted}; sweep with sensitivity.py --operands w a kv"
                )
            if value * (1 + 1e-12) < (least := self.bounds(kind)[0]):
                names = f"--{kind} {value:g}: below what {', '.join(self.names)} can give"
                raise UserError(f"{names}; allowed: {least:.6g} or more")
        table = [
            np.array([[resource(kind, bits, self.shapes[layer]) for kind in budget] for bits in entries])
            for layer, entries in self.options.items()
        ]
        most = [value * unit_of(kind, self.reference, self.shapes) * (1 + 1e-12) for kind, value in budget.items()]
        return table, np.floor(most).astype(np.int64)
