"""An accelerate loop under Ray Train, with a sharded average that comes back when Ray restarts the workers.

    pip install 'ray[train]'
    python launch/clusters/ray_train.py --storage /shared/runs --workers 2
    ray job submit -- python launch/clusters/ray_train.py --storage s3://bucket/runs --workers 16 --gpu

Ray starts the workers and makes their process group. The loop is that of any other launcher, but for two calls: the
folder that `save_state` wrote is reported to Ray, which copies it into the storage path, and a restarted worker loads
the checkpoint that Ray hands it. Started again with the same --storage and --name, a run goes on.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import Tensor, nn

from dist_ema import CosineSchedule, attach


class Progress:
    """How many optimizer steps are done; accelerate saves and restores it with every checkpoint."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def batch_of(step: int, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """What this worker sees at a step: decided by the two numbers alone, so a resumed run sees the same."""
    generator = torch.Generator().manual_seed(step * accelerator.num_processes + accelerator.process_index)
    inputs = torch.randn(16, 8, generator=generator)
    return inputs.to(accelerator.device), inputs.square().sum(dim=1, keepdim=True).to(accelerator.device)


def train(config: dict[str, Any], before_step: Callable[[int], object] | None = None) -> None:
    """Collective: Ray calls it on every worker, and calls it anew on all of them after one was lost."""
    accelerator = Accelerator(cpu=not config["gpu"])
    set_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 1))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    ema = attach(accelerator, model, optimizer, CosineSchedule(0.1, 0.0, total_steps=config["steps"]))
    progress = Progress()
    accelerator.register_for_checkpointing(progress)

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:  # the folder itself, or a copy of it on each node
            accelerator.load_state(folder)

    while progress.step < config["steps"]:
        if before_step is not None:
            before_step(progress.step)
        inputs, targets = batch_of(progress.step, accelerator)
        loss = nn.functional.mse_loss(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        if progress.step % config["save_every"] == 0 or progress.step == config["steps"]:
            report(accelerator, progress.step, {"loss": loss.item(), "num_updates": ema.num_updates})


def report(accelerator: Accelerator, step: int, metrics: dict[str, float]) -> None:
    """Collective: save, and let Ray copy the checkpoint into the storage path."""
    # Each worker has a working directory of its own, so the path is absolute, and the same on all of them.
    made = tempfile.mkdtemp(prefix="checkpoint-") if accelerator.is_main_process else None
    folder = broadcast_object_list([made])[0]
    accelerator.save_state(folder)
    accelerator.wait_for_everyone()  # else a file of a slower worker of this node is not there yet
    # One worker of a node reports its files. Ray merges what the nodes have: the average lies on that of rank 0.
    checkpoint = ray.train.Checkpoint.from_directory(folder) if accelerator.is_local_main_process else None
    ray.train.report(
        {**metrics, "step": step},
        checkpoint=checkpoint,
        checkpoint_dir_name=f"checkpoint-{step}",
        delete_local_checkpoint_after_upload=True,
    )


def run(options: argparse.Namespace, before_step: Callable[[int], object] | None = None) -> Result:
    """Train to the end; workers that die are started again, from the latest checkpoint that is whole.

    Args:
        options: the command line.
        before_step: is called on every worker with the number of steps done.
    """
    return TorchTrainer(
        functools.partial(train, before_step=before_step),
        train_loop_config={"steps": options.steps, "save_every": options.save_every, "gpu": options.gpu},
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.gpu),
        run_config=RunConfig(
            name=options.name,
            storage_path=options.storage if "://" in options.storage else str(Path(options.storage).resolve()),
            failure_config=FailureConfig(max_failures=options.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on Ray's workers, with a sharded average of the weights.")
    parser.add_argument("--storage", required=True, help="a folder that all nodes share, or a URL that Ray can write")
    parser.add_argument("--name", default="dist-ema", help="of the run: its folder in the storage")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=50, help="steps")
    parser.add_argument("--max-failures", type=int, default=3, help="restarts of the workers")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    result = run(parse_options())
    print(f"{result.metrics} in {result.checkpoint}")
