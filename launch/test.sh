#!/usr/bin/env bash
# Passes the tests: `bash launch/test.sh [pytest arguments]`. Sets up .venv at the first run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
# One torch thread per process: the rank tests run several processes on few cores.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# torch looks up the name of each client of its store, in vain on many machines: an answer that is lost costs one second
# instead of ten, while the ranks of a test wait.
export RES_OPTIONS="timeout:1 attempts:1"
exec .venv/bin/python -m pytest -n auto --dist loadfile "$@"
