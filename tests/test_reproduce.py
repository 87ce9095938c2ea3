"""reproduce/make_small_gpt2.py and split_squad.py: what they write, resuming, refusals."""

import json
import random
import shutil
import sys

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from common.squad_data import load_squad_json
from conftest import NAMES, THINGS, load_script, save_tiny_tokenizer, tiny_squad


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Folder with a.txt, b.txt and valid.txt (documents ended by a line) and a tokenizer."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    save_tiny_tokenizer(folder / "tokenizer")
    for name in ("a", "b", "valid"):
        lines = [f"{rng.choice(NAMES)} has the {rng.choice(THINGS)}." for _ in range(60)]
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(lines))
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """run(script, *words): its last line of output, or the message it ends with."""

    def call(script, *words):
        loaded = load_script(f"reproduce/{script}.py")
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop, loaded.plain_errors():
            loaded.main()
            raise SystemExit(capsys.readouterr().out.splitlines()[-1])
        return str(stop.value)

    return call


@pytest.fixture
def pretrain(run, texts):
    """pretrain(*words, output_dir=...): a run on both texts, of 1 block of 64; later words win."""

    def call(*words, output_dir, shape=("--n_layer", 1, "--n_embd", 64, "--n_positions", 16)):
        files = ("--text_files", texts / "a.txt", texts / "b.txt", "--validation_file", texts / "valid.txt")
        more = ("--tokenizer", texts / "tokenizer", "--max_steps", 6, "--batch_size", 4, "--save_steps", 2)
        return run("make_small_gpt2", *files, *more, *shape, *words, "--output_dir", output_dir)

    return call


@pytest.fixture(scope="module")
def weights(texts):
    return lambda folder: (folder / "model.safetensors").read_bytes()


def test_pretraining_makes_a_stock_model_with_a_record(pretrain, texts, tmp_path):
    out, record_file = tmp_path / "model", tmp_path / "records" / "pretrain.json"
    assert "median input channel" in pretrain("--record_file", record_file, "--bf16", output_dir=out)
    model, tokenizer = GPT2LMHeadModel.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    config, record = model.config, json.loads(record_file.read_text())
    assert type(config) is GPT2Config and config.architectures == ["GPT2LMHeadModel"]
    assert (config.n_layer, config.n_embd, config.n_head, config.n_positions) == (1, 64, 1, 16)
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0 and model.dtype == torch.float32
    ids = tokenizer("Ada has")["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(texts / "tokenizer")("Ada has")["input_ids"]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert not list(out.rglob("*.bin")), "no pickle"
    assert record["steps"] == 6 and record["dtype"] == "bf16" and record["seed"] == 42
    assert record["data"]["train"]["source"].endswith("b.txt") and set(record["data"]) == {"train", "validation"}
    assert 1 < record["metrics"]["eval_perplexity"] < len(tokenizer) * 2
    assert len(record["bit_config"]["outliers"]) == 4 and min(record["bit_config"]["outliers"].values()) >= 1


@pytest.mark.parametrize("bf16", [False, True])
def test_the_loss_and_its_gradients_are_those_of_the_full_logits(bf16, pretrain, monkeypatch, tmp_path):
    script, found, dtypes = load_script("reproduce/make_small_gpt2.py"), [], set()

    def compute_loss(trainer, model, inputs, *args, **kwargs):
        ids = inputs["input_ids"]
        linear = model.transformer.h[0].mlp.c_fc
        linear.register_forward_hook(lambda *call: dtypes.add(call[-1].dtype))
        loss = original(trainer, model, inputs, *args, **kwargs)
        ours = torch.autograd.grad(loss, list(model.parameters()))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(ids).logits[:, :-1].float()
        full = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        found.append((loss, full, *zip(ours, torch.autograd.grad(full, list(model.parameters())), strict=True)))
        return original(trainer, model, inputs, *args, **kwargs)

    original = script.PretrainingTrainer.compute_loss
    monkeypatch.setattr(script.PretrainingTrainer, "compute_loss", compute_loss)
    pretrain("--max_steps", 1, *(["--bf16"] if bf16 else []), output_dir=tmp_path)
    loss, full, *pairs = found[0]
    assert dtypes == {torch.bfloat16 if bf16 else torch.float32}
    tolerance = 0.02 if bf16 else 1e-5
    torch.testing.assert_close(loss, full, rtol=tolerance, atol=0)
    for ours, reference in pairs:
        assert (ours - reference).norm() <= tolerance * reference.norm()


def test_a_killed_run_goes_on_to_the_same_weights(pretrain, weights, monkeypatch, tmp_path):
    script, steps = load_script("reproduce/make_small_gpt2.py"), []
    pretrain(output_dir=tmp_path / "whole")
    original = script.PretrainingTrainer.compute_loss

    def killed(*args, **kwargs):
        steps.append(1)
        if len(steps) == 4:
            raise SystemExit("killed")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(script.PretrainingTrainer, "compute_loss", killed)
        assert pretrain(output_dir=tmp_path / "cut") == "killed"
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-2"]
    pretrain(output_dir=tmp_path / "cut")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    records = [json.loads((tmp_path / name / "record.json").read_text()) for name in ("cut", "whole")]
    assert records[0]["metrics"]["eval_perplexity"] == records[1]["metrics"]["eval_perplexity"]
    assert records[0]["continues"].endswith("checkpoint-2") and records[1]["continues"] is None
    before = weights(tmp_path / "cut")
    pretrain(output_dir=tmp_path / "cut")
    assert weights(tmp_path / "cut") == before, "a finished run is only measured"


def test_going_on_from_a_model_and_outliers_that_do_not_change_it(pretrain, weights, texts, tmp_path):
    script, (first, more) = load_script("reproduce/make_small_gpt2.py"), (tmp_path / "first", tmp_path / "more")
    pretrain(output_dir=first)
    assert "median" in pretrain("--init_from", first, "--learning_rate", 1e-30, output_dir=more, shape=())
    torch.testing.assert_close(GPT2LMHeadModel.from_pretrained(more).state_dict(), state(first))

    args = script.PretrainingArguments(
        text_files=[], validation_file="", tokenizer="", output_dir="", init_from=str(first), outlier_factor=30.0
    )
    tokenizer = AutoTokenizer.from_pretrained(first)
    ids, model = (
        torch.tensor([tokenizer("Ada has the kite.")["input_ids"]]),
        script.build_model(args, tokenizer).eval(),
    )
    for norm in (model.transformer.h[0].ln_1, model.transformer.h[0].ln_2):
        gains = norm.weight.abs().sort(descending=True).values[:3]
        torch.testing.assert_close(gains, torch.tensor([30.0, 15.0, 10.0]), rtol=0.1, atol=0)
    torch.testing.assert_close(model(ids).logits, GPT2LMHeadModel.from_pretrained(first)(ids).logits)


def state(folder):
    return GPT2LMHeadModel.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text_files", "no.txt"], "no.txt: no such file"),
        (["--text_files", "a.txt", "empty.txt"], "empty.txt: no text in it"),
        (["--text_files", "only_ends.txt"], "only_ends.txt: no text in it"),
        (["--validation_file", "latin.txt"], "latin.txt: not UTF-8 text"),
        (["--text_files", "short.txt"], "short.txt: 3 tokens; at least 16, one window, are needed"),
        (["--validation_file", "short.txt"], "short.txt: 3 tokens"),
        (["--tokenizer", "no_folder"], "--tokenizer no_folder: no such folder"),
        (["--tokenizer", "."], ".: its tokenizer does not open"),
        (["--init_from", "no_folder"], "--init_from no_folder: no such folder"),
        (["--init_from", "tokenizer"], "--n_layer, --n_embd, --n_positions: with --init_from the model's own"),
        (["--n_embd", "100"], "--n_embd 100: must be a multiple of 64"),
        (["--n_layer", "0"], "--n_layer 0: must be 1 or more"),
        (["--n_positions", "1"], "--n_positions 1: must be 2 or more"),
        (["--max_steps", "0"], "--max_steps 0: must be 1 or more"),
        (["--batch_size", "-1"], "--batch_size -1: must be 1 or more"),
        (["--save_steps", "0"], "--save_steps 0: must be 1 or more"),
        (["--learning_rate", "0"], "--learning_rate 0.0: must be a number above 0"),
        (["--learning_rate", "nan"], "--learning_rate nan: must be a number that is finite"),
        (["--outlier_factor", "0.5"], "--outlier_factor 0.5: must be 1 (none) to 1000"),
        (["--outlier_factor", "inf"], "--outlier_factor inf: must be a number that is finite"),
        (["--seed", "-1"], "--seed -1: must be 0 to 2**32 - 1"),
        (["--steps", "3"], "--steps"),
    ],
)
def test_pretraining_refuses(words, message, pretrain, texts, monkeypatch, tmp_path):
    shutil.copytree(texts, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for name, content in (("empty", b"\n"), ("only_ends", b"<|endoftext|>\n<|endoftext|>\n"), ("short", b"Ada has")):
        (tmp_path / "here" / f"{name}.txt").write_bytes(content)
    (tmp_path / "here" / "latin.txt").write_bytes("sch\u00f6n".encode("latin-1"))
    found = pretrain(*words, output_dir=tmp_path / "out")
    assert found.startswith("error: ") and message in found and "\n" not in found
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_other_settings_and_models_are_refused(pretrain, run, texts, tmp_path):
    out = tmp_path / "model"
    pretrain("--max_steps", 2, output_dir=out)
    assert "holds a run with other settings (max_steps: 2 then, 6 now)" in pretrain(output_dir=out)
    found = pretrain("--max_steps", 2, "--text_files", texts / "a.txt", output_dir=out)
    assert "holds a run with other settings (train: " in found
    shutil.move(texts / "b.txt", texts / "moved.txt")
    try:
        files = ("--text_files", texts / "a.txt", texts / "moved.txt")
        assert "median" in pretrain("--max_steps", 2, *files, output_dir=out)
    finally:
        shutil.move(texts / "moved.txt", texts / "b.txt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    assert "is not empty and holds no training of this script" in pretrain(output_dir=tmp_path / "full")
    (out / "model.safetensors").write_bytes(b"broken")
    assert "damaged or truncated" in pretrain("--init_from", out, output_dir=tmp_path / "new", shape=())


def articles(sizes):
    """SQuAD JSON with an article of so many questions each (two a paragraph)."""
    data = [tiny_squad(size, seed)["data"][0] | {"title": f"T{seed}"} for seed, size in enumerate(sizes)]
    return {"version": "1.1", "data": data}


def test_the_halves_of_squad(run, tmp_path):
    (tmp_path / "squad.json").write_text(json.dumps(whole := articles((20, 2, 8, 6, 4, 10, 2))))
    words = ("--train_file", tmp_path / "squad.json")
    line = run("split_squad", *words, "--output_dir", tmp_path / "one", "--record_file", tmp_path / "r.json")
    halves = [json.loads((tmp_path / "one" / f"{name}.json").read_text()) for name in ("base", "train")]
    numbers = [len(load_squad_json(tmp_path / "one" / f"{name}.json")) for name in ("base", "train")]
    assert numbers == [26, 26] and sum(len(half["data"]) for half in halves) == 7
    assert f"base.json: {len(halves[0]['data'])} articles, 26 questions; train.json: " in line
    found = {article["title"]: article for half in halves for article in half["data"]}
    assert found == {article["title"]: article for article in whole["data"]}, "all articles, as they were"
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["metrics"]["base_questions"] == 26 and record["data"]["train"]["examples"] == 52

    assert run("split_squad", *words, "--output_dir", tmp_path / "two") == line.replace("/one:", "/two:")
    files = [[(tmp_path / d / f"{name}.json").read_bytes() for name in ("base", "train")] for d in ("one", "two")]
    assert files[0] == files[1]
    found = run("split_squad", *words, "--output_dir", tmp_path / "one", "--seed", 1)
    assert found.startswith("error: ") and "is there, with other content" in found
    assert (tmp_path / "one" / "base.json").read_bytes() == files[0][0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "none.json: no such data file"),
        ("empty.json", b"", "empty.json: is empty"),
        ("latin.json", "\u00e9".encode("latin-1"), "latin.json: is not UTF-8 text"),
        ("broken.json", b"{", "broken.json: is not JSON"),
        ("one.json", json.dumps(articles((4,))).encode(), "one.json: 1 title; at least two articles"),
    ],
)
def test_what_cannot_be_halved(name, content, message, run, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    found = run("split_squad", "--train_file", tmp_path / name, "--output_dir", tmp_path / "out")
    assert found.startswith("error: ") and message in found and "\n" not in found
    assert not (tmp_path / "out").exists()
