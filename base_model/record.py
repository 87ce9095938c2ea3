"""One JSON record a run: what was run, on what, and what came out. Tables and plots are made from these files."""

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import subprocess
import sys

import torch
from torch import distributed

PACKAGES = ("torch", "transformers", "datasets", "evaluate", "accelerate", "bitsandbytes", "numpy")


def write_json_atomic(path: str | os.PathLike, obj) -> None:
    """Writes indented UTF-8 JSON through a temporary file beside `path`: nobody ever reads half a file.

    Raises: TypeError or ValueError (NaN) for what JSON cannot hold, OSError; a file at `path` then stays as it was.
    """
    path = os.fspath(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as handle:
            json.dump(obj, handle, indent=2, ensure_ascii=False, allow_nan=False)
            handle.write("\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def file_checksum(path):
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_record(*, model, bit_config, metrics, data, seed, wall_seconds, **details):
    """The record of a run.

    Args:
        model: what was run, in words or as a path; bit_config: resolved config and its description.
        metrics: {name: number}; data: {split: {"source", "examples", "sha256"}}.
        details: anything else that the run wants to keep.
    Returns:
        a dict for `write_json_atomic`.
    """
    cuda = torch.cuda.is_available()
    return {
        "command": command_line(),
        "git": git_state(),
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
        "device": torch.cuda.get_device_name() if cuda else f"CPU {torch.backends.cpu.get_cpu_capability()}",
        "world_size": distributed.get_world_size() if distributed.is_initialized() else 1,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        **details,
    }


def command_line():
    """The command as typed, except for a hub token and for absolute paths above the current folder."""
    words = [os.path.relpath(sys.argv[0]), *sys.argv[1:]]
    for index, word in enumerate(words[:-1]):
        if word == "--token":
            words[index + 1] = "***"
    return shlex.join(["python", *(relative_path(word) for word in words)])


def relative_path(word):
    """An absolute path relative to the current folder; other words as they are."""
    return os.path.relpath(word) if os.path.isabs(word) else word


def git_state():
    """{"commit", "dirty"} of the code's repository, None outside one."""
    here = os.path.dirname(os.path.abspath(__file__))

    def git(*words):
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
