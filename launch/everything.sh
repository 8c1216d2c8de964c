#!/usr/bin/env bash
# All that is too long for the gate, or needs programs that the gate does without. Hours on two cores.
#
#   bash launch/everything.sh                  # every part below
#   bash launch/everything.sh site browser     # these parts
#
# A part that fails does not stop the others. The output of a part is in runs/everything/PART.log; at the end a table says
# what passed and in how many seconds, and the exit status is 1 if a part failed. Nothing is skipped: a missing Chromium
# (Debian: apt-get install chromium chromium-driver) fails its part.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wanted=" $* "
logs=runs/everything
mkdir -p "$logs"
table=()
status=0

part() { # name, command
    local name=$1 begin=$SECONDS answer=passed
    shift
    names+=("$name")
    [ "$wanted" = "  " ] || [[ $wanted == *" $name "* ]] || return 0
    echo "== $name: $*"
    "$@" > "$logs/$name.log" 2>&1 || { answer=FAILED status=1; tail -n 20 "$logs/$name.log"; }
    table+=("$(printf '%-16s %-7s %6d s' "$name" "$answer" $((SECONDS - begin)))")
}

names=()
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONPATH=$PWD
python=.venv/bin/python
bash launch/setup.sh
"$python" -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e '.[browser,notebook]'

# The site; then a reader in a browser.
part site bash launch/docs.sh
part browser "$python" -m pytest tests/everything/test_site_in_browser.py

# What a newcomer runs first, and what is published: the wheel serves in an environment that has nothing else.
part notebook "$python" launch/notebook.py
part wheel bash launch/package.sh --try runs/everything/dist

# Every library that the package serves, each by its own trainer, loader and checkpoint.
part libraries bash launch/test.sh tests/integrations tests/disk/test_folders_of_libraries.py

# The sweeps of launch/crash/ at their full size; the suite has a short version of each.
for sweep in exits file_faults interrupts job_pairs kill_saves rank_interrupts rank_losses readers; do
    part "$sweep" "$python" "launch/crash/$sweep.py"
done
part signals "$python" launch/crash/interrupts.py --signals 200
part rank_signals "$python" launch/crash/rank_interrupts.py --signals 200

# The main job, and the studies that show what the pages say.
part demo bash launch/demo.sh runs/everything/demo
part control_plane "$python" launch/studies/control_plane.py --real

for name in $wanted; do
    [[ " ${names[*]} " == *" $name "* ]] || { echo "there is no part $name: ${names[*]}" >&2; status=2; }
done
printf '%s\n' "${table[@]}"
exit $status
