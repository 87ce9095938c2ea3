"""base_model's script from end to end on a tiny task: modes, records, resume, refusals, published commands."""

import functools
import importlib
import json
import logging
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer

import run_qa
import run_qa_eval
from common import resuming, squad_data
from common.record import load_state, write_state
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("bits", "kept"), [("8", False), ("W4A8KV8", False), ("16", True), (None, True)])
def test_an_evaluation_at_quantized_bits_keeps_only_codes(bits, kept, run, monkeypatch):
    trainers, trainer_class = [], run_qa.QuestionAnsweringTrainer
    monkeypatch.setattr(
        run_qa, "QuestionAnsweringTrainer", lambda **kwargs: trainers.append(trainer_class(**kwargs)) or trainers[-1]
    )
    flags = ("--bit_widths" if bits.isdigit() else "--bit_config", bits) if bits else ()
    run(*flags, train=False)
    assert {layer.weight is not None for layer in trainers[0].model.quant_layers().values()} == {kept}


@pytest.fixture
def run(monkeypatch, qa_words, tmp_path):
    """run(*flags, **flags) calls main() with the tiny model and data; later flags win; returns the run's record."""

    def call(*flags, out="out", **options):
        monkeypatch.setattr(sys, "argv", ["run_qa.py", *qa_words(*flags, out=tmp_path / out, **options)])
        run_qa.main()
        return json.loads((tmp_path / out / "record.json").read_text())

    return call


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def predictions(folder):
    return json.loads((pathlib.Path(folder) / "eval_predictions.json").read_text())


def test_tensorboard_gets_losses_and_scores(run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("--bit_widths", "4", "--report_to", "tensorboard", "--logging_steps", "1")
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"train/loss", "eval/exact_match", "eval/f1"} <= set(events.Tags()["scalars"])


# ---- modes


@pytest.mark.parametrize(
    ("flags", "name", "bank"),
    [
        ((), "W32A32KV32", None),
        (("--bf16",), "W32A32KV32", None),
        (("--add_lora",), "W32A32KV32", ["shared"]),
        (("--bit_widths", "4"), "W4A4KV4", ["4"]),
        (("--bit_config", "W4A8KV8"), "W4A8KV8", ["4"]),
        (("--bit_config", str(ROOT / "configs" / "attn8_mlp4.json"), "--bf16"), "mixed", ["4", "8"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_training_modes(flags, name, bank, run, tmp_path):
    record = run(*flags)
    assert record["bit_config"]["name"] == name and record["bit_config"]["lora_bank"] == bank
    assert record["steps"] == 2 and record["seed"] == 42
    assert record["dtype"] == ("bf16, evaluated in fp32" if "--bf16" in flags else "fp32")
    assert {"eval_exact_match", "eval_f1", "train_loss"} <= set(record["metrics"])
    assert record["data"]["validation"]["examples"] == 14 and len(record["data"]["train"]["sha256"]) == 64
    assert len(record["bit_config"]["layers"]) == 8 and record["command"].startswith("python ")
    assert len(predictions(tmp_path / "out")) == 14
    saved = weights(tmp_path / "out")
    assert any(".lora_" in key for key in saved) == bool(bank)
    assert ("transformer.wte.weight" in saved) == (not bank), "an adapter checkpoint does not contain the base"
    again = run(out="again", model=tmp_path / "out", train=False)
    assert again["bit_config"]["layers"] == record["bit_config"]["layers"]
    assert predictions(tmp_path / "again") == predictions(tmp_path / "out")
    assert again["metrics"]["eval_loss"] == pytest.approx(record["metrics"]["eval_loss"], rel=1e-6)


def test_frozen_base_and_trained_adapters(run, tmp_path, tiny_model):
    run("--bit_widths", "8")
    model = QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path / "out")
    stock = QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model)
    assert model.base_checksum() == stock.base_checksum()
    assert all(layer.lora_B["8"].weight.abs().sum() > 0 for layer in model.quant_layers().values())


def test_learns_and_low_bits_hurt(run, tmp_path, squad_files):
    """LoRA on a random base memorizes 8 questions; post-training quantization to 2 bits loses them."""
    same = ("--validation_file", squad_files[0], "--max_eval_samples", "8")
    learn = ("--max_train_samples", "8", "--learning_rate", "1e-2", "--lr_scheduler_type", "cosine")
    full = run("--add_lora", *learn, "--max_steps", "80", *same)["metrics"]
    low = run("--bit_config", "W2A2KV2", *same, out="low", model=tmp_path / "out", train=False)["metrics"]
    assert full["eval_exact_match"] >= 87.5 and low["eval_exact_match"] <= 50, (full, low)


@pytest.mark.parametrize("method", ["8bit", "nf4"])
def test_bitsandbytes_is_a_labelled_baseline(method, run, tmp_path):
    run("--add_lora")
    record = run("--bitsandbytes", method, out="bnb", model=tmp_path / "out", train=False)
    assert record["bit_config"]["name"].startswith("bitsandbytes") and "eval_f1" in record["metrics"]


def test_predictions_do_not_depend_on_batches_or_padding(run, tmp_path):
    run("--add_lora", "--max_steps", "20", "--learning_rate", "1e-2")
    outputs = []
    for out, flags in {
        "a": ("--per_device_eval_batch_size", "1"),
        "b": ("--per_device_eval_batch_size", "14"),
        "c": ("--pad_to_max_length",),
    }.items():
        metrics = run("--bit_config", "W4A8KV8", *flags, out=out, model=tmp_path / "out", train=False)["metrics"]
        outputs.append((predictions(tmp_path / out), metrics["eval_exact_match"], metrics["eval_f1"]))
    assert outputs[0] == outputs[1] == outputs[2]


def test_gradient_accumulation_equals_one_large_batch(run, tmp_path):
    first = ("--add_lora", "--max_steps", "1", "--max_grad_norm", "0", "--train_sampling_strategy", "sequential")
    run(*first)
    accumulate = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2")
    run(*first, *accumulate, out="ga")
    for folder in ("out", "ga"):  # Adam's first moment after one step is 0.1 x the gradient
        state = torch.load(tmp_path / folder / "checkpoint-1" / "optimizer.pt", weights_only=True)["state"]
        moments = torch.cat([state[key]["exp_avg"].flatten() for key in sorted(state)])
        if folder == "out":
            reference = moments
    torch.testing.assert_close(moments, reference, rtol=1e-3, atol=1e-6)


def test_predict_writes_answers_of_a_test_file(run, tmp_path, squad_files):
    run("--do_predict", "--test_file", squad_files[1], "--max_predict_samples", "3")
    assert len(json.loads((tmp_path / "out" / "predict_predictions.json").read_text())) == 3


def test_flags_from_one_json_file(run, tmp_path, tiny_model, squad_files, monkeypatch):
    flags = {
        "model_name_or_path": tiny_model, "validation_file": squad_files[1], "do_eval": True, "use_cpu": True,
        "output_dir": str(tmp_path / "out"), "bit_config": "W8A8KV8", "doc_stride": 16,
    }  # fmt: skip
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    monkeypatch.setattr(sys, "argv", ["run_qa.py", str(tmp_path / "flags.json")])
    run_qa.main()
    assert json.loads((tmp_path / "out" / "record.json").read_text())["bit_config"]["name"] == "W8A8KV8"


def test_evaluation_of_a_stock_model_quantizes_its_weights_once(tiny_model):
    model_args = run_qa.ModelArguments(tiny_model, bit_config="W4A8KV8")
    model = run_qa.build_model(model_args, False, run_qa.load_tokenizer(model_args))
    with torch.no_grad():
        model(torch.arange(8)[None])
    assert all(list(layer.stored_codes()) == [4] for layer in model.quant_layers().values())


# ---- resume and output folders

STEPS = ("--bit_widths", "4", "--max_steps", "4", "--save_steps", "2", "--save_strategy", "steps")


def test_resumed_run_equals_the_uninterrupted_one(run, tmp_path):
    run(*STEPS)
    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copytree(tmp_path / "out" / "checkpoint-2", killed / "checkpoint-2")
    shutil.copy(tmp_path / "out" / resuming.SETTINGS_FILE, killed)
    shutil.copytree(tmp_path / "out" / "checkpoint-4", killed / "checkpoint-4")
    (killed / "checkpoint-4" / "trainer_state.json").unlink()  # killed while writing
    (killed / "checkpoint-4" / resuming.MANIFEST_FILE).unlink()
    record = run(*STEPS, out="killed")
    assert record["steps"] == 4 and record["continues"].endswith("killed/checkpoint-2")
    expected, found = weights(tmp_path / "out"), weights(killed)
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_killed_before_the_first_checkpoint_starts_again(run, tmp_path):
    run(*STEPS)
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.rmtree(tmp_path / "out" / name)
    before = weights(tmp_path / "out")
    settings = load_state(tmp_path / "out" / resuming.SETTINGS_FILE)
    del settings["finished"]
    write_state(tmp_path / "out" / resuming.SETTINGS_FILE, settings)
    assert run(*STEPS)["continues"] is None
    assert all(torch.equal(value, before[key]) for key, value in weights(tmp_path / "out").items())


def test_output_folder_of_something_else_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not empty.*--overwrite_output_dir"):
        run()
    run("--overwrite_output_dir")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "x"


def test_other_settings_do_not_continue_a_run(run, tmp_path):
    run(*STEPS)
    with pytest.raises(ValueError, match=r"other settings \(bit_widths: \[4\] then, \[8\] now\)"):
        run(*STEPS, "--bit_widths", "8")
    assert len(weights(tmp_path / "out")) == 8 * 2 + 2
    run(*STEPS, "--bit_widths", "8", "--overwrite_output_dir", "--max_steps", "1")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]


def test_incomplete_checkpoint_is_not_resumed_when_asked_for(run, tmp_path):
    (tmp_path / "checkpoint-7").mkdir(parents=True)
    with pytest.raises(ValueError, match="checkpoint-7: not written to its end"):
        run("--resume_from_checkpoint", str(tmp_path / "checkpoint-7"))


def test_a_checkpoint_of_other_settings_or_data_is_no_start_in_another_folder(run, tmp_path, squad_files):
    run(*STEPS, out="first")
    start = ("--resume_from_checkpoint", str(tmp_path / "first" / "checkpoint-2"))
    for flags, told in {
        ("--bit_widths", "8"): r"checkpoint-2 is of other settings \(bit_widths: \[4\] then, \[8\] now\)",
        ("--seed", "7"): "seed: 42 then, 7 now",
        ("--train_file", squad_files[1]): "is of other settings .train: ",
    }.items():
        with pytest.raises(ValueError, match=told):
            run(*STEPS, *start, *flags, out="other")
    record = run(*STEPS, *start, "--max_steps", "5", out="longer")
    assert record["steps"] == 5 and [part["from"] for part in record["trained_on"]["parts"]] == [record["continues"]]


def test_a_training_that_was_ended_early_is_not_finished(run, tmp_path, monkeypatch):
    original = run_qa.QuestionAnsweringTrainer.training_step

    def stop(self, *args, **kwargs):
        self.control.should_training_stop = True  # as upstream does at SIGTERM with --enable_jit_checkpoint
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_qa.QuestionAnsweringTrainer, "training_step", stop)
        with pytest.raises(ValueError, match="stopped at step 1 of 4: the same command goes on"):
            run(*STEPS, "--save_steps", "1")
    assert not (tmp_path / "out" / "record.json").exists()
    record = run(*STEPS, "--save_steps", "1")
    assert record["steps"] == 4 and record["continues"].endswith("checkpoint-1")


def test_the_record_of_a_finished_training_keeps_what_it_ran_on(run, monkeypatch):
    first = run(*STEPS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU that this run does not use
    monkeypatch.setattr("common.record.GIT", {"commit": "another", "dirty": False})
    again = run(*STEPS)
    (part,) = first["trained_on"]["parts"]
    assert part == {"from": None} | {name: first[name] for name in part if name != "from"} and "git" in part
    assert again["trained_on"] == first["trained_on"] and again["git"]["commit"] == "another"
    assert first["trained_on"]["metrics"]["train_loss"] == first["metrics"]["train_loss"]
    assert again["device"] == first["device"] and again["device"].startswith("CPU")
    assert again["peak_memory_bytes"]["cuda"] is None


def test_best_model_by_f1_is_kept(run, tmp_path):
    flags = ("--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--save_total_limit", "1")
    run("--add_lora", *flags, "--max_steps", "3", "--load_best_model_at_end", "--metric_for_best_model", "f1")
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    scores = [entry["eval_f1"] for entry in state["log_history"] if "eval_f1" in entry]
    assert state["best_metric"] == max(scores[:3]) and state["best_model_checkpoint"]


def test_nan_stops_the_run_and_names_step_config_and_checkpoint(run, tmp_path, monkeypatch):
    from trainer_qa import QuestionAnsweringTrainer

    original = QuestionAnsweringTrainer.compute_loss

    def diverge(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss

    monkeypatch.setattr(QuestionAnsweringTrainer, "compute_loss", diverge)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 4 \(bit config: W4A4KV4\).*checkpoint-2"):
        run(*STEPS)
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "out" / "checkpoint-2").values())


# ---- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--bit_widths", "4", "8"), "switch_precision"),
        (("--bit_widths", "4", "--bit_config", "W4A4KV4"), "pass one of them"),
        (("--bit_widths", "9"), "9 is not a bit-width"),
        (("--bit_config", "nowhere.json"), "nowhere.json: no such bit-width config"),
        (("--add_lora", "--lora_r", "0"), "--lora_r 0: must be a number above 0"),
        (("--bitsandbytes", "nf4"), "no --do_train"),
        (("--bitsandbytes", "5bit"), "allowed are 8bit, nf4"),
        (("--train_file", "nowhere.json"), "nowhere.json"),
        (("--max_seq_length", "20"), "Raise --max_seq_length"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refused_before_any_compute(flags, message, run, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(*flags)
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == [resuming.LOCK_FILE]


def test_training_on_integers_learns_the_same_and_says_so(run, tmp_path):
    fake = run("--bit_widths", "8", out="fake")["metrics"]
    integer = run("--bit_widths", "8", "--execution", "integer", "--backward_dtype", "bf16", out="integer")["metrics"]
    assert integer["train_loss"] == pytest.approx(fake["train_loss"], rel=1e-2) and integer["train_loss"] > 0
    settings = json.loads((tmp_path / "integer" / "run_settings.json").read_text())
    assert settings["execution"] == "integer" and settings["backward_dtype"] == "bf16"


def test_a_width_as_text_is_a_config_in_training_and_evaluation(run, tiny_model):
    record = run("--bit_config", "8")
    assert record["bit_config"]["name"] == "W8A8KV8" and record["bit_config"]["lora_bank"] == ["8"]
    ptq = run("--bit_config", "4", out="ptq", train=False, model=tiny_model)
    assert ptq["bit_config"]["name"] == "W4A4KV4"


def test_an_empty_config_is_not_full_precision(run):
    with pytest.raises(FileNotFoundError, match='"": no such bit-width config'):
        run("--bit_config", "", train=False)


@pytest.mark.parametrize(
    "flags", [("--bit_config", str(ROOT / "configs" / "attn8_mlp4.json")), ("--bit_widths", "4"), ()]
)
def test_published_evaluation_command_from_base_model(flags, run, squad_files, tmp_path, monkeypatch):
    """It evaluates what was trained, and the scores are those of run_qa.py."""
    trained = run(*flags)["metrics"]
    folder = tmp_path / "squad"  # stands for the hub's data set
    folder.mkdir()
    rows = squad_data.load_squad_json(squad_files[1])
    (folder / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    published = (
        f"--model_name_or_path {tmp_path / 'out'} --dataset_name {folder} --do_eval --per_device_eval_batch_size 32 "
        f"--seed 42 --max_seq_length 786 --output_dir {tmp_path / 'eval'} --overwrite_output_dir"
    )
    words = [*published.split(), "--doc_stride", "16", "--use_cpu", "--disable_tqdm", "True"]
    monkeypatch.setattr(sys, "argv", ["run_qa_eval.py", *words])
    run_qa_eval.main()
    (row,) = json.loads((tmp_path / "eval" / "record.json").read_text())["rows"]
    assert (
        row["config"] == {"--bit_config": "checkpoint", "--bit_widths": "W4A4KV4", "": "checkpoint"}[(*flags, "")[0]]
    )
    assert (row["exact_match"], row["f1"]) == (trained["eval_exact_match"], trained["eval_f1"])


def test_nothing_to_do(run, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["run_qa.py", "--output_dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="nothing to do"):
        run_qa.main()


def test_bits_that_the_checkpoint_has_no_adapter_for(run, tmp_path):
    run("--bit_widths", "4")
    with pytest.raises(ValueError, match=r"w_bits = 8, but the LoRA bank has only \['4'\]"):
        run("--bit_config", "W8A8KV8", out="eval", model=tmp_path / "out", train=False)


def test_tokenizer_larger_than_the_embedding(run, tmp_path, tiny_model):
    from conftest import save_tiny_tokenizer

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = save_tiny_tokenizer(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="the tokenizer has .* tokens, the embedding"):
        run(model=folder)


def test_evaluation_keeps_its_order_where_training_groups_by_length(run):
    flags = ("--per_device_eval_batch_size", 2)
    plain = run(*flags, train=False, out="plain")
    grouped = run(*flags, "--train_sampling_strategy", "group_by_length", train=False, out="grouped")
    for key in ("eval_exact_match", "eval_f1", "eval_loss"):
        assert grouped["metrics"][key] == plain["metrics"][key]


def test_padding_is_on_the_right_and_evaluation_has_no_mask(run, tmp_path, tiny_model, monkeypatch):
    folder, masks = tmp_path / "left", []
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "left"}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.padding_side == "left"
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps(config))
    forward = QuantGPT2ForQuestionAnswering.forward

    @functools.wraps(forward)  # the trainer reads its signature
    def spy(self, *args, attention_mask=None, **kwargs):
        masks.append(attention_mask)
        return forward(self, *args, attention_mask=attention_mask, **kwargs)

    run(train=False, out="right")
    monkeypatch.setattr(QuantGPT2ForQuestionAnswering, "forward", spy)
    logger, warned = logging.getLogger("transformers.modeling_utils"), []
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, handler := logging.Handler()])
    handler.emit = lambda record: warned.append(record.getMessage())
    transformers.utils.logging.warning_once.cache_clear()
    run("--pad_to_max_length", train=False, out="out", model=folder)
    assert masks and not any(mask is not None for mask in masks)
    assert not any("mask" in text for text in warned), "there is no mistake"
    assert predictions(tmp_path / "out") == predictions(tmp_path / "right")


def test_a_mistake_ends_with_one_message_and_no_traceback(tmp_path):
    command = [sys.executable, ROOT / "base_model" / "run_qa.py", "--do_eval", "--output_dir", tmp_path / "out"]
    command += ["--model_name_or_path", tmp_path / "nothing-here"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "error: " in done.stderr
    assert "nothing-here" in done.stderr.strip().splitlines()[-1]


# ---- published commands and shell scripts

PUBLISHED = """--model_name_or_path /path/to/model --dataset_name squad --do_train --do_eval
    --per_device_train_batch_size 16 --per_device_eval_batch_size 16 --seed 42 --learning_rate 3e-03
    --logging_strategy steps --logging_steps 10 --lr_scheduler_type cosine --max_seq_length 786 --bf16 False
    --fp16 False --max_steps 1000 --output_dir ./results/your-output-directory --overwrite_output_dir
    --eval_strategy steps --eval_steps 250 --save_strategy steps --save_steps 250
    --lora_r 8 --lora_alpha 16 --bit_widths 4"""


def parse(argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_qa.py", *argv])
    return run_qa.parse_args(run_qa.ModelArguments, run_qa.DataTrainingArguments, run_qa.TrainingArguments)


def test_published_command_is_understood(monkeypatch):
    model_args, data_args, training_args = parse(shlex.split(PUBLISHED) + ["--use_cpu"], monkeypatch)
    assert model_args.bit_widths == [4] and (model_args.lora_r, model_args.lora_alpha) == (8, 16)
    assert data_args.max_seq_length == 786 and data_args.overwrite_output_dir and data_args.dataset_name == "squad"
    assert training_args.max_steps == 1000 and not training_args.bf16 and training_args.learning_rate == 3e-3
    run_qa.check_args(model_args, data_args, training_args)


@pytest.mark.parametrize("script", ["train.sh", "eval.sh"])
def test_shell_scripts_run_from_anywhere_and_pass_flags_on(script, python_stub, tmp_path, monkeypatch):
    environment, calls = python_stub
    (tmp_path / "a folder").mkdir()
    environment |= {
        "TRAIN_FILE": "my train.json",
        "VALIDATION_FILE": "dev.json",
        "BIT_CONFIG": "W4A8KV8",
        "NPROC_PER_NODE": "3",
        "MODEL": "my model",
        "OUTPUT_DIR": "my results",
    }
    command = ["bash", ROOT / "base_model" / script, "--seed", "7", "--use_cpu"]
    subprocess.run(command, check=True, cwd=tmp_path / "a folder", env=environment)
    (argv,) = calls()
    assert argv[:3] == ["--standalone", "--nproc_per_node=3", str(ROOT / "base_model" / "run_qa.py")]
    model_args, data_args, training_args = parse(argv[3:], monkeypatch)
    assert (model_args.model_name_or_path, model_args.bit_config) == ("my model", "W4A8KV8")
    assert (training_args.output_dir, training_args.seed, data_args.validation_file) == ("my results", 7, "dev.json")
    assert training_args.do_train == (script == "train.sh")
    if script == "train.sh":
        assert data_args.train_file == "my train.json"
        published = (training_args.max_steps, training_args.learning_rate, training_args.per_device_train_batch_size)
        assert published == (1000, 3e-3, 16) and training_args.lr_scheduler_type == "cosine"


# ---- several processes


@pytest.mark.slow
def test_two_processes_score_like_one(run, tmp_path, tiny_model, squad_files):
    """14 questions on 2 ranks (a ragged last batch): same EM/F1, and rank 1 has them for --metric_for_best_model."""
    flags = ["--model_name_or_path", tiny_model, "--train_file", squad_files[0], "--validation_file", squad_files[1]]
    flags += ["--do_train", "--do_eval", "--max_steps", "2", "--add_lora", "--doc_stride", "16", "--use_cpu", "True"]
    flags += ["--per_device_eval_batch_size", "4", "--eval_strategy", "steps", "--eval_steps", "1"]
    flags += ["--save_steps", "1"]
    flags += ["--metric_for_best_model", "f1", "--load_best_model_at_end", "--learning_rate", "1e-2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "base_model" / "run_qa.py"), *flags, "--per_device_train_batch_size", "4"]
    subprocess.run([*command, "--output_dir", str(tmp_path / "two")], check=True)
    two = json.loads((tmp_path / "two" / "record.json").read_text())
    assert two["world_size"] == 2
    one = run(out="one", model=tmp_path / "two", train=False)
    for key in ("eval_exact_match", "eval_f1"):
        assert one["metrics"][key] == two["metrics"][key]


def test_modules_are_the_originals():
    assert importlib.import_module("utils_qa").__file__ == str(ROOT / "base_model" / "utils_qa.py")
