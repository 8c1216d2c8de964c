"""SimpleFSDP, as torchtitan has it: parameters kept as DTensors in the module's table, whole ones made on access."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from oracle import NaiveAverage
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.utils import parametrize

from dist_ema import ConstantSchedule, ShardedEMA

HALF = ConstantSchedule(momentum=0.5)
MODES: dict[str, list[Placement]] = {
    "replicate": [Replicate()],
    "fully_shard": [Shard(0)],
    "hybrid_shard": [Replicate(), Shard(0)],
}


class Gathered(nn.Module):
    """What a forward sees in place of the sharded parameter."""

    def forward(self, sharded: torch.Tensor) -> torch.Tensor:
        mesh = sharded.device_mesh
        return sharded.redistribute(placements=[Replicate()] * mesh.ndim).to_local()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3))


def simple_fsdp(mode: str, how: str) -> nn.Sequential:
    sizes = (2, dist.get_world_size() // 2) if mode == "hybrid_shard" else (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", sizes)
    model = net()
    for module in list(model.modules()):
        names = [name for name, _ in module.named_parameters(recurse=False)]
        for name in names:
            whole = module.get_parameter(name).data
            sharded = nn.Parameter(distribute_tensor(whole, mesh, MODES[mode], src_data_rank=None))
            module.register_parameter(name, sharded)
        if how == "parametrizations":
            for name in names:
                parametrize.register_parametrization(module, name, Gathered(), unsafe=True)
        elif names:
            gather = Gathered()
            properties = {name: property(lambda self, n=name, g=gather: g(self._parameters[n])) for name in names}
            kind = type(module)
            module.__class__ = type(f"SimpleFSDP{kind.__name__}", (kind,), properties)
    return model


def whole_live(model: nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: parameter.full_tensor().clone() for name, parameter in model.named_parameters()}


def averaged_and_saved(mode: str, how: str, folder: str) -> None:
    model = simple_fsdp(mode, how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema, naive = ShardedEMA(model, HALF), NaiveAverage(HALF.momentum)
    x = torch.ones(2, 4)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        naive.update(whole_live(model))
        with CommDebugMode() as counted:
            ema.update()
        assert counted.get_total_counts() == 0, "an update must not gather the whole tensors"
    live = whole_live(model)
    with torch.no_grad(), ema.average_parameters():
        assert all(torch.equal(value, naive.values[name]) for name, value in whole_live(model).items())
        out = model(x)
    assert all(torch.equal(value, live[name]) for name, value in whole_live(model).items())
    ema.save(folder)
    dist.barrier()
    found = load_file(os.path.join(folder, "model.safetensors"))
    assert all(torch.equal(found[name], value) for name, value in naive.values.items())
    if how == "properties":
        fresh = net()
        fresh.load_state_dict(found)
        with torch.no_grad():
            assert torch.equal(fresh(x), out)
    again = ShardedEMA(model, HALF)
    again.load(folder)
    again.copy_to_model()
    assert all(torch.equal(value, naive.values[name]) for name, value in whole_live(model).items())


@pytest.mark.parametrize("how", ["properties", "parametrizations"])
@pytest.mark.parametrize(("mode", "size"), [("fully_shard", 2), ("replicate", 2), ("hybrid_shard", 4)])
def test_simple_fsdp_is_averaged_swapped_and_saved_exactly(world, tmp_path, mode, size, how) -> None:
    """It failed first at the first save, and each update gathered every tensor."""
    world(size).run(averaged_and_saved, mode, how, str(tmp_path / "ema"))
