"""The loop of GBDA around the mathematics of gbda.py: one batch of texts, relaxed samples, Adam, hard samples."""

import hashlib
import random
import types

import torch

import gbda
from classifier import hidden_states, last_position_logits, pad_right


def number_seed(*words):
    """An integer below 2**63 that depends on all the words, for a generator."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:8], "big") >> 1


class Attack:
    """GBDA on one classifier.

    Args:
        model, reference: classifier and reference language model, frozen.
        candidates: (V,) token ids that Theta ranges over. idf: (vocabulary,).
        precisions: resolved configs: one, or those of `random` and `eot`.
    """

    def __init__(self, model, reference, tokenizer, candidates, idf, precisions, args):
        self.model, self.reference, self.tokenizer, self.args = model, reference, tokenizer, args
        self.device = model.device
        self.candidates, self.idf, self.precisions = candidates.to(self.device), idf, precisions
        self.column = {token: column for column, token in enumerate(candidates.tolist())}
        self.embedding = model.transformer.wte.weight[self.candidates]  # (V, H)
        self.reference_embedding = reference.transformer.wte.weight[self.candidates]
        # LoRA on the reference model's own weights: one product pi @ E serves both models.
        self.one_embedding = torch.equal(self.embedding, self.reference_embedding)

    def step_precisions(self, step):
        """The configs that step `step` attacks: a function of seed and step."""
        if self.args.attack_bits == "random":
            return [random.Random(f"{self.args.seed}-{step}").choice(self.precisions)]
        return self.precisions

    def adversarial_loss(self, embeds, lengths, labels, step):
        """(B,) loss of relaxed inputs (B, S, T, H), averaged over the precisions of the step."""
        samples = embeds.shape[1]
        precisions, total = self.step_precisions(step), 0.0
        for config in precisions:
            with self.model.at_bits(config):
                logits = last_position_logits(self.model, lengths.repeat_interleave(samples), embeds.flatten(0, 1))
            logits = logits.float().unflatten(0, (-1, samples))
            if self.args.adv_loss == "cw":
                total = total + gbda.margin_loss(logits, labels, self.args.kappa)
            else:
                total = total + gbda.negative_cross_entropy(logits, labels)
        return total / len(precisions)

    def losses(self, theta, noise, batch, step):
        """(adversarial, similarity, negative log-likelihood) of relaxed samples, each (B,), means over the samples."""
        args, lengths = self.args, batch.lengths
        pi = gbda.gumbel_softmax_sample(theta[:, None], noise)  # (B, S, T, V)
        embeds = pi @ self.embedding
        adversarial = self.adversarial_loss(embeds, lengths, batch.labels, step)
        if not (args.lam_perp or (args.lam_sim and args.constraint != "none")):
            return adversarial, torch.zeros_like(adversarial), torch.zeros_like(adversarial)
        inputs = embeds if self.one_embedding else pi @ self.reference_embedding
        hidden = hidden_states(self.reference, inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])  # (B, S, T, H)
        nll = gbda.tied_soft_negative_log_likelihood(hidden, inputs, self.reference_embedding, lengths[:, None])
        if args.constraint == "none":
            alike = torch.zeros_like(nll)
        elif args.constraint == "cosine":
            rows = torch.arange(len(lengths), device=self.device)
            alike = gbda.last_token_cosine(batch.hidden[rows, lengths - 1][:, None], hidden[rows, :, lengths - 1])
        else:
            weights = batch.idf[:, None] if args.constraint == "bertscore_idf" else None
            alike = gbda.similarity(batch.hidden[:, None], hidden, weights, lengths[:, None])
        return adversarial, alike.mean(-1), nll.mean(-1)

    def prepare(self, texts):
        """Tensors of a batch. texts: dicts with "index", "label", "tokens"."""
        ids, lengths = pad_right([text["tokens"] for text in texts], self.tokenizer.eos_token_id)
        columns, _ = pad_right([[self.column[token] for token in text["tokens"]] for text in texts], 0)
        batch = types.SimpleNamespace(
            ids=ids.to(self.device),
            columns=columns.to(self.device),
            lengths=lengths.to(self.device),
            labels=torch.tensor([text["label"] for text in texts], device=self.device),
            idf=self.idf[ids].to(self.device),
        )
        seeds = [number_seed(self.args.seed, "noise", text["index"]) for text in texts]
        batch.generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        with torch.no_grad():
            batch.hidden = hidden_states(self.reference, self.reference.transformer.wte(batch.ids))
        return batch

    def noise(self, batch, samples):
        """(B, samples, T, V) Gumbel noise, zero on padding: drawn text by text, so it does not depend on the batch."""
        size = len(self.candidates)
        noise = torch.zeros(len(batch.ids), samples, batch.ids.shape[1], size, device=self.device)
        for row, length, generator in zip(noise, batch.lengths.tolist(), batch.generators, strict=True):
            for sample in row:
                sample[:length] = gbda.gumbel_noise((length, size), generator)
        return noise

    def optimize(self, batch):
        """(Theta (B, T, V), the three losses of the last step, each (B,))."""
        args = self.args
        theta = torch.zeros(*batch.ids.shape, len(self.candidates), device=self.device)
        theta.scatter_(-1, batch.columns[..., None], args.initial_coeff)
        theta.requires_grad_(True)
        optimizer = torch.optim.Adam([theta], lr=args.lr)
        fixed = torch.zeros_like(batch.ids, dtype=torch.bool)  # upstream freezes the first and the last position
        fixed[:, 0] = True
        fixed[torch.arange(len(fixed)), batch.lengths - 1] = True
        chunk = max(1, min(args.gumbel_batch, args.max_elements // theta.numel()))
        parts = torch.zeros(3, len(theta), device=self.device)
        for step in range(args.num_iters):
            parts.zero_()
            optimizer.zero_grad()
            for first in range(0, args.gumbel_batch, chunk):
                share = min(chunk, args.gumbel_batch - first) / args.gumbel_batch
                with torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16):
                    terms = self.losses(theta, self.noise(batch, min(chunk, args.gumbel_batch - first)), batch, step)
                adversarial, alike, nll = terms
                (share * (adversarial - args.lam_sim * alike + args.lam_perp * nll).sum()).backward()
                parts += share * torch.stack(terms).detach()
            theta.grad[fixed] = 0
            optimizer.step()
        return theta.detach(), parts

    def hard_samples(self, probabilities, number, generator):
        """`number` texts drawn from independent categoricals (T, V): decoded, since that is what a reader gets."""
        drawn = torch.multinomial(probabilities, number, replacement=True, generator=generator)  # (T, number)
        return self.tokenizer.batch_decode(self.candidates[drawn.t()].tolist())

    def initial_samples(self, text, number):
        """Texts drawn from the Theta before optimization, without building it: keep a token or take any other."""
        draw = random.Random(number_seed(self.args.seed, "initial", text["index"]))
        keep = gbda.survival_probability(self.args.initial_coeff, len(self.candidates))
        others = self.candidates.tolist()

        def one(token):
            while draw.random() >= keep:
                if (other := draw.choice(others)) != token:
                    return other
            return token

        return self.tokenizer.batch_decode([[one(token) for token in text["tokens"]] for _ in range(number)])

    def run(self, texts):
        """Attack a batch. Returns one JSON row a text."""
        batch = self.prepare(texts)
        theta, parts = self.optimize(batch)
        rows = []
        for place, text in enumerate(texts):
            length = len(text["tokens"])
            probabilities = theta[place, :length].softmax(-1)  # (T, V)
            samples = self.hard_samples(probabilities, self.args.gumbel_samples, batch.generators[place])
            losses = dict(zip(("adversarial", "similarity", "nll"), parts[:, place].tolist(), strict=True))
            row = text | {"idf": [round(value, 5) for value in self.idf[text["tokens"]].tolist()], "samples": samples}
            row["initial_samples"] = self.initial_samples(text, self.args.gumbel_samples)
            row["theta"] = self.summary(probabilities, text["tokens"])
            rows.append(row | {"last_losses": losses if self.args.num_iters else None})
        return rows

    def summary(self, probabilities, tokens):
        """What Theta became where it moved: [position, p(original), [[token, p], ...]] with the three likeliest."""
        own = probabilities.gather(-1, torch.tensor([[self.column[t]] for t in tokens], device=self.device))[:, 0]
        top = probabilities.topk(min(3, probabilities.shape[-1]), -1)
        return [
            [place, round(own[place].item(), 4), [
                [self.tokenizer.decode([self.candidates[column].item()]), round(p, 4)]
                for column, p in zip(top.indices[place].tolist(), top.values[place].tolist(), strict=True)
            ]]
            for place in range(len(tokens)) if own[place] < 0.9
        ]  # fmt: skip


def candidate_tokens(train_tokens, texts, tokenizer, args):
    """(V,) sorted token ids of Theta; the attacked texts' own tokens are always among them."""
    if args.candidate_tokens == "all":
        return torch.arange(tokenizer.vocab_size)
    counts = torch.bincount(torch.tensor([token for tokens in train_tokens for token in tokens]))
    counts = torch.nn.functional.pad(counts, (0, max(0, len(tokenizer) - len(counts))))
    frequent = (counts >= args.candidate_min_count).nonzero().flatten()
    own = torch.tensor([token for text in texts for token in text["tokens"]])
    return torch.cat([frequent, own]).unique()
