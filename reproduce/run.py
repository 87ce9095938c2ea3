#!/usr/bin/env python
"""Run the protocol at the scale of a settings file: the steps of steps.py, in the order of the file.

    python reproduce/run.py gpt2 --dry_run              print every command
    python reproduce/run.py small --work DIR            run what has no record yet; killed steps resume
    python reproduce/run.py small --only lora_fp32      some steps
    python reproduce/run.py small --jobs 8              side by side, each after those that it needs, for a large GPU

reproduce/run.sh and quickstart/run.sh call it, once at a time.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from steps import STEPS

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("description", "work", "model", "classifier_model", "train_file", "validation_file", "hybrid", "results")
KEYS = (*TEXTS, "seed", "environment", "flags", "prepare", "steps", "finish")
NAME = re.compile(r"\{(\+?\w+)\}")
# Variables that the scripts read and no step sets: those of the user's shell do not reach them.
OF_SCRIPTS = ("BIT_CONFIG", "DATASET", "ATTACK_BITS", "REFERENCE_MODEL")
FLAGS = {name[1:] for command in STEPS.values() for name in NAME.findall(command) if name.startswith("+")}


def read_settings(path):
    """The settings of a file. Raises ValueError that names file, key, value and what is allowed."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as fault:
        raise ValueError(f"{path}: not a readable JSON file: {fault}") from None

    def check(key, fits, allowed):
        value = settings.get(key)
        if key in settings and not fits(value):
            raise ValueError(f"{path}: {key}: {json.dumps(value)[:200]}: must be {allowed}")

    def texts(value, kind):
        return isinstance(value, kind) and all(
            isinstance(text, str) for text in (value.values() if kind is dict else value)
        )

    if not isinstance(settings, dict):
        raise ValueError(f"{path}: must be an object with the keys {', '.join(KEYS)}")
    for key in settings:
        if key not in KEYS:
            raise ValueError(f"{path}: {key}: unknown key; known: {', '.join(KEYS)}")
    for key in ("work", "model", "seed", "steps"):
        if key not in settings:
            raise ValueError(f"{path}: {key}: missing")
    for key in TEXTS:
        check(key, lambda value: isinstance(value, str), "a text")
    check("seed", lambda value: type(value) is int and value >= 0, "a whole number, 0 or more")
    for key in ("environment", "flags"):
        check(key, lambda value: texts(value, dict), "an object of texts")
    for key in ("prepare", "finish"):
        check(key, lambda value: texts(value, list), "a list of commands")
    for name in settings.get("flags", {}):
        if name not in FLAGS:
            raise ValueError(f"{path}: flags: {name}: unknown; known: {', '.join(sorted(FLAGS))}")
    check("steps", lambda value: isinstance(value, list) and value, "a list of step names and {seeds, steps}")
    for entry in settings["steps"]:
        seeds = entry.get("seeds") if isinstance(entry, dict) else []
        names = entry.get("steps") if isinstance(entry, dict) else [entry]
        if not (isinstance(seeds, list) and isinstance(names, list)) or any(type(seed) is not int for seed in seeds):
            raise ValueError(f'{path}: steps: {json.dumps(entry)[:200]}: must be {{"seeds": [43], "steps": ["..."]}}')
        for name in names:
            if not isinstance(name, str) or name not in STEPS:
                raise ValueError(f"{path}: steps: {json.dumps(name)}: unknown; known: {', '.join(STEPS)}")
    return settings


def fill(template, values):
    """The template with its {names} replaced, and theirs. Raises KeyError: the first name without a value."""
    while found := NAME.search(template):
        name = found[1]
        value = values["flags"].get(name[1:], "") if name.startswith("+") else values.get(name)
        if value is None and name.isupper() and os.environ.get(name):
            value = shlex.quote(os.environ[name])
        if value is None:
            raise KeyError(name)
        template = template.replace(found[0], str(value))
    return re.sub(" +", " ", template).strip()


def plan(settings, path, work, seed):
    """[(name of the run, command)] of the steps, in order. Raises ValueError: a step before one that it needs."""
    values = {key: settings.get(key, "") for key in TEXTS if key != "description"}
    values |= {"work": work, "flags": settings.get("flags", {})}
    values["classifier_model"] = values["classifier_model"] or settings["model"]
    runs = {}
    for entry in settings["steps"]:
        seeds, names = (entry["seeds"], entry["steps"]) if isinstance(entry, dict) else ([seed], [entry])
        for own_seed in seeds:
            for step in names:
                run = step if own_seed == seed else f"{step}_{own_seed}"
                done = {}
                for name in STEPS:  # of the same seed, or else of the first
                    for made in (name, f"{name}_{own_seed}"):
                        if made in runs:
                            done |= {name: f"{work}/runs/{made}", f"{name}_record": f"{work}/records/{made}.json"}
                own = {"seed": own_seed, "own": f"{work}/runs/{run}", "record": f"{work}/records/{run}.json"}
                try:
                    runs[run] = fill(STEPS[step], values | done | own)
                except KeyError as missing:
                    (name,) = missing.args
                    where = "set this environment variable" if name.isupper() else "this step must come before it"
                    raise ValueError(f"{path}: {run} needs {name.removesuffix('_record')}: {where}") from None
    return list(runs.items())


def around(settings, path, work, key):
    """The commands before or after the steps: of "prepare" or "finish". Raises ValueError: an unknown {name}."""
    try:
        return [fill(command, {"work": work, "flags": {}}) for command in settings.get(key, [])]
    except KeyError as missing:
        raise ValueError(
            f"{path}: {key}: {{{missing.args[0]}}}: {{work}} and environment variables are known"
        ) from None


def inputs_of(settings, prepare):
    """{name: sha256} of the files that environment variables name, and the commands that prepare others."""
    steps = [step for entry in settings["steps"] for step in (entry["steps"] if isinstance(entry, dict) else [entry])]
    text = json.dumps(settings) + " ".join(STEPS[step] for step in steps)
    inputs = {"prepare": prepare}
    for name in sorted(filter(str.isupper, set(NAME.findall(text)))):
        path = os.environ.get(name, "")
        if os.path.isfile(path):
            with open(path, "rb") as file:
                inputs[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return inputs


def keep_inputs(path, inputs):
    """Note the inputs in a file. Exits where an earlier call noted others: what is done has read those."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in sorted(before.keys() & inputs):
        if before[name] != inputs[name]:
            what = "prepare" if name == "prepare" else f"{name}={os.environ[name]}"
            sys.exit(
                f"error: {what}: not what the steps in {path.parents[1]} have read: put it back, or set another WORK"
            )
    path.write_text(json.dumps(before | inputs, indent=2), encoding="utf-8")


def seconds_of(records, name):
    """What a record says that its step took, or None."""
    path = records / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8-sig")).get("wall_seconds") if path.exists() else None


def time_left(waiting, done, committed, jobs=1):
    """Text: what the waiting steps took by the committed records of this scale, else the mean of those done here."""
    known = {name: seconds_of(committed, name) for name in waiting}
    mean = sum(done) / len(done) if done else None
    if not done and None in known.values():
        return "time left not known yet"
    seconds = sum(mean if known[name] is None else known[name] for name in waiting) / jobs
    return f"about {seconds / 3600:.1f} h left" if seconds >= 5400 else f"about {seconds / 60:.0f} min left"


def start(command, environment, output=None):
    """The process of a command in the root of the repository. output: a file, or None for the terminal."""
    command = ["bash", "-euo", "pipefail", "-c", command]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)


def execute(commands, environment):
    """Run commands one after the other. Exits with the status of one that fails; Ctrl-C is waited for."""
    for command in commands:
        process = start(command, environment)
        try:
            status = process.wait()
        finally:
            process.wait()
        if status:
            sys.exit(status)


class Steps:
    """Runs the steps of a plan that are not done, at most `jobs` at a time, each after those that it needs."""

    def __init__(self, steps, folder, work, jobs, committed, environment):
        self.folder, self.jobs, self.committed, self.environment = folder, jobs, committed, environment
        self.seconds, self.status = [], 0
        self.places = {name: f"reproduce: [{index}/{len(steps)}] {name}" for index, (name, _) in enumerate(steps, 1)}
        paths = re.compile(rf"{re.escape(work)}/(?:runs|records)/(\w+)")
        self.needs = {name: set(paths.findall(command)) - {name} for name, command in steps}
        self.waiting = {name: command for name, command in steps if not self.done(name)}
        for name, place in self.places.items():
            if name not in self.waiting:
                print(f"{place} is done", flush=True)
            elif self.record(name).exists():
                print(f"{place} is made anew: what it needs has changed", flush=True)
        self.running = {}  # name: (process, when it was started)

    def record(self, name):
        return self.folder / "records" / f"{name}.json"

    def done(self, name):
        """Whether the step has a record, which is not older than those of what it needs, which are done."""
        if not self.record(name).exists():
            return False
        made = self.record(name).stat().st_mtime_ns
        needs = [need for need in self.needs[name] if need in self.places or self.record(need).exists()]
        return all(
            (need not in self.places or self.done(need)) and self.record(need).stat().st_mtime_ns <= made
            for need in needs
        )

    def log(self, name):
        return self.folder / "logs" / f"{name}.txt"

    def begin(self, name):
        left = time_left([*self.running, *self.waiting], self.seconds, self.committed, self.jobs)
        command = self.waiting.pop(name)
        print(f"{self.places[name]} ({left})\n  {command}", flush=True)
        (self.folder / "commands" / f"{name}.txt").write_text(command, encoding="utf-8")
        if self.jobs == 1:
            process = start(command, self.environment)
        else:
            with open(self.log(name), "a", encoding="utf-8") as output:
                process = start(command, self.environment, output)
        self.running[name] = process, time.time()

    def end(self, name):
        process, began = self.running.pop(name)
        self.seconds.append(time.time() - began)
        fault = f"{name} failed (exit {process.returncode})" if process.returncode else None
        if fault is None and not self.done(name):
            fault = f"{name} wrote no record: {self.record(name)}"
        if fault:
            self.status = self.status or process.returncode or 1
            if self.jobs > 1:  # its output is in a file
                lines = self.log(name).read_text(encoding="utf-8", errors="replace").splitlines()
                print(*lines[-5:], f"(all of it: {self.log(name)})", sep="\n", file=sys.stderr)
            print(f"error: {fault}; the same command goes on from there", file=sys.stderr, flush=True)

    def run(self):
        """The exit status: 0, or that of the first that failed; steps that do not need it have run all the same."""
        try:
            while True:
                unfinished = {name for name in self.places if not self.done(name)}
                for name in [name for name in self.waiting if not self.needs[name] & unfinished]:
                    if len(self.running) < self.jobs:
                        self.begin(name)
                if not self.running:
                    break
                while all(process.poll() is None for process, _ in self.running.values()):
                    time.sleep(0.05)
                for name in [name for name, (process, _) in self.running.items() if process.poll() is not None]:
                    self.end(name)
        finally:  # after Ctrl-C, which has reached them too
            for process, _ in self.running.values():
                process.wait()
        if self.waiting:
            print(f"error: not run, for what they need: {' '.join(self.waiting)}", file=sys.stderr)
        return self.status


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "settings", help="a name in reproduce/settings (gpt2, small, tiny, ...), or a JSON file of that form"
    )
    parser.add_argument("--work", help="folder of runs and records (default: that of the settings)")
    parser.add_argument("--seed", type=int, help="instead of the one of the settings")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="run these alone")
    parser.add_argument("--jobs", type=int, default=1, help="steps at a time; above 1 their output is in WORK/logs")
    parser.add_argument("--dry_run", action="store_true", help="print every command, run none")
    args = parser.parse_args()
    if args.jobs < 1:
        sys.exit(f"error: --jobs {args.jobs}: allowed is 1 or more")
    path = ROOT / "reproduce" / "settings" / f"{args.settings}.json"
    if not path.exists():
        path = Path(args.settings)
    try:
        settings = read_settings(path)
        folder = (Path(args.work) if args.work else ROOT / settings["work"]).resolve()
        work = shlex.quote(str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder))
        steps = plan(settings, path, work, settings["seed"] if args.seed is None else args.seed)
        prepare, finish = (around(settings, path, work, key) for key in ("prepare", "finish"))
        names = [name for name, _ in steps]
        if unknown := set(args.only) - set(names):
            raise ValueError(f"--only {' '.join(sorted(unknown))}: not in {path}; it has {' '.join(names)}")
    except ValueError as fault:
        sys.exit(f"error: {fault}")
    if args.only:
        steps = [(name, command) for name, command in steps if name in args.only]
    if args.dry_run:
        print(*prepare, *(command for _, command in steps), *finish, sep="\n")
        return

    environment = {name: value for name, value in os.environ.items() if name not in OF_SCRIPTS}
    environment |= settings.get("environment", {})
    for name in ("runs", "records", "commands", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, command in steps:
        begun = folder / "commands" / f"{name}.txt"
        if begun.exists() and begun.read_text(encoding="utf-8") != command:
            sys.exit(
                f"error: {begun}: {name} was begun by another command: put the settings back, or remove its files"
            )
    keep_inputs(folder / "commands" / "inputs.json", inputs_of(settings, prepare))
    execute(prepare, environment)
    committed = ROOT / settings.get("results", "results")
    if status := Steps(steps, folder, work, args.jobs, committed, environment).run():
        sys.exit(status)
    execute(finish, environment)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
