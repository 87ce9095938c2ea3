"""The mathematics of GBDA, gradient-based distributional attack (Guo et al., EMNLP 2021, arXiv:2104.13733).

An adversarial text is a table Theta of scores, (positions, vocabulary): every position is an independent
Categorical(softmax(Theta_t)). A relaxed sample pi = softmax((Theta + g) / tau) with Gumbel noise g goes into the
models as pi @ E, and the loss

    margin - lam_sim * similarity + lam_perp * negative log-likelihood

is differentiable in Theta.

Shapes: B texts, S relaxed samples, T positions, V candidate tokens, H hidden size, K classes. Texts of a batch are
padded on the right; a causal model never sees the padding, and `lengths` keep it out of every mean. No model is here.
"""

import math

import torch
import torch.nn.functional as F


def survival_probability(initial_coefficient, vocab_size):
    """Probability that a hard sample of the initial Theta (C at the original token, else 0) keeps a token.

    C = 15 and V = 50257 give 0.98486: about 1.5 % of the tokens change before any optimization.
    """
    return 1 / (1 + (vocab_size - 1) * math.exp(-initial_coefficient))


def gumbel_noise(shape, generator):
    """Independent Gumbel(0, 1) draws, -log(-log u), on the generator's device (exponential_ takes 5 times as long)."""
    return torch.rand(shape, device=generator.device, generator=generator).log_().neg_().log_().neg_()


def gumbel_softmax_sample(theta, noise, tau=1.0):
    """Relaxed samples softmax((theta + noise) / tau) of theta (..., T, V); noise: Gumbel draws, broadcastable."""
    return torch.softmax((theta + noise) / tau, -1)


def margin_loss(logits, label, kappa):
    """Carlini-Wagner margin: mean over the samples of relu(z_label - max_{k != label} z_k + kappa).

    The code released with the paper lacked a squeeze until December 2022 and averaged over all pairs of samples.

    Args: logits (S, K) with an int label, or (B, S, K) with labels (B,); kappa: margin in logits.
    Returns: scalar, or (B,).
    """
    index = torch.as_tensor(label, device=logits.device)[..., None, None].expand(*logits.shape[:-1], 1)
    own = logits.gather(-1, index).squeeze(-1)  # (..., S)
    best_other = logits.scatter(-1, index, -torch.inf).amax(-1)
    return torch.relu(own - best_other + kappa).mean(-1)


def negative_cross_entropy(logits, label):
    """The other adversarial loss: minus the mean cross-entropy. Arguments and result as `margin_loss`."""
    index = torch.as_tensor(label, device=logits.device)[..., None, None].expand(*logits.shape[:-1], 1)
    return logits.log_softmax(-1).gather(-1, index).squeeze(-1).mean(-1)


def tied_soft_negative_log_likelihood(hidden, embeds, embedding, lengths=None):
    """Fluency: mean over t >= 1 of -sum_v pi_t(v) log p(v | soft prefix), with p_t read at t - 1, in nats per token,
    under a language model whose head is its embedding, without the (T, V) product.

    Since log p(v) = h . E_v - logsumexp and sum_v pi(v) E_v is the model's own input x = pi @ E, the sum over v of
    pi(v) log p(v) is h . x - logsumexp: only the logsumexp runs over the vocabulary.

    Args: hidden (..., T, H): last hidden states; embeds (..., T, H): pi @ E; embedding (V, H): rows of the candidates;
        lengths (...) or None: valid positions, broadcastable to the leading axes.
    Returns: (...); 0 for texts of one token.
    """
    states, inputs = hidden[..., :-1, :].contiguous(), embeds[..., 1:, :]  # contiguous: one product, not a batch
    nll = (states @ embedding.t()).float().logsumexp(-1) - (states * inputs).float().sum(-1)  # (..., T - 1)
    if lengths is None:
        return nll.mean(-1)
    valid = torch.arange(1, hidden.shape[-2], device=hidden.device) < lengths[..., None]
    return (nll * valid).sum(-1) / (lengths - 1).clamp(min=1)


def similarity(original, adversarial, weights=None, lengths=None, adversarial_lengths=None):
    """BERTScore-like recall R = sum_i w_i max_j cos(h_i, h~_j) on hidden states of the reference language model.

    The first and the last position of both texts are left out, while the weights are normalized over all positions
    (so identical texts have a little less than 1), as in the code released with the paper.

    Args: original (..., T, H), adversarial (..., T', H): hidden states, leading axes broadcastable to each other.
        weights (..., T): idf of the original tokens, any scale; None for equal weights.
        lengths, adversarial_lengths (...): valid positions, None for all.
    Returns: (...); 0 for texts with fewer than three tokens.
    """

    def valid(states, count, drop):
        positions = torch.arange(states.shape[-2], device=states.device)
        count = torch.as_tensor(states.shape[-2] if count is None else count, device=states.device)[..., None]
        return (positions >= drop) & (positions < count - drop)

    adversarial_lengths = lengths if adversarial_lengths is None else adversarial_lengths
    weights = torch.ones(original.shape[:-1], device=original.device) if weights is None else weights
    weights = weights * valid(original, lengths, 0)
    weights = weights / weights.sum(-1, keepdim=True) * valid(original, lengths, 1)
    cosines = F.normalize(original.float(), dim=-1) @ F.normalize(adversarial.float(), dim=-1).transpose(-1, -2)
    inner = valid(adversarial, adversarial_lengths, 1)
    best = cosines.masked_fill(~inner[..., None, :], -1.0).amax(-1)  # -1 is the least of all cosines
    return (weights * best).sum(-1) * inner.any(-1)


def last_token_cosine(original, adversarial):
    """The constraint "cosine": cos of the last tokens' hidden states. Both (..., H) -> (...)."""
    return F.cosine_similarity(original.float(), adversarial.float(), dim=-1)


def inverse_document_frequency(token_lists, vocab_size):
    """idf(v) = log((N + 1) / (df(v) + 1)) over N token lists, as bert_score computes it. Returns (vocab_size,)."""
    frequency = torch.zeros(vocab_size)
    for tokens in token_lists:
        frequency[list(set(tokens))] += 1
    return torch.log((len(token_lists) + 1) / (frequency + 1))
