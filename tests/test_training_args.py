"""What training arguments mean and refuse: device, number format, processes, the best checkpoint, metrics."""

import functools
import json
import pathlib
import sys

import pytest
import torch
import transformers

import run_qa
from common.arguments import ModelArguments
from common.squad_data import load_qa_datasets
from common.training_args import TrainingArguments
from conftest import experiment
from models.errors import UserError
from utils_qa import prepare_train_features

with experiment("adv_attack"):
    import text_classification
with experiment("switch_precision"):
    import run_qa as switch_run_qa

EVALUATES = ("--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1")


@pytest.fixture
def run(monkeypatch, tiny_model, squad_files, tmp_path):
    """run(*flags) trains and evaluates base_model's (or another) script for 3 steps; returns the record."""

    def call(*flags, script=run_qa, out="out"):
        argv = ["x.py", "--model_name_or_path", tiny_model, "--output_dir", str(tmp_path / out), "--do_eval"]
        if script is text_classification:
            rows = [
                {"text": f"Ada has the {thing}.", "label": number} for number, thing in enumerate(("kite", "drum"))
            ]
            file = tmp_path / "texts.jsonl"
            file.write_text("\n".join(map(json.dumps, rows * 5 + rows[:1])))
            argv += ["--train_file", str(file), "--validation_file", str(file)]
        else:
            argv += ["--train_file", squad_files[0], "--validation_file", squad_files[1], "--doc_stride", "16"]
            argv += ["--max_seq_length", "96"]
        argv += ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4", "--save_strategy", "no"]
        argv += ["--do_train", "--max_steps", "3", "--learning_rate", "3e-3", "--disable_tqdm", "True"]
        monkeypatch.setattr(sys, "argv", argv + list(flags))
        script.main()
        return json.loads((tmp_path / out / "record.json").read_text())

    return call


def history(folder):
    return json.loads((pathlib.Path(folder) / "trainer_state.json").read_text())["log_history"]


def test_one_process_computes_on_one_gpu(monkeypatch, tmp_path, caplog):
    upstream = transformers.TrainingArguments
    original = upstream.__post_init__

    def two_gpus(self):
        original(self)
        self._n_gpu = 2

    monkeypatch.setattr(upstream, "__post_init__", two_gpus)
    args = TrainingArguments(output_dir=tmp_path)
    assert args.n_gpu == 1 and args.train_batch_size == args.per_device_train_batch_size
    assert "2 GPUs, one process" in caplog.text


# ---- number format


@pytest.mark.skipif(torch.accelerator.is_available(), reason="what a CPU computes in")
@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        (("--bf16",), "bf16, evaluated in fp32"),
        (("--bf16_full_eval",), "fp32, after training bf16_full_eval"),
        (("--bf16", "--bf16_full_eval"), "bf16, after training bf16_full_eval"),
        (("--bf16_full_eval", "--do_train", "False"), "bf16_full_eval"),
        (("--bf16_full_eval", "--do_train", "False", "--bit_config", "W4A8KV8"), "bf16_full_eval"),
        (("--bf16", "--do_train", "False", "--use_cpu", "False"), "bf16"),
        ((), "fp32"),
    ],
    ids=" ".join,
)
def test_the_record_says_what_a_cpu_computed_in(flags, dtype, run, monkeypatch):
    seen, forward = set(), run_qa.QuantGPT2ForQuestionAnswering.forward

    @functools.wraps(forward)  # the trainer reads its signature
    def spy(self, *args, **kwargs):
        autocast = torch.is_autocast_enabled("cpu")
        seen.add((self.training, torch.get_autocast_dtype("cpu") if autocast else self.qa_outputs.weight.dtype))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(run_qa.QuantGPT2ForQuestionAnswering, "forward", spy)
    assert run(*flags)["dtype"] == dtype
    half = torch.bfloat16 if "--bf16" in flags else torch.float32
    float32 = "--bf16_full_eval" not in flags and "False" not in flags
    evaluated = torch.float32 if float32 else torch.bfloat16 if "--bf16_full_eval" in flags else half
    assert seen == {(False, evaluated)} | ({(True, half)} if "False" not in flags else set())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a CPU has no fp16")
@pytest.mark.parametrize("flag", ["fp16", "fp16_full_eval"])
@pytest.mark.parametrize("script", [run_qa, switch_run_qa, text_classification])
def test_fp16_on_a_cpu_is_refused(flag, script, run, tmp_path):
    with pytest.raises(ValueError, match=f"--{flag}: a CPU does not compute in fp16; pass --bf16"):
        run(f"--{flag}", script=script)
    assert not (tmp_path / "out").exists()


# ---- processes


def test_processes_that_would_not_be_one_run_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(TrainingArguments, "world_size", 3)
    with pytest.raises(UserError, match=r"1 process\(es\) were started"):
        TrainingArguments(str(tmp_path))


def test_scripts_of_one_process_refuse_more(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    for script in (run_qa, switch_run_qa, text_classification):
        with pytest.raises(ValueError, match="one process, not 2"):
            script.parse_args(ModelArguments)


def test_no_pickle_of_the_arguments_is_saved(run, tmp_path):
    """Upstream's training_args.bin would hold the hub token."""
    run("--hub_token", "secret-of-mine", "--save_strategy", "steps", "--save_steps", "1")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    names = {path.name for path in files if path.parent.name == "checkpoint-1"}
    assert {"model.safetensors", "tokenizer.json"} <= names
    assert not [path for path in files if path.suffix == ".bin"]
    assert not [path for path in files if b"secret-of-mine" in path.read_bytes()]


# ---- the best checkpoint


@pytest.mark.parametrize(
    ("script", "metric"), [(run_qa, "f1"), (switch_run_qa, "f1"), (text_classification, "accuracy")]
)
def test_best_model_by_the_default_metric(script, metric, run, tmp_path):
    metrics = run(*EVALUATES, "--load_best_model_at_end", script=script)["metrics"]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    scores = [entry[f"eval_{metric}"] for entry in state["log_history"] if f"eval_{metric}" in entry]
    assert state["best_metric"] == max(scores) and state["best_model_checkpoint"]
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    assert metrics[f"eval_{metric}"] == max(scores), "it was loaded"


def test_best_model_by_loss(run, tmp_path):
    flags = (*EVALUATES, "--load_best_model_at_end", "--metric_for_best_model", "eval_loss", "--add_lora")
    metrics = run(*flags)["metrics"]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert state["best_metric"] == min(losses)
    assert metrics["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_best_model_of_one_config(run, tmp_path):
    run(*EVALUATES, "--load_best_model_at_end", "--metric_for_best_model", "loss_W4A4KV4", script=switch_run_qa)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    losses = [entry["eval_loss_W4A4KV4"] for entry in state["log_history"] if "eval_loss" in entry]
    assert state["best_metric"] == min(losses)
    with pytest.raises(ValueError, match="loss_W5: allowed are .*loss_W8A8KV8"):
        run(*EVALUATES, "--metric_for_best_model", "loss_W5", script=switch_run_qa, out="other")


@pytest.mark.parametrize("extra", [(), ("--metric_for_best_model", "loss")])
def test_the_learning_rate_follows_the_metric(extra, run, tmp_path):
    kwargs = json.dumps({"patience": 0, "factor": 0.5, "threshold": 1e9, "threshold_mode": "abs"})  # never better
    plateau = ("--lr_scheduler_type", "reduce_lr_on_plateau", "--lr_scheduler_kwargs", kwargs, "--logging_steps", "1")
    run(*plateau, *EVALUATES, *extra)
    rates = [entry["learning_rate"] for entry in history(tmp_path / "out") if "learning_rate" in entry]
    assert rates[0] == 3e-3 and rates[2] < 3e-3
    named = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": extra[1] if extra else None}
    arguments = TrainingArguments(str(tmp_path), eval_strategy="steps", **named)
    assert arguments.lr_scheduler_kwargs == {"mode": "min" if extra else "max"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--load_best_model_at_end",), "there is none"),
        (("--save_strategy", "best"), "there is none"),
        (("--load_best_model_at_end", *EVALUATES, "--eval_steps", "9", "--save_steps", "9"), "there is none"),
        (("--lr_scheduler_type", "reduce_lr_on_plateau"), "requires an eval strategy"),
        (("--lr_scheduler_type", "greedy"), "requires an eval strategy"),
        (("--metric_for_best_model", "bleu", *EVALUATES), "bleu: allowed are f1, exact_match, loss"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refused_before_training(flags, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(*flags)
    assert not (tmp_path / "out").exists()


def test_metrics_are_not_followed_where_nothing_asks_for_them(tmp_path):
    assert TrainingArguments(str(tmp_path)).metric_for_best_model is None


# ---- evaluation


@pytest.mark.parametrize("script", [run_qa, switch_run_qa, text_classification])
def test_drop_last_is_about_training(script, run):
    flags = ("--dataloader_drop_last", *EVALUATES, "--save_strategy", "no")
    whole = run(*EVALUATES, "--save_strategy", "no", "--max_steps", "1", "--learning_rate", "0", script=script)
    dropped = run(*flags, "--max_steps", "1", "--learning_rate", "0", script=script, out="dropped")
    scores = {
        key: value for key, value in whole["metrics"].items() if key.startswith(("eval_f1", "eval_acc", "eval_l"))
    }
    assert len(scores) >= 2 and scores == {key: dropped["metrics"][key] for key in scores}


def test_drop_last_that_drops_everything_is_refused(run):
    with pytest.raises(ValueError, match="do not fill one batch of 4"):
        run("--dataloader_drop_last", "--max_train_samples", "3")


def test_eval_loss_is_the_training_loss(run, squad_files, tiny_model, tmp_path):
    """One window at a time through upstream's own loss, which without padding is the same."""
    metrics = run("--bit_widths", "8", "--execution", "fake")["metrics"]
    model = run_qa.QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path / "out")
    examples = load_qa_datasets(validation_file=squad_files[1], splits=["validation"])["validation"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    features = prepare_train_features(examples[:], tokenizer, 96, 16, "\n")
    losses = []
    for ids, start, end in zip(*(features[key] for key in ("input_ids", "start_positions", "end_positions"))):
        inputs = {"input_ids": [ids], "start_positions": [start], "end_positions": [end]}
        with torch.no_grad():
            losses.append(model(**{key: torch.tensor(value) for key, value in inputs.items()}).loss.item())
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_eval_loss_of_several_configs(run):
    metrics = run(script=switch_run_qa)["metrics"]
    found = [metrics[f"eval_loss_{name}"] for name in ("W8A8KV8", "W4A4KV4")]
    assert metrics["eval_loss"] == pytest.approx(sum(found) / 2)
