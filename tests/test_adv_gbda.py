"""GBDA: the terms of its loss against hand-computed cases, and the attack on classifiers whose weakness is known."""

import argparse
import contextlib
import dataclasses
import math
import types

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from conftest import experiment

with experiment("adv_attack"):
    import classifier
    import gbda
    import whitebox_attack
    from models.modeling_gpt2_quant import QuantGPT2ForSequenceClassification, QuantGPT2LMHeadModel

# ---- terms of the loss


def test_margin_is_clamped_per_sample_and_averaged():
    logits = torch.tensor([[3.0, 1.0, 0.0], [-6.0, 2.0, 1.0]], dtype=torch.float64)
    assert gbda.margin_loss(logits, 0, 5).item() == pytest.approx(3.5, abs=1e-9)  # (7 + 0) / 2; all pairs give 3.25
    assert gbda.margin_loss(logits[:1], 0, 5).item() == pytest.approx(7.0)
    assert gbda.margin_loss(logits[1:], 0, 5).item() == 0.0


def test_margin_and_cross_entropy_of_a_batch_equal_text_by_text():
    logits, labels = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 2])
    for loss in (lambda z, y: gbda.margin_loss(z, y, 1.0), gbda.negative_cross_entropy):
        single = torch.stack([loss(z, int(y)) for z, y in zip(logits, labels, strict=True)])
        torch.testing.assert_close(loss(logits, labels), single)
    expected = -nn.functional.cross_entropy(logits[1], labels[1].expand(6))
    torch.testing.assert_close(gbda.negative_cross_entropy(logits[1], 2), expected)


def fluency(coeffs, lm_logits):
    """The paper's definition, with the whole product. coeffs, lm_logits: (..., T, V)."""
    return -(coeffs[..., 1:, :] * lm_logits[..., :-1, :].log_softmax(-1)).sum(-1).mean(-1)


def test_fluency_of_the_hand_computed_case():
    coeffs = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64)
    lm_logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0], [9.0, 9.0, 9.0]], dtype=torch.float64)
    assert fluency(coeffs, lm_logits).item() == pytest.approx(0.8295253392, abs=1e-9)


def test_tied_fluency_is_the_same_value_and_gradient_without_the_product_over_the_vocabulary():
    generator = torch.Generator().manual_seed(1)
    theta, hidden = (torch.randn(2, 3, 5, n, generator=generator, dtype=torch.float64) for n in (11, 4))
    embedding = torch.randn(11, 4, generator=generator, dtype=torch.float64)
    theta.requires_grad_(True)
    pi = theta.softmax(-1)
    plain = fluency(pi, hidden @ embedding.t())
    fast = gbda.tied_soft_negative_log_likelihood(hidden, pi @ embedding, embedding)
    torch.testing.assert_close(fast, plain.float(), atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(value.sum(), theta, retain_graph=True)[0] for value in (plain, fast)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    padded = torch.cat([hidden, torch.randn(2, 3, 2, 4, generator=generator)], 2)
    inputs = torch.cat([pi @ embedding, torch.randn(2, 3, 2, 4, generator=generator)], 2)
    lengths = torch.full((2, 1), 5)
    torch.testing.assert_close(gbda.tied_soft_negative_log_likelihood(padded, inputs, embedding, lengths), fast)


def test_similarity_by_hand():
    original = torch.tensor([[9.0, 9.0], [2.0, 0.0], [0.0, 3.0], [9.0, 9.0]])
    adversarial = torch.tensor([[0.0, 1.0], [1.0, 1.0], [5.0, 0.0], [0.0, 1.0]])
    # Inner positions only: the first finds itself (cosine 1), the second its best at 45 degrees.
    idf = torch.tensor([1.0, 2.0, 4.0, 3.0])
    assert gbda.similarity(original, adversarial, idf).item() == pytest.approx(0.2 + 0.4 * math.sqrt(0.5))
    assert gbda.similarity(original, adversarial, 7 * idf).item() == pytest.approx(0.2 + 0.4 * math.sqrt(0.5))
    assert gbda.similarity(original, adversarial).item() == pytest.approx(0.25 + 0.25 * math.sqrt(0.5))
    assert gbda.similarity(original, original, idf).item() == pytest.approx(0.6)
    assert gbda.similarity(original[:2], adversarial[:2]).item() == 0.0


def test_similarity_ignores_padding_and_takes_texts_of_different_length():
    generator = torch.Generator().manual_seed(2)
    original, adversarial, noise = (torch.randn(n, 8, generator=generator) for n in (5, 7, 3))
    idf = torch.rand(5, generator=generator)
    alone = gbda.similarity(original, adversarial, idf)
    padded = gbda.similarity(
        torch.cat([original, noise])[None], torch.cat([adversarial, 100 * original[1:3]])[None],
        torch.cat([idf, torch.ones(3)])[None], torch.tensor([5]), torch.tensor([7]),
    )  # fmt: skip
    torch.testing.assert_close(padded[0], alone)


def test_idf_is_that_of_bert_score():
    idf = gbda.inverse_document_frequency([[1, 1, 2], [2], [3]], 5)
    expected = [math.log(4 / (count + 1)) for count in (0, 1, 2, 1, 0)]
    torch.testing.assert_close(idf, torch.tensor(expected))


def test_initial_token_survival():
    assert gbda.survival_probability(15, 50257) == pytest.approx(0.98486, abs=5e-6)
    assert 1 - gbda.survival_probability(12, 50257) == pytest.approx(0.236, abs=5e-4)
    theta = torch.zeros(40)
    theta[7] = 4.0
    assert theta.softmax(-1)[7].item() == pytest.approx(gbda.survival_probability(4.0, 40))


def test_gumbel_samples_have_the_probabilities_of_theta():
    theta = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 3.0]])
    noise = gbda.gumbel_noise((20000, 2, 3), torch.Generator().manual_seed(3))
    pi = gbda.gumbel_softmax_sample(theta, noise)
    torch.testing.assert_close(pi.sum(-1), torch.ones(20000, 2))
    shares = nn.functional.one_hot(pi.argmax(-1), 3).float().mean(0)
    torch.testing.assert_close(shares, theta.softmax(-1), atol=0.012, rtol=0)


# ---- the attack


def settings(**changes):
    required = {"output_dir": "unused"}
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(whitebox_attack.AttackArguments)
    }
    return argparse.Namespace(
        **(defaults | required | {"num_iters": 5, "gumbel_batch": 3, "gumbel_samples": 4} | changes)
    )


class Keyword(nn.Module):
    """Class 1 as soon as token `key` occurs anywhere, else class 0: nothing else matters. Embeddings are one-hot."""

    device = torch.device("cpu")

    def __init__(self, vocab_size, key):
        super().__init__()
        self.wte = nn.Embedding.from_pretrained(torch.eye(vocab_size))
        self.key = key
        self.transformer = self

    def forward(self, inputs_embeds, use_cache):
        return types.SimpleNamespace(last_hidden_state=inputs_embeds.cumsum(1))

    def score(self, hidden):
        return torch.stack([torch.full(hidden.shape[:1], 3.0), 12 * hidden[:, self.key]], -1)

    @contextlib.contextmanager
    def at_bits(self, config):
        yield


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def rows(tokenizer, *texts):
    return [
        {"index": number, "text": text, "label": 0, "tokens": tokenizer(text)["input_ids"]}
        for number, text in enumerate(texts)
    ]


TEXTS = ("Ada has the lamp. Ben has the coin.", "Gus has the boat.", "Cleo has the ring. Dora has the drum. What?")


def test_the_attack_finds_the_one_token_that_matters(tokenizer):
    key = tokenizer(" kite")["input_ids"][0]
    model = Keyword(len(tokenizer), key)
    args = settings(num_iters=60, gumbel_batch=10, gumbel_samples=20, constraint="none", lam_perp=0.0, kappa=3.0)
    everything = torch.arange(len(tokenizer))
    attack = whitebox_attack.Attack(model, model, tokenizer, everything, torch.ones(len(tokenizer)), [None], args)
    texts = rows(tokenizer, *TEXTS)
    for text, found in zip(texts, attack.run(texts), strict=True):
        assert key not in text["tokens"]
        samples = [tokenizer(sample)["input_ids"] for sample in found["samples"]]
        assert sum(key in sample for sample in samples) >= 19, found["samples"]
        assert any(token == tokenizer.decode([key]) and p > 0.5 for _, _, top in found["theta"] for token, p in top)
        changed = [a for sample in samples for a, b in zip(sample, text["tokens"]) if a != b]
        assert changed.count(key) > 0.8 * len(changed)
        assert not any(key in tokenizer(sample)["input_ids"] for sample in found["initial_samples"])


@pytest.fixture(scope="module")
def models(tiny_model):
    """(classifier with random adapters at 4, 8 and 32 bits, reference model on the same base)."""
    torch.manual_seed(0)
    model = QuantGPT2ForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    model.add_lora(["shared"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    reference = QuantGPT2LMHeadModel.from_pretrained(tiny_model)
    return model.requires_grad_(False).eval(), reference.requires_grad_(False).eval()


def make_attack(models, tokenizer, bits=(8,), **changes):
    model, reference = models
    configs = []
    for one in bits:
        with model.at_bits(one) as resolved:
            configs.append(resolved)
    idf = torch.linspace(0.5, 2.0, len(tokenizer))
    return whitebox_attack.Attack(
        model, reference, tokenizer, torch.arange(len(tokenizer)), idf, configs, settings(**changes)
    )


def theta_of(attack, batch):
    generator = torch.Generator().manual_seed(5)
    return 3 * torch.randn(*batch.ids.shape, len(attack.candidates), generator=generator)


def test_logits_at_the_last_position_equal_upstream_without_padding(models, tokenizer):
    model, _ = models
    lists = [text["tokens"] for text in rows(tokenizer, *TEXTS)]
    ids, lengths = classifier.pad_right(lists, tokenizer.eos_token_id)
    with torch.no_grad(), model.at_bits(4):
        padded = classifier.last_position_logits(model, lengths, model.transformer.wte(ids))
        alone = torch.cat([model(input_ids=torch.tensor([tokens])).logits for tokens in lists])
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)
    assert (padded[0] - padded[1]).abs().max() > 1e-3


@pytest.mark.parametrize("constraint", ["none", "cosine", "bertscore", "bertscore_idf"])
def test_losses_of_a_padded_batch_equal_text_by_text(models, tokenizer, constraint):
    attack = make_attack(models, tokenizer, constraint=constraint)
    texts = rows(tokenizer, *TEXTS)
    batch = attack.prepare(texts)
    theta, noise = theta_of(attack, batch), attack.noise(batch, 2)
    together = torch.stack(attack.losses(theta, noise, batch, 0))
    for place, text in enumerate(texts):
        one, length = attack.prepare([text]), len(text["tokens"])
        single = attack.losses(theta[place : place + 1, :length], noise[place : place + 1, :, :length], one, 0)
        # 8-bit rounding of activations may flip a code when the order of summation changes
        torch.testing.assert_close(together[:, place], torch.stack(single)[:, 0], atol=2e-2, rtol=2e-3)
    assert bool((together[1] == 0).all()) == (constraint == "none")


def test_eot_is_the_mean_over_the_set_and_random_one_of_it(models, tokenizer):
    fixed = [make_attack(models, tokenizer, [bits]) for bits in (4, 8)]
    eot = make_attack(models, tokenizer, (4, 8), attack_bits="eot")
    drawn = make_attack(models, tokenizer, (4, 8), attack_bits="random")
    batch = eot.prepare(rows(tokenizer, *TEXTS))
    theta, noise = theta_of(eot, batch), eot.noise(batch, 2)
    four, eight = (attack.losses(theta, noise, batch, 0)[0] for attack in fixed)
    assert (four - eight).abs().max() > 1e-3
    torch.testing.assert_close(eot.losses(theta, noise, batch, 0)[0], (four + eight) / 2)
    chosen = [drawn.step_precisions(step) for step in range(40)]
    assert all(len(configs) == 1 for configs in chosen)
    assert 8 < sum(configs == [drawn.precisions[0]] for configs in chosen) < 32
    assert chosen == [drawn.step_precisions(step) for step in range(40)]
    torch.testing.assert_close(
        drawn.losses(theta, noise, batch, 3)[0], four if chosen[3] == fixed[0].precisions else eight
    )


def test_chunks_of_samples_change_memory_only(models, tokenizer):
    """In full precision: quantized activations may round the other way when a sum is ordered differently."""
    texts = rows(tokenizer, *TEXTS)
    whole = make_attack(models, tokenizer, (32,))
    parts = make_attack(models, tokenizer, (32,), max_elements=1)
    results = [attack.optimize(attack.prepare(texts)) for attack in (whole, parts)]
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-3, rtol=1e-3)


def test_one_embedding_product_serves_both_models_only_if_the_weights_agree(models, tokenizer):
    attack = make_attack(models, tokenizer)
    assert attack.one_embedding
    batch = attack.prepare(rows(tokenizer, *TEXTS))
    theta, noise = theta_of(attack, batch), attack.noise(batch, 1)
    shared = torch.stack(attack.losses(theta, noise, batch, 0))
    attack.one_embedding = False
    torch.testing.assert_close(torch.stack(attack.losses(theta, noise, batch, 0)), shared)
    attack.reference_embedding = attack.reference_embedding.flip(0)
    assert (torch.stack(attack.losses(theta, noise, batch, 0)) - shared)[2].abs().max() > 1e-2


def test_the_loss_falls_and_the_ends_of_the_text_stay(models, tokenizer):
    attack = make_attack(models, tokenizer, (4,), num_iters=40, lam_perp=0.1, initial_coeff=6.0)
    texts = rows(tokenizer, *TEXTS)
    before = attack.losses(*start_of(attack, texts))[0]
    theta, parts = attack.optimize(attack.prepare(texts))
    assert (parts[0] < before - 0.05).all(), (before, parts[0])
    for place, text in enumerate(texts):
        last = len(text["tokens"]) - 1
        for position in (0, last):
            expected = torch.zeros(len(tokenizer))
            expected[text["tokens"][position]] = 6.0
            torch.testing.assert_close(theta[place, position], expected, atol=0, rtol=0)
        assert (theta[place, 1:last] != 0).any(-1).all()


def start_of(attack, texts):
    """(theta, noise, batch, step) before the first step."""
    batch = attack.prepare(texts)
    theta = torch.zeros(*batch.ids.shape, len(attack.candidates)).scatter_(-1, batch.ids[..., None], 6.0)
    return theta, attack.noise(batch, 3), batch, 0


def test_noise_and_samples_belong_to_the_text_not_to_its_batch(models, tokenizer):
    attack = make_attack(models, tokenizer, initial_coeff=2.0)
    texts = rows(tokenizer, *TEXTS)
    together, alone = attack.prepare(texts), attack.prepare(texts[2:])
    length = len(texts[2]["tokens"])
    assert torch.equal(attack.noise(together, 2)[2, :, :length], attack.noise(alone, 2)[0, :, :length])
    assert attack.initial_samples(texts[0], 3) == attack.initial_samples(texts[0], 3)
    assert attack.initial_samples(texts[0], 3) != attack.initial_samples({**texts[0], "index": 9}, 3)


def test_initial_samples_change_as_many_tokens_as_the_initial_theta_says(models, tokenizer):
    attack = make_attack(models, tokenizer, initial_coeff=7.0)
    attack.tokenizer = types.SimpleNamespace(batch_decode=lambda lists: lists)
    text = rows(tokenizer, TEXTS[0])[0]
    samples = attack.initial_samples(text, 400)
    kept = sum(a == b for sample in samples for a, b in zip(sample, text["tokens"], strict=True))
    expected = gbda.survival_probability(7.0, len(tokenizer))
    assert kept / (400 * len(text["tokens"])) == pytest.approx(expected, abs=0.015)
    assert 0.5 < expected < 0.9


def test_batches_are_bounded_and_hold_every_text_once():
    args = settings(batch_texts=4, max_elements=10_000, gumbel_batch=5)
    lengths = [7, 3, 9, 3, 5, 40, 3]
    batches = whitebox_attack.make_batches(lengths, 100, args)
    assert sorted(position for batch in batches for position in batch) == list(range(7))
    for batch in batches:
        size = len(batch) * 5 * max(lengths[position] for position in batch) * 100
        assert len(batch) == 1 or (len(batch) <= 4 and size <= 10_000)
    assert max(map(len, batches)) > 1
