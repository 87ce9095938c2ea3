"""What the words of a text may be replaced by, for word_attack.py: synonyms of a table, or edits of their letters."""

import random
import re
import string

from gbda_attack import number_seed
from models.errors import UserError
from models.user_input import read_json, refuse, show

WORD = re.compile("[^\\W\\d_]+(?:['\u2019][^\\W\\d_]+)*")


def split_words(text):
    """(words, gaps) of a text: gaps[0] + words[0] + gaps[1] + ... + gaps[-1]."""
    return WORD.findall(text), WORD.split(text)


def join_words(words, gaps):
    """The text of `split_words`."""
    return "".join(gap + word for gap, word in zip(gaps, [*words, ""], strict=True))


def without_word(words, gaps, place):
    """The text without a word and without the space before it (at the start: after it)."""
    gap = gaps[place].rstrip() + gaps[place + 1] if place else gaps[0] + gaps[1].lstrip()
    return join_words(words[:place] + words[place + 1 :], [*gaps[:place], gap, *gaps[place + 2 :]])


def match_case(candidate, word):
    """A lower-case candidate as the word is written: UPPER, Capitalized or as it is."""
    if len(word) > 1 and word.isupper():
        return candidate.upper()
    return candidate[0].upper() + candidate[1:] if word[0].isupper() else candidate


def read_synonyms(path):
    """{lower-case word: [other words]} of a JSON file. Raises UserError naming file, key and value; OSError."""
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: {show(content)}: allowed is an object word -> list of words that is not empty")

    def fault(word, others):
        if not (WORD.fullmatch(word) and word == word.lower()):
            return f"key {show(word)}: allowed is one word in lower case"
        if not isinstance(others, list) or not others:
            return f"{show(word)} = {show(others)}: allowed is a list of one or more words"
        wrong = [other for other in others if not (isinstance(other, str) and WORD.fullmatch(other))]
        return f"{show(word)}: {show(wrong[0])}: allowed is one word of letters" if wrong else None

    refuse(path, list(filter(None, (fault(*item) for item in content.items()))))
    return content


def synonyms_of(word, table, number):
    """The first `number` other words that the table has for a word, in its case."""
    others = dict.fromkeys(other for other in table.get(word.lower(), ()) if other.lower() != word.lower())
    return [match_case(other, word) for other in list(others)[:number]]


def character_edits(word, number, seed):
    """At most `number` words that are one swap of neighbours, substitution, deletion or insertion away from a word.

    A function of word and seed. Source of the four edits: DeepWordBug (arXiv:1801.04354).
    """
    plain, draw = word.lower(), random.Random(number_seed(seed, "edits", word.lower()))
    found = {}
    for place in range(len(plain) if len(plain) > 1 else 0):
        before, letter, after = plain[:place], plain[place], plain[place + 1 :]
        swapped = before + after[:1] + letter + after[1:]
        other, more = draw.choices(string.ascii_lowercase, k=2)
        found |= dict.fromkeys([swapped, before + other + after, before + after, before + more + letter + after])
    edits = [edit for edit in found if edit != plain and WORD.fullmatch(edit)]
    return [match_case(edit, word) for edit in (edits if len(edits) <= number else draw.sample(edits, number))]
