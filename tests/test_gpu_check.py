"""gpu_check.py: stages with limits, a summary after each, an exit status; the whole path on a CPU is slow."""

import json
import os
import subprocess
import sys
import time

import pytest

from conftest import ROOT, load_script

Checks = load_script("tests/gpu_check.py").Checks


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_stages_fail_alone_and_are_all_in_the_summary(tmp_path, capsys):
    checks = Checks(tmp_path / "out", 60)
    checks.skip("fp16", "needs a GPU")
    checks.stage("good", 30, ["bash", "-c", "echo $WHO"], WHO="me")
    checks.stage("bad", 30, ["bash", "-c", "echo why; exit 3"], ["bash", "-c", "echo never"])
    checks.stage("after", 30, ["bash", "-c", "echo here"])
    found = summary(tmp_path / "out")
    assert [stage["result"] for stage in found["stages"].values()] == ["skipped", "ok", "failed", "ok"]
    assert found["stages"]["good"]["tail"] == "me\n" and found["stages"]["bad"]["tail"] == "why\n\nexit status 3"
    assert not found["ok"] and not checks.ok() and found["metrics"] == {"failed": 1} and found["versions"]["torch"]
    assert "fp16: needs a GPU" in capsys.readouterr().out
    assert "never" not in (tmp_path / "out" / "log.txt").read_text().replace("echo never", "")


def test_a_stage_that_takes_too_long_is_stopped_with_its_children(tmp_path):
    checks, start = Checks(tmp_path, 2), time.time()
    checks.stage("long", 0.5, ["bash", "-c", f"echo begun; (sleep 3; touch '{tmp_path}/alive') & sleep 60"])
    assert "begun" in checks.stages["long"]["tail"] and "out of time" in checks.stages["long"]["tail"]
    checks.stage("rest", 60, ["sleep", "60"])  # the time of all stages together is over
    checks.stage("none", 60, ["sleep", "60"])
    assert [stage["result"] for stage in checks.stages.values()] == ["failed"] * 3 and time.time() - start < 20
    time.sleep(max(0, 4 - (time.time() - start)))
    assert not (tmp_path / "alive").exists()


@pytest.mark.slow
def test_the_whole_path_runs_dry(tmp_path):
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "tests" / "gpu_check.sh", tmp_path / "my out", "--dry_run"]
    subprocess.run(command, cwd="/", env=environment, check=True)
    found = summary(tmp_path / "my out")
    assert found["ok"] and len(found["stages"]) == 11
    for name in ("bench_step", "bench_step_joint", "bench_forward"):
        record = json.loads((tmp_path / "my out" / f"{name}.json").read_text())
        assert record["command"] and record["git"] and record["metrics"]["variants"]
