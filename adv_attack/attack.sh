#!/usr/bin/env bash
# Attack a classifier that train.sh made, with GBDA: 100 texts, 100 steps of 10 relaxed samples, 100 hard samples kept.
#   bash attack.sh                                                the float32 model
#   bash attack.sh --attack_bits 4                                the model at W4A4KV4 (or 8, "W4A8KV8", a JSON config)
#   bash attack.sh --attack_bits random --precision_set 4 8       a precision drawn per step
#   bash attack.sh --attack_bits eot --precision_set 4 8          the mean over the set in every step (adaptive)
# The classifier's quantizer is attacked; --quantizer rotated calibrates one that has no rotation on the training texts
# (TRAIN_FILE, or DATASET of the hub) and keeps the rotation in OUTPUT_DIR.
# Any flag of whitebox_attack.py may be appended and wins. A killed attack resumes when the same command is given again.
# Environment: MODEL DATASET TRAIN_FILE VALIDATION_FILE OUTPUT_DIR ATTACK_BITS REFERENCE_MODEL
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"

check_python
data_flags "${DATASET:-ag_news}" TRAIN_FILE VALIDATION_FILE
reference=()
if [[ -n "${REFERENCE_MODEL:-}" ]]; then reference=(--reference_model "$REFERENCE_MODEL"); fi
value="${ATTACK_BITS:-32}"
given attack_bits || true # the output folder is named after the precision, whichever way it was given
bits="$value"
name="$(basename -- "$bits" .json)"

python3 "$here/whitebox_attack.py" \
    --model_name_or_path "${MODEL:-$here/results/train}" \
    ${reference[@]+"${reference[@]}"} \
    "${data[@]}" \
    --max_seq_length 256 \
    --attack_bits "$bits" \
    --num_samples 100 \
    --seed 42 \
    --output_dir "${OUTPUT_DIR:-$here/results/attack_$name}" \
    "$@"
