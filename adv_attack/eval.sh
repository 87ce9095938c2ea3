#!/usr/bin/env bash
# Evaluate attacks: accuracy, changed tokens, perplexity, similarity (eval.py), then the matrix of attack precision x
# inference precision and random precision inference (random_precision_inference.py).
#   bash eval.sh                                                  every attack in results/attack_*
#   bash eval.sh --precision_set 4 6 8 --bitsandbytes 8bit nf4    more precisions
#   ATTACK_DIRS="results/a results/b" bash eval.sh                these attacks (with spaces: --attack_dirs "a b" c)
# The classifier's quantizer is used; --quantizer rotated gives one without a rotation that of the attacks.
# Any flag of the two scripts may be appended and wins, in each script that has it.
# Environment: MODEL ATTACK_DIRS OUTPUT_DIR REFERENCE_MODEL
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"

check_python
# Flags that only one of the scripts has go to that one; each has its own folder in the output folder.
to_eval=() to_inference=() target=both
for word in "$@"; do
    case "${word//-/_}" in
        __output_dir*) target=none ;;
        __eval_bits*) target=eval ;;
        __precision_set* | __inference_bits* | __bitsandbytes* | __bnb* | __repetitions* | __seed* | __record_file*)
            target=inference ;;
        __*) target=both ;;
    esac
    if [[ "$target" == both || "$target" == eval ]]; then to_eval+=("$word"); fi
    if [[ "$target" == both || "$target" == inference ]]; then to_inference+=("$word"); fi
done

attacks=("$here"/results/attack_*/)
if [[ -n "${ATTACK_DIRS:-}" ]]; then read -r -a attacks <<<"$ATTACK_DIRS"; fi
model="${MODEL:-$here/results/train}"
value="${OUTPUT_DIR:-$here/results}"
given output_dir || true
output="$value"
reference=()
if [[ -n "${REFERENCE_MODEL:-}" ]]; then reference=(--reference_model "$REFERENCE_MODEL"); fi

python3 "$here/eval.py" \
    --model_name_or_path "$model" \
    ${reference[@]+"${reference[@]}"} \
    --attack_dirs "${attacks[@]}" \
    --output_dir "$output/eval" \
    ${to_eval[@]+"${to_eval[@]}"}
python3 "$here/random_precision_inference.py" \
    --model_name_or_path "$model" \
    --attack_dirs "${attacks[@]}" \
    --precision_set 4 8 \
    --output_dir "$output/rpi" \
    ${to_inference[@]+"${to_inference[@]}"}
