"""Post-training quantization of the linears by bitsandbytes: another quantizer, for comparison only.

Weight-only, unlike this repository's W-A-KV configs, so its numbers stand in columns of their own:
- "8bit": int8 weights, one scale per output channel. On CUDA this is LLM.int8() (arXiv:2208.07339): there, activations
  are rounded to int8 as well, except for outlier features (|x| > 6). On CPU bitsandbytes dequantizes the weights.
- "nf4": NormalFloat 4-bit weights in blocks of 64 with double quantization (QLoRA, arXiv:2305.14314).
"""

from torch import nn

from .errors import UserError
from .nf4 import METHOD, import_bitsandbytes

LABELS = {"8bit": "bitsandbytes int8 (weight-only)", "nf4": "bitsandbytes nf4 + double quantization (weight-only)"}
METHODS = tuple(LABELS)


class BitsAndBytesLinear(nn.Module):
    """A bitsandbytes layer with the (unquantized) adapter of the QuantLinear that it replaces."""

    def __init__(self, base, layer):
        super().__init__()
        self.base, self.scaling = base, layer.scaling
        key = layer.active_adapter
        self.lora_A, self.lora_B = (layer.lora_A[key], layer.lora_B[key]) if key else (None, None)

    def forward(self, x):
        y = self.base(x)
        return y if self.lora_A is None else y + self.lora_B(self.lora_A(x)) * self.scaling


def quantize_with_bitsandbytes(model, method):
    """Replace every QuantLinear of `model`, in place, by a bitsandbytes layer on the same float weights.

    Its own bits are ignored, its active adapters stay. method: "8bit" or "nf4". Raises ValueError: other methods, a
    model without float weights, bitsandbytes is not installed.
    """
    if method not in METHODS:
        raise UserError(f"bitsandbytes method {method!r}: allowed are {', '.join(METHODS)}")
    if model.config.exported_widths or model.config.base_quantization:
        kind = "an exported checkpoint" if model.config.exported_widths else f"one of an {METHOD} base"
        raise UserError(f"bitsandbytes quantizes float weights, and {kind} has none")
    bnb = import_bitsandbytes()
    for name, layer in model.quant_layers().items():
        out_features, in_features = layer.weight.shape
        if method == "nf4" and in_features % 64:
            raise UserError(f"{name}: nf4 works on blocks of 64 weights, but the layer has {in_features} inputs")
        weight, device = layer.weight.detach().cpu(), layer.weight.device
        if method == "8bit":
            base = bnb.nn.Linear8bitLt(in_features, out_features, has_fp16_weights=False, threshold=6.0)
            base.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            base = bnb.nn.Linear4bit(in_features, out_features, compress_statistics=True, quant_type="nf4")
            base.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
        base.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        # The move quantizes the weight, on CPU too.
        model.set_submodule(name, BitsAndBytesLinear(base.to(device), layer))
    return model
