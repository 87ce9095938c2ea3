"""GPT-2 with a bit-width per linear layer and a bank of LoRA adapters keyed by bit-width.

The upstream classes are subclassed and the four linears of each block (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj)
are replaced; attention, caches and heads stay upstream's. Never quantized: embeddings, tied LM head, LayerNorm, Q,
attention probabilities, residual stream, qa_outputs / score.

Two doors: `from_pretrained` opens a checkpoint of these classes, or stock GPT-2 weights (hub name or folder), which
it transposes from Conv1D's (in, out) to (out, in). Without quantization and adapters the model equals upstream's.
"""

import contextlib
import hashlib
import math
import os

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2ForQuestionAnswering, GPT2ForSequenceClassification, GPT2LMHeadModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from .bit_config import has_kv, resolve_bit_config
from .checkpoint import FLOAT_DTYPES, RULES, QuantGPT2Config, is_base, open_base, open_checkpoint, refuse, saving
from .errors import UserError
from .exported import served_widths, take_codes
from .fast import attention, kernels
from .fast.integer import PACKED_BITS, ROWS, integer_linear, is_supported, pack_int4, unpack_int4
from .quantization import (
    FLOAT_BITS,
    QUANTIZED_BITS,
    check_bits,
    fake_quantize,
    fake_quantize_kv_,
    frozen_linear,
    quantize,
)


class QuantLinear(nn.Module):
    """Linear layer y = Q(x) Q(W)^T + b + (lora_alpha / r) x A^T B^T, with the weight stored (out, in).

    `w_bits`, `a_bits`, `kv_bits` are state of the module, set by `set_bit_config`. The adapter reads the unquantized x
    (QLoRA's order); `w_bits` selects it. K and V are the last two thirds of `attn.c_attn`'s output.
    `execution`, `backward_dtype`: see `set_execution` of the model.
    """

    def __init__(self, in_features, out_features, with_kv=False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        self.w_bits, self.a_bits, self.kv_bits = 32, 32, 32 if with_kv else None
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()  # peft's names; keys "4", "8", ... or "shared"
        self.scaling = 0.0
        self.execution, self.backward_dtype = "fake", None
        self._quantized, self._quantized_from = {}, None  # {w_bits: (codes, packed up to 4 bits; scale)}

    @classmethod
    def from_conv1d(cls, conv, with_kv=False):
        """The same layer as upstream's Conv1D, whose weight is (in, out)."""
        with torch.device("meta"):
            layer = cls(*conv.weight.shape, with_kv)
        layer.weight = nn.Parameter(conv.weight.detach().t().contiguous())
        layer.bias = nn.Parameter(conv.bias.detach())
        return layer

    def add_lora(self, keys, r, lora_alpha):
        """One adapter per key: A (r, in) as in peft, B (out, r) = 0, so that a new adapter changes nothing.

        All keys start from the same A: trained together they stay near each other, which a shared head and mixed
        assignments profit from.
        """
        start = torch.empty(r, self.in_features)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5))
        for key in keys:
            self.lora_A[key] = nn.Linear(self.in_features, r, bias=False)
            self.lora_B[key] = nn.Linear(r, self.out_features, bias=False)
            self.lora_A[key].weight.data.copy_(start)
            nn.init.zeros_(self.lora_B[key].weight)
        self.scaling = lora_alpha / r

    @property
    def active_adapter(self):
        """Key of the adapter in use, None without a bank."""
        if not self.lora_A:
            return None
        return "shared" if "shared" in self.lora_A else str(self.w_bits)

    @property
    def can_train(self):
        """Whether the weight may change under the optimizer: its codes are then not kept."""
        return self.weight is not None and self.weight.requires_grad

    # ---- codes of the weight

    def quantized_weight(self):
        """(codes, scale) of the weight at `w_bits`; of a frozen weight made once per width and kept until it changes.

        A change is seen by torch's version counter; in-place writes through `weight.data` bypass it and need
        `clear_quantized()`. A weight that can train is quantized in every call: fused optimizers bypass the counter.
        Kept are the stored codes; returned are plain int8 codes (out, in).
        """
        codes, scale = self._stored(self.w_bits)
        return (codes if codes.dtype == torch.int8 else unpack_int4(codes, self.in_features)), scale

    def _stored(self, w_bits):
        if self.weight is not None:
            state = (id(self.weight), self.weight.data_ptr(), self.weight._version)
            if state != self._quantized_from or self.can_train:
                self._quantized, self._quantized_from = {}, state
        if w_bits in self._quantized:
            return self._quantized[w_bits]
        if self.weight is None:
            raise UserError(f"w_bits = {w_bits}: only codes of {sorted(self._quantized)} bits are kept")
        codes, scale = quantize(self.weight, w_bits)
        stored = (pack_int4(codes) if w_bits <= PACKED_BITS else codes), scale
        if not self.can_train:
            self._quantized[w_bits] = stored
        return stored

    def stored_codes(self, widths=None):
        """{width: (codes, scale)} of these widths, or of those made so far.

        codes: (out, in) int8, up to 4 bits packed (out, ceil(in / 2)) uint8; scale: (out, 1) float32.
        """
        return {w_bits: self._stored(w_bits) for w_bits in (self._quantized if widths is None else widths)}

    def set_stored_codes(self, stored):
        """Take the codes of `stored_codes` in place of the float weight, which is dropped: for evaluation only."""
        for w_bits, (codes, scale) in stored.items():
            check_bits(w_bits, QUANTIZED_BITS)
            packed = w_bits <= PACKED_BITS
            columns = (self.in_features + 1) // 2 if packed else self.in_features
            expected = ((self.out_features, columns), torch.uint8 if packed else torch.int8)
            if (tuple(codes.shape), codes.dtype) != expected or tuple(scale.shape) != (self.out_features, 1):
                raise UserError(
                    f"codes at {w_bits} bits are {codes.dtype} {tuple(codes.shape)} with scale {tuple(scale.shape)}: "
                    f"this layer takes {expected[1]} {expected[0]} with scale {(self.out_features, 1)}"
                )
        self.weight = None
        self._quantized, self._quantized_from = dict(stored), None

    def clear_quantized(self):
        if self.weight is not None:
            self._quantized, self._quantized_from = {}, None

    def _apply(self, fn, *args, **kwargs):
        if self.weight is None:  # move the codes; .half() and the like leave the scales float32
            self._quantized = {w_bits: (fn(c), s.to(fn(c).device)) for w_bits, (c, s) in self._quantized.items()}
        self.clear_quantized()  # .to(), .half(), .cuda() replace the storage of the weight
        return super()._apply(fn, *args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self.clear_quantized()
        return super()._load_from_state_dict(*args, **kwargs)

    # ---- forward

    def _on_integers(self, x):
        return (
            self.execution == "integer"
            and self.w_bits not in FLOAT_BITS
            and self.a_bits not in FLOAT_BITS
            and is_supported(x.device, self.in_features, self.out_features)
        )

    def forward(self, x):
        """x: (..., in) -> (..., out)."""
        if self.can_train:
            self.clear_quantized()  # codes of a time when it was frozen
        shape = (*x.shape[:-1], self.out_features)
        x = x.reshape(-1, self.in_features)  # (tokens, in)
        key = self.active_adapter
        if torch.is_grad_enabled() or not self._on_integers(x):
            y = self._product(x)
            if key is not None:
                low_rank = F.linear(x, self.lora_A[key].weight)  # (tokens, r)
                # In place: y is fresh, and nothing needs its old value for the backward pass.
                y.addmm_(low_rank.to(y.dtype), self.lora_B[key].weight.t().to(y.dtype), alpha=self.scaling)
            return fake_quantize_kv_(y, self.kv_bits).view(shape)
        lora = None if key is None else (self.lora_A[key].weight, self.lora_B[key].weight, self.scaling)
        weight = self.quantized_weight()
        return integer_linear(x, *weight, self.bias, self.a_bits, lora, self.kv_bits).view(shape)

    def _product(self, x):
        """Q(x) Q(W)^T + b with its gradients."""
        if self.w_bits in FLOAT_BITS:
            if self.weight is None:
                self._stored(self.w_bits)  # raises
            return F.linear(fake_quantize(x, self.a_bits), self.weight, self.bias)
        if self.can_train and torch.is_grad_enabled():
            return F.linear(fake_quantize(x, self.a_bits), fake_quantize(self.weight, self.w_bits), self.bias)
        product = integer_linear if self._on_integers(x) else None
        return frozen_linear(x, *self.quantized_weight(), self.bias, self.a_bits, product, self.backward_dtype)

    def extra_repr(self):
        bits = f"w_bits={self.w_bits}, a_bits={self.a_bits}" + (f", kv_bits={self.kv_bits}" if self.kv_bits else "")
        return f"in_features={self.in_features}, out_features={self.out_features}, {bits}, lora={list(self.lora_A)}"


class TanhGELU(nn.Module):
    """GPT-2's gelu_new: 0.5 x (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3). `execution`: see
    `set_execution` of the model."""

    def __init__(self):
        super().__init__()
        self.execution = "fake"

    def forward(self, x):
        if self.execution == "integer" and kernels.can_take(x):
            return kernels.gelu(x.reshape(-1, x.shape[-1])).view(x.shape)
        if torch.is_grad_enabled() or x.is_cuda or x.dtype != torch.float32:
            return F.gelu(x, approximate="tanh")
        # The same as x sigmoid(2 u); on a CPU sigmoid costs a tenth of tanh.
        slope = 2 * math.sqrt(2 / math.pi)
        return torch.addcmul(x.new_tensor(slope), x, x, value=slope * 0.044715).mul_(x).sigmoid_().mul_(x)


class PiecewiseMLP(nn.Module):
    """Upstream's GPT2MLP. Without gradients a CPU takes it in pieces of the tokens, whose wide hidden states stay in
    the cache (see `integer.py`)."""

    def __init__(self, mlp):
        super().__init__()
        self.c_fc, self.c_proj, self.act, self.dropout = mlp.c_fc, mlp.c_proj, mlp.act, mlp.dropout

    def forward(self, x):
        """x: (batch, seq, hidden) -> the same shape."""
        # A weight that can train is quantized in every call: once for all tokens, not once a piece.
        trains = isinstance(self.c_fc, QuantLinear) and self.c_fc.can_train
        if torch.is_grad_enabled() or x.is_cuda or trains:
            return self._forward(x)
        return torch.cat([self._forward(piece) for piece in x.flatten(0, -2).split(ROWS)]).view(x.shape)

    def _forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


def _own_config(stock):
    fields = {key: value for key, value in stock.to_dict().items() if key != "model_type"}
    return QuantGPT2Config(**fields, attn_implementation=stock._attn_implementation)


class QuantGPT2Mixin:
    """What the three heads share. Comes before the upstream class in the bases."""

    config_class = QuantGPT2Config

    def __init__(self, config):
        if not isinstance(config, QuantGPT2Config):
            config = _own_config(config)
        super().__init__(config)
        for name, conv in [(n, m) for n, m in self.named_modules() if isinstance(m, Conv1D)]:
            self.set_submodule(name, QuantLinear.from_conv1d(conv, with_kv=has_kv(name)))
        for block in self.transformer.h:
            if config.activation_function == "gelu_new":
                block.mlp.act = TanhGELU()  # the same function in fewer passes
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
        """Set the bits of every layer and return the resolved config.

        Args:
            config: JSON path, dict, int or short form; see `bit_config.resolve_bit_config`.
        Raises:
            ValueError: faulty config, bits that the LoRA bank has no adapter for, or that a model without float
                weights has no codes for. Nothing is changed then.
        """
        layers = self.quant_layers()
        resolved = resolve_bit_config(config, layers)
        source = config if isinstance(config, str | os.PathLike) else "bit config"
        faults = [
            f'{source}: "{name}".w_bits = {bits["w_bits"]}, but the LoRA bank has only {list(layer.lora_A)}'
            for (name, layer), bits in zip(layers.items(), resolved.values(), strict=True)
            if layer.lora_A and "shared" not in layer.lora_A and str(bits["w_bits"]) not in layer.lora_A
        ]
        faults += [
            f'{source}: "{name}".w_bits = {bits["w_bits"]}, but of this layer only the codes of '
            f"{sorted(layer.stored_codes())} bits are kept"
            for (name, layer), bits in zip(layers.items(), resolved.values(), strict=True)
            if layer.weight is None and bits["w_bits"] not in layer.stored_codes()
        ]
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

    # ---- execution

    def set_execution(self, execution, backward_dtype="fp32"):
        """How layers with w_bits <= 8 and a_bits <= 8 compute their product; the others always run in float.

        Args:
            execution: "fake" (the default of a model): quantize, dequantize, float product. "integer": int8 codes
                and `torch._int_mm`, also in the forward pass of training; a trainable weight stays "fake". On a CPU
                GELU and attention of evaluation in float32 are compiled then as well (kernels.py).
            backward_dtype: "fp32": products of the backward pass in the dtype of the gradient; "bf16".
        Raises:
            ValueError: other values.
        """
        dtypes = {"fp32": None, "bf16": torch.bfloat16}
        if execution not in ("integer", "fake"):
            raise UserError(f"execution = {execution!r}: allowed are integer, fake")
        if backward_dtype not in dtypes:
            raise UserError(f"backward_dtype = {backward_dtype!r}: allowed are {', '.join(dtypes)}")
        for layer in self.quant_layers().values():
            layer.execution, layer.backward_dtype = execution, dtypes[backward_dtype]
        for block in self.transformer.h:
            if isinstance(block.mlp.act, TanhGELU):
                block.mlp.act.execution = execution
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
        tensors = []
        for layer in self.quant_layers().values():
            tensors += [layer.weight] * (layer.weight is not None)
            tensors += [tensor for stored in layer.stored_codes().values() for tensor in stored]
        return sum(tensor.nbytes for tensor in tensors)

    # ---- LoRA

    def add_lora(self, bank, r=None, lora_alpha=None):
        """Add the adapters, freeze the base, and leave adapters and head trainable.

        Args:
            bank: widths served by an adapter of their own (4, 8 or "4", "8", ...), or ["shared"]: one for all widths.
            r: rank (None: 8); lora_alpha: the adapters are scaled by lora_alpha / r (None: 16).
        Raises:
            ValueError: adapters present already, bad widths or rank.
        """
        bank = [str(key) for key in bank]
        r, lora_alpha = 8 if r is None else r, 16 if lora_alpha is None else lora_alpha
        allowed = {str(bits) for bits in (2, 3, 4, 5, 6, 7, 8, 16, 32)}
        if self.config.lora_bank:
            raise UserError(f"the model has a LoRA bank already: {self.config.lora_bank}")
        if bank != ["shared"] and (not bank or len(set(bank)) < len(bank) or not set(bank) <= allowed):
            raise UserError(f'LoRA bank {bank}: allowed are different bit-widths (2 to 8, 16, 32) or ["shared"]')
        if r < 1 or lora_alpha <= 0:
            raise UserError(f"LoRA r = {r}, alpha = {lora_alpha}: both must be positive")
        self.config.lora_bank, self.config.lora_r, self.config.lora_alpha = bank, r, lora_alpha
        self._add_adapters()
        widths = [key for key in bank if key != "shared"]
        if widths:
            self.set_bit_config(int(max(widths, key=int)))

    def _add_adapters(self):
        for layer in self.quant_layers().values():
            layer.add_lora(self.config.lora_bank, self.config.lora_r, self.config.lora_alpha)
            layer.to(layer.bias.device)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not is_base(name))

    # ---- loading and saving

    @classmethod
    def from_pretrained(cls, name_or_path, *, base_model_name_or_path=None, dtype=None, **kwargs):
        """Load a checkpoint of this class, or stock GPT-2 weights; see checkpoint.py for what is checked.

        Args:
            name_or_path: folder or hub name.
            base_model_name_or_path: where the frozen base of an adapter checkpoint lies, if not where it was trained.
            dtype: what the model is cast to after it was loaded in float32 (None: float32).
            kwargs: cache_dir, revision, token for the hub; other keys (num_labels, attn_implementation, dropout
                probabilities) override the config.
        Raises:
            ValueError: other architecture, a faulty config.json, missing, truncated, foreign or non-finite weights,
                a base that is not the one the adapters were trained on. OSError: nothing there.
        """
        name, hub = os.fspath(name_or_path), {key: kwargs.pop(key, None) for key in ("cache_dir", "revision", "token")}
        dtypes = {str(kind).removeprefix("torch."): kind for kind in FLOAT_DTYPES}
        if dtype not in (None, *dtypes, *dtypes.values()):
            raise UserError(f"dtype = {dtype!r}: allowed are {', '.join(dtypes)}")
        attention = {key: kwargs.pop(key) for key in ("attn_implementation",) if key in kwargs}
        wrong = {key: value for key, value in kwargs.items() if key not in RULES or not RULES[key][0](value)}
        refuse(
            "from_pretrained",
            [f"{key} = {value!r}: {RULES[key][1] if key in RULES else 'no option'}" for key, value in wrong.items()],
        )
        checkpoint = open_checkpoint(name, hub)
        fields, state = checkpoint.fields | kwargs, checkpoint.state
        if "num_labels" in kwargs:
            fields = {key: value for key, value in fields.items() if key not in ("id2label", "label2id")}
        base_name = fields.get("base_model_name_or_path")
        if base_name:
            base = open_base(checkpoint, base_model_name_or_path, hub)
            base_name = base.name
            state = {key: tensor for key, tensor in base.state.items() if is_base(key)} | state
        try:
            with no_init_weights():
                model = cls(QuantGPT2Config(**fields, **attention))
        except (ValueError, ImportError) as error:  # bits without an adapter or codes, an attention that is not there
            raise UserError(f"{checkpoint.path}: {error}") from None
        if fields.get("exported_widths"):
            take_codes(model, state)
            model.set_bit_config(fields.get("bit_config"))
        model._load_complete(state, name, checkpoint.own)
        if base_name and (found := model.base_checksum()) != fields["base_checksum"]:
            raise UserError(
                f"{name}: trained on a base with checksum {fields['base_checksum'][:16]}..., but {base_name} has "
                f"{found[:16]}...; adapters do not fit other weights: say where their base is with "
                "--base_model_name_or_path"
            )
        model.config._commit_hash = checkpoint.commit
        if dtype:
            model.to(dtypes.get(dtype, dtype))
        model.config.dtype = model.dtype
        return model.eval()

    def _load_complete(self, state, source, own):
        """Take over all weights. Stock weights: other heads are left out, and a head that is not there starts anew."""
        tied = self._tied_weights_keys or {}
        if not own:
            known = set(self.state_dict()) - set(tied)
            state = {name: v for name, v in state.items() if name in known or name.startswith("transformer.")}
        try:
            missing, unexpected = self.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise UserError(f"{source}: the weights do not fit its config.json: {error}") from None
        self.tie_weights()
        missing = [name for name in missing if name not in tied]
        if not own:
            for head in {name.rpartition(".")[0] for name in missing if not is_base(name)}:
                self._init_weights(self.get_submodule(head))
            missing = [name for name in missing if is_base(name)]
        if missing:
            raise UserError(f"{source}: weights are missing: {', '.join(missing[:3])} ({len(missing)} in all)")
        if unexpected:
            raise UserError(f"{source}: not part of the model: {', '.join(unexpected[:3])} ({len(unexpected)} in all)")

    def set_base(self, name_or_path):
        """Make checkpoints refer to this frozen base (name or path, commit, checksum) instead of containing it.

        Raises ValueError for a model that was cast: its weights are not those of the base any more.
        """
        if self.dtype != torch.float32:
            raise UserError(f"a base of dtype {self.dtype}: adapters are trained on a base in float32")
        is_folder = os.path.isdir(name_or_path)
        self.config.base_model_name_or_path = os.path.abspath(name_or_path) if is_folder else name_or_path
        self.config.base_model_revision = None if is_folder else getattr(self.config, "_commit_hash", None)
        self.config.base_checksum = self.base_checksum()

    def base_checksum(self):
        """sha256 over names and float32 bytes of the base weights (no adapters, no head)."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            if is_base(name):
                digest.update(name.encode())
                digest.update(value.detach().float().cpu().contiguous().numpy())
        return digest.hexdigest()

    def save_pretrained(self, save_directory, state_dict=None, **kwargs):
        """Write config and weights; with `set_base` only adapters and head. Every file appears whole or not at all.

        Raises ValueError after `drop_float_weights`, OSError.
        """
        if any(layer.weight is None for layer in self.quant_layers().values()):
            raise UserError("the float weights were dropped (drop_float_weights): this model has no float checkpoint")
        state_dict = self.state_dict() if state_dict is None else state_dict
        if self.config.base_model_name_or_path:
            state_dict = {name: value for name, value in state_dict.items() if not is_base(name)}
        with saving(save_directory) as folder:
            # one file of weights, whose checksum is in config.json
            super().save_pretrained(folder, state_dict=state_dict, **kwargs | {"max_shard_size": "1TB"})


class QuantGPT2ForQuestionAnswering(QuantGPT2Mixin, GPT2ForQuestionAnswering):
    """Extractive question answering: start and end logits per token."""

    upstream = GPT2ForQuestionAnswering


class QuantGPT2ForSequenceClassification(QuantGPT2Mixin, GPT2ForSequenceClassification):
    """Classification from the last token that is no padding."""

    upstream = GPT2ForSequenceClassification


class QuantGPT2LMHeadModel(QuantGPT2Mixin, GPT2LMHeadModel):
    """Language model; the head is tied to the embedding, belongs to the base and is never quantized."""

    upstream = GPT2LMHeadModel
