"""What a rank holds of a DTensor, by our own arithmetic."""

from __future__ import annotations

import dataclasses
import random
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from layouts_zoo import build_layout
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from dist_ema import ConstantSchedule, ShardedEMA, UnsupportedModelError
from dist_ema.boxes.local import end_to_end
from dist_ema.boxes.shards import Box
from dist_ema.topology import dtensor
from dist_ema.topology.seam.runs import boxes_in_whole, local_runs, sizes_of

HALF = ConstantSchedule(momentum=0.5)


def placed_at_random(num_cases: int) -> int:
    """Against distribute_tensor, which needs no communication either. Returns how many parts were several boxes."""
    meshes = [init_device_mesh("cpu", sizes) for sizes in ((4,), (2, 2), (1, 4), (2, 1, 2))]
    several = 0
    for seed in range(num_cases):
        draw = random.Random(seed)
        mesh = draw.choice(meshes)
        shape = [draw.randint(1, 13) for _ in range(draw.randint(1, 3))]
        placements: list[Placement] = []
        for _ in range(mesh.ndim):
            dim = draw.randrange(len(shape))
            strided = _StridedShard(dim, split_factor=draw.randint(1, 4))
            placements.append(draw.choice([Replicate(), Shard(dim), strided]))
        whole = torch.arange(float(torch.tensor(shape).prod())).view(shape)
        held = distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
        runs = local_runs(shape, mesh.mesh.shape, mesh.get_coordinate(), placements)
        ours = whole
        for dim, of_dim in enumerate(runs):
            chosen = [at for start, stop in of_dim for at in range(start, stop)]
            ours = ours.index_select(dim, torch.tensor(chosen, dtype=torch.long))
        assert torch.equal(ours, held), (shape, mesh.mesh.shape, placements, runs)
        assert sizes_of(runs) == held.shape
        local, put_together = Box("w", (0,) * held.ndim, tuple(held.shape)), torch.full_like(held, torch.nan)
        boxes = dict(boxes_in_whole(local, runs))
        for box, part in boxes.items():
            put_together[part.region] = whole[box.region]
        assert torch.equal(put_together, held), (shape, placements, boxes)
        sizes, places = end_to_end(list(boxes))
        assert sizes == local.sizes and (places == boxes or not held.numel())
        several += any(len(of_dim) > 1 for of_dim in runs)
    return several


def test_the_runs_of_a_rank_are_what_distribute_tensor_gives_it(world) -> None:
    assert all(several > 10 for several in world(4).run(placed_at_random, 150))


def strided_of_one_box() -> None:
    """FSDP2 over tensor parallelism: each part is one box, whatever torch calls it."""
    model = build_layout("fsdp_tp")
    strided = [p for p in model.parameters() if any(hasattr(place, "split_factor") for place in p.placements)]
    assert strided
    ema = ShardedEMA(model, HALF)
    ema.update()
    mesh = init_device_mesh("cpu", (4,))
    lone = nn.Linear(2, 8, bias=False)
    one = [_StridedShard(0, split_factor=1)]
    lone.weight = nn.Parameter(distribute_tensor(torch.arange(16.0).view(8, 2), mesh, one, src_data_rank=None))
    state = ShardedEMA(lone, HALF).full_state_dict()
    assert dist.get_rank() or torch.equal(state["weight"], torch.arange(16.0).view(8, 2))


def test_strided_shards_of_one_box_stay_served(world) -> None:
    world(4).run(strided_of_one_box)


def descending_strided_axis() -> str:
    mesh = DeviceMesh("cpu", [[2, 3], [0, 1]])
    model = nn.Linear(2, 8, bias=False)
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    model.weight = nn.Parameter(distribute_tensor(torch.randn(8, 2), mesh, placements, src_data_rank=None))
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(model, HALF)
    return str(caught.value)


def test_a_strided_axis_of_descending_ranks_is_refused(world) -> None:
    """`is_shard()` is False of strided shards, so they were not looked at."""
    assert all("not in ascending order" in message for message in world(4).run(descending_strided_axis))


def wrong_global_shape() -> str:
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(2, 5, bias=False)
    local = torch.zeros(4 if dist.get_rank() == 0 else 1, 2)  # uneven by hand: torch deals 3 and 2 rows
    uneven = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size((5, 2)), stride=(2, 1))
    model.weight = nn.Parameter(uneven)
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(model, HALF)
    return str(caught.value)


def test_a_local_tensor_that_its_placements_do_not_explain_is_refused(world) -> None:
    first, second = world(2).run(wrong_global_shape)
    assert first == second and "weight has [4, 2] on this rank, expected [3, 2]" in first


def boxes_told_wrongly() -> str:
    """The second rank believes that it holds rows 1 and 2, not 2 and 3: the elements add up."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4, bias=False)
    fully_shard(model)
    real = dtensor._locate

    def locate(named, **given):
        (piece,), holders = real(named, **given)
        return [dataclasses.replace(piece, box=dataclasses.replace(piece.box, offsets=(dist.get_rank(), 0)))], holders

    with mock.patch.object(dtensor, "_locate", locate), pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(model, HALF)
    return str(caught.value)


def test_rows_that_two_ranks_own_and_rows_that_none_owns_are_seen_at_construction(world) -> None:
    first, second = world(2).run(boxes_told_wrongly)
    assert first == second and "weight has 12 elements, of which the ranks own some twice and others not" in first
