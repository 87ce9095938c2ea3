#!/usr/bin/env python
"""Outliers of every linear's input before and after balance and rotation, as a record for the report.

    python report/outlier_channels.py --model_name_or_path quickstart/work/runs/lora_fp32 --max_seq_length 256 \\
        --train_file quickstart/work/data/train.json --record_file results/quickstart/outlier_channels.json

Of every token's row of input channels: the largest size over the root mean square, which says how coarse one scale a
token is for the rest of the row. The mean over the tokens of the calibration windows, in four bases: the channels as
they are, balanced (x / s), rotated (random signs and Hadamard blocks), both.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "base_model"))
from common.arguments import CheckpointArguments, DataTrainingArguments  # noqa: E402
from common.calibration import as_calibrated, calibrate  # noqa: E402
from common.data import calibration_windows, load_data  # noqa: E402
from common.flags import parse_args  # noqa: E402
from common.loading import load_model, load_tokenizer  # noqa: E402
from common.record import relative_path, run_record, write_json_atomic  # noqa: E402
from common.script import plain_errors  # noqa: E402
from common.training_args import TrainingArguments  # noqa: E402
from models.errors import UserError  # noqa: E402
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering  # noqa: E402
from models.rotation import rotate  # noqa: E402

BASES = ("plain", "balanced", "rotated", "both")


def peaks(x):
    """Largest size over root mean square of every row, summed over the rows that are not zero. x: (rows, n)."""
    rms = x.square().mean(-1).sqrt()
    return (x.abs().amax(-1)[rms > 0] / rms[rms > 0]).double().sum().item()


def measure(model, windows, rotations):
    """{linear: {base: mean over tokens of the largest channel over the root mean square}}.

    windows: token ids, one list each; rotations: {linear: d} of `calibrate`.
    """
    layers, tokens = model.quant_layers(), sum(map(len, windows))
    sums = {name: dict.fromkeys(BASES, 0.0) for name in layers}

    def add(name):
        def hook(layer, inputs):
            x, d = inputs[0].detach().reshape(-1, layer.in_features).float(), rotations[name]
            for base, row in zip(BASES, (x, x * d.abs(), rotate(x, d.sign()), rotate(x, d)), strict=True):
                sums[name][base] += peaks(row)

        return hook

    hooks = [layer.register_forward_pre_hook(add(name)) for name, layer in layers.items()]
    with torch.no_grad(), as_calibrated(model):
        for window in windows:
            model.transformer(torch.tensor([window]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: {base: total / tokens for base, total in found.items()} for name, found in sums.items()}


def main():
    start = time.time()
    model_args, data_args, training_args = parse_args(CheckpointArguments, DataTrainingArguments, TrainingArguments)
    if not data_args.record_file:
        raise UserError("--record_file: say where the record goes")
    tokenizer = load_tokenizer(model_args)
    model = load_model(QuantGPT2ForQuestionAnswering, model_args, tokenizer).eval()
    examples, sources = load_data(data_args, ["train"], model_args)
    windows = calibration_windows(model, tokenizer, model_args, data_args, training_args.seed, examples["train"])
    rotations, ratios = calibrate(model, windows, training_args.seed)
    rows = measure(model, windows, rotations)
    record = run_record(
        model=relative_path(model_args.model_name_or_path),
        bit_config=None,
        metrics={base: max(found[base] for found in rows.values()) for base in BASES},
        data=sources,
        seed=training_args.seed,
        wall_seconds=time.time() - start,
        calibration_windows=len(windows),
        outliers=ratios,
        largest_over_rms=rows,
    )
    write_json_atomic(data_args.record_file, record)
    worst = ", ".join(f"{base} {size:.1f}" for base, size in record["metrics"].items())
    print(f"largest over root mean square, worst linear: {worst}")


if __name__ == "__main__":
    with plain_errors():
        main()
