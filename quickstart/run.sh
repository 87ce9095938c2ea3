#!/usr/bin/env bash
# The whole repository on one small machine, no GPU, no hub: makes a virtual environment, a tiny GPT-2 and a tiny data
# set, trains, quantizes, evaluates, and ends with a table and a plot.  bash quickstart/run.sh
# The steps are those of reproduce/run.sh with the settings reproduce/settings/tiny.json.
# Everything lands in quickstart/work. What is done is not done again, a killed run resumes; --fresh starts over.
# The numbers are those of a TINY STAND-IN on made-up text. They show that the code works and what bits do; they are
# not GPT-2 on SQuAD.
# Environment: VENV PYTHON (see tests/make_venv.sh), WORK (default quickstart/work; a new folder), SEED (default 42)
set -euo pipefail
root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/base_model/common.sh"
seed="${SEED:-42}"
if [[ "$*" != "" && "$*" != --fresh ]]; then
    echo "usage: bash quickstart/run.sh [--fresh]" >&2
    exit 2
fi
own_folder WORK "${WORK:-$root/quickstart/work}" .quickstart
work="$folder"
if [[ "$*" == --fresh ]]; then # only what this script and seeds.sh make
    rm -rf -- "$work"/{data,model,topics,runs,records,commands,code,quickstart.md,quickstart.png,report.pdf,report.json,seeds,seeds.json}
fi

venv="$(bash "$root/tests/make_venv.sh")"
export PATH="$venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cd "$root"  # records show commands and paths relative to here

# Results of other code are not this code's results; those of seeds.sh it keeps, and tells apart itself.
source quickstart/code.sh
code="$(code_hash quickstart/run.sh)-$seed"
mkdir -p "$work/runs"
if [[ "$(cat "$work/code" 2>/dev/null || true)" != "$code" ]]; then
    find "$work/runs" -mindepth 1 -maxdepth 1 ! -name seeds -exec rm -rf -- {} +
    rm -rf -- "$work/records" "$work/commands"
    echo "$code" >"$work/code"
fi
mkdir -p "$work/records"

python3 reproduce/run.py tiny --work "$work" --seed "$seed" --jobs 2
echo "plot of the search: $work/runs/search/pareto.png"
