"""Schedules made of schedules: a later start, a coarser rhythm, another batch size."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dist_ema.checks import positive_integer
from dist_ema.errors import ConfigError
from dist_ema.schedules.base import Schedule, fraction_between
from dist_ema.schedules.nesting import Combined
from dist_ema.schedules.registry import registered

__all__ = ["after", "every", "scaled_batch"]


# The largest `steps` of `every`, which computes the momentum of one update from as many of the inner schedule.
_MOST_STEPS = 10**6


def after(step: int, schedule: Schedule) -> After:
    """`schedule` begins at update number `step`, where its count begins; until then the average is the live weights.

    Raises:
        ConfigError: `step` is not an integer of at least 1.
    """
    return After(step, schedule)


def every(steps: int, schedule: Schedule) -> Every:
    """One update in `steps`, which forgets as much as all of them would have.

    Raises:
        ConfigError: `steps` is not an integer from 1 to 1,000,000.
    """
    return Every(steps, schedule)


def scaled_batch(kappa: float, schedule: Schedule) -> ScaledBatch:
    """`schedule` was tuned at some batch size, and is used for a batch `kappa` times as large.

    Raises:
        ConfigError: `kappa` is not above 0.
    """
    return ScaledBatch(kappa, schedule)


@registered(example="after(100, EqualSchedule())", call=after)
@dataclasses.dataclass(frozen=True, init=False)
class After(Combined):
    """See `after`. Update number `start_step` copies the live weights: it is update number 0 of the inner schedule."""

    start_step: int

    def __init__(self, start_step: int, schedule: Schedule) -> None:
        object.__setattr__(self, "start_step", positive_integer("start_step", start_step))
        object.__setattr__(self, "schedule", schedule)
        self.__post_init__()

    def __repr__(self) -> str:
        return f"after({self.start_step}, {self.schedule!r})"

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`."""
        return 1.0 if step <= self.start_step else self.schedule.momentum(step - self.start_step)

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {"start_step": self.start_step}

    def steps_around(self, inner_steps: int) -> int:
        """The number of updates until so many updates of the inner schedule are over."""
        return self.start_step + inner_steps


@registered(example="every(10, ConstantSchedule(decay=0.999))", call=every)
@dataclasses.dataclass(frozen=True, init=False)
class Every(Combined):
    """See `every`: `1 - m = (1 - m(k - n + 1)) ... (1 - m(k))` where n divides k, else 0.

    For a constant decay rho the new decay is rho^n (the linear-time correction). Without it a decay of 0.9999, applied
    every 10 steps, would have a half-life of 69 thousand steps, not 6.9 thousand.
    """

    num_steps: int

    def __init__(self, num_steps: int, schedule: Schedule) -> None:
        object.__setattr__(self, "num_steps", positive_integer("num_steps", num_steps))
        if self.num_steps > _MOST_STEPS:
            raise ConfigError(f"num_steps is {self.num_steps}, expected at most {_MOST_STEPS:,}")
        object.__setattr__(self, "schedule", schedule)
        self.__post_init__()

    def __repr__(self) -> str:
        return f"every({self.num_steps}, {self.schedule!r})"

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`."""
        if step % self.num_steps:
            return 0.0
        momenta = [self.schedule.momentum(inner) for inner in range(max(step - self.num_steps + 1, 0), step + 1)]
        if max(momenta) >= 1.0:
            return 1.0
        return -math.expm1(sum(math.log1p(-momentum) for momentum in momenta))

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {"num_steps": self.num_steps}

    def steps_around(self, inner_steps: int) -> int:
        """The number of updates up to the one that takes in inner update number `inner_steps - 1`, the last to move."""
        return -(-(inner_steps - 1) // self.num_steps) * self.num_steps + 1


@registered(example="scaled_batch(8, ConstantSchedule(decay=0.999))", call=scaled_batch)
@dataclasses.dataclass(frozen=True, init=False)
class ScaledBatch(Combined):
    """See `scaled_batch`: decay rho becomes rho^kappa (Busbridge et al., arXiv 2307.13813, definition 1.2).

    The optimizer's own scaling rule must be applied too. The inner schedule counts the updates of the new batch size.
    """

    kappa: float

    def __init__(self, kappa: float, schedule: Schedule) -> None:
        object.__setattr__(self, "kappa", fraction_between("kappa", kappa, 0.0, math.inf))
        object.__setattr__(self, "schedule", schedule)
        self.__post_init__()

    def __repr__(self) -> str:
        return f"scaled_batch({self.kappa!r}, {self.schedule!r})"

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`."""
        momentum = self.schedule.momentum(step)
        return 1.0 if momentum >= 1.0 else -math.expm1(self.kappa * math.log1p(-momentum))

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {"kappa": self.kappa}
