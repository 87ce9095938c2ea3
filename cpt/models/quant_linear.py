"""The linear layer of the model: bits, integer codes of the weight, adapters, and the choice of how it computes."""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from .errors import UserError
from .execution import Execution
from .fast.integer import PACKED_BITS, integer_linear, is_supported, pack_int4, unpack_int4
from .nf4 import NF4Weight, nf4_linear
from .quantization import (
    FLOAT_BITS,
    QUANTIZED_BITS,
    check_bits,
    fake_quantize,
    fake_quantize_kv_,
    frozen_linear,
    quantize,
    quantize_least_squares,
)
from .rotation import check_block, rotate_weight, rotation_faults
from .user_input import refuse


class QuantLinear(nn.Module):
    """Linear layer y = Q(x) Q(W)^T + b + (lora_alpha / r) x A^T B^T, with the weight stored (out, in).

    `w_bits`, `a_bits`, `kv_bits` are state of the module, set by `set_bit_config`. The adapter reads the unquantized x
    (QLoRA's order); `w_bits` selects it. K and V are the last two thirds of `attn.c_attn`'s output, in heads of
    `head_size`. `rotation`: the vector d of the rotated quantizer, see rotation.py; None: MinMax.
    `trained`: the weight was trained at its bits, and keeps its MinMax scale. `nf4`: a frozen weight in place of
    `weight`, see `set_nf4`. `execution`: see `set_execution`.
    """

    def __init__(self, in_features, out_features, head_size=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        self.w_bits, self.a_bits, self.kv_bits = 32, 32, 32 if head_size else None
        self.head_size = head_size
        self.register_buffer("rotation", None)
        self.trained, self.nf4 = False, None
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()  # peft's names; keys "4", "8", ... or "shared"
        self.scaling = 0.0
        self.execution = Execution()
        self._quantized, self._quantized_from = {}, None  # {w_bits: (codes, packed up to 4 bits; scale)}

    @classmethod
    def from_conv1d(cls, conv, head_size=None):
        """The same layer as upstream's Conv1D, whose weight is (in, out)."""
        with torch.device("meta"):
            layer = cls(*conv.weight.shape, head_size)
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

    def copy_adapter(self, source, target):
        """Make the adapter `target` equal to `source`."""
        for bank in (self.lora_A, self.lora_B):
            bank[target].weight.data.copy_(bank[source].weight)

    @property
    def active_adapter(self):
        """Key of the adapter that `w_bits` selects: that of the width, or the one for all; None without a bank."""
        if not self.lora_A:
            return None
        return "shared" if "shared" in self.lora_A else str(self.w_bits)

    @property
    def can_train(self):
        """Whether the weight may change under the optimizer: its codes are then not kept."""
        return self.weight is not None and self.weight.requires_grad

    # ---- rotation

    def set_rotation(self, d):
        """Quantize in the basis of this rotation from now on. d: (in,) float32, no zeros; None: MinMax.

        Raises UserError: a faulty d, rows that cannot be rotated, kept codes that are of another basis.
        """
        if d is not None:
            check_block(self.in_features, "this linear")
            check_block(self.head_size or self.in_features, "the heads of K and V")
            refuse("set_rotation", rotation_faults("rotation", d, self.in_features))
            if self.nf4 is not None:
                raise UserError("an nf4 base is not rotated")
            d = d.detach().clone().to(self.bias.device)
        if self.weight is None and self._quantized:
            raise UserError("the codes of a model without float weights are of one quantizer: it cannot be changed")
        self.rotation = d
        self.clear_quantized()

    @property
    def _rotated_heads(self):
        return None if self.rotation is None else self.head_size

    # ---- codes of the weight

    def set_nf4(self):
        """Hold the weight, which is frozen, as NF4 codes from now on; the bits of a layer are 16 or 32 then."""
        self.nf4, self.weight = NF4Weight(self.weight), None
        self._quantized, self._quantized_from = {}, None

    def quantized_weight(self):
        """(codes, scale) of the weight at `w_bits`; of a frozen weight made once per width and kept until it changes.

        A change is seen by torch's version counter; in-place writes through `weight.data` bypass it and need
        `clear_quantized()`. A weight that can train is quantized in every call: fused optimizers bypass the counter.
        Kept are the stored codes; returned are plain int8 codes (out, in).
        """
        codes, scale = self._stored(self.w_bits)
        return (codes if codes.dtype == torch.int8 else unpack_int4(codes, self.in_features)), scale

    def _stored(self, w_bits):
        """Codes and scale of one width as they are kept, see `stored_codes`. Raises UserError without them."""
        if self.weight is not None:
            state = (id(self.weight), self.weight.data_ptr(), self.weight._version)
            if state != self._quantized_from or self.can_train:
                self._quantized, self._quantized_from = {}, state
        if w_bits in self._quantized:
            return self._quantized[w_bits]
        if self.weight is None:
            raise UserError(f"w_bits = {w_bits}: only codes of {sorted(self._quantized)} bits are kept")
        normal = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
        with normal:  # codes that a training can take too
            codes, scale = self._quantize_weight(w_bits)
            stored = (pack_int4(codes) if w_bits <= PACKED_BITS else codes), scale
        if not self.can_train:
            self._quantized[w_bits] = stored
        return stored

    def _quantize_weight(self, w_bits):
        if self.rotation is None:
            return quantize(self.weight, w_bits)
        weight = rotate_weight(self.weight.detach(), self.rotation)
        # 25 tries of a scale in every step are too slow: a weight that trains has its MinMax scale, and keeps it
        min_max = self.can_train or self.trained
        return quantize(weight, w_bits) if min_max else quantize_least_squares(weight, w_bits)

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
        if self.nf4 is not None:
            self.nf4.to(fn(self.nf4.codes).device)
        self.clear_quantized()  # .to(), .half(), .cuda() replace the storage of the weight
        rotation = self.rotation
        super()._apply(fn, *args, **kwargs)
        if rotation is not None:  # float32 under .half()
            self.rotation = rotation.to(self.rotation.device)
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        self.clear_quantized()
        return super()._load_from_state_dict(*args, **kwargs)

    # ---- forward

    def _path(self, x):
        """How `forward` computes Q(x) Q(W)^T + b: on float weights, codes ("frozen", "nf4"), or all "integer"."""
        if self.nf4 is not None:
            return "nf4"
        floats = self.w_bits in FLOAT_BITS or self.execution.kind == "float"
        if (floats and self.weight is not None) or (self.can_train and torch.is_grad_enabled()):
            return "float"
        on_integers = self.execution.kind == "integer" and self.a_bits not in FLOAT_BITS
        if on_integers and is_supported(x.device, self.in_features, self.out_features):
            return "integer"
        return "frozen"

    def forward(self, x):
        """x: (..., in) -> (..., out).

        Each path quantizes x at `a_bits`; frozen_linear and integer_linear do so themselves. The adapter is that of
        `w_bits` (`active_adapter`) and reads x as it came.
        """
        if self.can_train:
            self.clear_quantized()  # codes of a time when it was frozen
        shape = (*x.shape[:-1], self.out_features)
        x = x.reshape(-1, self.in_features)  # (tokens, in)
        path, key, d, heads = self._path(x), self.active_adapter, self.rotation, self._rotated_heads
        bits = self.w_bits, self.a_bits, self.kv_bits
        w_bits, a_bits, kv_bits = (32, 32, 32) if self.execution.kind == "float" else bits
        A, B = (None, None) if key is None else (self.lora_A[key].weight, self.lora_B[key].weight)
        if path == "integer" and not torch.is_grad_enabled():  # adapter, K and V in the same pass
            rest = d, None if key is None else (A, B, self.scaling), kv_bits, heads
            return integer_linear(x, *self.quantized_weight(), self.bias, a_bits, *rest).view(shape)
        if path == "float":  # what has 16 or 32 bits goes in as it is, and is not rotated
            weight = fake_quantize(self.weight, w_bits, None if d is None else 1 / d)
            y = F.linear(fake_quantize(x, a_bits, d), weight, self.bias)
        elif path == "nf4":
            y = nf4_linear(x, self.nf4, self.bias)
        else:
            rest = d, integer_linear if path == "integer" else None, self.execution.backward_dtype
            y = frozen_linear(x, *self.quantized_weight(), self.bias, a_bits, *rest)
        if key is not None:  # in place: y is fresh, and nothing needs its old value for the backward pass
            y.addmm_(F.linear(x, A).to(y.dtype), B.t().to(y.dtype), alpha=self.scaling)
        return fake_quantize_kv_(y, kv_bits, heads).view(shape)

    def extra_repr(self):
        bits = f"w_bits={self.w_bits}, a_bits={self.a_bits}" + (f", kv_bits={self.kv_bits}" if self.kv_bits else "")
        bits += ("" if self.rotation is None else ", rotated") + ("" if self.nf4 is None else ", nf4")
        return f"in_features={self.in_features}, out_features={self.out_features}, {bits}, lora={list(self.lora_A)}"
