"""A training and its output folder: settings, a second call, damaged checkpoints, two runs at once, full disks."""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import run_qa
from common import record, resuming
from common import trainer as common_trainer
from conftest import ROOT, experiment, tiny_squad

with experiment("adv_attack"):
    import text_classification
with experiment("language_model"):
    import run_clm
with experiment("switch_precision"):
    import run_qa as switch_run_qa

STEPS = ("--bit_widths", "4", "--max_steps", "4", "--save_steps", "2", "--save_strategy", "steps")


@pytest.fixture
def words(qa_words, tmp_path):
    """The command line of a small training with base_model's run_qa.py; later flags win."""
    return ["run_qa.py", *qa_words("--do_eval", "False", *STEPS, out=tmp_path / "out")]


@pytest.fixture
def run(words, monkeypatch, tmp_path):
    def call(*flags, out="out"):
        monkeypatch.setattr(sys, "argv", [*words, "--output_dir", str(tmp_path / out), *map(str, flags)])
        run_qa.main()
        return json.loads((tmp_path / out / "record.json").read_text())

    return call


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def forget_the_end(folder):
    """The folder as a run leaves it that was killed after its last checkpoint."""
    path = folder / resuming.SETTINGS_FILE
    settings = record.load_state(path)
    del settings["finished"]
    record.write_state(path, settings)


# ---- other settings


@pytest.fixture(scope="module")
def finished(qa_words, tmp_path_factory):
    """Folder of a finished run; copied by each test."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    before, sys.argv = sys.argv, ["run_qa.py", *qa_words("--do_eval", "False", *STEPS, out=folder)]
    try:
        run_qa.main()
    finally:
        sys.argv = before
    return folder


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--learning_rate", "1e-3"), "learning_rate: 0.003 then, 0.001 now"),
        (("--lr_scheduler_type", "cosine"), "lr_scheduler_type: 'linear' then, 'cosine' now"),
        (("--optim", "sgd"), "optim: 'adamw_torch_fused' then, 'sgd' now"),
        (("--per_device_train_batch_size", "4"), "per_device_train_batch_size: 8 then, 4 now"),
        (("--gradient_accumulation_steps", "2"), "gradient_accumulation_steps: 1 then, 2 now"),
        (("--weight_decay", "0.1"), "weight_decay: 0.0 then, 0.1 now"),
        (("--warmup_steps", "2"), "warmup_steps: 0 then, 2"),
        (("--max_train_samples", "40"), "max_train_samples: None then, 40 now"),
        (("--max_seq_length", "80"), "max_seq_length: 96 then, 80 now"),
        (("--doc_stride", "8"), "doc_stride: 16 then, 8 now"),
        (("--max_steps", "5"), "max_steps: 4 then, 5 now"),
        (("--seed", "1"), "seed: 42 then, 1 now"),
        (("--data_seed", "1"), "data_seed: None then, 1 now"),
        (("--max_grad_norm", "0.1"), "max_grad_norm: 1.0 then, 0.1 now"),
        (("--adam_beta2", "0.9"), "adam_beta2: 0.999 then, 0.9 now"),
        (("--lora_alpha", "32"), "lora_alpha"),
        (("--execution", "integer"), "execution: None then, 'integer' now"),
        (("--question_separator", ""), "question_separator"),
        (("--neftune_noise_alpha", "5"), "neftune_noise_alpha"),
        (("--train_sampling_strategy", "sequential"), "train_sampling_strategy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_changes_the_result_is_refused_with_both_values(flags, told, finished, run, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="other settings") as refusal:
        run(*flags)
    assert told in str(refusal.value)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_other_data_or_weights_under_the_same_name_are_refused(finished, run, tmp_path, tiny_model):
    shutil.copytree(finished, tmp_path / "out")
    data = tmp_path / "train.json"
    data.write_text(json.dumps(tiny_squad(64, seed=9)))
    with pytest.raises(ValueError, match=r"other settings \(train: '\w+' then, '\w+' now\)"):
        run("--train_file", data)
    shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-3}))
    with pytest.raises(ValueError, match=r"other settings \(model"):
        run("--model_name_or_path", tmp_path / "model")


@pytest.mark.parametrize(
    ("script", "flag"), [(run_qa, "--bit_config"), (switch_run_qa, "--bit_configs")], ids=["base_model", "switch"]
)
def test_other_bits_in_a_file_of_the_same_name_are_refused(script, flag, words, monkeypatch, tmp_path):
    config = tmp_path / "bits.json"
    flags = [*words[: -len(STEPS)], "--max_steps", "1", "--save_strategy", "no", flag, str(config)]
    monkeypatch.setattr(sys, "argv", flags)

    def attempt(layers, indent=None):
        config.write_text(json.dumps({"default": 8, layers: 4}, indent=indent))
        script.main()

    attempt("*.mlp.*")
    attempt("*.mlp.*", 2)  # the same bits, written in another way
    with pytest.raises(ValueError, match=r"other settings \(.*bits: '\w+' then, '\w+' now\)"):
        attempt("*.attn.*")


def test_a_moved_model_and_a_moved_file_are_the_same(finished, run, tmp_path, tiny_model, squad_files):
    shutil.copytree(finished, tmp_path / "out")
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copy(squad_files[0], tmp_path / "moved.json")
    run("--model_name_or_path", tmp_path / "model", "--train_file", tmp_path / "moved.json")


@pytest.mark.parametrize(
    "flags",
    [
        ("--logging_steps", "1"),
        ("--save_steps", "1", "--save_total_limit", "1"),
        ("--dataloader_num_workers", "1"),
        ("--do_eval",),
        ("--eval_strategy", "steps", "--eval_steps", "1"),
        ("--per_device_eval_batch_size", "3"),
        ("--max_answer_length", "7"),
    ],
    ids=" ".join,
)
def test_what_does_not_change_the_result_is_free_and_changes_nothing(flags, finished, run, tmp_path, dropout):
    run("--model_name_or_path", dropout / "model", *flags, out="other")
    assert same_weights(dropout / "out", tmp_path / "other")
    shutil.copytree(finished, tmp_path / "out")
    assert run(*flags)["continues"] == "finished training"


@pytest.fixture(scope="module")
def dropout(qa_words, tiny_model, tmp_path_factory):
    """Folder of a model with dropout, whose training shows what else draws random numbers, and of its run."""
    folder = tmp_path_factory.mktemp("dropout")
    shutil.copytree(tiny_model, folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)
    (folder / "model" / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        words = qa_words("--do_eval", "False", *STEPS, out=folder / "out", model=folder / "model")
        patch.setattr(sys, "argv", ["run_qa.py", *words])
        run_qa.main()
    return folder


def test_where_evaluation_picks_the_model_it_is_compared(run):
    best = (
        "--load_best_model_at_end",
        "--metric_for_best_model",
        "f1",
        "--eval_strategy",
        "steps",
        "--save_steps",
        "1",
    )
    run(*best, "--eval_steps", "1")
    with pytest.raises(ValueError, match="max_eval_samples: None then, 6 now"):
        run(*best, "--eval_steps", "1", "--max_eval_samples", "6")


# ---- a finished run


def test_a_finished_run_is_only_evaluated(finished, run, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    record = run("--do_eval")
    assert record["continues"] == "finished training" and record["steps"] == 4
    assert "eval_f1" in record["metrics"] and "train_loss" not in record["metrics"]
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}


def test_without_checkpoints_too(run, tmp_path):
    first = run("--save_strategy", "no", "--do_eval")
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    again = run("--save_strategy", "no", "--do_eval")
    assert again["metrics"]["eval_f1"] == first["metrics"]["eval_f1"]
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before


def test_a_finished_run_whose_model_is_damaged_is_made_again_from_its_last_checkpoint(finished, run, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    assert run()["continues"].endswith("checkpoint-4")
    assert same_weights(finished, tmp_path / "out")


@pytest.mark.parametrize(
    "extra", [(), ("--bit_widths", "4", "8", "--random_precision_training")], ids=["plain", "rpt"]
)
def test_classifier(extra, tiny_model, tmp_path, monkeypatch):
    rows = [{"text": f"the {'kite' if n % 2 else 'drum'} {n}", "label": n % 2} for n in range(16)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--model_name_or_path", tiny_model, "--train_file", str(tmp_path / "train.jsonl"), "--use_cpu", "True"]
    flags += ["--do_train", "--max_steps", "4", "--save_steps", "2", "--disable_tqdm", "True", *extra]

    def call(*more):
        monkeypatch.setattr(sys, "argv", ["x", *flags, "--output_dir", str(tmp_path / "out"), *more])
        text_classification.main()
        return json.loads((tmp_path / "out" / "record.json").read_text())

    call()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {bits["w_bits"] for bits in config["bit_config"].values()} == ({8} if extra else {32})
    before = weights(tmp_path / "out")
    assert call()["continues"] == "finished training"
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "out").items())
    with pytest.raises(ValueError, match="learning_rate: 5e-05 then, 0.1 now"):
        call("--learning_rate", "0.1")


def test_language_model(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("Ada has the kite. Ben has the drum.\n" * 200)
    flags = ["--model_name_or_path", tiny_model, "--train_file", str(tmp_path / "text.txt"), "--use_cpu", "True"]
    flags += ["--do_train", "--max_steps", "3", "--save_steps", "1", "--block_size", "32", "--disable_tqdm", "True"]

    def call(*more):
        monkeypatch.setattr(sys, "argv", ["x", *flags, "--output_dir", str(tmp_path / "out"), *more])
        run_clm.main()
        return json.loads((tmp_path / "out" / "record.json").read_text())

    call()
    before = weights(tmp_path / "out")
    assert call()["continues"] == "finished training"
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "out").items())
    forget_the_end(tmp_path / "out")
    assert call()["continues"].endswith("checkpoint-3")  # killed before its end: no step is added
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "out").items())
    with pytest.raises(ValueError, match="block_size: 32 then, 16 now"):
        call("--block_size", "16")


# ---- checkpoints that are not whole


def damage(path, how):
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "bit": bytes(flipped)}[how])


FILES = ("model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
FILES += (resuming.MANIFEST_FILE,)


KINDS = [("model.safetensors", "empty"), ("optimizer.pt", "half"), *((name, "bit") for name in FILES)]
OTHERS = sorted({(name, how) for name in FILES for how in ("empty", "half", "bit")} - set(KINDS))


@pytest.mark.parametrize(("name", "how"), [*KINDS, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)])
def test_a_damaged_newest_checkpoint_is_left_out_with_one_line(name, how, finished, run, tmp_path, caplog):
    shutil.copytree(finished, tmp_path / "out")
    forget_the_end(tmp_path / "out")
    damage(tmp_path / "out" / "checkpoint-4" / name, how)
    assert run()["continues"].endswith("checkpoint-2")
    lines = [record.message for record in caplog.records if "checkpoint-4 is left out" in record.message]
    assert len(lines) == 1 and name in lines[0]
    assert same_weights(finished, tmp_path / "out")
    forget_the_end(tmp_path / "out")
    assert run()["continues"].endswith("checkpoint-4")  # written anew


def test_nothing_is_deleted_when_no_checkpoint_can_be_resumed(run, tmp_path):
    run("--save_only_model")
    forget_the_end(tmp_path / "out")
    with pytest.raises(ValueError, match="no checkpoint to resume from .*save_only_model.*--overwrite_output_dir"):
        run("--save_only_model")
    assert (tmp_path / "out" / "checkpoint-4" / "model.safetensors").is_file()
    assert run("--save_only_model", "--overwrite_output_dir")["continues"] is None


def test_upstreams_mark_of_a_checkpoint_in_the_making_is_no_part_of_it(finished, tmp_path):
    folder = pathlib.Path(shutil.copytree(finished / "checkpoint-4", tmp_path / "checkpoint-4"))
    (folder / resuming.MANIFEST_FILE).unlink()
    (mark := folder / "checkpoint-is-incomplete.txt").touch()  # of --enable_jit_checkpoint, which removes it last
    resuming.seal(str(folder))
    mark.unlink()
    assert resuming.resume_fault(str(folder), world_size=1) is None


def test_a_checkpoint_of_another_number_of_processes_is_none(finished):
    assert resuming.resume_fault(finished / "checkpoint-4", world_size=1) is None
    assert "rng_state_0.pth, rng_state_1.pth is missing" in resuming.resume_fault(finished / "checkpoint-4", 2)


def test_a_state_of_one_process_missing_makes_a_checkpoint_no_checkpoint(finished, tmp_path):
    folder = shutil.copytree(finished / "checkpoint-4", tmp_path / "checkpoint-4")
    (folder / resuming.MANIFEST_FILE).unlink()
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    assert "not written to its end" in resuming.resume_fault(folder, world_size=2)
    assert "rng_state_1.pth" in resuming.resume_fault(folder, world_size=2, sealed=False)
    (folder / "rng_state_1.pth").touch()
    assert resuming.resume_fault(folder, world_size=2, sealed=False) is None  # as earlier versions wrote it


def test_old_checkpoints_go_only_when_the_new_one_is_whole(run, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    run("--save_total_limit", "1", out="whole")
    assert [path.name for path in (tmp_path / "whole").glob("checkpoint-*")] == ["checkpoint-4"]
    seal = resuming.seal
    monkeypatch.setattr(common_trainer, "seal", lambda path: fail() if path.endswith("-4") else seal(path))
    with pytest.raises(OSError):
        run("--save_total_limit", "1")
    assert resuming.resume_fault(tmp_path / "out" / "checkpoint-2", 1) is None


def test_left_overs_of_a_killed_run_go_and_its_command_works(run, tmp_path):
    names = ("run_settings.json.4242.tmp", ".saving-abcd_123")
    for name in (*names, "checkpoint-2/.saving-xyz12345", "checkpoint-2/a.json.1.tmp"):
        path = tmp_path / "out" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.mkdir() if "saving" in name else path.touch()
    (tmp_path / "out" / "checkpoint-2").rename(tmp_path / "half")
    run()
    forget_the_end(tmp_path / "out")
    shutil.copytree(tmp_path / "half", tmp_path / "out" / "checkpoint-2", dirs_exist_ok=True)
    run()
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith(".tmp") or "saving" in path.name]
    (tmp_path / "other").mkdir()
    for name in ("notes.tmp", "thesis.json.77.tmp", "thesis.tex"):
        (tmp_path / "other" / name).touch()
    with pytest.raises(ValueError, match="not empty"):
        run(out="other")
    assert len(list((tmp_path / "other").glob("[nt]*"))) == 3, "a folder of somebody else is left alone"


# ---- two runs at once


def test_a_second_run_is_refused_while_the_first_lives_and_not_after(words, run, tmp_path):
    code = "import sys; from common import resuming; file = resuming.output_dir_lock(sys.argv[1]); "
    code += "print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "base_model")}
    holder = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"another run \(process {holder.pid} on .*\) is writing to it"):
        run()
    holder.kill()
    holder.wait()
    run()


def test_every_process_of_a_run_keeps_the_folder(tmp_path):
    """A worker that outlives rank 0 holds its share of the lock; two shares do not hinder each other."""
    first = resuming.output_dir_lock(tmp_path, shared=True)
    code = """if True:
        import sys
        from common.resuming import output_dir_lock
        for line in sys.stdin:
            try:
                output_dir_lock(sys.argv[1], shared=line == "shared\\n").close()
                print(True, flush=True)
            except ValueError:
                print(False, flush=True)
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT / "base_model")}, **pipes)

    def ends_well(kind):
        print(kind, file=other.stdin, flush=True)
        return {"True\n": True, "False\n": False}[other.stdout.readline()]

    assert ends_well("shared") and not ends_well("alone")
    first.close()
    assert ends_well("alone")
    other.communicate()


# ---- a full disk


REST = [pytest.param(size, marks=pytest.mark.slow) for size in (1_000, 60_000, 100_000)]


@pytest.mark.parametrize("limit", [20_000, *REST])
def test_a_full_disk_ends_with_one_error_and_keeps_the_checkpoints(limit, words, finished, tmp_path):
    """A limit on the size of files acts as a full disk: every writer meets it somewhere else."""
    shutil.copytree(finished, tmp_path / "out")
    forget_the_end(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    result = subprocess.run(
        [sys.executable, str(ROOT / "base_model" / "run_qa.py"), *words[1:]],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert "error: " in result.stderr
    assert resuming.resume_fault(tmp_path / "out" / "checkpoint-2", 1) is None


# ---- two processes, killed while they save


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["base_model", "switch_precision", "cpt"])
def test_two_processes_killed_while_saving_resume_to_the_same_weights(folder, words, tmp_path):
    """Killed at eight places around the writing of a checkpoint, most of them within it."""
    flags = ["--max_steps", "8", "--save_steps", "1", "--save_total_limit", "3", "--learning_rate", "1e-3"]
    flags += {"base_model": [], "switch_precision": ["--bit_widths", "4", "8"]}.get(folder, ["--bit_widths", "4", "8"])
    flags += ["--num_cyclic_period", "2"] if folder == "cpt" else []
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(ROOT / folder / "run_qa.py"), *words[1:], *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole = [*command, "--output_dir", str(tmp_path / "whole")]
    result = subprocess.run(whole, capture_output=True, text=True, env=environment)
    assert not result.returncode, result.stderr[-3000:]
    killed = [*command, "--output_dir", str(tmp_path / "killed")]
    for kill in range(8):
        process = subprocess.Popen(
            killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        saving = tmp_path / "killed" / f"checkpoint-{min(kill + 1, 7)}"
        name = (*FILES[:3], "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json")[kill % 6]
        while process.poll() is None and not (saving / name).exists():
            pass
        if kill == 7:
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    result = subprocess.run(killed, capture_output=True, text=True, env=environment)
    assert not result.returncode, result.stderr[-3000:]
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert not [path for path in (tmp_path / "killed").rglob("*") if path.name.endswith(".tmp")]
