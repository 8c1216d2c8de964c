"""Snapshots of the live weights: what they hold, which are kept, and what is synthesized from them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts_zoo import build_layout, set_whole
from safetensors.torch import load_file
from tiny import HALF
from torch import nn

from dist_ema import (
    ConfigError,
    ConstantSchedule,
    EqualSchedule,
    PowerSchedule,
    RankMismatchError,
    ShardedEMA,
    SnapshotWindow,
    after,
    consolidate_checkpoint,
    log_spaced,
    synthesize,
)
from dist_ema.offline.synthesis import weigh


def move(model: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))


def snapshots_of(layout: str, folder: str) -> None:
    model = build_layout(layout)
    ema = ShardedEMA(model, {"a": HALF, "b": HALF})
    for step in range(3):
        whole = set_whole(model, step)
        ema.update()
        ema.snapshot_live(f"{folder}/own")
        ema.snapshot_live(f"{folder}/low", torch.bfloat16)
        ema.snapshot_live(f"{folder}/few", keep=SnapshotWindow(fraction=0.01, num_folders=3))
        with pytest.raises(ConfigError):
            ema.snapshot_live(folder, torch.int32)
        with pytest.raises(ConfigError, match="SnapshotWindow"):
            ema.snapshot_live(folder, keep=3)  # type: ignore[arg-type]
        for name, dtype in (("own", None), ("low", torch.bfloat16)):
            files = load_file(f"{folder}/{name}/live-{step + 1:09d}/model.safetensors")
            for fqn, value in whole.items():
                expected = value if dtype is None or not value.is_floating_point() else value.to(dtype)
                assert torch.equal(files[fqn], expected.cpu()), fqn
                assert files[fqn].dtype == expected.dtype
    assert not list(Path(folder).glob("live*"))
    assert [path.name for path in sorted(Path(folder, "few").iterdir())] == ["live-000000002", "live-000000003"]
    ema.detach()


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_the_files_have_the_live_weights_whatever_the_layout(layout: str, world: Any, tmp_path: Path) -> None:
    world(2).run(snapshots_of, layout, str(tmp_path))


@pytest.mark.parametrize(("fraction", "num", "every"), [(0.2, 10, 1), (0.5, 5, 7), (0.1, 20, 100), (1.0, 4, 1)])
def test_a_window_always_spans_the_last_part_of_the_run(fraction: float, num: int, every: int) -> None:
    window = SnapshotWindow(fraction=fraction, num_folders=num)
    kept: list[int] = []
    for index in range(1, 2000):
        now = index * every
        kept = window.kept([*kept, now], now)
        assert kept[-1] == now
        assert len(kept) <= num
        even = fraction * now / (num - 1)
        if even > 2 * every:
            assert len(kept) >= num // 2 + 1
            assert kept[0] <= (1 - fraction) * now + max(every, 0.1 * even), "it begins too late"
            assert kept[0] >= (1 - fraction) * now - 3 * even, "it begins too early"
            assert max(b - a for a, b in itertools.pairwise(kept)) <= 3 * even, "a gap"


def test_nothing_but_old_live_snapshots_is_removed(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, HALF)
    (tmp_path / "live-000000001").mkdir()
    (tmp_path / "live-000000001" / "thesis.txt").write_text("mine")
    keep = SnapshotWindow(fraction=0.1, num_folders=3)
    for step in range(12):
        move(model, step)
        ema.update()
        if step == 3:
            ema.snapshot_live(tmp_path)
            (tmp_path / "live-000000004" / "notes.txt").write_text("mine")
            ema.snapshot(tmp_path)
            ema.save(tmp_path / "live-000000003")
        elif step > 3:
            ema.snapshot_live(tmp_path, keep=keep)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[:4] == ["live-000000001", "live-000000003", "live-000000004", "live-000000010"]
    assert names[4:] == ["live-000000011", "live-000000012", "updates-000000004"]
    resumed = ShardedEMA(model, HALF)
    resumed.load(tmp_path / "updates-000000004")
    move(model, 5)
    resumed.update()
    with pytest.warns(UserWarning, match=r"3 snapshots with more updates .*live-000000010"):
        resumed.snapshot_live(tmp_path, keep=keep)  # the later ones are of steps that the resume took back
    assert {"live-000000010", "live-000000011", "live-000000012"} <= {path.name for path in tmp_path.iterdir()}


def test_log_spaced_steps_are_so_many_and_apart() -> None:
    assert sorted(log_spaced(4, last=1000)) == [1, 10, 100, 1000]
    steps = sorted(log_spaced(20, last=100))
    assert len(steps) == 20
    assert (steps[0], steps[-1]) == (1, 100)
    assert sorted(log_spaced(10, last=19, first=10)) == list(range(10, 20))
    for wrong in ({"num": 1, "last": 5}, {"num": 7, "last": 6}, {"num": 2.5, "last": 6}):
        with pytest.raises(ConfigError):
            log_spaced(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="num_folders=2"):
        SnapshotWindow(fraction=0.5, num_folders=2)


def test_synthesize_weighs_live_snapshots_by_the_updates_that_they_stand_for(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    ema = ShardedEMA(model, {"long": ConstantSchedule(decay=0.9)}, interval=1)
    live = {}
    for step in range(1, 21):
        move(model, step)
        ema.update()
        if step in (4, 6, 12, 20):
            ema.snapshot_live(tmp_path / "live")
            live[step] = model.weight.detach().clone()
    made = synthesize(tmp_path / "live", tmp_path / "equal", EqualSchedule())
    assert [part.weight for part in made.weights] == pytest.approx([4 / 20, 2 / 20, 6 / 20, 8 / 20])
    assert made.profile_error < 1e-6
    expected = sum(part.weight * live[part.num_updates].double() for part in made.weights)
    assert torch.allclose(load_file(made.folder / "model.safetensors")["weight"].double(), expected, atol=1e-6)
    # After t updates the first k have the weight (k / t)^2 together.
    fitted = weigh(tmp_path / "live", PowerSchedule(gamma=1.0)).fit.weights
    assert list(fitted) == pytest.approx([(b**2 - a**2) / 20**2 for a, b in itertools.pairwise([0, 4, 6, 12, 20])])


def test_live_snapshots_of_every_update_make_the_average_itself(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    schedule = ConstantSchedule(decay=0.8)
    ema = ShardedEMA(model, schedule)
    for step in range(12):
        move(model, step)
        ema.update()
        ema.snapshot_live(tmp_path / "run")
        if step == 5:
            ema.snapshot(tmp_path / "run")  # averages may lie beside them
    made = synthesize(tmp_path / "run", tmp_path / "out", schedule, num_updates=12)
    assert made.profile_error < 1e-6
    expected = ema.full_state_dict()
    for name, value in load_file(made.folder / "model.safetensors").items():
        assert torch.allclose(value, expected[name], atol=1e-5)


def test_a_track_that_was_added_is_a_source_of_synthesize_from_its_start_on(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    ema = ShardedEMA(model, {"short": PowerSchedule(gamma=30.0)})
    reference = None
    for step in range(60):
        if step == 20:
            ema.add_track("late", EqualSchedule())
            reference = ShardedEMA(model, EqualSchedule())
        move(model, step)
        ema.update()
        if reference is not None:
            reference.update()
        if step % 10 == 9:
            ema.snapshot(tmp_path / "run")
    made = synthesize(tmp_path / "run", tmp_path / "out", after(20, EqualSchedule()))
    assert made.profile_error < 1e-6
    assert reference is not None
    expected = reference.full_state_dict()["weight"]
    assert torch.allclose(load_file(made.folder / "model.safetensors")["weight"], expected, atol=1e-5)
    consolidate_checkpoint(tmp_path / "run" / "updates-000000060", tmp_path / "late", track="late")
    assert "updates: 40" in (tmp_path / "late" / "README.md").read_text()


def keep_differently(folder: str) -> None:
    rank = dist.get_rank()
    ema = ShardedEMA(build_layout("ddp"), HALF)
    ema.update()
    window = SnapshotWindow(fraction=0.5, num_folders=3)
    for keep in (window if rank else None, SnapshotWindow(fraction=0.5, num_folders=3 + rank)):
        with pytest.raises(RankMismatchError, match="keep"):
            ema.snapshot_live(folder, keep=keep)
    assert not list(Path(folder).iterdir())
    ema.snapshot_live(folder, keep=window)
    ema.metrics()  # no rank is left in the former call
    ema.detach()


def test_ranks_that_keep_different_windows_are_refused_and_the_next_call_is_whole(world: Any, tmp_path: Path) -> None:
    world(2).run(keep_differently, str(tmp_path))
