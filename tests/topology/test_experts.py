"""Experts that each rank has of its own: plain tensors under equal names, as `experts=` declares them."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import NaiveAverage
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from dist_ema import CosineSchedule, Experts, ShardedEMA

SCHEDULE = CosineSchedule(0.3, 0.01, total_steps=8)
NUM_EXPERTS = 12
PER_EXPERT = 3


def values_of(name: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    return torch.randn(shape, generator=generator)


class Expert(nn.Module):
    """Two numbered layers, so that a name has two numbers; a bias tied to that of the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, PER_EXPERT), nn.Linear(PER_EXPERT, PER_EXPERT))
        self.net[1].bias = self.net[0].bias
        self.register_buffer("load", torch.zeros(2))


class Mixture(nn.Module):
    """A router that all ranks share, and experts of this rank: stacked along dim 0 and dim 1, and in a list."""

    def __init__(self, num_local: int) -> None:
        super().__init__()
        self.router = nn.Linear(4, NUM_EXPERTS)
        self.w1 = nn.Parameter(torch.zeros(num_local, 3, 4))
        self.w2 = nn.Parameter(torch.zeros(3, 2 * num_local))
        self.w3 = nn.Parameter(torch.zeros(num_local, 5, dtype=torch.bfloat16), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(num_local, 0))
        self.register_buffer("load", torch.zeros(num_local))
        self.experts = nn.ModuleList(Expert() for _ in range(num_local))


def declared(group: Any = None) -> list[Experts]:
    return [
        Experts(["w[13]", "empty", "load"], dim=0, group=group),
        Experts("w2", dim=-1, group=group),
        Experts("experts.{}.*", dim=None, group=group),
    ]


class Whole:
    """The whole model, and the part of a rank in it, by slices of whole tensors alone."""

    def __init__(self, num_groups_ranks: int, position: int) -> None:
        self.num_local, self.position = NUM_EXPERTS // num_groups_ranks, position
        torch.manual_seed(0)
        self.model = Mixture(self.num_local)
        self.shapes = {name: tuple(value.shape) for name, value in Mixture(NUM_EXPERTS).state_dict().items()}
        self.dtypes = {name: value.dtype for name, value in Mixture(1).state_dict().items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.dtypes[re.sub(r"experts\.\d+", "experts.0", name)]

    def of_rank(self, name: str, whole: dict[str, torch.Tensor]) -> torch.Tensor:
        """What this rank has under one of its own names."""
        first, num_local = self.position * self.num_local, self.num_local
        if name.startswith("experts."):
            _, number, rest = name.split(".", 2)
            return whole[f"experts.{first + int(number)}.{rest}"]
        if name == "w2":
            return whole[name][:, 2 * first : 2 * (first + num_local)]
        return whole[name] if name.startswith("router") else whole[name][first : first + num_local]

    @torch.no_grad()
    def set(self, step: int) -> dict[str, torch.Tensor]:
        whole = {name: values_of(name, shape, step).to(self.dtype(name)) for name, shape in self.shapes.items()}
        for name in list(whole):
            if name.endswith("net.1.bias"):
                whole[name] = whole[name.replace("net.1", "net.0")]
        for name, value in self.model.state_dict().items():
            value.copy_(self.of_rank(name, whole))
        return whole

    def shows(self, averages: dict[str, torch.Tensor]) -> None:
        for name, value in self.model.state_dict().items():
            expected = self.of_rank(name, averages)
            assert torch.equal(value, expected.to(value.dtype)), name


def is_buffer(name: str) -> bool:
    return name.endswith("load")


def placed(num_in_group: int) -> tuple[Whole, Any]:
    """The part of this rank, and its group; the ranks of one place in their groups hold copies."""
    size = dist.get_world_size()
    if num_in_group == size:
        return Whole(num_in_group, dist.get_rank()), None
    mesh = init_device_mesh("cpu", (size // num_in_group, num_in_group), mesh_dim_names=("dp", "ep"))
    return Whole(num_in_group, dist.get_rank() % num_in_group), mesh["ep"].get_group()


def averaged_and_saved(num_in_group: int, folder: str) -> None:
    """Groups of this many ranks hold different experts; the other ranks hold copies of them."""
    whole, group = placed(num_in_group)
    ema, naive = None, NaiveAverage(SCHEDULE.momentum)
    for step in range(4):
        live = whole.set(step)
        if ema is None:
            ema = ShardedEMA(whole.model, SCHEDULE, experts=declared(group))
        with CommDebugMode() as counted:
            ema.update()
        assert counted.get_total_counts() == 0
        naive.update({name: value for name, value in live.items() if not is_buffer(name)})
    averages = naive.values | {name: value for name, value in live.items() if is_buffer(name)}
    assert ema is not None
    with ema.average_parameters():
        whole.shows(averages)
    whole.shows(live)
    ema.save(folder)
    ema.consolidate(folder + "-export", dtype=torch.bfloat16)
    dist.barrier()
    saved = load_file(os.path.join(folder, "model.safetensors"))
    tied = {name for name in averages if name.endswith("net.1.bias")}
    assert saved.keys() == averages.keys() - tied
    assert all(torch.equal(value, averages[name]) for name, value in saved.items())
    exported = load_file(os.path.join(folder + "-export", "model.safetensors"))
    assert all(torch.equal(value, averages[name].bfloat16()) for name, value in exported.items())
    of_the_user = Mixture(NUM_EXPERTS)  # one process loads the files with a plain load_state_dict
    of_the_user.load_state_dict(saved | {name: saved[name.replace("net.1", "net.0")] for name in tied}, strict=True)
    gathered = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert all(torch.equal(gathered[name], value) for name, value in averages.items())
    total = torch.tensor([sum(shard.box.numel for shard in ema.shards)])
    dist.all_reduce(total)
    assert total.item() == sum(value.numel() for name, value in naive.values.items() if name not in tied)


def loaded_again(num_in_group: int, folder: str) -> None:
    """By groups of another size, and a step on."""
    whole, group = placed(num_in_group)
    whole.set(9)
    ema = ShardedEMA(whole.model, SCHEDULE, experts=declared(group))
    ema.load(folder)
    saved = load_file(os.path.join(folder, "model.safetensors"))
    naive = NaiveAverage(SCHEDULE.momentum)
    naive.values, naive.num_updates = {name: saved[names_alike(name)] for name in whole.shapes}, 4
    live = whole.set(10)
    naive.update(live)
    ema.update()
    with ema.average_parameters():
        whole.shows(naive.values | {name: value for name, value in live.items() if is_buffer(name)})


def names_alike(name: str) -> str:
    """The name that the files have of a tied tensor."""
    return name.replace("net.1.bias", "net.0.bias")


GROUPS = [(1, 1), (2, 2), (3, 3), (4, 2)]


@pytest.mark.parametrize(("size", "num_in_group"), GROUPS)
def test_experts_of_each_rank_are_averaged_swapped_and_saved_as_whole_tensors(
    world, tmp_path, size, num_in_group
) -> None:
    world(size).run(averaged_and_saved, num_in_group, str(tmp_path / "ema"))
    for other, number in GROUPS:
        world(other).run(loaded_again, number, str(tmp_path / "ema"))
