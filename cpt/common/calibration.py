"""What the rotated quantizer is made from: the size of every linear's input channels, measured on training windows.

No gradients, nothing quantized, the adapters active that the model's bits choose, one window at a time so that there
is no padding. 256 windows fix the root mean squares to a few per cent, and d depends on their root only.
"""

import logging

import matplotlib
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from common.checksums import tensors_checksum
from common.record import atomic_path
from common.resuming import on_rank_zero
from models.checkpoint import open_checkpoint
from models.checkpoint_rules import ROTATION
from models.errors import UserError
from models.rotation import make_rotation

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

logger = logging.getLogger(__name__)


def input_rms(model, windows):
    """{linear: root mean square of each input channel over all tokens, (in,) float32 on the CPU}.

    windows: token ids, one list each. Raises UserError: an exported model.
    """
    if model.config.exported_widths:
        raise UserError("an exported checkpoint has no float weights: calibrate and measure the one of the training")
    layers, tokens = model.quant_layers(), sum(map(len, windows))
    sums = {name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in layers.items()}

    def add(name):
        def hook(layer, inputs):
            squares = inputs[0].detach().reshape(-1, layer.in_features).float().square().sum(0)
            sums[name] += squares.double().cpu()

        return hook

    hooks = [layer.register_forward_pre_hook(add(name)) for name, layer in layers.items()]
    device, trains = next(model.parameters()).device, model.training
    model.eval().to(PartialState().device)
    try:
        with torch.no_grad(), model.quantization_off():
            for window in tqdm(windows, desc="calibration", unit="window", leave=False):
                model.transformer(torch.tensor([window], device=PartialState().device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(trains).to(device)
    return {name: (total / tokens).sqrt().float() for name, total in sums.items()}


def calibrate(model, windows, seed):
    """({linear: d}, {linear: outlier ratio}) of a model with float weights; signs drawn from `seed`."""
    rms, generator = input_rms(model, windows), torch.Generator().manual_seed(seed)
    rotations = {
        name: make_rotation(rms[name].to(layer.weight.device), layer.weight, generator).cpu()
        for name, layer in model.quant_layers().items()
    }
    return rotations, outlier_ratios(rms)


def set_quantizer(model, model_args, seed, windows, checkpoint=None):
    """Give the model the quantizer of --quantizer (None: its own); returns what a record says about it.

    windows: makes the calibration windows, called where they are needed; checkpoint: folder of a training that is
    resumed, whose rotation is taken. Raises UserError: a checkpoint of the other quantizer, an exported model.
    """
    found = model.config.quantizer
    asked = model_args.quantizer or found
    about = {"quantizer": asked, "checkpoint_quantizer": found}
    if asked != found and model.config.exported_widths:
        own = f"{model_args.model_name_or_path} is exported, with the codes of --quantizer {found} alone"
        raise UserError(f"--quantizer {asked}: {own}: export the checkpoint that it was made from anew")
    resumed = open_checkpoint(checkpoint, {}) if checkpoint else None
    if resumed and (trained := resumed.fields.get("quantizer", "minmax")) != asked:
        raise UserError(f"{checkpoint}: trained with --quantizer {trained}, not {asked}")
    if asked == "minmax":
        model.set_rotations(None)
        return about
    if resumed:
        model.set_rotations({name: resumed.state[name + ROTATION] for name in model.quant_layers()})
    elif found == "minmax":
        ones = {name: torch.ones(layer.in_features) for name, layer in model.quant_layers().items()}
        model.set_rotations(ones)  # refuses rows that cannot be rotated, before anything is computed
        samples = on_rank_zero(windows)
        rotations, outliers = on_rank_zero(lambda: calibrate(model, samples, seed))
        model.set_rotations(rotations)
        about |= {"calibration_windows": len(samples), "calibration_seed": seed, "outliers": outliers}
    logger.info("quantizer: rotated%s", "" if found == "rotated" else f", the checkpoint has {found}")
    return about | {"rotation_sha256": tensors_checksum(model.rotations())}


def quantizer_label(about):
    """The quantizer that ran, for a table. about: of `set_quantizer`."""
    own, served = about["checkpoint_quantizer"], about["quantizer"]
    return served if own == served else f"{served} (the checkpoint has {own})"


# ---- outliers


def outlier_ratios(rms):
    """{linear: root mean square of its largest input channel over that of the median one}."""
    return {name: (x.max() / x.median().clamp(min=torch.finfo(x.dtype).tiny)).item() for name, x in rms.items()}


def measure_outliers(model, windows):
    """`outlier_ratios` of a model with float weights over calibration windows."""
    return outlier_ratios(input_rms(model, windows))


def outlier_grid(ratios):
    """(names of the linears of a block, rows: their ratios block by block)."""
    kinds = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in ratios))
    values = list(ratios.values())
    return kinds, [values[at : at + len(kinds)] for at in range(0, len(values), len(kinds))]


def outlier_lines(ratios):
    """The ratios as a markdown table, a row per block."""
    kinds, rows = outlier_grid(ratios)
    lines = [f"| block | {' | '.join(kinds)} |", f"|{'---|' * (len(kinds) + 1)}"]
    return lines + [f"| {n} | {' | '.join(f'{value:.1f}' for value in row)} |" for n, row in enumerate(rows)]


def draw_outliers(ratios, path, caption):
    """The ratios as a block x linear map, PNG."""
    kinds, rows = outlier_grid(ratios)
    figure, axes = plt.subplots(figsize=(5.5, 1.5 + 0.35 * len(rows)), layout="constrained")
    image = axes.imshow(rows, aspect="auto", norm=matplotlib.colors.LogNorm(vmin=1), cmap="viridis")
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_yticks(range(len(rows)), range(len(rows)))
    axes.set(ylabel="block", title="largest input channel over the median one (rms)")
    dark = max(map(max, rows)) ** 0.6
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.1f}", ha="center", va="center", color="white" if value < dark else "black")
    figure.colorbar(image)
    figure.supxlabel(caption, fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
