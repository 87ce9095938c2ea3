#!/usr/bin/env python
"""Replaces words until a text classifier errs: a black-box attack, which sees class probabilities alone.

    python word_attack.py --model_name_or_path results/train --dataset_name ag_news --synonyms synonyms.json \\
        --attack_bits 8 --output_dir results/words_8
    python word_attack.py --model_name_or_path results/train --dataset_name ag_news --candidates characters \\
        --attack_bits random --precision_set 4 6 8 --output_dir results/letters_random

The words of a text are ordered by what deleting them takes from the probability of its label, and each is replaced by
the candidate that takes most, until the label flips or --max_fraction of the words is replaced. Candidates are the
synonyms of a table (make_synonyms.py writes one), or edits of the word's letters. The classifier answers at
--attack_bits; at random, every query at a precision drawn for it. The output folder is of the form of
whitebox_attack.py, for eval.py and random_precision_inference.py; its "initial samples" have as many words replaced at
random. A killed attack resumes, and a finished one does nothing.
Sources: TextFooler (arXiv:1907.11932), PWWS (Ren et al., ACL 2019), DeepWordBug (arXiv:1801.04354).
"""

import collections
import dataclasses
import random
import time
import types

import numpy as np
from transformers import set_seed

from attack_setup import ClassifierArguments
from classifier import accuracy_row, class_logits
from common.arguments import option
from common.checksums import json_checksum
from common.flags import parse_args
from common.script import plain_errors, setup_logging
from gbda_attack import number_seed
from models.errors import UserError
from substitutions import character_edits, join_words, read_synonyms, split_words, synonyms_of, without_word
from text_classification import TextArguments
from whitebox_attack import attack_and_record, load_inputs

CANDIDATES, ORDERS = ("synonyms", "characters"), ("importance", "pwws")
BROKEN, KEPT, WRONG, NOTHING = "broken", "kept", "wrong before", "no word to replace"


@dataclasses.dataclass
class WordAttackArguments:
    """The attack."""

    output_dir: str = dataclasses.field(metadata={"help": "folder of the adversarial texts and the record"})
    attack_bits: str = option("32", '32, 8, 4, "W4A8KV8", a JSON config, or random (a draw per query)')
    precision_set: list[str] = option(["4", "8"], "the precisions of --attack_bits random")
    num_samples: int = option(100, "texts to attack")
    start_index: int = option(0, "first of them in the shuffled validation data")
    data_seed: int = option(0, "seed of that shuffle")
    candidates: str = option("synonyms", "what replaces a word: synonyms (of --synonyms), or characters (edits)")
    synonyms: str | None = option(None, "JSON file: an object word -> list of words (make_synonyms.py)")
    max_candidates: int = option(50, "candidates of a word, at most")
    max_fraction: float = option(0.3, "share of a text's words that may be replaced (one word at least)")
    order: str = option("importance", "importance (by deletion), or pwws (importance x what the best candidate takes)")
    batch_texts: int = option(16, "texts attacked side by side, so that their queries share forward passes")
    seed: int = option(42, "seed of the draws: precisions, edits, random replacements")
    overwrite_output_dir: bool = option(False, "start over in a used --output_dir")


def check_args(args):
    """Refuse what cannot work, before anything is loaded."""
    for flag, allowed in {"candidates": CANDIDATES, "order": ORDERS}.items():
        if getattr(args, flag) not in allowed:
            raise UserError(f"--{flag} {getattr(args, flag)}: allowed are {', '.join(allowed)}")
    for flag, least in {"num_samples": 1, "max_candidates": 1, "batch_texts": 1, "start_index": 0}.items():
        if getattr(args, flag) < least:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least {least}")
    if not 0 < args.max_fraction <= 1:
        raise UserError(f"--max_fraction {args.max_fraction}: must be above 0, and at most 1")
    if args.attack_bits == "eot":
        raise UserError("--attack_bits eot: allowed are a config and random; there are no gradients to average here")
    if args.attack_bits == "random" and len(set(args.precision_set)) < 2:
        raise UserError("--attack_bits random: --precision_set needs at least two precisions")
    if args.candidates == "synonyms" and not args.synonyms:
        make = "make one of WordNet with make_synonyms.py, or pass --candidates characters, which needs no file"
        raise UserError(f"--synonyms is missing: a JSON file of an object word -> list of words; {make}")
    if args.candidates == "characters" and args.synonyms:
        raise UserError(f"--synonyms {args.synonyms}: --candidates characters takes none")


class Victim:
    """The classifier as the attacker sees it: text in, class probabilities out.

    Args: precisions: resolved configs; with several, each query is answered at one of them, drawn for it.
    """

    def __init__(self, model, tokenizer, precisions, max_length):
        self.model, self.tokenizer, self.precisions, self.max_length = model, tokenizer, precisions, max_length

    def ask(self, texts, draws):
        """Probabilities (N, classes) of N texts; draws: (N,) which precision answers each."""
        draws, answers = np.asarray(draws), np.zeros((len(texts), self.model.config.num_labels))
        for number, precision in enumerate(self.precisions):
            if (places := np.flatnonzero(draws == number)).size:
                with self.model.at_bits(precision):
                    asked = [texts[place] for place in places]
                    logits = class_logits(self.model, self.tokenizer, asked, self.max_length)
                answers[places] = logits.double().softmax(-1).cpu().numpy()
        return answers


def deletion_importance(words, gaps, places, label, before):
    """A generator: asks for the texts without each word; returns what each deletion takes from the label (places,)."""
    answers = yield [without_word(words, gaps, place) for place in places]
    return before - answers[:, label]


def pwws_order(words, gaps, options, importance, label, before):
    """A generator: asks for all candidates; returns (scores, the best candidate) of each place.

    Args: options {place: candidates}; importance (places,). Source: PWWS, softmax of the saliency x the gain.
    """
    asked = [(place, candidate) for place, found in options.items() for candidate in found]
    answers = yield [join_words([*words[:place], other, *words[place + 1 :]], gaps) for place, other in asked]
    best = {}
    for (place, other), probability in zip(asked, answers[:, label], strict=True):
        if place not in best or probability < best[place][0]:
            best[place] = probability, other
    saliency = np.exp(importance - importance.max())
    gains = np.array([before - best[place][0] for place in options])
    return saliency / saliency.sum() * gains, {place: [best[place][1]] for place in options}


def greedy_attack(text, options, args):
    """A generator: yields lists of texts to ask for, is sent their probabilities (N, classes).

    Args: text: {"text", "label"}; options {place of a word: candidates}.
    Returns: (outcome, words of the text as they became, places that were replaced).
    """
    (words, gaps), label = split_words(text["text"]), text["label"]
    (answer,) = yield [text["text"]]
    if answer.argmax() != label:
        return WRONG, words, []
    if not options:
        return NOTHING, words, []
    places, probability, replaced = list(options), answer[label], []
    scores = yield from deletion_importance(words, gaps, places, label, probability)
    if args.order == "pwws":
        scores, options = yield from pwws_order(words, gaps, options, scores, label, probability)
    limit = max(1, int(args.max_fraction * len(words)))
    for number in sorted(range(len(places)), key=lambda number: (-scores[number], number)):
        if len(replaced) == limit:
            break
        place = places[number]
        tried = [[*words[:place], other, *words[place + 1 :]] for other in options[place]]
        answers = yield [join_words(found, gaps) for found in tried]
        right = answers.argmax(1) == label
        best = min(range(len(tried)), key=lambda number: (right[number], answers[number, label]))
        if not right[best] or answers[best, label] < probability:
            words, probability = tried[best], answers[best, label]
            replaced.append(place)
        if not right[best]:
            return BROKEN, words, replaced
    return KEPT, words, replaced


class WordAttack:
    """Attacks texts side by side. Args: candidates_of: word -> candidates; idf (vocabulary,): of the rows."""

    def __init__(self, victim, candidates_of, idf, args):
        self.victim, self.candidates_of, self.idf, self.args = victim, candidates_of, idf, args

    def run(self, texts):
        """Rows of whitebox_attack.py's form, with outcome, queries and replaced words."""
        found = [map(self.candidates_of, split_words(text["text"])[0]) for text in texts]
        options = [{place: others for place, others in enumerate(lists) if others} for lists in found]
        draws = [random.Random(number_seed(self.args.seed, "precision", text["index"])) for text in texts]
        attacks = [greedy_attack(text, own, self.args) for text, own in zip(texts, options, strict=True)]
        waiting = {number: next(attack) for number, attack in enumerate(attacks)}
        queries, results = collections.Counter(), {}
        while waiting:
            asked = [(number, text) for number, wanted in waiting.items() for text in wanted]
            precisions = [draws[number].randrange(len(self.victim.precisions)) for number, _ in asked]
            answers, first = self.victim.ask([text for _, text in asked], precisions), 0
            for number, wanted in list(waiting.items()):
                queries[number] += len(wanted)
                try:
                    waiting[number] = attacks[number].send(answers[first : first + len(wanted)])
                except StopIteration as end:
                    results[number] = end.value
                    del waiting[number]
                first += len(wanted)
        return [self.row(text, options[n], queries[n], *results[n]) for n, text in enumerate(texts)]

    def row(self, text, options, queries, outcome, words, replaced):
        """One JSON row. "replaced": [[place, word before, word after], ...] in the order of replacement."""
        before, gaps = split_words(text["text"])
        return text | {
            "idf": [round(value, 5) for value in self.idf[text["tokens"]].tolist()],
            "samples": [join_words(words, gaps)],
            "initial_samples": [self.at_random(text, options, len(replaced))],
            "outcome": outcome,
            "queries": queries,
            "words": len(words),
            "replaced": [[place, before[place], words[place]] for place in replaced],
        }

    def at_random(self, text, options, number):
        """The text with `number` words replaced by a candidate, both drawn: an attacker who asks nothing."""
        draw = random.Random(number_seed(self.args.seed, "initial", text["index"]))
        words, gaps = split_words(text["text"])
        for place in draw.sample(sorted(options), number):
            words[place] = draw.choice(options[place])
        return join_words(words, gaps)


def summarize(rows):
    """Metrics of a record: how texts ended, what the attack cost and changed."""
    outcomes = collections.Counter(row["outcome"] for row in rows)
    attacked = [row for row in rows if row["outcome"] in (BROKEN, KEPT)]
    seen = accuracy_row([row["outcome"] in (KEPT, NOTHING) for row in rows])
    names = {BROKEN: "broken", KEPT: "kept", WRONG: "wrong_before", NOTHING: "no_word_to_replace"}
    means = {"queries_per_attacked_text": [row["queries"] for row in attacked]}
    means["percent_of_words_replaced"] = [100 * len(row["replaced"]) / row["words"] for row in attacked]
    return {
        **{f"texts_{name}": outcomes[outcome] for outcome, name in names.items()},
        "accuracy_as_attacked": seen["accuracy"],
        "accuracy_as_attacked_interval": seen["interval"],
        **{name: float(np.mean(values)) if values else None for name, values in means.items()},
    }


def main():
    start = time.time()
    model_args, data_args, args = parse_args(ClassifierArguments, TextArguments, WordAttackArguments)
    setup_logging(types.SimpleNamespace(process_index=0))
    check_args(args)
    set_seed(args.seed)
    table = read_synonyms(args.synonyms) if args.synonyms else None
    inputs = load_inputs(model_args, data_args, args)
    del inputs.settings["synonyms"]  # the file may move
    inputs.settings |= {
        "method": f"{args.candidates}, {args.order}",
        "baseline": "words replaced at random",
        "synonyms_sha256": table and json_checksum(table),
        "gumbel_samples": 1,  # adversarial texts of each
    }

    def candidates_of(word):
        if table:
            return synonyms_of(word, table, args.max_candidates)
        return character_edits(word, args.max_candidates, args.seed)

    def attack():
        precisions, length = list(inputs.precisions.values()), inputs.settings["max_seq_length"]
        victim = Victim(inputs.model, inputs.tokenizer, precisions, length)
        return WordAttack(victim, candidates_of, inputs.idf, args).run

    numbers = range(len(inputs.texts))
    batches = [numbers[first : first + args.batch_texts] for first in numbers[:: args.batch_texts]]
    attack_and_record(attack, batches, inputs, model_args, data_args, args, start, summarize)


if __name__ == "__main__":
    with plain_errors():
        main()
