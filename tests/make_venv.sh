#!/usr/bin/env bash
# Make the virtual environment of the quick start and the tests, or leave it alone when the requirements are unchanged.
# Environment: VENV    its folder, default .venv in the root of the repository
#              PYTHON  interpreter that makes it, default python3 (3.11 or newer)
# Prints the folder; progress goes to stderr.
set -euo pipefail
root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-$root/.venv}"
[[ "$venv" == /* ]] || venv="$PWD/$venv"
python="${PYTHON:-python3}"
cd "$root"
mkdir -p -- "$(dirname -- "$venv")"
exec 9<"$(dirname -- "$venv")" # one at a time: a second call waits, and finds the finished environment
if command -v flock >/dev/null; then flock 9; fi

# The stamp is there from the start, so that an unfinished install is known as ours, and is valid only at the end.
stamp="$venv/.requirements-stamp"
wanted="$("$python" - requirements.txt requirements-extra.txt requirements-dev.txt <<'PY'
import hashlib
import sys

if sys.version_info < (3, 11):
    sys.exit("Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Set PYTHON.")
parts = [sys.version.encode()] + [open(name, "rb").read() for name in sys.argv[1:]]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PY
)"
if [[ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]]; then
    if [[ -e "$venv" && ! -f "$stamp" && (! -d "$venv" || -n "$(ls -A -- "$venv")") ]]; then
        echo "$venv was not made by this script; remove it or set VENV to another folder" >&2
        exit 1
    fi
    echo "installing the requirements into $venv (minutes; torch is large)" >&2
    rm -rf -- "$venv"
    mkdir -p -- "$venv"
    echo "installing" >"$stamp"
    "$python" -m venv "$venv"
    # torch first and alone: by far the largest download, and the one that fails where a platform has no build of it.
    "$venv/bin/python" -m pip install --quiet "$(grep '^torch==' requirements.txt)" >&2
    "$venv/bin/python" -m pip install --quiet -r requirements.txt -r requirements-dev.txt >&2
    echo "$wanted" >"$stamp.new"
    mv -- "$stamp.new" "$stamp"
fi
echo "$venv"
