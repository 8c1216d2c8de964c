"""The process group of a benchmark that torchrun starts, and models laid out over it."""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


def joined() -> bool:
    """Collective. Be one of the ranks, if there is more than this process; a test has made the group already."""
    if "RANK" not in os.environ:
        return False
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    return True


def shared_folder(parent: Path | None = None) -> Path:
    """Collective. A new temporary folder of all ranks."""
    box = [tempfile.mkdtemp(dir=parent) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(box)
    return Path(box[0])


def laid_out(model: nn.Module, layout: str) -> nn.Module:
    """The model under DDP, FSDP2 (rows), or cut along the last dim of every matrix as tensor parallelism may."""
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "fsdp2":
        fully_shard(model)
        return model
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),), mesh_dim_names=("tp",))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            placed = distribute_tensor(parameter.data, mesh, [Shard(parameter.dim() - 1)])
            module.register_parameter(name, nn.Parameter(placed))
    return model


def leave() -> None:
    """Collective. End this process: gloo's teardown aborts now and then, after all work is done."""
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)
