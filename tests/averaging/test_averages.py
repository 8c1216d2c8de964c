"""Sharded averages against the naive whole-tensor twin, on real ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from oracle import NaiveAverage
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from twins import STEPS, assert_same_bits, averaging, oracle
from zoo import Nasty, build, local_values, set_live

from dist_ema import ConfigError, ConstantSchedule, RankMismatchError, ShardedEMA, SwapError

SHARDED = ("plain", "ddp", "fsdp2")


def exact(layout: str, dtype: torch.dtype, interval: int) -> None:
    model = build(layout, dtype=dtype)
    ema, naive = averaging(model, interval=interval), oracle(interval=interval)
    for step in range(STEPS):
        naive.update(set_live(model, step))
        ema.update()
    state = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert_same_bits(state, naive.values)
        names = {name.removeprefix("module.") for name in model.state_dict()}
        assert set(state) == names
        assert state["head.weight"] is state["embed.weight"]
        assert state["count"].dtype == torch.int64 and torch.equal(state["running"], torch.arange(3.0).to(dtype))
    else:
        assert state == {}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("layout", SHARDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sharded_average_equals_the_naive_one_bit_for_bit(world, size, layout, dtype) -> None:
    world(size).run(exact, layout, dtype, 1)


@pytest.mark.parametrize("layout", SHARDED)
def test_interval_counts_calls(world, layout) -> None:
    world(2).run(exact, layout, torch.float32, 2)


def owners(layout: str) -> list[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    ema = averaging(build(layout))
    assert ema.nbytes == 4 * sum(shard.box.numel for shard in ema.shards)
    return [(shard.fqn, shard.global_shape, shard.offsets, shard.sizes) for shard in ema.shards]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("layout", SHARDED)
def test_every_element_has_one_owner_and_bytes_add_up(world, size, layout) -> None:
    counts: dict[str, torch.Tensor] = {}
    for shards in world(size).run(owners, layout):
        for fqn, shape, offsets, sizes in shards:
            region = tuple(slice(start, start + length) for start, length in zip(offsets, sizes, strict=True))
            counts.setdefault(fqn, torch.zeros(shape, dtype=torch.int64))[region] += 1
    model = Nasty(scalar=layout != "fsdp2")
    assert set(counts) == {name for name, _ in model.named_parameters()}
    assert all((count == 1).all() for count in counts.values())
    assert sum(count.numel() for count in counts.values()) == sum(p.numel() for p in model.parameters())


def no_collectives(layout: str) -> None:
    model = build(layout)
    ema = averaging(model)
    for _ in range(3):
        with CommDebugMode() as counted:
            ema.update()
        assert counted.get_total_counts() == 0, counted.get_comm_counts()


@pytest.mark.parametrize("layout", SHARDED)
def test_update_does_not_communicate(world, layout) -> None:
    world(2).run(no_collectives, layout)


def swap_communicates(layout: str) -> int:
    ema = averaging(build(layout))
    ema.update()
    with CommDebugMode() as counted, ema.average_parameters():
        pass
    return counted.get_total_counts()


def test_swap_communicates_under_ddp_only(world) -> None:
    assert all(count > 0 for count in world(2).run(swap_communicates, "ddp"))
    assert world(2).run(swap_communicates, "fsdp2") == [0, 0]


def train_and_swap(layout: str, dtype: torch.dtype) -> None:
    """Real steps, an evaluation after each: its forward leaves FSDP2's root group gathered."""
    model = build(layout, dtype=dtype)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ema, naive = averaging(model), oracle()
    tokens = torch.randint(0, 11, (4, 3), generator=torch.Generator().manual_seed(dist.get_rank()))
    bare = Nasty(scalar=layout != "fsdp2").to(dtype)
    for _ in range(STEPS):
        model(tokens).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        naive.update(whole_live(model))
        with torch.no_grad():
            model(tokens)
        before = local_values_settled(model)
        with ema.average_parameters():
            for name, value in whole_live(model).items():
                assert torch.equal(value, naive.values[name].to(dtype)), name
            with torch.no_grad():
                swapped_logits = model(tokens)
                bare.load_state_dict({**bare.state_dict(), **{k: v.to(dtype) for k, v in naive.values.items()}})
                torch.testing.assert_close(swapped_logits, bare(tokens))
        after = local_values_settled(model)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    state = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert_same_bits(state, naive.values)


def local_values_settled(model: nn.Module) -> dict[str, torch.Tensor]:
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return local_values(model)


def whole_live(model: nn.Module) -> dict[str, torch.Tensor]:
    local_values_settled(model)
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_training_with_swaps_keeps_average_and_live_exact(world, size, layout, dtype) -> None:
    world(size).run(train_and_swap, layout, dtype)


def exception_inside(layout: str) -> None:
    model = build(layout)
    set_live(model, 1)
    ema = averaging(model)
    ema.update()
    set_live(model, 2)
    ema.update()
    before = local_values(model)
    with pytest.raises(ZeroDivisionError), ema.average_parameters():
        raise ZeroDivisionError
    after = local_values_settled(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    ema.update()


@pytest.mark.parametrize("layout", SHARDED)
def test_exception_during_evaluation_does_not_leave_the_average_in_the_model(world, layout) -> None:
    world(2).run(exception_inside, layout)


def before_first_update(layout: str) -> None:
    model = build(layout)
    ema = averaging(model)
    live = set_live(model, 5)  # as a checkpoint loaded after construction does
    with ema.average_parameters():
        assert all(torch.equal(value, live[name]) for name, value in whole_live(model).items())
    state = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert_same_bits(state, live)
    assert ema.num_updates == 0


@pytest.mark.parametrize("layout", SHARDED)
def test_before_the_first_update_the_average_is_the_live_model(world, layout) -> None:
    world(2).run(before_first_update, layout)


def buffers_of_rank_0() -> None:
    model = nn.BatchNorm1d(3)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.5), update_buffers=True)
    naive = NaiveAverage(lambda step: 0.5)
    for step in range(4):
        with torch.no_grad():
            model.running_mean = torch.full((3,), float(step)) + 10 * dist.get_rank()  # assigned anew
            model.num_batches_tracked.fill_(step)
        ema.update()
        naive.update({"running_mean": torch.full((3,), float(step))})
    state = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert torch.equal(state["running_mean"], naive.values["running_mean"])
        assert state["num_batches_tracked"].item() == 3
    with ema.average_parameters():
        assert torch.equal(model.running_mean, naive.values["running_mean"])


def test_averaged_buffers_are_those_of_rank_0_and_integer_buffers_stay_live(world) -> None:
    world(3).run(buffers_of_rank_0)


def excluded_tensors() -> None:
    model = build("fsdp2")
    ema = averaging(model, exclude=["head.*", "embed.*", "narrow.*"])
    live = {step: set_live(model, step) for step in range(2) if ema.update() is None}
    assert {shard.fqn for shard in ema.shards}.isdisjoint({"embed.weight", "narrow.weight", "narrow.bias"})
    state = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert torch.equal(state["embed.weight"], live[1]["embed.weight"])
        assert not torch.equal(state["hidden.weight"], live[1]["hidden.weight"])


def test_excluded_tensors_are_shown_live(world) -> None:
    world(2).run(excluded_tensors)


def rank_dependent_model() -> str:
    with pytest.raises(RankMismatchError) as caught:
        averaging(nn.Linear(3, 4 + dist.get_rank()))
    return str(caught.value)


def rank_dependent_schedule() -> str:
    with pytest.raises(RankMismatchError) as caught:
        ShardedEMA(nn.Linear(3, 4), ConstantSchedule(momentum=0.1 + 0.1 * dist.get_rank()))
    return str(caught.value)


def one_rank_gives_a_bad_option() -> str:
    with pytest.raises(ConfigError) as caught:
        averaging(nn.Linear(3, 4), interval=dist.get_rank())
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "told"),
    [
        (rank_dependent_model, "weight is a parameter of [4, 3] in float32, averaged on rank 0 and"),
        (rank_dependent_schedule, "rank 0 and rank 1 differ in tracks"),
        (one_rank_gives_a_bad_option, "rank 0: interval is 0"),
    ],
)
def test_ranks_that_disagree_get_the_same_error(world, case, told) -> None:
    messages = world(3).run(case)
    assert len(set(messages)) == 1 and told in messages[0]


def ignored_parameters() -> None:
    """A mixed model: some parameters sharded by FSDP2, some left plain on every rank."""
    torch.manual_seed(0)
    model = Nasty()
    fully_shard(model, ignored_params={model.scale, model.narrow.weight, model.narrow.bias})
    ema, naive = averaging(model), oracle()
    for step in range(STEPS):
        naive.update(set_live(model, step))
        ema.update()
    state = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert_same_bits(state, naive.values)


def test_mixed_model_of_sharded_and_plain_parameters(world) -> None:
    world(3).run(ignored_parameters)


def two_tracks() -> None:
    model = build("ddp")
    fast, slow = ConstantSchedule(momentum=0.4), ConstantSchedule(momentum=0.01)
    ema = ShardedEMA(model, {"fast": fast, "slow": slow})
    naive = {"fast": NaiveAverage(fast.momentum), "slow": NaiveAverage(slow.momentum)}
    for step in range(4):
        live = set_live(model, step)
        ema.update()
        for each in naive.values():
            each.update(live)
    assert ema.tracks == ("fast", "slow")
    for name in ema.tracks:
        state = ema.full_state_dict(name)
        if dist.get_rank() == 0:
            assert_same_bits(state, naive[name].values)
        with ema.average_parameters(name):
            assert all(torch.equal(v, naive[name].values[k]) for k, v in whole_live(model).items())
    with pytest.raises(ConfigError, match="track is None"):
        ema.full_state_dict()


def test_several_tracks_are_averaged_and_swapped_by_name(world) -> None:
    world(2).run(two_tracks)


def refusals_while_swapped(folder: str) -> None:
    ema = averaging(build("ddp"))
    ema.update()
    with ema.average_parameters():
        for call in (
            ema.update,
            lambda: ema.save(folder),
            lambda: ema.load(folder),
            lambda: ema.consolidate(folder),
            ema.copy_to_model,
        ):
            with pytest.raises(SwapError, match="average_parameters"):
                call()
        with pytest.raises(SwapError), ema.average_parameters():
            pass
    assert ema.num_updates == 1


def test_calls_that_would_mix_averages_and_live_weights_are_refused_while_swapped(world, tmp_path) -> None:
    world(2).run(refusals_while_swapped, str(tmp_path / "ema"))
    assert not list(tmp_path.iterdir())


def copied_for_good(layout: str) -> None:
    model = build(layout)
    ema, naive = averaging(model), oracle()
    for step in range(3):
        naive.update(set_live(model, step))
        ema.update()
    ema.copy_to_model()
    assert all(torch.equal(value, naive.values[name]) for name, value in whole_live(model).items())


@pytest.mark.parametrize("layout", SHARDED)
def test_copy_to_model_reaches_every_replica(world, layout) -> None:
    world(3).run(copied_for_good, layout)
