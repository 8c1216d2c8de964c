"""The momentum of BEMA's average (arXiv 2508.00180); its correction is in `dist_ema.live.correction`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dist_ema.checks import update_number
from dist_ema.errors import ConfigError
from dist_ema.schedules.base import fraction_between
from dist_ema.schedules.registry import registered

__all__ = ["BemaSchedule"]


@registered(example="BemaSchedule(kappa=0.5, rho=10.0)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BemaSchedule:
    """Momentum that falls as `m(k) = (rho + gamma * k)^-kappa`, down to `floor`.

    Source: BEMA (arXiv 2508.00180), and `BEMACallback` of trl, which takes k from the number of the optimizer step:
    docs/schedules/bema.md has what maps to what. With update number 0 made before the first step, k is that number.

    Args:
        kappa: how fast the momentum falls, from 0 (always 1: no average) to 1.
        rho: the age of the average when it begins, at least 0.
        gamma: how many steps an update counts for, at least 0.
        floor: the smallest momentum, from 0 to 1.
        update_after_step: the number of the update until which the live weights are copied.

    Raises:
        ConfigError: a value is out of its range, or the momentum of update number 1 would be above 1.
    """

    kappa: float = 0.5
    rho: float = 10.0
    gamma: float = 1.0
    floor: float = 0.0
    update_after_step: int = 0

    def __post_init__(self) -> None:
        for name, high in (("kappa", math.inf), ("rho", math.inf), ("gamma", math.inf), ("floor", 1.0)):
            object.__setattr__(self, name, fraction_between(name, getattr(self, name), 0.0, high, closed=True))
        number = update_number("update_after_step", self.update_after_step)
        object.__setattr__(self, "update_after_step", number)
        if self.rho + self.gamma < 1.0:
            raise ConfigError(
                f"rho is {self.rho:g} and gamma {self.gamma:g}, expected a sum of at least 1: the momentum of "
                "update number 1, (rho + gamma)^-kappa, is at most 1"
            )

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`."""
        if step <= self.update_after_step:
            return 1.0
        return max(float((self.rho + self.gamma * step) ** -self.kappa), self.floor)

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return dataclasses.asdict(self)
