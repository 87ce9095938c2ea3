#!/usr/bin/env bash
# Cyclic precision training of GPT-2 + LoRA on SQuAD v1.1 with the published hyper-parameters: 1000 steps, 32 a process.
#   bash train.sh                                     32 cycles from 4 to 8 bits; bf16 autocast where there is a GPU
#   bash train.sh --bit_widths 3 8 --num_cyclic_period 8 --gradient_bits 8
#   bash train.sh --bit_widths 4 4                    static training at 4 bits with the same adapter, for comparison
#   OUTPUT_DIR=results/range bash train.sh --precision_range_test      which width is the lowest that learns?
# The quantizer is MinMax, as published; --quantizer rotated spreads outlier channels before anything is rounded.
# Any flag of run_qa.py may be appended and wins. A killed run resumes when the same command is given again.
# Environment: MODEL TRAIN_FILE VALIDATION_FILE OUTPUT_DIR NPROC_PER_NODE
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"

count_processes
data_flags squad TRAIN_FILE VALIDATION_FILE
bits=(--bit_widths 4 8 --num_cyclic_period 32)
if ((gpus > 0)) && ! is_on fp16; then bits+=(--bf16); fi
steps=(--max_steps 1000)
if given num_train_epochs; then steps=(); fi
evaluation=(--eval_strategy steps)
if is_off do_eval; then evaluation=(); fi # the Trainer would evaluate all the same
quantizer=(--quantizer minmax)
if is_off do_train; then quantizer=(); fi # an evaluation takes that of the checkpoint

launch run_qa.py \
    --model_name_or_path "${MODEL:-gpt2}" \
    "${data[@]}" \
    --max_seq_length 786 \
    --do_train \
    --do_eval \
    ${steps[@]+"${steps[@]}"} \
    --per_device_train_batch_size 32 \
    --per_device_eval_batch_size 32 \
    --learning_rate 5e-4 \
    --lr_scheduler_type linear \
    --seed 42 \
    ${quantizer[@]+"${quantizer[@]}"} \
    --lora_r 8 \
    --lora_alpha 16 \
    ${bits[@]+"${bits[@]}"} \
    ${evaluation[@]+"${evaluation[@]}"} \
    --eval_steps 512 \
    --save_strategy steps \
    --save_steps 500 \
    --logging_strategy steps \
    --logging_steps 10 \
    --output_dir "${OUTPUT_DIR:-$here/results/train}"
