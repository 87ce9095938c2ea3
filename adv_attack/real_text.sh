#!/usr/bin/env bash
# Random precision against GBDA on real text, on one CPU thread, without hub and pretrained weights (about an hour).
#   TRAIN_FILE=sst2/train.jsonl TEST_FILE=sst2/test.jsonl TOKENIZER=gpt2-tokenizer bash adv_attack/real_text.sh
# A small GPT-2 with the real BPE is pretrained on the training texts; then, for a classifier trained in float32 and for
# one trained at random precision (RPT): attacks at 32, 8 and 4 bits, random and EOT; tables, matrix, RPI.
# Smaller than the paper: --candidate_tokens train, 50 steps of 4 relaxed samples, 20 hard samples, 32 tokens a text.
# What is done is not done again; a killed run resumes. Records: WORK/records/*.json
# Environment: TRAIN_FILE TEST_FILE TOKENIZER (a folder), WORK (default results/real_text beside this script),
#   NUM_TEXTS (200), CLASSIFIERS ("plain rpt"), SEED (42), PRETRAIN_STEPS (600), TRAIN_STEPS (650), NUM_ITERS (50)
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"
for name in TRAIN_FILE TEST_FILE TOKENIZER; do
    if [[ -z "${!name:-}" ]]; then refuse "set $name (see the head of $0)"; fi
    if [[ ! -e "${!name}" ]]; then refuse "$name=${!name}: not there"; fi
done
work="${WORK:-$here/results/real_text}" seed="${SEED:-42}"
check_python
settings="$(for name in TRAIN_FILE TEST_FILE TOKENIZER SEED NUM_TEXTS PRETRAIN_STEPS TRAIN_STEPS NUM_ITERS; do
    echo "$name=${!name:-}"
done)"
own_folder WORK "$work" .real_text "$settings"
mkdir -p "$work/records"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}" HF_HUB_OFFLINE=1

data=(--train_file "$TRAIN_FILE" --validation_file "$TEST_FILE" --max_seq_length 32)
step() { # step NAME SCRIPT FLAGS...: a run with its record, unless that is there already
    local name="$1" script="$2"
    shift 2
    if [[ -e "$work/records/$name.json" ]]; then echo "real_text: $name is done"; return; fi
    echo "real_text: $name"
    python3 "$here/$script" "$@" --record_file "$work/records/$name.json"
}

python3 "$here/../quickstart/make_model.py" --text_file "$TRAIN_FILE" --tokenizer "$TOKENIZER" \
    --output_dir "$work/lm" --max_steps "${PRETRAIN_STEPS:-600}" --batch_size 32

training=(--model_name_or_path "$work/lm" "${data[@]}" --do_train --do_eval --max_steps "${TRAIN_STEPS:-650}"
    --per_device_train_batch_size 32 --per_device_eval_batch_size 64 --learning_rate 1e-3 --lr_scheduler_type cosine
    --warmup_steps 50 --weight_decay 0.1 --save_steps 200 --save_total_limit 1 --logging_steps 50 --report_to none
    --disable_tqdm True --seed "$seed" --quantizer minmax)
for classifier in ${CLASSIFIERS:-plain rpt}; do
    model="$work/$classifier"
    bits=()
    if [[ "$classifier" == rpt ]]; then bits=(--bit_widths 4 8 --random_precision_training --train_all_weights); fi
    step "${classifier}_train" text_classification.py "${training[@]}" ${bits[@]+"${bits[@]}"} --output_dir "$model"
    attacks=()
    for attacked in 32 8 4 random eot; do
        step "${classifier}_attack_$attacked" whitebox_attack.py --model_name_or_path "$model" \
            --reference_model "$work/lm" "${data[@]}" --attack_bits "$attacked" --precision_set 4 8 \
            --num_samples "${NUM_TEXTS:-200}" --num_iters "${NUM_ITERS:-50}" --gumbel_batch 4 --gumbel_samples 20 \
            --kappa 3 --lam_sim 20 --candidate_tokens train --candidate_min_count 3 --seed "$seed" \
            --output_dir "$work/${classifier}_attack_$attacked"
        attacks+=("$work/${classifier}_attack_$attacked")
    done
    step "${classifier}_eval" eval.py --model_name_or_path "$model" --reference_model "$work/lm" \
        --attack_dirs "${attacks[@]}" --output_dir "$work/${classifier}_eval"
    step "${classifier}_rpi" random_precision_inference.py --model_name_or_path "$model" \
        --attack_dirs "${attacks[@]}" --precision_set 4 8 --bitsandbytes 8bit nf4 --seed "$seed" \
        --output_dir "$work/${classifier}_rpi"
done
