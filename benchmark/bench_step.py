"""Cost of one training step: stock float32 GPT-2 + LoRA against static W8A8KV8 + LoRA: fake and integer, also in bf16.

    python benchmark/bench_step.py                 # GPT-2 124M size, random weights, batch 4 x 384; about 3 minutes
    python benchmark/bench_step.py --joint         # one width against widths 8 and 4 with cascade distillation
    python benchmark/bench_step.py --rotated       # also the rotated quantizer beside MinMax, on integers, both dtypes

The variants run in turn, round by round, so that a machine that changes speed changes all of them; printed are the
median seconds and the median of the round-wise ratio to the first variant. LoRA r 8, alpha 16 on all 48 linears, base
frozen, dropout as GPT-2 ships it (0.1) unless --dropout says otherwise, SDPA attention, AdamW.
"""

import math
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2ForQuestionAnswering
from transformers.pytorch_utils import Conv1D

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "switch_precision"))
from adaptive_lora_trainer import qa_distillation_kl  # noqa: E402
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering  # noqa: E402
from timing import (  # noqa: E402
    make_parser,
    print_ratio,
    print_table,
    set_random_rotations,
    timed_rounds,
    write_record,
)
from trainer_qa import qa_cross_entropy  # noqa: E402


class Conv1DWithLoRA(nn.Module):
    """The reference: LoRA beside an unquantized Conv1D, in the plain form y + (alpha / r) * B(A(x))."""

    def __init__(self, conv, r=8, alpha=16):
        super().__init__()
        self.conv, self.scaling = conv, alpha / r
        inp, out = conv.weight.shape
        self.lora_A, self.lora_B = nn.Parameter(torch.empty(r, inp)), nn.Parameter(torch.zeros(out, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        return self.conv(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling


def stock_with_lora(config):
    model = GPT2ForQuestionAnswering(config)
    for name, conv in [(n, m) for n, m in model.named_modules() if isinstance(m, Conv1D)]:
        model.set_submodule(name, Conv1DWithLoRA(conv))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("qa_outputs"))
    return model.train()


def quantized_with_lora(config, *bits):
    model = QuantGPT2ForQuestionAnswering(config)
    model.add_lora(bits)
    return model.train()


def main():
    parser = make_parser(__doc__, batch_size=4, each="step")
    parser.add_argument("--dropout", type=float, default=0.1, help="all three dropout probabilities of GPT-2")
    parser.add_argument("--joint", action="store_true", help="compare a joint step (widths 8, 4) with one width")
    parser.add_argument(
        "--rotated", action="store_true", help="also the rotated quantizer, and its time over MinMax's"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    started = time.time()

    pdrop = {key: args.dropout for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    config = GPT2Config(n_layer=args.layers, **pdrop)
    if args.joint:
        w8, w84 = models = quantized_with_lora(config, 8), quantized_with_lora(config, 4, 8)
        variants = {
            "W8A8KV8 + LoRA": (w8, (8,), False, ("fake",)),
            "joint W8, W4 + LoRA": (w84, (8, 4), False, ("fake",)),
            "W8A8KV8 + LoRA, --bf16": (w8, (8,), True, ("fake",)),
            "joint W8, W4 + LoRA, --bf16": (w84, (8, 4), True, ("fake",)),
            "joint, integer": (w84, (8, 4), False, ("integer",)),
            "joint, integer, bf16 backward": (w84, (8, 4), False, ("integer", "bf16")),
            "joint, integer, --bf16": (w84, (8, 4), True, ("integer",)),
        }
    else:
        w8, stock = models = quantized_with_lora(config, 8), stock_with_lora(config)
        variants = {
            "float32 + LoRA (stock GPT-2)": (stock, (None,), False, None),
            "LoRA (stock GPT-2), --bf16": (stock, (None,), True, None),
            "W8A8KV8 + LoRA": (w8, (8,), False, ("fake",)),
            "W8A8KV8 + LoRA, --bf16": (w8, (8,), True, ("fake",)),
            "W8A8KV8 + LoRA, integer": (w8, (8,), False, ("integer",)),
            "W8A8KV8 + LoRA, integer, bf16 backward": (w8, (8,), False, ("integer", "bf16")),
            "W8A8KV8 + LoRA, integer, --bf16": (w8, (8,), True, ("integer",)),
        }
    integer = "joint, integer" if args.joint else "W8A8KV8 + LoRA, integer"
    pairs = {f"{minmax}, rotated": minmax for minmax in (integer, f"{integer}, --bf16") if args.rotated}
    if args.rotated:
        rotated = quantized_with_lora(config, *((4, 8) if args.joint else (8,)))
        set_random_rotations(rotated)
        models += (rotated,)
        variants |= {name: (rotated, *variants[minmax][1:]) for name, minmax in pairs.items()}
    ids = torch.randint(0, config.vocab_size, (args.batch_size, args.length), device=args.device)
    labels = torch.randint(0, args.length, (2, args.batch_size), device=args.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    optimizers = {}
    for model in models:
        model.to(args.device)
        optimizers[model] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def forward(model, bits, bf16):
        if bits:
            model.set_bit_config(bits)
        with torch.autocast(args.device, torch.bfloat16, enabled=bf16):
            output = model(input_ids=ids)
        return torch.stack([output.start_logits, output.end_logits])

    def prepare(model, widths, bf16, execution):
        if execution:
            model.set_execution(*execution)

    def step(model, widths, bf16, execution):
        teachers = []
        for bits in widths:
            logits = forward(model, bits, bf16)
            loss = qa_cross_entropy(logits, labels, mask)
            loss = loss + sum(qa_distillation_kl(*logits, *teacher, mask) for teacher in teachers)
            (loss / len(widths)).backward()
            teachers.append(logits.detach())
        optimizers[model].step()
        optimizers[model].zero_grad()

    seconds = timed_rounds(variants, prepare, step, args)
    rows = print_table(seconds, "ratio", width=40)
    ratios = {name: print_ratio(seconds, name, minmax) for name, minmax in pairs.items()}
    write_record(args, started, {"variants": rows, **({"rotated_over_minmax": ratios} if ratios else {})})


if __name__ == "__main__":
    main()
