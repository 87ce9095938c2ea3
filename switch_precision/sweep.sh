#!/usr/bin/env bash
# Sensitivity of every linear, block and layer type of a checkpoint to low bits, on SQuAD v1.1 (sensitivity.py).
#   bash sweep.sh                                         each flipped from 8 to 4 bits
#   bash sweep.sh --low_bits 4 6 --max_eval_samples 2000
#   bash sweep.sh --operands w a kv                       weights, inputs, and keys and values, each alone
#   bash sweep.sh && python search.py --sensitivity_file results/sensitivity/sensitivity.json ...
# One process, one GPU. A killed sweep goes on when the same command is given again.
# The checkpoint's quantizer is used; --quantizer rotated calibrates one without rotation, on TRAIN_FILE or squad.
# Any flag of sensitivity.py may be appended and wins.
# Environment: MODEL TRAIN_FILE VALIDATION_FILE OUTPUT_DIR
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"

NPROC_PER_NODE=1 count_processes
data_flags squad TRAIN_FILE VALIDATION_FILE

launch sensitivity.py \
    --model_name_or_path "${MODEL:-$here/results/train}" \
    "${data[@]}" \
    --max_seq_length 786 \
    --per_device_eval_batch_size 32 \
    --seed 42 \
    --reference_config 8 \
    --low_bits 4 \
    --output_dir "${OUTPUT_DIR:-$here/results/sensitivity}"
