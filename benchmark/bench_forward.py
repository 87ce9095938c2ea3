"""Time of one evaluation forward: float32 transformers GPT-2 against fake and integer quantization with LoRA.

    python benchmark/bench_forward.py                  # GPT-2 124M size, random weights, 8 x 384; about 4 minutes
    python benchmark/bench_forward.py --torch_compile   # also whole models under torch.compile
    python benchmark/bench_forward.py --profile         # also where the time of the W8A8 forward goes
    python benchmark/bench_forward.py --rotated --calibration_windows 256      # also the rotated quantizer

The variants run in turn, round by round, so that a machine that changes speed changes all of them; printed are the
median seconds and the median of the round-wise speed relative to the first variant. LoRA r 8 on all 48 linears.
"""

import os
import sys
import time

import torch
from accelerate import PartialState
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import GPT2Config, GPT2ForQuestionAnswering

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "base_model"))
from common.calibration import calibrate  # noqa: E402
from models.fast import integer, kernels  # noqa: E402
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering  # noqa: E402
from timing import (  # noqa: E402
    make_parser,
    print_ratio,
    print_table,
    set_random_rotations,
    timed_rounds,
    write_record,
)

WINDOW = 180  # tokens of a calibration window
PARTS = {  # (module, function) of ours: what it does
    (kernels, "quantize_rows"): "quantize tokens, LoRA A",
    (integer, "int_mm"): "integer product",
    (kernels, "finish_rows"): "rescale, bias, LoRA B, quantize K and V",
    (kernels, "causal_attention"): "attention",
    (kernels, "gelu"): "GELU",
}


def shares(call):
    """Percent of the time spent in each part of a forward on integers, and in the most expensive operators."""

    def recorded(part, function):
        def wrapper(*args):
            with record_function(part):
                return function(*args)

        return wrapper

    functions = {place: getattr(*place) for place in PARTS}
    try:
        for place, part in PARTS.items():
            setattr(*place, recorded(part, functions[place]))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            call()
    finally:
        for place, function in functions.items():
            setattr(*place, function)
    events = {event.key: event for event in profiler.key_averages()}
    total = sum(event.self_cpu_time_total for event in events.values())
    found = {part: events[part].cpu_time_total for part in PARTS.values() if part in events}
    own = {name: event.self_cpu_time_total for name, event in events.items() if name not in PARTS.values()}
    operators = dict(sorted(own.items(), key=lambda item: -item[1])[:10])
    return {name: round(100 * value / total, 1) for name, value in (found | operators).items()}


def calibration_seconds(model, windows, device):
    """Time of calibrating the rotated quantizer on so many windows of WINDOW tokens."""
    PartialState(cpu=device == "cpu")  # calibrates on the device of this
    tokens = torch.randint(0, model.config.vocab_size, (windows, WINDOW)).tolist()
    start = time.perf_counter()
    calibrate(model, tokens, seed=0)
    return time.perf_counter() - start


def main():
    parser = make_parser(__doc__, batch_size=8, each="forward")
    parser.add_argument("--torch_compile", action="store_true", help="also the compiled variants")
    parser.add_argument("--profile", action="store_true", help="also the share of every operator")
    parser.add_argument(
        "--rotated", action="store_true", help="also the rotated quantizer, and its time over MinMax's"
    )
    parser.add_argument("--calibration_windows", type=int, default=0, help="also the time of calibrating on so many")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    started = time.time()

    config = GPT2Config(n_layer=args.layers)
    stock = GPT2ForQuestionAnswering(config).to(args.device).eval()
    bf16 = GPT2ForQuestionAnswering(config).to(args.device, torch.bfloat16).eval()
    bank, plain = (QuantGPT2ForQuestionAnswering(config).to(args.device).eval() for _ in range(2))
    bank.add_lora([4, 8])
    plain.requires_grad_(False)  # only of frozen weights codes are kept from one forward to the next
    # name: (model, bits, execution)
    variants = {
        "float32 transformers, eager": (stock, None, None),
        "bf16 transformers, eager": (bf16, None, None),
        "fake W8A8KV8 + LoRA": (bank, 8, "fake"),
        "integer W8A8KV8 + LoRA": (bank, 8, "integer"),
        "integer W4A8KV8 + LoRA": (bank, "W4A8KV8", "integer"),
        "integer W4A4KV4 + LoRA": (bank, 4, "integer"),
        "integer W8A8KV8": (plain, 8, "integer"),
    }
    if args.torch_compile:
        variants["float32 transformers, torch.compile"] = (torch.compile(stock), None, None)
        variants["integer W8A8KV8 + LoRA, torch.compile"] = (torch.compile(bank), 8, "integer")
    if args.rotated:
        rotated = QuantGPT2ForQuestionAnswering(config).to(args.device).eval()
        rotated.add_lora([4, 8])
        set_random_rotations(rotated)
        variants["integer W8A8KV8 + LoRA, rotated"] = (rotated, 8, "integer")
    ids = torch.randint(0, config.vocab_size, (args.batch_size, args.length), device=args.device)

    def prepare(model, bits, execution):
        if bits is not None:
            model.set_bit_config(bits)
            model.set_execution(execution)

    @torch.no_grad()
    def forward(model, *_):
        model(input_ids=ids)

    seconds = timed_rounds(variants, prepare, forward, args)
    rows, rotation = print_table(seconds, "speed", width=42), {}
    if args.rotated:
        pair = "integer W8A8KV8 + LoRA, rotated", "integer W8A8KV8 + LoRA"
        rotation["rotated_over_minmax"] = print_ratio(seconds, *pair)
    if args.calibration_windows:
        taken = calibration_seconds(plain, args.calibration_windows, args.device)
        rotation["calibration_seconds"] = taken
        print(f"calibration on {args.calibration_windows} windows of {WINDOW} tokens: {taken:.1f} s")

    def profiled():
        prepare(*variants["integer W8A8KV8 + LoRA"])
        forward(bank)

    parts = shares(profiled) if args.profile else {}
    for name, percent in parts.items():
        print(f"{name:<60}{percent:>6.1f} %")
    without_lora = rows["integer W8A8KV8"]["seconds"] / rows["integer W8A8KV8 + LoRA"]["seconds"]
    print(f"LoRA's share of the integer forward: {100 * (1 - without_lora):.1f} %")

    # Memory of the linears' weights without the float weights; dropping these is final, so it comes last.
    floats = sum(4 * out * inp for out, inp in plain.layer_shapes().values())
    memory = {}
    for model, widths in ((bank, (4, 8)), (bank, (8,)), (plain, (4,))):
        model.drop_float_weights(widths)
        memory[" and ".join(map(str, widths))] = model.quantized_bytes() / floats
    for widths, share in memory.items():
        print(f"weights of the linears at {widths} bits: {share:.4f} of float32")
    lora = {"lora_percent": 100 * (1 - without_lora), "weight_memory": memory}
    write_record(args, started, {"variants": rows, "percent": parts, **lora, **rotation})


if __name__ == "__main__":
    main()
