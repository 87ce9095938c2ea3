#!/usr/bin/env python
"""Find the bit-width assignment of least loss under a budget, from a sensitivity sweep, and evaluate it.

    bash sweep.sh
    python search.py --model_name_or_path results/train --dataset_name squad --average_bits 6 --num_random 10 \\
        --sensitivity_file results/sensitivity/sensitivity.json --output assignment.json --output_dir results/search
    python search.py ... --pareto --pareto_points 9      # EM against average bits over a grid of budgets
    bash sweep.sh --operands w a kv                      # then W, A and K/V of a linear are chosen separately:
    python search.py ... --average_bits 6 --average_a_bits 6 --average_kv_bits 6

Costs are taken as additive over linears, and over operands that were swept alone (the measured KL of the flips, or
another --score); the best assignment is exact for them (integer programming). Then swaps are measured on some
questions and kept if better. What is found is evaluated beside the uniform widths, the published hybrid, the first and
last blocks high, and random assignments of the same budget.
Refinement on the validation set chooses on the data of the table; --measure_split train does not.
"""

import dataclasses
import json
import logging
import os
import time

import numpy as np
from transformers import set_seed

from allocation import assignment, baselines
from allocation.block_reuse import ReusedForward
from allocation.measure_set import autocast_of, load_measure_set, span_kl, span_nll
from allocation.plots import draw_pareto
from allocation.problem import BUDGETS, OF_WEIGHTS, Problem, averages, read_sensitivity, refuse_other_checkpoint
from common.arguments import CheckpointArguments, option
from common.checksums import model_checksum
from common.data import set_qa_quantizer
from common.flags import parse_args
from common.loading import load_model, load_tokenizer
from common.record import plot_caption, relative_path, run_record, write_json_atomic, write_text_atomic
from common.resuming import run_lock
from common.script import plain_errors, setup_logging
from common.training_args import TrainingArguments
from models.bit_config import short_name
from models.errors import UserError
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering
from run_qa_eval import EvalDataArguments, Evaluator, table_lines

logger = logging.getLogger("search")
SCORE_NAMES = ("kl", "loss_increase", "exact_match_drop", "f1_drop", "first_order", "fisher_token", "fisher_window")


@dataclasses.dataclass
class SearchArguments(CheckpointArguments):
    """The checkpoint, the budget and the search."""

    sensitivity_file: str = option("results/sensitivity/sensitivity.json", "what sensitivity.py wrote for it")
    average_bits: float | None = option(None, "budget: average bits of the linear weights")
    weight_mb: float | None = option(None, "budget: MB of the linear weights as stored (5 to 8 bits: a byte)")
    bitops: float | None = option(None, "budget: BitOPs relative to the sweep's reference config, 0 to 1")
    average_a_bits: float | None = option(None, "budget, further: average bits of the linears' inputs, over MACs")
    average_kv_bits: float | None = option(None, "budget, further: average bits of the keys and values")
    bit_widths: list[str] | None = option(
        None, "candidates, as 8 4 or W8A8KV8 W4A4KV4: of the sweep's reference and low configs (default: all of them)"
    )
    score: str = option("kl", f"additive cost of a flip: {', '.join(SCORE_NAMES)}")
    output: str | None = option(None, "file of the assignment (default: assignment.json in --output_dir)")
    refine_rounds: int = option(4, "rounds of measured swaps (0: the predicted optimum as it is)")
    refine_candidates: int = option(16, "swaps measured in a round, those predicted best")
    refine_by: str = option("kl", "what a swap must lower: kl or loss")
    max_refine_samples: int = option(256, "questions that swaps are measured on, drawn at random")
    measure_split: str = option("validation", "data that swaps are measured on: validation or train")
    num_random: int = option(0, "random assignments of the same budget, for contrast")
    pareto: bool = option(False, "search over a grid of average bits and draw EM against it")
    pareto_points: int = option(7, "budgets of the grid, lowest and highest width included")
    num_bootstrap: int = option(1000, "resamples of the 95 % intervals over questions (0: no intervals)")


def check_args(args):
    """The budget as {kind: value}, empty for --pareto alone."""
    given = {kind: getattr(args, kind) for kind in BUDGETS if getattr(args, kind) is not None}
    if len(given.keys() & set(OF_WEIGHTS)) > 1 or (not given and not args.pareto):
        raise UserError(
            "allowed is one budget of --average_bits, --weight_mb, --bitops, with --average_a_bits, --average_kv_bits "
            "for a sweep of single operands; or --pareto for a grid"
        )
    for name, allowed in (("score", SCORE_NAMES), ("refine_by", ("kl", "loss"))):
        if getattr(args, name) not in allowed:
            raise UserError(f"--{name} {getattr(args, name)}: allowed are {', '.join(allowed)}")
    for name, least in (("refine_candidates", 1), ("max_refine_samples", 1), ("pareto_points", 2)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: allowed are {least} or more")
    return given


class SubsetMeasure:
    """Mean KL or loss of choices on the questions of a MeasureSet; the reference's logits are computed once."""

    def __init__(self, problem, forward, measure_set, by):
        self.problem, self.forward, self.measure_set, self.by = problem, forward, measure_set, by
        self.reference = []
        if by == "kl":
            self.reference = [next(forward.logits(b[0], problem.reference, [])) for b in self._tensors()]

    def _tensors(self):
        return (self.measure_set.tensors(batch) for batch in self.measure_set.batches)

    def __call__(self, base, choices):
        configs, sums = [self.problem.resolved(choice) for choice in choices], np.zeros(1 + len(choices))
        for number, (inputs, real, context, labels) in enumerate(self._tensors()):
            found = self.forward.logits(inputs, self.problem.resolved(base), configs)
            for index, logits in enumerate(found):
                kl = self.by == "kl"
                values = span_kl(self.reference[number], logits, context) if kl else span_nll(logits, real, labels)
                sums[index] += values.double().sum().item()
        return (sums / sum(map(len, self.measure_set.batches))).tolist()


def search(problem, budget, measure, args):
    """(choice, report) of the best assignment found under one budget {kind: value}."""
    table, limit = problem.limits(budget)
    predicted = choice = assignment.solve(problem.cost, table, limit)
    report = {"budget": budget, "predicted_cost": float(assignment.total(problem.cost, predicted))}
    if measure:
        rounds = args.refine_rounds, args.refine_candidates
        choice, after, before, tried = assignment.refine(predicted, problem.cost, table, limit, measure, *rounds)
        report |= {f"subset_{args.refine_by}_before": before, f"subset_{args.refine_by}": after, "measured": tried}
        report["linears_changed"] = sum(a != b for a, b in zip(predicted, choice, strict=True))
    report["average_bits"] = averages(problem.resolved(choice), problem.shapes)
    logger.info("%s", json.dumps(report))
    return choice, report


def as_config(resolved, description):
    """The JSON config of an assignment: one line per linear, an int where W, A and KV agree."""
    short = {layer: next(iter(bits.values())) for layer, bits in resolved.items() if len(set(bits.values())) == 1}
    return {"description": description, **resolved, **short}


def budgets_of(args, main_budget, problem):
    """{name of what is found: {kind: value}}: the budget asked for, and with --pareto a grid of average weight bits
    (with the budgets of A and K/V that were asked for).

    Raises: UserError for a budget that no assignment meets, and for a sweep that uses the names given here.
    """
    budgets = {"found": main_budget} if main_budget else {}
    if args.pareto:
        others = {kind: value for kind, value in main_budget.items() if kind not in OF_WEIGHTS}
        # the ends are uniform widths, which are in the table anyway
        grid = np.linspace(*problem.bounds("average_bits"), args.pareto_points)[1:-1]
        budgets |= {f"found_{value:.2f}": {"average_bits": float(value), **others} for value in grid}
    for budget in budgets.values():
        problem.limits(budget)
    own = ("random", "first_last", "hybrid")
    if taken := [name for name in problem.names if name in budgets or name.startswith(own)]:
        names = f"--sensitivity_file {args.sensitivity_file}: {', '.join(taken)}"
        raise UserError(f"{names} is what the search calls its own; sweep files of other names")
    return budgets


def make_measure(problem, model, tokenizer, args, data_args, training_args):
    """The SubsetMeasure of --max_refine_samples questions; None without --refine_rounds."""
    if not args.refine_rounds:
        return None

    def draw(ids):
        return np.random.default_rng(training_args.seed).permutation(ids)[: args.max_refine_samples].tolist()

    measure_set, _ = load_measure_set(model, tokenizer, args, data_args, training_args, 1, draw)
    return SubsetMeasure(problem, ReusedForward(model, autocast_of(training_args)), measure_set, args.refine_by)


def same_budget(problem, name, budget, choice, number, seed):
    """{name: resolved config} beside what was found as `name`: first and last blocks high, and `number` random ones
    that use the budget as fully as `choice` does. seed: a list of ints."""
    table, limit = problem.limits(budget)
    rng = np.random.default_rng(seed)
    drawn = {name.replace("found", "first_last"): baselines.first_and_last_high([*problem.options], table, limit)}
    for index in range(number):
        drawn[f"{name.replace('found', 'random')}_{index}"] = baselines.random_like(choice, table, rng)
    return {name: problem.resolved(choice) for name, choice in drawn.items()}


def published_hybrid(problem):
    """The published hybrid by fraction of the blocks: the reference, and 4 bits, or the least where none is swept."""

    def rank(config):
        return short_name(config) != "W4A4KV4", sum(sum(bits.values()) for bits in config.values())

    return baselines.hybrid(problem.reference, min(problem.configs[1:], key=rank))


def write_assignment(name, resolved, report, args, folder):
    """The JSON config of what was found under a budget; --output names that of the budget asked for."""
    average = report["average_bits"]["average_w_bits"]
    under = " and ".join(f"{kind} <= {value:g}" for kind, value in report["budget"].items())
    words = f"{average:.3f} average weight bits, least {args.score} under {under} (search.py)"
    output = args.output if name == "found" else None
    path = output or os.path.join(folder, f"{'assignment' if name == 'found' else name}.json")
    write_json_atomic(path, as_config(resolved, words))


def main():
    start = time.time()
    args, data_args, training_args = parse_args(SearchArguments, EvalDataArguments, TrainingArguments)
    setup_logging(training_args)
    main_budget, folder = check_args(args), training_args.output_dir
    if training_args.world_size > 1:
        raise UserError(f"the search is one process, not {training_args.world_size}: --nproc_per_node=1")
    training_args.refuse_full_eval()
    set_seed(training_args.seed)
    sensitivity = read_sensitivity(args.sensitivity_file)
    tokenizer = load_tokenizer(args)
    model = load_model(QuantGPT2ForQuestionAnswering, args, tokenizer).to(training_args.device)
    quantizer = set_qa_quantizer(model, tokenizer, args, data_args, training_args)
    refuse_other_checkpoint(args.sensitivity_file, sensitivity, model, model_checksum(model))
    problem = Problem(sensitivity, model, args.bit_widths, args.score)
    budgets = budgets_of(args, main_budget, problem)
    _lock = run_lock(folder)
    measure = make_measure(problem, model, tokenizer, args, data_args, training_args)

    configs, reports, beside = dict(zip(problem.names, problem.configs, strict=True)), {}, {}
    for number, (name, budget) in enumerate(budgets.items(), 1):
        choice, reports[name] = search(problem, budget, measure, args)
        configs[name] = problem.resolved(choice)
        write_assignment(name, configs[name], reports[name], args, folder)
        others = same_budget(problem, name, budget, choice, args.num_random, [training_args.seed, number])
        configs, beside[name] = configs | others, list(others)
    configs["hybrid"] = published_hybrid(problem)

    evaluator = Evaluator(model, tokenizer, args, data_args, training_args, quantizer, data_args.overwrite_output_dir)
    model.keep_only_codes(configs.values())
    reference = problem.names[0]
    records = evaluator.evaluate_all(configs)
    rows = evaluator.table(records, reference, args.num_bootstrap)
    lines = table_lines(rows, reference, quantizer)
    for row in rows:
        row |= averages(configs[row["config"]], problem.shapes)
    for name, (_, *randoms) in beside.items():
        lines.append(
            "{}: average bits W {:.3f}, A {:.3f}, K/V {:.3f}".format(name, *reports[name]["average_bits"].values())
        )
        if randoms:
            scores = {one: evaluator.scores(records[one]["predictions"]) for one in (name, *randoms)}
            reports[name]["random"] = baselines.contrast(scores, name, args.num_bootstrap, training_args.seed)
            lines.append(baselines.contrast_line(name, reports[name]["random"]))
    print("\n".join(lines), flush=True)
    write_text_atomic(os.path.join(folder, "table.md"), "\n".join(lines) + "\n")
    if args.pareto:
        groups = {
            "uniform": problem.names,
            "found": list(budgets),
            "first_last": [name for name, *_ in beside.values()],
            "random": [name for _, *randoms in beside.values() for name in randoms],
        }
        caption = plot_caption(args.model_name_or_path, evaluator.sources["validation"])
        draw_pareto(rows, groups, os.path.join(folder, "pareto.png"), caption)
        write_json_atomic(os.path.join(folder, "pareto.json"), {"groups": groups, "rows": rows})
    record = run_record(
        model=relative_path(args.model_name_or_path),
        bit_config={"reference": reference, **quantizer, "layers": configs},
        metrics={f"{row['config']}_{key}": row[key] for row in rows for key in ("exact_match", "f1")},
        data=evaluator.sources,
        seed=training_args.seed,
        wall_seconds=time.time() - start,
        dtype=training_args.run_dtype,
        score=args.score,
        sensitivity_file=relative_path(args.sensitivity_file),
        measure_split=args.measure_split,
        search=reports,
        rows=rows,
    )
    write_json_atomic(data_args.record_file or os.path.join(folder, "record.json"), record)


if __name__ == "__main__":
    with plain_errors():
        main()
