"""A model with buffers, trained on ranks whose statistics differ, for tests of what an average shows of them."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ConstantSchedule, ShardedEMA

HALF = ConstantSchedule(momentum=0.5)


class Net(nn.Module):
    """BatchNorm, and buffers of the dtypes that backends send with difficulty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("small", torch.zeros(3, dtype=torch.int16))
        self.register_buffer("scalar", torch.tensor(0.0))
        self.register_buffer("rotation", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


def wrapped(layout: str) -> tuple[Net, nn.Module]:
    net = Net()
    if layout == "ddp":
        return net, DistributedDataParallel(net, broadcast_buffers=False)
    if layout == "hsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
    elif layout == "fsdp2":
        fully_shard(net)
    elif layout == "fsdp1_no_shard":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch")
            strategy = ShardingStrategy.NO_SHARD
            return net, FullyShardedDataParallel(net, device_id=torch.device("cpu"), sharding_strategy=strategy)
    return net, net


def buffers_of(net: Net) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def persistent(net: Net) -> set[str]:
    return {name for name, _ in net.named_buffers()} - {"scratch"}


def trained(layout: str, update_buffers: bool) -> tuple[Net, nn.Module, ShardedEMA]:
    """Each rank with batches, and so statistics, of its own."""
    net, model = wrapped(layout)
    ema = ShardedEMA(model, HALF, update_buffers=update_buffers, exclude="rotation")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        model(torch.randn(16, 4) + dist.get_rank()).square().mean().backward()
        if layout == "plain":
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        net.mask = torch.tensor([True, step > 1, dist.get_rank() == 0])  # assigned anew
        net.small.add_(dist.get_rank() + 1)
        net.scalar.add_(dist.get_rank() + 1)
        net.rotation.add_(1j * (dist.get_rank() + 1))
        net.scratch.fill_(dist.get_rank())
        ema.update()
    return net, model, ema
