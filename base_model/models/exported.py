"""The deployable form of a model: packed integer codes of the widths that are served, no float linear weights.

In `model.safetensors`: `<layer>.codes.<bits>` (int8, up to 4 bits two a byte) and `<layer>.scale.<bits>` (float32)
of every linear, with the rotated quantizer also `<layer>.rotation` (float32); the adapters of these widths, biases,
LayerNorm and head in float32; embeddings in float32, or in float16, which rounds them (float32 again in memory).
`config.exported_widths` says what is there. `from_pretrained` opens such a folder like any other.
"""

import copy
import os

import torch
from safetensors.torch import save_file
from torch import nn

from .checkpoint import WEIGHTS_NAME, saving
from .checkpoint_rules import ROTATION
from .errors import UserError
from .quantization import QUANTIZED_BITS

PARTS = ("embeddings", "codes", "scales", "adapters", "other")


def served_widths(configs):
    """{layer: [w_bits, ...]} that resolved configs need, ascending. Raises ValueError for a layer left in float."""
    widths = {layer: sorted({config[layer]["w_bits"] for config in configs}) for layer in configs[0]}
    if floats := [layer for layer, found in widths.items() if found[-1] not in QUANTIZED_BITS]:
        raise UserError(
            f'"{floats[0]}".w_bits = {widths[floats[0]][-1]} ({len(floats)} layers): exported linears have 2 to 8 bits'
        )
    return widths


@torch.no_grad()
def merge_adapters(model):
    """Fold the adapter that each linear's bits choose into its float weight, and drop the bank.

    In the plain basis, where adapters read: a rotation is applied to the weight afterwards, when it is quantized.
    """
    for layer in model.quant_layers().values():
        key = layer.active_adapter
        layer.weight += layer.scaling * (layer.lora_B[key].weight @ layer.lora_A[key].weight)
        layer.lora_A, layer.lora_B = nn.ModuleDict(), nn.ModuleDict()
        layer.clear_quantized()
    model.config.lora_bank, model.config.lora_r, model.config.lora_alpha = None, 0, 0


def exported_state(model, widths, embeddings_dtype=torch.float32):
    """({name: tensor}, {name: part of PARTS}) of the deployable form. widths: as `served_widths`."""
    layers, tied = model.quant_layers(), model._tied_weights_keys or {}
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    served = {name: {"shared", *map(str, widths[name])} for name in layers}
    state, parts = {}, {}

    def put(name, tensor, part):
        state[name], parts[name] = tensor.detach().cpu().contiguous(), part

    for name, tensor in model.state_dict().items():
        layer, _, adapter = name.partition(".lora_")  # "A.8.weight"
        if layer in layers and adapter:
            if adapter.split(".")[1] in served[layer]:
                put(name, tensor, "adapters")
        elif name.endswith(ROTATION):
            put(name, tensor, "scales")
        elif name in embeddings:
            put(name, tensor.to(embeddings_dtype), "embeddings")
        elif name not in tied and name.removesuffix(".weight") not in layers:
            put(name, tensor, "other")
    for name, layer in layers.items():
        for bits, (codes, scale) in layer.stored_codes(widths[name]).items():
            put(f"{name}.codes.{bits}", codes, "codes")
            put(f"{name}.scale.{bits}", scale, "scales")
    return state, parts


def save_exported(model, folder, widths, bit_config, embeddings_dtype=torch.float32):
    """Write the deployable form, every file whole or not at all, and return {part: bytes} of its tensors.

    widths: as `served_widths`; bit_config: resolved config that the folder opens with; embeddings_dtype: float32
    keeps every answer, float16 halves the embeddings and rounds them.
    """
    state, parts = exported_state(model, widths, embeddings_dtype)
    config = copy.deepcopy(model.config)
    config.exported_widths, config.bit_config = widths, bit_config
    config.base_model_name_or_path = config.base_model_revision = config.base_checksum = None  # it is complete
    config.architectures = [type(model).__name__]
    with saving(folder) as scratch:
        save_file(state, os.path.join(scratch, WEIGHTS_NAME), metadata={"format": "pt"})
        config.save_pretrained(scratch)
    return {part: sum(state[name].nbytes for name, found in parts.items() if found == part) for part in PARTS}


def take_codes(model, state):
    """Move the codes out of `state` into the layers of `model`, whose float weights are dropped.

    state: {name: tensor} of an exported file, as `open_checkpoint` checked it; the rest is for `load_state_dict`.
    """
    for name, layer in model.quant_layers().items():
        widths = model.config.exported_widths[name]
        layer.set_stored_codes({b: (state.pop(f"{name}.codes.{b}"), state.pop(f"{name}.scale.{b}")) for b in widths})
        for key in set(layer.lora_A) - {"shared", *map(str, widths)}:
            del layer.lora_A[key], layer.lora_B[key]
