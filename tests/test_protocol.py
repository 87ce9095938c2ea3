"""reproduce/run.py: settings, the order of the steps, resuming, refusals.

That the commands of the steps are understood is tested in test_readme_commands.py.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT, load_script

SCALES = sorted(path.stem for path in (ROOT / "reproduce" / "settings").glob("*.json"))
STEPS = {  # steps that only note that they ran
    "first": "if test -e {work}/fail; then echo first cannot go on >&2; false; fi; "
    "echo first {seed} {+training} >>{work}/log; cp {work}/one {record}",
    "second": "test -e {first_record}; echo second {seed} {first} {own} >>{work}/log; cp {work}/one {record}",
    "silent": "true",
    "alone": "echo alone {seed} >>{work}/log; cp {work}/one {record}",
    "meets": "test -e {first_record}; touch {work}/here_{seed}; echo meets said; "
    "for other in 1 2; do until test -e {work}/here_$other; do sleep 0.05; done; done; "
    "echo meets >>{work}/log; cp {work}/one {record}",
    "home": "cp {A_FILE} {record}",
}


@pytest.fixture
def protocol(tmp_path, monkeypatch):
    """protocol(*flags, **settings): the exit of run.py with STEPS; its work folder is "my work" in tmp_path."""
    script = load_script("reproduce/run.py")
    monkeypatch.setattr(script, "STEPS", STEPS)
    monkeypatch.setattr(script, "FLAGS", {"training"})
    work = tmp_path / "my work"
    work.mkdir()
    (work / "one").write_text('{"wall_seconds": 60}')

    def call(*flags, **more):
        settings = {"work": str(work), "model": "gpt2", "seed": 1, "steps": ["first", "second"]} | more
        settings = {key: value for key, value in settings.items() if value is not None}
        (tmp_path / "mine.json").write_text(json.dumps(settings))
        monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "mine.json"), *flags])
        try:
            script.main()
        except SystemExit as stop:
            return stop.code
        return 0

    return call


def log(tmp_path):
    return (tmp_path / "my work" / "log").read_text().splitlines()


def test_steps_run_in_order_and_once(protocol, tmp_path, capfd):
    work = tmp_path / "my work"
    more = {"flags": {"training": "--max_steps 3"}, "prepare": ["echo ready >>{work}/log"], "finish": ["echo end"]}
    steps = ["first", {"seeds": [2, 3], "steps": ["first", "second"]}, "second"]
    assert protocol(steps=steps, **more) == 0
    ran = ["ready", "first 1 --max_steps 3"]
    for seed in (2, 3):
        ran += [f"first {seed} --max_steps 3", f"second {seed} {work}/runs/first_{seed} {work}/runs/second_{seed}"]
    assert log(tmp_path) == [*ran, f"second 1 {work}/runs/first {work}/runs/second"]
    printed = capfd.readouterr().out
    assert "[1/6] first (time left not known yet)" in printed and "[2/6] first_2 (about 0 min left)" in printed
    assert printed.endswith("end\n")
    assert protocol(steps=steps, **more) == 0 and log(tmp_path)[7:] == ["ready"], "what has a record is not repeated"
    assert capfd.readouterr().out.count("is done") == 6


def test_a_step_that_fails_goes_on_when_the_command_is_given_again(protocol, tmp_path, capfd):
    (tmp_path / "my work" / "fail").touch()
    steps = [{"seeds": [1, 2], "steps": ["first"]}, "second", {"seeds": [3], "steps": ["alone"]}]
    for jobs in ((), ("--jobs", "3")):
        assert protocol(*jobs, steps=steps, finish=["echo end >>{work}/log"]) == 1
        told = capfd.readouterr().err
        assert "error: first failed (exit 1)" in told and "error: not run, for what they need: second\n" in told
        assert "first cannot go on\n" in told, "side by side from its log"
    assert log(tmp_path) == ["alone 3"], "what does not need it has run, once"
    (tmp_path / "my work" / "fail").unlink()
    assert protocol(steps=steps, finish=["echo end >>{work}/log"]) == 0 and len(log(tmp_path)) == 5
    assert protocol(steps=["silent"]) == 1 and "error: silent wrote no record" in capfd.readouterr().err


def test_steps_side_by_side_wait_for_what_they_need(protocol, tmp_path, capfd):
    steps = ["first", {"seeds": [1, 2], "steps": ["meets"]}, "second"]
    assert protocol("--jobs", "2", steps=steps) == 0, "each meets step ends only beside the other"
    ran = [line.split()[0] for line in log(tmp_path)]
    assert ran[0] == "first" and sorted(ran[1:]) == ["meets", "meets", "second"]
    assert "meets said" in (tmp_path / "my work" / "logs" / "meets_2.txt").read_text()
    assert "\nmeets said\n" not in capfd.readouterr().out
    assert protocol("--jobs", "0") == "error: --jobs 0: allowed is 1 or more"


def test_dry_run_and_only(protocol, tmp_path, capfd):
    assert protocol("--dry_run", prepare=["echo {work}"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith("if test -e '") and not (tmp_path / "my work" / "log").exists()
    assert protocol("--only", "second") == 1, "it needs the record of the first"
    assert protocol("--only", "first") == 0 and [line.split()[0] for line in log(tmp_path)] == ["first"]
    assert "--only x: not in" in protocol("--only", "x")


def test_a_step_is_made_anew_after_one_that_it_needs(protocol, tmp_path, capfd):
    steps = ["first", "second", "alone"]
    assert protocol(steps=steps) == 0
    records = tmp_path / "my work" / "records"
    (records / "first.json").unlink()
    assert protocol("--only", "first", steps=steps) == 0
    os.utime(records / "first.json", ns=(later := (records / "second.json").stat().st_mtime_ns + 10**9, later))
    capfd.readouterr()
    (tmp_path / "my work" / "one").touch()
    assert protocol("--only", "second", steps=steps) == 1, "its new record is older than that of its need still"
    os.utime(records / "first.json", ns=(later - 2 * 10**9, later - 2 * 10**9))
    (records / "second.json").unlink()
    assert protocol(steps=steps) == 0
    assert [line.split()[0] for line in log(tmp_path)] == ["first", "second", "alone", "first", "second", "second"]
    assert "second is made anew: what it needs has changed" in capfd.readouterr().out


def test_what_was_made_of_a_missing_step_is_made_anew(protocol, tmp_path):
    assert protocol() == 0
    (tmp_path / "my work" / "records" / "first.json").unlink()
    assert protocol() == 0 and len(log(tmp_path)) == 4


def test_other_input_files_are_not_mixed(protocol, tmp_path, monkeypatch):
    (tmp_path / "text.json").write_text('{"wall_seconds": 1}')
    monkeypatch.setenv("A_FILE", str(tmp_path / "text.json"))
    more = {"steps": ["home"], "prepare": ["touch {work}/ready"]}
    assert protocol(**more) == 0 and protocol(**more) == 0
    assert "error: prepare: not what the steps in" in protocol(**more | {"prepare": ["touch {work}/other"]})
    assert not (tmp_path / "my work" / "other").exists()
    (tmp_path / "text.json").write_text('{"wall_seconds": 2}')
    assert f"error: A_FILE={tmp_path}/text.json: not what the steps in" in protocol(**more)


def test_variables_of_the_users_shell_do_not_reach_the_steps(protocol, tmp_path, monkeypatch):
    monkeypatch.setenv("BIT_CONFIG", "4")
    monkeypatch.setitem(STEPS, "bits", "echo bits=${BIT_CONFIG:-} >>{work}/log; cp {work}/one {record}")
    assert protocol(steps=["bits"]) == 0 and log(tmp_path) == ["bits="]


def test_results_of_other_settings_are_not_mixed(protocol, tmp_path):
    assert protocol() == 0
    assert "first was begun by another command" in protocol(flags={"training": "--max_steps 9"})
    assert len(log(tmp_path)) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"setps": ["first"]}, "mine.json: setps: unknown key; known: description, work"),
        ({"model": None}, "mine.json: model: missing"),
        ({"model": 3}, "mine.json: model: 3: must be a text"),
        ({"seed": "1"}, 'mine.json: seed: "1": must be a whole number'),
        ({"seed": True}, "mine.json: seed: true: must be a whole number"),
        ({"flags": {"trainin": ""}}, "mine.json: flags: trainin: unknown; known: training"),
        ({"flags": {"training": 3}}, "mine.json: flags:"),
        ({"flags": ["training"]}, "mine.json: flags:"),
        ({"prepare": "echo"}, 'mine.json: prepare: "echo": must be a list of commands'),
        ({"prepare": ["echo {model}"]}, "mine.json: prepare: {model}: {work} and environment variables are known"),
        ({"steps": []}, "mine.json: steps: []: must be a list"),
        ({"steps": ["third"]}, 'mine.json: steps: "third": unknown; known: first, second, silent'),
        ({"steps": [["first"]]}, "mine.json: steps: "),
        ({"steps": [{"seeds": ["1"], "steps": ["first"]}]}, "mine.json: steps: "),
        ({"steps": ["second", "first"]}, "mine.json: second needs first: this step must come before it"),
        ({"steps": ["home"]}, "mine.json: home needs A_FILE: set this environment variable"),
    ],
)
def test_settings_that_cannot_be_meant(more, message, protocol, tmp_path):
    assert f"{message}" in protocol(**more).replace(f"error: {tmp_path}/", "")
    assert not (tmp_path / "my work" / "runs").exists(), "nothing has run"


@pytest.mark.parametrize("text", ["", "[1]", '{"work": ', "\xff", "[" * 100_000])
def test_settings_that_cannot_be_read(text, tmp_path, monkeypatch):
    script = load_script("reproduce/run.py")
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    for path in (tmp_path / "a.json", tmp_path / "none.json"):
        monkeypatch.setattr(sys, "argv", ["run.py", str(path)])
        with pytest.raises(SystemExit, match=f"error: {path}: "):
            script.main()


def test_the_time_left_is_that_of_the_committed_records(tmp_path):
    script = load_script("reproduce/run.py")
    for name, seconds in (("one", 5400), ("two", 600)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"wall_seconds": seconds}))
    assert script.time_left(["one", "two"], [], tmp_path) == "about 1.7 h left"
    assert script.time_left(["two"], [3], tmp_path) == "about 10 min left"
    assert script.time_left(["two", "three"], [60, 120], tmp_path) == "about 12 min left"
    assert script.time_left(["three"], [], tmp_path) == "time left not known yet"


def test_ctrl_c_waits_for_the_command_that_runs(tmp_path):
    saves = "trap 'sleep 0.5; touch {work}/saved; exit 1' INT; touch {work}/ready; while true; do sleep 0.1; done"
    settings = {"work": str(tmp_path), "model": "gpt2", "seed": 1, "steps": ["lora_fp32"], "prepare": [saves]}
    (tmp_path / "mine.json").write_text(json.dumps(settings))
    command = [sys.executable, ROOT / "reproduce" / "run.py", tmp_path / "mine.json"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job's children ignore it
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=heard)
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    time.sleep(1)  # a busy run.py may still be starting the command
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) == 130 and (tmp_path / "saved").exists()


@pytest.mark.parametrize("scale", SCALES)
def test_settings_of_the_scales_are_right(scale, monkeypatch):
    script = load_script("reproduce/run.py")
    names = ("TEXT_FILE", "VALIDATION_TEXT", "TOKENIZER", "TRAIN_FILE", "VALIDATION_FILE", "SMALL_WORK", "TOPICS")
    for name in (*names, "SMALL_GPT2"):
        monkeypatch.setenv(name, "there")
    path = ROOT / "reproduce" / "settings" / f"{scale}.json"
    settings = script.read_settings(path)
    names = [name for name, _ in script.plan(settings, path, "w", settings["seed"])]
    assert len(names) == len(set(names)) and set(settings["flags"]) <= script.FLAGS
    if scale == "tiny":
        committed = {record.stem for record in (ROOT / "results" / "quickstart").glob("*.json")}
        assert set(names) == committed


@pytest.mark.parametrize(
    ("words", "work", "message"),
    [
        ([], "new", "usage: bash reproduce/run.sh gpt2|small|tiny|SETTINGS.json"),
        (["--dry_run"], "new", "usage: bash reproduce/run.sh"),
        (["small"], "mine", "has content that is not of this script"),
        (["small"], "gpt2", "holds results of other settings"),
    ],
)
def test_what_the_shell_script_refuses(words, work, message, python_stub, tmp_path):
    environment, calls = python_stub
    for name, text in (("mine/notes.txt", "mine"), ("gpt2/.reproduce", "gpt2")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["bash", ROOT / "reproduce" / "run.sh", *words],
        env=environment | {"WORK": str(tmp_path / work)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr
    assert not calls() and sorted(os.listdir(tmp_path / "mine")) == ["notes.txt"]
