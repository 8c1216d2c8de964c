#!/usr/bin/env bash
# Passes the tests of the GPU kernel where there is no GPU: in Triton's interpreter, and by its compiler.
# Triton (1 GB) goes to runs/triton, and not into .venv: libraries that find it there expect a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
    -c launch/constraints.txt --target runs/triton triton
PYTHONPATH=$PWD:$PWD/runs/triton exec .venv/bin/python -m pytest -q tests/everything/test_fused_kernel.py
