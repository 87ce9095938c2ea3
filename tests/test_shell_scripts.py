"""The shell scripts: what is appended wins over defaults and environment, what cannot run is one message, and nothing
is removed that a script did not make."""

import fcntl
import os
import pathlib
import subprocess
import sys

import pytest

from conftest import ROOT, parse_flags, stamp_venv

FILES = {"TRAIN_FILE": "t.json", "VALIDATION_FILE": "v.json"}
BITS = {"BIT_CONFIG": "W4A8KV8"}
GPU = {"STUB_GPUS": "1"}
TRAIN_SCRIPTS = ["base_model/train.sh", "switch_precision/train.sh", "cpt/train.sh", "adv_attack/train.sh"]
PUBLISHED = ["base_model/train.sh", "cpt/train.sh", "adv_attack/train.sh", "language_model/train.sh"]
LAUNCHING = [*TRAIN_SCRIPTS, "base_model/eval.sh", "switch_precision/eval.sh", "cpt/eval.sh"]
SCRIPTS = [*LAUNCHING, "switch_precision/sweep.sh", "benchmark/bench.sh", "adv_attack/attack.sh"]
SCRIPTS += ["adv_attack/eval.sh"]
EVALUATIONS = [*LAUNCHING[4:], "switch_precision/sweep.sh", "language_model/eval.sh", "adv_attack/attack.sh"]


@pytest.fixture
def flags_of(python_stub):
    """flags_of(script, *flags, **environment): the namespace of each python script that a shell script starts."""
    environment, calls = python_stub

    def call(script, *flags, **more):
        before = len(calls())
        subprocess.run(["bash", ROOT / script, *flags], check=True, env=environment | more, cwd="/")
        found = []
        for words in calls()[before:]:
            at = next(index for index, word in enumerate(words) if word.endswith(".py"))
            found.append(parse_flags(os.path.relpath(words[at], ROOT), words[at + 1 :]))
        return found

    return call


@pytest.mark.parametrize(
    ("script", "flags", "environment", "expected"),
    [
        # length of the training
        ("base_model/train.sh", "", {}, {"max_steps": 1000, "eval_strategy": "steps"}),
        ("base_model/train.sh", "--num_train_epochs 1", {}, {"max_steps": -1, "num_train_epochs": 1}),
        ("base_model/train.sh", "--num_train_epochs=2", {}, {"max_steps": -1, "num_train_epochs": 2}),
        ("switch_precision/train.sh", "--num-train-epochs 1", {}, {"max_steps": -1, "num_train_epochs": 1}),
        ("switch_precision/train.sh", "--num-train-epochs=1.5", {}, {"max_steps": -1, "num_train_epochs": 1.5}),
        ("cpt/train.sh", "--num_train_ep 1", {}, {"max_steps": -1, "num_train_epochs": 1}),
        ("cpt/train.sh", "--max_steps=7 --num_train_epochs 1", {}, {"max_steps": 7}),
        ("adv_attack/train.sh", "--max-steps 7", {}, {"max_steps": 7}),
        ("adv_attack/train.sh", "--num_train_epochs 1", {}, {"max_steps": -1, "num_train_epochs": 1}),
        # bits
        ("base_model/train.sh", "", BITS, {"bit_config": "W4A8KV8"}),
        ("base_model/train.sh", "--bit_widths 4", BITS, {"bit_config": None, "bit_widths": [4]}),
        ("base_model/train.sh", "--bit-widths=4", BITS, {"bit_config": None, "bit_widths": [4]}),
        ("base_model/train.sh", "--bit_config=8", BITS, {"bit_config": "8"}),
        ("base_model/train.sh", "--add_lora", BITS, {"bit_config": None, "add_lora": True}),
        ("base_model/eval.sh", "--bitsandbytes nf4", BITS, {"bit_config": None, "bitsandbytes": "nf4"}),
        ("base_model/eval.sh", "--bnb=8bit", BITS, {"bit_config": None, "bitsandbytes": "8bit"}),
        ("switch_precision/train.sh", "", {}, {"bit_widths": [4, 8], "bit_configs": None}),
        ("switch_precision/train.sh", "", BITS, {"bit_configs": ["W4A8KV8"]}),
        ("switch_precision/train.sh", "--bit-widths 4 6", BITS, {"bit_widths": [4, 6], "bit_configs": None}),
        ("switch_precision/train.sh", "--bit_configs 8 4", BITS, {"bit_configs": ["8", "4"]}),
        ("switch_precision/eval.sh", "--eval_bit_widths 4 5", BITS, {"bit_configs": ["4", "5"]}),
        ("cpt/eval.sh", "--bit-configs 4", BITS, {"bit_configs": ["4"]}),
        ("cpt/train.sh", "--bit_widths 3 8", {}, {"bit_widths": [3, 8], "num_cyclic_period": 32}),
        ("cpt/train.sh", "--precision_range_test", {}, {"precision_range_test": True}),
        ("adv_attack/train.sh", "--bit_widths 4", BITS, {"bit_config": None, "bit_widths": [4]}),
        ("benchmark/bench.sh", "--bit_configs=4", {}, {"bit_configs": ["4"], "random_weights": True}),
        ("benchmark/bench.sh", "", {}, {"bit_configs": ["8", "W4A8KV8"], "random_weights": True}),
        ("benchmark/bench.sh", "", BITS, {"bit_configs": ["W4A8KV8"], "random_weights": True}),
        ("switch_precision/search.sh", "", {}, {"average_bits": 6.0, "weight_mb": None}),
        ("switch_precision/search.sh", "--weight_mb 60", {}, {"average_bits": None, "weight_mb": 60.0}),
        ("switch_precision/search.sh", "--bitops=0.5", {}, {"average_bits": None, "bitops": 0.5}),
        # data types on a GPU
        ("switch_precision/train.sh", "", GPU, {"bf16": True, "fp16": False}),
        ("switch_precision/train.sh", "--fp16", GPU, {"bf16": False, "fp16": True}),
        ("cpt/train.sh", "--fp16=True", GPU, {"bf16": False, "fp16": True}),
        ("cpt/train.sh", "--fp16 False", GPU, {"bf16": True, "fp16": False}),
        ("cpt/train.sh", "--bf16 False", GPU, {"bf16": False, "fp16": False}),
        ("switch_precision/train.sh", "--bf16=false", GPU, {"bf16": False}),
        ("switch_precision/train.sh", "--use_cpu", GPU, {"bf16": False}),
        ("switch_precision/train.sh", "--use-cpu=no", GPU, {"bf16": True}),
        # evaluation
        ("base_model/train.sh", "--eval_strategy no", {}, {"eval_strategy": "no", "do_eval": True}),
        ("base_model/train.sh", "--eval-strategy=epoch", {}, {"eval_strategy": "epoch"}),
        ("base_model/train.sh", "--do_eval False", {}, {"do_eval": False, "eval_strategy": "no"}),
        ("cpt/train.sh", "--do-eval=f", {}, {"do_eval": False, "eval_strategy": "no"}),
        ("switch_precision/train.sh", "--do_eval no --seed 1", {}, {"do_eval": False, "eval_strategy": "no"}),
        # quantizer: trainings state it, evaluations take the checkpoint's and have what rotated is calibrated on
        *((script, "", {}, {"quantizer": "minmax"}) for script in PUBLISHED),
        ("switch_precision/train.sh", "", {}, {"quantizer": "rotated", "curriculum": 0.9, "num_mixed_configs": 0}),
        ("switch_precision/train.sh", "--objective=sequential", {}, {"quantizer": "minmax", "curriculum": 0.0}),
        *((script, "--quantizer=rotated", {}, {"quantizer": "rotated"}) for script in TRAIN_SCRIPTS),
        *((script, "--do_train False", {}, {"quantizer": None}) for script in TRAIN_SCRIPTS),
        *(
            (script, flags, FILES, {"quantizer": flags[12:] or None, "train_file": "t.json"})
            for script in EVALUATIONS
            for flags in ("", "--quantizer rotated")
        ),
        # data and models
        ("base_model/train.sh", "", FILES, {"train_file": "t.json", "validation_file": "v.json"}),
        ("base_model/train.sh", "--train_file=u.json", FILES, {"train_file": "u.json", "validation_file": "v.json"}),
        ("base_model/train.sh", "--dataset-name d", FILES, {"dataset_name": "d", "train_file": None}),
        ("base_model/eval.sh", "--dataset_name d", FILES, {"dataset_name": "d", "validation_file": None}),
        ("cpt/eval.sh", "--dataset_name=d", FILES, {"dataset_name": "d", "validation_file": None}),
        ("switch_precision/sweep.sh", "--dataset_name d", FILES, {"dataset_name": "d", "validation_file": None}),
        ("adv_attack/train.sh", "--dataset_name d", FILES | {"DATASET": "x"}, {"dataset_name": "d"}),
        ("adv_attack/attack.sh", "--dataset_name d", FILES, {"dataset_name": "d", "train_file": None}),
        (
            "benchmark/bench.sh",
            "--model-name-or-path=m",
            {},
            {"model_name_or_path": "m", "random_weights": False},
        ),
        ("benchmark/bench.sh", "", {"MODEL": "m"}, {"model_name_or_path": "m", "bit_configs": None}),
        (
            "benchmark/bench.sh",
            "--random_weights",
            {"MODEL": "m"},
            {"model_name_or_path": None, "random_weights": True},
        ),
    ],
)
def test_what_is_appended_wins(script, flags, environment, expected, flags_of):
    (found,) = flags_of(script, *flags.split(), **environment)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize("flags", ["--attack_bits 4", "--attack-bits 4", "--attack_bits=4", "--attack_b 4"])
def test_an_attack_is_named_after_its_precision(flags, flags_of):
    (found,) = flags_of("adv_attack/attack.sh", *flags.split(), ATTACK_BITS="eot")
    assert found.attack_bits == "4" and found.output_dir.endswith("adv_attack/results/attack_4")
    (found,) = flags_of("adv_attack/attack.sh", *flags.split(), "--output_dir", "my out", ATTACK_BITS="eot")
    assert found.output_dir == "my out"


def test_both_scripts_of_the_evaluation_of_attacks_get_their_flags(flags_of):
    flags = [
        "--quantizer",
        "rotated",
        "--model-name-or-path=m",
        "--attack_dirs",
        "an attack",
        "b",
        "--output_dir",
        "my out",
        "--eval_bits",
        "32",
    ]
    evaluation, inference = flags_of("adv_attack/eval.sh", *flags, "--precision_set", "5", "6", "--best_of", "2")
    for found, folder in ((evaluation, "my out/eval"), (inference, "my out/rpi")):
        assert (found.model_name_or_path, found.attack_dirs, found.best_of) == ("m", ["an attack", "b"], 2)
        assert found.output_dir == folder and found.quantizer == "rotated"
    assert evaluation.eval_bits == ["32"] and inference.precision_set == ["5", "6"]


def test_what_is_set_but_not_used_is_said(python_stub):
    environment, _ = python_stub
    command = ["bash", ROOT / "base_model/train.sh", "--bit_widths", "4", "--dataset_name", "d"]
    done = subprocess.run(command, env=environment | FILES | BITS, check=True, capture_output=True, text=True)
    for name in ("TRAIN_FILE", "VALIDATION_FILE", "BIT_CONFIG"):
        assert f"train.sh: {name} is not used" in done.stderr


@pytest.mark.parametrize(
    "flag", ["--seed", "--bit_widths=4", "--output-dir", "--model_name_or_path", "--record_file=x"]
)
def test_a_comparison_refuses_flags_that_it_sets_itself(flag, python_stub, tmp_path):
    environment, calls = python_stub
    command = ["bash", ROOT / "cpt/compare.sh", "--max_steps", "3", flag, "1"]
    done = subprocess.run(
        command, env=environment | {"OUTPUT_DIR": str(tmp_path / "out")}, capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith(f"error: {flag.split('=')[0].replace('-dir', '_dir')} is set")
        and not calls()
    )
    assert not (tmp_path / "out").exists()


# ---- processes and python


COUNTS = [("", 0), ("0", 0), ("two", 0), ("-1", 1), ("1.5", 0), ("2 2", 0), ("3", 2)]


@pytest.mark.parametrize(
    ("script", "nproc", "gpus"),
    [*((LAUNCHING[0], *count) for count in COUNTS), *((script, "3", 2) for script in LAUNCHING[1:])],
)
def test_a_wrong_number_of_processes_is_one_message(script, nproc, gpus, python_stub):
    environment, calls = python_stub
    environment |= {"NPROC_PER_NODE": nproc, "STUB_GPUS": str(gpus)}
    done = subprocess.run(["bash", ROOT / script], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not calls()
    assert done.stderr.startswith("error: NPROC_PER_NODE=") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("environment", "flags", "processes"),
    [({}, [], 1), (GPU, [], 1), ({"STUB_GPUS": "4"}, [], 4), ({"NPROC_PER_NODE": "2"}, [], 2)]
    + [({"STUB_GPUS": "4", "NPROC_PER_NODE": "2"}, [], 2), ({"STUB_GPUS": "4"}, ["--use_cpu"], 1)]
    + [({"STUB_GPUS": "1", "NPROC_PER_NODE": "3"}, ["--use_cpu", "True"], 3)],
)
def test_number_of_processes(environment, flags, processes, python_stub):
    stub, calls = python_stub
    for script in LAUNCHING:
        subprocess.run(["bash", ROOT / script, *flags], env=stub | environment, check=True)
        assert f"--nproc_per_node={processes}" in calls()[-1]
    subprocess.run(["bash", ROOT / "switch_precision/sweep.sh"], env=stub | environment, check=True)
    assert "--nproc_per_node=1" in calls()[-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_without_torch_is_one_message(script, tmp_path):
    python = tmp_path / "python3"
    python.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(["bash", ROOT / script], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "has no torch: pip install -r requirements.txt" in done.stderr


def test_files_of_the_current_folder_are_no_modules(tmp_path):
    """Nor does CDPATH lead into another folder of the same name."""
    for name in ("torch", "importlib", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    (tmp_path / "elsewhere" / "base_model").mkdir(parents=True)
    environment = os.environ | {"NPROC_PER_NODE": "0", "CDPATH": str(tmp_path / "elsewhere")}
    environment["PATH"] = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    os.symlink(ROOT / "base_model", tmp_path / "base_model")
    done = subprocess.run(
        ["bash", "base_model/train.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith('error: NPROC_PER_NODE="0"')


# ---- folders: a script works only in a new one, or in one that it made


QUICK, SEEDS, COMPARE, TEXT = "quickstart/run.sh", "quickstart/seeds.sh", "cpt/compare.sh", "adv_attack/real_text.sh"
OWNED = {QUICK: ("WORK", ".quickstart"), COMPARE: ("OUTPUT_DIR", "settings.txt"), TEXT: ("WORK", ".real_text")}


@pytest.fixture
def start(python_stub, tmp_path):
    """start(script, folder, *flags): the finished process. Python is a stub, and with it the quick start's venv."""
    environment, calls = python_stub
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python3").write_text("#!/usr/bin/env bash\nexit 3\n")
    (venv / "bin" / "python3").chmod(0o755)
    stamp_venv(venv)
    environment |= {
        "VENV": str(venv),
        "PYTHON": sys.executable,
        "HOME": str(tmp_path / "home"),
        "SEEDS": "1",
        "STUB_ALL": "1",
    }
    environment |= dict.fromkeys(("TRAIN_FILE", "TEST_FILE", "TOKENIZER"), str(ROOT / "README.md"))
    (tmp_path / "home").mkdir()

    def call(script, folder, *flags, **more):
        name = OWNED.get(script, ("WORK",))[0]
        return subprocess.run(
            ["bash", ROOT / script, *flags],
            env=environment | {name: str(folder)} | more,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return call


def content(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_text() for path in folder.rglob("*")}


def assert_refused(done, message):
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", OWNED)
@pytest.mark.parametrize("kind", ["folder", "relative", "link", "file", "dangling link", "home", "root", "repository"])
def test_what_a_script_did_not_make_is_refused_and_stays(kind, script, start, tmp_path):
    (tmp_path / "my things" / "runs").mkdir(parents=True)
    (tmp_path / "my things" / "runs" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("my things")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("mine")
    before = content(tmp_path / "my things"), sorted(os.listdir(ROOT))
    folder = {
        "folder": tmp_path / "my things",
        "relative": "my things/",
        "link": tmp_path / "link",
        "file": tmp_path / "file",
        "dangling link": "dangling",
        "home": tmp_path / "home",  # empty, but not to be taken
        "root": "/",
        "repository": f"{ROOT}/tests/..",
    }[kind]
    for flags in ([], ["--fresh"]) if script == QUICK else ([],):
        assert_refused(start(script, folder, *flags), f"{OWNED[script][0]}={folder}")
    assert (content(tmp_path / "my things"), sorted(os.listdir(ROOT))) == before
    assert (tmp_path / "file").read_text() == "mine" and not os.listdir(tmp_path / "home")


@pytest.mark.parametrize("name", ["new folder", "link"])
def test_the_quick_start_removes_only_what_it_made(name, start, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    work = tmp_path / name
    assert start(QUICK, work).returncode == 3, "it gets as far as the stub"
    assert {".quickstart", "code", "runs", "records"} == set(os.listdir(work))
    (work / "mine").mkdir()
    (work / "runs" / "full_fp32").mkdir()
    assert start(QUICK, work).returncode == 3 and (work / "runs" / "full_fp32").exists(), "a killed run resumes"
    (work / "code").write_text("other code")
    (work / "runs" / "seeds").mkdir()
    assert start(QUICK, work).returncode == 3 and os.listdir(work / "runs") == ["seeds"], "those of seeds.sh stay"
    (work / "runs" / "seeds").rmdir()
    (work / "data").mkdir()
    assert start(QUICK, work, "--fresh").returncode == 3
    assert {".quickstart", "code", "runs", "records", "mine"} == set(os.listdir(work))
    assert os.path.islink(tmp_path / "link") and start(QUICK, work, "--fresh", "x").returncode == 2


def test_records_of_other_code_are_no_seeds(start, tmp_path):
    work = tmp_path / "work"
    for name in ("model/manifest.json", ".quickstart", "seeds/lora_30_1.json"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).touch()
    for code in ("", "other code"):
        (work / "seeds" / "code").write_text(code)
        assert_refused(start(SEEDS, work), f"{work}/seeds holds records of other code")
    (work / "seeds" / "lora_30_1.json").unlink()
    (work / "seeds" / "code").unlink()
    for _ in range(2):  # its own
        assert start(SEEDS, work).returncode == 3, "it gets as far as the stub"


@pytest.mark.parametrize("script", [*OWNED, SEEDS])
def test_two_runs_in_one_folder_are_one_message(script, start, tmp_path):
    work, marker = tmp_path / "work", OWNED.get(script, OWNED[QUICK])[1]
    (work / "model").mkdir(parents=True)
    (work / "model" / "manifest.json").touch()
    with open(work / marker, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert_refused(start(script, work), "another run is at work in")


@pytest.mark.parametrize(("script", "flags", "more"), [(COMPARE, ["--max_steps", "9"], {}), (TEXT, [], {"SEED": "9"})])
def test_results_of_other_settings_are_not_mixed(script, flags, more, start, tmp_path):
    start(script, tmp_path / "out")
    before = content(tmp_path / "out")
    assert before[OWNED[script][1]]
    assert_refused(start(script, tmp_path / "out", *flags, **more), "holds results of other settings")
    assert content(tmp_path / "out") == before and "other settings" not in start(script, tmp_path / "out").stderr


def test_seeds_need_a_quick_start(start, tmp_path):
    assert_refused(start(SEEDS, tmp_path / "new"), "run bash quickstart/run.sh first")
    assert not (tmp_path / "new").exists()


def test_a_comparison_needs_its_joint_checkpoint_first(start, tmp_path):
    assert_refused(start(COMPARE, tmp_path / "out", JOINT="joint_SEED"), "joint_1/config.json is not there")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_environment_that_make_venv_did_not_make_stays(kind, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("folder")
    environment = os.environ | {"VENV": str(tmp_path / kind), "PYTHON": sys.executable}
    done = subprocess.run(["bash", ROOT / "tests/make_venv.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "was not made by this script" in done.stderr
    assert (tmp_path / "folder" / "notes.txt").exists() and (tmp_path / "file").read_text() == "mine"
