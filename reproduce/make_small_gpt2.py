"""Pretrain a small stock GPT-2 on text files, with a given tokenizer: a base where GPT-2's own weights cannot be had.

    python reproduce/make_small_gpt2.py --text_files text.txt --validation_file more.txt --tokenizer gpt2-tokenizer \\
        --bf16 --output_dir small_gpt2

Text is UTF-8; a line <|endoftext|> ends a document. 8 blocks of 256 with heads of 64 and 512 positions: 19 million
weights, 13 of them the embedding of GPT-2's 50,257 tokens. AdamW for all weights, which lets outlier channels grow;
--outlier_factor puts some in before. A killed run resumes when the same command is given again. The folder works as
--model_name_or_path of every script. The record has the perplexity of the validation file and, on its windows, the
largest over the median input channel of every linear.
"""

import dataclasses
import hashlib
import os
import re
import sys
import time

import torch
import torch.nn.functional as F
from tqdm.auto import trange
from transformers import GPT2Config, GPT2LMHeadModel, default_data_collator, set_seed

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.join(ROOT, "language_model"), os.path.join(ROOT, "quickstart")]
from common.arguments import HubArguments, option  # noqa: E402
from common.calibration import input_rms, outlier_ratios  # noqa: E402
from common.checksums import tensors_checksum, tokenizer_checksum  # noqa: E402
from common.flags import parse_args, refuse  # noqa: E402
from common.loading import describe_model, load_tokenizer  # noqa: E402
from common.record import relative_path, run_record, write_json_atomic  # noqa: E402
from common.resuming import OutputFolder, run_settings  # noqa: E402
from common.script import plain_errors, setup_logging  # noqa: E402
from common.trainer import ResumableTrainer  # noqa: E402
from common.training_args import TrainingArguments  # noqa: E402
from make_model import END, put_in_outliers  # noqa: E402
from models.checkpoint import read_config  # noqa: E402
from models.errors import UserError  # noqa: E402
from models.modeling_gpt2_quant import QuantGPT2LMHeadModel  # noqa: E402
from models.user_input import read_text  # noqa: E402
from perplexity import perplexity  # noqa: E402

SHAPE = {"n_layer": 8, "n_embd": 256, "n_positions": 512}
HEAD = 64  # channels
OUTLIER_WINDOWS = 256
EVAL_BATCH = 4  # windows, whose logits are held as a whole
# On a CPU 2.6 times as fast as the logits of the whole batch (bf16, 50,257 tokens).
CHUNKS = {"batch_chunk_size": 256, "chunking_method": None, "acc_policy": "balanced"}


@dataclasses.dataclass
class PretrainingArguments:
    """The text, the model and the training."""

    text_files: list[str] = dataclasses.field(kw_only=True, metadata={"help": "UTF-8 text to train on"})
    validation_file: str = dataclasses.field(kw_only=True, metadata={"help": "UTF-8 text to measure on"})
    tokenizer: str = dataclasses.field(kw_only=True, metadata={"help": "folder of GPT-2's tokenizer"})
    output_dir: str = dataclasses.field(kw_only=True, metadata={"help": "folder of the model and its checkpoints"})
    init_from: str | None = option(None, "folder of a stock GPT-2 to go on from")
    n_layer: int | None = option(None, f"blocks (default: {SHAPE['n_layer']})")
    n_embd: int | None = option(None, f"width, a multiple of {HEAD} (default: {SHAPE['n_embd']})")
    n_positions: int | None = option(None, f"tokens of a training window (default: {SHAPE['n_positions']})")
    outlier_factor: float = option(
        1.0, "gain of the largest outlier channel put into every ln_1 and ln_2 at the start; two more get 1/2 and 1/3"
    )
    max_steps: int = option(2000, "optimizer steps")
    batch_size: int = option(16, "windows of a step")
    learning_rate: float = option(1e-3, "at its highest: warm-up over a 20th of the steps, then cosine")
    bf16: bool = option(False, "autocast to bfloat16: about twice as fast on CPUs that have it")
    save_steps: int = option(100, "steps between checkpoints, of which two are kept")
    seed: int = option(42, "seed of weights, outlier channels and batches")
    overwrite_output_dir: bool = option(False, "start over in a used --output_dir; deletes its checkpoints")
    record_file: str | None = option(None, "where the run's JSON record goes (default: record.json in --output_dir)")


def check_args(args):
    """Refuse numbers and folders that cannot work, before anything is loaded."""
    for name in (*SHAPE, "max_steps", "batch_size", "save_steps"):
        least = 2 if name == "n_positions" else 1
        if getattr(args, name) is not None and getattr(args, name) < least:
            refuse(name, getattr(args, name), f"{least} or more")
    if args.n_embd and args.n_embd % HEAD:
        refuse("n_embd", args.n_embd, f"a multiple of {HEAD}, the width of a head")
    if not 1 <= args.outlier_factor <= 1000:
        refuse("outlier_factor", args.outlier_factor, "1 (none) to 1000")
    if args.learning_rate == 0:
        refuse("learning_rate", args.learning_rate, "a number above 0")
    for name in ("tokenizer", "init_from"):
        if (folder := getattr(args, name)) is not None and not os.path.isdir(folder):
            raise UserError(f"--{name} {folder}: no such folder")
    if given := [f"--{name}" for name in SHAPE if args.init_from and getattr(args, name) is not None]:
        raise UserError(f"{', '.join(given)}: with --init_from the model's own")


def read_documents(path):
    """Texts of the documents of a file. Raises UserError: no file, not UTF-8, no text."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    parts = re.split(f"^{re.escape(END)}$", read_text(path), flags=re.MULTILINE)
    documents = [part.strip("\n") for part in parts if part.strip()]
    if not documents:
        raise UserError(f"{path}: no text in it")
    return documents


def tokens_of(documents, tokenizer):
    """Token ids of the documents, each ended by the end-of-text token, (tokens,) int64."""
    found = []
    for at in trange(0, len(documents), 100, desc="tokens", unit="00 documents", leave=False):
        batch = tokenizer(documents[at : at + 100], return_attention_mask=False, verbose=False)["input_ids"]
        found += [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in batch]
    return torch.cat(found)


def source_of(paths, tokens):
    """What a record says about files that were read as one text."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(file.read())
    source = " ".join(map(relative_path, paths))
    return {"source": source, "examples": len(tokens), "sha256": digest.hexdigest()}


def build_model(args, tokenizer):
    """The stock GPT-2 to train: new weights, or those of --init_from. No dropout: hardly a text is seen twice."""
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    if args.init_from:
        if read_config(args.init_from, {})[2]:
            raise UserError(f"--init_from {args.init_from}: a checkpoint of ours; allowed are stock GPT-2 weights")
        QuantGPT2LMHeadModel.from_pretrained(args.init_from)  # refuses weights that are damaged or not complete
        model = GPT2LMHeadModel.from_pretrained(args.init_from, dtype=torch.float32, **dropout)
        if len(tokenizer) != model.config.vocab_size:
            sizes = f"{model.config.vocab_size} tokens, --tokenizer {args.tokenizer} {len(tokenizer)}"
            raise UserError(f"--init_from {args.init_from}: {sizes}: they do not belong together")
    else:
        shape = {name: getattr(args, name) or size for name, size in SHAPE.items()}
        shape |= {"n_head": shape["n_embd"] // HEAD, "vocab_size": len(tokenizer)}
        ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
        # GPT-2's gelu_new as one kernel
        model = GPT2LMHeadModel(GPT2Config(activation_function="gelu_pytorch_tanh", **shape, **ends, **dropout))
    put_in_outliers(model, args.outlier_factor, args.seed)
    return model


class PretrainingTrainer(ResumableTrainer):
    """Next-token training whose loss, on a CPU, never holds the logits of a whole batch. Under bf16 the loss that is
    shown there is rounded to bf16; the gradients are those of the full logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]
        half = torch.bfloat16 if self.args.bf16 else torch.float32
        with torch.autocast(ids.device.type, half, enabled=self.args.bf16):  # accelerate's is in the model's forward
            hidden = model.transformer(ids, use_cache=False).last_hidden_state[:, :-1]
        hidden, weight = hidden.flatten(0, 1).to(half), model.lm_head.weight.to(half)
        targets = ids[:, 1:].flatten()
        if ids.device.type == "cpu":
            options = torch.nn.LinearCrossEntropyOptions(**CHUNKS)
            loss = F.linear_cross_entropy(hidden, weight, targets, options=options).float()
        else:
            loss = F.cross_entropy(F.linear(hidden, weight).float(), targets)
        if not torch.isfinite(loss):
            step = self.state.global_step + 1
            raise FloatingPointError(f"loss is {loss.item()} at step {step}: try a lower --learning_rate")
        return loss


def training_arguments(args):
    return TrainingArguments(
        output_dir=args.output_dir,
        do_train=True,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.max_steps // 20,
        weight_decay=0.1,
        adam_beta2=0.98,
        bf16=args.bf16,
        seed=args.seed,
        save_steps=args.save_steps,
        save_total_limit=2,
        logging_steps=10,
        report_to="none",
    )


def measure(args, device, tokens):
    """(description of the model with its outliers, perplexity) on the validation tokens."""
    model = QuantGPT2LMHeadModel.from_pretrained(args.output_dir).to(device)
    size = model.config.n_positions
    windows = tokens.unfold(0, size, size)[:OUTLIER_WINDOWS].tolist()
    outliers = outlier_ratios(input_rms(model, windows))
    found = perplexity(model, tokens, size, size // 2, EVAL_BATCH, torch.bfloat16 if args.bf16 else None)
    return describe_model(model) | {"outlier_windows": len(windows), "outliers": outliers}, found


def main():
    start = time.time()
    (args,) = parse_args(PretrainingArguments)
    check_args(args)
    training_args = training_arguments(args)
    setup_logging(training_args)
    texts = {"train": args.text_files, "validation": [args.validation_file]}
    documents = {split: [text for path in paths for text in read_documents(path)] for split, paths in texts.items()}
    settings = run_settings(args, training_args)
    for name in ("text_files", "tokenizer", "init_from"):  # compared by checksum
        settings.pop(name)
    folder = OutputFolder(training_args, args.overwrite_output_dir, settings)

    tokenizer = load_tokenizer(HubArguments(tokenizer_name=args.tokenizer))
    if tokenizer.eos_token_id is None:
        raise UserError(f"--tokenizer {args.tokenizer}: it has no end-of-text token")
    tokenizer.pad_token = None  # as GPT-2's own, and the model's
    set_seed(args.seed)
    model = build_model(args, tokenizer)
    tokens, size = {split: tokens_of(texts, tokenizer) for split, texts in documents.items()}, model.config.n_positions
    for split, found in tokens.items():
        if len(found) < size:
            raise UserError(f"{' '.join(texts[split])}: {len(found)} tokens; at least {size}, one window, are needed")
    sources = {split: source_of(paths, tokens[split]) for split, paths in texts.items()}
    checksums = {"model": tensors_checksum(model.state_dict()), "tokenizer": tokenizer_checksum(tokenizer)}
    folder.start(**checksums, train=sources["train"]["sha256"])

    rows = [{"input_ids": window} for window in tokens["train"].unfold(0, size, size)]
    parts = {"train_dataset": rows, "data_collator": default_data_collator, "processing_class": tokenizer}
    trainer = PretrainingTrainer(model=model, args=training_args, **parts)
    metrics = trainer.train_or_load(folder)
    description, found = measure(args, training_args.device, tokens["validation"])
    print(f"perplexity of {args.validation_file}: {found:.2f}", flush=True)
    print(f"largest over median input channel: up to {max(description['outliers'].values()):.1f}", flush=True)
    record = run_record(
        model=relative_path(args.init_from) if args.init_from else "new weights",
        bit_config=description,
        metrics=metrics | {"eval_perplexity": found},
        data=sources,
        seed=args.seed,
        wall_seconds=time.time() - start,
        steps=trainer.state.global_step,
        continues=folder.continues,
        dtype=training_args.run_dtype,
    )
    write_json_atomic(args.record_file or os.path.join(args.output_dir, "record.json"), record)


if __name__ == "__main__":
    with plain_errors():
        main()
