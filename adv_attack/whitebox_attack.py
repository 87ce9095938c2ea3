#!/usr/bin/env python
"""GBDA, a white-box attack on a text classifier at any bit-width, at a random one, or averaged over several (EOT).

    bash attack.sh --attack_bits 4
    python whitebox_attack.py --model_name_or_path results/train --dataset_name ag_news --attack_bits eot \\
        --precision_set 4 6 8 --num_samples 1000 --output_dir results/attack_eot

The mathematics is in gbda.py; the defaults are those of the code released with the paper. The output folder gets
adversarial.json (texts only) and record.json. The same command resumes a killed attack, batch by batch, and does
nothing after a finished one: all random numbers are functions of --seed and of the number of the text in its file, so
the result is the same to the last digit.
"""

import dataclasses
import glob
import hashlib
import json
import logging
import math
import os
import random
import time
import types

import torch
from tqdm.auto import tqdm
from transformers import set_seed

import gbda
from attack_setup import ClassifierArguments, load_classifier, load_reference
from classifier import encode, hidden_states, last_position_logits, load_rows, pad_right
from common.arguments import option
from common.checksums import json_checksum, model_checksum, tokenizer_checksum
from common.flags import parse_args
from common.loading import load_tokenizer, resolve_configs
from common.record import differences, read_state, relative_path, run_record, write_state
from common.resuming import run_lock
from common.script import plain_errors, setup_logging
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
    for flag, allowed in {
        "adv_loss": ("cw", "ce"),
        "constraint": CONSTRAINTS,
        "candidate_tokens": ("all", "train"),
    }.items():
        if getattr(args, flag) not in allowed:
            raise UserError(f"--{flag} {getattr(args, flag)}: allowed are {', '.join(allowed)}")
    for flag in (
        "num_samples",
        "gumbel_batch",
        "gumbel_samples",
        "batch_texts",
        "max_elements",
        "candidate_min_count",
    ):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    for flag in ("start_index", "num_iters", "lr", "initial_coeff", "kappa", "lam_sim", "lam_perp"):
        if not (math.isfinite(getattr(args, flag)) and getattr(args, flag) >= 0):
            raise UserError(f"--{flag} {getattr(args, flag)}: must be a number that is not negative")
    if args.attack_bits in ("random", "eot") and len(set(args.precision_set)) < 2:
        raise UserError(f"--attack_bits {args.attack_bits}: --precision_set needs at least two precisions")


def number_seed(*words):
    """An integer below 2**63 that depends on all the words, for a generator."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:8], "big") >> 1


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


class Attack:
    """GBDA on one classifier.

    Args:
        model, reference: classifier and reference language model, frozen.
        candidates: (V,) token ids that Theta ranges over. idf: (vocabulary,).
        precisions: resolved configs: one, or those of `random` and `eot`.
    """

    def __init__(self, model, reference, tokenizer, candidates, idf, precisions, args):
        self.model, self.reference, self.tokenizer, self.args = model, reference, tokenizer, args
        self.device = model.device
        self.candidates, self.idf, self.precisions = candidates.to(self.device), idf, precisions
        self.column = {token: column for column, token in enumerate(candidates.tolist())}
        self.embedding = model.transformer.wte.weight[self.candidates]  # (V, H)
        self.reference_embedding = reference.transformer.wte.weight[self.candidates]
        # LoRA on the reference model's own weights: one product pi @ E serves both models.
        self.one_embedding = torch.equal(self.embedding, self.reference_embedding)

    def step_precisions(self, step):
        """The configs that step `step` attacks: a function of seed and step."""
        if self.args.attack_bits == "random":
            return [random.Random(f"{self.args.seed}-{step}").choice(self.precisions)]
        return self.precisions

    def adversarial_loss(self, embeds, lengths, labels, step):
        """(B,) loss of relaxed inputs (B, S, T, H), averaged over the precisions of the step."""
        samples = embeds.shape[1]
        precisions, total = self.step_precisions(step), 0.0
        for config in precisions:
            with self.model.bit_config(config):
                logits = last_position_logits(self.model, lengths.repeat_interleave(samples), embeds.flatten(0, 1))
            logits = logits.float().unflatten(0, (-1, samples))
            if self.args.adv_loss == "cw":
                total = total + gbda.margin_loss(logits, labels, self.args.kappa)
            else:
                total = total + gbda.negative_cross_entropy(logits, labels)
        return total / len(precisions)

    def losses(self, theta, noise, batch, step):
        """(adversarial, similarity, negative log-likelihood) of relaxed samples, each (B,), means over the samples."""
        args, lengths = self.args, batch.lengths
        pi = gbda.gumbel_softmax_sample(theta[:, None], noise)  # (B, S, T, V)
        embeds = pi @ self.embedding
        adversarial = self.adversarial_loss(embeds, lengths, batch.labels, step)
        if not (args.lam_perp or (args.lam_sim and args.constraint != "none")):
            return adversarial, torch.zeros_like(adversarial), torch.zeros_like(adversarial)
        inputs = embeds if self.one_embedding else pi @ self.reference_embedding
        hidden = hidden_states(self.reference, inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])  # (B, S, T, H)
        nll = gbda.tied_soft_negative_log_likelihood(hidden, inputs, self.reference_embedding, lengths[:, None])
        if args.constraint == "none":
            alike = torch.zeros_like(nll)
        elif args.constraint == "cosine":
            rows = torch.arange(len(lengths), device=self.device)
            alike = gbda.last_token_cosine(batch.hidden[rows, lengths - 1][:, None], hidden[rows, :, lengths - 1])
        else:
            weights = batch.idf[:, None] if args.constraint == "bertscore_idf" else None
            alike = gbda.similarity(batch.hidden[:, None], hidden, weights, lengths[:, None])
        return adversarial, alike.mean(-1), nll.mean(-1)

    def prepare(self, texts):
        """Tensors of a batch. texts: dicts with "index", "label", "tokens"."""
        ids, lengths = pad_right([text["tokens"] for text in texts], self.tokenizer.eos_token_id)
        columns, _ = pad_right([[self.column[token] for token in text["tokens"]] for text in texts], 0)
        batch = types.SimpleNamespace(
            ids=ids.to(self.device),
            columns=columns.to(self.device),
            lengths=lengths.to(self.device),
            labels=torch.tensor([text["label"] for text in texts], device=self.device),
            idf=self.idf[ids].to(self.device),
            generators=[
                torch.Generator(self.device).manual_seed(number_seed(self.args.seed, "noise", text["index"]))
                for text in texts
            ],
        )
        with torch.no_grad():
            batch.hidden = hidden_states(self.reference, self.reference.transformer.wte(batch.ids))
        return batch

    def noise(self, batch, samples):
        """(B, samples, T, V) Gumbel noise, zero on padding: drawn text by text, so it does not depend on the batch."""
        size = len(self.candidates)
        noise = torch.zeros(len(batch.ids), samples, batch.ids.shape[1], size, device=self.device)
        for row, length, generator in zip(noise, batch.lengths.tolist(), batch.generators, strict=True):
            for sample in row:
                sample[:length] = gbda.gumbel_noise((length, size), generator)
        return noise

    def optimize(self, batch):
        """(Theta (B, T, V), the three losses of the last step, each (B,))."""
        args = self.args
        theta = torch.zeros(*batch.ids.shape, len(self.candidates), device=self.device)
        theta.scatter_(-1, batch.columns[..., None], args.initial_coeff)
        theta.requires_grad_(True)
        optimizer = torch.optim.Adam([theta], lr=args.lr)
        fixed = torch.zeros_like(batch.ids, dtype=torch.bool)  # upstream freezes the first and the last position
        fixed[:, 0] = True
        fixed[torch.arange(len(fixed)), batch.lengths - 1] = True
        chunk = max(1, min(args.gumbel_batch, args.max_elements // theta.numel()))
        parts = torch.zeros(3, len(theta), device=self.device)
        for step in range(args.num_iters):
            parts.zero_()
            optimizer.zero_grad()
            for first in range(0, args.gumbel_batch, chunk):
                share = min(chunk, args.gumbel_batch - first) / args.gumbel_batch
                with torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16):
                    terms = self.losses(theta, self.noise(batch, min(chunk, args.gumbel_batch - first)), batch, step)
                adversarial, alike, nll = terms
                (share * (adversarial - args.lam_sim * alike + args.lam_perp * nll).sum()).backward()
                parts += share * torch.stack(terms).detach()
            theta.grad[fixed] = 0
            optimizer.step()
        return theta.detach(), parts

    def hard_samples(self, probabilities, number, generator):
        """`number` texts drawn from independent categoricals (T, V): decoded, since that is what a reader gets."""
        drawn = torch.multinomial(probabilities, number, replacement=True, generator=generator)  # (T, number)
        return self.tokenizer.batch_decode(self.candidates[drawn.t()].tolist())

    def initial_samples(self, text, number):
        """Texts drawn from the Theta before optimization, without building it: keep a token or take any other."""
        draw = random.Random(number_seed(self.args.seed, "initial", text["index"]))
        keep = gbda.survival_probability(self.args.initial_coeff, len(self.candidates))
        others = self.candidates.tolist()

        def one(token):
            while draw.random() >= keep:
                if (other := draw.choice(others)) != token:
                    return other
            return token

        return self.tokenizer.batch_decode([[one(token) for token in text["tokens"]] for _ in range(number)])

    def run(self, texts):
        """Attack a batch. Returns one JSON row a text."""
        batch = self.prepare(texts)
        theta, parts = self.optimize(batch)
        rows = []
        for place, text in enumerate(texts):
            length = len(text["tokens"])
            probabilities = theta[place, :length].softmax(-1)  # (T, V)
            samples = self.hard_samples(probabilities, self.args.gumbel_samples, batch.generators[place])
            losses = dict(zip(("adversarial", "similarity", "nll"), parts[:, place].tolist(), strict=True))
            rows.append(
                {
                    **text,
                    "idf": [round(value, 5) for value in self.idf[text["tokens"]].tolist()],
                    "samples": samples,
                    "initial_samples": self.initial_samples(text, self.args.gumbel_samples),
                    "theta": self.summary(probabilities, text["tokens"]),
                    "last_losses": losses if self.args.num_iters else None,
                }
            )
        return rows

    def summary(self, probabilities, tokens):
        """What Theta became where it moved: [position, p(original), [[token, p], ...]] with the three likeliest."""
        own = probabilities.gather(-1, torch.tensor([[self.column[t]] for t in tokens], device=self.device))[:, 0]
        top = probabilities.topk(min(3, probabilities.shape[-1]), -1)
        return [
            [place, round(own[place].item(), 4), [
                [self.tokenizer.decode([self.candidates[column].item()]), round(p, 4)]
                for column, p in zip(top.indices[place].tolist(), top.values[place].tolist(), strict=True)
            ]]
            for place in range(len(tokens)) if own[place] < 0.9
        ]  # fmt: skip


def candidate_tokens(train_tokens, texts, tokenizer, args):
    """(V,) sorted token ids of Theta; the attacked texts' own tokens are always among them."""
    if args.candidate_tokens == "all":
        return torch.arange(tokenizer.vocab_size)
    counts = torch.bincount(torch.tensor([token for tokens in train_tokens for token in tokens]))
    counts = torch.nn.functional.pad(counts, (0, max(0, len(tokenizer) - len(counts))))
    frequent = (counts >= args.candidate_min_count).nonzero().flatten()
    own = torch.tensor([token for text in texts for token in text["tokens"]])
    return torch.cat([frequent, own]).unique()


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
        for name in ("parts/*", RESULT_FILE, "record.json"):
            for old in glob.glob(os.path.join(glob.escape(args.output_dir), name)):
                os.remove(old)
        write_state(path, settings)
    elif changed := differences(before, settings):
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"--output_dir {args.output_dir} holds an attack with other settings ({'; '.join(changed[:5])}{more}): "
            "pass --overwrite_output_dir to start over, or another --output_dir"
        )


def attack_all(attack, texts, args):
    """({position: row}, seconds of the attack over all runs). One file a batch, so a killed run resumes."""
    batches = make_batches([len(text["tokens"]) for text in texts], len(attack.candidates), args)
    rows, seconds = {}, 0.0
    with tqdm(total=len(texts), desc=f"attack at {args.attack_bits}", unit="text") as bar:
        for number, batch in enumerate(batches):
            path = os.path.join(args.output_dir, "parts", f"{number:05d}.json")
            part = read_state(path)
            if part is None:
                start = time.time()
                found = attack.run([texts[position] for position in batch])
                part = {"rows": found, "seconds": time.time() - start}
                write_state(path, part)
            rows |= dict(zip(batch, part["rows"], strict=True))
            seconds += part["seconds"]
            bar.update(len(batch))
    return rows, seconds


def main():
    start = time.time()
    model_args, data_args, args = parse_args(ClassifierArguments, TextArguments, AttackArguments)
    setup_logging(types.SimpleNamespace(process_index=0))
    check_args(args)
    set_seed(args.seed)
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
    idf = gbda.inverse_document_frequency(train_tokens, len(tokenizer))
    candidates = candidate_tokens(train_tokens, texts, tokenizer, args)

    settings = dataclasses.asdict(args) | {
        "max_seq_length": length,
        "model_sha256": model_checksum(model),
        "reference_sha256": model_checksum(reference),
        "tokenizer_sha256": tokenizer_checksum(tokenizer),
        "data": {split: {"examples": len(found), "sha256": json_checksum(found)} for split, found in rows.items()},
        "precisions": precisions,
        "execution": model_args.execution,
        "attention": model.config._attn_implementation,
        "candidates": len(candidates),
        "initial_probability": gbda.survival_probability(args.initial_coeff, len(candidates)),
    }
    del settings["output_dir"], settings["overwrite_output_dir"]
    settings = json.loads(json.dumps(settings))
    _lock = run_lock(args.output_dir)
    start_output_dir(args, settings)
    result_path = os.path.join(args.output_dir, RESULT_FILE)
    record_path = data_args.record_file or os.path.join(args.output_dir, "record.json")
    if all((read_state(path) or {}).get("settings") == settings for path in (result_path, record_path)):
        logger.info("%s: this attack is finished; nothing to do", args.output_dir)
        return
    attack = Attack(model, reference, tokenizer, candidates, idf, list(precisions.values()), args)
    found, seconds = attack_all(attack, texts, args)
    result = {"settings": settings, "texts": [found[position] for position in range(len(texts))]}
    write_state(result_path, result)
    record = run_record(
        model=relative_path(model_args.model_name_or_path),
        bit_config={"attack_bits": args.attack_bits, "precisions": list(precisions)},
        metrics={"attack_seconds": round(seconds, 1), "seconds_per_text": round(seconds / len(texts), 3)},
        data=sources,
        seed=args.seed,
        wall_seconds=time.time() - start,
        reference_model=relative_path(reference_name),
        settings=settings,
    )
    write_state(record_path, record)
    logger.info("%d texts, %.2f s a text: %s", len(texts), seconds / len(texts), args.output_dir)


if __name__ == "__main__":
    with plain_errors():
        main()
