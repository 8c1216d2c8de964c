"""The averages in somebody else's pipeline: through DCP and back, in every layout that has sharded state dicts."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layouts_zoo import build_layout, clean, read_whole, set_whole
from oracle import NaiveAverage
from tiny import HALF, averaged_once
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from twins import assert_same_bits

from dist_ema import CheckpointMismatchError, ConstantSchedule, ShardedEMA, UnsupportedModelError

SCHEDULE = ConstantSchedule(momentum=0.25)
SAVED = [("ddp", 2), ("fsdp2", 3), ("hsdp", 4), ("tp_uneven", 2), ("fsdp_tp_uneven", 4)]
LOADED = [("ddp", 3), ("fsdp2", 1), ("fsdp2", 2), ("hsdp", 4), ("tp_uneven", 3), ("fsdp_tp_uneven", 4)]


def averaged(layout: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, ShardedEMA]:
    model = build_layout(layout, dtype=dtype)
    ema = ShardedEMA(model, SCHEDULE)
    for step in range(3):
        set_whole(model, step)
        ema.update()
    return model, ema


def save(layout: str, folder: str) -> None:
    model, ema = averaged(layout)
    state = ema.sharded_state_dict()
    own = model.module.state_dict() if layout == "ddp" else model.state_dict()
    assert set(state) == {clean(name) for name in own}
    assert {name: type(value) for name, value in state.items()} == {name: type(own[name].data) for name in state}
    counter = {"num_updates": ema.num_updates}
    dcp.save({"ema": state, "model": own, **counter}, checkpoint_id=f"{folder}/sync")
    dcp.async_save({"ema": ema.sharded_state_dict(), **counter}, checkpoint_id=f"{folder}/async").result()


def load(layout: str, folders: list[str]) -> None:
    for folder in folders:
        for kind in ("sync", "async"):
            model = build_layout(layout, seed=1)
            ema, naive = ShardedEMA(model, SCHEDULE), NaiveAverage(SCHEDULE.momentum)
            if layout == "ddp" and "ddp" not in folder:
                continue  # FSDP refuses the 0-dim parameter that this model has
            state = {"ema": ema.sharded_state_dict(), "num_updates": 0}
            dcp.load(state, checkpoint_id=f"{folder}/{kind}")
            ema.load_sharded_state_dict(state["ema"], num_updates=state["num_updates"])
            assert ema.num_updates == 3
            for step in range(4):
                naive.update(set_whole(model, step))
            ema.update()
            whole = ema.full_state_dict()
            if dist.get_rank() == 0:
                for name, value in naive.values.items():
                    assert torch.equal(whole[name], value), f"{folder}: {name}"


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory) -> list[str]:
    folders = [str(tmp_path_factory.mktemp("dcp") / f"{layout}-{size}") for layout, size in SAVED]
    for (layout, size), folder in zip(SAVED, folders, strict=True):
        world(size).run(save, layout, folder)
    return folders


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("layout", "size"), LOADED, ids=[f"into {layout} on {size}" for layout, size in LOADED])
def test_averages_travel_through_dcp_between_layouts_and_numbers_of_ranks(world, saved, layout, size) -> None:
    world(size).run(load, layout, saved)


def put_into_model(layout: str, dtype: torch.dtype) -> None:
    model, ema = averaged(layout, dtype)
    expected = ema.full_state_dict()
    set_model_state_dict(model, ema.sharded_state_dict(), options=StateDictOptions(strict=True))
    if layout != "fsdp2":
        model.load_state_dict(ema.sharded_state_dict() if layout != "ddp" else prefixed(ema.sharded_state_dict()))
    live = read_whole(model)
    if dist.get_rank() == 0:
        assert_same_bits(live, {name: expected[name].to(value.dtype) for name, value in live.items()})


def prefixed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"module.{name}": value for name, value in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("layout", "size"), [("ddp", 2), ("fsdp2", 3), ("hsdp", 4), ("fsdp_tp_uneven", 4)])
def test_the_model_takes_the_averages_by_set_model_state_dict(world, layout, size, dtype) -> None:
    world(size).run(put_into_model, layout, dtype)


def refusals() -> list[str]:
    _, ema = averaged("fsdp2")
    state = ema.sharded_state_dict()
    before = ema.full_state_dict()
    told = []
    some = next(name for name, value in state.items() if isinstance(value, DTensor))
    for bad in (
        {name: value for name, value in state.items() if name != some},
        {**state, "other": state[some]},
        {**state, some: state[some].full_tensor()},
    ):
        with pytest.raises(CheckpointMismatchError) as caught:
            ema.load_sharded_state_dict(bad)
        told.append(str(caught.value))
    after = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert_same_bits(before, after)
    for value in state.values():  # new memory: changing it changes neither the average nor the model
        value.zero_()
    after = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert_same_bits(before, after)
    ema.restart()
    ema.load_sharded_state_dict(state)
    assert ema.num_updates == 1
    flat = ShardedEMA(build_layout("fsdp1_orig"), SCHEDULE)
    with pytest.raises(UnsupportedModelError, match="FSDP1"):
        flat.sharded_state_dict()
    return told


def test_state_dicts_that_do_not_fit_are_refused_alike_on_every_rank(world) -> None:
    first, second = world(2).run(refusals)
    assert first == second and "lacks 1 averaged" in first[0] and "1 unknown" in first[1] and "DTensor" in first[2]


def test_a_state_dict_loaded_after_a_new_head_is_not_overwritten_by_the_live_weights(tmp_path) -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2)})
    averaged_once(model).save(tmp_path / "ema")
    model["head"] = nn.Linear(2, 2)
    ema = ShardedEMA(model, HALF)
    ema.load(tmp_path / "ema", new="head.*")
    state = {name: torch.full_like(value, 7.0) for name, value in ema.sharded_state_dict().items()}
    ema.load_sharded_state_dict(state, num_updates=9)
    assert all((value == 7.0).all() for value in ema.full_state_dict().values())
