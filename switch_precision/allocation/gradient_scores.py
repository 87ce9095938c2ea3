"""Sensitivity of every linear predicted from gradients, without running any flip.

At the reference config, with y a linear's output, y_low its output at low bits on the same input (the layer alone:
weights, activations, K/V and the low width's adapter, as in the flipped model) and g = dL/dy of a window's loss, the
product p[token] = sum over channels of g (y_low - y) is the loss change that the token causes, to first order:

    first_order    mean over windows of sum_tokens p       signed: the predicted loss increase
    fisher_token   mean over windows of sum_tokens p**2    tokens taken as independent
    fisher_window  mean over windows of (sum_tokens p)**2  empirical Fisher along the change: the predicted KL

L and the KL are means of start and end, two independent distributions; to second order each KL is half its Fisher
form, and the cross term of (start + end) / 2 has mean zero, so that the square itself estimates the mean of the KLs
(exactly so for labels drawn from the model).

Sources: the expansion of Optimal Brain Damage (LeCun et al. 1990) with the Fisher information in place of the Hessian,
as in Fisher pruning (Theis et al. 2018, arXiv:1801.05787), applied to outputs instead of weights. Computed in float32
without autocast, in eval mode; the straight-through estimator gives the gradient through the quantizers.
"""

from functools import partial

import numpy as np
import torch
from scipy.stats import spearmanr

from allocation.measure_set import span_nll

SCORES = ("first_order", "fisher_token", "fisher_window")
MEASURES = ("kl", "loss_increase", "exact_match_drop")


@torch.no_grad()
def alone(layer, x, bits):
    """Output of one linear under other bits; x: (batch, seq, in), bits: its entry of a resolved config."""
    before = layer.w_bits, layer.a_bits, layer.kv_bits
    try:
        layer.w_bits, layer.a_bits, layer.kv_bits = bits["w_bits"], bits["a_bits"], bits.get("kv_bits")
        return layer.forward(x)  # not __call__: the hooks of this module's users stay out
    finally:
        layer.w_bits, layer.a_bits, layer.kv_bits = before


def gradient_scores(model, measure_set, reference, lows, num_batches, seed):
    """Scores of every linear for every low config.

    Args: measure_set: windows with labels; `num_batches` batches are drawn from it (seeded), or all if it has fewer.
        reference: resolved config; lows: {name: resolved config}.
    Returns: {(low, layer): {score: value}}, empty for 0 batches.
    """
    if not num_batches:
        return {}
    windows = np.random.default_rng(seed).permutation([index for batch in measure_set.batches for index in batch])
    size = max(map(len, measure_set.batches))
    batches = [windows[at : at + size].tolist() for at in range(0, len(windows), size)][:num_batches]
    layers = model.quant_layers()
    sums = {(low, name): np.zeros(len(SCORES)) for low in lows for name in layers}

    def add(key, difference, gradient):
        product = (gradient.float() * difference).sum(-1).double()  # (batch, seq)
        windowwise = product.sum(1)
        sums[key] += [windowwise.sum().item(), product.square().sum().item(), windowwise.square().sum().item()]

    def compare_with_low(name, layer, args, output):
        for low, config in lows.items():
            if config[name] != reference[name]:
                difference = alone(layer, args[0].detach(), config[name]).float() - output.detach().float()
                output.register_hook(partial(add, (low, name), difference))

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [layer.register_forward_hook(partial(compare_with_low, name)) for name, layer in layers.items()]
    # the gradient starts at the embeddings: no weight needs one
    hooks.append(model.transformer.wte.register_forward_hook(lambda module, args, output: output.requires_grad_()))
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with model.at_bits(reference), torch.enable_grad():
            for batch in batches:
                inputs, real, _, labels = measure_set.tensors(batch)
                output = model(**inputs, use_cache=False)
                logits = torch.stack([output.start_logits, output.end_logits])
                span_nll(logits, real, labels).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
    count = sum(map(len, batches))
    return {key: dict(zip(SCORES, (values / count).tolist(), strict=True)) for key, values in sums.items()}


def correlations(flips):
    """{score: {measure: Spearman's rho over the flips}}, None where one side is constant; {} without scores."""
    if len(flips) < 2 or not all(score in flip for flip in flips for score in SCORES):
        return {}
    columns = {name: [flip[name] for flip in flips] for name in (*SCORES, *MEASURES)}

    def rho(*pair):
        varies = all(len(set(columns[name])) > 1 for name in pair)
        return float(spearmanr(*(columns[name] for name in pair)).statistic) if varies else None

    return {score: {measure: rho(score, measure) for measure in MEASURES} for score in SCORES}
