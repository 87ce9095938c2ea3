#!/usr/bin/env bash
# Train one GPT-2 for several bit-widths on SQuAD v1.1 with the published hyper-parameters: 1000 steps, 16 a process.
#   bash train.sh                                     widths 4 and 8; bf16 autocast where there is a GPU
#   bash train.sh --bit_widths 4 6 8 --teacher        more widths, taught by a full-precision pass
#   bash train.sh --bit_configs ../configs/uniform_8.json ../configs/hybrid_25pct_4bit.json      these configs instead
#   bash train.sh --objective sequential --max_steps 2000     as published: one width after the other, 1000 steps each
# Joint training takes the rotated quantizer, which spreads outlier channels before anything is rounded, and lets lower
# widths join late, from the adapters of the next higher one (README.md). Other objectives take MinMax, as published.
# Any flag of run_qa.py may be appended and wins. A killed run resumes when the same command is given again.
# Environment: MODEL TRAIN_FILE VALIDATION_FILE OUTPUT_DIR BIT_CONFIG NPROC_PER_NODE
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"

count_processes
data_flags squad TRAIN_FILE VALIDATION_FILE
bit_config_flag --bit_configs bit_widths
if [[ -z "${bits[*]-}" ]] && ! given bit_configs; then bits=(--bit_widths 4 8); fi
if ((gpus > 0)) && ! is_on fp16; then bits+=(--bf16); fi
steps=(--max_steps 1000)
if given num_train_epochs; then steps=(); fi
evaluation=(--eval_strategy steps)
if is_off do_eval; then evaluation=(); fi # the Trainer would evaluate all the same
recipe=(--quantizer rotated --num_mixed_configs 0 --curriculum 0.9)
if given objective && [[ "$value" != joint ]]; then recipe=(--quantizer minmax); fi
if is_off do_train; then recipe=(); fi # an evaluation takes the quantizer of the checkpoint

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
    ${recipe[@]+"${recipe[@]}"} \
    --lora_r 8 \
    --lora_alpha 16 \
    ${bits[@]+"${bits[@]}"} \
    ${evaluation[@]+"${evaluation[@]}"} \
    --eval_steps 256 \
    --save_strategy steps \
    --save_steps 256 \
    --logging_strategy steps \
    --logging_steps 10 \
    --output_dir "${OUTPUT_DIR:-$here/results/train}"
