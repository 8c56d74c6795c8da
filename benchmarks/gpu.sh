#!/usr/bin/env bash
# The GPU tests and benchmarks in one call, on a machine with torch and numpy and no network.
# Prints a short table; writes the figures to $OUT, if that is set. DRY_RUN=1 goes the same way on a CPU, in small.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python3}
DRY_RUN=${DRY_RUN:-}
status=0
if [ -n "$DRY_RUN" ]; then
    "$PYTHON" -c 'import torch; print(torch.__version__, "dry run on the CPU")' || exit 1
else
    "$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || exit 1
fi
if "$PYTHON" -c 'import pytest' 2>/dev/null; then
    "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -o addopts= ${DRY_RUN:+--collect-only} || status=$?
else
    echo "pytest is not installed: the GPU tests did not run"
fi
if [ -n "$DRY_RUN" ]; then
    "$PYTHON" -m benchmarks --dry-run ${OUT:+--out "$OUT"} || status=$?
else
    "$PYTHON" -m benchmarks --device cuda ${OUT:+--out "$OUT"} || status=$?
fi
exit "$status"
