#!/usr/bin/env bash
# Evaluate attacks: accuracy, changed tokens, perplexity, similarity (eval.py), then the matrix of attack precision x
# inference precision and random precision inference (random_precision_inference.py).
#   bash eval.sh                                                  every attack in results/attack_*
#   bash eval.sh --precision_set 4 6 8 --bitsandbytes 8bit nf4    flags go to random_precision_inference.py and win
#   ATTACK_DIRS="results/a results/b" bash eval.sh                these attacks (folders without spaces)
# Environment: MODEL ATTACK_DIRS OUTPUT_DIR REFERENCE_MODEL
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

attacks=("$here"/results/attack_*/)
if [[ -n "${ATTACK_DIRS:-}" ]]; then read -r -a attacks <<<"$ATTACK_DIRS"; fi
model="${MODEL:-$here/results/train}"
output="${OUTPUT_DIR:-$here/results}"
reference=()
if [[ -n "${REFERENCE_MODEL:-}" ]]; then reference=(--reference_model "$REFERENCE_MODEL"); fi

python3 "$here/eval.py" \
    --model_name_or_path "$model" \
    ${reference[@]+"${reference[@]}"} \
    --attack_dirs "${attacks[@]}" \
    --output_dir "$output/eval"
python3 "$here/random_precision_inference.py" \
    --model_name_or_path "$model" \
    --attack_dirs "${attacks[@]}" \
    --precision_set 4 8 \
    --output_dir "$output/rpi" \
    "$@"
