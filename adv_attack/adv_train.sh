#!/usr/bin/env bash
# Adversarial training on the word embeddings: a classifier (AG News) or question answering (SQuAD), LoRA on a frozen
# base, 1000 steps, batch 16 a process. MODEL is best one that has learned the task without an attack (train.sh).
#   bash adv_train.sh --task classification --pgd_steps 0 --precision_set 8     no attack, for comparison
#   bash adv_train.sh --task classification --precision_set 8                   attacked and trained at 8 bits
#   bash adv_train.sh --task qa --precision_set 4 5 6 7 8                       random precision: updates at another
#   bash adv_train.sh --task qa --attack_precision same                         precision than the attack, or the same
# The quantizer is MinMax, as published; --quantizer rotated spreads outlier channels before anything is rounded.
# Any flag of adversarial_training.py may be appended and wins. A killed run resumes when the command is given again.
# Environment: MODEL DATASET TRAIN_FILE VALIDATION_FILE OUTPUT_DIR NPROC_PER_NODE
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"

count_processes
value=
given task || true
case "$value" in
    classification) task=(--task classification --learning_rate 1e-3 --max_seq_length 256) dataset=ag_news ;;
    qa) task=(--task qa --learning_rate 5e-4 --max_seq_length 786) dataset=squad ;;
    *) refuse "--task ${value:-is missing}: allowed are classification, qa" ;;
esac
data_flags "${DATASET:-$dataset}" TRAIN_FILE VALIDATION_FILE
steps=(--max_steps 1000)
if given num_train_epochs; then steps=(); fi
quantizer=(--quantizer minmax)
if is_off do_train; then quantizer=(); fi # an evaluation takes that of the checkpoint

launch adversarial_training.py \
    "${task[@]}" \
    --model_name_or_path "${MODEL:-gpt2}" \
    "${data[@]}" \
    --precision_set 4 5 6 7 8 \
    --pgd_steps 7 \
    --do_train \
    --do_eval \
    ${steps[@]+"${steps[@]}"} \
    --per_device_train_batch_size 16 \
    --per_device_eval_batch_size 32 \
    --seed 42 \
    ${quantizer[@]+"${quantizer[@]}"} \
    --lora_r 8 \
    --lora_alpha 16 \
    --save_strategy steps \
    --save_steps 500 \
    --logging_strategy steps \
    --logging_steps 50 \
    --output_dir "${OUTPUT_DIR:-$here/results/adv_${task[1]}}"
