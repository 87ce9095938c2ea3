"""adv_attack/word_attack.py: greedy replacement of words, synonyms of WordNet, differences from float32."""

import collections
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from conftest import NAMES, ROOT, THINGS, experiment, parse_flags
from test_adv_attack import call, read, text_files, trained  # noqa: F401 (two fixtures)

with experiment("adv_attack"):
    import eval as attack_eval
    import make_synonyms
    import precision_gain
    import random_precision_inference as rpi
    import substitutions
    import word_attack
    from common.record import load_state, write_state

LETTERS = ("--candidates", "characters", "--max_candidates", "6")


# ---- words by hand


def test_a_text_is_its_words_and_gaps():
    text = "It 's a well-made film, don't miss 2 of them ."
    words, gaps = substitutions.split_words(text)
    assert words == ["It", "s", "a", "well", "made", "film", "don't", "miss", "of", "them"]
    assert substitutions.join_words(words, gaps) == text
    assert substitutions.without_word(words, gaps, 0) == "'s a well-made film, don't miss 2 of them ."
    assert substitutions.without_word(words, gaps, 5) == "It 's a well-made, don't miss 2 of them ."
    assert substitutions.without_word(words, gaps, 9) == "It 's a well-made film, don't miss 2 of ."
    assert substitutions.without_word(["one"], ["", "!"], 0) == "!"
    assert substitutions.split_words("42 !") == ([], ["42 !"])


def test_candidates_keep_the_case_of_the_word_and_leave_the_word_out():
    table = {"film": ["Film", "movie", "movie", "picture", "flick"]}
    assert substitutions.synonyms_of("film", table, 2) == ["movie", "picture"]
    assert substitutions.synonyms_of("Film", table, 9) == ["Movie", "Picture", "Flick"]
    assert substitutions.synonyms_of("FILM", table, 1) == ["MOVIE"]
    assert substitutions.synonyms_of("unknown", table, 9) == []


def test_character_edits_are_one_edit_away_and_the_same_for_a_seed():
    edits = substitutions.character_edits("Film", 50, 1)
    assert len(edits) == len(set(edits)) > 8 and "Film" not in edits
    assert edits == substitutions.character_edits("Film", 50, 1) != substitutions.character_edits("Film", 50, 2)
    assert {"Iflm", "Flim", "Fiml", "Ilm", "Flm", "Fim", "Fil"} <= set(edits)  # all swaps and deletions
    assert all(re.fullmatch("[A-Z][a-z]{2,4}", edit) for edit in edits)
    some = substitutions.character_edits("Film", 3, 1)
    assert len(some) == 3 and set(some) <= set(edits)
    assert substitutions.character_edits("a", 9, 1) == []


# ---- the greedy search on a model made by hand

WEIGHTS = {"good": 3.0, "fine": 1.0, "great": 2.0, "bad": -2.0, "okay": 0.5, "poor": -1.0}


def by_hand(text):
    """Probabilities of two classes: a logistic function of the words' weights."""
    score = sum(WEIGHTS.get(word.lower(), 0.0) for word in substitutions.split_words(text)[0])
    return [1 / (1 + math.exp(score)), 1 / (1 + math.exp(-score))]


class Hand:
    """A victim that notes what it was asked, round by round."""

    def __init__(self, precisions=1):
        self.precisions, self.rounds, self.draws = [None] * precisions, [], []

    def ask(self, texts, draws):
        self.rounds.append(texts)
        self.draws += draws
        return np.array([by_hand(text) for text in texts])


def attack_by_hand(*texts, table, order="importance", victim=None, **flags):
    flags = {"max_fraction": 1.0, "seed": 42} | flags
    args = types.SimpleNamespace(order=order, **flags)
    attack = word_attack.WordAttack(
        victim or Hand(), lambda word: substitutions.synonyms_of(word, table, 9), torch.ones(1), args
    )
    rows = [{"index": number, "text": text, "label": 1, "tokens": [0]} for number, text in enumerate(texts)]
    return attack.run(rows)


@pytest.mark.parametrize("text", ["A good and great , fine film", "fine good", "Okay Good great FINE end"])
def test_importance_is_what_deleting_each_word_takes_from_the_label(text):
    words, gaps = substitutions.split_words(text)
    before = by_hand(text)[1]
    search = word_attack.deletion_importance(words, gaps, range(len(words)), 1, before)
    asked = next(search)
    with pytest.raises(StopIteration) as end:
        search.send(np.array([by_hand(one) for one in asked]))
    for place, found in enumerate(end.value.value):
        left = " ".join(words[:place] + words[place + 1 :])
        assert found == pytest.approx(before - by_hand(left)[1])


TABLE = {"good": ["okay", "great"], "fine": ["poor"], "great": ["okay"], "film": ["movie"]}


def test_greedy_replaces_the_most_important_word_first_until_the_label_flips():
    (row,) = attack_by_hand("A Good , fine film bad", table=TABLE)  # weight 2: good -> okay leaves -0.5
    assert row["samples"] == ["A Okay , fine film bad"] and row["outcome"] == "broken"
    assert row["replaced"] == [[1, "Good", "Okay"]] and row["words"] == 5
    assert row["queries"] == 1 + 3 + 2  # the text, a deletion for each word with candidates, both of good
    (row,) = attack_by_hand("good great fine", table=TABLE)  # 6 -> 3.5 -> 2 -> 0: okay okay poor
    assert row["outcome"] == "broken" and row["samples"] == ["okay okay poor"]
    assert [entry[1] for entry in row["replaced"]] == ["good", "great", "fine"]


def test_a_share_of_the_words_bounds_the_attack_and_no_candidate_may_help_the_label():
    (row,) = attack_by_hand("good great fine film", table=TABLE, max_fraction=0.5)
    assert row["outcome"] == "kept" and [entry[1] for entry in row["replaced"]] == ["good", "great"]
    (row,) = attack_by_hand("good great fine film", table=TABLE, max_fraction=0.01)  # one at least
    assert [entry[1] for entry in row["replaced"]] == ["good"]
    (row,) = attack_by_hand("okay film", table={"okay": ["good"], "film": ["movie"]})
    assert row["outcome"] == "kept" and row["replaced"] == [] and row["samples"] == ["okay film"]


def test_pwws_order_weighs_importance_with_what_the_best_candidate_takes():
    table = {"good": ["great"], "fine": ["bad"], "film": ["movie"]}  # good is more important, fine gives more
    for order, first in (("importance", "good"), ("pwws", "fine")):
        (row,) = attack_by_hand("good fine film", table=table, order=order, max_fraction=0.4)
        assert row["replaced"][0][1] == first
    words, gaps = substitutions.split_words("good fine film")
    options, before = {0: ["great"], 1: ["okay", "bad"], 2: ["movie"]}, by_hand("good fine film")[1]
    importance = np.array([before - by_hand(text)[1] for text in ("fine film", "good film", "good fine")])
    search = word_attack.pwws_order(words, gaps, options, importance, 1, before)
    asked = next(search)
    assert asked == ["great fine film", "good okay film", "good bad film", "good fine movie"]
    with pytest.raises(StopIteration) as end:
        search.send(np.array([by_hand(text) for text in asked]))
    scores, best = end.value.value
    gains = [before - by_hand(text)[1] for text in ("great fine film", "good bad film", "good fine movie")]
    assert scores == pytest.approx(np.exp(importance) / np.exp(importance).sum() * gains)
    assert best == {0: ["great"], 1: ["bad"], 2: ["movie"]}


def test_texts_in_flight_share_their_rounds_and_end_as_they_would_alone():
    texts = ["A Good , fine film bad", "bad film", "good great fine", "no such words", "fine film"]
    victim = Hand()
    together = attack_by_hand(*texts, table=TABLE, victim=victim)
    assert victim.rounds[0] == texts and sum(map(len, victim.rounds)) == sum(row["queries"] for row in together)
    assert [row["outcome"] for row in together] == ["broken", "wrong before", "broken", "wrong before", "broken"]
    for number, text in enumerate(texts):
        (alone,) = attack_by_hand(text, table=TABLE)
        assert {k: v for k, v in alone.items() if k not in ("index", "initial_samples")} == {
            k: v for k, v in together[number].items() if k not in ("index", "initial_samples")
        }


def test_texts_without_a_word_to_replace_and_wrong_ones_are_kept_and_counted():
    rows = attack_by_hand("good nothing else", "bad film", "12 !", "fine film", table={"film": ["movie"]})
    assert [row["outcome"] for row in rows] == ["no word to replace", "wrong before", "wrong before", "kept"]
    assert [row["samples"][0] for row in rows] == ["good nothing else", "bad film", "12 !", "fine film"]
    assert [row["queries"] for row in rows] == [1, 1, 1, 3] and rows[2]["words"] == 0
    found = word_attack.summarize(rows)
    assert (found["texts_kept"], found["texts_wrong_before"], found["texts_no_word_to_replace"]) == (1, 2, 1)
    assert found["accuracy_as_attacked"] == 50 and found["queries_per_attacked_text"] == 3


def test_the_baseline_replaces_as_many_words_at_random():
    texts = ["good great fine film"] * 12
    rows = attack_by_hand(*texts, table=TABLE, max_fraction=0.5)
    for row in rows:
        before, after = (substitutions.split_words(text)[0] for text in (row["text"], row["initial_samples"][0]))
        changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        assert len(changed) == len(row["replaced"]) == 2
        assert all(new in TABLE[old] for old, new in changed)
    assert len({row["initial_samples"][0] for row in rows}) > 2  # a draw of its own for every text


def test_a_random_precision_is_drawn_for_every_query():
    one, again = Hand(3), Hand(3)
    for victim in (one, again):
        attack_by_hand(*["good great fine film"] * 5, table=TABLE, victim=victim)
    assert one.draws == again.draws and {0, 1, 2} == set(one.draws)
    other = Hand(3)
    attack_by_hand(*["good great fine film"] * 5, table=TABLE, victim=other, seed=1)
    assert other.draws != one.draws


# ---- the script


@pytest.fixture(scope="session")
def synonyms(tmp_path_factory):
    """Every thing and name stands for every other; a kite or a drum decides on the label."""
    path = tmp_path_factory.mktemp("synonyms") / "synonyms.json"
    table = {word: [other for other in THINGS if other != word] for word in THINGS}
    table |= {word.lower(): [other for other in NAMES if other != word] for word in NAMES}
    path.write_text(json.dumps(table | {"has": ["had", "holds"], "the": ["a"]}))
    return path


def attack(trained, text_files, output, *flags):  # noqa: F811
    words = ("--num_samples", 12, "--batch_texts", 5, "--max_fraction", 0.1, "--max_seq_length", 64)
    call(word_attack, "--model_name_or_path", trained, *text_files, "--output_dir", output, *words, *flags)
    return load_state(output / "adversarial.json")


@pytest.fixture(scope="session")
def attacks(trained, text_files, synonyms, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("words")
    for bits in ("32", "8", "4"):
        attack(trained, text_files, folder / bits, "--attack_bits", bits, "--synonyms", synonyms)
    return folder


def test_attack_beats_the_classifier_and_random_words_do_not(trained, attacks, tmp_path):  # noqa: F811
    folders = [attacks / bits for bits in ("32", "8", "4")]
    call(attack_eval, "--model_name_or_path", trained, "--attack_dirs", *folders, "--eval_bits", 32, 8, 4,
         "--output_dir", tmp_path)  # fmt: skip
    record = read(tmp_path / "record.json")
    rows = {(row["attack"], row["inference"], row["texts"]): row for row in record["rows"]}
    for bits, name in (("32", "W32A32KV32"), ("8", "W8A8KV8"), ("4", "W4A4KV4")):
        clean, drawn, found = (rows[name, name, kind] for kind in ("clean", "words replaced at random", "optimized"))
        assert clean["single"]["accuracy"] >= 90 and clean["single"]["n"] == 12
        assert found["single"]["accuracy"] <= 20 and drawn["single"]["accuracy"] >= found["single"]["accuracy"] + 30
        metrics = read(attacks / bits / "record.json")["metrics"]
        assert metrics["accuracy_as_attacked"] == pytest.approx(found["single"]["accuracy"])
        assert metrics["queries_per_attacked_text"] > 5
    differences = {(row["texts"], row["precision"]): row for row in record["differences_from_float32"]}
    assert len(differences) == 2 * 5  # 8 and 4 bits: clean, own, and found at each of three
    own = differences["each attacked at its own", "W8A8KV8"]["all"]
    cells = [rows[name, name, "optimized"]["single"]["accuracy"] for name in ("W8A8KV8", "W32A32KV32")]
    assert own["points"] == pytest.approx(cells[0] - cells[1]) and own["n"] == 12
    table = (tmp_path / "table.md").read_text()
    assert "Attack: synonyms, importance." in table and "each attacked at its own" in table


def test_random_precision_inference_reads_the_attacks(trained, attacks, tmp_path):  # noqa: F811
    folders = [attacks / bits for bits in ("8", "4")]
    call(rpi, "--model_name_or_path", trained, "--attack_dirs", *folders, "--precision_set", 4, 8,
         "--repetitions", 3, "--output_dir", tmp_path)  # fmt: skip
    record = read(tmp_path / "record.json")
    assert list(record["random_precision"]) == ["no attack", "words replaced at random", "W8A8KV8", "W4A4KV4"]
    assert record["summary"]["single sample"]["mean_diagonal"] is not None


def test_a_resumed_attack_equals_an_uninterrupted_one(
    trained, text_files, synonyms, attacks, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    flags, original, sizes = ("--attack_bits", "random", "--synonyms", synonyms), word_attack.WordAttack.run, []
    whole = attack(trained, text_files, tmp_path / "whole", *flags)
    assert list(whole["settings"]["precisions"]) == ["W4A4KV4", "W8A8KV8"]

    def killed(self, texts):
        sizes.append(len(texts))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return original(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(word_attack.WordAttack, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            attack(trained, text_files, tmp_path / "cut", *flags)
        assert attack(trained, text_files, tmp_path / "cut", *flags) == whole
    assert sizes == [5, 5, 5, 2]
    monkeypatch.setattr(word_attack, "Victim", None)  # a finished one asks nothing
    moved = shutil.copy(synonyms, tmp_path / "moved.json")
    assert attack(trained, text_files, tmp_path / "cut", *flags[:3], moved) == whole


def test_characters_need_no_file_and_integers_may_be_attacked(trained, text_files, tiny_model, tmp_path):  # noqa: F811
    with experiment("switch_precision"):
        import export
    exported, flags = (
        tmp_path / "exported",
        ("--attack_bits", "4", "--num_samples", 4, "--max_fraction", 0.5, *LETTERS),
    )
    head = ("--head", "QuantGPT2ForSequenceClassification")
    call(export, "--model_name_or_path", trained, *head, "--bit_configs", 4, 8, "--output_dir", exported)
    found = [attack(trained, text_files, tmp_path / "own", *flags)]
    found.append(attack(exported, text_files, tmp_path / "packed", *flags, "--reference_model", tiny_model))
    assert found[0]["settings"]["method"] == "characters, importance"
    rows = [[(row["samples"], row["outcome"]) for row in one["texts"]] for one in found]
    assert rows[0] == rows[1], "the same codes answer"
    assert any(row["replaced"] for row in found[1]["texts"])
    call(attack_eval, "--model_name_or_path", exported, "--attack_dirs", tmp_path / "packed",
         "--reference_model", tiny_model, "--output_dir", tmp_path / "eval")  # fmt: skip
    assert read(tmp_path / "eval" / "record.json")["differences_from_float32"] == []


def test_attacks_of_two_methods_share_no_table(trained, attacks, tmp_path):  # noqa: F811
    shutil.copytree(attacks / "4", tmp_path / "other")
    state = load_state(tmp_path / "other" / "adversarial.json")
    state["settings"]["method"] = "characters, importance"
    write_state(tmp_path / "other" / "adversarial.json", state)
    message = "attacked by characters, importance, .* by synonyms, importance: evaluate them by themselves"
    with pytest.raises(ValueError, match=message):
        call(attack_eval, "--model_name_or_path", trained, "--attack_dirs", attacks / "8", tmp_path / "other",
             "--output_dir", tmp_path / "eval")  # fmt: skip


def test_every_attack_has_a_baseline_of_its_own(trained, attacks, tmp_path):  # noqa: F811
    shutil.copytree(attacks / "4", tmp_path / "other")
    state = load_state(tmp_path / "other" / "adversarial.json")
    for row in state["texts"]:
        row["initial_samples"] = row["samples"]
    write_state(tmp_path / "other" / "adversarial.json", state)
    call(attack_eval, "--model_name_or_path", trained, "--attack_dirs", attacks / "8", tmp_path / "other",
         "--eval_bits", 4, "--output_dir", tmp_path / "eval")  # fmt: skip
    first, second = ([row["single"]["accuracy"] for row in rows if row["texts"] != "clean"] for rows in (
        [row for row in read(tmp_path / "eval" / "record.json")["rows"] if row["attack"] == name]
        for name in ("W8A8KV8", "W4A4KV4")
    ))  # fmt: skip
    assert first[0] > first[1] and second[0] == second[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--synonyms is missing: .* make_synonyms.py, or pass --candidates characters"),
        (["--candidates", "words"], "--candidates words: allowed are synonyms, characters"),
        (["--order", "x"], "--order x: allowed are importance, pwws"),
        (["--max_fraction", "0"], "--max_fraction 0.0: must be above 0, and at most 1"),
        (["--max_fraction", "1.01"], "--max_fraction 1.01: must be above 0"),
        (["--max_fraction", "nan"], "--max_fraction nan: must be a number that is finite"),
        (["--num_samples", "0"], "--num_samples 0: must be at least 1"),
        (["--max_candidates", "0"], "--max_candidates 0: must be at least 1"),
        (["--batch_texts", "0"], "--batch_texts 0: must be at least 1"),
        (["--start_index", "-1"], "--start_index -1: must be at least 0"),
        (["--attack_bits", "eot"], "--attack_bits eot: allowed are a config and random"),
        (["--attack_bits", "random", "--precision_set", "8"], "--precision_set needs at least two"),
        (["--attack_bits", "random", "--precision_set", "8", "8"], "--precision_set needs at least two"),
        (["--candidates", "characters", "--synonyms", "x.json"], "--synonyms x.json: --candidates characters takes"),
        (["--synonyms", "no.json"], "No such file.*no.json"),
    ],
)
def test_flags_that_are_refused_before_anything_is_loaded(flags, message, monkeypatch, tmp_path):
    monkeypatch.setattr(word_attack, "load_inputs", None)
    with pytest.raises((ValueError, OSError), match=message):
        call(word_attack, "--model_name_or_path", "m", "--output_dir", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", r"{}: allowed is an object word -> list of words that is not empty"),
        ("[]", r"\[\]: allowed is an object"),
        ("", "not valid JSON"),
        ('{"film": ["movie"], "film": ["flick"]}', 'duplicate key "film"'),
        ('{"Film": ["movie"]}', 'key "Film": allowed is one word in lower case'),
        ('{"two words": ["movie"]}', 'key "two words": allowed is one word'),
        ('{"film": []}', r'"film" = \[\]: allowed is a list of one or more words'),
        ('{"film": "movie"}', '"film" = "movie": allowed is a list'),
        ('{"film": ["movie", 3]}', '"film": 3: allowed is one word of letters'),
        ('{"film": ["moving picture"]}', '"film": "moving picture": allowed is one word'),
        ('{"film": [""]}', '"film": "": allowed is one word'),
    ],
)
def test_synonym_files_that_are_refused(content, message, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}") as caught:
        substitutions.read_synonyms(path)
    assert type(caught.value).__name__ == "UserError"


def test_another_table_is_another_attack(trained, text_files, attacks, tmp_path):  # noqa: F811
    path = tmp_path / "table.json"
    path.write_text('{"kite": ["drum"]}')
    with pytest.raises(ValueError, match="holds an attack with other settings .*synonyms_sha256"):
        attack(trained, text_files, attacks / "8", "--attack_bits", "8", "--synonyms", path)


# ---- WordNet

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  \n  2 under licence.  \n"
ADJECTIVES = """00000100 00 a 02 happy 0 glad(p) 1 001 ! 00000300 a 0101 | well pleased; "a glad man"
00000200 00 s 0b fine 0 all_right 0 okay 0 A1 0 ok 0 Hunky 0 good 1 nice 0 swell(ip) 2 dandy 0 great 0 000 | good
00000300 00 a 01 sad 0 000 | not happy
"""
INDEX = """all_right a 1 1 & 1 0 00000200
fine a 1 1 & 1 0 00000200
glad a 1 1 ! 1 1 00000100
good a 2 2 & ! 2 1 00000100 00000200
happy a 1 1 ! 1 1 00000100
sad a 1 0 1 0 00000300
"""
NOUNS, NOUN_INDEX = "00000400 06 n 02 good 0 goodness 0 000 | the good\n", "good n 1 0 1 1 00000400\n"


@pytest.fixture
def wordnet(tmp_path):
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for part in ("noun", "verb", "adj", "adv"):
        data, index = {"adj": (ADJECTIVES, INDEX), "noun": (NOUNS, NOUN_INDEX)}.get(part, ("", ""))
        (folder / f"data.{part}").write_text(LICENCE + data)
        (folder / f"index.{part}").write_text(LICENCE + index)
    return folder


def make_table(folder, output):
    call(make_synonyms, "--wordnet", folder, "--output", output, "--record_file", f"{output}.record")
    return read(output)


def test_synonyms_of_a_dictionary_by_hand(wordnet, tmp_path):
    table = make_table(wordnet, tmp_path / "table.json")
    others = ["okay", "nice", "swell", "dandy", "great"]
    assert table == {
        "fine": ["okay", "good", *others[1:]],
        "glad": ["happy"],
        "good": ["goodness", "happy", "glad", "fine", *others],  # the first senses, then the second
        "happy": ["glad"],
    }
    assert list(table) == sorted(table) and substitutions.read_synonyms(tmp_path / "table.json") == table
    assert read(f"{tmp_path}/table.json.record")["data"]["wordnet"]["examples"] == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.verb", None, "No such file.*data.verb"),
        ("data.adj", LICENCE + "00000100 00 a xx happy 0\n", "data.adj, line 3: not of WordNet's format"),
        ("data.adj", LICENCE + "00000100 00 a 09 happy 0\n", "data.adj, line 3: not of WordNet's format"),
        ("index.adj", LICENCE + "good\n", "index.adj, line 3: not of WordNet's format"),
        ("index.adj", "good a 1 0 1 0 00009999\n", "index.adj: good: no synset 00009999 in data.adj"),
    ],
)
def test_dictionaries_that_are_refused(name, content, message, wordnet, tmp_path):
    (wordnet / name).unlink() if content is None else (wordnet / name).write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        make_table(wordnet, tmp_path / "table.json")
    assert not (tmp_path / "table.json").exists()


def test_a_dictionary_without_synonyms_is_refused(wordnet, tmp_path):
    for path in pathlib.Path(wordnet).iterdir():
        path.write_text(LICENCE)
    with pytest.raises(ValueError, match="no word in it has a synonym"):
        make_table(wordnet, tmp_path / "table.json")


# ---- differences from float32


def test_differences_by_hand():
    clean = {"W32A32KV32": np.array([1, 1, 1, 0], bool), "W8A8KV8": np.array([1, 1, 0, 1], bool)}
    right = {
        "W32A32KV32": {"W32A32KV32": np.array([0, 1, 0, 0], bool), "W8A8KV8": np.array([1, 1, 0, 1], bool)},
        "W8A8KV8": {"W8A8KV8": np.array([0, 1, 0, 0], bool)},
    }
    rows = precision_gain.gains(dict.fromkeys(right), right, clean)
    assert [(row["texts"], row["precision"]) for row in rows] == [
        ("no attack", "W8A8KV8"), ("each attacked at its own", "W8A8KV8"), ("found at W32A32KV32", "W8A8KV8"),
    ]  # fmt: skip
    unchanged, own, transferred = (row["all"] for row in rows)
    assert unchanged["points"] == 0 and unchanged["only_here_right"] == unchanged["only_float32_right"] == 1
    assert own["points"] == 0 and own["mcnemar_p"] == 1
    assert (transferred["points"], transferred["relative"], transferred["n"]) == (50, 200, 4)
    assert (transferred["only_here_right"], transferred["only_float32_right"]) == (2, 0)
    assert transferred["mcnemar_p"] == pytest.approx(0.5)
    low, high = transferred["interval"]
    mean, deviation = 2 / 6, (4 / 6 - (2 / 6) ** 2) ** 0.5  # 1 1 0 0 and, by Bonett and Price, 1 and -1
    assert (low, high) == pytest.approx([100 * (mean + sign * 1.959964 * deviation / 6**0.5) for sign in (-1, 1)])
    assert (rows[2]["clean_right"]["n"], rows[2]["clean_right"]["points"]) == (2, 50)
    assert any("found at W32A32KV32" in line and "+200.0" in line for line in precision_gain.gain_lines(rows))
    never = {name: np.zeros(4, bool) for name in clean}
    (row,) = precision_gain.gains({}, {}, never)
    assert row["clean_right"] is None and row["all"]["relative"] is None
    assert precision_gain.gain_lines([row])[-1] == precision_gain.CAPTION and precision_gain.gain_lines([]) == []


# ---- the protocol


def test_steps_of_the_protocol_attack_the_same_texts_at_every_precision():
    names = {"SMALL_WORK": "small", "TOPICS": "topics", "VALIDATION_FILE": "dev.json", "WORDNET": "my wordnet"}
    command = [sys.executable, ROOT / "reproduce" / "run.py", "small_robust", "--dry_run"]
    dry = subprocess.run(command, capture_output=True, text=True, env={**names, "PATH": "/usr/bin:/bin"}, check=True)
    lines = [line for line in dry.stdout.splitlines() if re.search("records/(words|pwws|letters|synonyms)_?", line)]
    assert len(lines) == 29 and '--wordnet "${WORDNET:-/usr/share/wordnet}"' in lines[0]
    counts = collections.Counter()
    for line in lines[1:]:
        script, words = re.search(r"python3 (\S+) (.*)", line).groups()
        found = parse_flags(script, words.split())
        name = f"{pathlib.Path(found.output_dir).name.split('_')[0]}_{found.quantizer}"
        counts[name] += 1
        if "word_attack" in script:
            assert found.num_samples == 500 and found.output_dir.endswith(f"/{name}_{found.attack_bits}")
            assert bool(found.synonyms) == (found.candidates == "synonyms") == (not name.startswith("letters"))
            assert (found.order == "pwws") == name.startswith("pwws")
        else:
            assert len(found.attack_dirs) in (3, 4) and all(f"/{name}_" in folder for folder in found.attack_dirs)
    assert sorted(counts.values()) == [4, 4, 4, 4, 6, 6]
