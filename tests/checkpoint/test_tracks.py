"""Tracks that come and go: an added track is an average that was built then; resumes with other tracks and options."""

from __future__ import annotations

import ast
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerated import accelerator_of
from layouts_zoo import build_layout, set_whole
from tiny import HALF
from torch import nn

from dist_ema import (
    CheckpointMismatchError,
    ConfigError,
    ConstantSchedule,
    CosineSchedule,
    PowerSchedule,
    RankMismatchError,
    ShardedEMA,
    attach,
)

FAST = ConstantSchedule(momentum=0.25)
SLOW = CosineSchedule(0.3, 0.01, total_steps=7)
LAYOUTS = [("plain", 1), ("ddp", 2), ("fsdp2", 2)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"interval": 3, "interval_correction": True},
    {"compensated": True},
    {"skip_nonfinite": True},
    {"overlap": True, "skip_nonfinite": True},
    {"update_buffers": True},
]


def bits(ema: ShardedEMA, track: str) -> dict[str, torch.Tensor]:
    return {shard.fqn + str(shard.offsets): value.clone() for shard, value in values(ema, track)}


def values(ema: ShardedEMA, track: str) -> Any:
    return zip(ema.shards, ema._state.values(track), strict=True)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], what: object) -> None:
    assert one.keys() == other.keys(), what
    for name, value in one.items():
        assert torch.equal(value, other[name]), (what, name)


def model_of(layout: str) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) if layout == "plain" else build_layout(layout)


def move(model: nn.Module, layout: str, step: int) -> None:
    if layout != "plain":
        set_whole(model, step)
        return
    torch.manual_seed(step)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape))


def added_track_is_an_average_built_then(layout: str) -> None:
    for options in OPTIONS if layout == "plain" else OPTIONS[:3]:
        model = model_of(layout)
        ema = ShardedEMA(model, {"fast": FAST}, **options)
        alone = ShardedEMA(model, {"fast": FAST}, **options)
        twins = []
        for step in range(12):
            move(model, layout, step)
            if step == 4:
                ema.add_track("slow", SLOW)
                twins.append(ShardedEMA(model, SLOW, **options))
                # Until its first update the track shows the live weights.
                assert_same(bits(ema, "slow"), bits(twins[0], "ema"), "before its first update")
            if step == 5:
                ema.add_track("power", PowerSchedule(sigma_rel=0.2))
                twins.append(ShardedEMA(model, PowerSchedule(sigma_rel=0.2), **options))
            for each in (ema, alone, *twins):
                each.update()
            assert_same(bits(ema, "fast"), bits(alone, "ema" if "ema" in alone.tracks else "fast"), options)
            for track, twin in zip(("slow", "power"), twins, strict=False):
                assert_same(bits(ema, track), bits(twin, "ema"), (options, track, step))
                assert ema._state.momentum(track) == twin._state.momentum("ema")
        assert ema.num_refused() == alone.num_refused()
        assert ema.nbytes == 3 * alone.nbytes
        ema.drop_track("fast")
        assert ema.nbytes == 2 * alone.nbytes
        assert ema.tracks == ("slow", "power")
        move(model, layout, 99)
        for each in (ema, *twins):
            each.update()
        assert_same(bits(ema, "slow"), bits(twins[0], "ema"), "after the drop of another track")
        for each in (ema, alone, *twins):
            each.detach()


@pytest.mark.parametrize(("layout", "size"), LAYOUTS)
def test_an_added_track_is_bit_for_bit_an_average_that_was_built_then(layout: str, size: int, world: Any) -> None:
    if size == 1:
        added_track_is_an_average_built_then(layout)
    else:
        world(size).run(added_track_is_an_average_built_then, layout)


def runs_to_resume(layout: str, folder: str) -> None:
    """Saved with one track after 4 updates; and a run that adds a second one then, saved after 7."""
    model = model_of(layout)
    ema = ShardedEMA(model, {"fast": FAST}, interval=2)
    for step in range(7):
        if step == 4:
            ema.save(f"{folder}/one")
            ema.add_track("slow", SLOW)
            ema.add_track("copy", SLOW, start="fast")
        move(model, layout, step)
        ema.update()
    ema.save(f"{folder}/three")


def resumes_agree(layout: str, folder: str) -> None:
    """Resumed with new tracks, and resumed after they were added: the same bits."""
    schedules = {"fast": FAST, "slow": SLOW, "copy": SLOW}
    model = model_of(layout)
    early, late = (ShardedEMA(model, schedules, interval=2) for _ in range(2))
    for _ in range(2):  # the second load goes over averages in use
        early.load(f"{folder}/one", new_tracks={"slow": "live", "copy": "fast"})
        for step in range(4, 7):
            move(model, layout, step)
            early.update()
    late.load(f"{folder}/three")
    for step in range(7, 12):
        for track in schedules:
            assert_same(bits(early, track), bits(late, track), (track, step))
        move(model, layout, step)
        early.update()
        late.update()
    # Two tracks again, of which one has another name; what is there needs no argument.
    renamed = ShardedEMA(model, {"fast": FAST, "long": SLOW}, interval=2)
    for path in ("again", "renamed"):
        if path == "again":
            late.save(f"{folder}/again")
        else:
            renamed.save(f"{folder}/renamed")
        renamed.load(f"{folder}/{path}", renamed_tracks={"slow": "long"}, dropped_tracks=["copy"], new_tracks="live")
        move(model, layout, 20)
        renamed.update()
    late.update()
    late.update()
    assert_same(bits(late, "slow"), bits(renamed, "long"), "renamed")
    for each in (early, late, renamed):
        each.detach()


@pytest.mark.parametrize(
    ("written", "read"),
    [(("replicate", 2), ("fsdp2", 1)), (("fsdp2", 1), ("fsdp2", 2)), (("fsdp2", 2), ("replicate", 2))],
)
def test_a_track_of_a_resumed_run_is_that_of_a_run_that_had_it_from_then_on(
    written: tuple[str, int], read: tuple[str, int], world: Any, tmp_path: Path
) -> None:
    world(written[1]).run(runs_to_resume, written[0], str(tmp_path))
    world(read[1]).run(resumes_agree, read[0], str(tmp_path))


def skipped_first_update() -> None:
    """A fused optimizer that skips the step of a new track's first update: it begins at the next."""
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, {"fast": FAST})
    ema.update()
    ema.add_track("slow", SLOW)
    move(model, "plain", 1)
    ema.update(found_inf=torch.ones(1))
    assert ema.num_updates == 1
    move(model, "plain", 2)
    ema.update()
    for shard, value in values(ema, "slow"):
        assert torch.equal(value, shard.live())


def test_the_step_of_a_tracks_first_update_may_be_skipped() -> None:
    skipped_first_update()


def test_a_track_that_begins_at_another_one_takes_its_values_and_its_buffers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = ShardedEMA(model, {"fast": HALF})
    for step in range(3):
        move(model, "plain", step)
        ema.update()
    with ema.average_parameters(keep_buffers=True):
        model[1].running_mean.fill_(7.0)
    ema.add_track("other", CosineSchedule(total_steps=10), start="fast")
    assert_same(bits(ema, "other"), bits(ema, "fast"), "begun")
    assert ema.full_state_dict("other")["1.running_mean"].tolist() == [7.0, 7.0]
    before = bits(ema, "other")
    move(model, "plain", 9)
    ema.update()  # it is update number 1 of the track
    momentum = CosineSchedule(total_steps=10).momentum(1)
    assert ema.metrics()["ema/other/momentum"] == momentum
    for shard, value in values(ema, "other"):
        expected = before[shard.fqn + str(shard.offsets)].lerp(shard.live().detach(), momentum)
        assert torch.equal(value, expected)
    assert ema.full_state_dict("other")["1.running_mean"].tolist() != [7.0, 7.0]


def test_dicts_keep_the_counts_of_tracks() -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, {"fast": HALF})
    ema.update()
    ema.update()
    ema.add_track("slow", SLOW)
    ema.update()
    other = ShardedEMA(model, {"fast": HALF, "slow": SLOW})
    other.load_state_dict(ema.state_dict())
    assert other._state.beginnings.starts == {"slow": 2}
    for step in range(3):
        move(model, "plain", step)
        ema.update()
        other.update()
        assert_same(bits(ema, "slow"), bits(other, "slow"), step)
    ema.restart()
    assert ema._state.beginnings.starts == {}
    ema.update()
    assert ema._state.momentum("slow") == 1.0


def ranks_differ() -> None:
    import torch.distributed as dist

    model = build_layout("ddp")
    ema = ShardedEMA(model, {"fast": FAST})
    ema.update()
    with pytest.raises(RankMismatchError):
        ema.add_track("slow", FAST if dist.get_rank() else SLOW)
    assert ema.tracks == ("fast",)
    with pytest.raises(ConfigError, match="start is 'none'"):
        ema.add_track("slow", SLOW, start="none")
    ema.add_track("slow", SLOW)
    with pytest.raises(RankMismatchError):
        ema.drop_track("slow" if dist.get_rank() else "fast")
    assert ema.tracks == ("fast", "slow")


def test_ranks_that_add_or_drop_different_tracks_all_raise_and_change_nothing(world: Any) -> None:
    world(2).run(ranks_differ)


def saved(folder: Path, schedules: Any, model: nn.Module | None = None, **options: Any) -> str:
    ema = ShardedEMA(model or nn.Linear(2, 2), schedules, **options)
    ema.update()
    ema.update()
    ema.save(folder)
    return str(folder)


def test_other_tracks_raise_with_the_exact_call(tmp_path: Path) -> None:
    path = saved(tmp_path / "saved", {"fast": FAST})
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, {"slow": SLOW})
    with pytest.raises(CheckpointMismatchError) as raised:
        ema.load(path)
    assert 'load(path, new_tracks={"slow": "live"}, dropped_tracks=["fast"])' in str(raised.value)
    assert 'load(path, renamed_tracks={"fast": "slow"})' in str(raised.value)
    with pytest.raises(CheckpointMismatchError, match="begin at 'other'"):
        ema.load(path, new_tracks={"slow": "other"}, dropped_tracks=["fast"])
    for wrong in (
        {"new_tracks": {"unknown": "live"}},
        {"new_tracks": {"slow": 3}},
        {"new_tracks": ["slow"]},
        {"dropped_tracks": ["slow"]},
        {"dropped_tracks": 3},
        {"renamed_tracks": {"fast": "unknown"}},
        {"renamed_tracks": {"fast": "slow"}, "new_tracks": {"slow": "live"}},
        {"renamed_tracks": {"fast": "slow"}, "dropped_tracks": ["fast"]},
    ):
        with pytest.raises(ConfigError):
            ema.load(path, **wrong)  # type: ignore[arg-type]
    assert ema.num_updates == 0
    ema.load(path, new_tracks={"slow": "live"}, dropped_tracks="fast")
    assert ema.num_updates == 2
    assert ema._state.count_of("slow") == 0
    two = saved(tmp_path / "two", {"a": FAST, "b": FAST})
    for names, given, call in (
        (("a", "c"), {"new_tracks": "live"}, {"new_tracks": "live", "dropped_tracks": ["b"]}),
        (
            ("c", "d"),
            {"renamed_tracks": {"a": "c"}},
            {"new_tracks": {"d": "live"}, "dropped_tracks": ["b"], "renamed_tracks": {"a": "c"}},
        ),
    ):
        other = ShardedEMA(model, dict.fromkeys(names, FAST))
        with pytest.raises(CheckpointMismatchError) as raised:
            other.load(two, **given)  # type: ignore[arg-type]
        arguments = ", ".join(f"{name}={value!r}" for name, value in call.items()).replace("'", '"')
        assert f"load(path, {arguments})" in str(raised.value), "the call keeps what was given"
        other.load(two, **call)  # type: ignore[arg-type]
        assert other.num_updates == 2


def test_an_average_in_a_teacher_has_its_track_for_good(tmp_path: Path) -> None:
    path = saved(tmp_path / "saved", {"fast": FAST})
    teacher = nn.Linear(2, 2).requires_grad_(False)
    ema = ShardedEMA(nn.Linear(2, 2), {"slow": FAST}, into=teacher)
    with pytest.raises(ConfigError, match="teacher"):
        ema.add_track("fast", FAST)
    with pytest.raises(ConfigError):
        ema.drop_track("slow")
    with pytest.raises(ConfigError, match="teacher"):
        ema.load(path, new_tracks="live", dropped_tracks=["fast"])
    ema.load(path, renamed_tracks={"fast": "slow"})
    assert ema.num_updates == 2


def test_changed_options_raise_with_the_exact_call_and_resume_what_is_common(tmp_path: Path) -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))

    torch.manual_seed(0)
    path = saved(tmp_path / "saved", FAST, model(), include=["0.*", "1.*"])
    now = model()
    with torch.no_grad():
        now[2].weight.fill_(3.0)
    ema = ShardedEMA(now, FAST, include=["1.*", "2.*"], update_buffers=True, dtype=torch.float64)
    with pytest.raises(CheckpointMismatchError) as raised:
        ema.load(path)
    given = re.search(r"load\(path, new=(\[.*?\])\)", str(raised.value))
    assert given is not None
    assert {"0.*", "1.running_var", "2.*"} <= set(ast.literal_eval(given[1]))  # 1.num_batches_tracked is as it was
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ShardedEMA(now, FAST, include=["1.*", "2.*"], dtype=torch.float64).load(path, new=ast.literal_eval(given[1]))
    assert "load(path, options_changed=True)" in str(raised.value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ema.load(path, options_changed=True)
    assert any("include" in str(warning.message) for warning in caught)
    whole = ema.full_state_dict()
    assert whole["2.weight"].tolist() == [[3.0, 3.0], [3.0, 3.0]]  # it was not averaged: it starts from the live one
    assert ema.num_updates == 2
    with pytest.raises(CheckpointMismatchError, match="of another model"):
        ShardedEMA(nn.Linear(2, 2), FAST).load(path, options_changed=True)
    with pytest.raises(CheckpointMismatchError, match=r"as float32\[2, 2\]"):  # a shape is no option
        wider = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
        ShardedEMA(wider, FAST, include=["0.*", "1.*"]).load(path, options_changed=True)


def test_a_run_that_goes_from_one_track_to_two_and_back_keeps_the_users_files(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, {"fast": FAST})
    ema.update()
    path = tmp_path / "ema"
    ema.save(path)
    (path / "README.md").write_text("mine")
    ema.add_track("slow", SLOW)
    ema.update()
    ema.save(path)
    assert (path / "README.md").read_text() == "mine"
    assert not (path / "model.safetensors").exists()
    assert (path / "slow" / "model.safetensors").exists()
    assert json.loads((path / "manifest.json").read_text())["starts"] == {"slow": 1}
    ema.drop_track("slow")
    ema.save(path)
    assert (path / "README.md").read_text() == "mine"
    assert (path / "model.safetensors").exists()
    assert not (path / "slow").exists()
    ShardedEMA(model, {"fast": FAST}).load(path)


def test_attach_passes_the_changes_on_to_the_load_of_load_state(tmp_path: Path) -> None:
    with accelerator_of("plain") as accelerator:
        model = nn.Linear(2, 2)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(ConfigError, match="on_load"):
            attach(accelerator, model, optimizer, FAST, on_load={"unknown": 1})
        first = attach(accelerator, model, optimizer, {"fast": FAST})
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        accelerator.save_state(str(tmp_path))
        first.detach()
        second = attach(
            accelerator, model, optimizer, {"fast": FAST, "slow": SLOW}, on_load={"new_tracks": {"slow": "live"}}
        )
        accelerator.load_state(str(tmp_path))
        assert second.num_updates == 1
        assert second._state.beginnings.starts == {"slow": 1}
        second.detach()


def test_the_warning_of_a_standstill_counts_from_the_start_of_a_track() -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, {"fast": FAST})
    for _ in range(3):
        ema.update()
    ema.add_track("short", CosineSchedule(total_steps=2))
    told = []
    for _ in range(5):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ema.update()
        told.append(len(caught))
    assert told == [0, 0, 0, 1, 0]
