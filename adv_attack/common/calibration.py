"""What the rotated quantizer is made from: the size of every linear's input channels, measured on training windows.

No gradients, nothing quantized, the adapters of the highest width active, one window at a time so that there is no
padding. 256 windows fix the root mean squares to a few per cent, and d depends on their root only.
"""

import contextlib
import logging

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from common.checksums import tensors_checksum
from common.resuming import on_rank_zero
from models.checkpoint import open_checkpoint, read_config
from models.checkpoint_rules import ROTATION
from models.errors import UserError
from models.rotation import make_rotation

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def as_calibrated(model):
    """The model with nothing quantized and the adapters of its highest width."""
    widths = [int(key) for key in model.config.lora_bank or () if key != "shared"]
    with model.at_bits(max(widths)) if widths else contextlib.nullcontext(), model.quantization_off():
        yield


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
        with torch.no_grad(), as_calibrated(model):
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
    resumed, whose rotation is taken. An NF4 base is its own quantizer. Raises UserError: a checkpoint of the other
    quantizer, an exported model, rotated beside an NF4 base.
    """
    found = model.config.quantizer
    asked = model_args.quantizer or found
    about = {"quantizer": asked, "checkpoint_quantizer": found}
    if asked != found and model.config.exported_widths:
        own = f"{model_args.model_name_or_path} is exported, with the codes of --quantizer {found} alone"
        raise UserError(f"--quantizer {asked}: {own}: export the checkpoint that it was made from anew")
    if checkpoint and (trained := read_config(checkpoint, {})[1].get("quantizer", "minmax")) != asked:
        raise UserError(f"{checkpoint}: trained with --quantizer {trained}, not {asked}")
    if method := model.config.base_quantization:
        if asked == "rotated":
            raise UserError(f"--quantizer rotated: the base of this model is {method}, which is not rotated")
        return dict.fromkeys(about, method)
    if asked == "minmax":
        model.set_rotations(None)
        return about
    if checkpoint:
        state = open_checkpoint(checkpoint, {}).state
        model.set_rotations({name: state[name + ROTATION] for name in model.quant_layers()})
    elif found == "minmax":
        ones = {name: torch.ones(layer.in_features) for name, layer in model.quant_layers().items()}
        model.set_rotations(ones)  # refuses rows that cannot be rotated, before anything is computed

        def compute():
            samples = windows()
            return *calibrate(model, samples, seed), len(samples)

        rotations, outliers, number = on_rank_zero(compute)
        model.set_rotations(rotations)
        about |= {"calibration_windows": number, "calibration_seed": seed, "outliers": outliers}
    logger.info("quantizer: rotated%s", "" if found == "rotated" else f", the checkpoint has {found}")
    return about | {"rotation_sha256": tensors_checksum(model.rotations())}


def quantizer_label(about):
    """The quantizer that ran, for a table. about: of `set_quantizer`."""
    own, served = about["checkpoint_quantizer"], about["quantizer"]
    return served if own == served else f"{served} (the checkpoint has {own})"


def outlier_ratios(rms):
    """{linear: root mean square of its largest input channel over that of the median one}. rms: of `input_rms`."""
    return {name: (x.max() / x.median().clamp(min=torch.finfo(x.dtype).tiny)).item() for name, x in rms.items()}
