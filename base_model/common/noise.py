"""The noise floor of a score: how far it moves under changes that mean nothing.

Where a rounding is coarse, a difference in the last bit of a sum changes codes, the codes logits, and the logits
answers. Differences between rows that are smaller than this say nothing.
"""

import contextlib

import torch

PERTURBATION = 1e-6  # relative, of the token embeddings


@contextlib.contextmanager
def changed_weights(weights, change):
    """change(weight) in place of each of the weights, for the body."""
    before = [weight.detach().clone() for weight in weights]
    try:
        for weight, old in zip(weights, before, strict=True):
            weight.data.copy_(change(old))
        yield
    finally:
        for weight, old in zip(weights, before, strict=True):
            weight.data.copy_(old)


def variants(model, seed):
    """{name: context in which the model computes the same in another way than now}."""
    generator = torch.Generator().manual_seed(seed)

    def perturbed(weight):
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        return weight * (1 + PERTURBATION * noise)

    def halved(weight):
        return weight.half().float()  # as export.py --embeddings float16 stores them

    other = "fake" if model.execution.kind == "integer" else "integer"
    contexts = {f"{other} execution": model.execution.as_kind(other)}
    tokens, positions = model.transformer.wte.weight, model.transformer.wpe.weight
    contexts["float16 embeddings"] = changed_weights([tokens, positions], halved)
    return contexts | {name: changed_weights([tokens], perturbed) for name in ("perturbed 1", "perturbed 2")}


def noise_floor(model, answer, score, texts, seed):
    """{"exact_match": [lowest, highest], "changed": largest share of answers that differ, "variants": {name: EM}}.

    Args: answer: () -> {id: text} under the model's present bits; score: texts -> EM; texts: as it is evaluated.
    """
    found, changed = {}, []
    for name, context in variants(model, seed).items():
        with context:
            other = answer()
        found[name] = score(other)
        changed.append(sum(other[key] != text for key, text in texts.items()) / len(texts))
    scores = [score(texts), *found.values()]
    return {"exact_match": [min(scores), max(scores)], "changed": max(changed), "variants": found}


def floor_cell(floor):
    """Text of a table's cell, of what `noise_floor` found."""
    low, high = floor["exact_match"]
    return f"{low:.2f} to {high:.2f}, {100 * floor['changed']:.1f} % of the answers"
