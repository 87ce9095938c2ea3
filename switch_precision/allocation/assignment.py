"""Choosing an option for every linear under limits: exact for additive costs, with the moves of a local search.

A choice is a tuple with the index of an option per linear. `cost` has an array (options,) and `resource` an array
(options, kinds) per linear; a choice fits when the sums of its resources are at most the `limit` (kinds,). Resources
are integers, so that no rounding of the solver can exceed a limit.
"""

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag

from models.errors import UserError


def total(table, choice):
    """Sum of a choice's entries."""
    return sum(row[index] for row, index in zip(table, choice, strict=True))


def solve(cost, resource, limit):
    """The choice of least total cost within the limits (a multiple-choice knapsack, solved exactly); UserError if
    there is none."""
    flat, amounts = np.concatenate(cost), np.concatenate(resource)
    unit = np.gcd.reduce(amounts, axis=0)
    scale = np.abs(flat).max() or 1.0  # the solver's tolerances are absolute
    one_each = LinearConstraint(block_diag([np.ones((1, len(row))) for row in cost]), 1, 1)
    # integers in small units: half a unit above the floor leaves no room for the solver's feasibility tolerance
    within = LinearConstraint((amounts // unit).T.astype(float), -np.inf, np.asarray(limit) // unit + 0.5)
    found = milp(
        flat / scale,
        constraints=[one_each, within],
        integrality=np.ones(flat.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise UserError(f"the solver found no assignment: {found.message}")
    ends = np.cumsum([len(row) for row in cost])[:-1]
    return tuple(int(part.argmax()) for part in np.split(found.x, ends))


def least(resource, limit):
    """The choice with the least resources (relative to the limits)."""
    return tuple(int((rows / limit).sum(1).argmin()) for rows in resource)


def fill(choice, resource, limit, order):
    """A choice made larger until no linear has room: each of `order` takes the most that fits, giving nothing up."""
    choice, left = list(choice), limit - total(resource, choice)
    for linear in order:
        extra = resource[linear] - resource[linear][choice[linear]]
        fits = (extra >= 0).all(1) & (extra <= left).all(1)
        choice[linear] = int(np.where(fits, (extra / limit).sum(1), -1).argmax())
        left = left - extra[choice[linear]]
    return tuple(choice)


def random_choice(resource, limit, rng):
    """A random choice that fits and leaves no room: each linear, in random order, takes any of the options that fit
    (of options with equal resources the first), and then the most that fits."""
    choice = list(least(resource, limit))
    left = limit - total(resource, choice)
    for linear in rng.permutation(len(resource)):
        extra = resource[linear] - resource[linear][choice[linear]]
        distinct = np.unique(extra, axis=0, return_index=True)[1]
        choice[linear] = int(rng.choice([option for option in distinct if (extra[option] <= left).all()]))
        left = left - extra[choice[linear]]
    return fill(choice, resource, limit, rng.permutation(len(resource)))


def moves(choice, cost, resource, limit):
    """Neighbours of a choice within the limits, best predicted first.

    One linear goes to an option that takes more of something; where room then lacks, one other goes to an option that
    takes less of that, or several do, in the order of predicted cost per resource set free.
    """
    now = np.array(choice)
    changes = np.array([(linear, option) for linear, own in enumerate(cost) for option in range(len(own))])
    extra = np.concatenate([own - own[at] for own, at in zip(resource, choice, strict=True)])
    gain = np.concatenate([own - own[at] for own, at in zip(cost, choice, strict=True)])
    left, value, found = limit - total(resource, choice), total(cost, choice), {}
    downs = np.flatnonzero((extra < 0).any(1))

    def keep(*made):
        other = now.copy()
        for at in made:
            other[changes[at][0]] = changes[at][1]
        found[tuple(other.tolist())] = value + gain[list(made)].sum()

    for up in np.flatnonzero((extra > 0).any(1)):
        lacks = extra[up] > left
        if not lacks.any():
            keep(up)
            continue
        # what each change down sets free of what lacks, as a share of the limits
        freed = -(extra[downs][:, lacks] / np.asarray(limit)[lacks]).sum(1)
        useful = (freed > 0) & (changes[downs, 0] != changes[up, 0])
        ordered = downs[useful][np.argsort(gain[downs][useful] / freed[useful], kind="stable")]
        for down in ordered[(extra[up] + extra[ordered] <= left).all(1)]:
            keep(up, down)
        several, room = {}, left - extra[up]
        for down in ordered:
            if (room < 0).any() and changes[down, 0] not in several:
                several[changes[down, 0]] = down
                room = room - extra[down]
        if (room >= 0).all():
            keep(up, *several.values())
    return sorted(found, key=found.get)


def refine(choice, cost, resource, limit, measure, rounds, candidates):
    """Local search by measurement; never worse than where it began, by the same measure.

    Args: measure: (base choice, choices) -> [measured value of the base, of each choice], lower is better.
        rounds: at most so many; candidates: choices measured in a round, those predicted best among the untried.
    Returns: (choice, its value, the value at the start, number of measured choices).
    """
    value = start = measure(choice, [])[0]
    tried = {choice}
    for _ in range(rounds):
        untried = [other for other in moves(choice, cost, resource, limit) if other not in tried][:candidates]
        if not untried:
            break
        tried.update(untried)
        values = measure(choice, untried)[1:]
        best = int(np.argmin(values))
        if values[best] < value:
            choice, value = untried[best], values[best]
    return choice, value, start, len(tried)
