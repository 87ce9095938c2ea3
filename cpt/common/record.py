"""One JSON record a run: what was run, on what, and what came out. Tables and plots are made from these files."""

import contextlib
import glob
import importlib.metadata
import json
import logging
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from torch import distributed

from common.checksums import json_checksum
from models.disk import sync
from models.errors import UserError
from models.user_input import read_json

logger = logging.getLogger("record")
TOKEN_FLAGS = ("token", "hub_token", "push_to_hub_token")
TOKEN = re.compile(r"(?:hf|api_org)_[A-Za-z0-9]{20,}")
PACKAGES = ("torch", "transformers", "datasets", "evaluate", "accelerate", "bitsandbytes", "numpy")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike):
    """A temporary file name beside `path`, which takes its place when the body ends well: nobody reads half a file.

    File and folder are synced. What killed writers of the same path left behind is removed.
    Raises: OSError and whatever the body raises; a file at `path` then stays as it was, and nothing is left beside it.
    """
    path = os.fspath(path)
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    for leftover in glob.glob(f"{glob.escape(path)}.*.tmp"):
        process = leftover[len(path) + 1 : -len(".tmp")]
        if process.isdecimal() and not _is_running(int(process)):
            Path(leftover).unlink(missing_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every file system can sync a folder
        sync(folder)


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """UTF-8 text through `atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def write_json_atomic(path: str | os.PathLike, obj) -> None:
    """Indented UTF-8 JSON through `atomic_path`. Raises: TypeError or ValueError (NaN) for what JSON cannot hold."""
    write_text_atomic(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_state(path: str | os.PathLike, obj: dict) -> None:
    """`write_json_atomic` for what a later run goes on from: with a checksum of its content, under "sha256"."""
    write_json_atomic(path, {"sha256": json_checksum(obj), **obj})


def load_state(path: str | os.PathLike) -> dict:
    """What `write_state` wrote, without the checksum. Raises: UserError naming a damaged file; OSError."""
    try:
        obj = read_json(path)
        checksum = obj.pop("sha256", None)
    except (UserError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    if checksum != json_checksum(obj):
        raise UserError(f"{path}: damaged (its content and its checksum do not agree) or of an older version")
    return obj


def read_state(path: str | os.PathLike) -> dict | None:
    """What `write_state` wrote; None without the file, and for a damaged one, which a warning names."""
    try:
        return load_state(path)
    except FileNotFoundError:
        return None
    except UserError as error:
        logger.warning("%s; it is not used, and measured again", error)
        return None


def differences(before: dict, now: dict, prefix: str = "") -> list[str]:
    """["lr: 1.0 then, 0.2 now", ...] of two settings; keys of dicts within are joined by dots."""
    found = []
    for key in before | now:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old!r:.80} then, {new!r:.80} now")
    return found


def run_record(*, model, bit_config, metrics, data, seed, wall_seconds, **details):
    """The record of a run, for `write_json_atomic`.

    Args:
        model: what was run, in words or as a path; bit_config: resolved config and its description.
        metrics: {name: number}; data: {split: {"source", "examples", "sha256"}}; details: what else is kept.
    """
    cuda = PartialState().device.type == "cuda"
    return {
        "command": command_line(),
        **surroundings(),
        "seed": seed,
        "model": model,
        "bit_config": bit_config,
        "metrics": metrics,
        "data": data,
        "wall_seconds": round(wall_seconds, 2),
        "peak_memory_bytes": {
            "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "cuda": torch.cuda.max_memory_allocated() if cuda else None,
        },
        **details,
    }


def surroundings():
    """{"git", "device", "world_size", "threads", "versions"}: the code that this process has loaded, and on what it
    computes."""
    return {
        "git": GIT,
        "device": device_name(PartialState().device),
        "world_size": distributed.get_world_size() if distributed.is_initialized() else 1,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def device_name(device):
    """In words, of a torch.device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def write_run_record(trainer, folder, model_args, data_args, start, **details):
    """Rank 0 writes the record of a training or evaluation by a Trainer: to --record_file, or into --output_dir.

    Args:
        folder: of `resuming.OutputFolder`; start: time.time() of the beginning; details: as `run_record`.
    """
    if trainer.is_world_process_zero():
        record = run_record(
            model=relative_path(model_args.model_name_or_path),
            seed=trainer.args.seed,
            wall_seconds=time.time() - start,
            steps=trainer.state.global_step,
            continues=folder.continues,
            trained_on=folder.trained_on,
            dtype=trainer.args.run_dtype,
            **details,
        )
        write_json_atomic(data_args.record_file or os.path.join(trainer.args.output_dir, "record.json"), record)


def command_line():
    """The command as typed, except for hub tokens and for absolute paths above the current folder."""
    words, _ = _without_tokens([os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    words = ["=".join(map(relative_path, word.split("=", 1))) for word in words]
    return TOKEN.sub("***", shlex.join(["python", *words]))


def hide_tokens(text):
    """`text` without the hub tokens of the command line, and without anything that looks like one."""
    for token in _without_tokens(sys.argv)[1]:
        text = text.replace(token, "***")
    return TOKEN.sub("***", text)


def relative_path(word):
    """An absolute path relative to the current folder; other words as they are."""
    return os.path.relpath(word) if os.path.isabs(word) else word


def plot_caption(model, source):
    """What a plot is of: model, data and number of examples. source: of a split, {"source", "examples"}."""
    return f"{relative_path(model)}, {source['source']} (n = {source['examples']})"


def git_state():
    """{"commit", "dirty"} of the code's repository, None outside one."""
    here = os.path.dirname(os.path.abspath(__file__))

    def git(*words):
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


GIT = git_state()  # read with the code: both may change on disk while a run goes on


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _without_tokens(words):
    """(words with "***" for each hub token, [the tokens])."""
    masked, tokens = [], []
    for before, word in zip(["", *words], words):
        flag, equals, value = word.partition("=")
        if equals and _takes_a_token(flag):
            tokens.append(value)
            word = f"{flag}=***"
        elif _takes_a_token(before) and not word.startswith("-"):
            tokens.append(word)
            word = "***"
        masked.append(word)
    return masked, list(filter(None, tokens))


def _takes_a_token(flag):
    """--token and its kind, also with dashes and shortened: argparse takes every unambiguous beginning."""
    name = flag.lstrip("-").replace("-", "_")
    if not flag.startswith("-") or name in ("", "push_to_hub"):
        return False
    return name.endswith("_token") or any(full.startswith(name) for full in TOKEN_FLAGS)


def _is_running(process):
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # of another user
    return True
