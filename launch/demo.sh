#!/usr/bin/env bash
# From nothing to a proof, on two CPU cores in about two minutes after the set-up:
#   1. two processes train a byte-level language model under FSDP2, save at two thirds and exit;
#   2. one process resumes from that checkpoint and finishes the run;
#   3. a fresh process reads the averaged weights with safetensors alone and must see the same loss.
# Fails unless the averaged weights end up better than the live ones.
#
#   bash launch/demo.sh --merge [OUT]   instead: a constant rate and a merge, an EMA, and real decays, side by side
#                                       (three minutes of one core); a table, and OUT/merge.svg
#   bash launch/demo.sh [OUT]        OUT: demo-out/ in the checkout unless given
set -euo pipefail

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$launch")
is_merge=false
if [[ ${1:-} == --merge ]]; then is_merge=true; shift; fi
mkdir -p "${1:-$root/demo-out}"
out=$(cd "${1:-$root/demo-out}" && pwd)

bash "$launch/setup.sh"
cd "$root"
python=.venv/bin/python
torchrun=.venv/bin/torchrun

if $is_merge; then
    rm -rf "$out"/values "$out"/merged
    rm -f "$out"/merge.{csv,svg}
    echo "== 2000 steps at a constant rate, and four decays of 400 beside them: about three minutes of one core"
    # One thread: on busy cores two wait for each other at each of the many small operations.
    OMP_NUM_THREADS=1 "$python" launch/pretrain/merge_run.py --out "$out"
    .venv/bin/dist-ema merge "$out/merged" $(ls -v "$out"/values/*.safetensors) --decay 1-sqrt
    echo "picture: $out/merge.svg, numbers: $out/merge.csv, a merge of ten of the values: $out/merged"
    exit
fi

# Only what an earlier demo left: OUT may be anybody's folder.
rm -rf "$out"/checkpoint-1000 "$out"/checkpoint-1500
rm -f "$out"/{loss.csv,model.json,export.json,curves.png}

# Small batches at a high constant rate: the live weights keep jumping around, and the average does not.
run=(launch/pretrain/pretrain.py --sharding fsdp2 --out "$out" --seed 0
     --width 128 --depth 2 --heads 4 --context 64 --batch-size 16
     --steps 1500 --lr 3e-3 --warmup-steps 30 --momentum 0.05 --end-momentum 0.01
     --eval-every 100 --save-every 1000)
export PYTHONUNBUFFERED=1

echo "== 1/3: two processes, FSDP2, to step 1000 of 1500"
OMP_NUM_THREADS=1 "$torchrun" --standalone --nproc_per_node 2 "${run[@]}" --stop-at 1000

echo "== 2/3: one process goes on from step 1000"
OMP_NUM_THREADS=2 "$torchrun" --standalone --nproc_per_node 1 "${run[@]}" --resume "$out/checkpoint-1000"

echo "== 3/3: a fresh process, safetensors alone"
OMP_NUM_THREADS=2 "$python" launch/pretrain/evaluate_export.py "$out/checkpoint-1500/ema/model.safetensors" \
    --model "$out/model.json" --json "$out/export.json"
"$python" launch/pretrain/curves.py "$out/loss.csv" "$out/curves.png"
echo "curves: $out/curves.png, numbers: $out/loss.csv"
"$python" launch/pretrain/verdict.py "$out/loss.csv" "$out/export.json"
