"""The noise floor of a score: how far it moves under changes that mean nothing.

Where a rounding is coarse, a difference in the last bit of a sum changes codes, the codes logits, and the logits
answers. Differences between rows that are smaller than this say nothing.
"""

import contextlib

import torch

PERTURBATION = 1e-6  # relative, of the embeddings


@contextlib.contextmanager
def changed_embeddings(model, change):
    """change(weight) in place of the token embeddings, for the body."""
    weight = model.transformer.wte.weight
    before = weight.detach().clone()
    try:
        weight.data.copy_(change(before))
        yield
    finally:
        weight.data.copy_(before)


@contextlib.contextmanager
def execution(model, kind):
    before, model.execution.kind = model.execution.kind, kind
    try:
        yield
    finally:
        model.execution.kind = before


def variants(model, seed):
    """{name: context in which the model computes the same in another way}."""
    generator = torch.Generator().manual_seed(seed)

    def perturbed(weight):
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        return weight * (1 + PERTURBATION * noise)

    return {
        "fake": execution(model, "fake"),
        "integer": execution(model, "integer"),
        "float16 embeddings": changed_embeddings(
            model, lambda weight: weight.half().float()
        ),  # export.py writes these
        "perturbed 1": changed_embeddings(model, perturbed),
        "perturbed 2": changed_embeddings(model, perturbed),
    }


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
