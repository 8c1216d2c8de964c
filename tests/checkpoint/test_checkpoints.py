"""Checkpoints written and read by real ranks, on other numbers of ranks and other layouts."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, load_model
from tiny import averaged_once
from torch import nn
from twins import assert_same_bits, averaging, oracle
from zoo import Nasty, build, set_live

from dist_ema import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConstantSchedule,
    DistEMAError,
    RankMismatchError,
    ShardedEMA,
)
from dist_ema.checkpoint import writing

SAVED_STEPS = 3


def save(layout: str, folder: str, dtype: torch.dtype) -> None:
    model = build(layout, dtype=dtype)
    ema = averaging(model)
    for step in range(SAVED_STEPS):
        set_live(model, step)
        ema.update()
    ema.save(folder)
    ema.save(folder)  # over an existing one
    state = ema.full_state_dict()
    if dist.get_rank() == 0:
        loaded = load_file(os.path.join(folder, "model.safetensors"))
        assert set(loaded) == set(state) - {"head.weight"}, "tied weights are stored once"
        assert_same_bits(state, loaded)
        bare = Nasty(scalar=layout != "fsdp2")
        bare.running = bare.running.to(loaded["running"].dtype)  # safetensors compares dtypes in older versions
        load_model(bare, os.path.join(folder, "model.safetensors"))
        assert torch.equal(bare.head.weight, state["embed.weight"])


def load_and_go_on(layout: str, folder: str, dtype: torch.dtype) -> None:
    model = build(layout, dtype=dtype, seed=1)
    ema, naive = averaging(model), oracle()
    for step in range(SAVED_STEPS):
        naive.update(set_live(model, step))
    ema.load(folder)
    assert ema.num_updates == SAVED_STEPS
    state = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert_same_bits(state, naive.values)
    for step in range(SAVED_STEPS, SAVED_STEPS + 5):
        naive.update(set_live(model, step))
        ema.update()
    state = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert_same_bits(state, naive.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("layout", "other"), [("ddp", "plain"), ("fsdp2", "fsdp2"), ("plain", "ddp")])
def test_resume_on_other_numbers_of_ranks_equals_the_uninterrupted_run(world, tmp_path, layout, other, dtype) -> None:
    folder = str(tmp_path / "ema")
    world(2).run(save, layout, folder, dtype)
    for size in (1, 3):
        world(size).run(load_and_go_on, other, folder, dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ema"], "nothing staged is left behind"


def files_of(layout: str, folder: str) -> None:
    torch.manual_seed(0)
    model = build(layout)
    if layout != "fsdp2":
        del (model.module if layout == "ddp" else model).scale
    ema = averaging(model)
    for step in range(2):
        set_live(model, step)
        ema.update()
    ema.save(folder, max_shard_size=300)


def test_every_layout_and_world_size_writes_the_same_bytes(world, tmp_path) -> None:
    contents = {}
    for layout, size in [("plain", 1), ("ddp", 2), ("ddp", 3), ("fsdp2", 2), ("fsdp2", 3)]:
        folder = tmp_path / f"{layout}{size}"
        world(size).run(files_of, layout, str(folder))
        contents[layout, size] = {
            path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"
        }
    first = contents["plain", 1]
    assert len(first) >= 3, "max_shard_size splits into several files and an index"
    assert all(content == first for content in contents.values())


def exported(folder: str) -> None:
    model = build("fsdp2")
    ema = averaging(model)
    for step in range(3):
        set_live(model, step)
        ema.update()
    ema.consolidate(folder, dtype=torch.bfloat16)
    state = ema.full_state_dict()
    if dist.get_rank() == 0:
        loaded = load_file(os.path.join(folder, "model.safetensors"))
        assert sorted(os.listdir(folder)) == ["README.md", "model.safetensors"]
        assert all(torch.equal(value, state[name].to(value.dtype)) for name, value in loaded.items())
        assert loaded["hidden.weight"].dtype == torch.bfloat16 and loaded["count"].dtype == torch.int64


def test_export_converts_floating_tensors_on_the_way(world, tmp_path) -> None:
    world(3).run(exported, str(tmp_path / "export"))


def tracks_saved(folder: str) -> None:
    model = build("ddp")
    schedules = {"fast": ConstantSchedule(momentum=0.4), "slow": ConstantSchedule(momentum=0.01)}
    ema = ShardedEMA(model, schedules)
    for step in range(3):
        set_live(model, step)
        ema.update()
    ema.save(folder)
    again = ShardedEMA(build("plain", seed=3), schedules)
    again.load(folder)
    for name in schedules:
        state, expected = again.full_state_dict(name), ema.full_state_dict(name)
        if dist.get_rank() == 0:
            assert_same_bits(state, {name: value for name, value in expected.items() if name in dict(nameds(model))})
    with pytest.raises(CheckpointMismatchError, match="tracks"):
        averaging(model).load(folder)


def nameds(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name.removeprefix("module."), value) for name, value in model.named_parameters()]


def test_several_tracks_have_a_folder_each(world, tmp_path) -> None:
    world(2).run(tracks_saved, str(tmp_path / "ema"))
    assert sorted(path.name for path in (tmp_path / "ema").iterdir()) == ["fast", "manifest.json", "slow"]


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def future_version(folder: Path) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**record, "format_version": 99}))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def remove_tensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def load_damaged(folder: str) -> tuple[str, str]:
    model = build("ddp")
    ema, naive = averaging(model), oracle()
    for step in range(2):
        naive.update(set_live(model, step))
        ema.update()
    with pytest.raises(DistEMAError) as caught:
        ema.load(folder)
    state = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert_same_bits(state, naive.values)
    assert ema.num_updates == 2
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (damage_manifest, CheckpointNotFoundError),
        (future_version, CheckpointMismatchError),
        (truncate, CheckpointCorruptError),
        (remove_tensors, CheckpointCorruptError),
    ],
)
def test_a_failed_load_raises_the_same_error_everywhere_and_changes_nothing(world, tmp_path, damage, error) -> None:
    world(2).run(save, "ddp", str(tmp_path / "ema"), torch.float32)
    damage(tmp_path / "ema")
    first, second = world(2).run(load_damaged, str(tmp_path / "ema"))
    assert first == second and first[0] == error.__name__


def load_missing(folder: str) -> str:
    with pytest.raises(CheckpointNotFoundError) as caught:
        averaging(build("plain")).load(folder)
    return str(caught.value)


def test_a_missing_checkpoint_is_told_on_every_rank(world, tmp_path) -> None:
    messages = world(3).run(load_missing, str(tmp_path / "none"))
    assert len(set(messages)) == 1 and "there is no folder" in messages[0]


def load_other_model(folder: str) -> str:
    with pytest.raises(CheckpointMismatchError) as caught:
        averaging(nn.Linear(2, 2)).load(folder)
    with pytest.raises(CheckpointMismatchError, match="expected"):
        wide = Nasty()
        wide.hidden = nn.Linear(5, 8)
        averaging(wide).load(folder)
    return str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(world, tmp_path) -> None:
    world(2).run(save, "plain", str(tmp_path / "ema"), torch.float32)
    messages = world(2).run(load_other_model, str(tmp_path / "ema"))
    assert len(set(messages)) == 1 and "another model" in messages[0]


def save_nowhere(folder: str) -> str:
    ema = averaging(build("ddp"))
    with pytest.raises(CheckpointError) as caught:
        ema.save(folder)
    with pytest.raises(CheckpointError):
        ema.consolidate(folder)
    ema.update()
    return str(caught.value)


def test_a_folder_that_cannot_be_written_is_told_on_every_rank(world, tmp_path) -> None:
    (tmp_path / "file").write_text("not a folder")
    messages = world(2).run(save_nowhere, str(tmp_path / "file" / "ema"))
    assert len(set(messages)) == 1 and "rank 0 failed: " in messages[0]


def test_a_folder_with_somebody_elses_files_is_not_replaced(world, tmp_path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    messages = world(2).run(save_nowhere, str(tmp_path / "thesis"))
    assert len(set(messages)) == 1 and "no saved average" in messages[0]
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def small_pages() -> None:
    """Shrink the units of writing to the size of the models here, for the rest of this process's life."""
    writing._PAGE_BYTES, writing._LONG_BYTES, writing._WINDOW_BYTES, writing._CHUNK_BYTES = 16, 64, 48, 32


def save_while_one_rank_cannot_write(folder: str) -> str:
    ema = averaging(build("ddp"))
    ema.update()
    ema.save(folder)
    small_pages()  # so that every rank writes something
    real = os.open

    def refuse(path, flags, *mode):
        if str(path).endswith(".safetensors") and flags & os.O_WRONLY:
            raise OSError(28, "No space left on device")
        return real(path, flags, *mode)

    if dist.get_rank() == 1:
        os.open = refuse
    try:
        with pytest.raises(CheckpointError) as caught:
            ema.save(folder)
    finally:
        os.open = real
    ema.load(folder)
    return str(caught.value)


def test_one_rank_with_a_full_disk_fails_the_save_on_all_and_keeps_the_former_one(world, tmp_path) -> None:
    messages = world(3).run(save_while_one_rank_cannot_write, str(tmp_path / "ema"))
    assert len(set(messages)) == 1 and "rank 1" in messages[0] and "No space left" in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["ema"]


def save_after_uneven_updates(folder: str) -> str:
    ema = averaging(build("plain"))
    for _ in range(2 + dist.get_rank()):
        ema.update()
    with pytest.raises(RankMismatchError) as caught:
        ema.save(folder)
    return str(caught.value)


def test_ranks_with_different_counters_are_not_saved(world, tmp_path) -> None:
    messages = world(2).run(save_after_uneven_updates, str(tmp_path / "ema"))
    assert len(set(messages)) == 1 and "num_updates: 2 against 3" in messages[0]
    assert not list(tmp_path.iterdir())


def load_with_another_schedule(folder: str) -> None:
    ema = ShardedEMA(build("ddp"), ConstantSchedule(momentum=0.2))
    if dist.get_rank() == 0:
        with pytest.warns(UserWarning, match="CosineSchedule.*ConstantSchedule"):
            ema.load(folder)
    else:
        ema.load(folder)
    assert ema.num_updates == SAVED_STEPS


def test_another_schedule_is_told_and_allowed(world, tmp_path) -> None:
    world(2).run(save, "ddp", str(tmp_path / "ema"), torch.float32)
    world(2).run(load_with_another_schedule, str(tmp_path / "ema"))


def warnings_are_errors(folder: str) -> str:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    ema = averaged_once(model)
    with torch.no_grad():
        model.weight.add_(1e-5 * dist.get_rank())
    with warnings.catch_warnings():
        if dist.get_rank() == 0:
            warnings.simplefilter("error")
        with pytest.raises(DistEMAError) as caught:
            ema.save(folder)
    return str(caught.value)


def test_a_warning_that_is_an_error_on_rank_0_ends_the_call_on_all(world, tmp_path) -> None:
    first, second = world(2).run(warnings_are_errors, str(tmp_path / "ema"))
    assert first == second and "drifted apart" in first
    assert not list(tmp_path.iterdir())


def save_nan(folder: str) -> list[str]:
    """The warnings of this rank, when a step with a loss of NaN was averaged between two saves and a third."""
    model = build("fsdp2")
    model.register_buffer("spare", torch.full((3,), float("nan")))
    ema = averaging(model)
    told: list[str] = []
    for spoils in (False, True, False):
        if spoils:
            for parameter in model.parameters():
                parameter.data.fill_(float("nan"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ema.update()
            ema.save(folder)
        told.append(" ".join(str(one.message) for one in caught))
    return told


def test_a_save_of_an_average_that_has_become_nan_is_told_once_by_rank_0(world, tmp_path) -> None:
    """It replaced the last good average without a word."""
    of_ranks = world(2).run(save_nan, str(tmp_path / "a"))
    healthy, spoilt, later = of_ranks[0]
    assert not healthy, "a buffer of NaN is nobody's mistake"
    assert "not a number" in spoilt and "skip_nonfinite=True" in spoilt
    assert not later
    assert not any(of_ranks[1])
