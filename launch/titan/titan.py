"""A loop in the shape of torchtitan's: ``model_parts``, FSDP2 with tensor parallelism, DCP saves beside the training.

$ torchrun --nproc-per-node 4 launch/titan/titan.py --steps 60 --out runs/titan
$ torchrun --nproc-per-node 2 launch/titan/titan.py --steps 90 --out runs/titan     # goes on, on other ranks

It learns to reverse the bits of a number, which needs no data. The average is one more state of the checkpoints.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dist_ema import CosineSchedule, ShardedEMA

NUM_BITS = 12


def parallelized(device: str) -> list[nn.Module]:
    """The parts of the model that this rank has: all of it in one, without a pipeline."""
    world_size = dist.get_world_size()
    tp_size = 2 if world_size % 2 == 0 else 1
    mesh = init_device_mesh(device, (world_size // tp_size, tp_size), mesh_dim_names=("fsdp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(NUM_BITS), nn.Linear(NUM_BITS, 64), nn.GELU(), nn.Linear(64, NUM_BITS))
    parallelize_module(model.to(device), mesh["tp"], {"1": ColwiseParallel(), "3": RowwiseParallel()})
    fully_shard(model, mesh=mesh["fsdp"])
    return [model]


class Trainer:
    """Trains, and keeps model, optimizer and average in one DCP checkpoint."""

    def __init__(self, out: Path, num_steps: int) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.out = out
        self.num_steps = num_steps
        self.model_parts = parallelized(self.device)
        self.optimizer = torch.optim.AdamW((value for part in self.model_parts for value in part.parameters()), lr=0.01)
        # When all parts are sharded and have their weights.
        self.ema = ShardedEMA(self.model_parts, CosineSchedule(0.2, 0.01, total_steps=num_steps))
        # A save communicates beside the training, so it takes a group of its own.
        self._saving_group = dist.new_group(backend="gloo")
        self._saving: Any = None

    def states(self) -> dict[str, Any]:
        """What a checkpoint has."""
        (model,) = self.model_parts
        of_model, of_optimizer = get_state_dict(model, self.optimizer)
        return {"model": of_model, "optimizer": of_optimizer, "ema": self.ema.stateful()}

    def load(self) -> None:
        """Go on from the newest checkpoint, which any number of ranks may have written."""
        complete = sorted(path.parent for path in self.out.glob("step-*/.metadata"))  # DCP writes it last
        if complete:
            states = self.states()
            load(states, checkpoint_id=complete[-1])
            (model,) = self.model_parts
            set_state_dict(
                model, self.optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
            )

    def save(self) -> None:
        """Write a checkpoint while the training goes on."""
        self.wait()
        folder = self.out / f"step-{self.ema.num_updates:06}"
        self._saving = async_save(self.states(), checkpoint_id=folder, process_group=self._saving_group)

    def wait(self) -> None:
        """Wait for the save beside the training, and raise its error."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None

    def loss(self, seed: int) -> Tensor:
        """The loss of a batch that is alike on all ranks."""
        (model,) = self.model_parts
        generator = torch.Generator().manual_seed(seed)
        bits = torch.randint(0, 2, (32, NUM_BITS), generator=generator).float().to(self.device)
        return nn.functional.binary_cross_entropy_with_logits(model(bits), bits.flip(1))

    def validate(self) -> tuple[float, float]:
        """The losses of the live and of the averaged weights. Every rank must call it."""
        with torch.no_grad():
            live = self.loss(10**9).item()
            with self.ema.average_parameters():
                return live, self.loss(10**9).item()

    def train(self, save_every: int) -> None:
        """All steps that are left."""
        self.load()
        for step in range(self.ema.num_updates, self.num_steps):
            self.loss(step).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update()  # every rank, once after each optimizer step
            if self.ema.num_updates % save_every == 0 or self.ema.num_updates == self.num_steps:
                self.save()
                live, averaged = self.validate()
                if dist.get_rank() == 0:
                    print(f"step {self.ema.num_updates}: live {live:.4f}, averaged {averaged:.4f}", flush=True)
        self.wait()
        self.ema.consolidate(self.out / "export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/titan"))
    arguments = parser.parse_args()
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank())
    Trainer(arguments.out, arguments.steps).train(arguments.save_every)


if __name__ == "__main__":
    main()
