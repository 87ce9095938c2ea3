#!/usr/bin/env python
"""GBDA, a white-box attack on a text classifier at any bit-width, at a random one, or averaged over several (EOT).

    bash attack.sh --attack_bits 4
    python whitebox_attack.py --model_name_or_path results/train --dataset_name ag_news --attack_bits eot \\
        --precision_set 4 6 8 --num_samples 1000 --output_dir results/attack_eot

The mathematics is in gbda.py; the defaults are those of the code released with the paper. The output folder gets
adversarial.json (texts only) and record.json, and the rotation of --quantizer rotated where the classifier has none,
for eval.py and random_precision_inference.py. The same command resumes a killed attack, batch by batch, and does
nothing after a finished one: all random numbers are functions of --seed and of the number of the text in its file, so
the result is the same to the last digit.
"""

import dataclasses
import glob
import json
import logging
import math
import os
import random
import time
import types

from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import set_seed

import gbda
from attack_setup import ROTATION_FILE, ClassifierArguments, load_classifier, load_reference, set_attack_quantizer
from classifier import calibration_texts, encode, load_rows
from common.arguments import option
from common.checksums import json_checksum, model_checksum, tokenizer_checksum
from common.flags import parse_args
from common.loading import load_tokenizer, resolve_configs
from common.record import atomic_path, differences, read_state, relative_path, run_record, write_state
from common.resuming import run_lock
from common.script import plain_errors, setup_logging
from gbda_attack import Attack, candidate_tokens
from models.errors import UserError
from text_classification import TextArguments
from text_data import check_labels

logger = logging.getLogger("whitebox_attack")
SETTINGS_FILE, RESULT_FILE = "attack_settings.json", "adversarial.json"
CONSTRAINTS = ("none", "cosine", "bertscore", "bertscore_idf")


@dataclasses.dataclass
class AttackArguments:
    """The attack. Defaults as released with the paper."""

    output_dir: str = dataclasses.field(metadata={"help": "folder of the adversarial texts and the record"})
    attack_bits: str = option("32", '32, 8, 4, "W4A8KV8", a JSON config, random (a draw per step) or eot (the mean)')
    precision_set: list[str] = option(["4", "8"], "the precisions of --attack_bits random and eot")
    num_samples: int = option(100, "texts to attack")
    start_index: int = option(0, "first of them in the shuffled validation data")
    data_seed: int = option(0, "seed of that shuffle")
    num_iters: int = option(100, "steps of Adam")
    lr: float = option(0.3, "learning rate of Adam")
    gumbel_batch: int = option(10, "relaxed samples a step", aliases=["--batch_size"])
    gumbel_samples: int = option(100, "hard samples kept of each text")
    initial_coeff: float = option(15.0, "initial score of the original tokens")
    adv_loss: str = option("cw", "cw (margin) or ce")
    kappa: float = option(5.0, "margin of --adv_loss cw, in logits")
    constraint: str = option("bertscore_idf", f"similarity: {', '.join(CONSTRAINTS)}")
    lam_sim: float = option(1.0, "weight of the similarity (the paper searched 20 to 200)")
    lam_perp: float = option(1.0, "weight of the negative log-likelihood")
    candidate_tokens: str = option("all", "vocabulary of Theta: all, or train: the tokens of the training texts")
    candidate_min_count: int = option(1, "for --candidate_tokens train: so many occurrences, at least")
    bf16: bool = option(False, "products in bf16 (autocast)")
    batch_texts: int = option(8, "texts optimized side by side, of similar length")
    max_elements: int = option(2**27, "numbers in the largest tensor; bounds the memory (a few of them are alive)")
    seed: int = option(42, "seed of all noise")
    overwrite_output_dir: bool = option(False, "start over in a used --output_dir")


def check_args(args):
    """Refuse what cannot work, before anything is loaded."""
    choices = {"adv_loss": ("cw", "ce"), "constraint": CONSTRAINTS, "candidate_tokens": ("all", "train")}
    for flag, allowed in choices.items():
        if getattr(args, flag) not in allowed:
            raise UserError(f"--{flag} {getattr(args, flag)}: allowed are {', '.join(allowed)}")
    for flag in "num_samples gumbel_batch gumbel_samples batch_texts max_elements candidate_min_count".split():
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    for flag in "start_index num_iters lr initial_coeff kappa lam_sim lam_perp".split():
        if not (math.isfinite(getattr(args, flag)) and getattr(args, flag) >= 0):
            raise UserError(f"--{flag} {getattr(args, flag)}: must be a number that is not negative")
    if args.attack_bits in ("random", "eot") and len(set(args.precision_set)) < 2:
        raise UserError(f"--attack_bits {args.attack_bits}: --precision_set needs at least two precisions")


def choose_texts(rows, args):
    """[(index in the file, row)] of the texts to attack: the data shuffled by --data_seed, then a slice."""
    order = random.Random(args.data_seed).sample(range(len(rows)), len(rows))
    chosen = order[args.start_index : args.start_index + args.num_samples]
    if not chosen:
        raise UserError(f"--start_index {args.start_index}: there are only {len(rows)} texts")
    return [(index, rows[index]) for index in chosen]


def make_batches(lengths, vocab_size, args):
    """Positions of the texts, grouped by length within the memory bound. They depend on the whole list only."""
    order, batches = sorted(range(len(lengths)), key=lambda i: (lengths[i], i)), []
    for position in order:
        size = (len(batches[-1]) + 1) * args.gumbel_batch * lengths[position] * vocab_size if batches else 0
        if batches and len(batches[-1]) < args.batch_texts and size <= args.max_elements:
            batches[-1].append(position)
        else:
            batches.append([position])
    return batches


def start_output_dir(args, settings):
    """Make the output folder, or refuse that of another attack."""
    path = os.path.join(args.output_dir, SETTINGS_FILE)
    content = os.listdir(args.output_dir) if os.path.isdir(args.output_dir) else []
    content = [name for name in content if not name.startswith(".") and not name.endswith(".tmp")]  # of a killed start
    before = None
    if content and not args.overwrite_output_dir:
        if SETTINGS_FILE not in content:
            raise UserError(f"--output_dir {args.output_dir} is not empty and no attack: pass another one")
        before = read_state(path)
    if before is None:  # a fresh start, or settings that are damaged: nobody knows whose results these are
        for name in ("parts/*", RESULT_FILE, ROTATION_FILE, "record.json"):
            for old in glob.glob(os.path.join(glob.escape(args.output_dir), name)):
                os.remove(old)
        write_state(path, settings)
    elif changed := differences(before, settings):
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        found = f"--output_dir {args.output_dir} holds an attack with other settings ({'; '.join(changed[:5])}{more})"
        raise UserError(f"{found}: pass --overwrite_output_dir to start over, or another --output_dir")


def attack_all(run, batches, texts, args):
    """({position: row}, seconds of the attack over all runs). One file a batch, so a killed run resumes.

    Args: run: makes the rows of a batch of texts; batches: positions in `texts`.
    """
    rows, seconds = {}, 0.0
    with tqdm(total=len(texts), desc=f"attack at {args.attack_bits}", unit="text") as bar:
        for number, batch in enumerate(batches):
            path = os.path.join(args.output_dir, "parts", f"{number:05d}.json")
            part = read_state(path)
            if part is None:
                start = time.time()
                found = run([texts[position] for position in batch])
                part = {"rows": found, "seconds": time.time() - start}
                write_state(path, part)
            rows |= dict(zip(batch, part["rows"], strict=True))
            seconds += part["seconds"]
            bar.update(len(batch))
    return rows, seconds


def load_inputs(model_args, data_args, args):
    """All that an attack starts from, and the settings that tell it from another.

    Returns: namespace of tokenizer, model, reference, reference_name, texts (rows with index and tokens),
        train_tokens, idf, sources, quantizer, precisions ({name: resolved config}), settings.
    """
    tokenizer = load_tokenizer(model_args)
    model = load_classifier(model_args, tokenizer)
    reference_name, reference = load_reference(model_args, model)
    several = args.attack_bits in ("random", "eot")
    precisions = resolve_configs(model, args.precision_set if several else [args.attack_bits])
    rows, sources = load_rows(data_args, ["train", "validation"], model_args)
    check_labels(rows["validation"], model.config.num_labels, sources["validation"]["source"])
    positions = min(model.config.max_position_embeddings, reference.config.max_position_embeddings)
    length = min(data_args.max_seq_length, positions)
    chosen = choose_texts(rows["validation"], args)
    tokens = encode(tokenizer, [row["text"] for _, row in chosen], length)
    texts = [{"index": index, **row, "tokens": ids} for (index, row), ids in zip(chosen, tokens, strict=True)]
    train_tokens = encode(tokenizer, [row["text"] for row in rows["train"]], length)

    def windows():
        return calibration_texts(model, tokenizer, model_args, data_args, args.seed, rows["train"])

    kept = None if args.overwrite_output_dir else args.output_dir
    quantizer = set_attack_quantizer(model, model_args, kept, windows, args.seed)
    calibrated = (quantizer["quantizer"], quantizer["checkpoint_quantizer"]) == ("rotated", "minmax")
    settings = dataclasses.asdict(args) | {
        "max_seq_length": length,
        "model_sha256": model_checksum(model),
        "reference_sha256": model_checksum(reference),
        "tokenizer_sha256": tokenizer_checksum(tokenizer),
        "data": {split: {"examples": len(found), "sha256": json_checksum(found)} for split, found in rows.items()},
        "precisions": precisions,
        "execution": model_args.execution,
        "quantizer": model.config.quantizer,
        "calibration_samples": model_args.calibration_samples if calibrated else None,
        "attention": model.config._attn_implementation,
    }
    del settings["output_dir"], settings["overwrite_output_dir"]
    return types.SimpleNamespace(
        tokenizer=tokenizer,
        model=model,
        reference=reference,
        reference_name=reference_name,
        texts=texts,
        train_tokens=train_tokens,
        idf=gbda.inverse_document_frequency(train_tokens, len(tokenizer)),
        sources=sources,
        quantizer=quantizer,
        precisions=precisions,
        settings=settings,
    )


def attack_and_record(run, batches, inputs, model_args, data_args, args, start, summary=None):
    """The attack in its output folder: started, resumed, or finished already; texts and record are written there.

    Args: run: of `attack_all`, made by a call (a finished attack needs none); batches: positions in the texts;
        summary: further metrics of a list of rows; start: time.time() of the beginning.
    """
    settings = json.loads(json.dumps(inputs.settings))
    _lock = run_lock(args.output_dir)
    start_output_dir(args, settings)
    path = os.path.join(args.output_dir, ROTATION_FILE)
    if settings["calibration_samples"] and not os.path.isfile(path):
        with atomic_path(path) as temporary:
            save_file(inputs.model.rotations(), temporary)
    result_path = os.path.join(args.output_dir, RESULT_FILE)
    record_path = data_args.record_file or os.path.join(args.output_dir, "record.json")
    if all((read_state(path) or {}).get("settings") == settings for path in (result_path, record_path)):
        logger.info("%s: this attack is finished; nothing to do", args.output_dir)
        return
    found, seconds = attack_all(run(), batches, inputs.texts, args)
    rows = [found[position] for position in range(len(found))]
    write_state(result_path, {"settings": settings, "texts": rows})
    record = run_record(
        model=relative_path(model_args.model_name_or_path),
        bit_config={"attack_bits": args.attack_bits, "precisions": list(inputs.precisions), **inputs.quantizer},
        metrics={"attack_seconds": round(seconds, 1), "seconds_per_text": round(seconds / len(rows), 3)}
        | (summary(rows) if summary else {}),
        data=inputs.sources,
        seed=args.seed,
        wall_seconds=time.time() - start,
        reference_model=relative_path(inputs.reference_name),
        settings=settings,
    )
    write_state(record_path, record)
    logger.info("%d texts, %.2f s a text: %s", len(rows), seconds / len(rows), args.output_dir)


def main():
    start = time.time()
    model_args, data_args, args = parse_args(ClassifierArguments, TextArguments, AttackArguments)
    setup_logging(types.SimpleNamespace(process_index=0))
    check_args(args)
    set_seed(args.seed)
    inputs = load_inputs(model_args, data_args, args)
    candidates = candidate_tokens(inputs.train_tokens, inputs.texts, inputs.tokenizer, args)
    inputs.settings["candidates"] = len(candidates)
    inputs.settings["initial_probability"] = gbda.survival_probability(args.initial_coeff, len(candidates))

    def attack():
        parts = (inputs.model, inputs.reference, inputs.tokenizer, candidates, inputs.idf)
        return Attack(*parts, list(inputs.precisions.values()), args).run

    batches = make_batches([len(text["tokens"]) for text in inputs.texts], len(candidates), args)
    attack_and_record(attack, batches, inputs, model_args, data_args, args, start)


if __name__ == "__main__":
    with plain_errors():
        main()
