"""Checks of a machine with one GPU in one call: tests on CUDA, trainings through torchrun, times at GPT-2 124M size.

    bash tests/gpu_check.sh FOLDER --dry_run

Every stage has a time limit of its own, and all of them together have --seconds. FOLDER/summary.json is written after
every stage: {"device", "versions", "stages": {name: {"result", "seconds", "tail"}}, "ok"}; log.txt has all output.
Without a GPU, as with --dry_run, sizes are small; on a CPU what needs a GPU is skipped with its reason.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "base_model"))
from common.record import run_record, write_json_atomic  # noqa: E402

TAIL = 2000  # characters of a stage's output in the summary
FINITE = """
import json, math, sys
record = json.load(open(sys.argv[1]))
found = {name: value for name, value in record["metrics"].items() if isinstance(value, float)}
print(record["dtype"], "world size", record["world_size"], record["device"], found)
assert record["dtype"] == f"{sys.argv[2]}, evaluated in fp32", record["dtype"]
assert found and all(map(math.isfinite, found.values())), record["metrics"]
"""


class Checks:
    """Runs stages and keeps the summary. folder: where it goes; seconds: for all stages together."""

    def __init__(self, folder, seconds):
        self.folder, self.seconds, self.started, self.stages = folder, seconds, time.time(), {}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").write_text("")

    def skip(self, name, reason):
        self.finish(name, "skipped", 0, reason)

    def stage(self, name, limit, *commands, **environment):
        """Runs the commands one after the other, together for at most `limit` seconds."""
        start, result, tail = time.time(), "ok", ""
        limit = min(limit, self.seconds - (start - self.started))
        for command in commands:
            left = limit - (time.time() - start)
            code, output = run(command, left, os.environ | environment) if left > 0 else (None, "")
            tail = (tail + output)[-TAIL:]
            with open(self.folder / "log.txt", "a", encoding="utf-8") as log:
                log.write(f"==== {name}: {' '.join(map(str, command))}\n{output}\n")
            if code != 0:
                result = "failed"
                tail += "\nstopped: out of time" if code is None else f"\nexit status {code}"
                break
        self.finish(name, result, time.time() - start, tail)

    def finish(self, name, result, seconds, tail):
        self.stages[name] = {"result": result, "seconds": round(seconds, 1), "tail": tail}
        print(f"{result:8s}{seconds:7.1f} s  {name}{'' if result == 'ok' else ': ' + tail}".rstrip(), flush=True)
        record = run_record(
            model="tiny stand-in; GPT-2 124M size with random weights in bench_*",
            bit_config=None,
            metrics={"failed": sum(stage["result"] == "failed" for stage in self.stages.values())},
            data={},
            seed=None,
            wall_seconds=time.time() - self.started,
            stages=self.stages,
            ok=self.ok(),
        )
        write_json_atomic(self.folder / "summary.json", record)

    def ok(self):
        return all(stage["result"] != "failed" for stage in self.stages.values())


def stop(process):
    """End a process and its children, if it still runs."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)


def run(command, seconds, environment):
    """(exit status, output); the status is None for a command that was stopped for its time, children included."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*map(str, command)], cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # after Ctrl-C too; torchrun passes SIGTERM on to its workers
            stop(process)
        output.seek(0)
        return code, output.read().decode("utf-8", "replace")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where summary.json, log.txt and bench_*.json go")
    parser.add_argument("--dry_run", action="store_true", help="small sizes, to try the path (without a GPU: always)")
    parser.add_argument("--seconds", type=float, help="for all stages together (default: 480, on a CPU 1800)")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    small = args.dry_run or not cuda
    slower, python = 1 if cuda else 5, sys.executable
    checks = Checks(args.folder.resolve(), args.seconds or (480 if cuda else 1800))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NPROC_PER_NODE": "1"}

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        work = Path(work)
        os.environ["HF_HOME"] = str(work / "huggingface")
        chosen = ["-m", "gpu"] if cuda else ["-m", "not gpu", "tests/test_gpu.py"]
        pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *chosen]
        checks.stage("tests", 150 * slower, pytest)

        data, model = work / "data", work / "model"
        paragraphs = ("40", "10", "300") if small else ("400", "50", "3000")
        sizes = zip(("--train_paragraphs", "--dev_paragraphs", "--pretrain_documents"), paragraphs, strict=True)
        steps, layers = ("3", "1") if small else ("200", "4")
        checks.stage(
            "model",
            60 * slower,
            [python, "quickstart/make_data.py", "--output_dir", data, *(word for size in sizes for word in size)],
            [python, "quickstart/make_model.py", "--data_dir", data, "--output_dir", model]
            + ["--max_steps", steps, "--n_layer", layers],
        )

        common = ["--max_seq_length", "256", "--max_steps", "3" if small else "40", "--learning_rate", "1e-3"]
        common += ["--calibration_samples", "64"]
        common += ["--eval_strategy", "no", "--save_strategy", "no", "--logging_steps", "5", "--report_to", "none"]
        common += ["--per_device_eval_batch_size", "64", "--disable_tqdm", "True"] + ([] if cuda else ["--use_cpu"])
        files = {"TRAIN_FILE": str(data / "train.json"), "VALIDATION_FILE": str(data / "dev.json")}
        trainings = {
            "base_model": ["--bit_widths", "4"],
            "switch_precision": ["--bit_widths", "4", "8"],
            "cpt": ["--num_cyclic_period", "2", "--per_device_train_batch_size", "16"],
        }
        for folder, flags in trainings.items():
            for dtype, precision in (("bf16", ["--bf16"]), ("fp16", ["--fp16"])):
                name = f"{folder} {dtype}"
                if dtype == "fp16" and not cuda:
                    checks.skip(name, "fp16 needs a GPU")
                    continue
                out = work / "runs" / name.replace(" ", "_")
                train = ["bash", f"{folder}/train.sh", *common, *flags, *precision]
                check = [python, "-c", FINITE, out / "record.json", dtype]
                checks.stage(name, 60 * slower, train, check, MODEL=str(model), OUTPUT_DIR=str(out), **files)

        size = ["--layers", "1", "--rounds", "1", "--batch_size", "1", "--length", "32"]
        for name, batch in (("bench_step", "16"), ("bench_step_joint", "16"), ("bench_forward", "32")):
            flags = ["--joint"] * name.endswith("joint")
            sizes = size if small else ["--rounds", "20", "--batch_size", batch]
            command = [python, f"benchmark/{name.removesuffix('_joint')}.py", *flags, *sizes]
            checks.stage(name, 60 * slower, [*command, "--output", checks.folder / f"{name}.json"])

    print(json.dumps({name: stage["result"] for name, stage in checks.stages.items()}))
    return 0 if checks.ok() else 1


if __name__ == "__main__":
    sys.exit(main())
