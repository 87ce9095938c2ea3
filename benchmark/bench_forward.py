"""Time of one evaluation forward: float32 transformers GPT-2 against fake and integer quantization with LoRA.

    python benchmark/bench_forward.py                  # GPT-2 124M size, random weights, 8 x 384; about 4 minutes
    python benchmark/bench_forward.py --torch_compile   # also whole models under torch.compile
    python benchmark/bench_forward.py --profile         # also where the time of the W8A8 forward goes

The variants run in turn, round by round, so that a machine that changes speed changes all of them; printed are the
median seconds and the median of the round-wise speed relative to the first variant. LoRA r 8 on all 48 linears.
"""

import os
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import GPT2Config, GPT2ForQuestionAnswering

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "base_model"))
from models.fast import integer, kernels  # noqa: E402
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering  # noqa: E402
from timing import make_parser, print_table, timed_rounds, write_record  # noqa: E402

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


def main():
    parser = make_parser(__doc__, batch_size=8, each="forward")
    parser.add_argument("--torch_compile", action="store_true", help="also the compiled variants")
    parser.add_argument("--profile", action="store_true", help="also the share of every operator")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    started = time.time()

    config = GPT2Config(n_layer=args.layers)
    stock = GPT2ForQuestionAnswering(config).to(args.device).eval()
    bf16 = GPT2ForQuestionAnswering(config).to(args.device, torch.bfloat16).eval()
    bank, plain = (QuantGPT2ForQuestionAnswering(config).to(args.device).eval() for _ in range(2))
    bank.add_lora([4, 8])
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
    ids = torch.randint(0, config.vocab_size, (args.batch_size, args.length), device=args.device)

    def prepare(model, bits, execution):
        if bits is not None:
            model.set_bit_config(bits)
            model.set_execution(execution)

    @torch.no_grad()
    def forward(model, *_):
        model(input_ids=ids)

    rows = print_table(timed_rounds(variants, prepare, forward, args), "speed", width=42)

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
    write_record(args, started, {"variants": rows, "percent": parts, **lora})


if __name__ == "__main__":
    main()
