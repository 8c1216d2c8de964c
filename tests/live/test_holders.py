"""Who holds a tensor is proved over all ranks, and looked for where the layouts do not show it."""

from __future__ import annotations

import copy
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import GROUP_TIMEOUT_SECONDS
from safetensors.torch import load_file
from torch import nn

from dist_ema import CommunicationError, ConstantSchedule, RankMismatchError, ShardedEMA, UnsupportedModelError
from dist_ema.ranks.worlds import this_world

HALF = ConstantSchedule(momentum=0.5)


def whole_model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 4),
            "first": nn.Linear(4, 5),
            "norm": nn.BatchNorm1d(5),
            "second": nn.Linear(5, 4),
            "head": nn.Linear(4, 7),
        }
    )


def parts(names: str) -> nn.ModuleDict:
    whole = whole_model()
    return nn.ModuleDict({name: whole[name] for name in names.split()})


def step(model: nn.Module, number: int) -> None:
    """Give every tensor values that depend on its name and the step alone."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            draw = torch.Generator().manual_seed(number * 1000 + sum(name.encode()))
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=draw))
            else:
                tensor.fill_(number)


def naive(num_steps: int) -> dict[str, torch.Tensor]:
    model, averages = whole_model(), {}
    for number in range(num_steps):
        step(model, number)
        for name, parameter in model.named_parameters():
            live = parameter.detach().clone()
            averages[name] = live if number == 0 else averages[name].lerp(live, 0.5)
    return averages | {name: buffer.clone() for name, buffer in model.named_buffers()}


# What each rank has of the model.
STAGES = {
    "two stages": ["embed first norm", "second head"],
    "an embedding on both": ["embed first norm", "embed second head"],
    "stages of two ranks": ["embed first", "embed first", "norm second head", "norm second head"],
    "three, overlapping": ["embed first", "first norm", "norm second head"],
    "the rank 0 has no replica": ["embed first", "norm second head", "norm second head"],
    "a norm everywhere": ["embed norm", "first norm", "norm second", "norm head"],
    "the same on all": ["embed first norm second head"] * 2,
    "a rank with buffers alone": ["embed first second head", "norm"],
    # Ranks meet in another order in every pair.
    "each two share another part, and rank 1 has its parts in another order": [
        "embed first",
        "norm embed second head",
        "first norm",
    ],
}


def stages(folder: str, of_ranks: list[str], as_list: bool) -> list[str]:
    model = parts(of_ranks[dist.get_rank()])
    given = [nn.ModuleDict({name: module}) for name, module in model.items()] if as_list else model
    ema, expected = ShardedEMA(given, HALF), naive(3)
    for number in range(3):
        step(model, number)
        ema.update()
    live = copy.deepcopy(model.state_dict())
    with ema.average_parameters():
        for name, value in model.named_parameters():
            assert torch.equal(value, expected[name]), name
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())
    state = ema.full_state_dict()
    assert dist.get_rank() != 0 or all(torch.equal(state[name], value) for name, value in expected.items())
    ema.save(folder)
    files = load_file(f"{folder}/model.safetensors")
    assert files.keys() == expected.keys()
    assert all(torch.equal(files[name], value) for name, value in expected.items())
    sharded = ema.sharded_state_dict()
    assert sharded.keys() == model.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in sharded.items())
    ema.consolidate(f"{folder}-export", dtype=torch.float16)
    again = ShardedEMA(given, HALF)
    again.load(folder)
    assert again.num_updates == 3
    again.load_sharded_state_dict(sharded)
    again.save(f"{folder}-again")
    assert all(torch.equal(load_file(f"{folder}-again/model.safetensors")[name], files[name]) for name in files)
    return sorted(shard.fqn for shard in ema.shards)


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("layout", STAGES)
def test_ranks_with_other_parts_of_a_model_write_one_model(world, tmp_path, layout, as_list) -> None:
    of_ranks = STAGES[layout]
    owned = world(len(of_ranks)).run(stages, str(tmp_path / "ema"), of_ranks, as_list)
    assert {fqn for of_rank in owned for fqn in of_rank} == {name for name, _ in whole_model().named_parameters()}


def load_whole(folder: str) -> None:
    model = nn.parallel.DistributedDataParallel(whole_model()) if dist.get_world_size() > 1 else whole_model()
    ema = ShardedEMA(model, HALF)
    ema.load(folder)
    state = ema.full_state_dict()
    if dist.get_rank() == 0:
        expected = naive(3)
        assert all(torch.equal(state[name], expected[name]) for name, _ in whole_model().named_parameters())


def test_stages_are_loaded_by_other_splits(world, tmp_path) -> None:
    folder = str(tmp_path / "ema")
    world(2).run(stages, folder, STAGES["two stages"], False)
    for size in (1, 3):
        world(size).run(load_whole, folder)
    world(4).run(load_stages, folder, STAGES["stages of two ranks"])


def load_stages(folder: str, of_ranks: list[str]) -> None:
    ema = ShardedEMA(parts(of_ranks[dist.get_rank()]), HALF)
    ema.load(folder)
    ema.save(f"{folder}-of-{len(of_ranks)}")
    files, expected = load_file(f"{folder}-of-4/model.safetensors"), naive(3)
    assert all(torch.equal(files[name], expected[name]) for name, _ in whole_model().named_parameters())


def refused(make: Callable[[int], nn.Module], error: type[Exception], **options: object) -> str:
    with pytest.raises(error) as caught:
        ShardedEMA(make(dist.get_rank()), HALF, **options)  # type: ignore[arg-type]
    return str(caught.value)


def another_shape(rank: int) -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2 + rank)})


def another_dtype(rank: int) -> nn.Module:
    return nn.Linear(2, 2).to((torch.float32, torch.bfloat16)[rank])


def a_parameter_for_a_buffer(rank: int) -> nn.Module:
    model = nn.Module()
    if rank == 0:
        model.register_buffer("w", torch.zeros(3))
    else:
        model.w = nn.Parameter(torch.zeros(3))
    return model


def tied_on_one(rank: int) -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    if rank == 0:
        model["b"].weight = model["a"].weight
    return model


def equal_names_of_other_stages(rank: int) -> nn.Module:
    torch.manual_seed(rank)
    return nn.ModuleDict({"0": nn.Linear(3, 3)})


REFUSED = [
    (another_shape, RankMismatchError, "b.weight is a parameter of [2, 2] in float32, averaged on rank 0"),
    (another_dtype, RankMismatchError, "weight is a parameter of [2, 2] in float32"),
    (a_parameter_for_a_buffer, RankMismatchError, "w is a buffer of [3]"),
    (tied_on_one, RankMismatchError, "b.weight is the same tensor as a.weight on rank 0"),
    (equal_names_of_other_stages, UnsupportedModelError, "0.weight is not the same on rank 0 and rank 1"),
]


@pytest.mark.parametrize(("make", "error", "text"), REFUSED)
def test_two_tensors_of_one_name_are_one_error_on_all_ranks(world, make, error, text) -> None:
    first, second = world(2).run(refused, make, error)
    assert first == second and text in first


def pattern_of_another_stage() -> None:
    ema = ShardedEMA(parts(("embed first", "second head")[dist.get_rank()]), HALF, exclude="head.*")
    ema.update()
    assert "head.weight" not in {shard.fqn for shard in ema.shards}


def test_a_pattern_may_match_on_another_stage_alone(world) -> None:
    world(2).run(pattern_of_another_stage)


def stage_without_an_averaged_tensor(folder: str) -> int:
    ema = ShardedEMA(parts(("embed first", "second head")[dist.get_rank()]), HALF, include=["second.*", "head.*"])
    ema.update()
    with ema.average_parameters():
        pass
    ema.save(folder)
    return ema.nbytes


def test_a_stage_may_average_nothing(world, tmp_path) -> None:
    first, second = world(2).run(stage_without_an_averaged_tensor, str(tmp_path / "ema"))
    assert first == 0 and second > 0


def two_averages_share_their_groups() -> int:
    of_ranks = STAGES["stages of two ranks"]
    model = parts(of_ranks[dist.get_rank()])
    ShardedEMA(model, HALF)
    before = len(dist.distributed_c10d._world.pg_map)
    ShardedEMA(model, HALF)
    return len(dist.distributed_c10d._world.pg_map) - before


def test_a_second_average_makes_no_further_process_group(world) -> None:
    assert set(world(4).run(two_averages_share_their_groups)) == {0}


def empty_list() -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA([], HALF)
    return str(caught.value)


def test_an_empty_list_of_parts_is_refused(world) -> None:
    assert "expected the modules that this rank has" in world(1).run(empty_list)[0]


class Nothing(nn.Module):
    """A parameter without elements, as an expert that no rank has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(0, 3))


def a_tensor_without_elements(folder: str) -> None:
    whole = {"nothing": Nothing(), "b": nn.Linear(2, 2)}
    of_ranks = ("nothing", "b", "nothing b")
    ema = ShardedEMA(nn.ModuleDict({name: whole[name] for name in of_ranks[dist.get_rank()].split()}), HALF)
    ema.update()
    with ema.average_parameters():
        pass
    ema.save(folder)
    assert load_file(f"{folder}/model.safetensors").keys() == {"nothing.weight", "b.weight", "b.bias"}


def test_a_tensor_without_elements_on_some_holders_does_not_shift_what_they_compare(world, tmp_path) -> None:
    world(3).run(a_tensor_without_elements, str(tmp_path / "ema"))


def wrapped_on_one_rank() -> None:
    inner = whole_model()
    model = nn.parallel.DistributedDataParallel(inner, process_group=dist.new_group([0, 1]))
    ema = ShardedEMA(inner if dist.get_rank() else model, HALF)
    ema.update()
    live = copy.deepcopy(inner.state_dict())
    with ema.average_parameters():
        assert all(torch.equal(value, live[name]) for name, value in inner.named_parameters())


def test_a_rank_that_gives_the_model_without_its_wrapper_does_not_hang_the_swap(world) -> None:
    world(2).run(wrapped_on_one_rank)


def interrupted_while_groups_are_made() -> str:
    model = parts(("embed first", "first norm", "embed norm")[dist.get_rank()])
    make, ended = dist.new_group, "nothing"

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if dist.get_rank() == 1:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.1)
        return make(*arguments, **options)

    this_world()._groups.clear()
    with mock.patch.object(dist, "new_group", interrupted):
        try:
            ShardedEMA(model, HALF)
        except KeyboardInterrupt:
            ended = "interrupt"
        except CommunicationError:
            ended = "communication"
    ema = ShardedEMA(model, HALF)
    with ema.average_parameters():
        pass
    return ended


def test_an_interrupt_of_one_rank_while_groups_are_made_leaves_nobody_waiting(world) -> None:
    began = time.monotonic()
    assert world(3).run(interrupted_while_groups_are_made)[1] == "interrupt"
    assert time.monotonic() - began < GROUP_TIMEOUT_SECONDS


def refused_teacher() -> str:
    teacher = parts("embed first second head").requires_grad_(False)
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(parts(("embed first", "second head")[dist.get_rank()]), HALF, into=teacher)
    return str(caught.value)


def test_a_whole_teacher_of_a_stage_is_refused_as_most_of_it_would_stand_still(world) -> None:
    first, second = world(2).run(refused_teacher)
    assert first == second and "into has second.weight on this rank" in first


def one_stage_changes(folder: str) -> list[str]:
    model = parts(("embed first", "first second head")[dist.get_rank()])
    ema = ShardedEMA(model, HALF)
    for number in range(3):
        step(model, number)
        ema.update()
    if dist.get_rank():
        model["head"] = nn.Linear(4, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ema.save(folder, only_unchanged=True)
    files, expected = load_file(f"{folder}/model.safetensors"), naive(3)
    assert files.keys() == {"embed.weight", "first.weight", "first.bias", "second.weight", "second.bias"}
    assert all(torch.equal(value, expected[name]) for name, value in files.items())
    if dist.get_rank():
        model["first"] = nn.Linear(4, 5)
    with pytest.raises(RankMismatchError, match=r"first\.weight has changed on some of the ranks that hold it"):
        ema.save(folder, only_unchanged=True)
    return [str(warning.message) for warning in caught]


def test_a_stage_that_changes_does_not_lose_the_average_of_the_others(world, tmp_path) -> None:
    (told,), none = world(2).run(one_stage_changes, str(tmp_path / "ema"))
    assert "head.weight, head.bias (2 of 7 tensors) are not as they were" in told and none == []
