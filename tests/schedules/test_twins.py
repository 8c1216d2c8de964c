"""Schedules that no installed tool has: compared with naive twins, written from what their papers say.

All others are compared with the momentum observed in the tool that they come from (tests/golden/schedules.json);
test_registry.py sees that every schedule is compared in one of the two ways.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dist_ema import (
    ConfigError,
    ConstantSchedule,
    CosineSchedule,
    HalfLifeSchedule,
    LinearSchedule,
    PowerSchedule,
    ShardedEMA,
    after,
    per_batch,
    scaled_batch,
)

STEPS = [0, 1, 2, 3, 7, 50, 999, 31_622, 10**6]


def half_life_in_images(fraction: float, longest_steps: float | None) -> Callable[[int], float]:
    """EDM's training loop (arXiv 2206.00364), which counts images: a ramp of the half-life, up to the longest one."""
    batch_images = 64

    def decay(step: int) -> float:
        seen_images = (step + 1) * batch_images  # EDM2 counts the batch of this step, EDM does not
        half_life_images = seen_images * fraction
        if longest_steps is not None:
            half_life_images = min(half_life_images, longest_steps * batch_images)
        return 0.5 ** (batch_images / max(half_life_images, 1e-8))

    return decay


@pytest.mark.parametrize("longest_steps", [None, 30, 5000.5])
@pytest.mark.parametrize("fraction", [0.05, 0.09, 0.5])
def test_a_half_life_is_that_of_the_ramp_in_images(fraction, longest_steps) -> None:
    schedule = HalfLifeSchedule(fraction=fraction, max_half_life_steps=longest_steps)
    decay = half_life_in_images(fraction, longest_steps)
    for step in STEPS:
        momentum = schedule.momentum(step)
        assert momentum == pytest.approx(1 - decay(step), rel=0, abs=1e-12), step
        # What a half-life is: so many updates of this momentum leave one half of what was there.
        steps = fraction * (step + 1) if longest_steps is None else min(fraction * (step + 1), longest_steps)
        assert (1 - momentum) ** steps == pytest.approx(0.5, rel=1e-9), step


def test_a_line_is_the_list_of_decays_of_v_jepa() -> None:
    """V-JEPA's training loop (arXiv 2404.08471): a decay for each of N steps, ema[0] + i * (ema[1] - ema[0]) / N."""
    first, last, num_steps = 0.998, 1.0, 1000
    decays = [first + i * (last - first) / num_steps for i in range(num_steps + 1)]
    schedule = LinearSchedule(1 - first, 1 - last, total_steps=num_steps)
    for step, decay in enumerate(decays):
        assert schedule.momentum(step) == pytest.approx(1 - decay, rel=0, abs=1e-15), step
    assert schedule.momentum(10**6) == 0.0


@pytest.mark.parametrize("kappa", [1, 2, 8])
@pytest.mark.parametrize(
    "inner", [ConstantSchedule(decay=0.9995), CosineSchedule(0.3, 0.02, total_steps=1000), PowerSchedule(gamma=6.94)]
)
def test_a_scaled_batch_moves_as_far_as_the_small_batches_it_is_made_of(kappa, inner) -> None:
    """Definition 1.2 of arXiv 2307.13813: kappa updates towards one live value, at the momentum of this step."""
    schedule = scaled_batch(kappa, inner)
    for step in STEPS:
        averaged, live, momentum = 0.0, 1.0, inner.momentum(step)
        for _ in range(kappa):
            averaged = (1 - momentum) * averaged + momentum * live
        assert schedule.momentum(step) == pytest.approx(averaged, rel=0, abs=1e-12), step


def test_batches_of_several_sizes_move_the_average_as_far_as_their_samples_would() -> None:
    """Each sample of a batch of the reference size 4 keeps the fourth root of the decay."""
    sizes, decay = [4, 8, 2, 6, 4, 1], 0.9
    live = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    ema = ShardedEMA(live, per_batch(4, ConstantSchedule(decay=decay)), dtype=torch.float64)
    expected = 0.0
    for step, size in enumerate(sizes):
        with torch.no_grad():
            live.weight.fill_(float(step))
        ema.update(batch_size=size)
        for _ in range(size if step else 0):
            expected += (1 - decay ** (1 / 4)) * (step - expected)
        assert ema.full_state_dict()["weight"].item() == pytest.approx(expected, rel=0, abs=1e-14), step
    ema.expect_batch_size(12)  # what a hook uses, which calls update without it
    ema.update()
    assert ema.metrics()["ema/momentum"] == pytest.approx(1 - decay**3, rel=1e-12)


def test_a_batch_size_that_was_not_given_is_refused_and_nothing_moves() -> None:
    live = nn.Linear(1, 1, bias=False)
    ema = ShardedEMA(live, per_batch(4, ConstantSchedule(decay=0.9)))
    ema.update()
    with pytest.raises(ConfigError, match=r"wants the batch size of every update"):
        ema.update()
    with pytest.raises(ConfigError, match="batch_size is -1"):
        ema.update(batch_size=-1)
    assert ema.num_updates == 1
    with pytest.raises(ConfigError, match="expected per_batch as the outermost"):
        after(5, per_batch(4, ConstantSchedule(decay=0.9)))
