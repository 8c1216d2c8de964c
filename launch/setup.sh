#!/usr/bin/env bash
# Makes .venv in the checkout with the tested versions and this package (editable). A second run does nothing.
# PYTHON chooses the interpreter (3.10 or newer), CONSTRAINTS a file of versions instead of launch/constraints.txt; pip's own
# settings choose the index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/installed-from
constraints=${CONSTRAINTS:-launch/constraints.txt}
wanted=$(cat pyproject.toml "$constraints" | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi
echo "setting up .venv (once; PyTorch is large)"
"${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "dist_ema needs Python 3.10 or newer: set PYTHON" >&2
    exit 1
}
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
# torch first and alone: later requirements are then met by the pinned build.
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c "$constraints" torch
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c "$constraints" -e '.[dev]'
# DeepSpeed cannot be an extra: its setup imports the torch that is installed, and must build no extension. ROCm, CUDA and
# NPU packages that its setup would look for are of no use to the tests.
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c "$constraints" \
    einops hjson msgpack ninja py-cpuinfo pydantic wheel
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -c "$constraints" --no-build-isolation --no-deps deepspeed
# Libraries whose files and averages the tests read, without what they would bring: timm wants a torchvision, which does
# not import beside a CPU build of torch, and mmengine wants an OpenCV with a display.
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c "$constraints" --no-deps \
    timm mmengine ema-pytorch addict opencv-python-headless rich markdown-it-py mdurl Pygments termcolor yapf platformdirs
echo "$wanted" > "$stamp"
