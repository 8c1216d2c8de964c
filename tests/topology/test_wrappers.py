"""What wrappers add to the names of a model must not come into the files."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ConstantSchedule, ShardedEMA, UnsupportedModelError
from dist_ema.topology.names import class_of, unwrapped

HALF = ConstantSchedule(momentum=0.5)


class Net(nn.Module):
    """It has a child of the name that wrappers use, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.Linear(3, 4)
        self._forward_module = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward_module(self.module(x))


def stand_in(forward_module: nn.Module, original_module: nn.Module) -> nn.Module:
    """A module of the class name of Fabric's wrapper, with its children and its state dict."""

    class _FabricModule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._forward_module = forward_module
            self._original_module = original_module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self._forward_module(x)

        def state_dict(self, **options: object) -> dict[str, torch.Tensor]:
            return self._original_module.state_dict(**options)

    _FabricModule.__module__ = "lightning.fabric.wrappers"
    return _FabricModule()


def real_fabric(net: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    return fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))


def wrapped(kind: str, net: nn.Module) -> nn.Module:
    if kind == "fabric":
        return stand_in(net, net)
    if kind == "fabric over ddp":
        return stand_in(DistributedDataParallel(net), net)
    if kind == "fabric over compile":
        return stand_in(torch.compile(net), net)
    if kind == "compile over fabric":
        return torch.compile(stand_in(net, net))
    if kind == "data parallel":
        return nn.DataParallel(net)
    if kind == "data parallel over compile":
        return nn.DataParallel(torch.compile(net))
    return real_fabric(net)[0]


KINDS = [
    "fabric",
    "fabric over ddp",
    "fabric over compile",
    "compile over fabric",
    "data parallel",
    "data parallel over compile",
]


def averaged_under_its_own_names(kind: str, folder: str) -> None:
    net = Net()
    own = {name: value.clone() for name, value in net.state_dict().items()}
    model = wrapped(kind, net)
    ema = ShardedEMA(model, HALF)
    assert unwrapped(model) is net and class_of(unwrapped(model)) is Net
    ema.update()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(2.0)
    ema.update()
    naive = {name: torch.lerp(value, value + 2.0, 0.5) for name, value in own.items()}
    with ema.average_parameters():
        assert all(torch.equal(value, naive[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, own[name] + 2.0) for name, value in net.state_dict().items())
    ema.save(folder)
    if dist.is_initialized():
        dist.barrier()
    saved = load_file(os.path.join(folder, "model.safetensors"))
    assert saved.keys() == naive.keys() and all(torch.equal(saved[name], naive[name]) for name in naive)
    ShardedEMA(model, HALF).load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_wrappers_do_not_come_into_the_files(world, tmp_path, kind) -> None:
    """Fabric's wrapper gave every tensor two names, with `_forward_module.` and with `_original_module.`."""
    world(2).run(averaged_under_its_own_names, kind, str(tmp_path / "ema"))


def of_each_rank(kind: str) -> None:
    net = Net()
    with torch.no_grad():
        net.module.weight.add_(dist.get_rank())
    with pytest.raises(UnsupportedModelError, match=r"module\.weight is not the same on rank 0 and rank 1"):
        ShardedEMA(wrapped(kind, net), HALF)


@pytest.mark.parametrize("kind", ["fabric", "fabric over compile", "data parallel"])
def test_wrappers_that_keep_nothing_alike_do_not_hide_that_ranks_differ(world, kind) -> None:
    world(2).run(of_each_rank, kind)


def test_a_model_that_fabric_has_set_up_is_averaged_under_its_own_names(tmp_path) -> None:
    pytest.importorskip("lightning.fabric")
    averaged_under_its_own_names("real fabric", str(tmp_path / "ema"))


def test_the_names_of_fabrics_wrapper_are_these() -> None:
    wrappers = pytest.importorskip("lightning.fabric.wrappers")
    net = Net()
    model, _ = real_fabric(net)
    assert isinstance(model, wrappers._FabricModule) and type(model).__module__ == "lightning.fabric.wrappers"
    assert model._original_module is net and model._forward_module is not None
    assert [*dict(model.named_children())] == ["_forward_module"], "the other child is the same module here"
    assert model.state_dict().keys() == net.state_dict().keys()
