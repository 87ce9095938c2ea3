#!/usr/bin/env bash
# What a machine with one GPU can verify in eight minutes: tests on CUDA, trainings in bf16 and fp16, times (gpu_check.py).
#   bash tests/gpu_check.sh FOLDER               summary.json, log.txt and bench_*.json go to FOLDER
#   bash tests/gpu_check.sh FOLDER --dry_run     the same path with small sizes; always so where there is no GPU
# Needs the requirements and pytest in python3; no network. The exit status is 1 if a stage failed.
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
exec python3 "$here/gpu_check.py" "$@"
