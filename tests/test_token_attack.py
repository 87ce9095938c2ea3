"""Attacks with real tokens: projections and scores by hand, both attacks on tiny models, resuming, refusals."""

import contextlib
import json
import shutil
import types

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from conftest import experiment
from test_adv_attack import SMALL, call, make_rows, read

with experiment("adv_attack"):
    import adversarial_training
    import pgd_report
    import pgd_tasks
    import token_attack
    import token_pgd
    from models.execution import Execution


# ---- projections


def nearest_by_bisection(row):
    """The projection on the simplex, by bisection of its threshold in float64."""
    row = row.double().numpy()
    low, high = row.max() - 1, row.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(row - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(row - low, 0)


def test_projection_on_the_simplex():
    by_hand = {(0.6, 0.8): (0.4, 0.6), (2.0, 0.0): (1.0, 0.0), (0.2, 0.2): (0.5, 0.5), (-3.0, -3.5): (0.75, 0.25)}
    for row, expected in by_hand.items():
        torch.testing.assert_close(token_pgd.project_simplex(torch.tensor(row)), torch.tensor(expected))
    generator = torch.Generator().manual_seed(0)
    for spread in (0.001, 0.3, 5.0):
        rows = spread * torch.randn(4, 3, 3000, generator=generator)
        rows[..., 7] = -torch.inf
        found = token_pgd.project_simplex(rows)
        assert not found[..., 7].any()
        for row, one in zip(rows.flatten(0, 1), found.flatten(0, 1), strict=True):
            np.testing.assert_allclose(one, nearest_by_bisection(row), atol=1e-6)
        torch.testing.assert_close(token_pgd.project_simplex(found), found)


def gini(rows):
    return 1 - rows.square().sum(-1)


def test_projection_of_the_entropy():
    # two tokens: |p - 1/2| grows from 0.1 to 0.3 where 1 - sum p^2 is to be 0.32
    found = token_pgd.project_entropy(torch.tensor([0.6, 0.4, 0.0]), 0.32)
    torch.testing.assert_close(found, torch.tensor([0.8, 0.2, 0.0]))
    sharp, middle = torch.tensor([0.9, 0.1, 0.0]), torch.tensor([0.5, 0.5, 0.0])
    assert torch.equal(token_pgd.project_entropy(sharp, 0.32), sharp), "its entropy is 0.18"
    assert torch.equal(token_pgd.project_entropy(middle, 0.1), middle), "no direction leads out of the middle"
    rows = token_pgd.project_simplex(torch.randn(200, 12, generator=torch.Generator().manual_seed(1)))
    for limit in (0.9, 0.6, 0.3, 0.0):
        found = token_pgd.project_entropy(rows, limit)
        torch.testing.assert_close(found.sum(-1), torch.ones(200))
        assert (found >= 0).all() and (found.argmax(-1) == rows.argmax(-1)).all()
        assert (gini(found) <= torch.maximum(gini(rows).clamp(max=1), gini(rows)) + 1e-6).all()
        inside = (found > 0).sum(-1) == (rows > 0).sum(-1)  # nothing was projected back
        low = gini(rows) <= limit
        torch.testing.assert_close(found[low], rows[low])
        reached = gini(found)[inside & ~low]
        torch.testing.assert_close(reached, torch.full_like(reached, limit), atol=1e-5, rtol=0)


# ---- HotFlip on a model that is linear in its embeddings


class Linear(torch.nn.Module):
    """Its loss is the sum of g_t . E(token t); the config scales it."""

    def __init__(self, vocabulary=9, slots=3):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.transformer = torch.nn.Module()
        self.transformer.wte = torch.nn.Embedding(vocabulary, 4)
        self.transformer.wte.weight.data = torch.randn(vocabulary, 4, generator=generator)
        self.directions = torch.randn(slots, 4, generator=generator)
        self.execution, self.factor = Execution(), 1.0

    def at_bits(self, config):
        self.factor = config
        return contextlib.nullcontext()


class LinearTarget:
    def __init__(self, model, tokens):
        self.model, self.tokens, self.free = model, tokens, torch.ones_like(tokens, dtype=torch.bool)

    def losses(self, name, tokens, delta=None):
        embeds = self.model.transformer.wte(tokens) + (0 if delta is None else delta)
        return self.model.factor * (embeds * self.model.directions).sum((1, 2))


def attack_of(model, precisions=None, kinds=None, draws=False, **args):
    args = {"num_replacements": 1, "attack_steps": 1, "candidates": 3, "step_size": 0.5, "seed": 0} | args
    kinds = torch.ones(len(model.transformer.wte.weight), dtype=torch.int8) if kinds is None else kinds
    return token_pgd.TokenAttack(model, precisions or {"a": 1.0}, draws, kinds, types.SimpleNamespace(**args))


def brute_force(target, kinds, number):
    """Highest loss of all texts that differ in at most `number` places, for texts of 3 tokens."""
    best = []
    for row in target.tokens:
        choices = [[v for v in range(len(kinds)) if kinds[v] == kinds[token] and kinds[v]] for token in row.tolist()]
        texts = torch.cartesian_prod(*map(torch.tensor, choices))
        texts = texts[(texts != row).sum(1) <= number]
        best.append(target.losses("a", texts).max())
    return torch.stack(best)


def accept_all(tokens):
    return True


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("method", ["hotflip", "pgd"])
def test_on_a_linear_model_both_attacks_find_the_best_replacements(method, number):
    model, kinds = Linear(), torch.tensor([1, 1, 2, 2, 1, 0, 2, 1, 2], dtype=torch.int8)
    target = LinearTarget(model, torch.tensor([[0, 2, 4], [7, 1, 6]]))
    steps = number if method == "hotflip" else 20
    found = getattr(attack_of(model, kinds=kinds, num_replacements=number, attack_steps=steps), method)(
        target, accept_all)  # fmt: skip
    assert ((found != target.tokens).sum(1) <= number).all() and (kinds[found] == kinds[target.tokens]).all()
    torch.testing.assert_close(target.losses("a", found), brute_force(target, kinds, number))


def test_scores_are_the_explicit_products_and_the_slope_of_the_loss():
    model = Linear()
    target, attack = LinearTarget(model, torch.tensor([[0, 2, 4]])), attack_of(model, {"a": 0.5, "b": 2.0})
    gradient = attack.gradient(target, target.tokens, 0)
    torch.testing.assert_close(gradient[0], 1.25 * model.directions)  # the mean over both precisions
    scores = token_pgd.replacement_scores(gradient[0], attack.embedding, target.tokens[0])
    for slot in range(3):
        for token in range(9):
            tried = target.tokens.clone()
            tried[0, slot] = token
            by_hand = attack.losses(target, tried, 0) - attack.losses(target, target.tokens, 0)
            torch.testing.assert_close(scores[slot, token], by_hand[0], atol=1e-5, rtol=1e-4)


def test_what_is_not_accepted_is_not_taken():
    model = Linear()
    target = LinearTarget(model, torch.tensor([[0, 2, 4], [7, 1, 6]]))
    for method in ("hotflip", "pgd"):
        free = getattr(attack_of(model, attack_steps=8), method)(target, accept_all)
        banned = free[0][free[0] != target.tokens[0]].item()

        def accept(tokens, banned=banned):
            return (tokens != banned).all(1)

        found = getattr(attack_of(model, attack_steps=8, candidates=9), method)(target, accept)
        assert (found != banned).all()
        none = getattr(attack_of(model, attack_steps=2), method)(
            target, lambda tokens: torch.zeros(2, dtype=torch.bool)
        )
        assert torch.equal(none, target.tokens)


def test_a_random_precision_is_drawn_by_seed_and_step():
    attack = attack_of(Linear(), {"a": 1.0, "b": 2.0}, draws=True)
    names = [attack.names(step) for step in range(40)]
    assert names == [attack.names(step) for step in range(40)] and {name for (name,) in names} == {"a", "b"}
    assert attack_of(Linear(), {"a": 1.0, "b": 2.0}).names(7) == ["a", "b"]


# ---- on tiny models


@pytest.fixture(scope="module")
def text_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, count in (("train", 64), ("test", 24)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, make_rows(count, name))))
    return ["--train_file", str(folder / "train.jsonl"), "--validation_file", str(folder / "test.jsonl")]


@pytest.fixture(scope="module")
def classifier(tiny_model, text_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("classifier")
    words = ["--task", "classification", "--model_name_or_path", tiny_model, *text_files, "--output_dir", out]
    words += ["--do_train", "--max_steps", 40, "--learning_rate", "1e-2", "--lr_scheduler_type", "constant"]
    words += ["--per_device_train_batch_size", 16, "--max_seq_length", 24, "--precision_set", 4, 8, "--pgd_steps", 0]
    call(adversarial_training, *words, *SMALL)
    return out


@pytest.fixture(scope="module")
def reader(qa_words, tmp_path_factory):
    """A question answering model that knows something of the tiny questions."""
    out = tmp_path_factory.mktemp("reader")
    more = ["--precision_set", 4, 8, "--pgd_steps", 0, "--max_steps", 40, "--learning_rate", "1e-2", *SMALL]
    call(adversarial_training, "--task", "qa", *qa_words(*more, out=out))
    return out


def words_of(task, model, files, out):
    words = ["--task", task, "--model_name_or_path", model, "--output_dir", out, "--num_replacements", 2]
    words += ["--num_samples", 12, "--batch_size", 5, "--repetitions", 5, "--num_bootstrap", 20]
    return words + (files if task == "classification" else ["--validation_file", files[1]]) + (
        ["--max_seq_length", 24] if task == "classification" else ["--max_seq_length", 96, "--doc_stride", 16]
    )  # fmt: skip


@pytest.fixture
def attack(classifier, reader, text_files, squad_files, tmp_path):
    """attack(task, *flags, out=..., model=...): the record of a small attack."""
    models = {"classification": (classifier, text_files), "qa": (reader, squad_files)}

    def start(task, *flags, out=None, model=None):
        out = out or tmp_path / "out"
        call(token_attack, *words_of(task, model or models[task][0], models[task][1], out), *flags)
        return read(out / "record.json")

    return start


SURFACES = [("classification", "text"), ("qa", "question"), ("qa", "distractor")]


@pytest.mark.parametrize("method", ["hotflip", "pgd"])
@pytest.mark.parametrize(("task", "surface"), SURFACES)
def test_an_attack_raises_the_loss_above_that_of_random_tokens(method, task, surface, attack, tmp_path, monkeypatch):
    seen, original = {}, token_attack.Measurement.batch

    def noted(self, positions):
        items, inputs = [self.items.items[position] for position in positions], self.items.batch(positions)
        target, accept = self.target(items, inputs)
        assert target.tokens.shape == target.free.shape
        before = self.attack.losses(target, target.tokens, 0)
        after = self.attack.losses(target, getattr(self.attack, method)(target, accept), 0)
        assert (after >= before).all()
        own = [item["tokens"][: int(free.sum())] for item, free in zip(items, target.free, strict=True)]
        random = target.tokens.clone()
        if surface != "distractor":  # there the start is random
            for row, pair in enumerate(zip(items, own, strict=True)):
                random[row, : len(pair[1])] = torch.tensor(self.random_tokens(*pair))
        seen.setdefault("losses", []).append((self.attack.losses(target, random, 0).sum(), after.sum()))
        return original(self, positions)

    monkeypatch.setattr(token_attack.Measurement, "batch", noted)
    steps = ["--attack_steps", 8] if method == "pgd" else []
    record = attack(task, "--surface", surface, "--method", method, "--attack_bits", "eot", *steps)
    control, attacked = map(sum, zip(*seen["losses"], strict=True))
    assert attacked > control
    assert list(record["matrix"]) == ["no attack", "random tokens", method] == list(record["random_precision"])
    cells = record["matrix"][method]
    assert list(cells) == ["W32A32KV32", "W4A4KV4", "W8A8KV8"] and cells["W8A8KV8"]["all"]["n"] == 12
    if (task, method) == ("classification", "hotflip"):
        clean, random = (record["matrix"][row]["W8A8KV8"]["all"]["accuracy"] for row in ("no attack", "random tokens"))
        assert cells["W8A8KV8"]["all"]["accuracy"] < min(random, clean - 30)
    assert 0 <= record["replaced"]["least"] <= record["replaced"]["most"] <= 2
    assert record["replaced"]["mean"] > 0 and record["metrics"]["seconds_per_text"] > 0
    compared = record["comparisons"][method]
    assert set(compared) == {*cells, "random precision (RPI)"} and ("f1_interval" in compared["W4A4KV4"]) == (
        task == "qa"
    )
    expected = np.mean([cells[name]["all"]["accuracy"] for name in ("W4A4KV4", "W8A8KV8")])
    assert record["random_precision"][method]["expected"] == pytest.approx(expected)
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"{method} on the {surface}, attacked at eot(W4A4KV4+W8A8KV8), at most 2 tokens" in table
    assert "minus random tokens (p)" in table and "minus W32A32KV32 (p)" in table


def test_of_a_question_and_a_context_only_what_may_change_has_changed(attack, squad_files, tmp_path, monkeypatch):
    seen, score = [], token_attack.Measurement.score
    monkeypatch.setattr(
        token_attack.Measurement, "score", lambda self, items: seen.extend(items) or score(self, items)
    )
    rows = [qa | {"context": paragraph["context"]} for paragraph in read(squad_files[1])["data"][0]["paragraphs"]
            for qa in paragraph["qas"]]  # fmt: skip
    for surface in ("question", "distractor"):
        seen.clear()
        record = attack("qa", "--surface", surface, "--attack_bits", 8, out=(out := tmp_path / surface))
        found = read(out / "adversarial.json")
        assert len(seen) == 3 * 12 and found["items"] == record["settings"]["items"]
        for item in seen:
            source, row = rows[item["index"]], item["row"]
            assert row["answers"]["text"] == [answer["text"] for answer in source["answers"]]
            start, gold = row["answers"]["answer_start"][0], row["answers"]["text"][0]
            assert row["context"][start:].startswith(gold) and row["context"].startswith(source["context"])
            added = row["context"].removeprefix(source["context"])
            if surface == "question":
                assert not added
            else:
                assert row["question"] == source["question"]
                assert not any(token_attack.contains_answer(added, [text]) for text in row["answers"]["text"])
        assert all(len(text.split()) >= 1 for text in found["texts"]["hotflip"])


def test_a_suffix_has_the_losses_of_whole_windows(reader, squad_files, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(reader)
    model = pgd_tasks.QuantGPT2ForQuestionAnswering.from_pretrained(str(reader)).requires_grad_(False).eval()
    examples = [row for article in read(squad_files[1])["data"] for row in article["paragraphs"]][:3]
    rows = [{**qa, "context": paragraph["context"]} for paragraph in examples for qa in paragraph["qas"]]
    for row in rows:
        row["answers"] = {key: [answer[key] for answer in row["answers"]] for key in ("text", "answer_start")}
    rows[0]["context"] = rows[0]["context"].partition(". ")[0] + "."  # of different lengths
    rows[0]["answers"] = {
        "text": [rows[0]["context"].split()[-1]],
        "answer_start": [rows[0]["context"].rindex(" ") + 1],
    }
    items = object.__new__(pgd_tasks.QuestionItems)
    items.tokenizer, items.padding, items.max_answer_length = tokenizer, tokenizer.pad_token_id, 30
    items.settings = {"max_seq_length": 96, "doc_stride": 16, "separator": "\n"}
    measurement = types.SimpleNamespace(model=model, args=types.SimpleNamespace(task="qa", surface="distractor"))
    measurement.random_tokens = lambda item, tokens: tokenizer(" has the boat")["input_ids"]
    measurement.decode = tokenizer.decode
    items.items = items.read(range(len(rows)), rows)
    assert len({len(item["tokens"]) for item in items.items}) > 1
    target, accept = token_attack.Measurement.target(measurement, items.items, items.batch(range(len(rows))))
    longer = items.read(range(len(rows)), [row | {"context": row["context"] + " has the boat"} for row in rows])
    whole = items.replaced(longer)
    measurement.args.surface = "question"
    window, _ = token_attack.Measurement.target(measurement, longer, whole.batch(range(len(rows))))
    for kind in ("fake", "integer"):
        model.set_execution(kind)
        for name in ("4", "8", "32"):
            target.kept.clear()
            with torch.no_grad(), model.at_bits(name):
                torch.testing.assert_close(target.losses(name, target.tokens), window.losses(name, window.tokens),
                                           atol=1e-3, rtol=1e-3)  # fmt: skip
    assert accept(target.tokens).tolist() == ["boat" not in json.dumps(row["answers"]) for row in rows]


def test_what_no_longer_fits_a_window_counts_as_not_attacked(attack, monkeypatch):
    original = token_attack.ITEMS["qa"].read

    def read_once(self, indices, rows, room=None):
        return [None] if room is None else original(self, indices, rows, room)

    monkeypatch.setattr(token_attack.ITEMS["qa"], "read", read_once)
    record = attack("qa", "--attack_bits", 8)
    matrix = record["matrix"]
    assert matrix["hotflip"] == matrix["random tokens"] == matrix["no attack"]
    assert record["replaced"]["mean"] > 0 and record["metrics"]["read_again_the_same"] == 0


def test_tokens_that_may_be_put_in(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    kinds = token_pgd.replaceable_tokens(tokenizer, len(tokenizer) + 5)
    assert len(kinds) == len(tokenizer) + 5 and not kinds[len(tokenizer) :].any()
    for text, kind in (("\u0120kite", 1), ("A", 2), (".", 2), ("\u010a", 0), ("\u0120", 0), ("<|endoftext|>", 0)):
        assert kinds[tokenizer.convert_tokens_to_ids(text)] == kind, text
    for text in ("\u00c3", "\u0100"):  # a byte that is no character, a control character
        assert not kinds[tokenizer.convert_tokens_to_ids(text)]


def test_answers_are_found_as_the_evaluation_compares_them():
    for text, golds, found in (
        (" boat Kite, ring", ["the kite"], True), (" boat kites", ["kite"], False), (" red kite", ["kite red"], False),
        (" in 1948", ["48"], False), (" a the", ["the"], False), (" so the red, kite", ["x", "a red kite"], True),
    ):  # fmt: skip
        assert token_attack.contains_answer(text, golds) is found, (text, golds)


# ---- determinism, resuming


def lasting(record):
    return {key: record[key] for key in ("matrix", "random_precision", "comparisons", "replaced", "data", "settings")}


@pytest.mark.parametrize(("task", "method"), [("classification", "hotflip"), ("qa", "pgd")])
def test_a_killed_attack_resumes_to_the_same_record(task, method, attack, tmp_path, monkeypatch):
    flags = ("--method", method, "--attack_bits", "random", "--attack_steps", 3)
    whole = attack(task, *flags)
    shutil.copytree(tmp_path / "out", tmp_path / "killed")
    (tmp_path / "killed" / "parts" / "00001.json").unlink()
    (tmp_path / "killed" / "parts" / "00002.json").write_text("{")
    (tmp_path / "killed" / "record.json").unlink()
    original, made = token_attack.Measurement.batch, []
    monkeypatch.setattr(token_attack.Measurement, "batch", lambda self, positions: made.append(len(positions)) or
                        original(self, positions))  # fmt: skip
    assert lasting(attack(task, *flags, out=tmp_path / "killed")) == lasting(whole) and made == [5, 2]
    assert read(tmp_path / "killed" / "adversarial.json") == read(tmp_path / "out" / "adversarial.json")
    attack(task, *flags, "--num_bootstrap", 30, out=tmp_path / "killed")
    assert len(made) == 2, "a finished attack is read again"
    other = attack(task, *flags, "--seed", 7, out=tmp_path / "other")
    texts = [read(tmp_path / name / "adversarial.json")["texts"]["random tokens"] for name in ("out", "other")]
    assert texts[0] != texts[1] and other["seed"] == 7
    with pytest.raises(ValueError, match=r"other settings \(num_replacements: 2 then, 1 now"):
        attack(task, *flags, "--num_replacements", 1, out=tmp_path / "killed")


@pytest.mark.parametrize(("method", "steps"), [("pgd", ["--attack_steps", 2]), ("hotflip", [])])
def test_more_replacements_than_a_text_holds(method, steps, attack):
    more = ("--num_samples", 3, "--num_replacements", 500, "--candidates", 2, *steps)
    record = attack("classification", "--method", method, *more)
    assert 0 <= record["replaced"]["least"] <= record["replaced"]["most"] < 24
    assert record["settings"]["num_replacements"] == 500


def test_random_tokens_alone_and_perplexity(attack, tiny_model):
    flags = (
        "--method",
        "random",
        "--num_replacements",
        500,
        "--attack_bits",
        "nothing",
        "--fluency_model",
        tiny_model,
    )
    record = attack("classification", *flags)
    assert list(record["matrix"]) == ["no attack", "random tokens"]
    assert 3 < record["replaced"]["least"] <= record["replaced"]["mean"] < record["replaced"]["most"] < 24
    assert set(record["perplexity"]) == {"no attack", "random tokens"} and record["perplexity"]["random tokens"] > 1


def test_perplexity_by_hand():
    likelihoods = {"no attack": [[np.log(4) * 3, 3], [np.log(4), 1]], "x": [[0.0, 0], [0.0, 0]]}
    rows = {
        row: {"scores": {"a": [[1.0], [0.0]], "b": [[1.0], [1.0]]}, "likelihoods": found}
        for row, found in likelihoods.items()
    }
    args = types.SimpleNamespace(fluency_model="m", repetitions=2, seed=0, num_bootstrap=5, margin=100.0)
    found = pgd_report.token_results(rows, ["a", "b"], "a", "x", args)
    assert found["perplexity"] == {"no attack": pytest.approx(4), "x": None}
    assert found["random_precision"]["x"]["difference"]["verdict"] == "no effect larger than 100 points"
    cell = found["comparisons"]["x"]["b"]
    assert cell["reference"]["points"] == 50 and cell["clean_right"]["n"] == 2 and cell["control"]["mcnemar_p"] == 1
    assert found["comparisons"]["x"]["random precision (RPI)"]["reference"]["points"] == 25
    lines = pgd_report.token_lines(found, "a", "x", "classification", "An attack")
    assert any(line.endswith("| 4          |") for line in lines) and lines[-1].startswith("An attack; accuracy")


# ---- refusals


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("classification", ["--task", "x"], "--task x: allowed are classification, qa"),
        ("classification", ["--method", "x"], "--method x: allowed are hotflip, pgd, random"),
        ("classification", ["--surface", "question"], "--surface question: allowed with --task classification: text"),
        ("qa", ["--surface", "text"], "--surface text: allowed with --task qa: question, distractor"),
        ("qa", ["--precision_set", "8", "--attack_bits", "eot"], "--precision_set 8: needs at least two precisions"),
        ("qa", ["--precision_set", "8", "W8A8KV8"], "--precision_set 8 W8A8KV8: every precision once"),
        ("qa", ["--attack_bits", "9"], "9 is not a bit-width"),
        ("qa", ["--serve_bits", "9"], "9 is not a bit-width"),
        ("qa", ["--num_replacements", "0"], "--num_replacements 0: must be at least 1"),
        ("qa", ["--attack_steps", "0"], "--attack_steps 0: must be at least 1"),
        ("qa", ["--candidates", "0"], "--candidates 0: must be at least 1"),
        ("qa", ["--num_samples", "0"], "--num_samples 0: must be at least 1"),
        ("qa", ["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        ("qa", ["--step_size", "0"], "--step_size 0.0: must be a number above 0"),
        ("qa", ["--repetitions", "1"], "--repetitions 1: at least 2"),
        ("qa", ["--margin", "0"], "--margin 0.0: must be a number above 0"),
        ("qa", ["--version_2_with_negative"], "--version_2_with_negative: attacked are questions that have an answer"),
        ("qa", ["--num_replacements", "90"], "no context fits one window; allowed are more tokens"),
    ],
)
def test_it_refuses(task, flags, message, attack, tmp_path):
    with pytest.raises(ValueError, match=message):
        attack(task, *flags)
    assert not (tmp_path / "out").exists()


def test_models_and_texts_that_cannot_be_attacked(attack, reader, text_files, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "A", "label": 0}\n{"text": "B", "label": 1}\n')
    with pytest.raises(ValueError, match="short.jsonl: every text is one token; allowed is two or more"):
        attack("classification", "--validation_file", tmp_path / "short.jsonl")
    with experiment("switch_precision"):
        import export
    call(export, "--model_name_or_path", reader, "--bit_configs", 4, 8, "--output_dir", tmp_path / "exported")
    with pytest.raises(ValueError, match="exported checkpoint, whose integers have no gradients"):
        attack("qa", model=tmp_path / "exported")
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=1, vocab_size=50)).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="--fluency_model .*small: vocabulary of 50, the attacked model has"):
        attack("qa", "--fluency_model", tmp_path / "small")
    assert not (tmp_path / "out").exists()
