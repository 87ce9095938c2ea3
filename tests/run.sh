#!/usr/bin/env bash
# All checks of the repository: copies in sync, ruff, shell syntax, tests. No GPU; the network only for the first run,
# which installs the requirements into a virtual environment of its own (see tests/make_venv.sh for VENV and PYTHON).
# Arguments go to pytest, with paths relative to the root:  bash tests/run.sh -m slow tests/test_copies.py
set -euo pipefail
root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$(bash "$root/tests/make_venv.sh")"
cd "$root"

export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the tiny models of the tests lose time to more threads
# PYTEST_WORKERS: processes that share the tests (default 2; 0 runs them in this one, as --pdb needs)
export PATH="$venv/bin:$PATH"
python3 tests/check_copies.py
ruff check --extend-exclude "$venv" .
while IFS= read -r -d "" script; do
    bash -n "$script"
done < <(find . -type d \( -name ".?*" -o -exec test -e "{}/pyvenv.cfg" \; \) -prune -o -name "*.sh" -print0)
bash -n .ci/run
python3 -m pytest -n "${PYTEST_WORKERS:-2}" --dist loadscope "$@"
