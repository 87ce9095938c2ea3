"""Every command of the README.md files, the heads of the shell scripts and the docstrings is understood.

All of them run in a copy of the repository whose python only notes its arguments; the parsers of the python scripts
then read these. The commands of the experiments are also run for real, on tiny inputs, in the order of their page.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, load_script, parse_flags, save_tiny_tokenizer, stamp_venv

EXPERIMENTS = ("base_model", "switch_precision", "cpt", "adv_attack", "language_model")
FOLDERS = (*EXPERIMENTS, "benchmark", "quickstart", "reproduce", "report", "serving", "tests", "configs")
PAGES = ["README.md", "GUIDE.md", *(f"{folder}/README.md" for folder in FOLDERS if folder != "tests")]
COMMAND = re.compile(r"(?:for .*; do )?(?:[A-Z_]+=\S+ )*(?:bash|python3?|torchrun) \S*\w\.(?:sh|py)\b")


def readme_commands(text):
    """Commands in fenced blocks, one a line, and in code spans."""
    fenced = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return [line for line in (*fenced, *(" ".join(span.split()) for span in spans)) if COMMAND.match(line)]


def head_commands(lines):
    """Commands among the indented lines of a head or a docstring, without what two spaces or # separate from them."""
    found, before = [], ""
    for line in lines:
        line, before = before + line.strip(), ""
        if line.endswith("\\"):
            before = line.removesuffix("\\")
        elif COMMAND.match(line):
            found.append(re.split(r"  |#", line)[0].strip())
    return found


def commands():
    """[(file, folder to run in, command)]"""
    found = [(name, ".", line) for name in PAGES for line in readme_commands((ROOT / name).read_text())]
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.[ps][yh]")):
        if path.suffix == ".sh":
            head = re.match(r"(?:#.*\n)*", path.read_text())[0]
            lines = [line[1:] for line in head.splitlines() if line.startswith("#   ")]
        else:
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            lines = text.splitlines()
        for line in head_commands(lines):
            script = COMMAND.match(line)[0].split()[-1]
            found.append((str(path.relative_to(ROOT)), "." if (ROOT / script).exists() else path.parent.name, line))
    # benchmark.py starts it, with a file that it writes
    return [words for words in found if words[2] != "python peers.py SETTINGS.json"]


def once(found):
    """The same, each command of the first page that has it."""
    return list({words[1:]: words for words in reversed(found)}.values())[::-1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository."""
    folder = tmp_path_factory.mktemp("copy")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("results", "work", "__pycache__"))
    for name in ("README.md", *(path.name for path in ROOT.glob("requirements*.txt"))):
        shutil.copy(ROOT / name, folder)
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci")
    return folder


def place_inputs(folder):
    """Stand-ins for the inputs that commands name; results of earlier commands go."""
    for results in ("switch_precision/results", "cpt/results", "adv_attack/results"):
        shutil.rmtree(folder / results, ignore_errors=True)
    work = folder / "quickstart" / "work"
    for joint in (folder / "switch_precision/results/train", *(work / f"runs/seeds/joint_{s}" for s in (42, 43, 44))):
        joint.mkdir(parents=True, exist_ok=True)
        (joint / "config.json").write_text(json.dumps({"lora_bank": ["4", "8"]}))
    for name in (work / ".quickstart", work / "model" / "manifest.json", folder / "gpt2-tokenizer" / "vocab.json"):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.touch()
    (folder / "sst2").mkdir(exist_ok=True)
    for name in ("train", "dev", "test"):
        (folder / "sst2" / f"{name}.jsonl").touch()


@pytest.fixture
def start(copy, python_stub, tmp_path):
    """start(command, folder): [(python script, its arguments)] that a command starts in the copy."""
    environment, calls = python_stub
    stub = tmp_path / "stub"
    shutil.copy(stub / "python3", stub / "python")
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "bin").symlink_to(stub)  # of the quick start and the tests
    stamp_venv(tmp_path / "venv")
    (stub / "ruff").write_text("#!/usr/bin/env bash\n")
    (stub / "ruff").chmod(0o755)
    environment |= {"VENV": str(tmp_path / "venv"), "PYTHON": sys.executable, "STUB_ALL": "1"}

    def call(command, folder=".", **more):
        before = len(calls())
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command.replace(" ...", "")],
            cwd=copy / folder,
            env=environment | more,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found = []
        for words in calls()[before:]:
            at = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
            if at is not None:  # not -m pytest
                path = os.path.relpath(os.path.join(copy / folder, words[at]), copy)
                found.append((path, words[at + 1 :]))
        return found

    return call


@pytest.mark.parametrize(("source", "folder", "command"), once(commands()), ids=lambda value: value[:60])
def test_command_is_understood(source, folder, command, start, copy):
    place_inputs(copy)
    for path, words in start(command, folder):
        parse_flags(path, words, partial="..." in command)


@pytest.mark.parametrize("scale", ["tiny", "gpt2", "small_lm", "small_sizes", "small_robust"])
def test_steps_of_the_protocol_are_understood(scale, start, copy, monkeypatch):
    place_inputs(copy)
    for name in ("SMALL_GPT2", "SMALL_WORK", "TOPICS", "TEXT_FILE", "VALIDATION_TEXT", "TOKENIZER", "VALIDATION_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    dry = subprocess.run(
        [sys.executable, ROOT / "reproduce" / "run.py", scale, "--dry_run"], capture_output=True, text=True
    )
    commands = dry.stdout.splitlines()
    assert len(commands) > 10, dry.stderr
    for command in commands:
        if command.startswith("head "):  # prepares a text
            continue
        found = start(command)
        assert found, command
        for path, words in found:
            parse_flags(path, words)


def test_commands_are_found():
    found = commands()
    assert len(found) > 100
    for source in (*PAGES, "base_model/train.sh", "cpt/compare.sh", "quickstart/seeds.py"):
        assert any(file == source for file, _, _ in found), source


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_of_a_page_exist(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    records = [name for name in re.findall(r"`(results/[\w/.-]+)`", text)]
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert not missing + [name for name in records if not (ROOT / name).exists()]


def test_find_your_way_is_true():
    section = (ROOT / "README.md").read_text().split("## Find your way")[1].split("\n## ")[0]
    places = re.findall(r"`(\S+\.py)`, `([\w.]+)`|`(\w+)` in `(\S+\.py)`", section)
    assert len(places) >= 7
    for path, name, other_name, other_path in places:
        tree = ast.parse((ROOT / (path or other_path)).read_text())
        for part in (name or other_name).split("."):
            found = [node for node in tree.body if getattr(node, "name", None) == part]
            assert found, f"{path or other_path} has no {name or other_name}"
            tree = found[0]


def test_every_flag_of_the_table_of_bits_exists():
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \| (.*?) \|", (ROOT / "configs/README.md").read_text(), re.M)
    assert len(rows) > 20
    for flags, scripts, meaning in rows:
        names = re.findall(r"--(\w+)", flags)
        for script in re.findall(r"`([\w/]+\.py)`", scripts):
            for path in [script] if "/" in script else [f"{folder}/{script}" for folder in EXPERIMENTS[:3]]:
                for name in names:
                    found = parse_flags(path, [f"--{name}", "8"], partial=True)
                assert hasattr(found, names[0]) or "other name" in meaning, (path, names[0])  # and no abbreviation


# ---- really run


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory):
    """Stock GPT-2 with the 12 blocks that the configs name, and width 32."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = save_tiny_tokenizer(folder)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=12, n_embd=32, n_head=2, n_positions=128, vocab_size=len(tokenizer), **ends)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


QA = ["--max_seq_length", "96", "--doc_stride", "16", "--use_cpu", "--disable_tqdm", "True"]
QA_TRAINING = [
    *QA,
    "--max_steps",
    "2",
    "--per_device_train_batch_size",
    "4",
    "--eval_strategy",
    "no",
    "--calibration_samples",
    "8",
]
TEXTS = ["--max_seq_length", "24"]
ATTACK = [*TEXTS, "--num_samples", "2", "--num_iters", "2", "--gumbel_batch", "2", "--gumbel_samples", "2"]
RUNS = {
    "base_model": {
        "bash base_model/train.sh --add_lora": QA_TRAINING,
        "BIT_CONFIG=W8A8KV8 bash base_model/eval.sh": QA,
        "BIT_CONFIG=configs/uniform_8.json bash base_model/eval.sh": QA,
    },
    "switch_precision": {
        "bash switch_precision/train.sh": QA_TRAINING,
        "bash switch_precision/eval.sh --bit_configs 8 configs/hybrid_25pct_4bit.json W4A8KV8 4": QA,
        "python switch_precision/export.py --model_name_or_path": [],
    },
    "cpt": {
        "bash cpt/train.sh": [*QA_TRAINING, "--num_cyclic_period", "1"],
        "bash cpt/eval.sh --eval_bit_widths 4 5 6 7 8 32": QA,
    },
    "adv_attack": {
        "bash adv_attack/train.sh --add_lora --learning_rate 1e-3": [*TEXTS, "--use_cpu", "--max_steps", "2"],
        "for bits in 32 8 4 random eot; do ATTACK_BITS=$bits bash adv_attack/attack.sh; done": ATTACK,
        "bash adv_attack/eval.sh": [],
    },
}


@pytest.mark.parametrize("experiment", RUNS)
def test_commands_of_the_readme_run(experiment, start, copy, tiny_gpt2, squad_files, tmp_path, monkeypatch):
    monkeypatch.chdir(copy)
    shutil.rmtree(copy / experiment / "results", ignore_errors=True)  # of the other tests
    train_file, validation_file = squad_files
    if experiment == "adv_attack":
        train_file = validation_file = str(tmp_path / "texts.jsonl")
        rows = [{"text": f"Ada has the {thing}.", "label": label} for thing in ("kite", "drum") for label in (0, 1)]
        (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in 2 * rows))
    documented = [command for source, _, command in commands() if source == f"{experiment}/README.md"]
    for prefix, flags in RUNS[experiment].items():
        command = next(command for command in documented if command.startswith(prefix))
        environment = {"TRAIN_FILE": train_file, "VALIDATION_FILE": validation_file}
        if "train.sh" in command:
            environment["MODEL"] = tiny_gpt2
        for path, words in start(command, **environment):
            more = ["--reference_model", tiny_gpt2] if path == "adv_attack/eval.py" else flags
            monkeypatch.setattr(sys, "argv", [path, *words, *more])
            load_script(path).main()
    if experiment == "switch_precision":
        assert (copy / "switch_precision" / "results" / "hybrid" / "export.json").exists()
