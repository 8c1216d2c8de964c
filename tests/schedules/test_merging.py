"""Merging in place of a learning-rate decay: the weights of the values are those of the decay's curve."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dist_ema import ConfigError, EqualSchedule, MergeSchedule, PowerSchedule, ShardedEMA, after
from dist_ema.schedules.records import is_known, schedule_to_json

CURVES = {
    "linear": lambda s: 1 - s,
    "1-sqrt": lambda s: 1 - math.sqrt(s),
    "cosine": lambda s: (1 + math.cos(math.pi * s)) / 2,
}


def coefficients(curve, n: int) -> list[float]:
    """As `schedule_to_merge_coefficients` of Megatron-LM (tools/checkpoint/weighted_merge.py) has them, oldest first.

    The last is what is left of the curve, and the first is what is left of 1.
    """
    heights = [curve(k / n) for k in range(n)]
    inner = [heights[k] - heights[k + 1] for k in range(1, n - 1)]
    return [1 - sum(inner) - heights[-1], *inner, heights[-1]] if n > 1 else [1.0]


def weights(schedule, start_step: int, num_steps: int) -> list[float]:
    """The weight of every value in the average after the last of them, by its momenta."""
    kept = [1.0]
    for step in range(start_step + 1, start_step + num_steps):
        momentum = schedule.momentum(step)
        kept = [weight * (1 - momentum) for weight in kept] + [momentum]
    return kept


@pytest.mark.parametrize("n", [1, 2, 4, 10, 50, 1000])
@pytest.mark.parametrize("shape", CURVES)
def test_the_weights_are_the_published_coefficients(shape, n) -> None:
    """Megatron-LM has "linear" and "minus-sqrt"; the cosine follows the same rule."""
    schedule = MergeSchedule(shape, num_steps=n, start_step=7)
    expected = coefficients(CURVES[shape], n)
    assert weights(schedule, 7, n) == pytest.approx(expected, rel=0, abs=1e-12)
    own = MergeSchedule(CURVES[shape], num_steps=n, start_step=7)
    assert weights(own, 7, n) == pytest.approx(expected, rel=0, abs=1e-12)
    for merge in (schedule, own):
        assert [merge.momentum(step) for step in (0, 6, 7)] == [1.0] * 3, "the average is live before value 1"
        assert [merge.momentum(step) for step in (7 + n, 8 + n, 10**9)] == [0.0] * 3, "it stands still after value n"


def test_three_names_of_one_merge_have_the_same_momenta_to_the_bit() -> None:
    steps = range(300)
    for shape, inner in (("linear", EqualSchedule()), ("1-sqrt", PowerSchedule(gamma=-0.5))):
        merge, same = MergeSchedule(shape, num_steps=290, start_step=10), after(10, inner)
        assert [merge.momentum(step) for step in steps] == [same.momentum(step) for step in steps]


def test_a_merge_in_a_run_is_the_weighted_sum_of_its_values() -> None:
    torch.manual_seed(0)
    values = torch.randn(30, 5, dtype=torch.float64)
    tracks = {name: MergeSchedule(name, num_steps=12, start_step=10) for name in CURVES}
    live = nn.Linear(5, 1, bias=False).double()
    ema = ShardedEMA(live, tracks, dtype=torch.float64)
    for value in values:
        with torch.no_grad():
            live.weight.copy_(value)
        ema.update()
    for name, curve in CURVES.items():
        expected = torch.tensor(coefficients(curve, 12), dtype=torch.float64) @ values[10:22]
        torch.testing.assert_close(ema.full_state_dict(name)["weight"][0], expected, rtol=0, atol=1e-13)


def test_a_curve_that_gives_a_value_less_than_nothing_is_refused_before_the_run() -> None:
    def bump(s: float) -> float:
        return 1 - s if s < 0.5 else 1.1 * (1 - s)

    for curve, text in ((bump, "negative weight"), (lambda s: 0.5 - s / 2, "at s=0"), (lambda s: 1 - s / 2, "at s=1")):
        with pytest.raises(ConfigError, match=text):
            MergeSchedule(curve, num_steps=100)
    with pytest.raises(ConfigError, match="w\\(0/4\\)"):
        MergeSchedule(lambda s: None, num_steps=4)


def test_a_curve_of_the_user_is_known_as_one_that_no_file_rebuilds() -> None:
    own = MergeSchedule(CURVES["linear"], num_steps=4)
    assert not is_known(own) and not is_known(after(3, own)) and is_known(MergeSchedule("linear", num_steps=4))
    assert schedule_to_json(own)["repr"] == repr(own) and "0x" not in repr(own)
    with pytest.warns(UserWarning, match="only your code can rebuild the schedule"):
        ShardedEMA(nn.Linear(1, 1), own)


def test_a_curve_flat_at_first_begins_when_it_falls() -> None:
    flat = MergeSchedule(lambda s: min(1.0, 2 - 2 * s), num_steps=4)
    assert weights(flat, 0, 4) == pytest.approx([0, 0, 0.5, 0.5], abs=1e-15)


def test_a_plain_function_is_a_schedule_that_no_file_rebuilds() -> None:
    live = nn.Linear(1, 1, bias=False)
    with pytest.warns(UserWarning, match=r"only your code can rebuild the schedule \S*test_merging\.halving:"):
        ema = ShardedEMA(live, {"own": halving, "linear": EqualSchedule()})
    for step in range(3):
        with torch.no_grad():
            live.weight.fill_(float(step))
        ema.update()
    assert ema.full_state_dict("own")["weight"].item() == 0.75 * 0.5 + 0.25 * 2  # 0 -> 0.5 -> 0.875
    with pytest.warns(UserWarning, match="lambda"):
        wrong = ShardedEMA(live, lambda step: 2.0)
    wrong.update()
    with pytest.raises(ConfigError, match="gave momentum 2"):
        wrong.update()


def halving(step: int) -> float:
    return 0.5**step
