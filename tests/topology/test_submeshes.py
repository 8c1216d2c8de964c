"""Models on some of the ranks: slices of a mesh, process groups, and ranks that hold nothing of a tensor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts_zoo import square_mesh
from oracle import NaiveAverage
from safetensors.torch import load_file
from torch import nn
from torch.distributed._composable.replicate import replicate as replicate_by_ddp
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ConstantSchedule, ShardedEMA, UnsupportedModelError

HALF = ConstantSchedule(momentum=0.5)
BATCH = torch.arange(12.0).view(2, 6)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.Linear(8, 6))


def fsdp1(model: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def over_tp(wrap: Callable[[nn.Module, DeviceMesh], nn.Module]) -> nn.Module:
    mesh = square_mesh()
    return wrap(parallelize_module(network(), mesh["tp"], {"1": ColwiseParallel(), "2": RowwiseParallel()}), mesh["dp"])


def halves() -> dist.ProcessGroup:
    """The process group of ranks 0 and 1, or that of ranks 2 and 3."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return groups[dist.get_rank() // 2]


# How a model is launched on four ranks. Each trains the same model, whatever the groups.
LAUNCHED = {
    "DDP on each half": lambda: DistributedDataParallel(network(), process_group=halves()),
    "DDP on a slice": lambda: DistributedDataParallel(network(), process_group=square_mesh()["dp"].get_group()),
    "DDP of a part alone": lambda: nn.ModuleDict(
        {"1": DistributedDataParallel(network()[1], process_group=halves()), "2": network()[2].requires_grad_(False)}
    ),
    "replicate() on each half": lambda: replicate_by_ddp(network(), process_group=halves()),
    "replicate() of FSDP2 on a slice": lambda: replicate(network(), mesh=square_mesh()["dp"]),
    "replicate() of FSDP2 on a slice over TP": lambda: over_tp(lambda model, mesh: replicate(model, mesh=mesh)),
    "fully_shard on a slice": lambda: fully_shard(network(), mesh=square_mesh()["tp"]),
    "fully_shard on a slice over TP": lambda: over_tp(lambda model, mesh: fully_shard(model, mesh=mesh)),
    "FSDP1 on each half": lambda: fsdp1(network(), process_group=halves(), use_orig_params=True),
    "FSDP1 on a slice": lambda: fsdp1(network(), device_mesh=square_mesh()["dp"]),
    "FSDP1 on a slice over TP": lambda: over_tp(lambda model, mesh: fsdp1(model, device_mesh=mesh)),
    "FSDP1 over TP, the original parameters": lambda: over_tp(
        lambda model, mesh: fsdp1(model, device_mesh=mesh, use_orig_params=True)
    ),
    "FSDP1, hybrid, on a slice of three axes": lambda: fsdp1(
        network(),
        device_mesh=init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("a", "b", "c"))["a", "b"],
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
    ),
}


def trained(layout: str, folder: str) -> None:
    """Real steps; the naive average is one of whole live weights, which begin as those of the model."""
    model = LAUNCHED[layout]()
    ema, naive = ShardedEMA(model, HALF), NaiveAverage(HALF.momentum)
    shows_live = ShardedEMA(model, HALF)  # it is never updated
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.01)
    for step in range(3):
        whole = shows_live.full_state_dict()
        begun = network().state_dict()
        assert step or all(torch.equal(value, begun[name]) for name, value in whole.items())
        naive.update({name: value for name, value in whole.items() if name.endswith(("weight", "bias"))})
        with CommDebugMode() as counted:
            ema.update()
        assert counted.get_total_counts() == 0
        (model["1"] if isinstance(model, nn.ModuleDict) else model)(BATCH).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = ema.full_state_dict()
    assert all(torch.equal(state[name], value) for name, value in naive.values.items())
    ema.save(folder)
    if dist.get_rank() == 0:
        files = load_file(f"{folder}/model.safetensors")
        assert all(torch.equal(files[name], value) for name, value in naive.values.items())
    before = shows_live.full_state_dict()
    with ema.average_parameters():
        shown = shows_live.full_state_dict()
        assert all(torch.equal(shown[name], value) for name, value in naive.values.items())
    after = shows_live.full_state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("layout", LAUNCHED)
def test_a_model_on_slices_and_groups_is_averaged_with_one_owner_for_an_element(world, tmp_path, layout) -> None:
    world(4).run(trained, layout, str(tmp_path / "ema"))


def two_models() -> str:
    """Each half trains a model of its own, under equal names."""
    torch.manual_seed(dist.get_rank() // 2)
    model = DistributedDataParallel(nn.Linear(3, 2), process_group=halves())
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(model, HALF)
    return str(caught.value)


def test_two_groups_that_train_different_models_are_not_taken_for_replicas(world) -> None:
    messages = world(4).run(two_models)
    assert len(set(messages)) == 1 and "weight is not the same on rank 0 and rank 2, 3" in messages[0]


def sharded_models() -> str:
    torch.manual_seed(dist.get_rank() // 2)
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("models", "fsdp"))
    model = fully_shard(nn.Linear(3, 2), mesh=mesh["fsdp"])
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(model, HALF)
    return str(caught.value)


def test_two_sharded_models_of_equal_names_are_not_taken_for_replicas(world) -> None:
    messages = world(4).run(sharded_models)
    assert len(set(messages)) == 1 and "weight is not the same on rank 0 and rank 2" in messages[0]


def elsewhere(folder: str) -> list[int]:
    """Tensors on the last two of three ranks; the first one holds nothing of them."""
    mesh = DeviceMesh("cpu", [1, 2])
    model, expected = nn.Module(), {}
    for name, shape, placement in [
        ("rows", (5, 2), Shard(0)),
        ("alike", (3,), Replicate()),
        ("scalar", (), Replicate()),
    ]:
        expected[name] = torch.rand(shape)
        spread = distribute_tensor(expected[name], mesh, [placement], src_data_rank=None)
        setattr(model, name, nn.Parameter(spread))
    ema = ShardedEMA(model, HALF)
    ema.update()
    state = ema.full_state_dict()
    assert dist.get_rank() or all(torch.equal(state[name], value) for name, value in expected.items())
    with ema.average_parameters():
        pass
    ema.save(folder)
    again = ShardedEMA(model, HALF)
    again.load(folder)
    state = again.full_state_dict()
    assert dist.get_rank() or all(torch.equal(state[name], value) for name, value in expected.items())
    shown = ema.sharded_state_dict()
    assert set(shown) - {"scalar"} == {"rows", "alike"} and all(isinstance(value, DTensor) for value in shown.values())
    again.load_sharded_state_dict(shown)
    return [shard.box.numel for shard in ema.shards]


def test_rank_0_may_hold_nothing_and_still_has_the_whole_state_dict(world, tmp_path) -> None:
    nothing, *owned = world(3).run(elsewhere, str(tmp_path / "ema"))
    assert nothing == [] and sum(map(sum, owned)) == 5 * 2 + 3 + 1


def on_no_rank() -> str:
    """A part of the rows lies on a rank that does not build the model on its mesh."""
    mesh = DeviceMesh("cpu", [0, 1])
    model = nn.Linear(2, 4, bias=False)
    if dist.get_rank() == 0:
        model.weight = nn.Parameter(distribute_tensor(model.weight.data, mesh, [Shard(0)], src_data_rank=None))
    else:
        model = nn.Linear(2, 4, bias=False)
        model.register_parameter("weight", None)
        model.other = nn.Parameter(torch.zeros(1))
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(model, HALF)
    return str(caught.value)


def test_rows_that_no_rank_holds_are_one_error_on_all_ranks(world) -> None:
    first, second = world(2).run(on_no_rank)
    assert first == second and "weight has 8 elements, but the ranks own 4 of them together" in first


def uneven_tp_under_fsdp1() -> str:
    """Flat parameters of other lengths on the ranks of tensor parallelism cut the plain weights at other places."""
    mesh = square_mesh()
    model = parallelize_module(
        nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(5, 5)}), mesh["tp"], {"a": ColwiseParallel()}
    )
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(fsdp1(model, device_mesh=mesh["dp"], use_orig_params=True), HALF)
    return str(caught.value)


def test_plain_weights_that_fsdp1_cuts_elsewhere_on_each_rank_are_refused_by_name(world) -> None:
    messages = world(4).run(uneven_tp_under_fsdp1)
    assert len(set(messages)) == 1 and "b.weight" in messages[0]


def groups_made_for_norms_of_one_axis() -> int:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    parallelize_module(model, mesh["tp"], {"linear": ColwiseParallel()})
    fully_shard(model["linear"], mesh=mesh["dp"])
    fully_shard(model["norm"], mesh=mesh["dp"])
    before = len(dist.distributed_c10d._world.pg_map)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.5))
    with ema.average_parameters():
        pass
    return len(dist.distributed_c10d._world.pg_map) - before


def test_norms_beside_tensor_parallelism_take_the_group_that_it_has_made(world) -> None:
    """A group for each pair of ranks would be thousands of groups in a large run."""
    assert set(world(4).run(groups_made_for_norms_of_one_axis)) == {0}


def groups_made_for_two_replicate_axes() -> int:
    model = nn.Linear(4, 4)
    torch.manual_seed(0)
    weight = torch.randn(4, 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    model.weight = nn.Parameter(distribute_tensor(weight, mesh, [Replicate(), Replicate()], src_data_rank=None))
    model.bias = nn.Parameter(distribute_tensor(weight[0], mesh, [Replicate(), Shard(0)], src_data_rank=None))
    before = len(dist.distributed_c10d._world.pg_map)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.5))
    with ema.average_parameters():
        assert torch.equal(model.weight.full_tensor(), weight)
    return len(dist.distributed_c10d._world.pg_map) - before


def test_ranks_along_two_replicate_axes_need_no_group_of_their_own(world) -> None:
    """Each rank has other groups along the axes of a mesh: other names are no sign of other holders."""
    assert set(world(4).run(groups_made_for_two_replicate_axes)) == {0}
