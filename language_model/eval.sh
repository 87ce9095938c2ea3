#!/usr/bin/env bash
# Perplexity of a language model on a text file under any number of bit-width configs: one load, one table (run_clm.py).
#   VALIDATION_FILE=valid.txt bash eval.sh                what train.sh wrote, at every width that it was trained for
#   MODEL=gpt2 VALIDATION_FILE=valid.txt bash eval.sh --eval_bit_configs 32 8 W4A8KV8 ../configs/hybrid_25pct_4bit.json
# The checkpoint's quantizer is used; --quantizer rotated calibrates one that has no rotation on TRAIN_FILE.
# Any flag of run_clm.py may be appended and wins.
# Environment: MODEL TRAIN_FILE VALIDATION_FILE OUTPUT_DIR BIT_CONFIG
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"

NPROC_PER_NODE=1 count_processes
bit_config_flag --eval_bit_configs eval_bit_configs
data=()
if [[ -n "${TRAIN_FILE:-}" ]]; then data+=(--train_file "$TRAIN_FILE"); fi
if [[ -n "${VALIDATION_FILE:-}" ]]; then data+=(--validation_file "$VALIDATION_FILE"); fi

launch run_clm.py \
    --model_name_or_path "${MODEL:-$here/results/train}" \
    ${data[@]+"${data[@]}"} \
    --do_eval \
    --seed 42 \
    ${bits[@]+"${bits[@]}"} \
    --output_dir "${OUTPUT_DIR:-$here/results/eval}"
