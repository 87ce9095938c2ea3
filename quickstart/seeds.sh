#!/usr/bin/env bash
# Joint against sequential training and post-training quantization on the tiny stand-in, over seeds; then the searched
# 6-bit config of each jointly trained model against 20 random ones. Needs what `bash quickstart/run.sh` made.
#   bash quickstart/seeds.sh           about 50 minutes on 2 CPU cores; finished runs are not repeated
# joint: 600 steps of 3 passes (8 bits, one random mixed assignment, 4 bits). uniform: 900 steps of 2 passes, no mixed
# assignment. sequential: the published procedure, once with the optimizer steps of joint and once with its 1800
# forward passes (those of teachers count). ptq: LoRA trained in float32 for 600 steps, quantized afterwards.
# Environment: VENV PYTHON (see tests/make_venv.sh), WORK (default quickstart/work), SEEDS (default "42 43 44")
set -euo pipefail
root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/base_model/common.sh"
work="${WORK:-$root/quickstart/work}"
if [[ ! -f "$work/model/manifest.json" ]]; then refuse "WORK=$work: run bash quickstart/run.sh first"; fi
own_folder WORK "$work" .quickstart
work="$folder"
venv="$(bash "$root/tests/make_venv.sh")"
export PATH="$venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TRAIN_FILE="$work/data/train.json" VALIDATION_FILE="$work/data/dev.json" NPROC_PER_NODE=1
cd "$root"
read -ra seeds <<<"${SEEDS:-42 43 44}"
common=(--max_seq_length 256 --per_device_eval_batch_size 64 --report_to none)
training=(--logging_steps 100 --eval_strategy no --save_steps 300)

run() { # run NAME FOLDER/SCRIPT MODEL FLAGS...: one run with its record, unless that is there already
    local name="$1" script="$2" model="$3"
    shift 3
    if [[ -e "$work/seeds/$name.json" ]]; then echo "seeds: $name is done"; return; fi
    echo "seeds: $name"
    MODEL="$model" OUTPUT_DIR="$work/runs/seeds/$name" bash "$root/$script" \
        "${common[@]}" --record_file "$work/seeds/$name.json" "$@"
}
search() { # search SEED: 6 bits on average, chosen on training questions, beside 20 random assignments
    local joint="$work/runs/seeds/joint_$1" on_training=(--measure_split train --max_train_samples 300)
    run "sensitivity_$1" switch_precision/sweep.sh "$joint" --seed "$1" --train_file "$TRAIN_FILE" "${on_training[@]}"
    if [[ -e "$work/seeds/search_$1.json" ]]; then return; fi
    python3 switch_precision/search.py --model_name_or_path "$joint" --seed "$1" "${common[@]}" "${on_training[@]}" \
        --train_file "$TRAIN_FILE" --validation_file "$VALIDATION_FILE" --average_bits 6 --num_random 20 \
        --sensitivity_file "$work/seeds/sensitivity_$1.json" --output_dir "$work/runs/seeds/search_$1" \
        --record_file "$work/seeds/search_$1.json"
}
for seed in "${seeds[@]}"; do
    switch=(switch_precision/train.sh "$work/model" --seed "$seed" "${training[@]}" --bit_widths 4 8)
    run "joint_$seed" "${switch[@]}" --max_steps 600
    run "uniform_$seed" "${switch[@]}" --max_steps 900 --num_mixed_configs 0
    run "sequential_steps_$seed" "${switch[@]}" --max_steps 600 --objective sequential --distill_weight 1
    run "sequential_passes_$seed" "${switch[@]}" --max_steps 1200 --objective sequential --distill_weight 1
    run "lora_$seed" base_model/train.sh "$work/model" --seed "$seed" "${training[@]}" --add_lora --max_steps 600
    for bits in W8A8KV8 W4A4KV4; do
        run "ptq_${bits}_$seed" base_model/eval.sh "$work/runs/seeds/lora_$seed" --bit_config "$bits"
    done
    search "$seed"
done
python3 quickstart/seeds.py --records "$work/seeds" --seeds "${seeds[@]}" --output "$work/seeds.json"
