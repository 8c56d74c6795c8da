#!/usr/bin/env bash
# The GPU tests and benchmarks in one call, on a machine with torch and numpy and no network.
# Prints a short table; writes the figures to $OUT, if that is set.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python3}
status=0
"$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || exit 1
if "$PYTHON" -c 'import pytest' 2>/dev/null; then
    "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -o addopts= || status=$?
else
    echo "pytest is not installed: the GPU tests did not run"
fi
"$PYTHON" -m benchmarks --device cuda ${OUT:+--out "$OUT"} || status=$?
exit "$status"
