"""The copy check itself is tested here in a small mock repository, and then applied to the real one."""

import ast
import sys

import pytest

import check_copies
from conftest import ROOT

FILES = {
    "base_model/common.sh": "set -e\n",
    "base_model/common/data.py": "rows = 1\n",
    "base_model/models/fast/kernels.c": "int x;\n",
    "base_model/run_qa.py": "import base\n",
    "cpt/common.sh": "set -e\n",
    "cpt/common/data.py": "rows = 1\n",
    "cpt/models/fast/kernels.c": "int x;\n",
    "cpt/run_qa.py": "import cpt\n",
    "switch_precision/common/data.py": "rows = 1\n",
    "switch_precision/common/step_configs.py": "steps = 1\n",
    "language_model/common/step_configs.py": "steps = 1\n",
}


@pytest.fixture
def repo(tmp_path):
    for path, text in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


@pytest.fixture
def run(repo, monkeypatch, capsys):
    """run(*flags): (exit code, lines printed)."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["check_copies.py", "--root", str(repo), *flags])
        return check_copies.main(), capsys.readouterr().out.splitlines()

    return call


def content(repo):
    return {path: (repo / path).read_text() for path in FILES}


@pytest.mark.parametrize("flags", [(), ("--fix",)])
def test_copies_in_sync_and_files_that_folders_have_of_their_own(flags, run, repo):
    assert run(*flags) == (0, ["5 copies in sync"])
    assert content(repo) == FILES


@pytest.mark.parametrize(
    ("path", "original"),
    [
        ("cpt/common/data.py", "base_model"),
        ("cpt/common.sh", "base_model"),
        ("cpt/models/fast/kernels.c", "base_model"),
        ("language_model/common/step_configs.py", "switch_precision"),
    ],
)
@pytest.mark.parametrize(
    "edit", [lambda text: text + "\n", str.upper, lambda text: ""], ids=["added", "other", "empty"]
)
def test_one_edit_is_found_and_the_original_comes_back(path, original, edit, run, repo):
    edited = edit(FILES[path])
    (repo / path).write_text(edited)
    line = f"{path} differs from {original}/{path.partition('/')[2]}"
    code, lines = run()
    assert code == 1 and lines[0] == line and len(lines) == 2 and "--fix" in lines[1]
    assert (repo / path).read_text() == edited, "a check alone writes nothing"
    assert run("--fix") == (0, [line, "5 copies rewritten where they differed"])
    assert content(repo) == FILES and run()[0] == 0


def test_an_edited_original_reaches_all_its_copies(run, repo):
    (repo / "base_model/common/data.py").write_text("rows = 2\n")
    assert run("--fix")[0] == 0
    assert {text for path, text in content(repo).items() if path.endswith("data.py")} == {"rows = 2\n"}


def test_this_repository_is_in_sync(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_copies.py"])
    assert check_copies.main() == 0, capsys.readouterr().out


def used_files(folder):
    """Files of a folder that its scripts import, transitively, with what these open by its path."""
    found, waiting = set(), list(folder.glob("*.py"))
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found |= {path, *(parent / "__init__.py" for parent in path.parents if parent.is_relative_to(folder))}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                waiting += [folder / f"{alias.name.replace('.', '/')}.py" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = path.parents[node.level - 1] if node.level else folder
                module = start.joinpath(*(node.module or "").split("."))
                waiting += [module.with_suffix(".py"), *(module / f"{alias.name}.py" for alias in node.names)]
            elif isinstance(node, ast.Constant) and node.value in ("kernels.c", "attention.c"):
                found |= {path.with_name(node.value), path.with_name("vectors.h")}
            elif isinstance(node, ast.Constant) and node.value == "squad_metric":
                waiting.append(path.parent / "squad_metric" / "squad_metric.py")
    return found


@pytest.mark.parametrize("name", check_copies.FOLDERS)
def test_a_folder_holds_only_what_it_uses(name):
    folder = ROOT / name
    held = {path for kind in ("py", "c", "h") for path in folder.rglob(f"*.{kind}")}
    assert sorted(str(path.relative_to(folder)) for path in held - used_files(folder)) == []
