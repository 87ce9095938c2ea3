"""Attacks with real tokens, white box: HotFlip, and PGD on the relaxed one-hot input.

HotFlip (Ebrahimi et al. 2018, arXiv:1712.06751) replaces one token a step: the gradient at the embeddings tells the
first-order change of the loss for every token at every place, and the best few are tried. PGD (Geisler et al. 2024,
arXiv:2402.09154) lets the places hold mixtures of tokens, rows of the probability simplex, and reads off the likeliest
tokens in every step. Both raise the cross-entropy of the right answer, and their result is the best discrete one.

Shapes: B texts, S slots (the places that may change, padded on the right), K of them, V vocabulary, H hidden size.
"""

import random

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from embedding_pgd import as_attacked, perturbed
from pgd_tasks import FREE_TOKENS, qa_logits, text_logits

# ---- mathematics


def project_simplex(rows, first=1024):
    """Nearest point of the probability simplex of every row (..., V); -inf is a place that stays 0.

    Source: Duchi et al. 2008. Only the `first` largest are sorted, where they hold the support.
    """
    size = min(first, rows.shape[-1])
    top = rows.topk(size).values
    thresholds = (top.cumsum(-1) - 1) / torch.arange(1, size + 1, device=rows.device)
    number = (top > thresholds).sum(-1, keepdim=True)
    if size < rows.shape[-1] and (number == size).any():
        return project_simplex(rows, rows.shape[-1])
    return (rows - thresholds.gather(-1, number - 1)).clamp(min=0)


def project_entropy(rows, limit):
    """Rows of the simplex (..., V) moved away from the middle of their support until 1 - sum p^2 is `limit`.

    Rows whose Gini entropy is no larger stay, and so does one that is its middle. Where a step out of the middle
    leaves the simplex it is projected back, which may leave some entropy. Source: arXiv:2402.09154, Algorithm 3.
    """
    support = rows > 0
    number = support.sum(-1, keepdim=True)
    middle = support / number
    away = rows - middle
    distance = away.norm(dim=-1, keepdim=True)
    radius = (1 - limit - 1 / number).clamp(min=0).sqrt()
    moved = middle + away * (radius / distance.clamp(min=torch.finfo(rows.dtype).tiny))
    return torch.where((distance < radius) & (distance > 0), project_simplex(moved), rows)


def replacement_scores(gradient, embedding, tokens):
    """(..., S, V): first-order change of the loss where token v takes a slot, g . (E_v - E_token).

    gradient (..., S, H): of the loss at the embeddings; embedding (V, H); tokens (..., S).
    """
    scores = gradient @ embedding.t()
    return scores - scores.gather(-1, tokens[..., None])


def span_losses(logits, positions, mask):
    """(B,) cross-entropy of start and end, summed. logits (2, B, T); positions (2, B); mask (B, T): the classes."""
    logits = logits.float().masked_fill(~mask, torch.finfo(torch.float32).min)
    return -logits.log_softmax(-1).gather(-1, positions[..., None]).sum((0, 2))


# ---- what is attacked: `tokens` and `free` (B, S), and the loss of each text


class Window:
    """Slots at the start of a window: all of a text, or the question. context (B, T): where an answer may lie."""

    def __init__(self, model, task, inputs, context=None):
        self.model, self.task, self.inputs, self.context = model, task, inputs, context
        free = FREE_TOKENS[task](inputs)
        self.size = int(free.sum(1).max())
        self.tokens, self.free = inputs["input_ids"][:, : self.size], free[:, : self.size]

    def losses(self, name, tokens, delta=None):
        """(B,) with `tokens` in the slots, at the bits that are set and called `name`; delta (B, S, H): see `pgd`."""
        inputs = self.inputs | {"input_ids": torch.cat([tokens, self.inputs["input_ids"][:, self.size :]], 1)}
        longest = inputs["input_ids"].shape[1]
        with perturbed(self.model, 0 if delta is None else F.pad(delta, (0, 0, 0, longest - self.size))):
            if self.task == "classification":
                return F.cross_entropy(text_logits(self.model, inputs).float(), inputs["labels"], reduction="none")
            positions = torch.stack([inputs["start_positions"], inputs["end_positions"]])
            return span_losses(qa_logits(self.model, inputs), positions, self.context)


class Suffix:
    """Slots after the end of the windows of questions. tokens (B, S): where the attack starts; the rest as `Window`.

    What comes before is not changed by it, the model being causal: its keys, values and logits are computed once.
    """

    def __init__(self, model, inputs, context, tokens):
        self.model, self.inputs, self.context, self.tokens = model, inputs, context, tokens
        self.free, self.kept = torch.ones_like(tokens, dtype=torch.bool), {}
        before = inputs["attention_mask"]
        self.mask = torch.cat([before, torch.ones_like(tokens)], 1)
        self.places = before.sum(1, keepdim=True) + torch.arange(tokens.shape[1], device=tokens.device)

    def before(self, name):
        """([(keys, values) of each block], logits (2, B, T)) of the windows."""
        if name not in self.kept:
            with torch.no_grad():
                output = self.model.transformer(input_ids=self.inputs["input_ids"], use_cache=True)
                logits = self.model.qa_outputs(output.last_hidden_state).permute(2, 0, 1)
                self.kept[name] = [(layer.keys, layer.values) for layer in output.past_key_values.layers], logits
        return self.kept[name]

    def losses(self, name, tokens, delta=None):
        """As of `Window`."""
        cached, logits = self.before(name)
        embeds = self.model.transformer.wte(tokens)
        hidden = self.model.transformer(
            inputs_embeds=embeds if delta is None else embeds + delta,
            past_key_values=DynamicCache(cached),
            attention_mask=self.mask,
            position_ids=self.places,
            use_cache=True,
        ).last_hidden_state
        logits = torch.cat([logits, self.model.qa_outputs(hidden).permute(2, 0, 1)], -1)
        positions = torch.stack([self.inputs["start_positions"], self.inputs["end_positions"]])
        return span_losses(logits, positions, torch.cat([self.context, self.free], 1))


# ---- the attacks


class TokenAttack:
    """Both attacks on one model.

    Args:
        precisions: {name: config}: the gradient and the choice of the best are the mean over them, or over one that
            is drawn for each step (`draws`).
        kinds (V,) int8: 0: never put in; a token is replaced by one of its own kind (`replaceable_tokens`).
        args: num_replacements, attack_steps, candidates, step_size, seed.
    """

    def __init__(self, model, precisions, draws, kinds, args):
        self.model, self.precisions, self.draws, self.args = model, precisions, draws, args
        self.embedding = model.transformer.wte.weight.detach()
        self.kinds = kinds.to(self.embedding.device)

    def names(self, step):
        """The precisions of a step: a function of seed and step."""
        names = list(self.precisions)
        return [random.Random(f"{self.args.seed}-{step}").choice(names)] if self.draws else names

    @torch.no_grad()
    def losses(self, target, tokens, step):
        """(B,) of discrete tokens (B, S), mean over the precisions of the step."""
        total = 0
        for name in (names := self.names(step)):
            with self.model.at_bits(self.precisions[name]):
                total = total + target.losses(name, tokens)
        return total / len(names)

    def gradient(self, target, tokens, step, delta=None):
        """(B, S, H) of the summed loss at the embeddings of tokens + delta, mean over the precisions of the step."""
        delta = torch.zeros(*tokens.shape, self.embedding.shape[1], device=tokens.device) if delta is None else delta
        found, names = torch.zeros_like(delta), self.names(step)
        with as_attacked(self.model):
            delta = delta.requires_grad_(True)
            for name in names:
                with self.model.at_bits(self.precisions[name]):
                    found += torch.autograd.grad(target.losses(name, tokens, delta).sum(), delta)[0] / len(names)
        return found

    def allowed(self, original, free):
        """(..., V) bool: what may take a slot. original (...): its token at first; free (...): whether it may move."""
        return (self.kinds == self.kinds[original][..., None]) & (self.kinds > 0) & free[..., None]

    def scores(self, gradient, tokens, original, free):
        """`replacement_scores` of one text, -inf where a token may not go. All (S, ...)."""
        scores = replacement_scores(gradient, self.embedding, tokens)
        return scores.masked_fill(~self.allowed(original, free), -torch.inf)

    def hotflip(self, target, accept):
        """(B, S) tokens. accept(tokens): (B,) bool, whether such texts may be made.

        In a step the best --candidates replacements of each text by first order are tried, and the best of them is
        taken if it is better than none; else the next best are tried in the next step.
        """
        start, number = target.tokens, self.args.candidates
        tokens, missed = start, torch.zeros(len(start), dtype=torch.long)
        rows, size = torch.arange(len(tokens), device=tokens.device), len(self.embedding)
        steps = min(self.args.num_replacements, int(target.free.sum(1).max()))
        for step in range(self.args.attack_steps or steps):
            if step == 0 or self.draws:  # losses at another precision cannot be compared
                best = self.losses(target, tokens, step)
            found = tokens
            gradient = self.gradient(target, tokens, step)
            changed = tokens != start
            spent = changed.sum(1, keepdim=True) >= self.args.num_replacements
            free = target.free & (changed | ~spent)
            tops = []
            for row in rows.tolist():  # text by text, since (B, S, V) is too much
                scores = self.scores(gradient[row], tokens[row], start[row], free[row]).flatten()
                top = scores.topk(min(number * (int(missed[row]) + 1), len(scores)))
                tops.append((top.values[-number:], top.indices[-number:]))
            for scores, places in zip(*(torch.stack(part, 1) for part in zip(*tops, strict=True)), strict=True):
                tried, slots = tokens.clone(), places // size
                tried[rows, slots] = torch.where(scores > -torch.inf, places % size, tokens[rows, slots])
                losses = self.losses(target, tried, step)
                better = (losses > best) & accept(tried)
                best, found = torch.where(better, losses, best), torch.where(better[:, None], tried, found)
            missed = torch.where((found == tokens).all(1).cpu(), missed + 1, 0)
            tokens = found
        return tokens

    def slots(self, target):
        """(B, K) slots where one replacement changes the loss most by first order: those that PGD relaxes."""
        gradient, parts = self.gradient(target, target.tokens, 0), []
        for row, tokens in enumerate(target.tokens):
            scores = self.scores(gradient[row], tokens, tokens, target.free[row]).amax(-1)
            parts.append(scores.topk(min(self.args.num_replacements, len(tokens))).indices)
        return torch.stack(parts)

    def pgd(self, target, accept):
        """(B, S) tokens: the best that the relaxed attack came by. accept: as of `hotflip`.

        A step is what a token gains over the mixture in its slot, scaled to 1 for the best. The entropy that is
        allowed is not bounded in the first half of the steps, and falls to 0 in the second.
        """
        steps, best = self.args.attack_steps, target.tokens
        best_losses = self.losses(target, best, 0)
        slots = self.slots(target)  # (B, K)
        original = best.gather(1, slots)
        own = F.one_hot(original, len(self.embedding)).bool()  # (B, K, V)
        allowed = self.allowed(original, target.free.gather(1, slots)) | own
        rows, places = own.float(), slots[..., None].expand(-1, -1, self.embedding.shape[1])
        for step in range(steps):
            shift = rows @ self.embedding - self.embedding[original]
            delta = torch.zeros(*best.shape, shift.shape[-1], device=shift.device).scatter(1, places, shift)
            gradient = self.gradient(target, target.tokens, step, delta).gather(1, places) @ self.embedding.t()
            gain = (gradient - (rows * gradient).sum(-1, keepdim=True)).masked_fill(~allowed, -torch.inf)
            gain = (gain / gain.amax(-1, keepdim=True).clamp(min=torch.finfo(gain.dtype).tiny)).clamp(min=-1)
            rows = (rows + self.args.step_size * gain).masked_fill(~allowed, -torch.inf)
            rows = project_entropy(project_simplex(rows), min(1, 2 - 2 * (step + 1) / steps))
            found = target.tokens.scatter(1, slots, rows.argmax(-1))
            if self.draws:
                best_losses = self.losses(target, best, step)
            losses = self.losses(target, found, step)
            better = (losses > best_losses) & accept(found)
            best_losses, best = torch.where(better, losses, best_losses), torch.where(better[:, None], found, best)
        return best


# ---- tokens that may be put in


def replaceable_tokens(tokenizer, size):
    """(size,) int8 of all token ids: 1 begins with a space, 2 does not; 0 may not be put into a text.

    These are special tokens, blanks, control and parts of characters, and what is read as other tokens when alone.
    """
    ids = range(len(tokenizer))
    texts = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    again = tokenizer(texts, add_special_tokens=False)["input_ids"]
    special, kinds = set(tokenizer.all_special_ids), torch.zeros(size, dtype=torch.int8)
    for token, text, found in zip(ids, texts, again, strict=True):
        readable = text.strip() and text.isprintable() and "\ufffd" not in text
        if found == [token] and token not in special and readable:
            kinds[token] = 1 if text.startswith(" ") else 2
    return kinds
