"""How a model computes: one object per model, which its linears and its GELU read and `set_execution` writes."""

import contextlib
import dataclasses

import torch

from .errors import UserError

BACKWARD_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


@dataclasses.dataclass
class Execution:
    """kind: "fake" (quantize, dequantize, float product) or "integer" (product of int8 codes); for a while "float":
    nothing is quantized, whatever the bits.

    backward_dtype: dtype of the product dL/dx = dL/dy W with a frozen quantized W; None: that of dL/dy.
    """

    kind: str = "fake"
    backward_dtype: torch.dtype | None = None

    def set(self, kind, backward_dtype="fp32"):
        """backward_dtype: key of BACKWARD_DTYPES. Raises UserError: other values; nothing is changed then."""
        if kind not in ("integer", "fake"):
            raise UserError(f"execution = {kind!r}: allowed are integer, fake")
        if backward_dtype not in BACKWARD_DTYPES:
            raise UserError(f"backward_dtype = {backward_dtype!r}: allowed are {', '.join(BACKWARD_DTYPES)}")
        self.kind, self.backward_dtype = kind, BACKWARD_DTYPES[backward_dtype]

    @contextlib.contextmanager
    def as_kind(self, kind):
        """`with execution.as_kind("float"):` the body computes so, whatever was set. kind: see the class."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before
