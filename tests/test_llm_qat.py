"""LLM-QAT in language_model: distillation, training of all weights, text from the model itself."""

import collections
import json
import math
import os
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from conftest import NAMES, THINGS, experiment

with experiment("language_model"):
    import generate_data
    import losses
    import run_clm
    from common.script import plain_errors
    from models.modeling_gpt2_quant import QuantGPT2LMHeadModel
    from perplexity import perplexity, read_tokens

TRAIN = ["--do_train", "--block_size", "32", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2"]
TRAIN += ["--max_steps", "4", "--use_cpu", "True", "--disable_tqdm", "True", "--seed", "3", "--save_strategy", "no"]
KD = ["--objective", "kd"]
QAT = ["--train_all_weights", "--learning_rate", "2e-3"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{"train", "valid"}: sentences that a tiny model can learn."""
    folder = tmp_path_factory.mktemp("text")
    sentences = [f"{name} has the {thing}.\n" for thing in THINGS for name in NAMES]
    (folder / "train.txt").write_text("".join(sentences * 3))
    (folder / "valid.txt").write_text("".join(sentences[::5]))
    return {name: str(folder / f"{name}.txt") for name in ("train", "valid")}


def call(monkeypatch, script, *words):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    script.main()


def error_of(monkeypatch, script, *words):
    """The one line that a run with these words ends with."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    with pytest.raises(SystemExit) as stop, plain_errors():
        script.main()
    return str(stop.value)


def state(folder):
    return QuantGPT2LMHeadModel.from_pretrained(str(folder)).state_dict()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], value) for name, value in second.items())


# ---- the loss


def written_loss(hidden, weight, teacher_hidden, teacher_weight):
    """The formula, token by token."""
    p = (teacher_hidden @ teacher_weight.t()).softmax(-1)
    return -(p * (hidden @ weight.t()).log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize("trains", ["all", "hidden"])
@pytest.mark.parametrize("chunk", [512, 4, 3])
def test_distillation_is_the_written_formula_with_its_gradient(trains, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    monkeypatch.setattr(losses, "PIECE", 2)
    torch.manual_seed(0)
    shapes = (7, 5), (11, 5), (7, 6), (11, 6)
    hidden, weight, *teacher = (2 * torch.randn(shape, dtype=torch.float64) for shape in shapes)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()][: 2 if trains == "all" else 1]
    found = losses.soft_cross_entropy(hidden, weight if trains == "all" else weight.detach(), *teacher)
    wanted = written_loss(hidden, weight, *teacher)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(3 * loss, leaves) for loss in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_distillation_of_two_tokens_by_hand():
    """Teacher 1/2, 1/4, 1/4 and the student uniform: ln 3; a student like the teacher: its entropy, 1.5 ln 2."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).double().log()
    one, student = torch.ones(1, 1).double(), torch.zeros(3, 1).double()
    assert losses.soft_cross_entropy(one, student, one, logits.t()).item() == pytest.approx(math.log(3))
    assert losses.soft_cross_entropy(one, logits.t(), one, logits.t()).item() == pytest.approx(1.5 * math.log(2))
    weight = student.requires_grad_()
    losses.soft_cross_entropy(one, weight, one, logits.t()).backward()
    torch.testing.assert_close(weight.grad[:, 0], torch.tensor([1 / 3 - 1 / 2, 1 / 12, 1 / 12]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_logits_of_a_whole_batch(dtype, monkeypatch):
    """Nothing of distillation has more rows than the chunks of student and teacher."""
    monkeypatch.setattr(losses, "CHUNK", 8)
    largest = []
    hidden, weight = torch.randn(1, 64, 4).to(dtype).requires_grad_(), torch.randn(999, 4).to(dtype)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            tensors = found if isinstance(found, tuple | list) else [found]
            largest.extend(t.numel() for t in tensors if isinstance(t, torch.Tensor) and t.shape[-1:] == (999,))
            return found

    with Watch():
        losses.soft_cross_entropy(hidden[0], weight, hidden[0].detach(), weight).backward()
    assert largest and max(largest) <= 2 * 8 * 999


# ---- the teacher


def test_teacher_is_the_base_without_adapters_or_dropout(tiny_model):
    ids = torch.arange(48).view(2, 24)
    stock = QuantGPT2LMHeadModel.from_pretrained(tiny_model)
    with torch.no_grad():
        wanted = stock.transformer(ids, use_cache=False).last_hidden_state
    model = QuantGPT2LMHeadModel.from_pretrained(tiny_model, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model.add_lora([4, 8])
    for layer in model.quant_layers().values():
        for adapter in layer.lora_B.values():
            torch.nn.init.normal_(adapter.weight)
    before = model.set_bit_config(4)
    model.train()
    found = losses.teacher_states(model, ids, torch.float32)
    assert torch.equal(found, wanted) and not found.requires_grad
    assert model.training and model.transformer.drop.training and model.config.bit_config == before
    assert model.execution.kind == "fake" and all(layer.scaling == 2 for layer in model.quant_layers().values())


@pytest.mark.parametrize("flags", [QAT, []], ids=["all weights", "adapters"])
def test_teacher_stays_what_it_was_before_training(flags, tiny_model, files, tmp_path, monkeypatch):
    seen, original = [], run_clm.teacher_states

    def watched(teacher, *args):
        seen.append((teacher, original(teacher, torch.arange(24)[None], torch.float32)))
        return original(teacher, *args)

    monkeypatch.setattr(run_clm, "teacher_states", watched)
    words = ["--model_name_or_path", tiny_model, "--train_file", files["train"], "--output_dir", tmp_path / "run"]
    call(monkeypatch, run_clm, *words, *TRAIN, *KD, *flags)
    assert len(seen) == 4 and all(torch.equal(states, seen[0][1]) for _, states in seen)
    assert (
        seen[0][0].transformer.wte.weight.requires_grad,
        any(p.requires_grad for p in seen[0][0].parameters()),
    ) == (
        False,
        not flags,  # the model itself, whose adapters train
    )


# ---- training


@pytest.mark.parametrize("flags", [[*QAT, "--learning_rate", "1e-3"], []], ids=["all weights", "adapters"])
def test_distillation_brings_the_student_to_the_teacher(flags, learnt, files, tmp_path, monkeypatch):
    """A model that has learnt the sentences loses them at 3 bits and gets them back from itself."""
    words = ["--model_name_or_path", learnt, "--train_file", files["train"], "--validation_file", files["train"]]
    words += ["--do_eval", *TRAIN, *KD, "--bit_configs", "W3A8KV8", "--output_dir", tmp_path, "--max_steps", "16"]
    call(monkeypatch, run_clm, *words, *flags)
    (row,) = json.loads((tmp_path / "record.json").read_text())["rows"]
    model, tokenizer = QuantGPT2LMHeadModel.from_pretrained(learnt), AutoTokenizer.from_pretrained(learnt)
    tokens, found = read_tokens(files["train"], tokenizer, 2), {}
    for bits in ("W3A8KV8", 32):
        model.set_bit_config(bits)
        found[bits] = math.log(perplexity(model, tokens, 32, 16))
    before, after = found["W3A8KV8"] - found[32], math.log(row["perplexity"]) - found[32]
    assert before > 0.05 and after < 0.5 * before, (before, after)  # nats


@pytest.fixture(scope="module")
def learnt(tiny_model, files, tmp_path_factory):
    """Folder of a tiny model, all of whose weights were trained in float on the sentences."""
    folder = tmp_path_factory.mktemp("learnt")
    words = ["--model_name_or_path", tiny_model, "--train_file", files["train"], "--output_dir", folder, *TRAIN]
    with pytest.MonkeyPatch.context() as patch:
        call(patch, run_clm, *words, *QAT, "--bit_configs", "32", "--max_steps", "40", "--learning_rate", "5e-3")
    return str(folder)


@pytest.fixture(scope="module", params=["minmax", "rotated"])
def trained(request, tiny_model, files, tmp_path_factory):
    """(folder, record, words) of a training of all weights at two widths by distillation."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    words = ["--model_name_or_path", tiny_model, "--train_file", files["train"], "--validation_file", files["valid"]]
    words += [
        "--do_eval",
        "--bit_widths",
        "4",
        "8",
        *TRAIN,
        *QAT,
        *KD,
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
    ]
    words += ["--quantizer", request.param, "--calibration_samples", "12"]
    with pytest.MonkeyPatch.context() as patch:
        call(patch, run_clm, *words, "--output_dir", folder)
    return folder, json.loads((folder / "record.json").read_text()), words


def test_all_weights_train_and_the_checkpoint_serves_the_same_perplexity(trained, tiny_model, files, tmp_path):
    folder, record, _ = trained
    before, after = state(tiny_model), state(folder)
    assert not any(torch.equal(after[name], value) for name, value in before.items() if value.dim() == 2)
    assert not any(".lora_" in name for name in after)
    assert record["training"] == {"trains": "all weights", "objective": "kd"}
    assert [row["config"] for row in record["rows"]] == ["W8A8KV8", "W4A4KV4"]
    with pytest.MonkeyPatch.context() as patch:
        words = [
            "--model_name_or_path",
            folder,
            "--validation_file",
            files["valid"],
            "--do_eval",
            "--block_size",
            "32",
        ]
        call(patch, run_clm, *words, "--use_cpu", "True", "--execution", "fake", "--output_dir", tmp_path)
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert [row["config"] for row in rows] == ["W8A8KV8", "W4A4KV4"]
    for found, wanted in zip(rows, record["rows"], strict=True):
        assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-6)


def test_killed_training_of_all_weights_resumes_to_the_same_weights(trained, tmp_path, monkeypatch):
    folder, _, words = trained
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoint-4")
    os.remove(again / "model.safetensors")
    call(monkeypatch, run_clm, *words, "--output_dir", again)
    assert json.loads((again / "record.json").read_text())["continues"].endswith("checkpoint-2")
    assert same(state(folder), state(again))
    assert "objective: 'kd' then, 'ce' now" in error_of(
        monkeypatch, run_clm, *words, "--output_dir", again, "--objective", "ce"
    )


def save_stock(folder, tokenizer_of, vocabulary, positions=128):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=4, vocab_size=vocabulary, n_positions=positions))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective", "mse"], "--objective mse: allowed are ce, kd"),
        (["--teacher_name_or_path", "LARGER"], "--teacher_name_or_path needs --objective kd"),
        ([*KD, "--teacher_name_or_path", "LARGER"], "larger: a vocabulary of 500, but that of the student is"),
        ([*KD, "--teacher_name_or_path", "SHORTER"], "shorter: 16 positions, fewer than a block of 32"),
        ([*KD, "--teacher_name_or_path", "nowhere/at/all"], "nowhere/at/all"),
        ([*KD, "--teacher_name_or_path", "NF4"], "nf4: a base in 4 bits is no full-precision teacher"),
        ([*KD, "--teacher_name_or_path", "FOREIGN"], "foreign: its tokenizer has other tokens than"),
        ([*KD, "--model_name_or_path", "NF4", "--bit_widths", "32"], "--objective kd: a base in 4 bits is no full-p"),
        (["--train_all_weights", "--model_name_or_path", "BANK"], "bank has adapters on a frozen base"),
        (["--train_file", "EMPTY"], "empty.jsonl, line 1: not valid JSON"),
        (["--train_file", "TORN"], "torn.jsonl, line 2: not valid JSON"),
        (["--train_file", "OTHER"], 'other.jsonl, line 2: {"texts": "a"}: allowed is an object with a string "text"'),
        (["--train_file", "NUMBER"], 'number.jsonl, line 1: {"text": 3}: allowed is'),
        (["--train_file", "HALF"], "half.jsonl, line 1: "),
        (["--train_file", "SHORT"], "short.jsonl: 6 tokens, at least 32 are needed"),
    ],
)
def test_run_clm_refuses(words, message, tiny_model, files, tmp_path, monkeypatch):
    size = QuantGPT2LMHeadModel.from_pretrained(tiny_model).config.vocab_size
    save_stock(tmp_path / "larger", tiny_model, 500)
    save_stock(tmp_path / "shorter", tiny_model, size, positions=16)
    bank = QuantGPT2LMHeadModel.from_pretrained(tiny_model)
    bank.add_lora([8])
    bank.save_pretrained(tmp_path / "bank")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "bank")
    shutil.copytree(tiny_model, tmp_path / "foreign")
    tokens = json.loads((tmp_path / "foreign" / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["!"], vocabulary["#"] = vocabulary["#"], vocabulary["!"]
    (tmp_path / "foreign" / "tokenizer.json").write_text(json.dumps(tokens))
    nf4 = QuantGPT2LMHeadModel.from_pretrained(tiny_model)
    nf4.add_lora([32])
    nf4.set_base(str(tiny_model))
    nf4.quantize_base("nf4")
    nf4.save_pretrained(tmp_path / "nf4")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "nf4")
    good = json.dumps({"first_token": 5, "greedy_length": 3, "text": "Ada has the kite."})
    texts = {"empty": "", "torn": good + '\n{"first', "other": good + '\n{"texts": "a"}\n', "short": good + "\n"}
    texts |= {"number": '{"text": 3}', "half": '{"text": "\\ud800"}'}
    for name, text in texts.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    places = {name.upper(): tmp_path / f"{name}.jsonl" for name in texts}
    places |= {name.upper(): tmp_path / name for name in ("larger", "shorter", "bank", "foreign", "nf4")}
    base = [
        "--model_name_or_path",
        tiny_model,
        "--train_file",
        files["train"],
        *TRAIN,
        "--output_dir",
        tmp_path / "run",
    ]
    found = error_of(monkeypatch, run_clm, *base, *(places.get(word, word) for word in words))
    assert message in found
    assert not (tmp_path / "run").exists() or os.listdir(tmp_path / "run") == [".lock"]


def test_texts_are_joined_by_the_end_token(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [{"text": "Ada has\u2028 the kite."}, {"text": "<|endoftext|>Ben"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    end, texts = tokenizer.eos_token_id, [tokenizer(row["text"])["input_ids"] for row in rows]
    assert read_tokens(tmp_path / "a.jsonl", tokenizer, 2).tolist() == [*texts[0], end, *texts[1], end]
    assert texts[1][0] == end


# ---- generate_data.py

GENERATE = ["--first_tokens", "5", "--greedy_lengths", "3", "5", "--max_length", "12", "--batch_size", "4"]


@pytest.fixture
def generate(learnt, monkeypatch):
    """generate(folder, *words): the rows of its texts.jsonl."""

    def run(folder, *words):
        call(monkeypatch, generate_data, "--model_name_or_path", learnt, "--output_dir", folder, *GENERATE, *words)
        return [json.loads(line) for line in (folder / "texts.jsonl").read_text().split("\n")[:-1]]

    return run


def test_first_tokens_are_the_likeliest_and_the_others_are_drawn(generate, learnt, tmp_path):
    rows = generate(tmp_path)
    model, tokenizer = QuantGPT2LMHeadModel.from_pretrained(learnt), AutoTokenizer.from_pretrained(learnt)
    size, end = len(tokenizer), tokenizer.eos_token_id
    ids = [row["first_token"] for row in rows]
    pairs = [(row["first_token"], row["greedy_length"]) for row in rows]
    assert sorted(pairs) == [(first, length) for first in sorted(set(ids)) for length in (3, 5)] and len(set(ids)) == 5
    assert max(ids) < size
    args, items = generate_data.DataArguments(output_dir="", seed=42), [(first, 4) for first in range(40)]
    texts = generate_data.make_texts(model, items, 12, end, args)
    likeliest = []
    for (first, _), text in zip(items, texts, strict=True):
        assert text[0] == first and (len(text) == 12 or text[-1] == end) and end not in text[1:-1]
        with torch.no_grad():
            best = model(torch.tensor([text])).logits[0].argmax(-1).tolist()[:-1]
        assert text[1:4] == best[:3][: len(text) - 1]
        likeliest += [token == wanted for token, wanted in zip(text[4:], best[3:], strict=True)]
    assert 0 < sum(likeliest) < len(likeliest)
    dynamic = model.generate(torch.tensor([[items[0][0]]]), max_length=5, do_sample=False)[0].tolist()
    assert dynamic[:4] == texts[0][:4]
    greedy = generate_data.make_texts(model, [(first, 12) for first in range(40)], 12, end, args)
    assert greedy != texts and [text[:4] for text in greedy] == [text[:4] for text in texts]
    every = generate_data.texts_to_make(args, size, 12)
    assert sorted(every) == [(first, length) for first in range(size) for length in (3, 4, 5)]
    part = every[: len(every) // 2]
    assert {length for _, length in part} == {3, 4, 5} and max(first for first, _ in part) > 0.9 * size
    assert generate_data.texts_to_make(args, size, 12) == every
    assert generate_data.texts_to_make(generate_data.DataArguments(output_dir="", seed=43), size, 12) != every


def test_killed_run_writes_the_same_bytes(generate, tmp_path, monkeypatch):
    assert len(generate(tmp_path / "whole")) == 10
    whole = (tmp_path / "whole" / "texts.jsonl").read_bytes()
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    path, made, original = tmp_path / "again" / "texts.jsonl", [], generate_data.make_texts

    def watched(model, items, *rest):
        made.append(len(items))
        return original(model, items, *rest)

    monkeypatch.setattr(generate_data, "make_texts", watched)
    lines = whole.split(b"\n")
    for length, batches in (
        (0, [4, 4, 2]),
        (len(lines[0]) // 2, [4, 4, 2]),
        (len(b"\n".join(lines[:6])) + 3, [4, 2]),
        (len(b"\n".join(lines[:8])), [4, 2]),  # its newline is missing
        (len(b"\n".join(lines[:9])) + 1, [2]),
        (len(whole), []),
    ):
        path.write_bytes(whole[:length])
        made.clear()
        generate(tmp_path / "again")
        assert path.read_bytes() == whole and made == batches
    assert json.loads((tmp_path / "again" / "record.json").read_text())["metrics"]["new_tokens"] == 0


def test_texts_follow_the_seed_and_not_the_batch(generate, tmp_path):
    first = generate(tmp_path / "a", "--batch_size", "10")
    assert first == generate(tmp_path / "b", "--batch_size", "10")
    other = generate(tmp_path / "c", "--seed", "1")
    assert {row["first_token"] for row in first} != {row["first_token"] for row in other}
    assert first == generate(tmp_path / "d", "--batch_size", "3")  # in this float32 no draw falls on an edge


def test_number_of_tokens_to_stop_at(generate, tmp_path):
    rows = generate(tmp_path / "all", "--decoding", "sampled")
    assert len(rows) == 5 and {row["greedy_length"] for row in rows} == {1}
    few = generate(tmp_path / "few", "--decoding", "sampled", "--max_tokens", "10")
    assert few == rows[:4]  # one batch
    assert generate(tmp_path / "few", "--decoding", "sampled", "--max_tokens", "10") == few
    assert {row["greedy_length"] for row in generate(tmp_path / "greedy", "--decoding", "greedy")} == {12}


@pytest.mark.parametrize("bits", ["W8A8KV4", "32"])
def test_generated_text_is_a_training_file(bits, generate, tiny_model, learnt, tmp_path, monkeypatch):
    caches, original = [], generate_data.QuantizedKVCache
    monkeypatch.setattr(
        generate_data, "QuantizedKVCache", lambda config: caches.append(original(config)) or caches[-1]
    )
    generate(tmp_path / "data", "--bit_config", bits, "--first_tokens", "24", "--batch_size", "64")
    kinds = collections.Counter(type(layer).__name__ for layer in caches[0].layers)
    assert kinds == {"RoomyLayer" if bits == "32" else "QuantizedKVLayer": 2}
    words = ["--model_name_or_path", tiny_model, "--train_file", tmp_path / "data" / "texts.jsonl", *TRAIN, *KD]
    call(monkeypatch, run_clm, *words, "--max_steps", "1", "--output_dir", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["training"] == {"trains": "adapters", "objective": "kd"}
    assert record["data"]["train"]["source"].endswith("texts.jsonl")


@pytest.mark.parametrize("k", [1, 2, 50])
def test_largest_logits_are_those_of_topk(k):
    logits = torch.randn(7, 5000, generator=torch.Generator().manual_seed(k))
    for ours, theirs in zip(generate_data.largest_logits(logits, k), logits.topk(k), strict=True):
        assert torch.equal(ours, theirs)
    few = logits[:, :100]  # fewer groups than k
    assert torch.equal(generate_data.largest_logits(few, k)[0], few.topk(k)[0])


@pytest.mark.parametrize("top_k", [0, 3])
def test_draws_follow_the_distribution(top_k):
    logits, draws = torch.tensor([0.1, 0.4, 0.3, 0.2]).log().expand(1000, 4), (torch.arange(1000) + 0.5) / 1000
    args = generate_data.DataArguments(output_dir="", top_k=top_k)
    found = generate_data.next_tokens(logits, draws, torch.zeros(1000, dtype=torch.bool), args).bincount(minlength=4)
    wanted = [100, 400, 300, 200] if top_k == 0 else [0, 444, 333, 222]
    assert all(abs(a - b) <= 1 for a, b in zip(found.tolist(), wanted, strict=True))
    assert F.one_hot(generate_data.next_tokens(logits, draws, draws > 0, args), 4).sum(0).tolist() == [0, 1000, 0, 0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--decoding", "beam"], "allowed are hybrid, greedy, sampled"),
        (["--first_tokens", "0"], "--first_tokens 0: must be 1 or more"),
        (["--first_tokens", "9999"], "--first_tokens 9999: must be at most"),
        (["--greedy_lengths", "0"], "--greedy_lengths 0: different numbers, 1 or more each"),
        (["--greedy_lengths", "3", "3"], "different numbers"),
        (["--greedy_lengths", "13"], "--greedy_lengths 13: must be at most 12"),
        (["--max_length", "999"], "--max_length 999: must be at most 128, the model's positions"),
        (["--max_length", "1"], "--max_length 1: must be 2 or more"),
        (["--temperature", "0"], "--temperature 0.0: must be a number above 0"),
        (["--top_k", "-1"], "--top_k -1: must be 0 or more"),
        (["--batch_size", "0"], "--batch_size 0: must be 1 or more"),
        (["--max_tokens", "0"], "--max_tokens 0: must be 1 or more"),
        (["--bit_config", "9"], "9 is not a bit-width"),
        (["--quantizer", "rotated"], "pass --train_file"),
    ],
)
def test_generate_data_refuses(words, message, tiny_model, tmp_path, monkeypatch):
    base = ["--model_name_or_path", tiny_model, "--output_dir", tmp_path, *GENERATE]
    assert message in error_of(monkeypatch, generate_data, *base, *words)
    assert not (tmp_path / "texts.jsonl").exists()


def test_folder_with_other_texts_is_refused(generate, learnt, tmp_path, monkeypatch):
    rows = generate(tmp_path)
    base = ["--model_name_or_path", learnt, "--output_dir", tmp_path, *GENERATE]
    assert "top_k: 50 then, 3 now" in error_of(monkeypatch, generate_data, *base, "--top_k", "3")
    path = tmp_path / "texts.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], "{", *lines[2:]]))
    assert "texts.jsonl, line 2: not valid JSON" in error_of(monkeypatch, generate_data, *base)
    path.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]))
    assert "texts.jsonl, line 2: no text of this run" in error_of(monkeypatch, generate_data, *base)
    assert generate(tmp_path, "--top_k", "3", "--overwrite_output_dir") != rows
