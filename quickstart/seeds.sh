#!/usr/bin/env bash
# What the conclusions rest on, over seeds, on the tiny stand-in with outlier channels (factor 30) and without (1):
# post-training quantization by both quantizers, training at 4 bits, joint training, bits found by search.
# Needs what `bash quickstart/run.sh` made.
#   bash quickstart/seeds.sh           about 6 hours on one thread; finished runs are not repeated
# Every training has 1200 forward passes:
#   lora: float32, 1200 steps; quantized afterwards by either quantizer.    static: at 4 bits, 1200 steps.
#   joint: train.sh as it stands, 8 bits alone, 4 bits joins late; 1091 steps.
# With factor 30 also
#   joint3: joint with 3 bits for 4.    joint3_early: 3 bits join after 60 %; 857 steps.    nokl: joint without distillation.
#   mixed: joint with a random per-layer assignment beside the widths; 1000 steps.
#   sequential: the published procedure, MinMax; 800 steps.    lora_800, joint_800: 800 passes.
#   search: bits of 8 and 4 (joint, mixed), of 8 and 3 (lora), and of 8 and 3 for each operand (lora).
# Factors 10 and 3: post-training quantization of the first seed.
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
export OMP_NUM_THREADS=1  # sums, and so trajectories, depend on it
cd "$root"
source quickstart/code.sh
code="$(code_hash quickstart/seeds.sh)"
mkdir -p "$work/seeds"
if [[ -n "$(ls "$work/seeds")" && "$(cat "$work/seeds/code" 2>/dev/null || true)" != "$code" ]]; then
    refuse "$work/seeds holds records of other code: move it and $work/runs/seeds away"
fi
echo "$code" >"$work/seeds/code"
read -ra seeds <<<"${SEEDS:-42 43 44}"
common=(--max_seq_length 256 --per_device_eval_batch_size 64 --report_to none)
training=(--logging_steps 100 --eval_strategy no --save_steps 400)
operands=(32 8 W4A8KV8 4 3 W2A8KV8 W4A32KV32 W32A4KV32 W32A32KV4)

run() { # run NAME FOLDER/SCRIPT MODEL FLAGS...: one run with its record, unless that is there already
    local name="$1" script="$2" model="$3"
    shift 3
    if [[ -e "$work/seeds/$name.json" ]]; then echo "seeds: $name is done"; return; fi
    echo "seeds: $name"
    MODEL="$model" OUTPUT_DIR="$work/runs/seeds/$name" bash "$root/$script" \
        "${common[@]}" --record_file "$work/seeds/$name.json" "$@"
}
scores() { # scores NAME MODEL CONFIGS...: EM, F1 and the noise floor
    local name="$1" model="$2"
    shift 2
    run "$name" switch_precision/eval.sh "$model" --noise_floor --num_bootstrap 0 "$@"
}
search() { # search NAME RUN LOW AVERAGE OPERAND...: chosen on training questions, beside 20 random assignments
    local name="$1" model="$work/runs/seeds/$2" low="$3" budgets=(--average_bits "$4") operands=()
    if (($# > 4)); then
        operands=(--operands "${@:5}")
        budgets+=(--average_a_bits "$4" --average_kv_bits "$4")
    fi
    local flags=(--quantizer rotated --train_file "$TRAIN_FILE" --measure_split train --max_train_samples 300)
    run "sensitivity_$name" switch_precision/sweep.sh "$model" "${flags[@]}" --low_bits "$low" \
        ${operands[@]+"${operands[@]}"}
    if [[ -e "$work/seeds/search_$name.json" ]]; then return; fi
    python3 switch_precision/search.py --model_name_or_path "$model" "${common[@]}" "${flags[@]}" \
        --validation_file "$VALIDATION_FILE" "${budgets[@]}" --num_random 20 \
        --sensitivity_file "$work/seeds/sensitivity_$name.json" --output_dir "$work/runs/seeds/search_$name" \
        --record_file "$work/seeds/search_$name.json"
}
post_training() { # post_training FACTOR SEED: sets model and at
    at="${1}_$2" model="$work/model_$1"
    if [[ "$1" == 30 ]]; then model="$work/model"; fi
    python3 quickstart/make_model.py --data_dir "$work/data" --output_dir "$model" --outlier_factor "$1"
    run "lora_$at" base_model/train.sh "$model" --seed "$2" "${training[@]}" --add_lora --max_steps 1200
    for quantizer in minmax rotated; do
        run "ptq_${quantizer}_$at" switch_precision/eval.sh "$work/runs/seeds/lora_$at" --num_bootstrap 0 \
            --quantizer "$quantizer" --bit_configs "${operands[@]}"
        scores "floor_${quantizer}_$at" "$work/runs/seeds/lora_$at" --quantizer "$quantizer" --bit_configs 8 W4A8KV8 4
    done
}
joint() { # joint NAME LOW FLAGS...: another joint training on $model with its evaluation
    local name="${1}_$at" low="$2"
    shift 2
    run "$name" switch_precision/train.sh "$model" --seed "$seed" "${training[@]}" --bit_widths "$low" 8 "$@"
    scores "eval_$name" "$work/runs/seeds/$name" --bit_configs 8 "$low"
}
for seed in "${seeds[@]}"; do
    for factor in 30 1; do
        post_training "$factor" "$seed"
        joint joint 4 --max_steps 1091
    done
    at="30_$seed" model="$work/model"
    for quantizer in minmax rotated; do
        run "static_${quantizer}_$at" base_model/train.sh "$model" --seed "$seed" "${training[@]}" --max_steps 1200 \
            --bit_widths 4 --quantizer "$quantizer"
        scores "eval_static_${quantizer}_$at" "$work/runs/seeds/static_${quantizer}_$at" --bit_configs 4
    done
    joint joint3 3 --max_steps 1091
    joint joint3_early 3 --max_steps 857 --curriculum 0.6
    joint nokl 4 --max_steps 1091 --distill_loss none
    joint mixed 4 --max_steps 1000 --num_mixed_configs 1
    joint sequential 4 --max_steps 800 --objective sequential --distill_weight 1
    run "lora_800_$at" base_model/train.sh "$model" --seed "$seed" "${training[@]}" --add_lora --max_steps 800
    run "ptq_800_$at" switch_precision/eval.sh "$work/runs/seeds/lora_800_$at" --num_bootstrap 0 --quantizer rotated \
        --bit_configs 32 8 4
    joint joint_800 4 --max_steps 727
    search "joint_$at" "joint_$at" 4 6
    search "mixed_$at" "mixed_$at" 4 6
    search "lora_$at" "lora_$at" 3 5
    search "operands_$at" "lora_$at" 3 5 w a kv
done
for factor in 10 3; do post_training "$factor" "${seeds[0]}"; done
python3 quickstart/seeds.py --records "$work/seeds" --seeds "${seeds[@]}" --output "$work/seeds.json"
