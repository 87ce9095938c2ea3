#!/usr/bin/env bash
# Train GPT-2 on SQuAD v1.1 and evaluate it, with the published hyper-parameters: 1000 steps, batch 16 a process.
#   bash train.sh                                     full fine-tuning, float32
#   bash train.sh --bf16                              the same with bf16 autocast (--fp16: float16, CUDA only)
#   bash train.sh --add_lora                          LoRA (r 8, alpha 16) on the frozen base
#   bash train.sh --bit_widths 4                      LoRA with weights, activations and KV cache at 4 bits
#   bash train.sh --bit_config ../configs/x.json      LoRA with the bits of a JSON file
# The quantizer is MinMax, as published; --quantizer rotated spreads outlier channels before anything is rounded.
# Any flag of run_qa.py may be appended and wins. A killed run resumes when the same command is given again.
# Environment: MODEL TRAIN_FILE VALIDATION_FILE OUTPUT_DIR BIT_CONFIG NPROC_PER_NODE
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"

count_processes
data_flags squad TRAIN_FILE VALIDATION_FILE
bit_config_flag --bit_config bit_widths add_lora
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
    --per_device_train_batch_size 16 \
    --per_device_eval_batch_size 16 \
    --learning_rate 3e-3 \
    --lr_scheduler_type cosine \
    --seed 42 \
    ${quantizer[@]+"${quantizer[@]}"} \
    --lora_r 8 \
    --lora_alpha 16 \
    ${bits[@]+"${bits[@]}"} \
    ${evaluation[@]+"${evaluation[@]}"} \
    --eval_steps 250 \
    --save_strategy steps \
    --save_steps 250 \
    --logging_strategy steps \
    --logging_steps 10 \
    --output_dir "${OUTPUT_DIR:-$here/results/train}"
