#!/usr/bin/env bash
# The whole repository on one small machine, no GPU, no hub: makes a virtual environment, a tiny GPT-2 and a tiny data
# set, trains, quantizes, evaluates, and ends with a table and a plot.  bash quickstart/run.sh
# Everything lands in quickstart/work. What is done is not done again, a killed run resumes; --fresh starts over.
# The numbers are those of a TINY STAND-IN on made-up text. They show that the code works and what bits do; they are
# not GPT-2 on SQuAD.
# Environment: VENV PYTHON (see tests/make_venv.sh), WORK (default quickstart/work; a new folder), SEED (default 42)
set -euo pipefail
root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/base_model/common.sh"
seed="${SEED:-42}"
if [[ "$*" != "" && "$*" != --fresh ]]; then
    echo "usage: bash quickstart/run.sh [--fresh]" >&2
    exit 2
fi
own_folder WORK "${WORK:-$root/quickstart/work}" .quickstart
work="$folder"
if [[ "$*" == --fresh ]]; then # only what this script and seeds.sh make
    rm -rf -- "$work"/{data,model,topics,runs,records,code,quickstart.md,quickstart.png,seeds,seeds.json}
fi

venv="$(bash "$root/tests/make_venv.sh")"
export PATH="$venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cd "$root"  # records show commands and paths relative to here

# Results of other code are not this code's results.
sources() {
    cat quickstart/*.py quickstart/run.sh quickstart/*.json
    find base_model switch_precision cpt adv_attack -name results -prune -o -name "*.py" -print0 -o -name "*.sh" -print0 \
        -o -name "*.c" -print0 | LC_ALL=C sort -z | xargs -0 cat
}
code="$(sources | sha256sum | cut -d ' ' -f 1)-$seed"
if [[ "$(cat "$work/code" 2>/dev/null || true)" != "$code" ]]; then
    rm -rf -- "$work/runs" "$work/records"
    echo "$code" >"$work/code"
fi
mkdir -p "$work/runs" "$work/records"

python3 quickstart/make_data.py --output_dir "$work/data"
python3 quickstart/make_model.py --data_dir "$work/data" --output_dir "$work/model"

export TRAIN_FILE="$work/data/train.json" VALIDATION_FILE="$work/data/dev.json" NPROC_PER_NODE=1
common=(--seed "$seed" --max_seq_length 256 --per_device_eval_batch_size 64 --report_to none)

done_already() { # done_already NAME: its record is there
    if [[ -e "$work/records/$1.json" ]]; then echo "quickstart: $1 is done"; else echo "quickstart: $1"; return 1; fi
}
run() { # run NAME FOLDER/SCRIPT MODEL FLAGS...: one run with its record, unless that is there already
    local name="$1" script="$2" model="$3"
    shift 3
    done_already "$name" || MODEL="$model" OUTPUT_DIR="$work/runs/$name" bash "$root/$script" \
        "${common[@]}" --record_file "$work/records/$name.json" "$@"
}
training=(--max_steps 400 --logging_steps 50 --eval_strategy no --save_steps 250)

# base_model: full fine-tuning, LoRA, post-training quantization, LoRA trained at one width
run full_fp32 base_model/train.sh "$work/model" "${training[@]}" --learning_rate 1e-3
run lora_fp32 base_model/train.sh "$work/model" "${training[@]}" --add_lora
for quantizer in minmax rotated; do
    for bits in W8A8KV8 W4A8KV8 W4A4KV4; do
        run "ptq_${quantizer}_$bits" base_model/eval.sh "$work/runs/lora_fp32" --bit_config "$bits" \
            --quantizer "$quantizer"
    done
done
run bnb_nf4 base_model/eval.sh "$work/runs/lora_fp32" --bitsandbytes nf4
for quantizer in minmax rotated; do
    run "static_w4_$quantizer" base_model/train.sh "$work/model" "${training[@]}" --bit_widths 4 --quantizer "$quantizer"
done

# switch_precision: one model for 4 and 8 bits; which layers need 8 is measured on training questions
joint="$work/runs/switch_train"
run switch_train switch_precision/train.sh "$work/model" "${training[@]}" --bit_widths 4 8
on_training_questions=(--measure_split train --train_file "$TRAIN_FILE" --max_train_samples 300)
run sensitivity switch_precision/sweep.sh "$joint" "${on_training_questions[@]}"
done_already search || python3 switch_precision/search.py "${common[@]}" --model_name_or_path "$joint" \
    --validation_file "$VALIDATION_FILE" "${on_training_questions[@]}" \
    --sensitivity_file "$work/records/sensitivity.json" --average_bits 6 --num_random 3 --pareto --pareto_points 4 \
    --output "$work/runs/found_6bits.json" --output_dir "$work/runs/search" --record_file "$work/records/search.json"
run switch_eval switch_precision/eval.sh "$joint" \
    --bit_configs 8 quickstart/hybrid_4blocks.json "$work/runs/found_6bits.json" W4A8KV8 4

# cpt: one adapter for all widths, trained while the bits cycle from 4 to 8
run cpt_train cpt/train.sh "$work/model" "${training[@]}" --quantizer rotated --num_cyclic_period 16 --per_device_train_batch_size 16 \
    --learning_rate 3e-3 --lr_scheduler_type cosine
run cpt_eval cpt/eval.sh "$work/runs/cpt_train" --eval_bit_widths 8 7 6 5 4

# adv_attack: a topic classifier, attacked at several precisions; does a random precision at inference protect it?
python3 quickstart/make_topics.py --output_dir "$work/topics"
topics=(--train_file "$work/topics/train.jsonl" --validation_file "$work/topics/test.jsonl")
classifier="$work/runs/topic_lora"
done_already topic_lora || MODEL="$work/model" OUTPUT_DIR="$classifier" bash adv_attack/train.sh "${topics[@]}" \
    --add_lora --max_steps 40 --learning_rate 3e-3 --logging_steps 20 --report_to none --seed "$seed" \
    --record_file "$work/records/topic_lora.json"
attacks=()
for bits in 32 8 4 random eot; do
    done_already "attack_$bits" || MODEL="$classifier" OUTPUT_DIR="$work/runs/attack_$bits" bash adv_attack/attack.sh \
        "${topics[@]}" --attack_bits "$bits" --precision_set 4 8 --num_samples 24 --num_iters 30 --lr 0.5 --lam_sim 20 \
        --kappa 3 --gumbel_batch 2 --gumbel_samples 10 --seed "$seed" --record_file "$work/records/attack_$bits.json"
    attacks+=("$work/runs/attack_$bits")
done
done_already attack_eval || python3 adv_attack/eval.py --model_name_or_path "$classifier" \
    --attack_dirs "${attacks[@]}" --output_dir "$work/runs/attack_eval" --record_file "$work/records/attack_eval.json"
done_already attack_rpi || python3 adv_attack/random_precision_inference.py --model_name_or_path "$classifier" \
    --attack_dirs "${attacks[@]}" --precision_set 4 8 --bitsandbytes 8bit nf4 --seed "$seed" \
    --output_dir "$work/runs/attack_rpi" --record_file "$work/records/attack_rpi.json"

python3 quickstart/report.py --records "$work/records" --output_dir "$work"
echo "plot of the search: $work/runs/search/pareto.png"
