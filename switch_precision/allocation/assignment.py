"""Choosing a width for every linear under a budget: exact for additive costs, with the moves of a local search.

A choice is a tuple with the index of an option per linear; `cost` and `resource` are (linears, options) arrays, and a
choice fits when the sum of its resources is at most the budget. Resources are integers (bits, bytes, or MACs x bits x
bits), so that no rounding of the solver can exceed the budget. `Problem` makes these arrays from a sensitivity record.
"""

import os

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import kron

from common.loading import resolve_configs
from common.record import load_state
from models.bit_config import stored_bytes
from models.errors import UserError

BUDGETS = ("average_bits", "weight_mb", "bitops")


def resources(kind, options, shapes):
    """Integer resource of every option, and how many of them one unit of the budget is.

    Args: kind: one of BUDGETS. options: {linear: [its entry in a resolved config, ...]}; option 0 is the reference.
        shapes: {linear: (out, in)}.
    Returns: (linears, options) int64, and the factor: average_bits: weights; weight_mb: 1e6 bytes, as
        stored; bitops: the reference's MACs x w_bits x a_bits.
    """

    def resource(bits, out, inp):
        if kind == "weight_mb":
            return stored_bytes(bits["w_bits"], out, inp)
        return out * inp * bits["w_bits"] * (bits["a_bits"] if kind == "bitops" else 1)

    rows = [[resource(bits, *shapes[layer]) for bits in entries] for layer, entries in options.items()]
    table = np.array(rows, dtype=np.int64)
    weights = sum(shapes[layer][0] * shapes[layer][1] for layer in options)
    return table, {"average_bits": weights, "weight_mb": 1e6, "bitops": table[:, 0].sum()}[kind]


def read_sensitivity(path):
    """The record of sensitivity.py; refused when it is missing, damaged or something else."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--sensitivity_file {path}: no such file; sweep.sh (sensitivity.py) makes it")
    try:
        record = load_state(path)
        record["identity"]["model_sha256"], record["flips"]
    except (UserError, KeyError, TypeError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise UserError(f"--sensitivity_file {path}: not a record of sensitivity.py ({reason})") from None
    return record


def refuse_other_checkpoint(path, record, checksum):
    """Refuse a record of read_sensitivity that is of other weights than those with this checksum."""
    found = record["identity"]["model_sha256"]
    if found != checksum:
        swept = f"--sensitivity_file {path}: swept a checkpoint with checksum {found[:16]}..."
        raise UserError(f"{swept}, this one has {checksum[:16]}...: run sweep.sh on it")


class Problem:
    """Options, costs and shapes of every linear: the sweep's reference (option 0) and its low configs."""

    def __init__(self, sensitivity, model, bit_widths, score):
        identity, flips = sensitivity["identity"], sensitivity["flips"]
        swept = {sensitivity["bit_config"]["name"]: identity["reference_config"], **identity["low_bits"]}
        if bit_widths:
            asked = resolve_configs(model, bit_widths)
            if missing := [name for name, resolved in asked.items() if resolved not in swept.values()]:
                has = f"--bit_widths {' '.join(missing)}: the sensitivity file has only {', '.join(swept)}"
                raise UserError(f"{has}; sweep them with sensitivity.py --low_bits")
            self.names = [name for name, resolved in swept.items() if resolved in asked.values()]
            if len(self.names) < 2 or identity["reference_config"] not in asked.values():
                raise UserError(f"--bit_widths: allowed are {next(iter(swept))} (the reference) and one more at least")
        else:
            self.names = list(swept)
        if lacking := [key for key, flip in flips.items() if flip["kind"] == "layer" and score not in flip]:
            raise UserError(f"--score {score}: {lacking[0]!r} has none; sweep with --num_gradient_batches 1 or more")
        self.configs, self.shapes = [swept[name] for name in self.names], model.layer_shapes()
        self.options = {layer: [config[layer] for config in self.configs] for layer in self.shapes}
        costs = [[flips[f"{low}: {layer}"][score] for low in self.names[1:]] for layer in self.shapes]
        self.cost = np.hstack([np.zeros((len(costs), 1)), np.array(costs, dtype=float)])

    def resolved(self, choice):
        """The resolved config of a choice."""
        return {layer: entries[index] for (layer, entries), index in zip(self.options.items(), choice, strict=True)}

    def budget(self, kind, value):
        """(resource table, integer budget); a budget below the least assignment is refused."""
        table, unit = resources(kind, self.options, self.shapes)
        least, budget = table.min(1).sum(), int(np.floor(value * unit * (1 + 1e-12)))
        if least > budget:
            names = f"--{kind} {value:g}: below what {', '.join(self.names)} can give"
            raise UserError(f"{names}; allowed: {least / unit:.6g} or more")
        return table, budget


def total(table, choice):
    """Sum of a choice's entries."""
    return table[np.arange(len(table)), list(choice)].sum()


def solve(cost, resource, budget):
    """The choice of least total cost within the budget (a multiple-choice knapsack, solved exactly); UserError if the
    least resources exceed it."""
    least = int(resource.min(1).sum())
    if least > budget:
        raise UserError(f"budget {budget} is below the {least} of the least option everywhere")
    linears, options = cost.shape
    unit = np.gcd.reduce(resource.ravel())
    scale = np.abs(cost).max() or 1.0  # the solver's tolerances are absolute
    one_each = LinearConstraint(kron(np.eye(linears), np.ones((1, options))), 1, 1)
    # integers in small units: half a unit above the floor leaves no room for the solver's feasibility tolerance
    within = LinearConstraint((resource // unit).ravel()[None].astype(float), -np.inf, budget // unit + 0.5)
    found = milp(
        cost.ravel() / scale,
        constraints=[one_each, within],
        integrality=np.ones(cost.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise UserError(f"the solver found no assignment: {found.message}")
    return tuple(found.x.reshape(cost.shape).argmax(1).tolist())


def random_choice(resource, budget, rng):
    """A random choice that fits and leaves no room: each linear in random order takes the most that still fits."""
    choice = resource.argmin(1)
    left = budget - total(resource, choice)
    for layer in rng.permutation(len(resource)):
        extra = resource[layer] - resource[layer, choice[layer]]
        option = np.where(extra <= left, extra, -1).argmax()
        left -= extra[option]
        choice[layer] = option
    return tuple(choice.tolist())


def moves(choice, cost, resource, budget):
    """Neighbours of a choice within the budget, best predicted first.

    One linear goes up to a larger option; where the budget then lacks room, one other goes down, or several in the
    order of predicted cost per resource set free.
    """
    used, found = total(resource, choice), {}
    downs = [
        (layer, option, resource[layer, now] - resource[layer, option], cost[layer, option] - cost[layer, now])
        for layer, now in enumerate(choice)
        for option in range(resource.shape[1])
        if resource[layer, option] < resource[layer, now]
    ]

    def keep(changes):
        other = list(choice)
        for layer, option in changes:
            other[layer] = option
        found[tuple(other)] = total(cost, other)

    for up, now in enumerate(choice):
        for option in range(resource.shape[1]):
            extra = resource[up, option] - resource[up, now]
            if extra <= 0:
                continue
            lacking = used + extra - budget
            if lacking <= 0:
                keep([(up, option)])
                continue
            changes, freed, taken = [(up, option)], 0, {up}
            for layer, lower, saved, _ in sorted(downs, key=lambda down: down[3] / down[2]):
                if layer != up and saved >= lacking:
                    keep([(up, option), (layer, lower)])
                if layer not in taken and freed < lacking:
                    changes.append((layer, lower))
                    taken.add(layer)
                    freed += saved
            if freed >= lacking:
                keep(changes)
    return sorted(found, key=found.get)


def refine(choice, cost, resource, budget, measure, rounds, candidates):
    """Local search by measurement; never worse than where it began, by the same measure.

    Args: measure: (base choice, choices) -> [measured value of the base, of each choice], lower is better.
        rounds: at most so many; candidates: choices measured in a round, those predicted best among the untried.
    Returns: (choice, its value, the value at the start, number of measured choices).
    """
    value = start = measure(choice, [])[0]
    tried = {choice}
    for _ in range(rounds):
        untried = [other for other in moves(choice, cost, resource, budget) if other not in tried][:candidates]
        if not untried:
            break
        tried.update(untried)
        values = measure(choice, untried)[1:]
        best = int(np.argmin(values))
        if values[best] < value:
            choice, value = untried[best], values[best]
    return choice, value, start, len(tried)
