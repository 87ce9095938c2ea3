"""PGD on the embeddings of the words, white box: the perturbation that raises a loss most within a radius per token.

delta (batch, tokens, n_embd) is added to the word embeddings, before the positions. Lengths are in units of the mean
norm of the embedding's rows, so that one radius means the same in models of any size. Source: PGD, Madry et al. 2018
(arXiv:1706.06083), with one L2 ball a token. Several configs: expectation over transformation (EOT, Athalye et al.
2018, arXiv:1802.00420).
"""

import contextlib

import torch
import torch.nn.functional as F


@contextlib.contextmanager
def perturbed(model, delta):
    """`with perturbed(model, delta):` the model reads its word embeddings plus delta (batch, tokens, n_embd)."""
    handle = model.transformer.wte.register_forward_hook(lambda module, inputs, output: output + delta)
    try:
        yield
    finally:
        handle.remove()


def length_unit(model):
    """Mean L2 norm of the rows of the word embedding: what radius and step size are multiples of."""
    return model.transformer.wte.weight.detach().float().norm(dim=-1).mean()


def random_delta(model, radius, free, generator):
    """A control for `pgd`: each free token moves by exactly `radius`, in a random direction.

    radius, free, generator: as of `pgd`. Returns (batch, tokens, n_embd) float32.
    """
    weight = model.transformer.wte.weight
    noise = torch.randn(*free.shape, weight.shape[-1], generator=generator).to(weight.device)
    return F.normalize(noise, dim=-1) * (radius * length_unit(model)) * free.to(weight.device).unsqueeze(-1)


def pgd(model, inputs, loss, configs, *, steps, step_size, radius, free, generator):
    """The perturbation that `steps` steps of normalized gradient ascent find from a random start.

    Args:
        inputs: batch of tensors, passed to `loss`; loss(model, inputs): scalar, to be maximized.
        configs: bit configs; the gradient is the mean over them. One config is an attack at that precision.
        step_size, radius: L2 lengths per token in units of `length_unit`, so they are comparable between models.
        free: (batch, tokens) bool, the tokens that may move; generator: of the CPU, of the random start.
    Returns: (batch, tokens, n_embd) float32, no longer than the radius, zero where a token is not free.
    The passes are those of training (fake quantization, since integers have no gradient), without dropout; weights
    count as frozen meanwhile, so their codes are kept from step to step. The model is left as it was.
    """
    unit, free = length_unit(model), free.to(model.transformer.wte.weight.device)
    longest = radius * unit
    lengths = torch.rand(*free.shape, 1, generator=generator).to(free.device)
    delta = random_delta(model, radius, free, generator) * lengths
    with as_attacked(model):
        for _ in range(steps):
            delta.requires_grad_(True)
            gradient = torch.zeros_like(delta)
            for config in configs:
                with model.at_bits(config), perturbed(model, delta):
                    gradient += torch.autograd.grad(loss(model, inputs), delta)[0] / len(configs)
            step = F.normalize(gradient, dim=-1, eps=torch.finfo(gradient.dtype).tiny)
            delta = delta.detach() + step_size * unit * step * free.unsqueeze(-1)
            delta *= longest / delta.norm(dim=-1, keepdim=True).clamp(min=longest)
    return delta


@contextlib.contextmanager
def as_attacked(model):
    """Evaluation mode, frozen parameters, fake quantization, gradients on; the state before comes back."""
    trains, parameters = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        with model.execution.as_kind("fake"), torch.enable_grad():
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        model.train(trains)
