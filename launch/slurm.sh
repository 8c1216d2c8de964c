#!/usr/bin/env bash
# Several nodes under Slurm: one torchrun per node, meeting at the first host of the allocation (c10d).
#   sbatch launch/slurm.sh                                         a run; after a requeue it goes on by itself
#   sbatch --dependency=singleton launch/slurm.sh                  the same again, when the job before it has ended
#   sbatch launch/slurm.sh --resume runs/byte-lm/checkpoint-5000   from this checkpoint; the number of nodes may differ
# Submit from the checkout, on a file system that all nodes share, after `bash launch/setup.sh`.
#SBATCH --job-name=byte-lm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
set -euo pipefail

# sbatch runs a copy of this file, so the checkout is found through the folder it was submitted from.
cd "$SLURM_SUBMIT_DIR"

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_host=${hosts%%$'\n'*}
# A port that two jobs on one host are unlikely to share.
port=$((20000 + SLURM_JOB_ID % 20000))

# One Python process per GPU shares the node's cores with its neighbours.
gpus_per_node=${SLURM_GPUS_ON_NODE:-8}
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / gpus_per_node))

# srun starts one torchrun on each node; torchrun starts one process for each GPU and numbers them all. Slurm 22.05 and
# newer do not hand --cpus-per-task on to srun: without it all processes of a node would share one core.
# A requeued job keeps its id, so its number of restarts keeps late agents of the attempt before out.
# --max-restarts 0: after a failure, submit again; --resume auto takes the newest whole checkpoint, if there is one.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc_per_node "$gpus_per_node" \
    --rdzv_backend c10d \
    --rdzv_id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --rdzv_endpoint "$first_host:$port" \
    --max-restarts 0 \
    launch/pretrain/pretrain.py \
    --sharding fsdp2 --mixed-precision bf16 \
    --width 1024 --depth 16 --heads 16 --context 1024 --batch-size 512 --lr 3e-4 --warmup-steps 500 \
    --steps 20000 --momentum 0.004 --end-momentum 0.0008 \
    --save-every 1000 --eval-every 500 --out runs/byte-lm --resume auto \
    "$@"
