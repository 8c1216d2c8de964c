"""Tensors of which a rank holds several boxes: what transformers makes of packed_colwise, alone and under FSDP2."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from layouts_zoo import build_layout, copied_there_and_back, joined, local, set_whole
from oracle import NaiveAverage
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from dist_ema import CheckpointMismatchError, ConstantSchedule, ShardedEMA, UnsupportedModelError

HALF = ConstantSchedule(momentum=0.5)


def weight_of(shape: tuple[int, int]) -> torch.Tensor:
    return torch.arange(float(shape[0] * shape[1])).view(shape)


def linear(weight: torch.Tensor | DTensor) -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(weight)
    return model


# Name -> shape of the mesh, placements, shape of the weight, the largest number of boxes on a rank.
PACKED = {
    "packed columns": ((4,), [_StridedShard(0, split_factor=2)], (16, 2), 2),
    "packed along the last dim, counted from the end": ((4,), [_StridedShard(-1, split_factor=3)], (3, 24), 3),
    "three parts, replicated over dp": ((2, 2), [Replicate(), _StridedShard(0, split_factor=3)], (12, 2), 3),
    "packed, then sharded along the other dim": ((2, 2), [_StridedShard(0, split_factor=2), Shard(1)], (8, 4), 2),
    "both dims": ((2, 2), [_StridedShard(0, split_factor=2), _StridedShard(1, split_factor=2)], (8, 8), 4),
    "one dim on both axes": ((2, 2), [_StridedShard(0, split_factor=2), _StridedShard(0, split_factor=2)], (8, 2), 2),
    "uneven": ((4,), [_StridedShard(0, split_factor=2)], (11, 3), 2),
    "in several pieces on one rank only": ((4,), [_StridedShard(0, split_factor=2)], (5, 2), 2),
    "nothing on some ranks": ((4,), [_StridedShard(0, split_factor=2)], (3, 2), 2),
}


def made_and_saved(name: str, exclude: str | None, folder: str) -> int:
    """The files have the whole tensor of which the DTensor was made."""
    sizes, placements, shape, _ = PACKED[name]
    whole = weight_of(shape)
    model = linear(distribute_tensor(whole, init_device_mesh("cpu", sizes), placements, src_data_rank=None))
    model.other = nn.Parameter(torch.zeros(3))
    ema = ShardedEMA(model, HALF, exclude=exclude)
    ema.update()
    with torch.no_grad():
        local(model.weight).mul_(3.0)
    ema.update()
    expected = 3.0 * whole if exclude else 2.0 * whole
    state = ema.full_state_dict()
    assert dist.get_rank() or torch.equal(state["weight"], expected)
    averaged, live = local(sharded(ema)), local(model.weight).clone()
    with ema.average_parameters():
        assert torch.equal(local(model.weight), averaged)
    assert torch.equal(local(model.weight), live)
    ema.save(folder)
    assert torch.equal(load_file(f"{folder}/model.safetensors")["weight"], expected)
    distance = ema.distance()["all"]
    assert distance == (0.0 if exclude else pytest.approx(1 / 3))
    again = ShardedEMA(model, HALF, exclude=exclude)
    again.load(folder)
    again.load_sharded_state_dict({"weight": sharded(ema), "other": ema.sharded_state_dict()["other"]})
    state = again.full_state_dict()
    assert dist.get_rank() or torch.equal(state["weight"], expected)
    return len([shard for shard in ema.shards if shard.fqn == "weight"])


def sharded(ema: ShardedEMA) -> torch.Tensor:
    """The entry of the state dict, which is a DTensor laid out like the live one."""
    entry = ema.sharded_state_dict()["weight"]
    assert isinstance(entry, DTensor)
    return entry


@pytest.mark.parametrize("exclude", [None, "weight"], ids=["averaged", "excluded"])
@pytest.mark.parametrize("name", PACKED)
def test_the_files_have_the_columns_in_their_own_order(world, tmp_path, name, exclude) -> None:
    """Torch tells of the first piece only."""
    owned = world(4).run(made_and_saved, name, exclude, str(tmp_path / "ema"))
    if exclude is None and "replicated" not in name:
        assert max(owned) == PACKED[name][3]


def under_fsdp2(shape: tuple[int, int], split_factor: int, folder: str) -> list[int]:
    """`fully_shard` cuts the rows that tensor parallelism gave it, so its axis comes last."""
    mesh, whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), weight_of(shape)
    placements = [_StridedShard(0, split_factor=split_factor)]
    model = linear(distribute_tensor(whole, mesh["tp"], placements, src_data_rank=None))
    of_tp = local(model.weight).clone()
    fully_shard(model, mesh=mesh["dp"])
    rows = of_tp.chunk(2)
    mine = rows[mesh.get_local_rank("dp")] if mesh.get_local_rank("dp") < len(rows) else of_tp[:0]
    assert torch.equal(local(model.weight), mine), "this is what FSDP2 does"
    ema = ShardedEMA(model, HALF)
    ema.update()
    model.unshard()  # a forward without gradients leaves gathered copies
    with ema.average_parameters():
        assert torch.equal(local(model.weight), mine)
        model.unshard()
        assert torch.equal(local(model.weight), of_tp), "a forward sees the rows of tensor parallelism"
    ema.save(folder)
    assert torch.equal(load_file(f"{folder}/model.safetensors")["weight"], whole)
    return [shard.sizes[0] for shard in ema.shards]


@pytest.mark.parametrize(("shape", "split_factor"), [((8, 2), 2), ((16, 2), 4), ((13, 3), 3), ((5, 2), 2), ((3, 2), 2)])
def test_packed_rows_under_fsdp2_are_the_rows_that_fsdp2_holds(world, tmp_path, shape, split_factor) -> None:
    world(4).run(under_fsdp2, shape, split_factor, str(tmp_path / "ema"))


def beside_fsdp2(folder: str) -> None:
    """Two axes of tensor parallelism pack one dim, and FSDP2 cuts the other one."""
    mesh, whole = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp", "a", "b")), weight_of((3, 16))
    placements = [_StridedShard(1, split_factor=2), _StridedShard(1, split_factor=2)]
    model = linear(distribute_tensor(whole, mesh["a", "b"], placements, src_data_rank=None))
    fully_shard(model, mesh=mesh["dp"])
    ema = ShardedEMA(model, HALF)
    ema.update()
    ema.save(folder)
    assert torch.equal(load_file(f"{folder}/model.safetensors")["weight"], whole)


def test_axes_of_tensor_parallelism_deal_from_the_left_where_fsdp2_cuts_another_dim(world, tmp_path) -> None:
    world(4).run(beside_fsdp2, str(tmp_path / "ema"))


def not_contiguous() -> None:
    """The local tensor is the transpose of what was allocated, as loaders of other formats leave it."""
    mesh = init_device_mesh("cpu", (2,))
    placements = [_StridedShard(0, split_factor=2)]
    spread = local(distribute_tensor(weight_of((8, 6)), mesh, placements, src_data_rank=None))
    transposed = spread.t().contiguous().t()
    assert not transposed.is_contiguous()
    model = linear(DTensor.from_local(transposed, mesh, placements, run_check=False, shape=(8, 6), stride=(6, 1)))
    model.plain = nn.Parameter(torch.zeros(0, 3))
    ema, naive = ShardedEMA(model, HALF), NaiveAverage(HALF.momentum)
    for step in range(3):
        with torch.no_grad():
            local(model.weight).copy_(spread * step)
        naive.update({"weight": weight_of((8, 6)) * step})
        ema.update()
    state = ema.full_state_dict()
    assert dist.get_rank() or torch.equal(state["weight"], naive.values["weight"])
    live = local(model.weight).clone()
    with ema.average_parameters():
        assert not torch.equal(local(model.weight), live)
    assert torch.equal(local(model.weight), live) and not local(model.weight).is_contiguous()


def test_a_local_tensor_that_is_not_contiguous_is_averaged_where_it_lies(world) -> None:
    world(2).run(not_contiguous)


def replaced() -> None:
    """`load_state_dict(assign=True)` puts another DTensor under the name."""
    mesh, placements = init_device_mesh("cpu", (2,)), [_StridedShard(0, split_factor=2)]
    model, whole = linear(distribute_tensor(weight_of((8, 2)), mesh, placements, src_data_rank=None)), weight_of((8, 2))
    ema = ShardedEMA(model, HALF)
    ema.update()
    other = distribute_tensor(3.0 * whole, mesh, placements, src_data_rank=None)
    model.load_state_dict({"weight": other}, assign=True)
    ema.update()
    state = ema.full_state_dict()
    assert dist.get_rank() or torch.equal(state["weight"], 2.0 * whole)


def test_an_update_follows_packed_columns_whose_memory_was_replaced(world) -> None:
    world(2).run(replaced)


def frozen_infinities() -> None:
    """A mask of minus infinity in a frozen packed weight, and a live infinity that is left out."""
    mesh, placements = init_device_mesh("cpu", (2,)), [_StridedShard(0, split_factor=2)]
    whole = weight_of((8, 2))
    whole[3, 1] = -torch.inf
    model = linear(distribute_tensor(whole, mesh, placements, src_data_rank=None)).requires_grad_(False)
    ema = ShardedEMA(model, HALF, skip_nonfinite=True)
    for _ in range(3):
        ema.update()
    state = ema.full_state_dict()
    assert dist.get_rank() or torch.equal(state["weight"], whole)
    assert ema.num_refused() == 0


def test_masks_in_packed_columns_are_kept(world) -> None:
    world(2).run(frozen_infinities)


def taught(layout: str) -> None:
    student, teacher = build_layout(layout), build_layout(layout, seed=1, frozen=True)
    ema, naive = ShardedEMA(student, HALF, into=teacher), NaiveAverage(HALF.momentum)
    for step in range(3):
        naive.update(set_whole(student, step))
        ema.update()
        for name, value in joined(teacher).items():
            assert torch.equal(value, naive.values[name]), name


@pytest.mark.parametrize("layout", ["packed", "packed_twice", "fsdp_packed", "experts", "offset"])
def test_a_teacher_of_several_boxes_has_the_average_in_all_of_them(world, layout) -> None:
    world(4).run(taught, layout)


def state_dicts(layout: str) -> None:
    """The entries are laid out like the live tensors, on every rank and for every tensor that the model has."""
    model = build_layout(layout)
    ema, naive = ShardedEMA(model, HALF), NaiveAverage(HALF.momentum)
    for step in range(3):
        naive.update(set_whole(model, step))
        ema.update()
    state, own = ema.sharded_state_dict(), model.state_dict()
    assert state.keys() == own.keys()
    for name, value in own.items():
        assert type(value) is type(state[name]) and local(state[name]).shape == local(value).shape, name
    model.load_state_dict(state)
    assert all(torch.equal(value, naive.values[name]) for name, value in next(copied_there_and_back(model)).items())
    for value in state.values():
        local(value).zero_()
    ema.load_sharded_state_dict(state)
    whole = ema.full_state_dict()
    assert not any(value.any() for name, value in whole.items() if name in naive.values)
    some = next(name for name, value in own.items() if isinstance(value, DTensor))
    with pytest.raises(CheckpointMismatchError):
        ema.load_sharded_state_dict({**state, some: torch.zeros(2)})


@pytest.mark.parametrize("layout", ["packed", "packed_twice", "fsdp_packed", "experts", "offset", "fsdp_tp_sliced"])
def test_the_state_dict_has_all_boxes_of_a_tensor_in_its_entry(world, layout) -> None:
    world(4).run(state_dicts, layout)


def descending() -> str:
    mesh = dist.device_mesh.DeviceMesh("cpu", [[2, 3], [0, 1]])
    model = linear(
        distribute_tensor(torch.randn(8, 2), mesh, [_StridedShard(0, split_factor=2), Replicate()], src_data_rank=None)
    )
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(model, HALF)
    return str(caught.value)


def test_packed_columns_over_descending_ranks_are_refused(world) -> None:
    assert all("not in ascending order" in message for message in world(4).run(descending))
