"""N processes are one: the same weights, one run on a CPU machine, a record of what ran, evaluations that see all."""

import json
import os
import pathlib
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from conftest import NAMES, ROOT, THINGS

# Calls main() of a script once for every list of flags, in one process group.
DRIVER = """
import importlib, json, sys
folder, module, runs = sys.argv[1:]
sys.path.insert(0, folder)
from common.script import plain_errors
with plain_errors():
    for argv in json.loads(runs):
        sys.argv = [module, *argv]
        importlib.import_module(module).main()
"""
SCRIPTS = {  # what is trained in float32
    "base_model/run_qa": (),
    "switch_precision/run_qa": ("--bit_widths", "32", "--objective", "random"),
    "cpt/run_qa": ("--bit_widths", "32", "32", "--num_cyclic_period", "1"),
    "adv_attack/text_classification": (),
    "language_model/run_clm": ("--bit_widths", "16", "32", "--block_size", "24"),
}
CASES = {  # samples, batch of all processes, accumulated batches
    "even": (8, 4, 1),
    "ragged": (7, 4, 1),
    "accumulated": (16, 4, 2),
    "rest": (5, 4, 2),  # the second process has nothing new in the last batch
    "ragged and accumulated": (11, 4, 2),
    "ragged and large": (11, 8, 1),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, squad_files, tiny_model):
    """{script: (number of samples -> flags of its training data)}; the samples have different lengths."""
    folder = tmp_path_factory.mktemp("uneven")
    train = json.loads(pathlib.Path(squad_files[0]).read_text())
    for number, paragraph in enumerate(train["data"][0]["paragraphs"]):
        paragraph["context"] += " So it is." * (number % 4)
    (folder / "train.json").write_text(json.dumps(train))
    rows = [{"text": "Ada has the kite. " * (1 + number % 4), "label": number % 3} for number in range(32)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    qa = ["--train_file", str(folder / "train.json"), "--doc_stride", "16", "--max_seq_length", "96"]
    return {
        "run_qa": lambda samples: [*qa, "--max_train_samples", str(samples)],
        "text_classification": lambda samples: [
            *("--train_file", str(folder / "train.jsonl"), "--max_train_samples", str(samples))
        ],
        "run_clm": lambda samples: ["--train_file", write_blocks(folder / f"{samples}.txt", samples, 24, tiny_model)],
    }


def write_blocks(path, blocks, size, model):
    """A text of so many blocks of tokens, and a rest."""
    tokenizer, text, rng = AutoTokenizer.from_pretrained(model), "", random.Random(0)
    while len(tokenizer(text)["input_ids"]) < blocks * size:
        text += f"{rng.choice(NAMES)} has the {rng.choice(THINGS)}. "
    path.write_text(text)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_equal_one(script, data, tiny_model, tmp_path):
    """Weights after some steps of SGD, up to rounding, at shuffled data, across the end of an epoch."""
    folder, module = script.split("/")

    def runs(processes):
        flags = ["--model_name_or_path", tiny_model, "--do_train", "--max_steps", "3", "--disable_tqdm", "True"]
        flags += ["--optim", "sgd", "--learning_rate", "0.1", "--lr_scheduler_type", "constant"]
        flags += ["--max_grad_norm", "1", "--save_strategy", "no", *SCRIPTS[script]]
        for name, (samples, batch, accumulated) in CASES.items():
            case = [*data[module](samples), "--per_device_train_batch_size", str(batch // processes)]
            case += ["--gradient_accumulation_steps", str(accumulated), "--output_dir", str(tmp_path / name)]
            case[-1] += f" {processes}"
            yield [*flags, *case]
        if processes == 1:
            yield [*flags, *case, "--learning_rate", "0", "--output_dir", str(tmp_path / "start")]

    (tmp_path / "driver.py").write_text(DRIVER)
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(tmp_path / "driver.py"), str(ROOT / folder), module, json.dumps(list(runs(processes)))]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def weights(name):
        return load_file(tmp_path / name / "model.safetensors")

    def flat(state):
        return torch.cat([state[key].flatten() for key in sorted(state)]).double()

    start = flat(weights("start"))
    for name in CASES:
        one, two = (flat(weights(f"{name} {processes}")) for processes in (1, 2))
        assert (one - start).norm() > 0.01, name
        assert (two - one).norm() / (one - start).norm() < 1e-5, name
        if name == "ragged and large":
            accumulated = flat(weights("ragged and accumulated 1"))
            assert (accumulated - one).norm() / (one - start).norm() < 1e-5
        record = json.loads((tmp_path / f"{name} 2" / "record.json").read_text())
        assert record["world_size"] == 2 and record["steps"] == 3
