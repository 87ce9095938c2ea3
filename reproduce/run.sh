#!/usr/bin/env bash
# The whole published protocol at one scale: base_model, switch_precision, cpt, adv_attack; one record a step.
#   bash reproduce/run.sh gpt2               GPT-2 124M and SQuAD from the hub; needs GPUs
#   TEXT_FILE=text.txt VALIDATION_TEXT=more.txt TOKENIZER=gpt2-tokenizer TRAIN_FILE=train-v1.1.json \
#       VALIDATION_FILE=dev-v1.1.json bash reproduce/run.sh small      a small GPT-2, all of SQuAD v1.1
#   bash reproduce/run.sh tiny               the quick start
#   bash reproduce/run.sh gpt2 --dry_run     print every command; --only STEP...: some steps; my.json: own settings
# A step whose record is there is not repeated, a killed one resumes when the same command is given again.
# Environment: WORK (default reproduce/work/SETTINGS; a new folder)
set -euo pipefail
root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/base_model/common.sh"
if [[ "${1:-}" == tiny && $# == 1 ]]; then exec bash "$root/quickstart/run.sh"; fi
if [[ -z "${1:-}" || "$1" == -* ]]; then refuse "usage: bash reproduce/run.sh gpt2|small|tiny|SETTINGS.json [flags] (or another name in reproduce/settings)"; fi
if is_on dry_run; then exec python3 "$root/reproduce/run.py" "$@"; fi
check_python
name="$(basename -- "$1" .json)"
own_folder WORK "${WORK:-$root/reproduce/work/$name}" .reproduce "$name"
exec python3 "$root/reproduce/run.py" "$@" --work "$folder"
