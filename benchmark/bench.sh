#!/usr/bin/env bash
# Speed, memory and size at any bit-width configs, beside other implementations (benchmark.py).
#   bash bench.sh                                         GPT-2 124M, random weights, at W8A8KV8 and W4A8KV8
#   bash bench.sh --torch_compile --shapes 8x384 8x220 1x180
#   bash bench.sh --training                              one training step of adapters and head
#   MODEL=results/train bash bench.sh --bit_configs 8 W4A8KV8 4 --eval_record results/eval/record.json
# Give it a machine without other load. Optional peers: pip install torchao onnx onnxscript onnxruntime
# Any flag of benchmark.py may be appended and wins.
# Environment: MODEL OUTPUT_DIR BIT_CONFIG
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/../base_model/common.sh"

check_python
bit_config_flag --bit_configs bit_configs
model=(--random_weights)
if given model_name_or_path; then
    model=()
elif [[ -n "${MODEL:-}" ]] && ! is_on random_weights; then
    model=(--model_name_or_path "$MODEL")
elif [[ -z "${BIT_CONFIG:-}" ]]; then
    bits=(--bit_configs 8 W4A8KV8)
fi

python3 "$here/benchmark.py" \
    ${model[@]+"${model[@]}"} \
    ${bits[@]+"${bits[@]}"} \
    --output_dir "${OUTPUT_DIR:-$here/results/benchmark}" \
    "$@"
