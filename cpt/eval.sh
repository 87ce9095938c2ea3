#!/usr/bin/env bash
# EM/F1 of a checkpoint on SQuAD v1.1 under any number of bit-width configs: one load, one table (run_qa_eval.py).
#   bash eval.sh                                          every uniform width of what train.sh wrote
#   BIT_CONFIG=../configs/hybrid_25pct_4bit.json bash eval.sh
#   bash eval.sh --bit_configs 8 4 W4A8KV8 ../configs/*.json --reference_config 8
# Configs that have a record in OUTPUT_DIR are not evaluated again; --overwrite_output_dir does.
# The checkpoint's quantizer is used; --quantizer rotated calibrates one without rotation, on TRAIN_FILE or squad.
# Any flag of run_qa_eval.py may be appended and wins.
# Environment: MODEL TRAIN_FILE VALIDATION_FILE OUTPUT_DIR BIT_CONFIG NPROC_PER_NODE
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"

count_processes
data_flags squad TRAIN_FILE VALIDATION_FILE
bit_config_flag --bit_configs eval_bit_widths

launch run_qa_eval.py \
    --model_name_or_path "${MODEL:-$here/results/train}" \
    "${data[@]}" \
    --max_seq_length 786 \
    --do_eval \
    --per_device_eval_batch_size 32 \
    --seed 42 \
    ${bits[@]+"${bits[@]}"} \
    --output_dir "${OUTPUT_DIR:-$here/results/eval}"
