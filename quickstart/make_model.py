"""Pretrain a tiny stock GPT-2, with its own tokenizer, on the text that make_data.py wrote.

    python quickstart/make_model.py --data_dir quickstart/data --output_dir quickstart/model   # about 3 min on 2 cores

    python quickstart/make_model.py --text_file train.jsonl --tokenizer path/to/gpt2 --output_dir small_gpt2

The second form takes any text (rows with "text" as JSON lines, or documents separated by blank lines) and the
vocabulary of an existing tokenizer: a stand-in for pretrained weights where there is no hub.

The folder works as --model_name_or_path of every script. 4 blocks of width 128 with 4 heads, about 1 million weights.
Outlier channels as those of pretrained language models do not grow in so short a training, so they are put in at its
start (`put_in_outliers`), and all weights then live with them; how large is an assumption, --outlier_factor.
Two values differ from GPT-2's: no dropout (the text is seen once or twice), and initializer_range 0.08, since 0.02 is
small for a width of 128 (1/sqrt(128) is 0.09) and learned more slowly.
"""

import argparse
import hashlib
import json
import math
import os
import random
import tempfile
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn import functional
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast, get_cosine_schedule_with_warmup

END = "<|endoftext|>"
POSITIONS = 256  # the longest document has about 130 tokens


OUTLIERS = 3  # channels of every LayerNorm


def put_in_outliers(model: GPT2LMHeadModel, factor: float, seed: int):
    """Scales the gains of OUTLIERS channels, the same in every block, by factor, factor / 2, factor / 3, and their
    columns in the linear that reads them by the inverse: the same function. Only a start: training moves both."""
    channels = random.Random(seed).sample(range(model.config.n_embd), OUTLIERS)
    for block in model.transformer.h:
        for norm, linear in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc)):
            for k, channel in enumerate(channels, 1):
                gain = max(factor / k, 1.0)
                norm.weight.data[channel] *= gain
                norm.bias.data[channel] *= gain  # 0 in new weights
                linear.weight.data[channel] /= gain  # Conv1D: (in, out)


def train_tokenizer(documents: list, vocab_size: int) -> GPT2TokenizerFast:
    """Returns a byte-level BPE tokenizer with GPT-2's one special token."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size=vocab_size, special_tokens=[END], show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        bpe.save(f"{folder}/tokenizer.json")
        special = {"bos_token": END, "eos_token": END, "unk_token": END}
        return GPT2TokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", model_max_length=POSITIONS, **special)


def read_documents(path: Path) -> list:
    """Returns the documents of a text file (separated by blank lines) or of JSON lines (key "text").

    Raises: ValueError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # without the byte-order mark that some editors put first
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    if not text.strip():
        raise ValueError(f"{path}: no text in it")
    if path.suffix != ".jsonl":
        return text.strip().split("\n\n")
    documents = []
    for number, line in enumerate(text.strip().split("\n"), 1):
        try:
            documents.append(json.loads(line)["text"])
            documents[-1].encode("utf-8")  # refuses lone surrogates, and what is no text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f'{path}, line {number}: want a JSON object with "text", found {line[:60]!r}') from None
    return documents


def make_batches(sequences: list, batch_size: int, steps: int, seed: int):
    """Yields `steps` batches of token lists of similar length, passing over the text again when it ends."""
    rng, window = random.Random(seed), 50 * batch_size  # sorted by length within 50 batches, so little padding
    batches = []
    for _ in range(steps):
        if not batches:
            order = rng.sample(range(len(sequences)), len(sequences))
            for i in range(0, len(order), window):
                by_length = sorted(order[i : i + window], key=lambda j: len(sequences[j]))
                batches += [by_length[k : k + batch_size] for k in range(0, len(by_length), batch_size)]
            rng.shuffle(batches)
        yield [sequences[j] for j in batches.pop()]


def pretrain(model: GPT2LMHeadModel, sequences: list, args: argparse.Namespace):
    """Trains `model` on the next token of `sequences` (lists of token ids), with a progress bar."""
    adam = {"betas": (0.9, 0.98), "weight_decay": 0.05, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, **adam)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.max_steps // 20, args.max_steps)
    batches = make_batches(sequences, args.batch_size, args.max_steps, args.seed)
    bar = tqdm(batches, total=args.max_steps, desc="pretraining", mininterval=1)
    for batch in bar:
        longest = max(map(len, batch))
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in batch])
        labels = torch.tensor([ids + [-100] * (longest - len(ids)) for ids in batch])
        logits = model(ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_dir", type=Path, help="folder that make_data.py wrote")
    source.add_argument("--text_file", type=Path, help="other text: .jsonl rows with text, or blank lines between")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer to take (default: train one)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    parser.add_argument("--n_layer", type=int, default=4, help="number of blocks (default: 4)")
    parser.add_argument("--n_embd", type=int, default=128, help="width (default: 128)")
    parser.add_argument("--n_head", type=int, default=4, help="attention heads (default: 4)")
    parser.add_argument("--vocab_size", type=int, default=1400, help="tokens of the vocabulary (default: 1400)")
    parser.add_argument("--max_steps", type=int, default=2000, help="optimizer steps (default: 2000)")
    parser.add_argument("--batch_size", type=int, default=16, help="documents a step (default: 16)")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak, cosine schedule (default: 2e-3)")
    text = "outlier channels at the start: this, 1/2 and 1/3 of it; 1: none (default: 30)"
    parser.add_argument("--outlier_factor", type=float, default=30.0, help=text)
    args = parser.parse_args()
    text_file, manifest_file = args.text_file or args.data_dir / "pretrain.txt", args.output_dir / "manifest.json"
    if not text_file.is_file():
        cure = f"; run make_data.py --output_dir {args.data_dir} first" if args.data_dir else ""
        parser.error(f"{text_file} does not exist{cure}")
    if args.tokenizer and not args.tokenizer.is_dir():
        parser.error(f"--tokenizer {args.tokenizer} is not a folder")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir} is a file, not a folder")
    for flag in ("n_layer", "n_embd", "n_head", "vocab_size", "max_steps", "batch_size"):
        least = 257 if flag == "vocab_size" else 1
        if getattr(args, flag) < least:
            parser.error(f"--{flag} {getattr(args, flag)}: must be at least {least}")
    if not 0 < args.learning_rate < math.inf:
        parser.error(f"--learning_rate {args.learning_rate}: must be a number above 0")
    if not 1 <= args.outlier_factor <= 1000:
        parser.error(f"--outlier_factor {args.outlier_factor}: must be a number, 1 to 1000")
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not a multiple of --n_head {args.n_head}")

    text = text_file.read_bytes()
    paths = ("data_dir", "output_dir", "text_file", "tokenizer")
    manifest = {name: value for name, value in vars(args).items() if name not in paths}
    manifest["script_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    manifest["text_sha256"] = hashlib.sha256(text).hexdigest()
    if args.tokenizer:
        loaded = GPT2TokenizerFast.from_pretrained(args.tokenizer)
        manifest["tokenizer_sha256"] = hashlib.sha256(loaded.backend_tokenizer.to_str().encode()).hexdigest()
    if manifest_file.is_file() and manifest_file.read_text() == json.dumps(manifest, indent=1):
        print(f"{args.output_dir} is up to date")
        return

    torch.manual_seed(args.seed)
    try:
        documents = read_documents(text_file)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output_dir).close()  # before minutes of training, not after
    except (ValueError, OSError) as error:
        parser.error(str(error))
    tokenizer = loaded if args.tokenizer else train_tokenizer(documents[:8000], args.vocab_size)
    end = tokenizer.eos_token_id
    sequences = [(ids + [end])[:POSITIONS] for ids in tokenizer(documents)["input_ids"]]
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=args.n_embd,
        n_layer=args.n_layer,
        n_head=args.n_head,
        activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new as one kernel
        initializer_range=0.08,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end),
    )
    model = GPT2LMHeadModel(config)
    put_in_outliers(model, args.outlier_factor, args.seed)
    pretrain(model, sequences, args)

    # The files move in from a temporary folder, the manifest last, so a killed run leaves no folder that looks ready.
    manifest_file.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output_dir) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        Path(part, "manifest.json").write_text(json.dumps(manifest, indent=1))
        for file in sorted(Path(part).iterdir(), key=lambda path: path.name == "manifest.json"):
            os.replace(file, args.output_dir / file.name)
    print(f"wrote {args.output_dir}: {model.num_parameters():,} weights, vocabulary of {len(tokenizer)}")


if __name__ == "__main__":
    main()
