#!/usr/bin/env bash
# Train one GPT-2 for several bit-widths on SQuAD v1.1 with the published hyper-parameters: 1000 steps, 16 a process.
#   bash train.sh                                     widths 4 and 8 in every step; bf16 autocast where there is a GPU
#   bash train.sh --bit_widths 4 6 8 --teacher        more widths, taught by a full-precision pass
#   bash train.sh --bit_configs ../configs/uniform_8.json ../configs/hybrid_25pct_4bit.json      these configs instead
#   bash train.sh --objective sequential --max_steps 2000     as published: one width after the other, 1000 steps each
# Any flag of run_qa.py may be appended and wins. A killed run resumes when the same command is given again.
# Environment: MODEL TRAIN_FILE VALIDATION_FILE OUTPUT_DIR BIT_CONFIG NPROC_PER_NODE
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
gpus="$(python3 -c 'import torch; print(torch.cuda.device_count())')"
nproc="${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}"

data=(--dataset_name squad)
if [[ -n "${TRAIN_FILE:-}" ]]; then data+=(--train_file "$TRAIN_FILE"); fi
if [[ -n "${VALIDATION_FILE:-}" ]]; then data+=(--validation_file "$VALIDATION_FILE"); fi
bits=(--bit_widths 4 8)
if [[ -n "${BIT_CONFIG:-}" ]]; then bits=(--bit_configs "$BIT_CONFIG"); fi
if ((gpus > 0)); then bits+=(--bf16); fi

torchrun --standalone --nproc_per_node="$nproc" "$here/run_qa.py" \
    --model_name_or_path "${MODEL:-gpt2}" \
    "${data[@]}" \
    --max_seq_length 786 \
    --do_train \
    --do_eval \
    --max_steps 1000 \
    --per_device_train_batch_size 16 \
    --per_device_eval_batch_size 16 \
    --learning_rate 3e-3 \
    --lr_scheduler_type cosine \
    --seed 42 \
    --lora_r 8 \
    --lora_alpha 16 \
    "${bits[@]}" \
    --eval_strategy steps \
    --eval_steps 256 \
    --save_strategy steps \
    --save_steps 256 \
    --logging_strategy steps \
    --logging_steps 10 \
    --output_dir "${OUTPUT_DIR:-$here/results/train}" \
    "$@"
