"""--quantizer in the QA scripts: calibration, trainings and their resumption, evaluation of either kind, refusals."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import run_qa
from common import record, resuming
from conftest import ROOT, experiment, save_tiny_tokenizer

with experiment("switch_precision"):
    import run_qa as switch_run_qa
    import run_qa_eval
    import search
    import sensitivity
    from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering
with experiment("cpt"):
    import run_qa as cpt_run_qa

ROTATED = ("--quantizer", "rotated", "--calibration_samples", "16")
TRAIN = ("--do_eval", "False", "--max_steps", "4", "--save_steps", "2", "--save_strategy", "steps")
SCRIPTS = {
    "base_model": (run_qa, ("--bit_widths", "4")),
    "all weights": (run_qa, ()),
    "switch_precision": (switch_run_qa, ("--bit_widths", "4", "8")),
    "cpt": (cpt_run_qa, ("--bit_widths", "4", "8", "--num_cyclic_period", "2")),
}


@pytest.fixture
def call(monkeypatch):
    """call(module, *words): its main() with this command line."""

    def run(module, *words):
        monkeypatch.setattr(sys, "argv", ["x.py", *map(str, words)])
        module.main()

    return run


def read(path):
    return json.loads(path.read_text())


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def d_of(folder):
    return {name: tensor for name, tensor in weights(folder).items() if name.endswith(".rotation")}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def forget_the_end(folder):
    """The folder as a run leaves it that was killed after its last checkpoint."""
    path = folder / resuming.SETTINGS_FILE
    settings = record.load_state(path)
    del settings["finished"]
    record.write_state(path, settings)


# ---- training


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_training_resumes_to_the_same_weights_and_the_same_d(name, call, qa_words, tmp_path):
    """Killed after its second step: d comes from the checkpoint, and no calibration is made again."""
    module, flags = SCRIPTS[name]

    def train(out):
        call(module, *qa_words(*TRAIN, *ROTATED, *flags, out=tmp_path / out))
        return read(tmp_path / out / "record.json")["bit_config"]

    first = train("whole")
    assert first["quantizer"] == "rotated" and first["checkpoint_quantizer"] == "minmax"
    assert first["calibration_windows"] == 16 and first["calibration_seed"] == 42 and len(first["outliers"]) == 8
    assert len(d_of(tmp_path / "whole")) == 8
    assert same(d_of(tmp_path / "whole"), d_of(tmp_path / "whole" / "checkpoint-2"))
    assert read(tmp_path / "whole" / "config.json")["quantizer"] == "rotated"
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    forget_the_end(tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-4")
    again = train("killed")
    assert read(tmp_path / "killed" / "record.json")["continues"].endswith("checkpoint-2")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert again["rotation_sha256"] == first["rotation_sha256"] and "calibration_windows" not in again
    assert train("whole")["rotation_sha256"] == first["rotation_sha256"]
    assert read(tmp_path / "whole" / "record.json")["continues"] == "finished training"
    model = QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path / "whole")
    assert model.rotations() is not None


def test_d_of_the_checkpoint_is_taken_even_where_a_calibration_would_differ(call, qa_words, tmp_path):
    """On another machine, say: sums of floats come out differently there."""
    words = qa_words(*TRAIN, *ROTATED, "--bit_widths", "4", out=tmp_path / "out")
    call(run_qa, *words)
    before = weights(tmp_path / "out")
    forget_the_end(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    import common.calibration as calibration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "calibrate", None)
        call(run_qa, *words)
    assert same(before, weights(tmp_path / "out"))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--quantizer", "minmax"), "quantizer: 'rotated' then, 'minmax' now"),
        (("--calibration_samples", "17"), "calibration_samples: 16 then, 17 now"),
        (("--seed", "7"), "seed: 42 then, 7 now"),
    ],
)
def test_another_quantizer_in_a_used_folder_is_refused(flags, told, call, qa_words, tmp_path):
    words = qa_words(*TRAIN, *ROTATED, "--bit_widths", "4", "--max_steps", "1", out=tmp_path / "out")
    call(run_qa, *words)
    with pytest.raises(ValueError, match=told):
        call(run_qa, *words, *flags)


def test_resuming_from_the_checkpoint_of_the_other_quantizer_is_refused(call, qa_words, tmp_path):
    def train(out, *flags):
        call(run_qa, *qa_words(*TRAIN, "--bit_widths", "4", *flags, out=tmp_path / out))

    train("plain")
    train("rotated", *ROTATED)
    for flags, from_ in ((ROTATED, "plain"), ((), "rotated"), (("--quantizer", "minmax"), "rotated")):
        checkpoint = tmp_path / from_ / "checkpoint-2"
        with pytest.raises(ValueError, match=f"{from_}/checkpoint-2 is of other settings .*quantizer: "):
            train("new", *flags, "--resume_from_checkpoint", checkpoint)
        (alone := tmp_path / f"alone_{from_}").mkdir(exist_ok=True)  # nobody says what run it is of
        shutil.copytree(checkpoint, alone / "checkpoint-2", dirs_exist_ok=True)
        with pytest.raises(ValueError, match=f"{from_}/checkpoint-2: trained with --quantizer "):
            train("new", *flags, "--resume_from_checkpoint", alone / "checkpoint-2")
    train("resumed", *ROTATED, "--resume_from_checkpoint", tmp_path / "rotated" / "checkpoint-2")
    assert same(weights(tmp_path / "resumed"), weights(tmp_path / "rotated"))


def test_minmax_is_what_it_was(call, qa_words, tmp_path):
    for out, flags in (("default", ()), ("said", ("--quantizer", "minmax"))):
        call(run_qa, *qa_words(*TRAIN, "--bit_widths", "4", *flags, out=tmp_path / out))
        about = read(tmp_path / out / "record.json")["bit_config"]
        assert about["quantizer"] == about["checkpoint_quantizer"] == "minmax" and "rotation_sha256" not in about
    assert same(weights(tmp_path / "default"), weights(tmp_path / "said")) and not d_of(tmp_path / "said")


def test_calibration_is_drawn_from_the_training_questions_with_the_seed(call, qa_words, tmp_path):
    def train(out, *flags):
        call(run_qa, *qa_words(*TRAIN, *ROTATED, "--bit_widths", "4", "--max_steps", "1", *flags, out=tmp_path / out))
        return {name: d.abs() for name, d in d_of(tmp_path / out).items()}

    first = train("first")
    assert same(first, train("again")) and same(first, train("lora", "--lora_r", "4"))
    for other in (("--seed", "7"), ("--calibration_samples", "17"), ("--max_train_samples", "20")):
        assert not same(first, train(other[0], *other)), other
    assert same(first, train("validation", "--max_eval_samples", "2"))


def test_a_rotated_checkpoint_is_trained_on_with_its_d(call, qa_words, tmp_path):
    words = qa_words(*TRAIN, *ROTATED, "--bit_widths", "4", out=tmp_path / "first")
    call(run_qa, *words)
    for flags in ((), ("--quantizer", "rotated")):
        out = tmp_path / f"second{len(flags)}"
        call(run_qa, *qa_words(*TRAIN, "--bit_widths", "4", *flags, out=out, model=tmp_path / "first"))
        about = read(out / "record.json")["bit_config"]
        assert about["quantizer"] == about["checkpoint_quantizer"] == "rotated"
        assert same(d_of(out), d_of(tmp_path / "first"))
    forget_the_end(out)
    call(run_qa, *qa_words(*TRAIN, "--bit_widths", "4", *flags, out=out, model=tmp_path / "first"))
    assert same(d_of(out), d_of(tmp_path / "first"))
    out = tmp_path / "minmax"
    call(run_qa, *qa_words(*TRAIN, "--bit_widths", "4", "--quantizer", "minmax", out=out, model=tmp_path / "first"))
    assert not d_of(out) and read(out / "record.json")["bit_config"]["checkpoint_quantizer"] == "rotated"


# ---- evaluation

DATA = ("--max_seq_length", "48", "--doc_stride", "8", "--per_device_eval_batch_size", "4", "--use_cpu", "True")
DATA += ("--disable_tqdm", "True", "--seed", "3")
CALIBRATED = ("--quantizer", "rotated", "--calibration_samples", "16")


@pytest.fixture(scope="module")
def banks(tiny_model, tmp_path_factory):
    """{quantizer: folder} of checkpoints with the same random adapters for 4 and 8 bits."""
    folders = {}
    for quantizer in ("minmax", "rotated"):
        folders[quantizer] = folder = tmp_path_factory.mktemp(quantizer)
        torch.manual_seed(0)
        model = QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model)
        model.add_lora([4, 8])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.02)
                elif name == "qa_outputs.weight":
                    parameter.normal_(std=0.5)
        if quantizer == "rotated":
            rows = {name: torch.randn(n) for name, (_, n) in model.layer_shapes().items()}
            model.set_rotations({name: row.sign() * torch.exp(row.clamp(-1, 1)) for name, row in rows.items()})
        model.set_base(tiny_model)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folders


@pytest.fixture
def evaluate(call, banks, squad_files, tmp_path):
    """evaluate(module, bank, *flags): its main() on the dev file; returns the output folder."""

    def run(module, bank, *flags, out="out"):
        words = ("--model_name_or_path", banks.get(bank, bank), "--validation_file", squad_files[1], *DATA)
        call(module, *words, "--output_dir", tmp_path / out, *flags)
        return tmp_path / out

    return run


def test_a_minmax_checkpoint_is_served_rotated_and_labelled_so(evaluate, squad_files, capsys):
    train = ("--train_file", squad_files[0])
    plain = evaluate(run_qa_eval, "minmax", out="plain")
    assert "Quantizer: minmax. Drops" in capsys.readouterr().out
    out = evaluate(run_qa_eval, "minmax", *CALIBRATED, *train)
    printed = capsys.readouterr().out
    assert "Quantizer: rotated (the checkpoint has minmax). Drops" in printed
    assert "Quantizer: rotated (the checkpoint has minmax). Drops" in (out / "table.md").read_text()
    about = read(out / "record.json")["bit_config"]
    assert (about["quantizer"], about["checkpoint_quantizer"]) == ("rotated", "minmax")
    assert about["calibration_windows"] == 16 and len(about["rotation_sha256"]) == 64
    rows = [path for path in out.iterdir() if path.is_dir()]
    assert len(rows) == 2
    for path in rows:
        one = read(path / "record.json")
        assert one["bit_config"]["quantizer"] == "rotated" and one["bit_config"]["checkpoint_quantizer"] == "minmax"
        assert one["bit_config"]["rotation_sha256"] == about["rotation_sha256"]
    answers = [read(next(folder.glob("W4A4KV4-*")) / "eval_predictions.json") for folder in (plain, out)]
    assert answers[0] != answers[1]
    # The same command again evaluates nothing; either quantizer in one folder stays apart.
    times = {path: (path / "record.json").stat().st_mtime_ns for path in rows}
    evaluate(run_qa_eval, "minmax", *CALIBRATED, *train)
    assert times == {path: (path / "record.json").stat().st_mtime_ns for path in rows}
    evaluate(run_qa_eval, "minmax")
    assert len([path for path in out.iterdir() if path.is_dir()]) == 4
    evaluate(run_qa_eval, "minmax", *CALIBRATED, *train, "--calibration_samples", "20")
    assert len([path for path in out.iterdir() if path.is_dir()]) == 6, "another d"


def test_a_rotated_checkpoint_is_served_either_way(evaluate, capsys):
    """Without training data: it has its d."""
    own = evaluate(run_qa_eval, "rotated", out="own")
    assert "Quantizer: rotated. Drops" in capsys.readouterr().out
    said = evaluate(run_qa_eval, "rotated", "--quantizer", "rotated", out="said")
    plain = evaluate(run_qa_eval, "rotated", "--quantizer", "minmax", out="plain")
    assert "Quantizer: minmax (the checkpoint has rotated). Drops" in capsys.readouterr().out
    about = read(plain / "record.json")["bit_config"]
    assert (about["quantizer"], about["checkpoint_quantizer"]) == ("minmax", "rotated")
    found = {
        folder.name: read(next(folder.glob("W4A4KV4-*")) / "eval_predictions.json") for folder in (own, said, plain)
    }
    assert found["own"] == found["said"] != found["plain"]
    minmax = evaluate(run_qa_eval, "minmax", out="minmax")  # the same adapters
    assert found["plain"] == read(next(minmax.glob("W4A4KV4-*")) / "eval_predictions.json")


def test_integer_and_fake_execution_give_the_same_answers(evaluate):
    answers = []
    for execution in ("integer", "fake"):
        out = evaluate(run_qa_eval, "rotated", "--execution", execution, out=execution)
        answers.append(read(next(out.glob("W8A8KV8-*")) / "eval_predictions.json"))
    assert sum(answers[0][key] != answers[1][key] for key in answers[0]) <= 1


def test_post_training_quantization_by_run_qa(call, qa_words, squad_files, tiny_model, tmp_path):
    """base_model: an evaluation alone calibrates on the training file."""
    words = qa_words("--bit_config", "4", *ROTATED, out=tmp_path / "out", train=False)
    call(run_qa, *words)
    about = read(tmp_path / "out" / "record.json")["bit_config"]
    assert about["quantizer"] == "rotated" and about["calibration_windows"] == 16
    at = words.index("--train_file")
    with pytest.raises(
        ValueError, match="--quantizer rotated .* need training questions: pass --train_file or --dataset_name"
    ):
        call(run_qa, *words[:at], *words[at + 2 :], "--output_dir", tmp_path / "other")


@pytest.mark.parametrize("module", [run_qa_eval, sensitivity, search], ids=lambda module: module.__name__)
def test_refusals_of_the_evaluations(module, evaluate, squad_files, tmp_path, request):
    flags = ()
    if module is search:
        sweep = evaluate(sensitivity, "minmax", "--num_gradient_batches", "0", out="sweep")
        flags = ("--average_bits", "6", "--sensitivity_file", sweep / "sensitivity.json")
    with pytest.raises(ValueError) as refusal:
        evaluate(module, "minmax", *flags, *CALIBRATED)
    assert "\n" not in str(refusal.value)
    assert "--quantizer rotated where the checkpoint has no rotation" in str(refusal.value)
    assert str(refusal.value).endswith("pass --train_file or --dataset_name")
    train = ("--train_file", squad_files[0])
    for samples in (("--calibration_samples", "65"), ()):
        with pytest.raises(ValueError, match="^--calibration_samples (65|256): allowed are up to 64, the training"):
            evaluate(module, "minmax", *flags, "--quantizer", "rotated", *samples, *train)
    with pytest.raises(ValueError, match="--calibration_samples 16: allowed are up to 9, the training questions"):
        evaluate(module, "minmax", *flags, *CALIBRATED, *train, "--max_train_samples", "9")
    with pytest.raises(ValueError, match="^--quantizer other: allowed are minmax, rotated$"):
        evaluate(module, "minmax", *flags, "--quantizer", "other", *train)
    with pytest.raises(ValueError, match="^--calibration_samples 0: must be a number above 0$"):
        evaluate(module, "minmax", *flags, *CALIBRATED, "--calibration_samples", "0", *train)


@pytest.mark.parametrize("module", [run_qa, switch_run_qa, cpt_run_qa], ids=["base_model", "switch_precision", "cpt"])
def test_refusals_of_the_trainings(module, call, qa_words, tmp_path):
    bits = ("--bit_widths", "4") if module is run_qa else ("--bit_widths", "4", "8", "--num_cyclic_period", "1")
    words = qa_words(*TRAIN, *(bits if module is not switch_run_qa else bits[:3]), out=tmp_path / "out")
    with pytest.raises(ValueError, match="^--quantizer other: allowed are minmax, rotated$"):
        call(module, *words, "--quantizer", "other")
    with pytest.raises(ValueError, match="^--calibration_samples 256: allowed are up to 64, the training questions$"):
        call(module, *words, "--quantizer", "rotated")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_model_that_cannot_be_rotated_is_refused_before_anything_is_computed(call, qa_words, tmp_path):
    """Heads of 24: Hadamard blocks of 8."""
    tokenizer = save_tiny_tokenizer(tmp_path / "odd")
    config = GPT2Config(n_layer=1, n_embd=96, n_head=4, n_positions=128, vocab_size=len(tokenizer))
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "odd")
    import common.calibration as calibration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "input_rms", None)
        told = r"^transformer\.h\.0\.attn\.c_attn: the heads of K and V: rows of 24 .* needs a multiple of 16$"
        with pytest.raises(ValueError, match=told):
            call(
                run_qa, *qa_words(*TRAIN, *ROTATED, "--bit_widths", "4", out=tmp_path / "out", model=tmp_path / "odd")
            )


# ---- sensitivity and search


def test_sweep_and_search_of_a_rotated_checkpoint(evaluate, squad_files, capsys):
    sweep = evaluate(sensitivity, "rotated", "--num_gradient_batches", "1", out="sweep")
    found = read(sweep / "sensitivity.json")
    assert found["bit_config"]["quantizer"] == "rotated" and len(found["bit_config"]["rotation_sha256"]) == 64
    plain = read(evaluate(sensitivity, "minmax", "--num_gradient_batches", "1", out="plain") / "sensitivity.json")
    assert plain["bit_config"]["quantizer"] == "minmax" and plain["flips"] != found["flips"]
    capsys.readouterr()
    flags = ("--average_bits", "6", "--sensitivity_file", sweep / "sensitivity.json", "--refine_rounds", "1")
    out = evaluate(search, "rotated", *flags, out="search")
    assert "Quantizer: rotated. Drops" in capsys.readouterr().out
    assert read(out / "record.json")["bit_config"]["quantizer"] == "rotated"
    assert (out / "assignment.json").is_file()
    # The sweep of one quantizer says nothing about the other.
    with pytest.raises(ValueError, match="swept with --quantizer"):
        evaluate(search, "rotated", *flags, "--quantizer", "minmax", out="other")
    with pytest.raises(ValueError, match="other settings .*model_sha256"):
        evaluate(sensitivity, "rotated", "--num_gradient_batches", "1", "--quantizer", "minmax", out="sweep")


def test_a_sweep_of_a_minmax_checkpoint_with_the_rotated_quantizer(evaluate, squad_files):
    flags = (*CALIBRATED, "--train_file", squad_files[0])
    sweep = evaluate(sensitivity, "minmax", "--num_gradient_batches", "0", *flags, out="sweep")
    about = read(sweep / "sensitivity.json")["bit_config"]
    assert (about["quantizer"], about["checkpoint_quantizer"]) == ("rotated", "minmax")
    flags += ("--average_bits", "6", "--sensitivity_file", sweep / "sensitivity.json", "--refine_rounds", "0")
    out = evaluate(search, "minmax", *flags, out="search")
    assert read(out / "record.json")["bit_config"]["rotation_sha256"] == about["rotation_sha256"]


# ---- several processes


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["base_model", "switch_precision", "cpt"])
def test_two_processes_have_one_d(folder, qa_words, call, squad_files, tmp_path):
    """Rank 0 calibrates: the same d and, to rounding, the same weights as one process; evaluation too."""
    module, flags = SCRIPTS[folder]
    words = qa_words(*TRAIN, *ROTATED, *flags, "--optim", "sgd", out=tmp_path / "one")
    call(module, *words)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    two = [*words, "--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "4"]
    for _ in range(2):  # the second time it is finished
        command = [*launcher, str(ROOT / folder / "run_qa.py"), *two]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert not done.returncode, done.stderr[-3000:]
    assert same(d_of(tmp_path / "one"), d_of(tmp_path / "two"))
    one, other = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)
    evaluation = ["--model_name_or_path", str(tmp_path / "two"), "--train_file", squad_files[0], *DATA]
    evaluation += ["--validation_file", squad_files[1], "--output_dir", str(tmp_path / "eval"), *CALIBRATED]
    for model in ("two", "plain"):
        if model == "plain":
            call(module, *qa_words(*TRAIN, *flags, "--max_steps", "2", out=tmp_path / "plain"))
            evaluation[1] = str(tmp_path / "plain")
        command = [*launcher, str(ROOT / folder / "run_qa_eval.py"), *evaluation]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert not done.returncode, done.stderr[-3000:]
        about = read(tmp_path / "eval" / "record.json")["bit_config"]
        assert about["quantizer"] == "rotated"
        assert about["checkpoint_quantizer"] == ("rotated" if model == "two" else "minmax")


@pytest.mark.slow
def test_a_refusal_ends_two_processes_with_one_line(qa_words, tmp_path):
    words = qa_words(*TRAIN, "--quantizer", "rotated", "--bit_widths", "4", out=tmp_path / "out")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(ROOT / "base_model" / "run_qa.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    told = "error: --calibration_samples 256: allowed are up to 64, the training questions"
    assert done.returncode and done.stderr.count(told) == 1
