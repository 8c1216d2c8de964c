"""Merging in place of a learning-rate decay: the weights of the values are those of the decay's curve."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from dist_ema import (
    BemaSchedule,
    ConfigError,
    EqualSchedule,
    LinearSchedule,
    MergeSchedule,
    PowerSchedule,
    ShardedEMA,
    after,
    chain,
    every,
)
from dist_ema.schedules.coefficients import merge_coefficients
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
    for curve in (shape, CURVES[shape]):
        assert merge_coefficients(curve, n) == pytest.approx(expected, rel=0, abs=1e-12), "offline merges have the same"
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


def test_a_merge_whose_values_an_interval_leaves_out_is_told_with_the_way() -> None:
    merge, net = MergeSchedule("linear", num_steps=100), nn.Linear(1, 1, bias=False)

    def run(schedule, **options) -> float:
        ema = ShardedEMA(net, schedule, **options)
        for step in range(100):
            nn.init.constant_(net.weight, float(step < 10))
            ema.update()
        return float(ema.full_state_dict()["weight"])

    with pytest.warns(UserWarning, match=r"every\(10, MergeSchedule"):
        sampled = run(merge, interval=10)
    assert sampled > 0.5, "the first of ten values has more than half of the weight"
    # Value 1 stands for itself alone, and the nine later ones for ten each; the last nine updates have no value.
    assert run(every(10, merge), interval=10) == run(every(10, merge)) == pytest.approx(1 / 91, rel=1e-6)
    assert run(merge) == pytest.approx(0.1, rel=1e-6)
    ema = ShardedEMA(net, EqualSchedule(), interval=2)
    with pytest.warns(UserWarning, match="interval=2 leaves most"):
        ema.add_track("late", after(5, merge))


def test_numbers_of_numpy_are_numbers_of_updates() -> None:
    merge = MergeSchedule("linear", num_steps=np.int64(3), start_step=np.int64(2))
    assert merge == MergeSchedule("linear", num_steps=3, start_step=2) and type(merge.start_step) is int
    chained = chain((np.int64(0), EqualSchedule()), (np.int64(5), merge))
    assert schedule_to_json(chained)["starts"] == [0, 5]
    assert BemaSchedule(update_after_step=np.int64(4)) == BemaSchedule(update_after_step=4)
    for wrong in (True, 2.0, -1, 2**62):
        with pytest.raises(ConfigError, match="start_step"):
            MergeSchedule("linear", num_steps=3, start_step=wrong)


def test_a_linear_schedule_ends_at_its_end_to_the_bit() -> None:
    assert LinearSchedule(0.5, 0.1, total_steps=3).momentum(3) == 0.1
