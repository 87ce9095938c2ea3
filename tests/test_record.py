"""record.py: what a command line keeps to itself, files that appear whole, state that is checked when it is read."""

import json
import logging
import os
import subprocess
import sys

import pytest
from torch import distributed

from common import record
from conftest import experiment
from models.errors import UserError

with experiment("switch_precision"):
    import export
    import run_qa
    import run_qa_eval

SECRET = "s3cret-Word"
LOOKS_LIKE_ONE = "hf_" + "aB3" * 9


# ---- tokens


@pytest.mark.parametrize(
    "words",
    [
        ("--token", SECRET),
        (f"--token={SECRET}",),
        ("--hub_token", SECRET),
        (f"--hub_token={SECRET}",),
        ("--hub-token", SECRET),
        (f"--hub-token={SECRET}",),
        ("--push_to_hub_token", SECRET),
        (f"--push-to-hub-token={SECRET}",),
        ("--hub_t", SECRET),
        (f"--hub-to={SECRET}",),
        ("--wandb_token", SECRET),
        ("--run_name", f"https://me:{LOOKS_LIKE_ONE}@host/x"),
        (f"--run_name={LOOKS_LIKE_ONE}",),
    ],
)
def test_command_line_shows_no_token(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_qa.py", "--seed", "1", *words, "--lr", "2"])
    shown = record.command_line()
    assert SECRET not in shown and LOOKS_LIKE_ONE not in shown and "***" in shown
    shown = shown.replace("'", "")  # the shell's quotes
    assert shown.startswith("python run_qa.py --seed 1 --") and shown.endswith(" --lr 2")
    message = record.hide_tokens(f"refused: {words}")
    assert SECRET not in message and LOOKS_LIKE_ONE not in message and message.startswith("refused: ")


def test_other_flags_are_kept_as_typed(monkeypatch):
    words = "--tokenizer_name gpt2 --candidate_tokens train --max_new_tokens 8 --push_to_hub True --hub_model_id me/x"
    monkeypatch.setattr(sys, "argv", ["run_qa.py", *words.split(), "--output_dir=" + os.path.abspath("out")])
    assert record.command_line() == f"python run_qa.py {words} --output_dir=out"


@pytest.mark.parametrize(
    "words",
    [
        ("--push_to_hub_token", SECRET),
        (f"--hub={SECRET}",),
        (f"--unknown={LOOKS_LIKE_ONE}",),
        ("--seed", LOOKS_LIKE_ONE),
    ],
)
@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (run_qa.main, ("--output_dir", "x")),
        (run_qa_eval.main, ("--output_dir", "x", "--model_name_or_path", "y")),
        (export.main, ("--model_name_or_path", "y")),
    ],
)
def test_refused_flags_show_no_token(main, flags, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", *flags, *words])
    with pytest.raises(SystemExit) as stop, run_qa.plain_errors():
        main()
    said = f"{stop.value} {capsys.readouterr().err}"
    assert SECRET not in said and LOOKS_LIKE_ONE not in said and "***" in said


# ---- files


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_killed_writers_are_removed_and_those_of_living_ones_stay(tmp_path):
    path = tmp_path / "a[1].json"
    for name in (f"a[1].json.{dead_process()}.tmp", f"a[1].json.{os.getppid()}.tmp", "a[1].json.mine.tmp", "b.1.tmp"):
        (tmp_path / name).write_text("half")
    record.write_json_atomic(path, {})
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["a[1].json", f"a[1].json.{os.getppid()}.tmp", "a[1].json.mine.tmp", "b.1.tmp"]
    )


def test_killed_writer_leaves_the_old_file_and_the_next_write_cleans_up(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = "import os, sys\nfrom common import record\n"
    code += "with record.atomic_path(sys.argv[1]) as name:\n open(name, 'w').write('half')\n"
    where = os.path.dirname(os.path.dirname(record.__file__))
    done = subprocess.run([sys.executable, "-c", code + " os.kill(os.getpid(), 9)", str(path)], cwd=where)
    assert done.returncode == -9 and path.read_text() == "old" and len(os.listdir(tmp_path)) == 2
    record.write_text_atomic(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("name", ["open", "fsync", "replace"])
def test_full_disk_leaves_the_old_file_and_nothing_else(name, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    record.write_json_atomic(path, {"old": 1})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*(("builtins.open", full) if name == "open" else (os, name, full)))
        with pytest.raises(OSError, match="No space left"):
            record.write_json_atomic(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(tmp_path) == ["a.json"]


def test_file_and_folder_are_synced(tmp_path, monkeypatch):
    synced, original = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor)) or original(descriptor))
    record.write_text_atomic(tmp_path / "a", "x")
    assert [one.st_ino for one in synced] == [os.stat(tmp_path / "a").st_ino, os.stat(tmp_path).st_ino]


# ---- state


def test_state_comes_back_and_every_damage_is_named_once(tmp_path, caplog):
    path, state = tmp_path / "state.json", {"rows": [0.1, {"b": "Rône", "a": None}], "seconds": 1e-9}
    assert record.read_state(path) is None and not caplog.records
    record.write_state(path, state)
    assert record.read_state(path) == state and not caplog.records
    whole = path.read_bytes()
    damages = [b"", whole[: len(whole) // 2], b"[]", b"3", b"\xff\xfe", json.dumps(state).encode()]
    for at in range(len(whole)):
        damages.append(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    for damage in damages:
        path.write_bytes(damage)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = record.read_state(path)
        if found is None:
            assert [str(path) in message for message in caplog.messages] == [True]
            with pytest.raises(UserError, match="state.json: damaged"):
                record.load_state(path)
        else:  # a flipped bit in the layout or in how a number is written, not in the content
            assert found == state


def test_a_script_that_is_done_leaves_its_process_group():
    """Whose threads can abort the process at its exit; one that failed does not wait for the others."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(SystemExit), run_qa.plain_errors():
            raise FloatingPointError("no")
        assert distributed.is_initialized()
        with run_qa.plain_errors():
            pass
        assert not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
