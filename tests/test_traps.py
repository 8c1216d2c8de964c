"""Bugs that reviewers found in this package or that users reported of others, each on real ranks.

The name of a test is the trap; where it comes from is in its docstring.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from unittest import mock

import numpy
import pytest
import torch
import torch.distributed as dist
from layouts_zoo import build_layout, read_whole, set_whole, settle
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from twins import assert_same_bits, averaging, oracle
from zoo import local_values

from dist_ema import (
    CommunicationError,
    ConstantSchedule,
    DistEMAError,
    ModelChangedError,
    RankMismatchError,
    ShardedEMA,
    UnsupportedModelError,
)

HALF = ConstantSchedule(momentum=0.5)
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])


class _Explodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.armed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.armed:
            raise ZeroDivisionError
        return x


def explosive(layout: str) -> tuple[nn.Module, _Explodes]:
    torch.manual_seed(0)
    bomb = _Explodes()
    model = nn.Sequential(nn.Linear(3, 5), bomb, nn.Linear(5, 2))
    if layout == "fsdp1":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True), bomb
    fully_shard(model[2])
    fully_shard(model)
    return model, bomb


def cut_off_forward(layout: str, grad: bool) -> None:
    model, bomb = explosive(layout)
    x = torch.ones(1, 3)
    ema = ShardedEMA(model, HALF)
    set_whole(model, 0)
    ema.update()
    set_whole(model, 1)
    ema.update()
    with torch.no_grad():
        live = model(x)
    with ema.average_parameters(), torch.no_grad():
        averaged = model(x)
    assert not torch.equal(live, averaged)
    bomb.armed = True
    with pytest.raises(ZeroDivisionError), torch.set_grad_enabled(grad), ema.average_parameters():
        model(x)
    bomb.armed = False
    with torch.no_grad():
        assert torch.equal(model(x), live), "the averaged weights stayed in a gathered copy"
    bomb.armed = True
    with pytest.raises(ZeroDivisionError), torch.set_grad_enabled(grad):
        model(x)
    bomb.armed = False
    with ema.average_parameters(), torch.no_grad():
        assert torch.equal(model(x), averaged), "the gathered copy of before the swap was evaluated"


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", ["fsdp1", "fsdp2"])
def test_a_forward_cut_off_by_an_exception_does_not_leave_the_average_in_the_model(world, layout, grad) -> None:
    """FSDP2's reshard() does nothing then; Lightning-like evaluation errors, StopForward hooks."""
    world(2).run(cut_off_forward, layout, grad)


def subgroup(wrap: str) -> str:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    torch.manual_seed(dist.get_rank() // 2)
    inner = DistributedDataParallel(nn.Linear(2, 2), process_group=groups[dist.get_rank() // 2])
    model = {"bare": inner, "nested": nn.Sequential(inner), "compiled": torch.compile(inner, backend="eager")}[wrap]
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(model, HALF)
    return str(caught.value)


@pytest.mark.parametrize("wrap", ["bare", "nested", "compiled"])
def test_two_groups_under_ddp_that_train_apart_are_no_replicas_however_they_are_wrapped(world, wrap) -> None:
    messages = world(4).run(subgroup, wrap)
    assert len(set(messages)) == 1 and "is not the same on rank 0 and rank 2, 3" in messages[0]


def different_calls(folder: str) -> list[str]:
    rank, messages = dist.get_rank(), []
    ema = ShardedEMA(build_layout("ddp"), {"a": HALF, "b": ConstantSchedule(momentum=0.1)})
    ema.update()
    for call in (
        lambda: ema.save(f"{folder}/{rank}"),
        lambda: ema.save(f"{folder}/x", max_shard_size=(300, 320)[rank]),
        lambda: ema.save(f"{folder}/x") if rank == 0 else ema.consolidate(f"{folder}/x", track="a"),
        lambda: ema.consolidate(f"{folder}/x", track="ab"[rank]),
        lambda: ema.consolidate(f"{folder}/x", track="a", dtype=(torch.float16, torch.float32)[rank]),
        lambda: ema.consolidate(f"{folder}/x", track="a", max_shard_size=(100, 200)[rank]),
        lambda: ema.full_state_dict("ab"[rank]),
        lambda: ema.average_parameters("ab"[rank]).__enter__(),
        lambda: ema.copy_to_model("ab"[rank]),
    ):
        with pytest.raises(RankMismatchError) as caught:
            call()
        messages.append(str(caught.value))
    ema.update()
    return messages


def test_ranks_that_make_different_calls_are_told_so(world, tmp_path) -> None:
    """A dtype, track or path that differs over the ranks would write a mosaic."""
    first, second = world(2).run(different_calls, str(tmp_path))
    assert first == second and "call: 'save' against 'consolidate'" in first[2]
    assert not list(tmp_path.iterdir())


def fails_alone(folder: str) -> list[str]:
    rank, messages = dist.get_rank(), []
    model = build_layout("ddp")
    ema = averaging(model)
    ema.update()
    began = time.perf_counter()
    only_one = [
        lambda: ema.save(folder, max_shard_size="bogus" if rank == 1 else "5GB"),
        lambda: ema.average_parameters("nothing" if rank == 1 else None).__enter__(),
        lambda: ema.copy_to_model("nothing" if rank == 1 else None),
        lambda: ema.load(None if rank == 1 else folder),
    ]
    for call in only_one:
        with pytest.raises(DistEMAError) as caught:
            call()
        messages.append(str(caught.value))
    if rank == 1:
        model.module.running = None
    for call in (lambda: ema.save(folder), ema.full_state_dict):
        with pytest.raises(ModelChangedError) as caught:
            call()
        messages.append(str(caught.value))
    assert time.perf_counter() - began < 10
    return messages


def test_what_fails_on_one_rank_fails_on_all_before_any_collective(world, tmp_path) -> None:
    first, second = world(2).run(fails_alone, str(tmp_path / "ema"))
    assert first == second and all("on 1 of 2 ranks: rank 1" in message for message in first)
    assert not list(tmp_path.iterdir())


def one_rank_leaves(folder: str) -> None:
    ema = averaging(build_layout("ddp"))
    if dist.get_rank() == 1:
        os._exit(1)
    with pytest.raises(CommunicationError, match="Every rank must make the same call"):
        ema.save(folder)
    raise RuntimeError("rank 0 was told")


def test_a_rank_that_died_is_told_to_the_others_in_plain_words(world, tmp_path) -> None:
    with pytest.raises(AssertionError, match="rank 0 was told"):
        world(2).run(one_rank_leaves, str(tmp_path / "ema"))


def changed_live_dtype() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.k = nn.Parameter(torch.full((4,), 3.0))
    ema = ShardedEMA(model, HALF, exclude="k")
    ema.update()
    model.to(torch.bfloat16)
    state = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert torch.equal(state["k"], torch.full((4,), 3.0))


def test_a_live_dtype_changed_later_does_not_scramble_what_is_shown_live(world) -> None:
    world(2).run(changed_live_dtype)


class _NoRepr:
    def momentum(self, step: int) -> float:
        return 0.25


def own_schedule(folder: str) -> None:
    ema = ShardedEMA(build_layout("ddp"), _NoRepr())
    ema.update()
    ema.save(folder)
    ema.load(folder)


def test_a_schedule_of_ones_own_without_a_repr_does_not_set_the_ranks_at_odds(world, tmp_path) -> None:
    """The default repr holds a memory address."""
    world(2).run(own_schedule, str(tmp_path / "ema"))


def assign_anew(model: nn.Module) -> None:
    model.load_state_dict({name: value.detach().clone() for name, value in model.state_dict().items()}, assign=True)
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    bare.head.weight = bare.embed.weight


def move_to_bfloat16(model: nn.Module) -> None:
    model.to(torch.bfloat16)


def empty_and_reset(model: nn.Module) -> None:
    """What meta-device initialisation does to a model after its average was built."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    bare.to_empty(device="cpu")
    for module in bare.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def replaced(layout: str, replace: Callable[[nn.Module], None], updates_before: int) -> None:
    """`updates_before` 1: only copied so far; 2: the lists of an update are prepared, and must be prepared anew."""
    model = build_layout(layout)
    ema, naive = averaging(model), oracle()
    for seed in range(updates_before):
        naive.update(set_whole(model, seed))
        ema.update()
    settle(model)
    replace(model)
    set_whole(model, updates_before)
    naive.update({name: value.float() for name, value in read_whole(model).items()})
    ema.update()
    state = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert_same_bits(state, naive.values)


@pytest.mark.parametrize("updates_before", [1, 2])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
class TestReplacedMemory:
    def test_parameters_assigned_anew_are_followed(self, world, layout, updates_before) -> None:
        world(2).run(replaced, layout, assign_anew, updates_before)

    def test_a_model_moved_by_to_is_followed(self, world, layout, updates_before) -> None:
        world(2).run(replaced, layout, move_to_bfloat16, updates_before)

    def test_parameters_emptied_and_initialised_anew_are_followed(self, world, layout, updates_before) -> None:
        world(2).run(replaced, layout, empty_and_reset, updates_before)


def fsdp1_internals() -> None:
    model = build_layout("fsdp1_flat")
    handle = FullyShardedDataParallel.fsdp_modules(model)[0]._handle
    flat = handle.flat_param
    for name in ("_param_infos", "_shapes", "_shard_param_infos", "_shared_param_infos", "_contiguities", "_fqns"):
        assert hasattr(flat, name), name
    for name in ("uses_sharded_strategy", "process_group", "_prefetched"):
        assert hasattr(handle, name), name
    assert not hasattr(flat, "_local_shard"), "made by the first forward"
    model(TOKENS)
    assert flat._local_shard.numel() * dist.get_world_size() >= sum(shape.numel() for shape in flat._shapes)
    fields = type(flat._shard_param_infos[0])._fields
    assert {"offset_in_shard", "numel_in_shard", "intra_param_start_idx"} <= set(fields)


def test_fsdp1_internals_are_as_expected(world) -> None:
    world(2).run(fsdp1_internals)


def channels_last_under_fsdp1() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2)).to(memory_format=torch.channels_last)
    with pytest.raises(UnsupportedModelError, match="contiguous"):
        ShardedEMA(FullyShardedDataParallel(model, device_id=torch.device("cpu")), HALF)


def test_fsdp1_that_flattens_in_another_order_is_refused(world) -> None:
    world(2).run(channels_last_under_fsdp1)


def exclusion_alone() -> str:
    with pytest.raises(RankMismatchError) as caught:
        ShardedEMA(nn.Linear(2, 2), HALF, exclude="nothing" if dist.get_rank() else None)
    return str(caught.value)


def test_an_option_that_is_wrong_on_one_rank_is_refused_on_all(world) -> None:
    messages = world(3).run(exclusion_alone)
    assert len(set(messages)) == 1 and "exclude: [] against ['nothing']" in messages[0]


def replicas_that_differ(folder: str) -> None:
    torch.manual_seed(dist.get_rank())
    with pytest.raises(UnsupportedModelError, match="weight is not the same on rank 0 and rank 1"):
        ShardedEMA(nn.Linear(3, 2), HALF)
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = ShardedEMA(model, HALF)
    with torch.no_grad():
        model.weight.mul_(1 + 1e-5 * dist.get_rank())  # drifted apart
    if dist.get_rank() == 0:
        with pytest.warns(UserWarning, match="the worst is weight"):
            ema.save(folder)
    else:
        ema.save(folder)
    ShardedEMA(build_layout("ddp"), HALF).save(folder + "-alike")  # warnings are errors here


def test_replicas_that_nothing_keeps_alike_are_warned_about(world, tmp_path) -> None:
    """torchrun without DDP: the average would be a mosaic of different models, which is refused; drift is not."""
    world(2).run(replicas_that_differ, str(tmp_path / "ema"))


def more_ranks_than_rows(folder: str) -> int:
    model = nn.Linear(3, 1)
    fully_shard(model)
    ema = ShardedEMA(model, HALF)
    set_whole(model, 0)
    ema.update()
    set_whole(model, 1)
    ema.update()
    with ema.average_parameters():
        pass
    ema.save(folder)
    ema.load(folder)
    return ema.nbytes


def test_ranks_that_own_nothing_take_part_in_everything(world, tmp_path) -> None:
    assert world(3).run(more_ranks_than_rows, str(tmp_path / "ema")) == [16, 0, 0]


def wrapped_too_late() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4))
    ema = ShardedEMA(model, HALF)
    fully_shard(model)
    for call in (ema.update, ema.copy_to_model, ema.full_state_dict):
        with pytest.raises(ModelChangedError, match="ShardedEMA"):
            call()


def test_a_model_wrapped_after_its_average_was_built_is_refused_in_plain_words(world) -> None:
    world(2).run(wrapped_too_late)


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.skip = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        return x if self.skip else self.blocks[1](x)


def gather_under_way(how: str) -> None:
    torch.manual_seed(0)
    model, x = _Blocks(), torch.ones(1, 4)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    if how == "prefetch":
        model.blocks[0].set_modules_to_forward_prefetch([model.blocks[1]])
    ema = ShardedEMA(model, HALF)
    for seed in range(2):
        set_whole(model, seed)
        ema.update()

    @torch.no_grad()
    def start_a_gather() -> None:
        if how == "prefetch":
            model.skip = True  # an early exit, layer drop: the prefetched block does not run
            model(x)
            model.skip = False
        else:
            model(x)
            model.blocks[1].unshard(async_op=True)

    with torch.no_grad():
        live = model(x)
        with ema.average_parameters():
            averaged = model(x)
        assert not torch.equal(live, averaged)
        start_a_gather()
        with ema.average_parameters():
            assert torch.equal(model(x), averaged), "gathered before the swap, used within"
            start_a_gather()
        assert torch.equal(model(x), live), "gathered within the swap, used after"


@pytest.mark.parametrize("how", ["prefetch", "unshard"])
def test_a_gather_started_before_a_swap_does_not_bring_the_other_weights(world, how) -> None:
    """reshard() does nothing about it: the group counts as sharded until the gather is waited for."""
    world(2).run(gather_under_way, how)


def within_summon(layout: str, folder: str) -> None:
    model = build_layout(layout)
    ema = averaging(model)
    set_whole(model, 0)
    ema.update()
    model(TOKENS)
    expected = read_whole(model)
    with FullyShardedDataParallel.summon_full_params(model):
        for call in (
            lambda: ema.save(folder),
            ema.full_state_dict,
            lambda: ema.average_parameters().__enter__(),
            lambda: averaging(model),
        ):
            with pytest.raises(ModelChangedError, match="summon_full_params"):
                call()
    after = read_whole(model)
    assert all(torch.equal(value, after[name]) for name, value in expected.items())
    ema.save(folder)


@pytest.mark.parametrize("layout", ["fsdp1_orig", "fsdp1_flat", "fsdp1_grad_op", "fsdp1_no_shard"])
def test_calls_within_summon_full_params_are_refused(world, tmp_path, layout) -> None:
    """Resharding there scrambles the weights that are written back."""
    world(2).run(within_summon, layout, str(tmp_path / "ema"))


def data_assigned(layout: str, folder: str) -> None:
    model = build_layout(layout)
    ema = averaging(model)
    set_whole(model, 0)
    ema.update()
    model(TOKENS).sum().backward()
    for parameter in model.parameters():
        parameter.data = parameter.data.clamp(-0.01, 0.01)
    ema.save(folder)
    assert all(value.abs().max() <= 0.01 for value in read_whole(model).values()), "the change is lost"


@pytest.mark.parametrize("layout", ["fsdp1_orig", "fsdp1_no_shard"])
def test_data_assigned_to_fsdp1_parameters_survives_a_save(world, tmp_path, layout) -> None:
    """FSDP1 takes `parameter.data = ...` over at its next forward; resharding before that dropped it."""
    world(2).run(data_assigned, layout, str(tmp_path / "ema"))


def permuted_mesh() -> str:
    model = nn.Linear(2, 4)
    fully_shard(model, mesh=DeviceMesh("cpu", [1, 0]))
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(model, HALF)
    return str(caught.value)


def test_a_mesh_of_permuted_ranks_is_refused(world) -> None:
    """FSDP2 deals rows by the rank in the group, torch's chunk list tells them by the place in the mesh."""
    messages = world(2).run(permuted_mesh)
    assert len(set(messages)) == 1 and "ascending" in messages[0]


def live_dtype_differs(folder: str) -> None:
    model = nn.BatchNorm1d(3)
    ema = ShardedEMA(model, HALF)
    ema.update()
    ema.save(folder)
    again = nn.BatchNorm1d(3)
    again.running_mean = again.running_mean.double()
    ShardedEMA(again, HALF).load(folder)


def test_the_dtype_of_what_is_shown_live_does_not_keep_a_run_from_resuming(world, tmp_path) -> None:
    """FSDP1 with buffer_dtype casts buffers at its first forward, after or before the average was built."""
    world(2).run(live_dtype_differs, str(tmp_path / "ema"))


def channels_last_swap() -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Conv2d(8, 24, 3).to(memory_format=torch.channels_last))
    ema, naive = averaging(model), oracle()
    for step in range(2):
        naive.update(set_whole(model, step))
        ema.update()
    with mock.patch("dist_ema.live.spreading._BUCKET_BYTES", 1000), ema.average_parameters():
        assert all(torch.equal(value, naive.values[name]) for name, value in read_whole(model).items())


def test_large_non_contiguous_parameters_are_refreshed_in_bounded_pieces(world) -> None:
    world(2).run(channels_last_swap)


def odd_argument(folder: str) -> None:
    ema = averaging(build_layout("ddp"))
    ema.consolidate(folder, max_shard_size=numpy.int64(1000) if dist.get_rank() else 1000)


def test_an_argument_that_json_does_not_know_does_not_hang_the_others(world, tmp_path) -> None:
    world(2).run(odd_argument, str(tmp_path / "export"))


class _Named(nn.Module):
    """Attributes that look like the prefixes of wrappers, and a layer worth checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.module(x))


def nested_wrappers(nesting: str) -> None:
    model: nn.Module = _Named()
    expected = set(model.state_dict())
    model.module[0] = checkpoint_wrapper(model.module[0])
    wrappers = nesting.split()
    if "fsdp1" in wrappers:
        options = {"device_id": torch.device("cpu"), "use_orig_params": "orig" in wrappers}
        model.module = FullyShardedDataParallel(model.module, **options)
        model = FullyShardedDataParallel(model, **options)
    if "fsdp2" in wrappers:
        fully_shard(model.module[0])
        fully_shard(model)
    if "ddp" in wrappers:
        model = DistributedDataParallel(model)
    if "compile" in wrappers:
        model = torch.compile(model, backend="eager")
    if "outer_ddp" in wrappers:
        model = DistributedDataParallel(model)
    ema = ShardedEMA(model, HALF)
    ema.update()
    state = ema.full_state_dict()
    assert dist.get_rank() != 0 or set(state) == expected
    with ema.average_parameters(), torch.no_grad():
        model(torch.ones(1, 3))


NESTINGS = [
    "ddp",
    "ddp compile",
    "compile outer_ddp",
    "fsdp2",
    "fsdp2 compile",
    "fsdp1",
    "fsdp1 orig",
    "fsdp1 orig compile",
]


@pytest.mark.parametrize("nesting", NESTINGS)
def test_names_survive_nested_wrappers(world, nesting) -> None:
    """Prefixes that make every parameter "missing", and users' own attributes called `module`."""
    world(2).run(nested_wrappers, nesting)


def swap_memory(layout: str) -> list[int]:
    """Elements cloned and packed during a swap, against those this rank holds."""
    model = build_layout(layout)
    ema = averaging(model)
    ema.update()
    held = sum(value.numel() for value in local_values(model).values())
    made = []
    real_clone, real_cat = torch.Tensor.clone, torch.cat

    def clone(tensor, **options):
        made.append(tensor.numel())
        return real_clone(tensor, **options)

    def cat(tensors, *arguments, **options):
        packed = real_cat(tensors, *arguments, **options)
        made.append(packed.numel())
        return packed

    with mock.patch.object(torch.Tensor, "clone", clone), mock.patch.object(torch, "cat", cat):
        with ema.average_parameters():
            pass
    return [sum(made), held]


@pytest.mark.parametrize("layout", ["fsdp1_flat", "fsdp2"])
def test_a_swap_keeps_one_copy_of_what_the_rank_holds(world, layout) -> None:
    for made, held in world(2).run(swap_memory, layout):
        assert made <= held
