#!/usr/bin/env python
"""Speed, memory and size of a forward or a training step under any bit configs, beside other implementations.

    bash bench.sh                                                       GPT-2 124M, random weights, all peers
    bash bench.sh --bit_configs 8 W4A8KV8 ../configs/hybrid_25pct_4bit.json --shapes 8x384 1x180 --torch_compile
    MODEL=results/train bash bench.sh --eval_record results/eval/record.json      also accuracy against latency
    bash bench.sh --training                                            one LoRA step, batch 4 x 384

The peers (peers.py) run in turn, round by round, each round beginning with another one, so that a machine that changes
its speed changes all of them; compared are times within a round. Memory comes from a process per peer. In
--output_dir: record.json (every single time), table.md and, with --eval_record, accuracy_latency.png.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import matplotlib
import torch
from transformers.utils import logging as transformers_logging

import peers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "base_model"))
from common.arguments import option  # noqa: E402
from common.flags import parse_args  # noqa: E402
from common.record import (  # noqa: E402
    atomic_path,
    device_name,
    relative_path,
    run_record,
    write_json_atomic,
    write_text_atomic,
)
from common.script import plain_errors  # noqa: E402
from common.statistics import markdown_table  # noqa: E402
from models.bit_config import describe_bit_config  # noqa: E402
from models.errors import UserError  # noqa: E402
from models.user_input import read_json  # noqa: E402
from timing import synchronize  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

logger = logging.getLogger("benchmark")
PAUSE = 0.01  # seconds before a timed run, in which the thread pool of the peer before stops spinning
DISTURBED = 1.25  # a round whose reference takes so many times its median is counted as disturbed


@dataclasses.dataclass
class BenchmarkArguments:
    """What is measured, and how."""

    output_dir: str = dataclasses.field(metadata={"help": "folder of record, table and plot; earlier ones go"})
    model_name_or_path: str | None = option(None, "checkpoint (of run_qa.py or export.py), or stock GPT-2 weights")
    base_model_name_or_path: str | None = option(None, "where the frozen base of an adapter checkpoint lies, if moved")
    random_weights: bool = option(False, "GPT-2 124M with random weights and a LoRA bank instead of a checkpoint")
    config_overrides: str | None = option(None, "with --random_weights: another size, as n_layer=24,n_embd=1024,...")
    bit_configs: list[str] | None = option(
        None, "JSON files, short forms as W4A8KV8, or uniform widths (default: those of the checkpoint, or 8)"
    )
    shapes: list[str] | None = option(None, "batch x tokens (default: 8x384 1x180; of --training: 4x384)")
    peers: list[str] | None = option(
        None,
        f"any of {', '.join(peers.names_of(False))}; of --training: {', '.join(peers.names_of(True))} (default: all, "
        "compiled ones with --torch_compile); fp32 is always there",
    )
    torch_compile: bool = option(False, "also the compiled peers (needs a C++ compiler on a CPU)")
    training: bool = option(False, "the training step of adapters and head instead of the forward")
    rounds: int = option(15, "timed rounds after one warm-up round")
    runs_per_round: int = option(1, "runs of a peer in its turn, of which the mean counts: for small shapes")
    measure_memory: bool = option(True, "also memory and size, from a process per peer")
    eval_record: str | None = option(None, "record.json of run_qa_eval.py: plot its EM against the measured latency")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    threads: int = option(torch.get_num_threads(), "CPU threads of every peer")
    seed: int = option(42, "of random weights and token ids")


def check_args(args):
    """Fill in the defaults and refuse what cannot work, before anything is loaded."""
    if bool(args.model_name_or_path) == args.random_weights:
        raise UserError("pass either --model_name_or_path or --random_weights")
    if args.config_overrides and not args.random_weights:
        raise UserError("--config_overrides: a checkpoint has its size; only with --random_weights")
    if args.device not in ("cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {args.device}: allowed are cpu, and cuda where there is a GPU")
    for flag in ("rounds", "runs_per_round", "threads"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: at least 1")
    args.shapes = list(dict.fromkeys(args.shapes or (["4x384"] if args.training else ["8x384", "1x180"])))
    for shape in args.shapes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
            raise UserError(f"--shapes {shape}: expected batch x tokens, as 8x384")
    known = peers.names_of(args.training)
    asked = args.peers or [name for name in known if name not in peers.COMPILED or args.torch_compile]
    if unknown := [name for name in asked if name not in known]:
        raise UserError(f"--peers {' '.join(unknown)}: allowed are {', '.join(known)}")
    args.peers = [name for name in known if name in asked or name == peers.REFERENCE]
    if args.eval_record and args.training:
        raise UserError("--eval_record: accuracy belongs to the latency of a forward, not to --training")


def read_eval_record(path):
    """[(resolved config, EM)] of a record of run_qa_eval.py."""
    if not os.path.isfile(path):
        raise UserError(f"--eval_record {path}: no such file")
    try:
        record = read_json(path)
        layers = record["bit_config"]["layers"]
        return [(layers[row["config"]], row["exact_match"]) for row in record["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--eval_record {path}: not a record.json of run_qa_eval.py ({error!r})") from None


def measure_times(entries, ids, rounds, runs, training):
    """Seconds of every entry, one per round, interleaved.

    Args:
        entries: {key: Peer}. ids: (batch, length). rounds: after one for warming up (and compiling). runs: in a turn.
    Returns:
        {key: [seconds]}.
    """
    device, seconds, keys = ids.device.type, {key: [] for key in entries}, list(entries)
    with torch.set_grad_enabled(training):
        for number in range(rounds + 1):
            turn = number % len(keys)
            for key in keys[turn:] + keys[:turn]:
                entries[key].prepare()
                synchronize(device)
                time.sleep(PAUSE)
                start = time.perf_counter()
                for _ in range(runs):
                    entries[key].run(ids)
                synchronize(device)
                if number:
                    seconds[key].append((time.perf_counter() - start) / runs)
    return seconds


def time_row(taken, reference, batch, training):
    """Median and spread of the seconds, and of the ratio to the reference within each round: its time over ours (how
    many times faster), or for training ours over its (how much of a step)."""
    ratios = [t / r if training else r / t for t, r in zip(taken, reference, strict=True)]
    median = statistics.median(taken)
    row = {"seconds": median, "seconds_min": min(taken), "seconds_max": max(taken), "per_second": batch / median}
    row |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    return row | {"rounds_seconds": taken, "rounds_ratio": ratios}


def memory_of(name, config, args):
    """Memory of one peer (see memory.py), from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        settings, output = os.path.join(folder, "settings.json"), os.path.join(folder, "memory.json")
        write_json_atomic(settings, vars(args) | {"peer": name, "config": config, "output": output})
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "memory.py")
        done = subprocess.run([sys.executable, script, settings], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"memory of {name}: its process ended with {done.returncode}\n{done.stderr[-2000:]}")
        with open(output, encoding="utf-8") as file:
            return json.load(file)


def table_lines(rows, args, caption):
    """One markdown table per shape."""
    compared = "time / fp32 (min - max)" if args.training else "speed / fp32 (min - max)"
    header = ["peer", "bits", "ms (min - max)", "examples/s", compared, "peak MiB", "linears MiB", "file MiB"]
    lines = []
    for shape in args.shapes:
        cells = []
        for row in (row for row in rows if row["shape"] == shape):
            low, middle, high = (f"{1000 * row[key]:.1f}" for key in ("seconds_min", "seconds", "seconds_max"))
            sizes = [row.get(key) for key in ("peak_bytes", "linear_bytes", "stored_bytes")]
            ratio = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} - {row['ratio_max']:.2f})"
            times = [f"{middle} ({low} - {high})", f"{row['per_second']:.2f}", ratio]
            sizes = ["" if size is None else f"{size / 2**20:.1f}" for size in sizes]
            cells.append([row["label"], row["config"] or "", *times, *sizes])
        lines += [f"batch {shape.replace('x', ' x ')} tokens", "", *markdown_table(header, cells), ""]
    return [*lines, *caption]


def accuracy_points(evaluated, rows, configs, shape):
    """[(series, config, milliseconds, EM)] of the configs that were both evaluated and measured, for `shape`."""
    points = []
    for resolved, exact_match in evaluated:
        found = [name for name, config in configs.items() if config == resolved]
        for row in rows:
            if row["shape"] == shape and row["config"] in found:
                points.append((row["label"], row["config"], 1000 * row["seconds"], exact_match))
    return points


def draw_accuracy_latency(points, shape, path):
    """Exact match against milliseconds, a point per config and way of running it. path: of the PNG."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for series in dict.fromkeys(point[0] for point in points):
        names, milliseconds, scores = zip(*sorted(point[1:] for point in points if point[0] == series))
        axes.plot(milliseconds, scores, "o", label=series)
        for config, x, y in zip(names, milliseconds, scores):
            axes.annotate(config, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel=f"milliseconds, batch {shape.replace('x', ' x ')} tokens", ylabel="exact match (%)")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def caption_lines(args, model, configs, disturbed, versions, left_out):
    """What the table's numbers are."""
    bank = model.config.lora_bank
    lora = f"with LoRA r {model.config.lora_r}" if bank else "without LoRA"
    others = "" if args.training else ", the others without"
    spoilt = ", ".join(f"{count} at {shape}" for shape, count in disturbed.items())
    lines = [
        f"Median of {args.rounds} interleaved rounds; ratios within a round. Rounds whose reference took more than "
        f"{DISTURBED} of its median, all counted: {spoilt}.",
        f"Ours run {lora}{others}. CPU threads: {args.threads}. {', '.join(f'{k} {v}' for k, v in versions.items())}.",
    ]
    if args.measure_memory:
        lines.append(
            "Peak: of a run, in a process of its own, above the state before loading (with what a compiler "
            "keeps); linears: their weights and scales, as held; file: all that serving needs, ours integer as "
            "export.py writes it (embeddings in float32), the others as their own weights are."
        )
    if len(configs) > 1 and not args.training:
        size = peers.exported_size(model, list(configs.values()))
        lines.append(f"One exported checkpoint that serves {', '.join(configs)}: {size / 2**20:.1f} MiB.")
    return lines + [f"Left out: {name}, {why}." for name, why in left_out.items()]


def main():
    start = time.time()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    transformers_logging.set_verbosity_error()
    (args,) = parse_args(BenchmarkArguments)
    check_args(args)
    evaluated = read_eval_record(args.eval_record) if args.eval_record else []
    os.makedirs(args.output_dir, exist_ok=True)
    torch.set_num_threads(args.threads)
    model, configs = peers.load(args)
    for shape in args.shapes:
        if int(shape.split("x")[1]) > model.config.n_positions:
            raise UserError(f"--shapes {shape}: the model has {model.config.n_positions} positions")
    if evaluated and not any(resolved in configs.values() for resolved, _ in evaluated):
        raise UserError(f"--eval_record {args.eval_record}: none of its configs is one of {', '.join(configs)}")

    left_out = {name: why for name in args.peers if (why := peers.why_missing(name, args.device))}
    for name, why in left_out.items():
        print(f"left out: {name}, {why}", flush=True)
    names = [name for name in args.peers if name not in left_out]
    keys = [(n, config) for n in names for config in (configs if peers.runs_configs(n, args.training) else [None])]
    with tempfile.TemporaryDirectory() as folder:
        settings = argparse.Namespace(**vars(args), onnx_file=os.path.join(folder, "int8.onnx"))
        if "onnxruntime" in names:
            peers.export_onnx(model, settings.onnx_file)
        memory = {}
        if args.measure_memory:
            for name, config in keys:
                logger.info("memory of %s %s", name, config or "")
                memory[name, config] = memory_of(name, config, settings)
        entries = {key: peers.build(key[0], model, configs.get(key[1]), settings) for key in keys}
        torch.manual_seed(args.seed)
        rows, disturbed = [], {}
        for shape in args.shapes:
            logger.info("times at %s: %d rounds of %d", shape, args.rounds + 1, len(entries))
            batch, length = map(int, shape.split("x"))
            ids = torch.randint(0, model.config.vocab_size, (batch, length), device=args.device)
            seconds = measure_times(entries, ids, args.rounds, args.runs_per_round, args.training)
            reference = seconds[peers.REFERENCE, None]
            disturbed[shape] = sum(taken > DISTURBED * statistics.median(reference) for taken in reference)
            for key, taken in seconds.items():
                found = memory.get(key, {})
                row = {"peer": key[0], "label": peers.label_of(key[0], args.training), "config": key[1]}
                row |= {"shape": shape, **time_row(taken, reference, batch, args.training)}
                row |= {size: found.get(size) for size in ("linear_bytes", "stored_bytes")}
                rows.append(row | {"peak_bytes": found.get("peak_bytes", {}).get(shape)})

    packages = ["torch", "transformers", *dict.fromkeys(p for name in names for p in peers.packages_of(name))]
    versions = {package: importlib.metadata.version(package) for package in packages}
    lines = table_lines(rows, args, caption_lines(args, model, configs, disturbed, versions, left_out))
    print("\n".join(lines), flush=True)
    write_text_atomic(os.path.join(args.output_dir, "table.md"), "\n".join(lines) + "\n")
    if evaluated:
        points = accuracy_points(evaluated, rows, configs, args.shapes[0])
        draw_accuracy_latency(points, args.shapes[0], os.path.join(args.output_dir, "accuracy_latency.png"))
    shapes, random = model.layer_shapes(), f"GPT-2, random weights, {args.config_overrides or '124M'}"
    record = run_record(
        model=random if args.random_weights else relative_path(args.model_name_or_path),
        bit_config={key: {**describe_bit_config(config, shapes), "layers": config} for key, config in configs.items()},
        metrics={" ".join(filter(None, (row["peer"], row["config"], row["shape"]))): row["ratio"] for row in rows},
        data={},
        seed=args.seed,
        wall_seconds=time.time() - start,
        device=device_name(torch.device(args.device)),
        ratio="time / time of fp32" if args.training else "time of fp32 / time",
        lora_bank=model.config.lora_bank,
        rounds=args.rounds,
        disturbed_rounds=disturbed,
        left_out=left_out,
        peer_versions=versions,
        rows=rows,
    )
    write_json_atomic(os.path.join(args.output_dir, "record.json"), record)


if __name__ == "__main__":
    with plain_errors():
        main()
