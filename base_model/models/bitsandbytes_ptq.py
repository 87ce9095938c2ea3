"""Post-training quantization of the linears by bitsandbytes: another quantizer, for comparison only.

K and V stay in float, unlike in this repository's W-A-KV configs, so its numbers stand in columns of their own:
- "8bit" is LLM.int8() (arXiv:2208.07339): int8 weights, one scale per output channel; activations are float16 rounded
  to int8 per token, except for outlier features (|x| > 6). In training mode a CPU dequantizes the weights instead.
- "nf4" is weight-only: NormalFloat 4-bit in blocks of 64 with double quantization (QLoRA, arXiv:2305.14314). In
  evaluation mode a CPU with bf16 computes it in bf16.
"""

from torch import nn

from .errors import UserError
from .nf4 import METHOD, import_bitsandbytes

LABELS = {"8bit": "bitsandbytes LLM.int8()", "nf4": "bitsandbytes nf4 + double quantization (weight-only)"}
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
        # The move quantizes the weight, on CPU too. The mode decides how it computes.
        model.set_submodule(name, BitsAndBytesLinear(base.to(device), layer).train(layer.training))
    return model
