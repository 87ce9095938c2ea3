#!/usr/bin/env bash
# Does cyclic precision training help? Static 4 bits, static 8 bits and CPT with the same adapter, updates, batch and
# learning rate, over several seeds, each evaluated at 4 to 8 bits; ends with a table and summary.json (compare.py).
#   bash compare.sh                                                    the settings of train.sh, three runs a seed
#   bash compare.sh --max_steps 500 --num_cyclic_period 16 --learning_rate 3e-3      flags for all runs alike
#   JOINT=../switch_precision/results/train bash compare.sh            beside a jointly trained checkpoint, at its widths
# Which run has which seed, bits and folder is set here: no --seed, --bit_widths, --output_dir, --model_name_or_path.
# Finished runs are not repeated, killed ones resume. SEED in JOINT is replaced by every seed.
# Environment: MODEL TRAIN_FILE VALIDATION_FILE OUTPUT_DIR NPROC_PER_NODE SEEDS JOINT
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"
out="${OUTPUT_DIR:-$here/results/compare}"
model="${MODEL:-gpt2}"
seeds="${SEEDS:-42 43 44}"

for flag in seed bit_widths output_dir model_name_or_path record_file; do
    if given "$flag"; then refuse "--${flag} is set by this script (environment: SEEDS OUTPUT_DIR MODEL)"; fi
done
check_python
for seed in $seeds; do
    joint="${JOINT:-}"
    config="${joint//SEED/$seed}/config.json"
    if [[ -n "$joint" && ! -f "$config" ]]; then refuse "JOINT: $config is not there"; fi
done
# Runs of other settings must not stand in one table.
settings="$(printf '%s\n' "MODEL=$model" "TRAIN_FILE=${TRAIN_FILE:-}" "VALIDATION_FILE=${VALIDATION_FILE:-}" "$@")"
own_folder OUTPUT_DIR "$out" settings.txt "$settings"

run() { # run NAME MODEL FLAGS...
    local name="$1" start="$2"
    shift 2
    if [[ -e "$out/$name/record.json" ]]; then echo "compare: $name is done"; return; fi
    echo "compare: $name"
    MODEL="$start" OUTPUT_DIR="$out/$name" bash "$here/train.sh" --eval_strategy no "$@"
}
for seed in $seeds; do
    run "static4_$seed" "$model" --eval_bit_widths 4 5 6 7 8 "$@" --seed "$seed" --bit_widths 4 4
    run "static8_$seed" "$model" --eval_bit_widths 4 5 6 7 8 "$@" --seed "$seed" --bit_widths 8 8
    run "cpt_$seed" "$model" --eval_bit_widths 4 5 6 7 8 "$@" --seed "$seed"
done
joint_flag=()
if [[ -n "${JOINT:-}" ]]; then
    joint_flag=(--joint "$JOINT")
    for seed in $seeds; do
        joint="${JOINT//SEED/$seed}"
        name="joint$([[ "$joint" == "$JOINT" ]] || echo "_$seed")"
        read -ra widths < <(python3 -c '
import json, sys
print(*json.load(open(sys.argv[1] + "/config.json"))["lora_bank"])' "$joint")
        run "$name" "$joint" "$@" --seed "$seed" --do_train False --eval_bit_widths "${widths[@]}"
        if [[ "$joint" == "$JOINT" ]]; then break; fi # one checkpoint for all seeds
    done
fi
python3 "$here/compare.py" --runs "$out" --seeds $seeds ${joint_flag[@]+"${joint_flag[@]}"}
