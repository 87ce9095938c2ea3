"""switch_precision's allocation: flips of operands, the integer program against brute force, moves, baselines."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import ROOT, experiment

with experiment("switch_precision"):
    from allocation import assignment, baselines
    from allocation.flips import lowered, make_flips
    from allocation.problem import BUDGETS, Problem, averages
    from models.bit_config import describe_bit_config, resolve_bit_config

SHAPES = {"attn.c_attn": (24, 8), "attn.c_proj": (8, 8), "mlp.c_fc": (32, 8), "mlp.c_proj": (8, 32)}


def shapes_of(blocks):
    return {f"transformer.h.{block}.{name}": shape for block in range(blocks) for name, shape in SHAPES.items()}


def made_problem(blocks, operands, lows=("4",), seed=0, layers=None, bit_widths=None):
    """(Problem of a made-up sweep from 8 bits, its flips); `layers`: only those that end so."""
    shapes = {name: shape for name, shape in shapes_of(blocks).items() if name.endswith(layers or "")}
    reference, rng = resolve_bit_config(8, shapes), np.random.default_rng(seed)
    low_configs = {low: resolve_bit_config(low, shapes) for low in lows}
    flips = make_flips(reference, lowered(reference, low_configs, operands))
    for flip in flips.values():
        flip["kl"] = float(rng.exponential())
    identity = {"reference_config": reference, "low_bits": low_configs, "operands": list(operands)}
    record = {"identity": identity, "flips": flips, "bit_config": {"name": "8"}}
    model = SimpleNamespace(layer_shapes=lambda: shapes)
    return Problem(record, model, bit_widths, "kl"), flips


# ---- flips


def test_flips_of_one_operand_change_it_alone():
    shapes = shapes_of(2)
    reference, low = (resolve_bit_config(bits, shapes) for bits in (8, 4))
    configs = lowered(reference, {"4": low, "W4A8KV8": resolve_bit_config("W4A8KV8", shapes)}, ["w", "a", "kv"])
    # the weights of W4A8KV8 are those of 4, and its inputs and K/V are the reference's
    assert list(configs) == [("4", "w"), ("4", "a"), ("4", "kv")]
    for (_, operand), config in configs.items():
        for layer, bits in config.items():
            assert bits == reference[layer] | ({f"{operand}_bits": 4} if f"{operand}_bits" in bits else {})
    flips = make_flips(reference, configs)
    keys = {
        operand: [key for key, flip in flips.items() if flip["operand"] == operand] for operand in ("w", "a", "kv")
    }
    assert len(keys["w"]) == len(keys["a"]) == 8 + 2 + 6 + 1
    assert keys["kv"] == ["4 kv: transformer.h.0.attn.c_attn", "4 kv: transformer.h.1.attn.c_attn", "4 kv: all"]
    assert flips["4 kv: all"]["layers"] == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert flips["4 a: block 1"]["layers"] == [layer for layer in shapes if ".h.1." in layer]


def test_flips_of_all_operands_together_are_keyed_by_the_low_config_alone():
    reference = resolve_bit_config(8, shapes_of(2))
    low = resolve_bit_config(4, shapes_of(2))
    flips = make_flips(reference, lowered(reference, {"4": low}, ["together"]))
    assert list(flips)[0] == "4: transformer.h.0.attn.c_attn" and len(flips) == 17
    assert {flip["operand"] for flip in flips.values()} == {"together"}


# ---- options and resources


def test_options_of_single_operands_are_all_combinations_at_the_sum_of_their_costs():
    problem, flips = made_problem(1, ("w", "a", "kv"), ("6", "4"))
    for (layer, options), cost in zip(problem.options.items(), problem.cost, strict=True):
        fields = list(problem.reference[layer])
        found = {tuple(entry.values()): value for entry, value in zip(options, cost, strict=True)}
        assert list(options[0].values()) == [8] * len(fields)
        assert set(found) == set(itertools.product((8, 6, 4), repeat=len(fields)))
        for widths, value in found.items():
            keys = [f"{bits} {name[:-5]}: {layer}" for name, bits in zip(fields, widths, strict=True) if bits != 8]
            assert value == pytest.approx(sum(flips[key]["kl"] for key in keys))


def test_options_keep_to_the_candidates_and_to_what_was_swept():
    problem, _ = made_problem(1, ("w", "kv"), ("6", "4"))
    assert {bits["a_bits"] for options in problem.options.values() for bits in options} == {8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Problem.__init__.__globals__, "resolve_configs", lambda model, texts: {
            text: resolve_bit_config(text, model.layer_shapes()) for text in texts})  # fmt: skip
        problem, _ = made_problem(1, ("w", "kv"), ("6", "4"), bit_widths=["8", "4"])
    assert {bits["w_bits"] for options in problem.options.values() for bits in options} == {8, 4}


@pytest.mark.parametrize("kind", BUDGETS)
def test_resources_are_those_of_the_description(kind):
    problem, _ = made_problem(2, ("w", "a", "kv"), ("5", "4"))
    table, limit = problem.limits({kind: 1e3 if kind == "bitops" else 7})
    unit = limit[0] / (1e3 if kind == "bitops" else 7)
    rng = np.random.default_rng(0)
    choice = [int(rng.integers(len(options))) for options in problem.options.values()]
    resolved = problem.resolved(choice)
    described, reference = (describe_bit_config(config, problem.shapes) for config in (resolved, problem.reference))
    expected = averages(resolved, problem.shapes) | {
        "average_bits": described["average_w_bits"],
        "weight_mb": described["weight_bytes"] / 1e6,
        "bitops": described["bitops_per_token"] / reference["bitops_per_token"],
    }
    assert assignment.total(table, choice)[0] / unit == pytest.approx(expected[kind])
    least, most = problem.bounds(kind)
    assert least <= expected[kind] <= most
    assert expected["average_w_bits"] == expected["average_bits"]


def test_averages_count_inputs_by_macs_and_values_of_k_and_v():
    shapes = shapes_of(1)
    config = resolve_bit_config({"default": 8, "*.mlp.c_proj": {"a_bits": 4}, "*.c_attn": {"kv_bits": 5}}, shapes)
    macs = {name: out * inp for name, (out, inp) in SHAPES.items()}
    share = macs["mlp.c_proj"] / sum(macs.values())
    assert averages(config, shapes) == {
        "average_w_bits": 8, "average_a_bits": pytest.approx(8 - 4 * share), "average_kv_bits": 5}  # fmt: skip


@pytest.mark.parametrize(
    ("operands", "budget", "message"),
    [
        (("together",), {"average_bits": 6, "average_a_bits": 6}, "flips of together, .* of a; .*--operands w a kv"),
        (("together",), {"average_kv_bits": 6}, "--average_kv_bits 6: .* of kv;"),
        (("a", "kv"), {"average_bits": 6}, "flips of a kv, .* of together or w"),
        (("kv",), {"bitops": 0.6}, "--bitops 0.6: .*flips of kv"),
        (("w", "a"), {"average_bits": 6, "average_a_bits": 3.9}, "--average_a_bits 3.9: below .*allowed: 4 or more"),
        (("w",), {"bitops": 0.4}, "--bitops 0.4: below .*allowed: 0.5 or more"),
    ],
)
def test_budgets_that_the_sweep_cannot_meet_are_refused(operands, budget, message):
    with pytest.raises(ValueError, match=message):
        made_problem(1, operands)[0].limits(budget)


# ---- the integer program


def tables():
    """(cost, resource, limit, rng) of linears with different numbers of options, under one or two kinds of limit."""
    rng = np.random.default_rng(0)
    for number in range(16):
        kinds, widths = 1 + number % 2, rng.integers(2, 5, rng.integers(2, 6))
        resource = [rng.integers(1, 30, (width, kinds)) * 4 for width in widths]
        for rows in resource:  # as in a sweep: one option has the least of everything
            rows[-1] = rows.min(0)
        cost = [np.append(0, rng.normal(1, 1, width - 1)) for width in widths]
        low, high = (sum(end(rows, axis=0) for rows in resource) for end in (np.min, np.max))
        yield cost, resource, rng.integers(low, high + 1), rng


def brute_force(cost, resource, limit):
    """The least total cost of all choices within the limit."""
    every = itertools.product(*(range(len(row)) for row in cost))
    return min(assignment.total(cost, c) for c in every if (assignment.total(resource, c) <= limit).all())


def test_solver_equals_brute_force_within_the_limits():
    for cost, resource, limit, _ in tables():
        choice = assignment.solve(cost, resource, limit)
        assert (assignment.total(resource, choice) <= limit).all()
        assert assignment.total(cost, choice) == pytest.approx(brute_force(cost, resource, limit))
    with pytest.raises(ValueError, match="no assignment"):
        assignment.solve(cost, resource, sum(rows.min(0) for rows in resource) - 1)


@pytest.mark.parametrize("budget", [
    {"average_bits": 5.9}, {"average_bits": 6, "average_a_bits": 5.2}, {"average_bits": 7, "average_kv_bits": 4},
    {"average_bits": 5.5, "average_a_bits": 6.5, "average_kv_bits": 6}, {"weight_mb": 0.0006, "average_a_bits": 5},
    {"bitops": 0.4}, {"bitops": 0.55}, {"bitops": 0.7, "average_a_bits": 7, "average_kv_bits": 5},
])  # fmt: skip
def test_operands_are_chosen_exactly_by_the_costs_of_the_flips(budget):
    """Against all assignments of w_bits, a_bits, kv_bits, with resources from the descriptions of the configs."""
    for seed in range(3):
        problem, flips = made_problem(1, ("w", "a", "kv"), ("6", "4"), seed, layers=("c_attn", "c_fc"))
        table, limit = problem.limits(budget)
        choice = assignment.solve(problem.cost, table, limit)
        best = (np.inf, None)
        for bits in itertools.product((8, 6, 4), repeat=5):
            entries = dict(zip(("w_bits", "a_bits", "kv_bits"), bits)), dict(zip(("w_bits", "a_bits"), bits[3:]))
            config = dict(zip(problem.shapes, entries, strict=True))
            described = describe_bit_config(config, problem.shapes)
            full = describe_bit_config(problem.reference, problem.shapes)["bitops_per_token"]
            found = averages(config, problem.shapes) | {"average_bits": described["average_w_bits"]}
            found |= {"weight_mb": described["weight_bytes"] / 1e6, "bitops": described["bitops_per_token"] / full}
            if all(found[kind] <= value + 1e-9 for kind, value in budget.items()):
                keys = (
                    f"{b} {field[:-5]}: {layer}" for layer, own in config.items() for field, b in own.items() if b < 8
                )
                best = min(best, (sum(flips[key]["kl"] for key in keys), str(config)))
        assert assignment.total(problem.cost, choice) == pytest.approx(best[0])
        assert str(problem.resolved(choice)) == best[1]


# ---- moves and refinement


def test_random_choices_and_moves_stay_within_the_limits():
    for cost, resource, limit, rng in tables():
        choice = assignment.random_choice(resource, limit, rng)
        used = assignment.total(resource, choice)
        assert (used <= limit).all()
        for rows, at in zip(resource, choice, strict=True):
            for extra in rows - rows[at]:
                more = (extra >= 0).all() and (extra > 0).any()
                assert not more or (used + extra > limit).any(), "no linear could have more"
        neighbours = assignment.moves(choice, cost, resource, limit)
        predicted = [assignment.total(cost, other) for other in neighbours]
        assert predicted == pytest.approx(sorted(predicted)) and choice not in neighbours
        assert all((assignment.total(resource, other) <= limit).all() for other in neighbours)


def test_moves_are_one_up_alone_or_with_one_down_or_several():
    resource = [np.array(row)[:, None] for row in ([8, 4], [4, 2], [4, 2])]
    cost = [np.array(row) for row in ([0, 9.0], [0, 1.0], [0, 1.0])]
    assert assignment.moves((1, 0, 0), cost, resource, np.array([12])) == [(0, 1, 1)]
    # bits go from the weights to the inputs of one linear: W8A4 to W4A8
    pairs = [np.array([[8, 8], [8, 4], [4, 8], [4, 4]])]
    assert assignment.moves((1,), [np.array([0, 1.0, 2, 3])], pairs, np.array([8, 8])) == [(0,), (2,)]
    # and between linears, where each operand has a limit of its own
    both = [pairs[0], pairs[0]]
    found = assignment.moves((1, 2), [np.array([0, 1.0, 2, 3])] * 2, both, np.array([12, 12]))
    assert {(2, 1), (0, 3), (3, 0)} <= set(found)


def test_refinement_is_never_worse_and_can_improve():
    for cost, resource, limit, rng in tables():
        truth = [row + rng.normal(0, 0.5, len(row)) for row in cost]
        start, seen = assignment.solve(cost, resource, limit), []

        def measure(base, choices, truth=truth, seen=seen):
            seen.extend(choices)
            return [assignment.total(truth, choice) for choice in (base, *choices)]

        choice, value, before, measured = assignment.refine(start, cost, resource, limit, measure, 5, 4)
        assert value == assignment.total(truth, choice) <= before == assignment.total(truth, start)
        assert (assignment.total(resource, choice) <= limit).all()
        assert measured == len(seen) + 1 == len({start, *seen})
    # the cost says "keep the first", the measurement the opposite
    cost, resource = [np.array([0, 2.0]), np.array([0, 1.0])], [np.array([[8], [4]])] * 2
    limit = np.array([12])
    choice, *_ = assignment.refine(
        (0, 1), cost, resource, limit, lambda b, c: [float(x[0] == 0) for x in (b, *c)], 2, 4
    )
    assert choice == (1, 0)


# ---- baselines


def bits_of(config):
    return {layer: bits["w_bits"] for layer, bits in config.items()}


@pytest.mark.parametrize(
    ("blocks", "file"), [(12, "configs/hybrid_25pct_4bit.json"), (4, "quickstart/hybrid_4blocks.json")]
)
def test_hybrid_by_fraction_is_the_published_one(blocks, file):
    high, low = (resolve_bit_config(bits, shapes_of(blocks)) for bits in (8, 4))
    assert baselines.hybrid(high, low) == resolve_bit_config(ROOT / file, shapes_of(blocks))


@pytest.mark.parametrize("blocks", [1, 2, 3, 6, 8, 24, 36, 48])
def test_hybrid_of_any_depth(blocks):
    shapes = shapes_of(blocks)
    found = baselines.hybrid(*(resolve_bit_config(bits, shapes) for bits in (8, 4)))
    assert found == resolve_bit_config(ROOT / "configs/hybrid_25pct_4bit.json", shapes)
    config = bits_of(found)
    assert config["transformer.h.0.attn.c_proj"] == 4, "one block at least"
    assert all(config[layer] == 4 for layer in shapes if f".h.{blocks - 1}." in layer)
    assert any(config[f"transformer.h.{block}.mlp.c_fc"] == 4 for block in range(blocks))
    if blocks % 12 == 0:
        weights = {layer: out * inp for layer, (out, inp) in shapes.items()}
        low = sum(weights[layer] for layer, bits in config.items() if bits == 4)
        assert low / sum(weights.values()) == pytest.approx(0.25)


def test_first_and_last_blocks_are_high_until_the_budget_is_used():
    problem, _ = made_problem(5, ("together",))
    layers = [*problem.options]
    per_block = [[bits for layer, bits in bits_of(config).items() if f".h.{block}." in layer]
                 for config in [problem.resolved(baselines.first_and_last_high(
                     layers, *problem.limits({"average_bits": 4 + 4 * 3.3 / 5})))]
                 for block in range(5)]  # fmt: skip
    assert per_block[0] == per_block[4] == per_block[1] == [8] * 4 and per_block[2] == [4] * 4
    assert 4 < np.mean(per_block[3]) < 8, "what is left"


@pytest.mark.parametrize("budget", [
    {"average_bits": 6.1, "average_a_bits": 5.3, "average_kv_bits": 5}, {"bitops": 0.5}, {"average_bits": 5},
])  # fmt: skip
def test_random_assignments_use_what_the_found_one_uses(budget):
    problem, _ = made_problem(6, ("w", "a", "kv"), ("6", "4"))
    table, limit = problem.limits(budget)
    choice, rng = assignment.solve(problem.cost, table, limit), np.random.default_rng(0)
    used, drawn = assignment.total(table, choice), [baselines.random_like(choice, table, rng) for _ in range(20)]
    assert len({choice, *drawn}) == 21
    for other in drawn:
        assert assignment.total(table, other).tolist() == used.tolist()
        for layer, bits in problem.resolved(other).items():
            for field in bits:  # what no budget limits stays at the reference
                limited = {"w_bits": "average_bits", "a_bits": "average_a_bits", "kv_bits": "average_kv_bits"}[field]
                free = limited not in budget and not ("bitops" in budget and field != "kv_bits")
                assert not free or bits[field] == 8, layer
    widths = {bits for other in drawn for own in problem.resolved(other).values() for bits in own.values()}
    assert widths == {8, 6, 4}


def test_contrast_by_hand():
    scores = {"found": [(1, 1), (1, 1), (0, 0.5), (0, 0)], "random_0": [(1, 1), (0, 0.5), (0, 0.5), (0, 0)],
              "random_1": [(1, 1), (1, 1), (0, 0.5), (1, 1)],
              "random_2": [(1, 1), (1, 1), (0, 0.25), (0, 0)]}  # fmt: skip
    result = baselines.contrast(scores, "found", 200, 0)
    em, f1 = result["exact_match"], result["f1"]
    assert (em["found_better"], em["equal"], em["random_better"]) == (1, 1, 1)
    assert (f1["found_better"], f1["equal"], f1["random_better"]) == (2, 0, 1)
    assert (result["number"], result["better_than_found"], result["mean_exact_match"]) == (3, 1, 50)
    assert em["found_minus_mean"] == 0 and f1["found_minus_mean"] == pytest.approx(62.5 - (50 + 87.5 + 56.25) / 3)
    assert em["found_minus_mean_interval"][0] < 0 < em["found_minus_mean_interval"][1]
    assert em["found_better_interval_above_zero"] == 0
    line = baselines.contrast_line("found", result)
    assert (
        "EM: better than 1 of 3 (equal 1, in 0 with a 95 % interval above 0)" in line and "F1: better than 2" in line
    )
    always = {name: np.array([(value, value)] * 9) for name, value in (("found", 1.0), ("random_0", 0.0))}
    assert baselines.contrast(always, "found", 50, 0)["f1"]["found_better_interval_above_zero"] == 1
    assert baselines.contrast(always, "found", 0, 0)["f1"]["found_better_interval_above_zero"] is None
