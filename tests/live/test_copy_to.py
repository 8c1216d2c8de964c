"""The average in another module: equal to the rounded average, and what does not fit is refused before any copy."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from averaged_layouts import SCHEDULE, averaged
from layouts_zoo import build_layout, local, read_whole
from pipelines import part as stage
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dist_ema import ConfigError, Experts, RankMismatchError, ShardedEMA, SwapError, UnsupportedModelError


def copied(layout: str, dtype: torch.dtype) -> int:
    model, ema = averaged(layout)
    module = build_layout(layout, dtype=dtype, seed=5)
    live = read_whole(model)
    with CommDebugMode() as mode:
        ema.copy_to(module)
    box = [ema.full_state_dict()]
    dist.broadcast_object_list(box)
    for name, value in read_whole(module).items():
        assert value.dtype == dtype, name
        assert torch.equal(value, box[0][name].to(dtype)), name
    for name, value in read_whole(model).items():
        assert torch.equal(value, live[name]), name  # the model itself is as it was
    return mode.get_total_counts()


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        ("plain", 1),
        ("fsdp2", 2),
        ("fsdp2", 4),
        ("fsdp1_orig", 2),
        ("hsdp", 4),
        ("tp", 2),
        ("fsdp_tp", 4),
        ("replicate", 2),
        ("packed", 2),
    ],
)
def test_a_bfloat16_copy_is_the_rounded_average_in_every_layout(world, layout, size) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        if layout == "fsdp1_orig" and dtype == torch.bfloat16:
            # FSDP1 aligns tensors to 16 bytes, so that it cuts another dtype elsewhere.
            with pytest.raises(AssertionError, match="UnsupportedModelError: copy_to failed on 2 of 2 ranks"):
                world(size).run(copied, layout, dtype)
            continue
        world(size).run(copied, layout, dtype)


def copied_quietly() -> int:
    def made(dtype: torch.dtype) -> nn.Module:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        pair = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)).to(dtype)
        parallelize_module(pair, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        return fully_shard(pair, mesh=mesh["dp"])

    model = made(torch.float32)
    ema = ShardedEMA(model, SCHEDULE)
    ema.update()
    module = made(torch.bfloat16)
    with CommDebugMode() as mode:
        ema.copy_to(module)
    for value, live in zip(module.parameters(), model.parameters(), strict=True):
        assert torch.equal(value.full_tensor(), live.full_tensor().to(torch.bfloat16))
    return mode.get_total_counts()


def test_nothing_is_sent_where_no_rank_holds_what_another_holds(world) -> None:
    for size in (2, 4):
        assert world(size).run(copied, "fsdp2", torch.bfloat16) == [0] * size
    assert world(4).run(copied_quietly) == [0] * 4  # every weight is cut by tensor parallelism, and by FSDP2


class Block(nn.Module):
    def __init__(self, wide: int = 8, *, extra: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(6, wide)
        self.norm = nn.BatchNorm1d(wide)
        if extra:
            self.head = nn.Linear(wide, 2)


def refuse() -> None:
    rank = dist.get_rank()
    model = Block(extra=True)
    fully_shard(model)
    ema = ShardedEMA(model, SCHEDULE)
    ema.update()

    def module(**options: object) -> nn.Module:
        made = Block(**options).to(torch.bfloat16)
        return fully_shard(made)

    def refused(given: nn.Module, error: type[Exception], words: str, **options: object) -> None:
        before = {name: local(value).clone() for name, value in given.named_parameters()}
        with pytest.raises(error, match=words):
            ema.copy_to(given, **options)
        for name, value in given.named_parameters():
            assert torch.equal(local(value), before[name]), name

    refused(module(), UnsupportedModelError, "lacks 2 tensors of the model")
    refused(module(wide=9), UnsupportedModelError, "expected .* as in the model", exclude="head.*")
    refused(Block(extra=True), UnsupportedModelError, "laid out as in the model")  # not wrapped
    refused(module(extra=True), ConfigError, "matches no name", exclude="hed.*")
    refused(module(extra=True), ConfigError, "track", track="slow")
    with torch.inference_mode():
        frozen = module(extra=True)
    refused(frozen, UnsupportedModelError, "inference_mode")
    refused(model, ConfigError, "the model's own tensor")
    # One rank alone brings another module.
    refused(module(extra=True) if rank == 0 else module(), UnsupportedModelError, "1 of 2 ranks")
    refused(module(extra=True), RankMismatchError, "exclude", exclude="head.*" if rank else "norm.*")
    with ema.average_parameters(), pytest.raises(SwapError):
        ema.copy_to(module(extra=True))
    ema.copy_to(module(), exclude="head.*")
    only = module(extra=True)
    before = only.first.weight.full_tensor()
    ema.copy_to(only, include="head.*")
    whole = dict(ema.whole_tensors(dtype=torch.bfloat16))
    assert torch.equal(only.first.weight.full_tensor(), before)
    assert torch.equal(only.head.weight.full_tensor(), whole["head.weight"])


def test_a_module_that_does_not_fit_is_refused_on_all_ranks_and_stays_as_it_was(world) -> None:
    world(2).run(refuse)


def copy_replicas() -> None:
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(Block())
    ema = ShardedEMA(model, SCHEDULE)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        model.module.norm.running_mean.fill_(rank + 1)
        ema.update()
    module = copy.deepcopy(model.module).to(torch.bfloat16 if rank == 0 else torch.float16)
    with pytest.raises(RankMismatchError, match="on different ranks"):
        ema.copy_to(module)
    module = Block().to(torch.bfloat16)
    ema.copy_to(module, include=["first.*", "norm.running_mean"])  # a part of what an owner has
    whole = dict(ema.whole_tensors(dtype=torch.bfloat16))
    assert torch.equal(module.first.weight, whole["first.weight"])
    assert module.norm.running_mean.tolist() == [1.0] * 8  # of rank 0, as in files and swaps
    assert torch.equal(module.norm.weight, torch.ones(8, dtype=torch.bfloat16))


def test_replicas_get_what_owners_have_in_the_dtype_of_the_module_and_the_buffers_of_rank_0(world) -> None:
    world(2).run(copy_replicas)


class Mixture(nn.Module):
    """Plain experts of one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 4)
        self.stacked = nn.Parameter(torch.ones(2, 3))
        self.listed = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))


def copied_parts(kind: str) -> None:
    """Every rank has names and values of its own."""
    rank = dist.get_rank()
    experts = [Experts("stacked", 0), Experts("listed.{}.*", dim=None)] if kind == "experts" else []

    def part() -> nn.Module:
        return Mixture() if kind == "experts" else stage(rank, dist.get_world_size())

    model, other = part(), part().to(torch.bfloat16)
    ema = ShardedEMA(model, SCHEDULE, experts=experts)
    for step in range(3):
        for name, parameter in model.named_parameters():
            apart = 10.0 * rank if name.startswith(("stacked", "listed")) else 0.0
            nn.init.constant_(parameter, step + apart + 0.01 * len(name))
        ema.update()
    with ema.average_parameters():
        averaged = {name: value.detach().to(torch.bfloat16) for name, value in model.named_parameters()}
    ema.copy_to(other)
    for name, value in other.named_parameters():
        assert torch.equal(value, averaged[name]), name
    other.unknown = nn.Linear(1, 1)
    with pytest.raises(UnsupportedModelError, match="the model has not"):
        ema.copy_to(other)
    del other.unknown
    delattr(other, "listed" if kind == "experts" else "layers")
    with pytest.raises(UnsupportedModelError, match="the module lacks"):
        ema.copy_to(other)


@pytest.mark.parametrize("kind", ["stages", "experts"])
def test_a_rank_that_has_a_stage_or_experts_of_its_own_gets_the_average_of_these(world, kind) -> None:
    world(2).run(copied_parts, kind)
