"""The smallest average there is, for tests of what lies around it."""

from __future__ import annotations

from torch import nn

from dist_ema import ConstantSchedule, ShardedEMA

HALF = ConstantSchedule(momentum=0.5)


def averaged_once(model: nn.Module | None = None) -> ShardedEMA:
    """The average of `model`, or of one small layer, after one update."""
    ema = ShardedEMA(model if model is not None else nn.Linear(2, 2), HALF)
    ema.update()
    return ema
