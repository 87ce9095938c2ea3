"""The language-model scripts, end to end on a tiny GPT-2: generate.py, run_clm.py, perplexity."""

import json
import logging
import math
import os
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from conftest import NAMES, THINGS, experiment

with experiment("language_model"):
    import compare
    import generate
    import perplexity
    import run_clm
    from common.script import plain_errors
    from models.modeling_gpt2_quant import QuantGPT2LMHeadModel
    from perplexity import read_tokens

TRAIN = ["--block_size", "32", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--max_steps", "4"]
TRAIN += ["--use_cpu", "True", "--disable_tqdm", "True", "--seed", "3", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def text_files(tmp_path_factory):
    """(train.txt, valid.txt): sentences that a tiny model can learn."""
    folder = tmp_path_factory.mktemp("text")
    sentences = [f"{name} has the {thing}.\n" for thing in THINGS for name in NAMES]
    (folder / "train.txt").write_text("".join(sentences * 3))
    (folder / "valid.txt").write_text("".join(sentences[::5]))
    return str(folder / "train.txt"), str(folder / "valid.txt")


def call(monkeypatch, script, *words):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    script.main()


def error_of(monkeypatch, script, *words):
    """The one line that a run with these words ends with."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    with pytest.raises(SystemExit) as stop, plain_errors():
        script.main()
    return str(stop.value)


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


# ---- perplexity


def test_byte_order_mark_is_no_part_of_a_text(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    found = []
    for name, encoding in (("plain", "utf-8"), ("marked", "utf-8-sig")):
        (tmp_path / name).write_text("Ada has the kite. " * 9, encoding=encoding)
        arguments = generate.GenerationArguments(prompt_file=str(tmp_path / name))
        found.append((read_tokens(tmp_path / name, tokenizer, 2).tolist(), generate.read_prompts(arguments)))
    assert found[0] == found[1]
    (tmp_path / "utf16").write_text("Ada", encoding="utf-16")
    with pytest.raises(ValueError, match="utf16: not UTF-8 text"):
        read_tokens(tmp_path / "utf16", tokenizer, 2)


@pytest.mark.parametrize(
    ("total", "block", "stride"), [(2, 8, 4), (9, 8, 4), (10, 8, 4), (50, 8, 1), (50, 8, 8), (49, 8, 3)]
)
def test_windows_score_every_token_once(total, block, stride):
    scored = []
    for start, first, end in perplexity.windows(total, block, stride):
        assert 0 <= start < first < end <= total
        assert end - 1 - start == min(block, total - 1)  # inputs of one length
        scored += range(first, end)
    assert scored == list(range(1, total))


def test_perplexity_equals_a_loop_over_tokens(tiny_model):
    model = QuantGPT2LMHeadModel.from_pretrained(tiny_model)
    tokens = torch.randint(0, model.config.vocab_size, (41,), generator=torch.Generator().manual_seed(1))
    loss = 0.0
    with torch.no_grad():
        for start, first, end in perplexity.windows(41, 16, 5):
            for target in range(first, end):
                logits = model(tokens[None, start:target]).logits[0, -1]
                loss += F.cross_entropy(logits, tokens[target]).item()
    for batch_size in (1, 3, 8):
        found = perplexity.perplexity(model, tokens, 16, 5, batch_size)
        assert found == pytest.approx(math.exp(loss / 40), rel=1e-5)


# ---- run_clm.py


@pytest.fixture(scope="module")
def trained(tiny_model, text_files, tmp_path_factory):
    """(folder, record) of a run that trains widths 4, 6 and 8 and measures them."""
    folder = tmp_path_factory.mktemp("clm") / "run"
    train, valid = text_files
    with pytest.MonkeyPatch.context() as patch:
        words = ["--model_name_or_path", tiny_model, "--train_file", train, "--validation_file", valid]
        words += ["--do_train", "--do_eval", "--bit_widths", "4", "6", "8", "--output_dir", folder, *TRAIN]
        call(patch, run_clm, *words, "--max_steps", "12", "--save_strategy", "steps", "--save_steps", "6")
    return str(folder), read_json(folder / "record.json")


def test_training_lowers_the_perplexity_of_every_width(trained, tiny_model, text_files):
    folder, record = trained
    tokens = perplexity.read_tokens(text_files[1], AutoTokenizer.from_pretrained(tiny_model), 2)
    before = QuantGPT2LMHeadModel.from_pretrained(tiny_model)
    after = QuantGPT2LMHeadModel.from_pretrained(folder)
    after.set_execution("fake")
    assert after.config.lora_bank == ["4", "6", "8"]
    for bits in (8, 6, 4):
        before.set_bit_config(bits), after.set_bit_config(bits)
        now = perplexity.perplexity(after, tokens, 32, 16)
        assert now < 0.5 * perplexity.perplexity(before, tokens, 32, 16)
        assert record["metrics"][f"eval_perplexity_W{bits}A{bits}KV{bits}"] == pytest.approx(now, rel=1e-4)
    assert [row["config"] for row in record["rows"]] == ["W8A8KV8", "W6A6KV6", "W4A4KV4"]
    assert record["steps"] == 12 and record["data"]["train"]["sha256"]
    assert os.path.getsize(os.path.join(folder, "model.safetensors")) < os.path.getsize(
        f"{tiny_model}/model.safetensors"
    )


def test_base_and_head_stay_as_they_were(trained, tiny_model):
    before = QuantGPT2LMHeadModel.from_pretrained(tiny_model).state_dict()
    after = QuantGPT2LMHeadModel.from_pretrained(trained[0]).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(value.abs().max() > 0 for name, value in after.items() if ".lora_B." in name)


def test_killed_run_resumes_to_the_same_weights(trained, tiny_model, text_files, tmp_path, monkeypatch):
    folder, _ = trained
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoint-12")
    os.remove(again / "model.safetensors")
    words = ["--model_name_or_path", tiny_model, "--train_file", text_files[0], "--do_train", "--output_dir", again]
    words += ["--bit_widths", "4", "6", "8", *TRAIN, "--max_steps", "12"]
    call(monkeypatch, run_clm, *words)
    first = QuantGPT2LMHeadModel.from_pretrained(folder).state_dict()
    second = QuantGPT2LMHeadModel.from_pretrained(str(again)).state_dict()
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert "other settings" in error_of(monkeypatch, run_clm, *words, "--seed", "4")


def test_the_gradient_of_a_step_is_the_mean_over_its_configs(tiny_model, text_files, tmp_path, monkeypatch):
    """One step of plain SGD moves every adapter by -lr times the mean of the gradients of all passes."""
    monkeypatch.setattr(run_clm, "bit_configs_for_step", lambda step, **settings: passes)
    model = QuantGPT2LMHeadModel.from_pretrained(tiny_model)
    passes = [(str(bits), model.set_bit_config(bits)) for bits in (8, 4, 8)]
    words = ["--model_name_or_path", tiny_model, "--train_file", text_files[0], "--do_train", "--max_grad_norm", "0"]
    words += ["--output_dir", tmp_path / "run", *TRAIN, "--max_steps", "1", "--optim", "sgd", "--execution", "fake"]
    words += ["--lr_scheduler_type", "constant", "--learning_rate", "1.0", "--gradient_accumulation_steps", "2"]
    seen = []
    original = run_clm.JointLMTrainer.training_step
    monkeypatch.setattr(
        run_clm.JointLMTrainer,
        "training_step",
        lambda self, net, inputs, *rest: seen.append(inputs["input_ids"]) or original(self, net, inputs, *rest),
    )
    call(monkeypatch, run_clm, *words)
    torch.manual_seed(3)  # the seed of TRAIN: the same adapters
    model.add_lora([4, 8])
    for _, config in passes:
        model.set_bit_config(config)
        for inputs in seen:
            (model(inputs, labels=inputs, use_cache=False).loss / 6).backward()
    after = QuantGPT2LMHeadModel.from_pretrained(str(tmp_path / "run")).state_dict()
    assert len(seen) == 2
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(after[name], parameter.detach() - parameter.grad, rtol=1e-4, atol=1e-6)


def test_evaluation_into_the_folder_of_another_run_is_refused(tiny_model, text_files, hold, tmp_path, monkeypatch):
    hold(tmp_path)
    words = ["--model_name_or_path", tiny_model, "--validation_file", text_files[1], "--do_eval", "--use_cpu", "True"]
    assert "is writing to it" in error_of(monkeypatch, run_clm, *words, "--output_dir", tmp_path)
    assert os.listdir(tmp_path) == [".lock"]


def test_a_bank_is_evaluated_at_the_configs_that_it_was_trained_for(tiny_model, text_files, tmp_path, monkeypatch):
    words = ["--block_size", "32", "--use_cpu", "True", "--do_train", "--max_steps", "1", "--report_to", "none"]
    words += ["--model_name_or_path", tiny_model, "--train_file", text_files[0], "--bit_configs", "W4A8KV4"]
    call(monkeypatch, run_clm, *words, "--output_dir", tmp_path / "bank")
    words = ["--validation_file", text_files[1], "--do_eval", "--block_size", "32", "--use_cpu", "True"]
    call(monkeypatch, run_clm, "--model_name_or_path", tmp_path / "bank", *words, "--output_dir", tmp_path / "out")
    assert [row["config"] for row in read_json(tmp_path / "out" / "record.json")["rows"]] == ["W4A8KV4"]


def test_evaluation_of_stock_weights_and_of_mixed_configs(
    trained, tiny_model, text_files, tmp_path, monkeypatch, capsys
):
    words = ["--validation_file", text_files[1], "--do_eval", "--block_size", "32", "--use_cpu", "True"]
    out = tmp_path / "stock"
    call(monkeypatch, run_clm, "--model_name_or_path", tiny_model, *words, "--output_dir", out)
    stock = read_json(out / "record.json")["metrics"]
    assert list(stock) == ["eval_perplexity_checkpoint"]
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps({"default": 8, "transformer.h.1.*": {"w_bits": 4, "a_bits": 6}}))
    out = tmp_path / "bank"
    configs = ["--eval_bit_configs", "8", mixed, "W4A8KV4", "checkpoint"]
    call(monkeypatch, run_clm, "--model_name_or_path", trained[0], *words, *configs, "--output_dir", out)
    rows = {row["config"]: row for row in read_json(out / "record.json")["rows"]}
    assert list(rows) == ["W8A8KV8", "mixed", "W4A8KV4", "checkpoint"]
    assert rows["checkpoint"]["perplexity"] == rows["W8A8KV8"]["perplexity"]
    assert len({row["perplexity"] for row in rows.values()}) == 3
    assert rows["mixed"]["average_w_bits"] == 6
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n") == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to do"),
        (["--do_train"], "--do_train needs --train_file"),
        (["--do_eval"], "--do_eval needs --validation_file"),
        (["--do_eval", "--do_predict"], "no --do_predict"),
        (["--do_train", "--train_file", "TRAIN", "--bit_widths", "9"], "9 is not a bit-width"),
        (["--do_train", "--train_file", "TRAIN", "--num_mixed_configs", "-1"], "must not be negative"),
        (["--do_train", "--train_file", "TRAIN", "--fsdp", "full_shard"], "--fsdp and --deepspeed"),
        (["--do_eval", "--validation_file", "TRAIN", "--block_size", "1"], "at least 2 tokens"),
        (["--do_eval", "--validation_file", "TRAIN", "--stride", "0"], "--stride 0: 1 to"),
        (["--do_eval", "--validation_file", "TRAIN", "--execution", "int"], "allowed are integer, fake"),
        (["--do_eval", "--validation_file", "missing.txt"], "missing.txt"),
        (["--do_eval", "--validation_file", "BINARY"], "not UTF-8 text"),
        (["--do_eval", "--validation_file", "EMPTY"], "0 tokens, at least 2 are needed"),
        (["--do_train", "--train_file", "SHORT"], "at least 128 are needed"),
        (["--do_eval", "--validation_file", "TRAIN", "--eval_bit_configs", "9"], "9 is not a bit-width"),
        (
            ["--do_eval", "--validation_file", "TRAIN", "--quantizer", "rotated"],
            "no rotation, and it is calibrated on",
        ),
        (
            ["--do_eval", "--validation_file", "TRAIN", "--quantizer", "rotated", "--train_file", "TRAIN"],
            "--calibration_samples 256: allowed are up to 6, the blocks of 128 tokens in",
        ),
    ],
)
def test_run_clm_refuses(words, message, tiny_model, text_files, tmp_path, monkeypatch):
    for name, content in (("BINARY", b"\xff\xfe\x00"), ("EMPTY", b""), ("SHORT", b"Ada has the kite.")):
        (tmp_path / name).write_bytes(content)
    places = {"TRAIN": text_files[0]} | {name: str(tmp_path / name) for name in ("BINARY", "EMPTY", "SHORT")}
    words = [places.get(word, word) for word in words]
    out = tmp_path / "run"
    assert message in error_of(
        monkeypatch, run_clm, "--model_name_or_path", tiny_model, "--output_dir", out, "--use_cpu", "True", *words
    )
    assert not out.exists() or os.listdir(out) == [".lock"]


def test_loss_that_is_not_finite_stops(tiny_model, text_files, tmp_path, monkeypatch):
    monkeypatch.setattr(
        run_clm.StepMeanTrainer, "compute_loss", lambda *args, **kwargs: torch.tensor(torch.nan, requires_grad=True)
    )
    words = ["--model_name_or_path", tiny_model, "--train_file", text_files[0], "--do_train"]
    message = error_of(monkeypatch, run_clm, *words, "--output_dir", tmp_path / "run", *TRAIN)
    assert "loss is nan at step 1 (bit config: W8A8KV8); last checkpoint: none yet" in message


ROTATED = ("--quantizer", "rotated", "--calibration_samples", "12")


@pytest.fixture(scope="module")
def rotated(tiny_model, text_files, tmp_path_factory):
    """(folder, record) of a run that trains width 4 with the rotated quantizer."""
    folder = tmp_path_factory.mktemp("clm") / "rotated"
    words = ["--model_name_or_path", tiny_model, "--train_file", text_files[0], "--validation_file", text_files[1]]
    words += ["--do_train", "--do_eval", "--bit_widths", "4", "--output_dir", folder, *TRAIN, *ROTATED]
    with pytest.MonkeyPatch.context() as patch:
        call(patch, run_clm, *words, "--save_strategy", "steps", "--save_steps", "2")
    return folder, read_json(folder / "record.json")


def test_rotated_training_is_labelled_and_resumes_with_its_rotation(
    rotated, tiny_model, text_files, tmp_path, monkeypatch
):
    folder, record = rotated
    assert (record["bit_config"]["quantizer"], record["bit_config"]["calibration_windows"]) == ("rotated", 12)
    label = "rotated (the checkpoint has minmax)"
    assert [row["quantizer"] for row in record["rows"]] == [label] and label in (folder / "table.md").read_text()
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoint-4")
    (again / "model.safetensors").unlink()
    monkeypatch.setattr(run_clm, "calibration_blocks", pytest.fail)  # the checkpoint has a rotation
    words = ["--model_name_or_path", tiny_model, "--train_file", text_files[0], "--do_train", "--output_dir", again]
    call(monkeypatch, run_clm, *words, "--bit_widths", "4", *TRAIN, *ROTATED)
    first, second = (QuantGPT2LMHeadModel.from_pretrained(str(place)) for place in (folder, again))
    states = first.state_dict(), second.state_dict()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items()) and first.rotations()


def test_perplexity_of_the_other_quantizer(trained, rotated, text_files, tmp_path, monkeypatch):
    words = ["--validation_file", text_files[1], "--do_eval", "--block_size", "32", "--use_cpu", "True"]

    def evaluate(name, model, *flags):
        call(monkeypatch, run_clm, *words, "--model_name_or_path", model, "--output_dir", tmp_path / name, *flags)
        record = read_json(tmp_path / name / "record.json")
        (row,) = record["rows"]
        assert record["bit_config"]["quantizer"] == row["quantizer"].split()[0]
        return row["quantizer"], row["perplexity"]

    own = evaluate("own", rotated[0])
    assert own == ("rotated", pytest.approx(rotated[1]["rows"][0]["perplexity"], rel=1e-4))
    served = evaluate("served", rotated[0], "--quantizer", "minmax")
    assert served[0] == "minmax (the checkpoint has rotated)" and served[1] != own[1]
    calibrated = evaluate("calibrated", trained[0], "--eval_bit_configs", "4", "--train_file", text_files[0], *ROTATED)
    assert calibrated[0] == "rotated (the checkpoint has minmax)"
    assert calibrated[1] != trained[1]["metrics"]["eval_perplexity_W4A4KV4"]


# ---- generate.py


def run_generate(monkeypatch, capsys, tmp_path, *words):
    """(printed text, record)."""
    call(monkeypatch, generate, *words, "--record_file", tmp_path / "record.json")
    return capsys.readouterr().out, read_json(tmp_path / "record.json")


@pytest.mark.parametrize("bits", ["8", "W4A8KV4", "32"])
def test_generate_with_both_caches(bits, trained, tiny_model, tmp_path, monkeypatch, capsys):
    model = tiny_model if bits == "32" else trained[0]
    words = ["--model_name_or_path", model, "--prompt", "Ada has", "What does Ben", "--max_new_tokens", "12"]
    words += ["--bit_config", bits]
    text, quantized = run_generate(monkeypatch, capsys, tmp_path, *words)
    other, plain = run_generate(monkeypatch, capsys, tmp_path, *words, "--kv_cache", "float")
    assert text == other and quantized["texts"] == plain["texts"]
    assert quantized["texts"][0].startswith("Ada has") and quantized["texts"][1].startswith("What does Ben")
    per_token = {"8": 2 * 2 * 68, "W4A8KV4": 2 * 2 * 36, "32": 1024}[bits]
    assert quantized["metrics"]["cache_bytes_per_token"] == per_token
    assert plain["metrics"]["cache_bytes_per_token"] == plain["metrics"]["float32_bytes_per_token"] == 1024
    assert quantized["metrics"]["new_tokens"] <= 24 and quantized["metrics"]["tokens_per_second"] > 0
    assert quantized["generation"]["kv_cache"] == "quantized" and quantized["bit_config"]["layers"]


def test_generate_serves_the_rotation_of_the_checkpoint_or_calibrates(
    rotated, tiny_model, text_files, tmp_path, monkeypatch, capsys
):
    words = ["--prompt", "Ada has", "What does Ben", "--max_new_tokens", "12", "--bit_config", "4"]
    cases = {rotated[0]: (), tiny_model: ("--train_file", text_files[0], *ROTATED[:3], "4")}
    for model, flags in cases.items():
        flags = ["--model_name_or_path", model, *words, *flags]
        text, quantized = run_generate(monkeypatch, capsys, tmp_path, *flags)
        other, plain = run_generate(monkeypatch, capsys, tmp_path, *flags, "--kv_cache", "float")
        assert text == other and quantized["bit_config"]["rotation_sha256"] == plain["bit_config"]["rotation_sha256"]
        # a scale for each of the 4 heads of 16 numbers
        assert quantized["metrics"]["cache_bytes_per_token"] == 2 * 2 * 4 * (16 // 2 + 4)
    assert quantized["bit_config"]["checkpoint_quantizer"] == "minmax"


def test_random_precision_continues_each_prompt_at_the_config_drawn_for_it(trained, tmp_path, monkeypatch, capsys):
    prompts = ["Ada has", "What does Ben", "Cy has", "Dee has", "Eve"]
    words = ["--model_name_or_path", trained[0], "--max_new_tokens", "12", "--prompt"]
    _, record = run_generate(monkeypatch, capsys, tmp_path, *words, *prompts, "--random_precision", "8", "W4A2KV4")
    drawn = record["drawn_configs"]
    assert set(drawn) == {"W8A8KV8", "W4A2KV4"} == set(record["bit_config"]["layers"])
    for config in set(drawn):
        group = [prompt for prompt, other in zip(prompts, drawn, strict=True) if other == config]
        alone = run_generate(monkeypatch, capsys, tmp_path, *words, *group, "--bit_config", config)[1]["texts"]
        assert alone == [text for text, other in zip(record["texts"], drawn, strict=True) if other == config]
    assert 0 < record["metrics"]["new_tokens"] <= 60
    _, again = run_generate(monkeypatch, capsys, tmp_path, *words, *prompts, "--random_precision", "8", "W4A2KV4")
    assert again["texts"] == record["texts"]


def test_sampling_follows_the_seed(trained, tmp_path, monkeypatch, capsys):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("What does")
    words = ["--model_name_or_path", trained[0], "--prompt_file", prompt, "--do_sample", "--max_new_tokens", "24"]
    texts = [run_generate(monkeypatch, capsys, tmp_path, *words, "--seed", seed)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either --prompt or --prompt_file"),
        (["--prompt", "a", "--prompt_file", "b"], "either --prompt or --prompt_file"),
        (["--prompt", ""], "an empty prompt"),
        (["--prompt_file", "missing.txt"], "missing.txt"),
        (["--prompt_file", "BINARY"], "not UTF-8 text"),
        (["--prompt", "a", "--kv_cache", "int8"], "allowed are quantized, float"),
        (["--prompt", "a", "--execution", "int8"], "allowed are integer, fake"),
        (["--prompt", "a", "--max_new_tokens", "0"], "must be at least 1"),
        (["--prompt", "a", "--max_new_tokens", "999"], "do not fit into the model's 128 positions"),
        (["--prompt", "a", "--temperature", "0"], "must be positive"),
        (["--prompt", "a", "--top_p", "0"], "a probability"),
        (["--prompt", "a", "b", "--stream"], "--stream: one prompt"),
        (["--prompt", "a", "--stream", "--num_beams", "2"], "--stream: one prompt"),
        (["--prompt", "a", "--random_precision", "8"], "one precision is no choice"),
        (["--prompt", "a", "--random_precision", "8", "4", "--stream"], "no --bit_config and no --stream"),
        (["--prompt", "a", "--bit_config", "9"], "9 is not a bit-width"),
        (["--prompt", "a", "--bit_config", "5"], "the LoRA bank has only"),
        (["--prompt", "a", "--quantizer", "rotated"], "calibrated on the training text: pass --train_file"),
    ],
)
def test_generate_refuses(words, message, trained, tmp_path, monkeypatch):
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\x00")
    words = [str(tmp_path / "BINARY") if word == "BINARY" else word for word in words]
    record = tmp_path / "record.json"
    found = error_of(monkeypatch, generate, "--model_name_or_path", trained[0], "--record_file", record, *words)
    assert message in found and not record.exists()


def test_checkpoint_of_another_head_is_refused(tiny_model, tmp_path, monkeypatch):
    with experiment("language_model"):
        from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering

        model = QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    logging.disable(logging.WARNING)
    try:
        assert "qa_outputs" in error_of(monkeypatch, generate, "--model_name_or_path", tmp_path, "--prompt", "a")
    finally:
        logging.disable(logging.NOTSET)


def test_tokens_are_counted_up_to_the_end_token_of_each_text():
    tokens = torch.tensor([[5, 6, 0, 0], [0, 0, 0, 0], [5, 6, 7, 8], [5, 9, 0, 7]])
    assert generate.count_tokens(tokens, 0) == 3 + 1 + 4 + 3
    assert generate.count_tokens(tokens, [0, 9]) == 3 + 1 + 4 + 2
    assert generate.count_tokens(tokens, None) == 16


def test_streamed_text_is_the_text(trained, tmp_path, monkeypatch, capsys):
    words = ["--model_name_or_path", trained[0], "--prompt", "Ada has", "--max_new_tokens", "12"]
    text, record = run_generate(monkeypatch, capsys, tmp_path, *words)
    streamed, other = run_generate(monkeypatch, capsys, tmp_path, *words, "--stream")
    assert streamed == text and other["texts"] == record["texts"]


# ---- compare.py


def test_one_table_of_all_precisions(trained, tiny_model, text_files, tmp_path, monkeypatch, capsys):
    words = [
        "--prompt",
        "Ada has",
        "What does Ben",
        "--max_new_tokens",
        "12",
        "--record_file",
        tmp_path / "record.json",
    ]
    valid = ["--validation_file", text_files[1], "--block_size", "32"]
    configs = ["--bit_configs", "8", "W4A8KV4", "4"]
    call(monkeypatch, compare, "--model_name_or_path", trained[0], *words, *valid, *configs)
    printed, record = capsys.readouterr().out, read_json(tmp_path / "record.json")
    assert printed.startswith("| precision ") and printed.count("\n| ") == 4
    tokens = read_tokens(text_files[1], AutoTokenizer.from_pretrained(trained[0]), 2)
    model = QuantGPT2LMHeadModel.from_pretrained(trained[0])
    model.set_execution("integer")
    for row, bits, kept in zip(record["rows"], ("W8A8KV8", "W4A8KV4", "W4A4KV4"), (272, 144, 144), strict=True):
        model.set_bit_config(bits)
        found = perplexity.perplexity(model, tokens, 32, 16)
        assert (row["precision"], row["cache_bytes_per_token"]) == (bits, kept)
        assert row["perplexity"] == record["metrics"][f"perplexity_{bits}"] == pytest.approx(found, rel=1e-6)
        single = run_generate(
            monkeypatch, capsys, tmp_path, "--model_name_or_path", trained[0], *words[:5], "--bit_config", bits
        )
        assert row["texts"] == single[1]["texts"] and all(text in printed for text in row["texts"])
        assert row["ms_per_token"] == pytest.approx(1000 * row["seconds"] / row["new_tokens"])
    assert record["data"]["validation"]["examples"] == len(tokens)


def test_bitsandbytes_stands_beside_them(tiny_model, tmp_path, monkeypatch):
    words = ["--model_name_or_path", tiny_model, "--prompt", "Ada has", "--max_new_tokens", "2", "--bitsandbytes"]
    call(monkeypatch, compare, *words, "--bit_configs", "32", "--record_file", tmp_path / "record.json")
    rows = {row["precision"]: row for row in read_json(tmp_path / "record.json")["rows"]}
    assert list(rows) == ["W32A32KV32", "8bit", "nf4"]
    weights = rows["W32A32KV32"]["weight_bytes"] // 4
    assert weights < rows["8bit"]["weight_bytes"] < 1.2 * weights
    assert 0.5 * weights < rows["nf4"]["weight_bytes"] < 0.7 * weights
    assert rows["W32A32KV32"]["perplexity"] is None and rows["nf4"]["cache_bytes_per_token"] == 1024


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either --prompt or --prompt_file"),
        (["--prompt", "a", "--stream"], "--stream: the texts of several"),
        (["--prompt", "a", "--block_size", "1"], "--block_size 1: at least 2"),
        (["--prompt", "a", "--bit_configs", "8", "9"], "9 is not a bit-width"),
        (["--prompt", "a", "--bit_configs", "5"], "the LoRA bank has only"),
        (["--prompt", "a", "--validation_file", "missing.txt"], "missing.txt"),
    ],
)
def test_compare_refuses(words, message, trained, tmp_path, monkeypatch):
    record = tmp_path / "record.json"
    found = error_of(monkeypatch, compare, "--model_name_or_path", trained[0], "--record_file", record, *words)
    assert message in found and not record.exists()
