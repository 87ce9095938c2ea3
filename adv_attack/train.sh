#!/usr/bin/env bash
# Fine-tune a quantizable GPT-2 text classifier, the target of the attacks: AG News, 5 epochs, batch 16 a process.
#   bash train.sh                                                 full fine-tuning, float32
#   bash train.sh --add_lora --learning_rate 1e-3                 one adapter on the frozen base, serves any bits
#   bash train.sh --bit_widths 4 --learning_rate 1e-3             LoRA with weights, activations and KV cache at 4 bits
#   bash train.sh --bit_widths 4 6 8 --random_precision_training  a width per step, an adapter per width (RPT)
# The quantizer is MinMax, as published; --quantizer rotated spreads outlier channels before anything is rounded.
# Any flag of text_classification.py may be appended and wins. A killed run resumes when the same command is given again.
# Environment: MODEL DATASET TRAIN_FILE VALIDATION_FILE OUTPUT_DIR BIT_CONFIG NPROC_PER_NODE
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"

count_processes
data_flags "${DATASET:-ag_news}" TRAIN_FILE VALIDATION_FILE
bit_config_flag --bit_config bit_widths
quantizer=(--quantizer minmax)
if is_off do_train; then quantizer=(); fi # an evaluation takes that of the checkpoint

launch text_classification.py \
    --model_name_or_path "${MODEL:-gpt2}" \
    "${data[@]}" \
    --max_seq_length 256 \
    --do_train \
    --do_eval \
    --num_train_epochs 5 \
    --per_device_train_batch_size 16 \
    --per_device_eval_batch_size 32 \
    --learning_rate 2e-5 \
    --weight_decay 0.01 \
    --seed 42 \
    ${quantizer[@]+"${quantizer[@]}"} \
    --lora_r 8 \
    --lora_alpha 16 \
    ${bits[@]+"${bits[@]}"} \
    --save_strategy steps \
    --save_steps 500 \
    --logging_strategy steps \
    --logging_steps 50 \
    --output_dir "${OUTPUT_DIR:-$here/results/train}"
