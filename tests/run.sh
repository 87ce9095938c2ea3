#!/usr/bin/env bash
# All checks of the repository: copies in sync, ruff, shell syntax, tests. Needs Python 3.11 or newer, no GPU; the
# network only for the first run, which installs the requirements into a virtual environment of its own.
# Arguments go to pytest, with paths relative to the root:  bash tests/run.sh -m slow tests/test_copies.py
# Environment: VENV    folder of the virtual environment, default .venv in the root; remade when requirements change
#              PYTHON  interpreter that makes it, default python3
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-$root/.venv}"
[[ "$venv" == /* ]] || venv="$PWD/$venv"
python="${PYTHON:-python3}"
cd "$root"

# The stamp is there from the start, so that an unfinished install is known as ours, and is valid only at the end.
stamp="$venv/.requirements-stamp"
wanted="$("$python" - requirements.txt requirements-dev.txt <<'PY'
import hashlib
import sys

if sys.version_info < (3, 11):
    sys.exit("tests/run.sh: needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Set PYTHON.")
parts = [sys.version.encode()] + [open(name, "rb").read() for name in sys.argv[1:]]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PY
)"
if [[ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]]; then
    if [[ -e "$venv" && ! -e "$stamp" && -n "$(ls -A "$venv")" ]]; then
        echo "tests/run.sh: $venv was not made by this script; remove it or set VENV to another folder" >&2
        exit 1
    fi
    echo "tests/run.sh: installing the requirements into $venv (minutes; torch is large)"
    rm -rf -- "$venv"
    mkdir -p -- "$venv"
    echo "installing" >"$stamp"
    "$python" -m venv "$venv"
    # torch first and alone: by far the largest download, and the one that fails where a platform has no build of it.
    "$venv/bin/python" -m pip install --quiet "$(grep '^torch==' requirements.txt)"
    "$venv/bin/python" -m pip install --quiet -r requirements.txt -r requirements-dev.txt
    echo "$wanted" >"$stamp.new"
    mv -- "$stamp.new" "$stamp"
fi

export HF_HUB_OFFLINE=1
export PATH="$venv/bin:$PATH"
python tests/check_copies.py
ruff check --extend-exclude "$venv" .
while IFS= read -r -d "" script; do
    bash -n "$script"
done < <(find . -type d \( -name ".?*" -o -exec test -e "{}/pyvenv.cfg" \; \) -prune -o -name "*.sh" -print0)
bash -n .ci/run
python -m pytest "$@"
