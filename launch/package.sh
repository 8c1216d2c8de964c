#!/usr/bin/env bash
# Builds the sdist and the wheel from the tracked files alone, and checks them:  bash launch/package.sh [OUT]
# With --try the wheel is also installed into an empty environment, where it runs the example of the README.
# OUT: dist/ in the checkout unless given. PYTHON: an interpreter with `build` and `twine` (.venv has them).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
is_tried=false
if [[ ${1:-} == --try ]]; then is_tried=true; shift; fi
out=$(realpath -m "${1:-dist}")
python=$(realpath -s "${PYTHON:-.venv/bin/python}")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/tree"
git ls-files -z | xargs -0 cp --parents -t "$work/tree"
rm -rf "$out"
# The build's own tools come from the environment: the versions that are pinned, and no download.
"$python" -m build --no-isolation --outdir "$out" "$work/tree" > "$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
"$python" -m twine check --strict "$out"/*
ls -l "$out"

if $is_tried; then
    unset PYTHONPATH # a checkout in it would be what pip takes for installed, and what Python imports
    "$python" - README.md > "$work/example.py" <<'EXAMPLE'
import re, sys
print(re.search(r"```python\n(.*?)```", open(sys.argv[1]).read(), re.DOTALL).group(1))
EXAMPLE
    "$python" -m venv "$work/empty"
    constraints=$PWD/launch/constraints.txt
    "$work/empty/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" "$out"/*.whl
    cd "$work" # away from the checkout
    "$work/empty/bin/python" - <<'INSTALLED'
import sys, dist_ema
if not dist_ema.__file__.startswith(sys.prefix):
    sys.exit(f"{dist_ema.__file__} was tried, which is not of the wheel")
INSTALLED
    ACCELERATE_USE_CPU=true "$work/empty/bin/python" example.py
    "$work/empty/bin/dist-ema" verify checkpoint
    "$work/empty/bin/dist-ema" inspect checkpoint
fi
