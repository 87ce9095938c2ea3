"""Parts of a GPT-2 block in fewer passes over memory: they change the speed, not the method."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..quant_linear import QuantLinear
from . import integer, kernels


class TanhGELU(nn.Module):
    """GPT-2's gelu_new: 0.5 x (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3). `execution`: the model's."""

    def __init__(self, execution):
        super().__init__()
        self.execution = execution

    def forward(self, x):
        """x: (..., n) -> the same shape."""
        if self.execution.kind == "integer" and kernels.can_take(x):
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
        pieces = x.flatten(0, -2).split(integer.PIECE_TOKENS)
        return torch.cat([self._forward(piece) for piece in pieces]).view(x.shape)

    def _forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))
