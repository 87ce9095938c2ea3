#!/usr/bin/env bash
# Tune the GPT-2 language model for several bit-widths on a text file, then measure its perplexity (run_clm.py).
#   TRAIN_FILE=train.txt VALIDATION_FILE=valid.txt bash train.sh
#   TRAIN_FILE=train.txt bash train.sh --bit_widths 4 --do_eval False
# The quantizer is MinMax, as published; --quantizer rotated spreads outlier channels before anything is rounded.
# Any flag of run_clm.py may be appended and wins. A killed run resumes when the same command is given again.
# Environment: MODEL TRAIN_FILE VALIDATION_FILE OUTPUT_DIR BIT_CONFIG NPROC_PER_NODE
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"

count_processes
bit_config_flag --bit_configs bit_widths
if [[ -z "${bits[*]-}" ]] && ! given bit_configs; then bits=(--bit_widths 4 8); fi
steps=(--max_steps 1000)
if given num_train_epochs; then steps=(); fi
data=()
if [[ -n "${TRAIN_FILE:-}" ]]; then data+=(--train_file "$TRAIN_FILE"); fi
if [[ -n "${VALIDATION_FILE:-}" ]]; then data+=(--validation_file "$VALIDATION_FILE" --do_eval); fi
quantizer=(--quantizer minmax)
if is_off do_train; then quantizer=(); fi # an evaluation takes that of the checkpoint

launch run_clm.py \
    --model_name_or_path "${MODEL:-gpt2}" \
    ${data[@]+"${data[@]}"} \
    --do_train \
    ${steps[@]+"${steps[@]}"} \
    --per_device_train_batch_size 8 \
    --learning_rate 3e-3 \
    --lr_scheduler_type cosine \
    --seed 42 \
    ${quantizer[@]+"${quantizer[@]}"} \
    ${bits[@]+"${bits[@]}"} \
    --save_strategy steps \
    --save_steps 250 \
    --logging_strategy steps \
    --logging_steps 10 \
    --output_dir "${OUTPUT_DIR:-$here/results/train}"
