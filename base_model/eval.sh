#!/usr/bin/env bash
# EM/F1 of a checkpoint on SQuAD v1.1, under its own bits, under other bits, or quantized by bitsandbytes.
#   bash eval.sh                                         what train.sh wrote
#   BIT_CONFIG=../configs/uniform_8.json bash eval.sh    post-training quantization under any config (or W4A8KV8)
#   bash eval.sh --bitsandbytes nf4                      weight-only: 8bit, or nf4 with double quantization
# The checkpoint's quantizer is used; --quantizer rotated calibrates one without rotation, on TRAIN_FILE or squad.
# Any flag of run_qa.py may be appended and wins.
# Environment: MODEL TRAIN_FILE VALIDATION_FILE OUTPUT_DIR BIT_CONFIG NPROC_PER_NODE
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"

count_processes
data_flags squad TRAIN_FILE VALIDATION_FILE
bit_config_flag --bit_config bit_widths bitsandbytes bnb

launch run_qa.py \
    --model_name_or_path "${MODEL:-$here/results/train}" \
    "${data[@]}" \
    --max_seq_length 786 \
    --do_eval \
    --per_device_eval_batch_size 32 \
    --seed 42 \
    ${bits[@]+"${bits[@]}"} \
    --output_dir "${OUTPUT_DIR:-$here/results/eval}"
