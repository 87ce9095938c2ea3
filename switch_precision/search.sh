#!/usr/bin/env bash
# The bit-widths of least loss under a budget, from the sensitivity that sweep.sh measured (search.py).
#   bash sweep.sh && bash search.sh                                 6 bits on average, beside 10 random assignments
#   SENSITIVITY_FILE=my/sensitivity.json bash search.sh --average_bits 5 --pareto
# One process, one GPU. Any flag of search.py may be appended and wins.
# Environment: MODEL TRAIN_FILE VALIDATION_FILE OUTPUT_DIR SENSITIVITY_FILE
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"

NPROC_PER_NODE=1 count_processes
data_flags squad TRAIN_FILE VALIDATION_FILE
output="${OUTPUT_DIR:-$here/results/search}"
budget=(--average_bits 6)
if given weight_mb bitops; then budget=(); fi

launch search.py \
    --model_name_or_path "${MODEL:-$here/results/train}" \
    "${data[@]}" \
    --max_seq_length 786 \
    --per_device_eval_batch_size 32 \
    --seed 42 \
    --sensitivity_file "${SENSITIVITY_FILE:-$here/results/sensitivity/sensitivity.json}" \
    ${budget[@]+"${budget[@]}"} \
    --num_random 10 \
    --output "$output/found.json" \
    --output_dir "$output"
