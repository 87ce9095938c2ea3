"""What the bench_*.py scripts share: flags, rounds in turn, the table, the record."""

import argparse
import statistics
import time

import torch

from common.record import run_record, write_json_atomic  # noqa: E402 - on the path that the scripts set


def make_parser(doc, batch_size, each):
    """The flags of a script that times in rounds. doc: of the script; batch_size: default; each: what is timed."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds after one warm-up round")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--batch_size", type=int, default=batch_size, help=f"sequences a {each}")
    parser.add_argument("--length", type=int, default=384, help="tokens a sequence")
    parser.add_argument("--layers", type=int, default=12, help="blocks (12 is GPT-2 124M)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--output", help="also write the figures to this JSON file")
    return parser


def set_random_rotations(model):
    """The rotated quantizer with any d: what it costs does not depend on it."""
    rotations = {}
    for name, layer in model.quant_layers().items():
        signs = 2 * torch.randint(2, (layer.in_features,)) - 1
        rotations[name] = signs * torch.empty(layer.in_features).uniform_(0.5, 2)
    model.set_rotations(rotations)


def synchronize(device):
    """Wait for a device named "cuda"."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed_rounds(variants, prepare, run, args):
    """{name: [seconds]}, a round each, after one for warming up: prepare(*variant), untimed, and run(*variant)."""
    seconds = {name: [] for name in variants}
    for number in range(args.rounds + 1):
        for name, variant in variants.items():
            prepare(*variant)
            synchronize(args.device)
            start = time.perf_counter()
            run(*variant)
            synchronize(args.device)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def print_table(seconds, kind, width):
    """Print the medians and return {name: {"seconds", kind, kind + "s"}}; ratios are taken within a round.

    Args: kind: "speed", the first variant's time over the variant's, or "ratio", the inverse. width: of the names.
    """
    first, rows = next(iter(seconds.values())), {}
    print(f"{'variant':<{width}}{'seconds':>9}{kind:>8}   (min - max)")
    for name, taken in seconds.items():
        found = [a / b if kind == "speed" else b / a for a, b in zip(first, taken, strict=True)]
        row = rows[name] = {"seconds": statistics.median(taken), kind: statistics.median(found), f"{kind}s": found}
        middle = f"{row[kind]:.{2 if kind == 'speed' else 3}f}"
        print(f"{name:<{width}}{row['seconds']:>9.3f}{middle:>8}   ({min(found):.2f} - {max(found):.2f})")
    return rows


def print_ratio(seconds, name, other):
    """Print the time of a variant over that of another, and return the ratios, one a round."""
    found = [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]
    print(f"{name} / {other}: {statistics.median(found):.3f}   ({min(found):.2f} - {max(found):.2f})")
    return found


def write_record(args, started, metrics, bit_config=None, data=None):
    """Write the record to --output, if there is one. started: time.time() of the beginning."""
    if args.output:
        record = run_record(
            model=f"GPT-2, {args.layers} blocks, random weights",
            bit_config=bit_config,
            metrics=metrics,
            data=data or {},
            seed=0,
            wall_seconds=time.time() - started,
            arguments=vars(args) | {"output": None},
        )
        write_json_atomic(args.output, record)
