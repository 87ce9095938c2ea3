"""Fixtures: a tiny SQuAD-format data set and a tiny stock GPT-2 with its own tokenizer, made on the spot."""

import atexit
import contextlib
import functools
import hashlib
import importlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

import pytest

# Before anything of Hugging Face is imported: no network, and caches of the tests' own.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="tests-hf-home-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NAMES = ("Ada", "Ben", "Cleo", "Dora", "Egon", "Fina", "Gus", "Hana")
THINGS = ("kite", "drum", "lamp", "coin", "boat", "ring")
ROOT = pathlib.Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def experiment(folder):
    """`with experiment("switch_precision"): import run_qa` imports that folder's modules, not their namesakes.

    Every folder has a run_qa.py, and base_model is on pytest's path. The body gets modules of its own, which keep
    working afterwards; what sys.modules held under these names before comes back.
    """
    names = {path.stem for path in (ROOT / folder).iterdir()} | {"common", "models"}

    def take():
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in names}

    before = take()
    sys.path.insert(0, str(ROOT / folder))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT / folder))
        take()
        sys.modules.update(before)


class Parsed(Exception):
    """Carries what a script's own parser read out of its main()."""


@functools.cache
def load_script(path):
    """The module of a script of any folder; what it adds to sys.path and takes from there is gone afterwards, and
    transformers opens our checkpoints as before: its copy of the config may have come without the models."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    folder, _, name = path.rpartition("/")
    before, places, registered = dict(sys.modules), list(sys.path), dict(CONFIG_MAPPING._extra_content)
    with experiment(folder):
        script = importlib.import_module(name.removesuffix(".py"))
    for name in sys.modules.keys() - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(f"{ROOT}{os.sep}") and "site-packages" not in file:
            del sys.modules[name]
    sys.path[:] = places
    CONFIG_MAPPING._extra_content.update(registered)
    return script


def parse_flags(path, words, partial=False):
    """Namespace of a script's flags, as the parser in its main() reads them; nothing else of the script runs.

    partial: required flags may be missing.

    Raises: AssertionError for flags that it does not have, SystemExit for values that it does not take.
    """
    import argparse

    from transformers import HfArgumentParser

    def read(parser, args=None, namespace=None, **ignored):
        for action in parser._actions:
            action.required &= not partial
        found, unknown = argparse.ArgumentParser.parse_known_args(parser, args, namespace)
        assert not unknown, f"{path} has no {' '.join(unknown)}"
        raise Parsed(found)

    script = load_script(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, *map(str, words)])
        patch.setattr(argparse.ArgumentParser, "parse_args", read)
        patch.setattr(HfArgumentParser, "parse_args_into_dataclasses", read)
        with pytest.raises(Parsed) as caught:
            script.main()
    return caught.value.args[0]


def tiny_squad(questions, seed):
    """Official nested SQuAD JSON: "Ada has the red kite. ..." / "What does Ada have?"."""
    rng = random.Random(seed)
    paragraphs = []
    for number in range(questions // 2):
        pairs = list(zip(rng.sample(NAMES, 4), rng.sample(THINGS, 4), strict=True))
        context = " ".join(f"{name} has the {thing}." for name, thing in pairs)
        qas = []
        for name, thing in rng.sample(pairs, 2):
            start = context.index(f"the {thing}")
            answers = [{"text": f"the {thing}", "answer_start": start}, {"text": thing, "answer_start": start + 4}]
            qas.append({"id": f"{seed}-{number}-{name}", "question": f"What does {name} have?", "answers": answers})
        paragraphs.append({"context": context, "qas": qas})
    return {"version": "1.1", "data": [{"title": "tiny", "paragraphs": paragraphs}]}


@pytest.fixture(scope="session")
def squad_files(tmp_path_factory):
    """(train.json, dev.json) with 64 and 14 questions: 14 is no multiple of the batch sizes used."""
    folder = tmp_path_factory.mktemp("data")
    for name, questions, seed in (("train", 64, 1), ("dev", 14, 2)):
        (folder / f"{name}.json").write_text(json.dumps(tiny_squad(questions, seed)))
    return str(folder / "train.json"), str(folder / "dev.json")


def save_tiny_tokenizer(folder, vocab_size=320):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = [f"{name} has the {thing}. What does {name} have?\n" for name in NAMES for thing in THINGS]
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = GPT2TokenizerFast.from_pretrained(bpe_folder(bpe, folder), model_max_length=128)
    tokenizer.save_pretrained(folder)
    return tokenizer


def bpe_folder(bpe, folder):
    os.makedirs(folder, exist_ok=True)
    bpe.save_model(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a stock GPT-2 (2 blocks, width 64, no dropout) with random weights and its tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("model")
    tokenizer = save_tiny_tokenizer(folder)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=128, vocab_size=len(tokenizer), **dropout, **ends)
    config.initializer_range = 0.2  # a random base whose features differ from token to token
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def qa_words(tiny_model, squad_files):
    """qa_words(*flags, out): the command line of a small run of a run_qa.py; later flags win."""

    def words(*flags, out, model=tiny_model, train=True):
        values = {"model_name_or_path": model, "train_file": squad_files[0], "validation_file": squad_files[1]}
        values |= {"output_dir": out, "max_seq_length": 96, "doc_stride": 16, "learning_rate": 3e-3, "do_eval": True}
        values |= {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4, "save_strategy": "steps"}
        values |= {"disable_tqdm": True, "use_cpu": True} | ({"do_train": True, "max_steps": 2} if train else {})
        return [*(str(word) for key, value in values.items() for word in (f"--{key}", value)), *map(str, flags)]

    return words


def stamp_venv(folder):
    """Let tests/make_venv.sh take a folder for a finished environment of this python."""
    names = ("requirements.txt", "requirements-extra.txt", "requirements-dev.txt")
    requirements = [(ROOT / name).read_bytes() for name in names]
    stamp = hashlib.sha256(b"\0".join([sys.version.encode(), *requirements])).hexdigest()
    (folder / ".requirements-stamp").write_text(stamp)


@pytest.fixture
def hold():
    """hold(folder): another process has the folder as its output folder until the test ends."""
    code = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); "
    code += "print(flush=True); input()"
    holders = []

    def start(folder):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", code, str(folder / ".lock")]
        holders.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        holders[-1].stdout.readline()

    yield start
    for holder in holders:
        holder.communicate(b"\n")


@pytest.fixture
def figures(monkeypatch):
    """{file name: Figure} of the plots that are saved during the test."""
    import matplotlib.figure

    saved, original = {}, matplotlib.figure.Figure.savefig

    def savefig(figure, path, *args, **options):
        saved[os.path.basename(path).split(".png")[0]] = figure
        return original(figure, path, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return saved


@pytest.fixture
def python_stub(tmp_path):
    """(environment, calls): shell scripts run in `environment` call a python3 that only notes its arguments, without
    those of torch.distributed.run's module; `calls()` are the lists of them. STUB_GPUS: devices that it finds.
    """
    script = tmp_path / "stub" / "python3"
    script.parent.mkdir()
    script.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
    *device_count*) echo "${{STUB_GPUS:-0}}"; exit ;;
    "-c "*) exec "{sys.executable}" "$@" ;;
    *cpt/compare.py*) if [[ -z "${{STUB_ALL:-}}" ]]; then exec "{sys.executable}" "$@"; fi ;;
esac
if [[ "$3" == *torch.distributed.run* ]]; then shift 3; fi
printf "%s\\0" "$@" $'\\n' >>"{tmp_path / "stub" / "calls"}"
"""
    )
    script.chmod(0o755)
    ours = ("MODEL", "DATASET", "TRAIN_FILE", "VALIDATION_FILE", "OUTPUT_DIR", "BIT_CONFIG", "NPROC_PER_NODE")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment["PATH"] = f"{script.parent}:{os.environ['PATH']}"

    def calls():
        file = script.parent / "calls"
        lines = file.read_text().split("\0\n\0")[:-1] if file.exists() else []
        return [line.split("\0") for line in lines]

    return environment, calls
