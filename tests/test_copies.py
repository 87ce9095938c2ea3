"""The copy check itself is tested here in a small mock repository, and then applied to the real one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import check_copies

ROOT = Path(__file__).resolve().parents[1]
WHOLE = "# Copied from base_model/utils_qa.py\n"
OBJECT = "# Copied from base_model/run_qa.py:parse_args\n"
UTILS = '"""Features."""\n\nimport json\n\n\ndef features(text):\n    return json.loads(text)\n'
PARSE_ARGS = '@cache\n@staged(\n    1,\n)\ndef parse_args(argv):\n    """One line."""\n    return argv  # kept\n'
TRAINER = "class Trainer:\n    steps = 1\n\n    def train(self):\n        return self.steps"
SHELL = "#!/usr/bin/env bash\n# Trains.\nset -euo pipefail\n"


@pytest.fixture
def repo(tmp_path):
    write = {
        "base_model/utils_qa.py": UTILS,
        "base_model/run_qa.py": f"import base\n\n\n{PARSE_ARGS}\n\n{TRAINER}",
        "base_model/train.sh": SHELL,
        "base_model/models/__init__.py": "",
        "cpt/utils_qa.py": WHOLE + UTILS,
        "cpt/models/__init__.py": "# Copied from base_model/models/__init__.py\n",
        "cpt/run_qa.py": f"import cpt\n\n{OBJECT}{PARSE_ARGS}\nperiods = 32\n\n\n"
        f"# Copied from base_model/run_qa.py:Trainer\n{TRAINER}\n",
        "switch_precision/utils_qa.py": WHOLE + UTILS,
        "switch_precision/run_qa.py": f"{OBJECT}{PARSE_ARGS}",
        "switch_precision/train.sh": SHELL.replace("# Tr", "# Copied from base_model/train.sh\n# Tr"),
    }
    for path, text in write.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def run(repo, *flags):
    command = [sys.executable, ROOT / "tests" / "check_copies.py", "--root", repo, *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repo)
    return done.returncode, done.stdout + done.stderr


def edit(repo, path, old, new):
    text = (repo / path).read_text()
    assert text.count(old) == 1
    (repo / path).write_text(text.replace(old, new))


def snapshot(repo):
    return {path: path.read_bytes() for path in repo.rglob("*") if path.is_file()}


def faults(repo):
    code, output = run(repo)
    assert code == 1
    *listed, repair = output.splitlines()
    assert repair.startswith("Repair: python tests/check_copies.py --fix")
    return listed


def test_clean_tree_passes(repo):
    assert run(repo) == (0, "7 copies in sync\n")
    before = snapshot(repo)
    assert run(repo, "--fix") == (0, "7 copies in sync\n")
    assert snapshot(repo) == before


@pytest.mark.parametrize(
    ("path", "old", "new", "original", "line"),
    [
        pytest.param("cpt/utils_qa.py", "features(", "feature(", "base_model/utils_qa.py", 7, id="file"),
        pytest.param("cpt/utils_qa.py", "(text)\n", "(text)", "base_model/utils_qa.py", 9, id="no-final-newline"),
        pytest.param("cpt/utils_qa.py", "json\n", "json\r\n", "base_model/utils_qa.py", 4, id="carriage-return"),
        pytest.param(
            "cpt/utils_qa.py", "    return json.loads(text)\n", "", "base_model/utils_qa.py", 8, id="shorter"
        ),
        pytest.param("cpt/models/__init__.py", "py\n", "py\nx = 1\n", "base_model/models/__init__.py", 2, id="longer"),
        pytest.param("cpt/run_qa.py", "# kept", "# Kept", "base_model/run_qa.py:parse_args", 10, id="function"),
        pytest.param("cpt/run_qa.py", "    1,", "    2,", "base_model/run_qa.py:parse_args", 6, id="decorator"),
        pytest.param("cpt/run_qa.py", "@cache\n", "", "base_model/run_qa.py:parse_args", 4, id="decorator-gone"),
        pytest.param("cpt/run_qa.py", "steps = 1", "steps = 2", "base_model/run_qa.py:Trainer", 17, id="class"),
        pytest.param("switch_precision/train.sh", "-euo", "-eu", "base_model/train.sh", 4, id="shell"),
        pytest.param("switch_precision/train.sh", "env bash", "env sh", "base_model/train.sh", 1, id="shebang"),
    ],
)
def test_one_edit_is_found_at_its_line_and_fix_restores_the_exact_text(repo, path, old, new, original, line):
    before = snapshot(repo)
    text = (repo / path).read_bytes()
    assert text.count(old.encode()) == 1
    (repo / path).write_bytes(text.replace(old.encode(), new.encode()))
    assert faults(repo) == [f"- {path}: copy does not match {original} at line {line}"]
    code, output = run(repo, "--fix")
    assert code == 0 and output.endswith("7 copies in sync\n")
    assert f"{path} (discarded)" in output
    assert snapshot(repo) == before


def test_copies_of_c_files(repo):
    original, copy = repo / "base_model/models/kernels.c", repo / "cpt/models/kernels.c"
    original.write_text("/* doc */\nint x;\n")
    copy.write_text("// Copied from base_model/models/kernels.c\n/* doc */\nint x;\n")
    assert run(repo) == (0, "8 copies in sync\n")
    edit(repo, "cpt/models/kernels.c", "x;", "y;")
    assert faults(repo) == ["- cpt/models/kernels.c: copy does not match base_model/models/kernels.c at line 3"]
    assert run(repo, "--fix")[0] == 0 and copy.read_text().endswith("int x;\n")


def test_an_edited_original_reaches_all_its_copies(repo):
    edit(repo, "base_model/run_qa.py", "# kept", "# changed")
    edit(repo, "base_model/train.sh", "# Trains.", "# Trains for an hour.")
    assert faults(repo) == [
        "- cpt/run_qa.py: copy does not match base_model/run_qa.py:parse_args at line 10",
        "- switch_precision/run_qa.py: copy does not match base_model/run_qa.py:parse_args at line 8",
        "- switch_precision/train.sh: copy does not match base_model/train.sh at line 3",
    ]
    assert run(repo, "--fix")[0] == 0
    assert (repo / "cpt/run_qa.py").read_text().count("# changed") == 1
    assert (repo / "switch_precision/train.sh").read_text().splitlines()[2] == "# Trains for an hour."


def test_fix_keeps_the_file_mode_and_leaves_no_temporary_file(repo):
    (repo / "switch_precision/train.sh").chmod(0o755)
    names = set(snapshot(repo))
    edit(repo, "switch_precision/train.sh", "-euo", "-eu")
    assert run(repo, "--fix")[0] == 0
    assert os.stat(repo / "switch_precision/train.sh").st_mode & 0o777 == 0o755
    assert set(snapshot(repo)) == names


def test_fix_shows_what_it_discards(repo):
    edit(repo, "cpt/utils_qa.py", "return json", "return 3 * json")
    output = run(repo, "--fix")[1]
    assert "-    return 3 * json.loads(text)" in output
    assert "+    return json.loads(text)" in output


@pytest.mark.parametrize("given", ["cpt/utils_qa.py", "./cpt/utils_qa.py", "{repo}/cpt/utils_qa.py"])
def test_promote_makes_a_whole_file_copy_the_original(repo, given):
    edit(repo, "cpt/utils_qa.py", "return json", "return 3 * json")
    edited = UTILS.replace("return json", "return 3 * json")
    code, output = run(repo, "--promote", given.format(repo=repo))
    assert code == 0, output
    assert (repo / "base_model/utils_qa.py").read_text() == edited
    assert (repo / "cpt/utils_qa.py").read_text() == WHOLE + edited
    assert (repo / "switch_precision/utils_qa.py").read_text() == WHOLE + edited
    assert "-    return json.loads(text)" in output


def test_promote_of_the_opposite_edit_restores_everything(repo):
    before = snapshot(repo)
    for old, new in (("return json", "return 3 * json"), ("return 3 * json", "return json")):
        edit(repo, "cpt/utils_qa.py", old, new)
        assert run(repo, "--promote", "cpt/utils_qa.py")[0] == 0
    assert snapshot(repo) == before


def test_promote_takes_every_governed_object_of_the_file_and_nothing_else(repo):
    edit(repo, "cpt/run_qa.py", "return argv  # kept", "argv = argv[1:]\n    return argv")
    edit(repo, "cpt/run_qa.py", "steps = 1", "steps = 2")
    edit(repo, "cpt/run_qa.py", "periods = 32", "periods = 16")
    assert run(repo, "--promote", "cpt/run_qa.py")[0] == 0
    changed = PARSE_ARGS.replace("return argv  # kept", "argv = argv[1:]\n    return argv")
    original = f"import base\n\n\n{changed}\n\n{TRAINER.replace('1', '2')}"
    assert (repo / "base_model/run_qa.py").read_text() == original
    assert (repo / "switch_precision/run_qa.py").read_text() == OBJECT + changed
    assert "periods = 16" in (repo / "cpt/run_qa.py").read_text()


def test_promote_of_a_shell_script(repo):
    edit(repo, "switch_precision/train.sh", "# Trains.", "# Trains for an hour.")
    assert run(repo, "--promote", "switch_precision/train.sh")[0] == 0
    assert (repo / "base_model/train.sh").read_text() == SHELL.replace("Trains.", "Trains for an hour.")


def test_promote_leaves_unrelated_edits_alone(repo):
    edit(repo, "cpt/utils_qa.py", "return json", "return 3 * json")
    edit(repo, "cpt/run_qa.py", "steps = 1", "steps = 2")
    code, output = run(repo, "--promote", "cpt/utils_qa.py")
    assert code == 1
    assert "- cpt/run_qa.py: copy does not match base_model/run_qa.py:Trainer at line 17" in output
    assert "steps = 2" in (repo / "cpt/run_qa.py").read_text()


@pytest.mark.parametrize("path", ["base_model/utils_qa.py", "cpt/missing.py", "../outside.py"])
def test_promote_refuses_a_file_without_marker(repo, path):
    before = snapshot(repo)
    code, output = run(repo, "--promote", path)
    assert code == 2
    assert f"--promote {path}: no usable marker there" in output
    assert snapshot(repo) == before


def test_fix_and_promote_need_a_usable_original(repo):
    (repo / "base_model/utils_qa.py").rename(repo / "base_model/utils.py")
    edit(repo, "cpt/run_qa.py", "run_qa.py:Trainer\nclass Trainer", "run_qa.py:Other\nclass Other")
    expected = [
        "- cpt/run_qa.py: original base_model/run_qa.py has no top-level function or class Other",
        "- cpt/utils_qa.py: original base_model/utils_qa.py does not exist",
        "- switch_precision/utils_qa.py: original base_model/utils_qa.py does not exist",
    ]
    assert faults(repo) == expected
    before = snapshot(repo)
    code, output = run(repo, "--fix")
    assert code == 1 and output.splitlines()[:-1] == expected
    assert run(repo, "--promote", "cpt/utils_qa.py")[0] == 2
    assert snapshot(repo) == before


@pytest.mark.parametrize(
    ("path", "text", "line"),
    [
        pytest.param("x.py", "#copied from base_model/utils_qa.py\n" + UTILS, 1, id="spelling"),
        pytest.param("x.py", "# Copied from ../base_model/utils_qa.py\n" + UTILS, 1, id="outside"),
        pytest.param("x.py", "# Copied from base_model/train.sh\n", 1, id="other-kind-of-file"),
        pytest.param("x.py", "# Copied from base_model/utils_qa.py, shortened\n" + UTILS, 1, id="prose"),
        pytest.param("x.py", "\n" + WHOLE + UTILS, 2, id="whole-file-marker-on-line-2"),
        pytest.param("x.sh", SHELL + "# Copied from base_model/train.sh\n", 4, id="shell-marker-on-line-4"),
        pytest.param("x.sh", "# Copied from base_model/run_qa.py:parse_args\n", 1, id="object-in-shell"),
        pytest.param("x.py", OBJECT + "\n" + PARSE_ARGS, 1, id="blank-line-below"),
        pytest.param("x.py", PARSE_ARGS.replace("def", OBJECT + "def"), 5, id="below-the-decorator"),
        pytest.param("x.py", OBJECT + PARSE_ARGS.replace("parse_args", "parse"), 1, id="another-name"),
        pytest.param("x.py", OBJECT + "parse_args = 1\n", 1, id="no-function-or-class"),
        pytest.param("x.py", f"class A:\n    {OBJECT}    def parse_args(self):\n        pass\n", 2, id="method"),
        pytest.param("x.py", "x = 1\n" + OBJECT, 2, id="end-of-file"),
    ],
)
def test_malformed_marker(repo, path, text, line):
    (repo / path).write_text(text)
    message = f"- {path}: malformed marker at line {line}: {check_copies.WANTED}"
    assert faults(repo) == [message]
    assert run(repo, "--fix")[0] == 1
    assert (repo / path).read_text() == text


@pytest.mark.parametrize(
    ("path", "text"),
    [
        pytest.param("x.py", "# Copied from cpt/utils_qa.py\n" + UTILS, id="file-of-file"),
        pytest.param(
            "x.py", "# Copied from cpt/utils_qa.py:features\ndef features(text):\n    pass\n", id="object-of-file"
        ),
        pytest.param("x.py", "# Copied from cpt/run_qa.py:Trainer\n" + TRAINER, id="object-of-object"),
        pytest.param("x.py", "# Copied from x.py\n" + UTILS, id="itself"),
    ],
)
def test_original_that_is_itself_a_copy(repo, path, text):
    (repo / path).write_text(text)
    source = text.split()[3].split(":")[0]
    assert faults(repo) == [f"- {path}: original {source} is itself a copy: name the first original"]


def test_whole_file_copy_of_a_file_that_contains_a_copied_object(repo):
    (repo / "adv_attack").mkdir()
    marker = "# Copied from cpt/run_qa.py\n"
    (repo / "adv_attack/run_qa.py").write_text(marker + (repo / "cpt/run_qa.py").read_text())
    assert run(repo) == (0, "8 copies in sync\n")
    edit(repo, "base_model/run_qa.py", "# kept", "# changed")
    assert run(repo, "--fix")[0] == 0  # in one pass: cpt/run_qa.py first, then its copy
    assert (repo / "adv_attack/run_qa.py").read_text() == marker + (repo / "cpt/run_qa.py").read_text()


def test_a_copy_that_does_not_parse_is_reported_and_a_whole_file_is_still_repaired(repo):
    edit(repo, "cpt/utils_qa.py", "def features(", "def features")
    edit(repo, "cpt/run_qa.py", "periods = 32", "periods =")
    listed = faults(repo)
    assert "- cpt/utils_qa.py: copy does not match base_model/utils_qa.py at line 7" in listed
    assert any(line.startswith("- cpt/run_qa.py: invalid syntax") for line in listed)
    run(repo, "--fix")
    assert (repo / "cpt/utils_qa.py").read_text() == WHOLE + UTILS


@pytest.mark.parametrize("folder", [".hidden", "tests", "env", "cpt/results/checkpoint-5"])
def test_folders_that_are_not_scanned(repo, folder):
    (repo / folder).mkdir(parents=True)
    (repo / folder / "utils_qa.py").write_text(WHOLE + "drifted")
    marker = {"env": "pyvenv.cfg", "cpt/results/checkpoint-5": "config.json"}.get(folder, "other.txt")
    (repo / folder / marker).write_text("")
    assert run(repo) == (0, "7 copies in sync\n")


def test_this_repository_is_in_sync():
    assert check_copies.check(ROOT)[1] == []
