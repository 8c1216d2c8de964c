#!/usr/bin/env bash
# Shows on a GPU what this package costs: the tests that need one, then every benchmark, in at most 8 minutes.
#
#     bash launch/gpu.sh [OUT]              # OUT has results.md, results.json and log.txt; runs/gpu if left out
#     bash launch/gpu.sh --dry-run [OUT]    # the same on a CPU in small sizes; two parts fail on purpose
#     bash launch/gpu.sh --only tests,step --seconds 200 OUT
#
# It needs no network, and installs nothing: PYTHON (python3 if left out) has torch 2.11 or newer, accelerate,
# safetensors, huggingface_hub, tqdm, numpy and pytest. What is missing can be carried along as wheels, made where there
# is a network, for the Python of the machine with the GPU (3.12 here):
#
#     pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels \
#         -c launch/constraints.txt isal -r launch/bench/peers.txt
#     WHEELS=wheels bash launch/gpu.sh
#
# They are unpacked to a temporary folder, which comes first in PYTHONPATH. A venv with the packages of the system would
# not do: where python3 is itself that of a venv, such a venv does not have its packages.
#
# Each part is a process with a time limit of its own, the most important first. What fails, what times out and what
# cannot be imported is in the table as such, and the next part begins. The exit status is 1 if any part failed. Files are
# saved to a folder in TMPDIR (/tmp if unset), which should be a local disk.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ulimit -c 0 # a part that is ended leaves no core

python=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then
    carried=$(mktemp -d)
    trap 'rm -rf "$carried"' EXIT
    for wheel in "$WHEELS"/*.whl; do
        "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --upgrade \
            --target "$carried" "$wheel" || echo "not unpacked: $wheel" >&2
    done
    export PYTHONPATH="$carried${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" "$root/launch/bench/gpu_run.py" "$@"
