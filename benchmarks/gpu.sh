#!/usr/bin/env bash
# The GPU tests and benchmarks in one call of under nine minutes, on a machine with torch and numpy and no network.
# Prints short tables; writes the figures to $OUT, if that is set. DRY_RUN=1 goes the same way on a CPU, in small.
# What fails or hangs is stopped and named, and the rest runs.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
DRY_RUN=${DRY_RUN:-}
status=0
if [ -n "$DRY_RUN" ]; then
    "$PYTHON" -c 'import torch; print(torch.__version__, "dry run on the CPU")' || exit 1
else
    "$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || exit 1
fi

# The tests of programs that wait for one another come last: if they hang, no signal reaches a process within CUDA.
gpu_tests() {
    "$PYTHON" -c 'import pytest' 2>/dev/null || { echo "pytest is not installed: the GPU tests did not run"; return; }
    timeout -k 5 "$1" "$PYTHON" -m pytest -q -m "gpu and not slow" -k "$2" -p no:cacheprovider -o addopts= \
        ${DRY_RUN:+--collect-only -q} --continue-on-collection-errors tests/optim/test_triton.py \
        tests/optim/test_offload.py tests/models/test_bert_unpadded.py tests/experiments/test_gpu.py || status=$?
}

gpu_tests 150 "not one-launch"
if [ -n "$DRY_RUN" ]; then
    "$PYTHON" -m benchmarks --dry-run ${OUT:+--out "$OUT"} || status=$?
else
    "$PYTHON" -m benchmarks --device cuda --budget-s 310 ${OUT:+--out "$OUT"} || status=$?
fi
gpu_tests 60 "one-launch"
exit "$status"
