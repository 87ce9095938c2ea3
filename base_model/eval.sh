#!/usr/bin/env bash
# EM/F1 of a checkpoint on SQuAD v1.1, under its own bits, under other bits, or quantized by bitsandbytes.
#   bash eval.sh                                      what train.sh wrote
#   BIT_CONFIG=../configs/uniform_8.json bash eval.sh post-training quantization under any config (or BIT_CONFIG=W4A8KV8)
#   bash eval.sh --bitsandbytes nf4                   weight-only: 8bit, or nf4 with double quantization
# Any flag of run_qa.py may be appended and wins.
# Environment: MODEL VALIDATION_FILE OUTPUT_DIR BIT_CONFIG NPROC_PER_NODE
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
nproc="${NPROC_PER_NODE:-$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')}"

data=(--dataset_name squad)
if [[ -n "${VALIDATION_FILE:-}" ]]; then data+=(--validation_file "$VALIDATION_FILE"); fi
bits=()
if [[ -n "${BIT_CONFIG:-}" ]]; then bits=(--bit_config "$BIT_CONFIG"); fi

torchrun --standalone --nproc_per_node="$nproc" "$here/run_qa.py" \
    --model_name_or_path "${MODEL:-$here/results/train}" \
    "${data[@]}" \
    --max_seq_length 786 \
    --do_eval \
    --per_device_eval_batch_size 32 \
    --seed 42 \
    ${bits[@]+"${bits[@]}"} \
    --output_dir "${OUTPUT_DIR:-$here/results/eval}" \
    "$@"
