"""The same average made twice, by the package and by the naive twin, and the comparison of the two bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from oracle import NaiveAverage
from torch import nn

from dist_ema import CosineSchedule, ShardedEMA

MOMENTUM, STEPS = 0.3, 6


def oracle(**options: Any) -> NaiveAverage:
    schedule = CosineSchedule(MOMENTUM, 0.01, total_steps=STEPS)
    return NaiveAverage(schedule.momentum, **options)


def averaging(model: nn.Module, **options: Any) -> ShardedEMA:
    return ShardedEMA(model, CosineSchedule(MOMENTUM, 0.01, total_steps=STEPS), **options)


def assert_same_bits(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name], value), f"{name}: {(state[name] != value).sum()} elements differ"
