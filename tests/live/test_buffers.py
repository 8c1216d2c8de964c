"""Buffers within a swap: every rank sees those of the files, and has its own back afterwards."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ConstantSchedule, ShardedEMA

HALF = ConstantSchedule(momentum=0.5)
X = torch.ones(2, 4)


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


def swapped(layout: str, update_buffers: bool, folder: str) -> None:
    net, model, ema = trained(layout, update_buffers)
    ema.save(folder)
    dist.barrier()
    files = load_file(os.path.join(folder, "model.safetensors"))
    before = buffers_of(net)
    model.eval()
    with torch.no_grad(), ema.average_parameters():
        seen = buffers_of(net)
        out = model(X)
    for name in sorted(persistent(net)):
        assert torch.equal(seen[name], files[name].to(seen[name].dtype)), name
    assert torch.equal(seen["scratch"], before["scratch"]), "not in the files, so left alone"
    fresh = Net().eval()
    fresh.load_state_dict(files)
    with torch.no_grad():
        assert torch.equal(fresh(X), out), "a forward within the block is that of the files"
    after = buffers_of(net)
    assert all(torch.equal(after[name], before[name]) for name in before), "each rank has its own back"
    if dist.get_rank():
        assert not torch.equal(before["norm.running_mean"], seen["norm.running_mean"])
    state = ema.sharded_state_dict()
    for name in sorted(persistent(net)):
        value = state[name].full_tensor() if isinstance(state[name], DTensor) else state[name]
        assert torch.equal(value, files[name]), name


@pytest.mark.parametrize("update_buffers", [False, True])
@pytest.mark.parametrize("layout", ["ddp", "plain", "hsdp"])
def test_within_a_swap_every_rank_evaluates_with_the_statistics_of_the_files(
    world, tmp_path, layout, update_buffers
) -> None:
    """Without broadcast_buffers rank 1 evaluated with its own, whatever the files said (YOLOX#1176)."""
    world(2).run(swapped, layout, update_buffers, str(tmp_path / "ema"))


def no_shard(folder: str) -> None:
    net, _, ema = trained("fsdp1_no_shard", False)
    before = buffers_of(net)
    ema.save(folder)
    dist.barrier()
    files = load_file(os.path.join(folder, "model.safetensors"))
    with ema.average_parameters():
        assert torch.equal(net.norm.running_mean, files["norm.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in buffers_of(net).items())


def test_replicas_of_fsdp1_evaluate_with_the_statistics_of_the_files_too(world, tmp_path) -> None:
    world(2).run(no_shard, str(tmp_path / "ema"))


def for_good(update_buffers: bool) -> None:
    net, _, ema = trained("ddp", update_buffers)
    expected: list[Any] = [None, None]
    with ema.average_parameters():
        dist.all_gather_object(expected, buffers_of(net))
    ema.copy_to_model()
    for name, value in buffers_of(net).items():
        if name != "scratch":
            assert torch.equal(value, expected[0][name]) and torch.equal(value, expected[1][name]), name


@pytest.mark.parametrize("update_buffers", [False, True])
def test_copy_to_model_gives_every_rank_the_buffers_of_rank_0_for_good(world, update_buffers) -> None:
    world(2).run(for_good, update_buffers)


def forward_in_train_mode(layout: str) -> None:
    net, model, ema = trained(layout, layout == "ddp")
    before = buffers_of(net)
    with pytest.raises(ZeroDivisionError), ema.average_parameters():
        torch.manual_seed(dist.get_rank())
        with torch.no_grad():
            model.train()(torch.randn(16, 4) + 5)
        assert not torch.equal(net.norm.running_mean, before["norm.running_mean"])
        net.small = torch.ones(7, dtype=torch.int16)  # another shape
        net.mask = torch.zeros(3)  # another dtype
        net.scalar = None
        raise ZeroDivisionError
    after = buffers_of(net)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) and after[name].dtype == value.dtype, name
    model.eval()
    with torch.no_grad():
        model(X)
    ema.update()


@pytest.mark.parametrize(("layout", "size"), [("ddp", 2), ("hsdp", 2), ("fsdp2", 2), ("plain", 1)])
def test_buffers_that_a_forward_within_the_block_changes_are_put_back_bit_for_bit(world, layout, size) -> None:
    world(size).run(forward_in_train_mode, layout)


def sharded_alone() -> int:
    net, _, ema = trained("fsdp2", False)
    before = buffers_of(net)
    with CommDebugMode() as counted, ema.average_parameters():
        assert all(torch.equal(value, before[name]) for name, value in buffers_of(net).items())
    return counted.get_total_counts()


def test_under_fsdp2_a_swap_stays_local_and_each_rank_keeps_its_own_buffers(world) -> None:
    assert world(2).run(sharded_alone) == [0, 0]
