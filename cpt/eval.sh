#!/usr/bin/env bash
# Copied from switch_precision/eval.sh
# EM/F1 of a checkpoint on SQuAD v1.1 under any number of bit-width configs: one load, one table (run_qa_eval.py).
#   bash eval.sh                                          every uniform width of what train.sh wrote
#   BIT_CONFIG=../configs/hybrid_25pct_4bit.json bash eval.sh
#   bash eval.sh --bit_configs 8 4 W4A8KV8 ../configs/*.json --reference_config 8
# Configs that have a record in OUTPUT_DIR are not evaluated again; --overwrite_output_dir does.
# Any flag of run_qa_eval.py may be appended and wins.
# Environment: MODEL VALIDATION_FILE OUTPUT_DIR BIT_CONFIG NPROC_PER_NODE
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
nproc="${NPROC_PER_NODE:-$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')}"

data=(--dataset_name squad)
if [[ -n "${VALIDATION_FILE:-}" ]]; then data+=(--validation_file "$VALIDATION_FILE"); fi
bits=()
if [[ -n "${BIT_CONFIG:-}" ]]; then bits=(--bit_configs "$BIT_CONFIG"); fi

torchrun --standalone --nproc_per_node="$nproc" "$here/run_qa_eval.py" \
    --model_name_or_path "${MODEL:-$here/results/train}" \
    "${data[@]}" \
    --max_seq_length 786 \
    --do_eval \
    --per_device_eval_batch_size 32 \
    --seed 42 \
    ${bits[@]+"${bits[@]}"} \
    --output_dir "${OUTPUT_DIR:-$here/results/eval}" \
    "$@"
