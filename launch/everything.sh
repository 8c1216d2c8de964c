#!/usr/bin/env bash
# All that is too long for the gate, or needs programs that the gate does without. CONTRIBUTING.md tells the seconds of each
# part.
#
#   bash launch/everything.sh                  # every part below
#   bash launch/everything.sh site browser     # these parts, in the order of this file
#
# A part that fails does not stop the others, and makes the exit status 1. The output of a part is in
# runs/everything/PART.log. A table has a row for each part: what came of it, seconds on the clock and of the processors, and
# the last line that it printed. The table is in runs/everything/table.txt as far as the run has come, and is printed at the
# end. Nothing is skipped: a missing Chromium (Debian: apt-get install chromium chromium-driver) fails its part, and so does
# a test that skips itself.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONPATH=$PWD
export RES_OPTIONS="timeout:1 attempts:1" # as in launch/test.sh
python=.venv/bin/python
logs=runs/everything

parts() { # what to do with each part: its name and its command follow
    # The site; then a reader in a browser.
    "$1" site bash launch/docs.sh
    "$1" browser "$python" -m pytest tests/everything/test_site_in_browser.py

    # What a newcomer runs first, and what is published: the wheel serves in an environment that has nothing else.
    "$1" notebook "$python" launch/notebook.py
    "$1" wheel bash launch/package.sh --try runs/everything/dist
    "$1" demo bash launch/demo.sh runs/everything/demo

    # Every library that the package serves, each by its own trainer, loader and checkpoint; and all tests that the gate may
    # skip because a library is missing.
    "$1" libraries bash launch/test.sh tests/integrations tests/disk/test_folders_of_libraries.py \
        tests/checkpoint/test_stock_tools.py tests/checkpoint/test_averaged_only.py \
        tests/topology/test_wrappers.py tests/topology/test_plain_bytes.py \
        tests/topology/test_transformers_plans.py tests/launch/test_clusters.py tests/launch/test_launch.py

    # The kernel of updates on a GPU (tests/everything/test_fused_kernel.py), interpreted and compiled.
    "$1" kernel bash launch/kernel.sh

    # The study of real ranks whose figures the pages tell.
    "$1" control_plane "$python" launch/studies/control_plane.py --real

    # The sweeps of launch/crash/ at their full size; the suite has a short version of each.
    local sweep
    for sweep in exits readers job_pairs rank_losses kill_saves file_faults rank_interrupts interrupts; do
        "$1" "$sweep" "$python" "launch/crash/$sweep.py"
    done
    "$1" signals "$python" launch/crash/interrupts.py --signals 200
    "$1" rank_signals "$python" launch/crash/rank_interrupts.py --signals 200
}

names=()
note() { names+=("$1"); }

wanted=" $* "
status=0
TIMEFORMAT='%0R %0U %0S'

run() { # name, command
    local name=$1 log=$logs/$1.log answer=passed clock user system
    shift
    [ "$wanted" = "  " ] || [[ $wanted == *" $name "* ]] || return 0
    echo "== $name: $*"
    { time "$@" > "$log" 2>&1; } 2> "$logs/seconds" || answer=FAILED
    if [ $answer = passed ] && grep -qE '^=+ .*[0-9]+ skipped' "$log"; then answer=SKIPPED; fi
    if [ $answer != passed ]; then status=1; tail -n 20 "$log"; fi
    read -r clock user system < <(tail -n 1 "$logs/seconds")
    printf '%-16s %-7s %6d s %6d s of CPU  %s\n' "$name" $answer "$clock" $((user + system)) \
        "$(tail -n 1 "$log" | cut -c 1-120)" >> "$logs/table.txt"
}

parts note
for name in "$@"; do
    [[ " ${names[*]} " == *" $name "* ]] || { echo "there is no part $name: ${names[*]}" >&2; exit 2; }
done
bash launch/setup.sh
"$python" -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e '.[browser,notebook]'

mkdir -p "$logs"
commit=$(git describe --always --dirty 2> /dev/null || echo "no commit")
cores=$(env -u OMP_NUM_THREADS nproc) # nproc takes that for the number of cores
echo "$commit, $(date -u +%F), $cores cores" > "$logs/table.txt"
trap 'exit 130' INT # else a part ends, and the next one begins
trap 'cat "$logs/table.txt"' EXIT
SECONDS=0
parts run
echo "$SECONDS seconds in all" >> "$logs/table.txt"
exit $status
