"""GPT-2 with a bit-width per linear layer and a bank of LoRA adapters keyed by bit-width.

The upstream classes are subclassed and the four linears of each block (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj)
are replaced; attention, caches and heads stay upstream's. Never quantized: embeddings, tied LM head, LayerNorm, Q,
attention probabilities, residual stream, qa_outputs / score.

Two doors: `from_pretrained` opens a checkpoint of these classes, or stock GPT-2 weights (hub name or folder), which
it transposes from Conv1D's (in, out) to (out, in). Without quantization and adapters the model equals upstream's.
"""

import contextlib
import os

from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)
from transformers.pytorch_utils import Conv1D

from .bit_config import ALLOWED_BITS, has_kv, resolve_bit_config, short_name
from .checkpoint import QuantGPT2Config
from .checkpoint_rules import is_base
from .errors import UserError
from .execution import Execution
from .exported import served_widths
from .fast import attention
from .fast.blocks import PiecewiseMLP, TanhGELU
from .nf4 import METHOD as NF4
from .nf4 import import_bitsandbytes
from .pretrained import PretrainedMixin
from .quant_linear import QuantLinear
from .quantization import FLOAT_BITS
from .user_input import refuse


class QuantGPT2Mixin(PretrainedMixin):
    """What the three heads share. Comes before the upstream class in the bases."""

    def __init__(self, config):
        if not isinstance(config, QuantGPT2Config):  # a stock one
            fields = {key: value for key, value in config.to_dict().items() if key != "model_type"}
            config = QuantGPT2Config(**fields, attn_implementation=config._attn_implementation)
        super().__init__(config)
        self.execution = Execution()
        for name, conv in [(n, m) for n, m in self.named_modules() if isinstance(m, Conv1D)]:
            head_size = config.n_embd // config.n_head if has_kv(name) else None
            self.set_submodule(name, layer := QuantLinear.from_conv1d(conv, head_size))
            layer.execution, layer.trained = self.execution, config.trained_weights
        for block in self.transformer.h:
            if config.activation_function == "gelu_new":
                block.mlp.act = TanhGELU(self.execution)  # the same function in fewer passes
            block.mlp = PiecewiseMLP(block.mlp)
        if not self.can_generate():
            config.use_cache = False  # one forward is all these heads do: a KV cache would only be filled
        if config.lora_bank:
            self._add_adapters()
        self.set_bit_config(config.bit_config or 32)

    # ---- bit-widths

    def quant_layers(self):
        """{full name: QuantLinear} in model order."""
        return {name: module for name, module in self.named_modules() if isinstance(module, QuantLinear)}

    def layer_shapes(self):
        """{full name: (out, in)}, as `describe_bit_config` takes it."""
        return {name: (module.out_features, module.in_features) for name, module in self.quant_layers().items()}

    def set_bit_config(self, config):
        """Set the bits of every layer and return the resolved config. config: see `bit_config.resolve_bit_config`.

        Raises ValueError, and changes nothing, for a faulty config, bits that the LoRA bank has no adapter for, and
        bits that a model without float weights has no codes for.
        """
        layers = self.quant_layers()
        resolved = resolve_bit_config(config, layers)
        source = config if isinstance(config, str | os.PathLike) else "bit config"
        faults, nf4 = [], bool(self.config.base_quantization)
        if nf4 and any(bits not in FLOAT_BITS for layer in resolved.values() for bits in layer.values()):
            raise UserError(f"{source}: the base of this model is {NF4}: allowed are 16 and 32 bits of W, A and KV")
        for name, layer in layers.items():
            w_bits, codes = resolved[name]["w_bits"], None if layer.weight is not None or nf4 else layer.stored_codes()
            asked = f'{source}: "{name}".w_bits = {w_bits}, but '
            if layer.lora_A and not {"shared", str(w_bits)}.intersection(layer.lora_A):
                faults.append(f"{asked}the LoRA bank has only {list(layer.lora_A)}")
            if codes is not None and w_bits not in codes:
                faults.append(f"{asked}of this layer only the codes of {sorted(codes)} bits are kept")
        if faults:
            raise UserError("\n".join(faults))
        for name, bits in resolved.items():
            layers[name].w_bits, layers[name].a_bits = bits["w_bits"], bits["a_bits"]
            layers[name].kv_bits = bits.get("kv_bits")
        self.config.bit_config = resolved
        return resolved

    @contextlib.contextmanager
    def at_bits(self, config):
        """`with model.at_bits(config):` runs the body under `config` and restores the former bits in any case.

        With gradient checkpointing call backward inside the body: the recomputation reads the bits again.
        """
        before = self.config.bit_config
        resolved = self.set_bit_config(config)
        try:
            yield resolved
        finally:
            self.set_bit_config(before)

    # ---- quantizer

    def set_rotations(self, rotations):
        """Choose the quantizer: rotated, by these vectors {linear: d (in,) float32} of all linears; None: MinMax.

        Raises UserError, and changes nothing, for vectors or sizes that do not work and for kept codes of the other
        quantizer.
        """
        layers = self.quant_layers()
        if rotations is not None and (different := sorted(set(rotations) ^ set(layers))):
            raise UserError(f"rotations: {different[0]}: allowed are all {len(layers)} linears of the model")
        before = {name: layer.rotation for name, layer in layers.items()}
        if rotations is None and all(rotation is None for rotation in before.values()):
            return
        try:
            for name, layer in layers.items():
                layer.set_rotation(None if rotations is None else rotations[name])
        except UserError as error:
            for layer, rotation in zip(layers.values(), before.values(), strict=True):
                layer.rotation = rotation
            raise UserError(f"{name}: {error}") from None
        self.config.quantizer = "minmax" if rotations is None else "rotated"

    def rotations(self):
        """{linear: d}, as `set_rotations` takes it; None under MinMax."""
        found = {name: layer.rotation for name, layer in self.quant_layers().items()}
        return None if None in found.values() else found

    # ---- a base in 4 bits

    def quantize_base(self, method=NF4):
        """Hold the frozen weights of all linears as NF4 codes from now on; the adapters train beside them (nf4.py).

        Raises UserError, and changes nothing: another method, no adapters, weights or bits that are quantized
        otherwise, no bitsandbytes.
        """
        if self.config.base_quantization == method:
            return
        layers, bits = self.quant_layers(), self.config.bit_config
        quantized = any(width not in FLOAT_BITS for layer in bits.values() for width in layer.values())
        checks = [
            (method != NF4, f"allowed is {NF4}"),
            (not self.config.lora_bank, "adapters train beside it, and the model has none"),
            (any(layer.weight is None for layer in layers.values()), "the model has no float weights to make it from"),
            (self.config.quantizer != "minmax", f"the model has the {self.config.quantizer} quantizer"),
            (quantized, f"the model has bits of its own, {short_name(bits)}; allowed are 16 and 32 for W, A and KV"),
        ]
        refuse(f"base_quantization = {method}", [fault for there, fault in checks if there])
        import_bitsandbytes()
        for layer in layers.values():
            layer.set_nf4()
        self.config.base_quantization = method

    # ---- execution

    def quantization_off(self):
        """`with model.quantization_off():` nothing is quantized in the body; the bits go on choosing the adapters."""
        return self.execution.as_kind("float")

    def set_execution(self, execution, backward_dtype="fp32"):
        """How layers with w_bits <= 8 and a_bits <= 8 compute their product; the others always run in float.

        execution: "fake" (the default of a model): quantize, dequantize, float product. "integer": int8 codes and
        `torch._int_mm`, also in the forward pass of training; a trainable weight stays "fake". On a CPU GELU and
        attention of evaluation in float32 are compiled then as well (kernels.py).
        backward_dtype: "fp32": products of the backward pass in the dtype of the gradient; "bf16". Raises ValueError.
        """
        self.execution.set(execution, backward_dtype)
        if self.config._attn_implementation in ("sdpa", attention.NAME):
            self.set_attn_implementation(attention.NAME if execution == "integer" else "sdpa")

    def drop_float_weights(self, widths):
        """Keep only the integer codes at `widths` in the quantized linears: for evaluation, a quarter of the memory.

        The model then serves these w_bits alone; others are an error, and so is saving it as a float checkpoint.
        Args: widths: w_bits of all linears, or {linear: its w_bits} as of `exported.served_widths`.
        """
        for name, layer in self.quant_layers().items():
            layer.set_stored_codes(layer.stored_codes(widths[name] if isinstance(widths, dict) else widths))

    def keep_only_codes(self, configs):
        """Drop the float weights if nothing but `configs` (resolved) is evaluated and none of them uses floats.

        The model is left at the first config. With one that has 16 or 32 bits somewhere, nothing is done.
        """
        configs = list(configs)
        if all(bits["w_bits"] not in FLOAT_BITS for config in configs for bits in config.values()):
            self.set_bit_config(configs[0])
            self.drop_float_weights(served_widths(configs))

    def quantized_bytes(self):
        """Memory that the weights of the quantized linears take now: codes, scales and float weights."""
        kept = [pair for layer in self.quant_layers().values() for pair in layer.stored_codes().values()]
        kept.append([layer.weight for layer in self.quant_layers().values() if layer.weight is not None])
        kept.append([layer.nf4 for layer in self.quant_layers().values() if layer.nf4 is not None])
        return sum(tensor.nbytes for tensors in kept for tensor in tensors)

    # ---- LoRA

    def add_lora(self, bank, r=None, lora_alpha=None):
        """Add the adapters, freeze the base, and leave adapters and head trainable.

        bank: widths served by an adapter of their own (4, 8 or "4", "8", ...), or ["shared"]: one for all widths.
        r: rank (None: 8); lora_alpha: the adapters are scaled by lora_alpha / r (None: 16).
        Raises ValueError: adapters present already, bad widths or rank.
        """
        bank, allowed = [str(key) for key in bank], set(map(str, ALLOWED_BITS))
        r, lora_alpha = 8 if r is None else r, 16 if lora_alpha is None else lora_alpha
        if self.config.lora_bank:
            raise UserError(f"the model has a LoRA bank already: {self.config.lora_bank}")
        if bank != ["shared"] and (not bank or len(set(bank)) < len(bank) or not set(bank) <= allowed):
            raise UserError(f'LoRA bank {bank}: allowed are different bit-widths (2 to 8, 16, 32) or ["shared"]')
        if r < 1 or lora_alpha <= 0:
            raise UserError(f"LoRA r = {r}, alpha = {lora_alpha}: both must be positive")
        self.config.lora_bank, self.config.lora_r, self.config.lora_alpha = bank, r, lora_alpha
        self._add_adapters()
        if bank != ["shared"]:
            self.set_bit_config(max(map(int, bank)))

    def _add_adapters(self):
        for layer in self.quant_layers().values():
            layer.add_lora(self.config.lora_bank, self.config.lora_r, self.config.lora_alpha)
            layer.to(layer.bias.device)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not is_base(name))


class QuantGPT2ForQuestionAnswering(QuantGPT2Mixin, GPT2ForQuestionAnswering):
    """Extractive question answering: start and end logits per token."""


class QuantGPT2ForSequenceClassification(QuantGPT2Mixin, GPT2ForSequenceClassification):
    """Classification from the last token that is no padding."""


class QuantGPT2LMHeadModel(QuantGPT2Mixin, GPT2LMHeadModel):
    """Language model; the head is tied to the embedding, belongs to the base and is never quantized."""


# Once this module is imported, AutoModel opens checkpoints of these classes.
AutoModelForQuestionAnswering.register(QuantGPT2Config, QuantGPT2ForQuestionAnswering)
AutoModelForSequenceClassification.register(QuantGPT2Config, QuantGPT2ForSequenceClassification)
AutoModelForCausalLM.register(QuantGPT2Config, QuantGPT2LMHeadModel)
