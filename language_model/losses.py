"""The losses of run_clm.py, neither with the logits of a whole batch: next-token cross-entropy, and distillation.

Source of the latter: LLM-QAT (arXiv:2305.17888) Eq. 4, logits only, no temperature, no labels; here the mean over all
tokens.
"""

import torch
from torch.nn.functional import linear_cross_entropy

CHUNK = 512  # tokens whose logits are held at a time
PIECE = 16  # of them at once in float32: these stay in a CPU's cache, which makes it three times as fast
OPTIONS = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None, acc_policy="balanced")


def next_token_loss(hidden, weight, ids):
    """Mean cross-entropy of every next token. hidden: (batch, seq, n); weight: (vocabulary, n); ids: (batch, seq)."""
    return linear_cross_entropy(hidden[:, :-1].flatten(0, 1), weight, ids[:, 1:].flatten(), options=OPTIONS).float()


class _SoftCrossEntropy(torch.autograd.Function):
    """-sum_v p_v log q_v, mean over tokens; its gradient q - p goes through the head chunk by chunk, in the forward
    pass, so that no logits are kept."""

    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden, buffers = torch.empty_like(hidden), hidden.new_empty(2, min(CHUNK, len(hidden)), len(weight))
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), CHUNK):
            h, rows = hidden[start : start + CHUNK], slice(start, start + CHUNK)
            logits = torch.mm(h, weight.t(), out=buffers[0, : len(h)])
            targets = torch.mm(teacher_hidden[rows], teacher_weight.t(), out=buffers[1, : len(h)])
            for piece, target in zip(logits.split(PIECE), targets.split(PIECE), strict=True):
                p, z = target.to(wide).softmax(-1), piece.to(wide)
                q = z.softmax(-1)
                # log sum exp(z) = max z - log max q
                loss += (z.amax(-1) - q.amax(-1).log()).sum() - torch.linalg.vecdot(p, z).sum()
                torch.sub(q, p, out=piece)
            grad_hidden[rows] = logits @ weight
            if grad_weight is not None:
                grad_weight += logits.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return (loss / len(hidden)).to(wide)

    @staticmethod
    def backward(ctx, grad):
        grad, found = grad / len(ctx.saved_tensors[0]), []
        for tensor, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            found.append(
                tensor if tensor is None else torch.mul(tensor, grad, out=torch.empty_like(tensor, dtype=dtype))
            )
        return *found, None, None


def soft_cross_entropy(hidden, weight, teacher_hidden, teacher_weight):
    """Mean over tokens of the cross-entropy of softmax(hidden W^T) against softmax(teacher_hidden W_T^T), scalar.

    hidden: (tokens, n), weight: (vocabulary, n), differentiable; teacher_hidden: (tokens, m), teacher_weight:
    (vocabulary, m). It is KL(teacher || student) plus the teacher's entropy: the same gradient.
    """
    return _SoftCrossEntropy.apply(hidden, weight, teacher_hidden, teacher_weight)


@torch.no_grad()
def teacher_states(teacher, ids, half):
    """Last hidden states (batch, seq, n) of a model of ours at full precision: no quantization, adapters or dropout.

    teacher: may be the model that trains, whose state is left as it was. half: dtype of autocast; float32: none.
    """
    layers, trains = teacher.quant_layers().values(), teacher.training
    scalings = [layer.scaling for layer in layers]
    autocast = torch.autocast(ids.device.type, half, enabled=half != torch.float32)
    teacher.eval()
    for layer in layers:
        layer.scaling = 0.0
    try:
        with teacher.quantization_off(), autocast:
            return teacher.transformer(ids, use_cache=False).last_hidden_state
    finally:
        teacher.train(trains)
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling = scaling
