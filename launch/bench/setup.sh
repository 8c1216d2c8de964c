#!/usr/bin/env bash
# Makes .venv-bench in the checkout: this package (editable) and the libraries it is measured against, all pinned.
# A second run does nothing. PYTHON chooses the interpreter (3.10 or newer); pip's own settings choose the index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

stamp=.venv-bench/installed-from
wanted=$(cat pyproject.toml launch/constraints.txt launch/bench/peers.txt | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi
echo "setting up .venv-bench (once; PyTorch is large)"
[ -x .venv-bench/bin/python ] || "${PYTHON:-python3}" -m venv .venv-bench
pip=(.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt)
# torch first and alone: later requirements are then met by the pinned build.
"${pip[@]}" torch
"${pip[@]}" -e . psutil
# Without their own requirements (torchvision, opencv): peers.txt has what their averages need.
"${pip[@]}" --no-deps -r launch/bench/peers.txt
echo "$wanted" > "$stamp"
