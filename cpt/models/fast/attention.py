"""Causal attention of integer execution: attention.c where it applies, else transformers' SDPA.

On a CPU torch's fused attention is about a third of a forward on integers; it multiplies every query with the keys
behind it as well. The kernel is for float32, heads of 64 features (every size of GPT-2 has them) and a plain causal
mask; padding masks, decoding with a cache, gradients and everything else go the usual way.
"""

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from . import kernels

NAME = "sdpa_or_kernel"  # value of `attn_implementation`


def attention_forward(module, query, key, value, attention_mask, *, scaling, dropout=0.0, **kwargs):
    """transformers' attention interface. query, key, value: (batch, heads, seq, features); returns (batch, seq,
    heads, features), None."""
    if (
        attention_mask is None
        and dropout == 0
        and query.shape == key.shape
        and query.shape[-1] == kernels.HEAD_SIZE
        and kernels.can_take(query, key, value)
    ):
        return kernels.causal_attention(query, key, value, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
