#!/usr/bin/env bash
# Train GPT-2 on SQuAD v1.1 and evaluate it, with the published hyper-parameters: 1000 steps, batch 16 a process.
#   bash train.sh                                     full fine-tuning, float32
#   bash train.sh --bf16                              the same with bf16 autocast (--fp16: float16, CUDA only)
#   bash train.sh --add_lora                          LoRA (r 8, alpha 16) on the frozen base
#   bash train.sh --bit_widths 4                      LoRA with weights, activations and KV cache at 4 bits
#   bash train.sh --bit_config ../configs/x.json      LoRA with the bits of a JSON file
# Any flag of run_qa.py may be appended and wins. A killed run resumes when the same command is given again.
# Environment: MODEL TRAIN_FILE VALIDATION_FILE OUTPUT_DIR BIT_CONFIG NPROC_PER_NODE
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
nproc="${NPROC_PER_NODE:-$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')}"

data=(--dataset_name squad)
if [[ -n "${TRAIN_FILE:-}" ]]; then data+=(--train_file "$TRAIN_FILE"); fi
if [[ -n "${VALIDATION_FILE:-}" ]]; then data+=(--validation_file "$VALIDATION_FILE"); fi
bits=()
if [[ -n "${BIT_CONFIG:-}" ]]; then bits=(--bit_config "$BIT_CONFIG"); fi

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
    ${bits[@]+"${bits[@]}"} \
    --eval_strategy steps \
    --eval_steps 250 \
    --save_strategy steps \
    --save_steps 250 \
    --logging_strategy steps \
    --logging_steps 10 \
    --output_dir "${OUTPUT_DIR:-$here/results/train}" \
    "$@"
