from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from oracle import cosine_momentum
from torch import nn

from dist_ema import ConfigError, ConstantSchedule, CosineSchedule, ShardedEMA
from dist_ema.schedules import schedule_from_json, schedule_to_json

GOLDEN = json.loads((Path(__file__).parent / "golden" / "cosine_ema.json").read_text())


def test_cosine_begins_at_momentum_and_ends_at_end_momentum() -> None:
    schedule = CosineSchedule(0.3, 0.02, total_steps=11)
    assert schedule.momentum(0) == pytest.approx(0.3, abs=1e-15)
    assert schedule.momentum(11) == pytest.approx(0.02, abs=1e-15)
    for step in range(12):
        expected = cosine_momentum(step, start=0.3, end=0.02, total_steps=11)
        assert schedule.momentum(step) == pytest.approx(expected, abs=1e-15)


def test_cosine_does_not_rise_again_beyond_total_steps() -> None:
    schedule = CosineSchedule(0.004, total_steps=10)
    assert schedule.momentum(12) == schedule.momentum(20) == schedule.momentum(10) == 0.0


def test_sign_of_the_published_formula_is_not_copied() -> None:
    assert CosineSchedule(0.004, 0.0, total_steps=10).momentum(0) == 0.004


def test_decay_is_one_minus_momentum() -> None:
    assert ConstantSchedule(decay=0.75) == ConstantSchedule(momentum=0.25)
    assert ConstantSchedule(decay=0.999).momentum(7) == pytest.approx(0.001)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CosineSchedule(0.0, total_steps=10),
        lambda: CosineSchedule(1.0, total_steps=10),
        lambda: CosineSchedule(math.nan, total_steps=10),
        lambda: CosineSchedule("0.1", total_steps=10),
        lambda: CosineSchedule(0.1, -0.1, total_steps=10),
        lambda: CosineSchedule(0.1, 1.1, total_steps=10),
        lambda: CosineSchedule(0.1, total_steps=0),
        lambda: CosineSchedule(0.1, total_steps=2.5),
        lambda: CosineSchedule(0.1, total_steps=True),
        lambda: ConstantSchedule(),
        lambda: ConstantSchedule(decay=0.9, momentum=0.1),
        lambda: ConstantSchedule(decay=1.0),
        lambda: ConstantSchedule(momentum=0.0),
    ],
)
def test_values_out_of_range_are_refused(make) -> None:
    with pytest.raises(ConfigError):
        make()


def test_a_momentum_that_looks_like_a_decay_warns() -> None:
    with pytest.warns(UserWarning, match=r"did you mean momentum=0\.001") as caught:
        ConstantSchedule(momentum=0.999)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"did you mean decay=0\.999"):
        ConstantSchedule(decay=0.001)
    with pytest.warns(UserWarning, match=r"did you mean momentum=0\.004"):
        CosineSchedule(0.996, total_steps=10)


@pytest.mark.parametrize("schedule", [CosineSchedule(0.1, 0.01, total_steps=5), ConstantSchedule(decay=0.9)])
def test_schedules_survive_json(schedule) -> None:
    assert schedule_from_json(json.loads(json.dumps(schedule_to_json(schedule)))) == schedule


def test_schedules_are_frozen_and_hashable() -> None:
    schedule = CosineSchedule(total_steps=5)
    with pytest.raises(AttributeError):
        schedule.total_steps = 6
    assert hash(schedule) == hash(CosineSchedule(total_steps=5))
    assert eval(repr(schedule)) == schedule


def test_unknown_schedule_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="rebuilt"):
        schedule_from_json({"type": "os.system"})


class _Golden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.register_buffer("running", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"interval{case['interval']}-buffers{case['update_buffers']}")
def test_golden_trajectories_of_the_reference(case) -> None:
    model = _Golden()
    ema = ShardedEMA(
        model,
        CosineSchedule(case["momentum"], case["end_momentum"], total_steps=case["total_steps"]),
        interval=case["interval"],
        update_buffers=case["update_buffers"],
        dtype=torch.float64,
    )
    for live, averaged in zip(case["source"], case["averaged"], strict=True):
        with torch.no_grad():
            model.w.copy_(torch.tensor(live["w"], dtype=torch.float64))
            model.running.copy_(torch.tensor(live["running"], dtype=torch.float64))
            model.count.fill_(live["count"])
        ema.update()
        state = ema.full_state_dict()
        for name in ("w", "running"):
            expected = torch.tensor(averaged[name], dtype=torch.float64)
            torch.testing.assert_close(state[name], expected, rtol=0, atol=1e-7)
        # The reference freezes integer buffers after the first call when it averages buffers (its bug); ours follow.
        assert state["count"].item() == live["count"]
