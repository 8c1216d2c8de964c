"""`ema.stateful()` in torch's distributed checkpoints, and `ema.state_dict()` in one process."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layouts_zoo import WORLDS, build_layout, lay_out, set_whole
from oracle import NaiveAverage
from tiny import HALF, averaged_once
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.stateful import Stateful
from twins import assert_same_bits
from zoo import Nasty

from dist_ema import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    ConfigError,
    ConstantSchedule,
    CosineSchedule,
    ShardedEMA,
    SwapError,
    UnsupportedModelError,
)

SCHEDULES = {"fast": ConstantSchedule(momentum=0.25), "slow": CosineSchedule(0.3, 0.01, total_steps=9)}
NO_FORM = {layout for layout in WORLDS if layout.startswith("fsdp1") or "packed" in layout}


def even(layout: str, seed: int = 0) -> nn.Module:
    """The nasty model as all layouts can have it."""
    torch.manual_seed(seed)
    return lay_out(Nasty(scalar=False, hidden=12), layout)


def trained(model: nn.Module, schedules: Any = SCHEDULES, **options: Any) -> ShardedEMA:
    ema = ShardedEMA(model, schedules, **options)
    for step in range(3):
        set_whole(model, step)
        ema.update()
    return ema


def save(layout: str, folder: str) -> None:
    model = even(layout)
    ema = trained(model)
    state = {"model": model.state_dict(), "ema": ema.stateful()}
    dcp.save(state, checkpoint_id=f"{folder}/sync")
    # A group of its own: it communicates beside the training.
    writing = dcp.async_save(state, checkpoint_id=f"{folder}/async", process_group=dist.new_group(backend="gloo"))
    set_whole(model, 7)
    ema.update()
    writing.result()


def go_on(layout: str, folders: list[str]) -> None:
    for folder in folders:
        for kind in ("sync", "async"):
            model = even(layout, seed=1)
            ema = ShardedEMA(model, SCHEDULES)
            dcp.load({"ema": ema.stateful()}, checkpoint_id=f"{folder}/{kind}")
            assert ema.num_updates == 3
            naives = {track: NaiveAverage(schedule.momentum) for track, schedule in SCHEDULES.items()}
            for step in range(6):
                live = set_whole(model, step)
                if step >= 3:
                    ema.update()
                for naive in naives.values():
                    naive.update(live)
            for track, naive in naives.items():
                whole = ema.full_state_dict(track)
                if dist.get_rank() == 0:
                    assert_same_bits({name: whole[name] for name in naive.values}, naive.values)


@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on_from_dcp_in_another_layout_and_on_other_ranks_bit_for_bit(world, tmp_path) -> None:
    """4 ranks of FSDP2 and tensor parallelism go on as 2 ranks of FSDP2, and so on."""
    saved = [("fsdp_tp", 4), ("ddp", 2), ("hsdp", 4), ("fsdp2", 3)]
    folders = [str(tmp_path / f"{layout}-{size}") for layout, size in saved]
    for (layout, size), folder in zip(saved, folders, strict=True):
        world(size).run(save, layout, folder)
    for layout, size in [("fsdp2", 2), ("ddp", 3), ("fsdp_tp", 4), ("plain", 1)]:
        world(size).run(go_on, layout, folders)
    metadata = FileSystemReader(f"{folders[0]}/sync").read_metadata().state_dict_metadata
    of_ema = {name: entry for name, entry in metadata.items() if name.startswith("ema.")}
    assert len(of_ema) > 10 and all(isinstance(entry, TensorStorageMetadata) for entry in of_ema.values()), "a pickle"


def there_and_back(layout: str, folder: str) -> str:
    model = build_layout(layout)
    ema = trained(model)
    if dist.get_world_size() == 1:
        in_one_process(model, ema)
    try:
        stateful = ema.stateful()
    except UnsupportedModelError as error:
        return str(error)
    assert isinstance(stateful, Stateful)
    dcp.save({"ema": stateful}, checkpoint_id=f"{folder}/{layout}-{dist.get_world_size()}")
    expected = {track: ema.full_state_dict(track) for track in SCHEDULES}
    other = build_layout(layout, seed=1)
    set_whole(other, 8)
    loaded = ShardedEMA(other, SCHEDULES)
    dcp.load({"ema": loaded.stateful()}, checkpoint_id=f"{folder}/{layout}-{dist.get_world_size()}")
    assert loaded.num_updates == 3
    for track, whole in expected.items():
        now = loaded.full_state_dict(track)
        if dist.get_rank() == 0:
            names = [name for name, _ in model.named_parameters()] if layout == "plain" else [*whole]
            kept = [name for name in names if name in whole and whole[name].is_floating_point() and name != "running"]
            assert len(kept) > 5
            assert_same_bits({name: now[name] for name in kept}, {name: whole[name] for name in kept})
    return ""


def in_one_process(model: nn.Module, ema: ShardedEMA) -> None:
    """Every layout has a whole state dict."""
    state, expected = ema.state_dict(), ema.full_state_dict("slow")
    set_whole(model, 9)
    ema.update()
    ema.load_state_dict(state)
    set_whole(model, 2)
    assert_same_bits(ema.full_state_dict("slow"), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_layout_goes_through_dcp_exactly_or_is_refused_at_once(world, tmp_path, size) -> None:
    refused = set()
    for layout in (layout for layout, sizes in WORLDS.items() if size in sizes):
        answers = world(size).run(there_and_back, layout, str(tmp_path))
        assert len(set(answers)) == 1, "the ranks differ"
        if answers[0]:
            assert "save" in answers[0]
            refused.add(layout)
    assert refused == {layout for layout in NO_FORM if size in WORLDS[layout]}


def refusals(folder: str) -> list[str]:
    model = even("fsdp2")
    ema = trained(model)
    before = ema.full_state_dict("fast")
    said = []

    def refused(kind: type[Exception], call: Any, *arguments: Any) -> None:
        with pytest.raises(kind) as caught:
            call(*arguments)
        said.append(str(caught.value))

    refused(ConfigError, ema.state_dict)
    refused(ConfigError, ema.load_state_dict, {})
    refused(ConfigError, lambda: dcp.save({"ema": ema}, checkpoint_id=folder))
    stateful = ema.stateful()
    state = stateful.state_dict()
    refused(CheckpointMismatchError, stateful.load_state_dict, {})
    refused(CheckpointMismatchError, stateful.load_state_dict, {**state, "tracks": {"fast": state["tracks"]["fast"]}})
    refused(CheckpointMismatchError, stateful.load_state_dict, {**state, "schedules": {}})
    refused(CheckpointCorruptError, stateful.load_state_dict, {**state, "options": torch.zeros(8, dtype=torch.uint8)})
    refused(CheckpointCorruptError, stateful.load_state_dict, {**state, "num_updates": torch.tensor(-1)})
    with ema.average_parameters("fast"):
        refused(SwapError, stateful.state_dict)
        refused(SwapError, stateful.load_state_dict, state)
    after = ema.full_state_dict("fast")
    assert ema.num_updates == 3
    if dist.get_rank() == 0:
        assert_same_bits(before, after)
    dcp.save({"ema": stateful}, checkpoint_id=folder)
    other = ShardedEMA(model, {**SCHEDULES, "slow": HALF}, interval=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dcp.load({"ema": other.stateful()}, checkpoint_id=folder)
    assert other.num_updates == 3
    said += [str(each.message) for each in caught if "the state dict" in str(each.message)] or [""] * 2
    return said


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_given_or_taken_is_refused_alike_and_another_schedule_is_warned_of(world, tmp_path) -> None:
    first, second = world(2).run(refusals, str(tmp_path / "ckpt"))
    assert first[:-2] == second[:-2]
    assert all("save(path)" in text and "stateful" in text for text in first[:3])
    assert "CosineSchedule" in first[-2] and "ConstantSchedule" in first[-2] and "interval=1" in first[-1]


def uneven_counts() -> str:
    model = even("fsdp2")
    ema = trained(model)
    if dist.get_rank() == 1:
        ema.update()
    with pytest.raises(Exception, match="num_updates") as caught:
        dcp.save({"ema": ema.stateful()}, checkpoint_id="/nowhere")
    return str(caught.value)


def test_ranks_with_other_counters_do_not_save_one_of_them(world) -> None:
    first, second = world(2).run(uneven_counts)
    assert first == second


def counted(folder: str) -> None:
    model = even("fsdp2")
    ema = ShardedEMA(model, HALF, skip_nonfinite=True)
    for step in range(3):
        set_whole(model, step)
        with torch.no_grad():
            parameter = model.narrow.weight.to_local() if dist.get_rank() == 0 else torch.zeros(1, 1)
            parameter.view(-1)[:2] = float("nan")
        ema.update()
    refused = ema.num_refused()
    assert refused > 0
    dcp.save({"ema": ema.stateful()}, checkpoint_id=folder)
    other = ShardedEMA(model, HALF, skip_nonfinite=True)
    dcp.load({"ema": other.stateful()}, checkpoint_id=folder)
    assert other.num_refused() == refused


def into_a_teacher(folder: str) -> None:
    model, teacher = even("ddp"), even("ddp", seed=3).requires_grad_(False)
    ema = trained(model, HALF, into=teacher)
    before = copy.deepcopy(teacher.state_dict())
    dcp.save({"ema": ema.stateful()}, checkpoint_id=folder)
    set_whole(model, 9)
    ema.update()
    dcp.load({"ema": ema.stateful()}, checkpoint_id=folder)
    assert_same_bits(teacher.state_dict(), before)


@pytest.mark.filterwarnings("ignore")
def test_counts_of_refused_values_and_teachers_are_restored(world, tmp_path) -> None:
    world(2).run(counted, str(tmp_path / "counted"))
    world(2).run(into_a_teacher, str(tmp_path / "teacher"))


def plain_leaves(value: Any) -> list[Any]:
    return [leaf for each in value.values() for leaf in plain_leaves(each)] if isinstance(value, dict) else [value]


@pytest.mark.parametrize("num_updates", [0, 1, 3])
def test_a_state_dict_of_one_process_goes_through_torch_save(num_updates) -> None:
    model = Nasty()
    ema = ShardedEMA(model, SCHEDULES, exclude="norm.*")
    for step in range(num_updates):
        set_whole(model, step)
        ema.update()
    state = ema.state_dict()
    assert all(isinstance(leaf, torch.Tensor | int) for leaf in plain_leaves(state))
    assert state["num_updates"] == num_updates
    file = io.BytesIO()
    torch.save(state, file)
    expected = {track: ema.full_state_dict(track) for track in SCHEDULES}
    set_whole(model, 9)
    for _ in range(2):
        ema.update()
    file.seek(0)
    ema.load_state_dict(torch.load(file, weights_only=True))
    assert ema.num_updates == num_updates
    for track, whole in expected.items():
        tensors = state["tracks"][track]
        assert_same_bits(tensors, {name: whole[name] for name in tensors})
        if num_updates:  # before the first update the average is the live model
            now = ema.full_state_dict(track)
            assert_same_bits(tensors, {name: now[name] for name in tensors})


def test_a_state_dict_that_does_not_fit_changes_nothing_and_an_average_is_no_pickle() -> None:
    ema = averaged_once(nn.Linear(2, 3))
    state, before = ema.state_dict(), ema.full_state_dict()
    state["tracks"]["ema"]["weight"].zero_()  # new memory
    assert_same_bits(ema.full_state_dict(), before)
    bad = [
        averaged_once(nn.Linear(2, 4)).state_dict(),
        averaged_once(nn.Linear(2, 3, bias=False)).state_dict(),
        ShardedEMA(nn.Linear(2, 3), SCHEDULES).state_dict(),
        nn.Linear(2, 3).state_dict(),
        {**state, "tracks": {}},
        {**state, "tracks": {"ema": {**state["tracks"]["ema"], "weight": None}}},
        {**state, "tracks": 3},
    ]
    for each in bad:
        with pytest.raises(CheckpointMismatchError):
            ema.load_state_dict(each)
    assert_same_bits(ema.full_state_dict(), before)
    with pytest.raises(ConfigError, match="save"):
        pickle.dumps(ema)
    with ema.average_parameters(), pytest.raises(SwapError):
        ema.state_dict()


def test_a_schedule_whose_text_is_too_long_is_told_from_others(recwarn) -> None:
    class Long:
        def __init__(self, letter: str) -> None:
            self.letter = letter

        def momentum(self, step: int) -> float:
            return 0.5

        def __repr__(self) -> str:
            return self.letter * 9000

    model = nn.Linear(2, 2)
    state = ShardedEMA(model, Long("a")).state_dict()
    ShardedEMA(model, Long("a")).load_state_dict(state)
    assert not [each for each in recwarn if "the state dict" in str(each.message)]
    with pytest.warns(UserWarning, match="too long"):
        ShardedEMA(model, Long("b")).load_state_dict(state)
