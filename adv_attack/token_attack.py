#!/usr/bin/env python
"""Attack a classifier or extractive question answering with real tokens, white box, at any precision.

    python token_attack.py --task qa --model_name_or_path results/adv_qa --validation_file dev-v1.1.json \\
        --surface distractor --method hotflip --attack_bits eot --precision_set 4 8 --output_dir results/tokens
    python token_attack.py --task classification --model_name_or_path results/train --dataset_name ag_news \\
        --method pgd --num_replacements 5 --output_dir results/tokens_pgd

The mathematics is in token_pgd.py. Attacked are the tokens of a text, those of a question, or a sentence after the
context of a question, which holds no gold answer. Attacked texts are decoded and tokenized again before they are
scored, at --serve_bits and at the precisions of the set. As many random tokens are the control. Writes table.md,
record.json and adversarial.json (the texts). A killed run resumes at the batch that it was at; the result is a
function of the flags.
"""

import dataclasses
import functools
import logging
import math
import os
import random
import time
import types

import torch
from tqdm.auto import tqdm

from attack_setup import load_language_model
from classifier import negative_log_likelihood
from common.arguments import CheckpointArguments, option
from common.calibration import quantizer_label
from common.checksums import model_checksum
from common.flags import parse_args
from common.loading import resolve_configs
from common.record import read_state, relative_path, run_record, write_json_atomic, write_state, write_text_atomic
from common.script import plain_errors, setup_logging
from models.errors import UserError
from pgd_matrix import DATA, begin, load_trained, set_task_quantizer
from pgd_report import CLEAN, token_lines, token_results
from pgd_tasks import FREE_TOKENS, ITEMS, asked_task, contains_answer, resolve_set
from token_pgd import Suffix, TokenAttack, Window, replaceable_tokens
from whitebox_attack import RESULT_FILE

logger = logging.getLogger("token_attack")
SURFACES = {"classification": ["text"], "qa": ["question", "distractor"]}
STEPS = {"hotflip": None, "pgd": 20, "random": None}  # of an attack, by default; None: one a replacement
RANDOM = "random tokens"
REPORTING = ("output_dir", "repetitions", "num_bootstrap", "margin")  # no attack depends on them


@dataclasses.dataclass
class TokenArguments:
    """The attack, and where it is served."""

    task: str = dataclasses.field(kw_only=True, metadata={"help": f"{' or '.join(SURFACES)}"})
    output_dir: str = dataclasses.field(kw_only=True, metadata={"help": "folder of table.md and record.json"})
    method: str = option("hotflip", f"{', '.join(STEPS)} (the control alone)")
    surface: str | None = option(None, "qa: question (default) or distractor; classification: text")
    attack_bits: str = option("32", '32, 8, 4, "W4A8KV8", a JSON config, random (a draw per step) or eot (the mean)')
    precision_set: list[str] = option(
        ["4", "8"], "the precisions of random and eot, and of random precision inference"
    )
    serve_bits: list[str] = option(
        ["32"], "further precisions to serve at; the first is what others are compared with"
    )
    num_replacements: int = option(5, "tokens replaced, at most; a distractor has so many")
    attack_steps: int | None = option(None, "gradients taken (default: hotflip one a replacement, pgd 20)")
    candidates: int = option(8, "hotflip: replacements tried a step")
    step_size: float = option(0.5, "pgd: what the coordinate of the best token moves by in a step")
    num_samples: int = option(500, "texts, or questions whose context fits one window")
    data_seed: int = option(0, "seed of their choice")
    batch_size: int = option(16, "of them attacked side by side")
    fluency_model: str | None = option(None, "GPT-2 language model, same tokenizer: perplexity of the texts")
    repetitions: int = option(100, "sequences of draws of a precision per query")
    num_bootstrap: int = option(1000, "resamples of the intervals of F1")
    margin: float = option(5.0, "points within which an effect counts as none")
    seed: int = option(42, "seed of all draws")


def check_args(args):
    """Refuse what cannot work, before anything is loaded; sets the defaults that depend on other flags."""
    if args.method not in STEPS:
        raise UserError(f"--method {args.method}: allowed are {', '.join(STEPS)}")
    args.surface = args.surface or SURFACES[args.task][0]
    if args.surface not in SURFACES[args.task]:
        raise UserError(f"--surface {args.surface}: allowed with --task {args.task}: {', '.join(SURFACES[args.task])}")
    if args.attack_steps is None:
        args.attack_steps = STEPS[args.method]
    elif args.attack_steps < 1:
        raise UserError(f"--attack_steps {args.attack_steps}: must be at least 1")
    for flag in ("num_replacements", "candidates", "num_samples", "batch_size"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if not (math.isfinite(args.step_size) and args.step_size > 0):
        raise UserError(f"--step_size {args.step_size}: must be a number above 0")
    if len(args.precision_set) < 2:
        raise UserError(f"--precision_set {args.precision_set[0]}: needs at least two precisions")
    if not args.margin > 0:
        raise UserError(f"--margin {args.margin}: must be a number above 0")
    if args.repetitions < 2:
        raise UserError(f"--repetitions {args.repetitions}: at least 2, random precision is a random variable")


class Measurement:
    """One model on its items: `batch` attacks some and scores them. precisions: {name: config} that are attacked;
    configs: {name: config} that are served."""

    def __init__(self, model, items, precisions, configs, fluency, args):
        self.model, self.items, self.configs, self.fluency, self.args = model, items, configs, fluency, args
        self.decode = functools.partial(items.tokenizer.decode, clean_up_tokenization_spaces=False)
        self.kinds = replaceable_tokens(items.tokenizer, model.transformer.wte.num_embeddings)
        self.of_kind = {kind: (self.kinds == kind).nonzero().flatten().tolist() for kind in (1, 2)}
        self.attack = TokenAttack(model, precisions, args.attack_bits == "random", self.kinds, args)
        order = sorted(range(len(items.items)), key=lambda position: (len(items.items[position]["tokens"]), position))
        self.batches = [order[first : first + args.batch_size] for first in range(0, len(order), args.batch_size)]

    def random_tokens(self, item, tokens):
        """`tokens` with --num_replacements of them drawn anew (all that there are, if fewer); for a distractor: that
        many new ones. A token is drawn from those of its own kind."""
        draw, number = random.Random(f"{self.args.seed}-{item['index']}"), self.args.num_replacements
        while self.args.surface == "distractor":
            found = draw.choices(self.of_kind[1], k=number)
            if not contains_answer(self.decode(found), item["row"]["answers"]["text"]):
                return found
        usable = [place for place, token in enumerate(tokens) if self.kinds[token]]
        found = list(tokens)
        for place in draw.sample(usable, min(number, len(usable))):
            found[place] = draw.choice(self.of_kind[int(self.kinds[tokens[place]])])
        return found

    def target(self, items, inputs):
        """(target, accept) of a batch, see `TokenAttack`."""
        if self.args.task == "classification":
            return Window(self.model, self.args.task, inputs), lambda tokens: True
        context = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
        for row, item in zip(context, items, strict=True):
            offsets = item["feature"]["offset_mapping"]
            row[: len(offsets)] = torch.tensor([pair is not None for pair in offsets])
        if self.args.surface == "question":
            return Window(self.model, self.args.task, inputs, context), lambda tokens: True
        golds = [item["row"]["answers"]["text"] for item in items]

        def accept(tokens):
            texts = map(self.decode, tokens.tolist())
            found = [not contains_answer(text, answers) for text, answers in zip(texts, golds, strict=True)]
            return torch.tensor(found, device=tokens.device)

        start = torch.tensor([self.random_tokens(item, []) for item in items], device=context.device)
        return Suffix(self.model, inputs, context, start), accept

    def read(self, item, tokens):
        """(what an attack wrote, item with it, whether the tokens are the same when they are read again).

        The item is the one before where it does not fit one window any more.
        """
        text, ids = self.decode(tokens), item["tokens"]
        if self.args.task == "classification":
            (found,), expected = self.items.read([item["index"]], [{"text": text, "label": item["label"]}]), tokens
        elif self.args.surface == "question":
            (found,) = self.items.read([item["index"]], [item["row"] | {"question": text}])
            expected = tokens + ids[item["question_tokens"] :]
        else:
            (found,) = self.items.read([item["index"]], [item["row"] | {"context": item["row"]["context"] + text}])
            expected = ids + tokens
        return text, found or item, found is not None and found["tokens"] == expected

    def score(self, items):
        """{column: scores of each item}."""
        holder, numbers = self.items.replaced(items), range(len(items))
        inputs, found = holder.batch(numbers), {}
        for column, config in self.configs.items():
            with torch.no_grad(), self.model.at_bits(config):
                found[column] = holder.score(self.model, inputs, numbers).tolist()
        return found

    def likelihoods(self, items, texts):
        """`negative_log_likelihood` of the fields that were attacked; None without a fluency model."""
        if self.fluency is None:
            return None
        if self.args.surface == "distractor":
            texts = [item["row"]["context"] for item in items]
        return [negative_log_likelihood(self.fluency, self.items.tokenizer, text) for text in texts]

    def batch(self, positions):
        """What is kept of a batch: {"seconds" (of the attack), "rows": {row: {"scores", "texts", "replaced", "same"
        (read again as the same tokens), "likelihoods"}}}."""
        args, items = self.args, [self.items.items[position] for position in positions]
        inputs = self.items.batch(positions)
        target, accept = self.target(items, inputs)
        if args.surface == "distractor":
            own = [[] for _ in items]
        else:
            sizes = FREE_TOKENS[args.task](inputs).sum(1).tolist()
            own = [item["tokens"][:size] for item, size in zip(items, sizes, strict=True)]
        start, made = time.time(), {RANDOM: [self.random_tokens(*pair) for pair in zip(items, own, strict=True)]}
        if args.method != "random":
            found = getattr(self.attack, args.method)(target, accept).tolist()
            made[args.method] = [row[: len(tokens) or None] for row, tokens in zip(found, own, strict=True)]
        seconds, clean = time.time() - start, [self.decode(tokens) for tokens in own]
        rows = {CLEAN: {"scores": self.score(items), "likelihoods": self.likelihoods(items, clean), "texts": clean}}
        for row, tokens in made.items():
            texts, read, same = zip(*map(self.read, items, tokens), strict=True)
            drawn = [[-1] * args.num_replacements for _ in items] if row == RANDOM else made[RANDOM]
            before = drawn if args.surface == "distractor" else own
            rows[row] = {
                "scores": self.score(read),
                "likelihoods": self.likelihoods(read, texts),
                "texts": texts,
                "replaced": [sum(map(int.__ne__, *pair)) for pair in zip(tokens, before, strict=True)],
                "same": same,
            }
        return {"seconds": seconds, "rows": rows}


def measure_all(measurement, folder):
    """({row: {key: list over the items}}, seconds of the attack over all runs). One file a batch."""
    args, number, seconds, rows = measurement.args, len(measurement.items.items), 0.0, {}
    with tqdm(total=number, desc=f"{args.method} at {args.attack_bits}", unit="text") as bar:
        for place, positions in enumerate(measurement.batches):
            path = os.path.join(folder, "parts", f"{place:05d}.json")
            part = read_state(path)
            if part is None:
                write_state(path, measurement.batch(positions))
                part = read_state(path)
            seconds += part["seconds"]
            for row, found in part["rows"].items():
                whole = rows.setdefault(row, {key: [None] * number for key in found if key != "scores"})
                columns = whole.setdefault("scores", {column: [None] * number for column in found["scores"]})
                for at, position in enumerate(positions):
                    for column, scores in found["scores"].items():
                        columns[column][position] = scores[at]
                    for key in whole.keys() - {"scores"}:
                        whole[key][position] = found[key] and found[key][at]
            bar.update(len(positions))
    return rows, seconds


def main():
    start = time.time()
    model_args, data_args, args = parse_args(CheckpointArguments, DATA[asked_task()], TokenArguments)
    setup_logging(types.SimpleNamespace(process_index=0))
    check_args(args)
    tokenizer, model = load_trained(args.task, model_args, data_args)
    fluency = None
    if args.fluency_model:
        fluency = load_language_model("fluency_model", args.fluency_model, model, model_args)
    members = resolve_set(model, args.precision_set)
    several = args.attack_bits in ("random", "eot")
    fixed = [] if args.method == "random" else [args.attack_bits]
    precisions = members if several else resolve_configs(model, fixed)
    configs = resolve_configs(model, [*args.serve_bits, *args.precision_set])
    room = {"room": args.num_replacements} if args.task == "qa" else {}
    items = ITEMS[args.task](model, tokenizer, model_args, data_args, args, **room)
    quantizer = set_task_quantizer(model, tokenizer, model_args, data_args, args)
    served, more = {"attacked": precisions, "served": configs}, {"fluency_sha256": fluency and model_checksum(fluency)}
    settings, _lock = begin(args, REPORTING, model, items, served, model_args, data_args, **more)
    rows, seconds = measure_all(Measurement(model, items, precisions, configs, fluency, args), args.output_dir)

    names, number = list(members), len(items.items)
    found = rows[RANDOM if args.method == "random" else args.method]
    replaced, same = found["replaced"], sum(found["same"]) / number
    changed = {"mean": sum(replaced) / number, "least": min(replaced), "most": max(replaced)}
    attacked = f"{args.attack_bits}({'+'.join(names)})" if several else next(iter(precisions), "no precision")
    results = token_results(rows, names, next(iter(configs)), RANDOM, args)
    about = (
        f"{args.method} on the {args.surface}, attacked at {attacked}, at most {args.num_replacements} tokens "
        f"({changed['mean']:.1f} replaced on average; {same:.0%} of the texts are the same tokens when read again). "
        f"Quantizer: {quantizer_label(quantizer)}. {number} texts"
    )
    lines = token_lines(results, next(iter(configs)), RANDOM, args.task, about)
    print("\n".join(lines), flush=True)
    write_text_atomic(os.path.join(args.output_dir, "table.md"), "\n".join(lines) + "\n")
    texts = {row: kept["texts"] for row, kept in rows.items()}
    write_state(os.path.join(args.output_dir, RESULT_FILE), {"items": settings["items"], "texts": texts})
    record = run_record(
        model=relative_path(model_args.model_name_or_path),
        bit_config={"attacked": attacked, "precision_set": names, "columns": list(configs), **quantizer},
        metrics={
            "attack_seconds": round(seconds, 1),
            "seconds_per_text": round(seconds / number, 3),
            "read_again_the_same": same,
            **{f"{row}/rpi": found["expected"] for row, found in results["random_precision"].items()},
        },
        data={"validation": items.source, "attacked": {"examples": number, "left_out": items.left_out}},
        seed=args.seed,
        wall_seconds=time.time() - start,
        replaced=changed,
        **results,
        settings=settings | {name: getattr(args, name) for name in REPORTING if name != "output_dir"},
    )
    write_json_atomic(data_args.record_file or os.path.join(args.output_dir, "record.json"), record)


if __name__ == "__main__":
    with plain_errors():
        main()
