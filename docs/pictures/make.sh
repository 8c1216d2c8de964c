#!/usr/bin/env bash
# Draws the pictures of docs/schedules.md and docs/schedules/, or those of the given names: `bash docs/pictures/make.sh annealed`.
# Those of docs/performance/growth.md are measured, and drawn by launch/bench/growth.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

wanted=" $* "
draw() { # picture, updates, schedules
    [ "$wanted" = "  " ] || [[ $wanted == *" $1 "* ]] || return 0
    local arguments=()
    for schedule in "${@:3}"; do arguments+=(--schedule "$schedule"); done
    python -m dist_ema.cli plot "${arguments[@]}" --steps "$2" --out "$1.svg" --force
}

draw compared 10000 'ConstantSchedule(decay=0.999)' 'HalfLifeSchedule(fraction=0.05)' \
    'CosineSchedule(0.004, total_steps=10_000)' 'after(8_000, EqualSchedule())'
draw cosine 12000 'CosineSchedule(0.004, total_steps=10_000)' 'CosineSchedule(0.004, 0.001, total_steps=10_000)'
draw linear 12000 'LinearSchedule(0.002, 0.0, total_steps=10_000)' \
    'chain((0, LinearSchedule(0.01, 0.004, total_steps=2_000)), (2_000, CosineSchedule(0.004, total_steps=8_000)))'
draw merge 12000 "MergeSchedule('linear', num_steps=2_000, start_step=8_000)" \
    "MergeSchedule('1-sqrt', num_steps=2_000, start_step=8_000)" \
    "MergeSchedule('cosine', num_steps=2_000, start_step=8_000)"
draw constant 12000 'ConstantSchedule(decay=0.999)' 'ConstantSchedule(half_life_steps=2000)'
draw annealed 12000 'AnnealedSchedule(0.0002, gamma=100)' 'AnnealedSchedule(0.001, gamma=100)'
draw bema 12000 'BemaSchedule(kappa=0.5, rho=10.0)' 'BemaSchedule(kappa=0.7, rho=10.0, floor=0.005)'
draw ramp 12000 'RampSchedule(max_decay=0.999)' 'RampSchedule(max_decay=0.9999)'
draw inverse_gamma 12000 'InverseGammaSchedule(power=0.75)' 'InverseGammaSchedule(power=0.667, max_decay=0.999)'
draw power 12000 'PowerSchedule(sigma_rel=0.05)' 'PowerSchedule(sigma_rel=0.1)' 'PowerSchedule(sigma_rel=0.2)'
draw half_life 12000 'HalfLifeSchedule(fraction=0.05)' 'HalfLifeSchedule(fraction=0.05, max_half_life_steps=250)'
draw equal 12000 'EqualSchedule()' 'after(9_000, EqualSchedule())'
draw combinators 200 'ConstantSchedule(decay=0.95)' 'after(50, ConstantSchedule(decay=0.95))' \
    'every(20, ConstantSchedule(decay=0.95))' 'scaled_batch(4, ConstantSchedule(decay=0.95))'

[ "$wanted" = "  " ] || [[ $wanted == *" profile "* ]] || exit 0
snapshots=$(mktemp -d)
trap 'rm -r "$snapshots"' EXIT
python - "$snapshots" <<'RUN'
import sys

import torch

from dist_ema import PowerSchedule, ShardedEMA

ema = ShardedEMA(torch.nn.Linear(1, 1), {"short": PowerSchedule(sigma_rel=0.05), "long": PowerSchedule(sigma_rel=0.1)})
for step in range(1, 1001):
    ema.update()
    if step % 100 == 0:
        ema.snapshot(sys.argv[1])
RUN
python -m dist_ema.cli plot "$snapshots" --sigma-rel 0.15 --out profile.svg --force
