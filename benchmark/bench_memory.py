"""Memory of one training step: full fine-tuning, LoRA, QLoRA and ours, each in a process of its own; NF4's scales.

    python benchmark/bench_memory.py --output results/bench_memory.json     # GPT-2 124M size
    python benchmark/bench_memory.py --layers 2 --width 128 --length 64

Random weights, float32, LoRA r 8 on all linears, AdamW, dropout as GPT-2 ships it. Peak: of the second step, over the
state before the model was made (host memory on a CPU, allocated memory on CUDA). Parts (weights, gradients, AdamW's
states) are counted from the model, without activations; those of GPT-2 xl are computed from its sizes alone.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time

import torch
from transformers import GPT2Config
from transformers.utils import logging as transformers_logging

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "base_model"))
from common.record import write_json_atomic  # noqa: E402
from common.statistics import markdown_table  # noqa: E402
from memory import peak_of, resident  # noqa: E402
from models.bit_config import stored_bytes  # noqa: E402
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering  # noqa: E402
from models.nf4 import NF4Weight, import_bitsandbytes  # noqa: E402
from timing import write_record  # noqa: E402

RANK = 8
VARIANTS = {  # name: (widths of the passes of a step, base); no widths: nothing quantized; no base: it trains itself
    "full fine-tuning": ((), None),
    "LoRA": ((), "float"),
    "QLoRA, nf4 base": ((), "nf4"),
    "static W8A8KV8 + LoRA": ((8,), "float"),
    "static W4A4KV4 + LoRA": ((4,), "float"),
    "joint W8, W4 + LoRA": ((8, 4), "float"),
}


def make_model(config, widths, base):
    model = QuantGPT2ForQuestionAnswering(config)
    if base:
        model.add_lora(widths or ["shared"], RANK)
    if base == "nf4":
        model.quantize_base()
    return model.train()


def measure(args):
    """{"peak_bytes", "linear_bytes", "step_seconds"} of a variant, in this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cuda, (widths, base) = args.device == "cuda", VARIANTS[args.variant]
    import_bitsandbytes()  # in every process, or only QLoRA's would have it in its peak
    before = 0 if cuda else resident("VmRSS")
    model = make_model(config_of(args.layers, args.width), widths, base).to(args.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, model.config.vocab_size, (args.batch_size, args.length), device=args.device)
    positions = torch.randint(0, args.length, (args.batch_size,), device=args.device)

    def step():
        for bits in widths or (32,):
            model.set_bit_config(bits)
            loss = model(input_ids=ids, start_positions=positions, end_positions=positions).loss
            (loss / max(len(widths), 1)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    start = time.perf_counter()
    peak = peak_of(step, cuda) - before
    seconds = time.perf_counter() - start
    return {"peak_bytes": peak, "linear_bytes": model.quantized_bytes(), "step_seconds": seconds}


def config_of(layers, width):
    return GPT2Config(n_layer=layers, n_embd=width, n_head=max(width // 64, 1))


def nf4_bytes(weights, double):
    """Bytes of codes and scales of so many weights: see NF4Weight; `double`: with double quantization."""
    blocks = math.ceil(weights / 64)
    scales = blocks + 4 * math.ceil(blocks / 256) + 4 if double else 4 * blocks
    return math.ceil(weights / 2) + scales


def parts(config, widths, base):
    """Bytes that a training holds beside its activations: {"base", "trainable", "gradients", "states"}.

    Codes are counted beside the float weights that a training of ours keeps; "states": AdamW's two, float32.
    """
    with torch.device("meta"):
        model = QuantGPT2ForQuestionAnswering(config)
        if base:
            model.add_lora(widths or ["shared"], RANK)
    shapes = model.layer_shapes().values()
    trainable = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = 4 * sum(p.numel() for p in model.parameters()) - trainable
    if base == "nf4":
        held += sum(nf4_bytes(out * inp, True) - 4 * out * inp for out, inp in shapes)
    held += sum(stored_bytes(bits, out, inp) for bits in widths for out, inp in shapes)
    return {"base": held, "trainable": trainable, "gradients": trainable, "states": 2 * trainable}


def scale_bits(width):
    """Bits that the scales of an NF4 weight of `width` take, with and without double quantization, as measured."""
    weight = torch.randn(width, 4 * width)
    functional, n = import_bitsandbytes().functional, weight.numel()
    _, plain = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    double = 8 * NF4Weight(weight).nbytes / n - 4
    single = 8 * plain.absmax.nbytes / n
    return {"without": single, "with": double, "saved": single - double}


def measured_in_its_own_process(name, args):
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        words = [f"--{key}={getattr(args, key)}" for key in ("layers", "width", "batch_size", "length", "threads")]
        words += [f"--device={args.device}", f"--variant={name}", f"--output={file.name}"]
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: its process ended with {done.returncode}\n{done.stderr[-2000:]}")
        return json.load(open(file.name, encoding="utf-8"))


def table_lines(rows):
    mib = ("peak_bytes", "linear_bytes", "parts_bytes", "xl_parts_bytes")
    cells = [
        [name, *(f"{row[key] / 2**20:.0f}" for key in mib), f"{row['peak_ratio']:.2f}"] for name, row in rows.items()
    ]
    header = ["training", "peak MiB", "linears MiB", "parts MiB, counted", "xl: parts MiB, computed", "peak / full"]
    return markdown_table(header, cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="blocks (12 is GPT-2 124M)")
    parser.add_argument("--width", type=int, default=768, help="hidden size, a multiple of 64 (768 is GPT-2 124M)")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=384, help="tokens a sequence")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one alone, in this process")
    parser.add_argument("--output", help="also write the figures to this JSON file")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    started = time.time()
    if args.variant:
        found = measure(args)
        write_json_atomic(args.output, found) if args.output else print(json.dumps(found))
        return
    rows, scales = {}, scale_bits(args.width)
    for name, (widths, base) in VARIANTS.items():
        print(f"measuring {name}", flush=True)
        rows[name] = row = measured_in_its_own_process(name, args)
        row["parts"] = parts(config_of(args.layers, args.width), widths, base)
        row["xl_parts_computed"] = parts(config_of(48, 1600), widths, base)
        row["parts_bytes"] = sum(row["parts"].values())
        row["xl_parts_bytes"] = sum(row["xl_parts_computed"].values())
        row["peak_ratio"] = row["peak_bytes"] / rows["full fine-tuning"]["peak_bytes"]
    print(*table_lines(rows), sep="\n")
    print(
        "\nNF4 scales, bits a weight: {without:.3f}, double-quantized {with:.3f}: {saved:.3f} saved".format(**scales)
    )
    write_record(args, started, {"variants": rows, "nf4_scale_bits": scales})


if __name__ == "__main__":
    main()
