"""Infinities that are meant, of a mask say, stay what they are, however they are averaged."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import NaiveAverage
from torch import nn

from dist_ema import ConstantSchedule, ShardedEMA

pytestmark = pytest.mark.filterwarnings("ignore:momentum=", "ignore:only your code")
INF = float("inf")
MASK = torch.tensor([[0.0, -INF, -INF], [1.0, 0.0, -INF], [INF, 2.0, 0.0]])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compensated": {"compensated": True},
    "float64": {"dtype": torch.float64},
    "skip_nonfinite": {"skip_nonfinite": True},
    "skip_nonfinite, compensated": {"skip_nonfinite": True, "compensated": True},
}


@dataclasses.dataclass(frozen=True)
class Copies:
    """The whole new value each time."""

    def momentum(self, step: int) -> float:
        return 1.0


def schedule_of(momentum: float) -> Any:
    return Copies() if momentum == 1.0 else ConstantSchedule(momentum=momentum)


class Masked(nn.Module):
    """A frozen mask, one in a buffer, one that takes a gradient and never moves, and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.frozen = nn.Parameter(MASK.clone(), requires_grad=False)
        self.register_buffer("shown", MASK.clone())
        self.other = nn.Parameter(torch.randn(30))
        self.base = nn.Parameter(torch.randn(7), requires_grad=False)


def followed(model: Masked, ema: ShardedEMA, naive: NaiveAverage, steps: int, flag: torch.Tensor | None = None) -> None:
    for _ in range(steps):
        for parameter in (model.weight, model.other):
            nn.init.normal_(parameter)
        ema.update(found_inf=flag)
        naive.update({"weight": model.weight, "other": model.other, "base": model.base})


def assert_right(ema: ShardedEMA, naive: NaiveAverage, mask: torch.Tensor, track: str = "a") -> None:
    found = ema.full_state_dict(track)
    assert torch.equal(found["frozen"], mask.to(found["frozen"].dtype)), found["frozen"]
    assert torch.equal(found["shown"], mask.to(found["shown"].dtype)), found["shown"]
    for name, value in naive.values.items():
        torch.testing.assert_close(found[name], value.to(found[name].dtype))


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.25, 0.75, 1.0])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_mask_stays_a_mask(options: str, momentum: float, live: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Masked().to(live)
    schedules = {"a": schedule_of(momentum), "b": ConstantSchedule(momentum=0.125)}
    chosen = OPTIONS[options]
    naive = NaiveAverage(schedules["a"].momentum, dtype=chosen.get("dtype", torch.float32))
    ema = ShardedEMA(model, schedules, update_buffers=True, **chosen)
    followed(model, ema, naive, 4)
    assert_right(ema, naive, MASK)
    followed(model, ema, naive, 2, torch.zeros(1))
    assert_right(ema, naive, MASK)
    assert ema.num_refused() == 0
    ema.save(tmp_path / "ema")
    again = ShardedEMA(model, schedules, update_buffers=True, **chosen)
    again.load(tmp_path / "ema")
    followed(model, again, naive, 3)
    assert_right(again, naive, MASK)
    with again.average_parameters("b"):
        assert torch.equal(model.frozen, MASK.to(live)) and torch.equal(model.shown, MASK.to(live))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_mask_that_changes_is_followed(options: str) -> None:
    """To minus infinity, which a momentum above one half cannot reach by a lerp, and back to a number."""
    for momentum in (0.25, 0.75):
        model = Masked()
        naive = NaiveAverage(ConstantSchedule(momentum=momentum).momentum)
        ema = ShardedEMA(model, ConstantSchedule(momentum=momentum), update_buffers=True, **OPTIONS[options])
        followed(model, ema, naive, 3)
        changed = MASK.clone()
        changed[0, 0], changed[0, 1] = -INF, 3.0
        with torch.no_grad():
            model.frozen.copy_(changed)
            model.shown.copy_(changed)
        for _ in range(5):
            followed(model, ema, naive, 1)
            assert_right(ema, naive, changed, "ema")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("momentum", [0.25, 0.75])
def test_a_mask_written_to_behind_the_back_of_torch_is_right_when_it_is_used(options: str, momentum: float) -> None:
    """`.data` has a version of its own, so the change is not seen."""
    model = Masked()
    naive = NaiveAverage(ConstantSchedule(momentum=momentum).momentum)
    ema = ShardedEMA(model, ConstantSchedule(momentum=momentum), update_buffers=True, **OPTIONS[options])
    model.frozen.data.fill_(0.0)
    model.shown.fill_(0.0)
    followed(model, ema, naive, 3)
    model.frozen.data.copy_(torch.where(MASK == INF, 0.0, MASK).clamp(max=0.0))
    model.shown.copy_(model.frozen)
    followed(model, ema, naive, 4)
    found = ema.full_state_dict()
    assert torch.equal(found["frozen"], model.frozen) and torch.equal(found["shown"], model.shown)


def test_a_buffer_assigned_anew_at_each_step_is_followed() -> None:
    model = Masked()
    naive = NaiveAverage(ConstantSchedule(momentum=0.25).momentum)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.25), update_buffers=True)
    model.shown = torch.zeros(3, 3)
    model.frozen.data.zero_()
    followed(model, ema, naive, 2)
    mask = torch.where(MASK < 0, -INF, 0.0)
    with torch.no_grad():
        model.frozen.copy_(mask)
    for _ in range(4):
        model.shown = mask.clone()
        followed(model, ema, naive, 1)
        assert_right(ema, naive, mask, "ema")


def test_what_takes_no_gradient_is_not_averaged_with_care_for_longer_than_it_must_be() -> None:
    """Ordinary tensors pay for no second pass."""
    model = Masked()
    naive = NaiveAverage(ConstantSchedule(momentum=0.25).momentum)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.25), update_buffers=True)
    names = [shard.fqn for shard in ema.shards]

    def watched() -> set[str]:
        return {names[index] for index in ema._state._updater._prepared.watched}  # type: ignore[union-attr]

    followed(model, ema, naive, 2)
    assert watched() == {"frozen", "shown"}
    with torch.no_grad():
        model.base.add_(1.0)
    followed(model, ema, naive, 1)
    assert watched() == {"frozen", "shown", "base"}
    followed(model, ema, naive, 3)
    assert watched() == {"frozen", "shown"}
    model.base.requires_grad_(True)
    for _ in range(3):
        with torch.no_grad():
            model.base.add_(1.0)
        followed(model, ema, naive, 1)
        assert watched() == {"frozen", "shown"}
    assert_right(ema, naive, MASK, "ema")


def test_a_trained_mask_that_never_moves_stays_and_with_skip_nonfinite_is_left_out() -> None:
    for skip in (False, True):
        model = nn.ParameterDict({"weight": nn.Parameter(MASK.clone())})
        ema = ShardedEMA(model, ConstantSchedule(momentum=0.25), skip_nonfinite=skip)
        for _ in range(4):
            ema.update()
        found = ema.full_state_dict()["weight"]
        assert torch.equal(found, MASK.nan_to_num(0, 0, 0) if skip else MASK)
        assert ema.num_refused() == (16 if skip else 0)


def test_an_overflow_in_a_buffer_is_left_out_and_a_mask_is_not() -> None:
    model = nn.BatchNorm1d(3, affine=True)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.25), update_buffers=True, skip_nonfinite=True)
    ema.update()
    model.running_var[0], model.running_mean[1] = INF, -INF  # type: ignore[index]
    ema.update()
    found = ema.full_state_dict()
    assert found["running_var"].isfinite().all() and found["running_mean"][1] == -INF
    assert ema.num_refused() == 1


def test_a_teacher_keeps_the_masks() -> None:
    torch.manual_seed(0)
    model, teacher = Masked(), Masked().requires_grad_(False)
    naive = NaiveAverage(ConstantSchedule(momentum=0.25).momentum)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.25), into=teacher)
    followed(model, ema, naive, 4)
    assert torch.equal(teacher.frozen, MASK) and torch.equal(teacher.shown, MASK)
    assert torch.equal(teacher.weight, naive.values["weight"])


def test_several_threads_keep_the_masks() -> None:
    torch.set_num_threads(3)
    try:
        model = nn.ParameterDict({"weight": nn.Parameter(torch.randn(1200, 1000))})
        mask = torch.randn(700, 700).masked_fill(torch.ones(700, 700).triu(1).bool(), -INF)
        model["mask"] = nn.Parameter(mask, requires_grad=False)
        ema = ShardedEMA(model, ConstantSchedule(momentum=0.25))
        for _ in range(4):
            ema.update()
        assert ema._state._updater._prepared._workers == 3  # type: ignore[union-attr]
        assert torch.equal(ema.full_state_dict()["mask"], mask)
    finally:
        torch.set_num_threads(1)
