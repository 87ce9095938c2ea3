#!/usr/bin/env python
"""Attack precision x inference precision under PGD on embeddings, for a classifier or extractive question answering.

    python pgd_matrix.py --task classification --model_name_or_path results/adv_classification \\
        --dataset_name ag_news --num_samples 500 --output_dir results/pgd_classification
    python pgd_matrix.py --task qa --model_name_or_path results/adv_qa --validation_file dev.json \\
        --precision_set 4 6 8 --radius 0.2 --output_dir results/pgd_qa

Attacks are found at each precision of the set, at --further_bits, and averaged over the set (EOT, the attacker who
knows of the defence); a random perturbation of the same length is the control. Each is measured at every precision, at
a random one per query, and with a random one in every layer. Writes table.md and record.json. A killed run resumes at
the attack that it was at; the result is a function of the flags.
"""

import dataclasses
import json
import logging
import os
import random
import time
import types

import numpy as np
import torch
from tqdm.auto import tqdm

from attack_setup import DEVICE, load_classifier
from classifier import set_text_quantizer
from common.arguments import CheckpointArguments, DataTrainingArguments, option
from common.calibration import quantizer_label
from common.checksums import model_checksum, tokenizer_checksum
from common.data import set_qa_quantizer
from common.flags import parse_args
from common.loading import load_tokenizer, open_model, resolve_configs
from common.record import read_state, relative_path, run_record, write_json_atomic, write_state, write_text_atomic
from common.resuming import run_lock
from common.script import plain_errors, setup_logging
from embedding_pgd import perturbed, pgd, random_delta
from models.errors import UserError
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering
from pgd_report import CLEAN, RANDOM, protection, random_inference, report_lines, transfer_matrix
from pgd_tasks import (
    FREE_TOKENS,
    ITEMS,
    LOSSES,
    PGDArguments,
    asked_task,
    check_ball,
    noise_generator,
    resolve_set,
    single,
)
from text_classification import TrainingTextArguments
from whitebox_attack import start_output_dir

logger = logging.getLogger("pgd_matrix")
DATA = {"classification": TrainingTextArguments, "qa": DataTrainingArguments}
# Flags that only the report depends on: a finished matrix can be read again with others.
REPORTING = ("output_dir", "repetitions", "queries", "margin")


@dataclasses.dataclass
class MatrixArguments(PGDArguments):
    """The attacks, and what is made of them."""

    output_dir: str = dataclasses.field(kw_only=True, metadata={"help": "folder of table.md and record.json"})
    further_bits: list[str] = option(["32"], "precisions outside the set that are attacked and measured too")
    attack_steps: int = option(20, "steps of an attack")
    num_samples: int = option(500, "texts, or questions whose context fits one window")
    data_seed: int = option(0, "seed of their choice")
    batch_size: int = option(32, "of them attacked side by side")
    layer_draws: int = option(3, "random precision per layer: assignments drawn for each query; 0: leave it out")
    queries: list[int] = option([2, 5, 10, 20], "how often an attacker may send the same input")
    repetitions: int = option(100, "sequences of draws of a precision per query")
    margin: float = option(5.0, "points within which an effect counts as none")
    seed: int = option(42, "seed of all draws")


def check_args(args):
    """Refuse what cannot work, before anything is loaded."""
    check_ball(args)
    for flag in ("attack_steps", "num_samples", "batch_size"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if len(args.precision_set) < 2:
        raise UserError(f"--precision_set {args.precision_set[0]}: needs at least two precisions")
    if args.repetitions < 2:
        raise UserError(f"--repetitions {args.repetitions}: at least 2, random precision is a random variable")
    if args.layer_draws < 0:
        raise UserError(f"--layer_draws {args.layer_draws}: must be 0 or more")
    if min(args.queries) < 1:
        raise UserError(f"--queries {' '.join(map(str, args.queries))}: must be 1 or more each")
    if not args.margin > 0:
        raise UserError(f"--margin {args.margin}: must be a number above 0")


def load_trained(task, model_args, data_args):
    """(tokenizer, frozen model in evaluation mode). Raises UserError: of another task, exported, or SQuAD v2."""
    if getattr(data_args, "version_2_with_negative", False):
        raise UserError("--version_2_with_negative: attacked are questions that have an answer (SQuAD v1.1)")
    tokenizer = load_tokenizer(model_args)
    if task == "classification":
        model = load_classifier(model_args, tokenizer)
    else:
        model = open_model(QuantGPT2ForQuestionAnswering, model_args, tokenizer)
        if model.config.architectures != ["QuantGPT2ForQuestionAnswering"]:
            raise UserError(f"{model_args.model_name_or_path}: no question answering model; train one first")
        model.set_execution(model_args.execution)
    if model.config.exported_widths:
        name = model_args.model_name_or_path
        raise UserError(
            f"{name} is an exported checkpoint, whose integers have no gradients: attack the one it was made from"
        )
    return tokenizer, model.requires_grad_(False).eval().to(DEVICE)


def set_task_quantizer(model, tokenizer, model_args, data_args, args):
    """`calibration.set_quantizer` with the data of the task."""
    if args.task == "classification":
        return set_text_quantizer(model, tokenizer, model_args, data_args, args.seed)
    return set_qa_quantizer(model, tokenizer, model_args, data_args, args)


def begin(args, reporting, model, items, precisions, model_args, data_args, **more):
    """(settings, lock) of an output folder that is made for an attack, or has its parts already.

    reporting: flags that the parts do not depend on; more: further settings. Raises UserError: of another attack.
    """
    settings = {key: value for key, value in dataclasses.asdict(args).items() if key not in reporting} | {
        "model_sha256": model_checksum(model),
        "tokenizer_sha256": tokenizer_checksum(items.tokenizer),
        "data": items.source,
        "max_seq_length": data_args.max_seq_length,
        "items": [item["index"] for item in items.items],
        "precisions": precisions,
        "execution": model_args.execution,
        "attention": model.config._attn_implementation,
        **more,
    }
    settings = json.loads(json.dumps(settings))
    lock = run_lock(args.output_dir)
    place = {"output_dir": args.output_dir, "overwrite_output_dir": data_args.overwrite_output_dir}
    start_output_dir(types.SimpleNamespace(**place), settings)
    return settings, lock


def attack_names(members, configs):
    """{row: configs of the attack, None for a control}: no attack, random, every precision, EOT."""
    rows = {CLEAN: None, RANDOM: None} | {name: [config] for name, config in configs.items()}
    return rows | {f"eot({'+'.join(members)})": list(members.values())}


def layer_assignment(members, seed, draw, item):
    """A precision of the set for every layer, the same for an item under every attack."""
    rng, choices = random.Random(f"{seed}-{draw}-{item}"), list(members.values())
    return {layer: rng.choice(choices)[layer] for layer in choices[0]}


class Measurement:
    """One model on its items: `row` attacks and measures. members, configs: {name: config} of the set, and of all."""

    def __init__(self, model, items, members, configs, args):
        self.model, self.items, self.members, self.configs, self.args = model, items, members, configs, args
        order = sorted(range(len(items.items)), key=lambda position: (len(items.items[position]["tokens"]), position))
        self.batches = [order[first : first + args.batch_size] for first in range(0, len(order), args.batch_size)]

    def perturbation(self, name, attacked, inputs, positions):
        """delta of one batch. The draws are those of the batch: every attack starts at the same place."""
        free, args = FREE_TOKENS[self.args.task](inputs), self.args
        start = noise_generator(args.seed, positions[0])
        if name == RANDOM:
            return random_delta(self.model, args.radius, free, start)
        if attacked is None:
            return torch.zeros(*free.shape, self.model.config.n_embd, device=free.device)
        ball = {"steps": args.attack_steps, "step_size": args.step_size, "radius": args.radius}
        return pgd(self.model, inputs, LOSSES[args.task], attacked, **ball, free=free, generator=start)

    @torch.no_grad()
    def scores(self, config, inputs, delta, positions):
        """(batch, scores) of the perturbed batch at one config."""
        with self.model.at_bits(config), perturbed(self.model, delta):
            return self.items.score(self.model, inputs, positions)

    def row(self, name, attacked):
        """One attack, see `pgd_report.tables`."""
        number, args = len(self.items.items), self.args
        found = {column: np.zeros((number, len(self.items.scores))) for column in self.configs}
        layers = np.zeros((args.layer_draws, number), dtype=int)
        for positions in tqdm(self.batches, desc=name, unit="batch", leave=False):
            inputs = self.items.batch(positions)
            delta = self.perturbation(name, attacked, inputs, positions)
            for column, config in self.configs.items():
                found[column][positions] = self.scores(config, inputs, delta, positions)
            for place, position in enumerate(positions) if args.layer_draws else ():
                alone = single(inputs, place)
                own = delta[place : place + 1, : alone["input_ids"].shape[1]]
                for draw in range(args.layer_draws):
                    config = layer_assignment(self.members, args.seed, draw, position)
                    layers[draw, position] = self.scores(config, alone, own, [position])[0, 0]
        table = {"right": {column: scores[:, 0].astype(int).tolist() for column, scores in found.items()}}
        if len(self.items.scores) > 1:
            table["f1"] = {column: scores[:, 1].tolist() for column, scores in found.items()}
        return table | {"per_layer": layers.tolist()}


def measure_all(measurement, rows, folder):
    """({row: table}, seconds over all runs). One file an attack, so a killed run resumes."""
    tables, seconds = {}, 0.0
    for number, (name, attacked) in enumerate(rows.items()):
        path = os.path.join(folder, "parts", f"{number:02d}.json")
        part = read_state(path)
        if part is None:
            start = time.time()
            table = measurement.row(name, attacked)
            part = {"name": name, "table": table, "seconds": time.time() - start}
            write_state(path, part)
            logger.info("%s: %.1f s", name, part["seconds"])
        tables[name] = part["table"]
        seconds += part["seconds"]
    return tables, seconds


def main():
    start = time.time()
    model_args, data_args, args = parse_args(CheckpointArguments, DATA[asked_task()], MatrixArguments)
    setup_logging(types.SimpleNamespace(process_index=0))
    check_args(args)
    tokenizer, model = load_trained(args.task, model_args, data_args)
    members = resolve_set(model, args.precision_set)
    configs = resolve_configs(model, [*args.further_bits, *args.precision_set])
    items = ITEMS[args.task](model, tokenizer, model_args, data_args, args)
    quantizer = set_task_quantizer(model, tokenizer, model_args, data_args, args)
    settings, _lock = begin(args, REPORTING, model, items, configs, model_args, data_args)
    rows = attack_names(members, configs)
    tables, seconds = measure_all(Measurement(model, items, members, configs, args), rows, args.output_dir)

    names, eot = list(members), list(rows)[-1]
    matrix = transfer_matrix(tables)
    rpi = {row: random_inference(tables, row, names, args) for row in tables}
    protected = protection(tables, names, eot, args.margin)
    kind = "texts" if args.task == "classification" else "questions whose context fits one window"
    about = {"quantizer": quantizer_label(quantizer), "items": f"{len(items.items)} {kind}"}
    lines = report_lines(matrix, rpi, protected, args, about)
    print("\n".join(lines), flush=True)
    write_text_atomic(os.path.join(args.output_dir, "table.md"), "\n".join(lines) + "\n")
    record = run_record(
        model=relative_path(model_args.model_name_or_path),
        bit_config={"precision_set": names, "columns": list(configs), **quantizer},
        metrics={"attack_seconds": round(seconds, 1), **{f"{row}/rpi": rpi[row]["expected"] for row in rpi}},
        data={"validation": items.source, "attacked": {"examples": len(items.items), "left_out": items.left_out}},
        seed=args.seed,
        wall_seconds=time.time() - start,
        matrix=matrix,
        random_precision=rpi,
        protection=protected,
        settings=settings | {name: getattr(args, name) for name in REPORTING if name != "output_dir"},
    )
    write_json_atomic(data_args.record_file or os.path.join(args.output_dir, "record.json"), record)


if __name__ == "__main__":
    with plain_errors():
        main()
