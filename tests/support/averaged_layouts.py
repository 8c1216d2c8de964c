"""Models of every layout whose averages have moved."""

from __future__ import annotations

from layouts_zoo import build_layout, set_whole
from torch import nn

from dist_ema import ConstantSchedule, ShardedEMA

SCHEDULE = ConstantSchedule(momentum=0.25)


def averaged(layout: str) -> tuple[nn.Module, ShardedEMA]:
    """A model, and its average after three updates of other values."""
    model = build_layout(layout)
    ema = ShardedEMA(model, SCHEDULE)
    for step in range(3):
        set_whole(model, step)
        ema.update()
    return model, ema
