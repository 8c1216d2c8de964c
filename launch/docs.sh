#!/usr/bin/env bash
# Builds the documentation site into site/: `bash launch/docs.sh`. A warning fails it.
# It makes .venv-docs with the pinned packages of the extra `docs`; PYTHON chooses the interpreter (3.10 or newer). Torch
# is not needed: the API reference is made from source that is read, not imported.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv-docs/installed-from
wanted=$(cat pyproject.toml launch/constraints.txt | cksum)
if ! [ -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "setting up .venv-docs (once)"
    [ -x .venv-docs/bin/python ] || "${PYTHON:-python3}" -m venv .venv-docs
    # The extra by its lines: pip would install it with dist-ema, and so with torch.
    mapfile -t packages < <(sed -n '/^docs = \[$/,/^\]$/ s/^ *"\(.*\)",$/\1/p' pyproject.toml)
    .venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt "${packages[@]}"
    echo "$wanted" > "$stamp"
fi
rm -rf site
# Material's note that another generator will follow it is no warning about this site.
NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict --config-file launch/site/mkdocs.yml
echo "site/index.html; to search in it: python3 -m http.server --directory site"
