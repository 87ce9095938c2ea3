"""Memory of one peer, measured in a process of its own: python memory.py SETTINGS.json (started by benchmark.py)."""

import argparse
import ctypes
import gc
import json
import os
import re
import sys
import warnings

import torch
from transformers.utils import logging as transformers_logging

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "base_model"))
from common.record import write_json_atomic  # noqa: E402
from models.quantization import FLOAT_BITS  # noqa: E402
from peers import COMPILED, OURS, build, load, why_missing  # noqa: E402


def keep_only(model, resolved, execution):
    """Leave what serving one config needs: its adapters and, on integers, its codes in place of the float weights."""
    model.set_bit_config(resolved)
    for layer in model.quant_layers().values():
        for key in set(layer.lora_A) - {layer.active_adapter}:
            del layer.lora_A[key], layer.lora_B[key]
        if execution == "integer" and layer.w_bits not in FLOAT_BITS and layer.a_bits not in FLOAT_BITS:
            layer.set_stored_codes(layer.stored_codes([layer.w_bits]))


def resident(field):
    """VmRSS (now) or VmHWM (peak) of this process in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", file.read())[1])


def peak_of(run, cuda):
    """Peak bytes while `run` runs: allocated on the GPU, or resident in the host's memory."""
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what building the peer left behind
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # VmHWM starts anew
    run()
    return resident("VmHWM")


def measure_memory(args):
    """{"peak_bytes": {shape: above the state before loading}, "linear_bytes", "stored_bytes"} of one peer."""
    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"
    why_missing(args.peer, args.device)  # imports its packages
    if args.peer in COMPILED:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=args.device))  # loads the compiler
    before = 0 if cuda else resident("VmRSS")
    model, configs = load(args)
    resolved = configs.get(args.config)
    if not args.training and args.peer in OURS:
        keep_only(model, resolved, OURS[args.peer][1]["execution"])
    peer = build(args.peer, model, resolved, args)
    vocabulary = model.config.vocab_size
    del model
    peer.prepare()
    found = {"peak_bytes": {}}
    with torch.set_grad_enabled(args.training):
        for shape in args.shapes:
            ids = torch.randint(0, vocabulary, tuple(map(int, shape.split("x"))), device=args.device)
            peer.run(ids)
            found["peak_bytes"][shape] = peak_of(lambda: peer.run(ids), cuda) - before  # noqa: B023 - runs at once
    return found | {"linear_bytes": peer.linear_bytes(), "stored_bytes": peer.stored_bytes()}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    with open(sys.argv[1], encoding="utf-8") as settings_file:
        settings = argparse.Namespace(**json.load(settings_file))
    write_json_atomic(settings.output, measure_memory(settings))
