"""A run on two nodes that is started anew: as its test in `test_clusters.py` launches it, one agent for each node.

Not a test. `NODE` is the agent's node. Attempt 0 saves and is killed; attempt 1 goes on, on a disk that the
nodes share and on disks of their own. It raises if that is not, bit for bit, the run that never stopped, or if files
lie elsewhere than the page on clusters says.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import ProjectConfiguration, set_seed
from disks import on_disk, on_node, warnings_of
from safetensors.torch import load_file
from torch import nn

from dist_ema import ConstantSchedule, ShardedEMA, attach

ACCELERATES_OWN = {"model.safetensors", "optimizer.bin"}
IS_RESTARTED = os.environ["ATTEMPT"] == "1"
NODE = os.environ["NODE"]


class Run:
    """Two ranks under DDP."""

    def __init__(self, *, own_disks: bool) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        each_node = ProjectConfiguration(save_on_each_node=own_disks)
        self.accelerator = Accelerator(cpu=True, project_config=each_node)
        set_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.2), nn.Linear(7, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.ema: ShardedEMA = attach(self.accelerator, self.model, self.optimizer, ConstantSchedule(momentum=0.2))

    def steps(self, first: int, end: int) -> None:
        for step in range(first, end):
            generator = torch.Generator().manual_seed(2 * step + self.accelerator.process_index)
            self.accelerator.backward(self.model(torch.randn(4, 5, generator=generator)).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()

    def outcome(self) -> dict[str, torch.Tensor]:
        live = {f"live {name}": value for name, value in self.model.state_dict().items()}
        return {**live, **self.ema.full_state_dict()}


def main(folder: Path) -> None:
    uncut = Run(own_disks=False)
    assert dist.get_world_size() == 2 and os.environ["LOCAL_WORLD_SIZE"] == "1"
    assert dist.get_rank() == ("north", "south").index(NODE)  # in both attempts, because torchrun sorts by address
    uncut.steps(0, 6)
    expected = uncut.outcome()
    for own_disks in (False, True):
        with ExitStack() as stack:
            disk = folder / (f"disk-of-{NODE}" if own_disks else "shared")
            stack.enter_context(on_node(NODE))
            saved = os.path.join(stack.enter_context(on_disk(disk)) if own_disks else str(disk), "checkpoint")
            run = Run(own_disks=own_disks)
            if IS_RESTARTED:
                told = warnings_of(lambda run=run, saved=saved: run.accelerator.load_state(saved))
                assert told.count("do not see") == (own_disks and dist.get_rank() == 0), told
                assert run.ema.num_updates == 3
                run.steps(3, 6)
                went_on = run.outcome()
                assert went_on.keys() == expected.keys()
                assert all(torch.equal(went_on[name], expected[name]) for name in expected)
            else:
                run.steps(0, 3)
                told = warnings_of(lambda run=run, saved=saved: run.accelerator.save_state(saved))
                assert told.count("do not see") == (own_disks and dist.get_rank() == 0), told
                dist.barrier()
                check_files(disk / "checkpoint", own_disks=own_disks)
    dist.barrier()
    if not IS_RESTARTED and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()  # the first attempt never gets past this
    (folder / f"done-by-rank-{dist.get_rank()}").touch()
    dist.barrier()
    os._exit(0)


def check_files(checkpoint: Path, *, own_disks: bool) -> None:
    rank = dist.get_rank()
    names = {path.name for path in checkpoint.iterdir()}
    ranks = [rank] if own_disks else [0, 1]
    assert names >= ACCELERATES_OWN | {f"random_states_{rank}.pkl" for rank in ranks}, names
    assert ("ema" in names) == (not own_disks or rank == 0), names
    if "ema" in names:
        assert len(load_file(checkpoint / "ema" / "model.safetensors")) == 4


if __name__ == "__main__":
    main(Path(sys.argv[1]))
