"""Schedules made of schedules: a later start, a coarser rhythm, another batch size."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dist_ema.checks import positive_integer
from dist_ema.errors import ConfigError
from dist_ema.schedules.base import Schedule, fraction_between

__all__ = ["DEEPEST", "After", "Every", "ScaledBatch", "after", "every", "scaled_batch", "steps_of"]


# Schedules within each other. Whoever reads a record, or draws one, walks down as many levels.
DEEPEST = 20

# Of `every`: the momentum of one update is made of as many of the inner schedule.
_MOST_STEPS = 10**6


def after(step: int, schedule: Schedule) -> After:
    """`schedule` from update number `step` on, counted anew; until then the average is the live weights.

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
    """`schedule`, tuned at some batch size, for a batch `kappa` times as large.

    Raises:
        ConfigError: `kappa` is not above 0.
    """
    return ScaledBatch(kappa, schedule)


@dataclasses.dataclass(frozen=True)
class _Combined:
    schedule: Schedule

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule) or isinstance(self.schedule, type):
            raise ConfigError(
                f"schedule is {self.schedule!r}, expected a schedule such as ConstantSchedule(decay=0.999)"
            )
        depth, inner = 1, self.schedule
        while isinstance(inner, _Combined) and depth <= DEEPEST:
            depth, inner = depth + 1, inner.schedule
        if depth > DEEPEST:
            raise ConfigError(f"there are more than {DEEPEST} schedules within each other, expected at most that many")


@dataclasses.dataclass(frozen=True, init=False)
class After(_Combined):
    """See `after`. Update number `start_step` copies the live weights: it is update number 0 of the inner schedule."""

    start_step: int

    def __init__(self, start_step: int, schedule: Schedule) -> None:
        object.__setattr__(self, "start_step", positive_integer("start_step", start_step))
        object.__setattr__(self, "schedule", schedule)
        self.__post_init__()

    def __repr__(self) -> str:
        return f"after({self.start_step}, {self.schedule!r})"

    def momentum(self, step: int) -> float:
        """Weight of the live values in update number `step`."""
        return 1.0 if step <= self.start_step else self.schedule.momentum(step - self.start_step)

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {"start_step": self.start_step}


@dataclasses.dataclass(frozen=True, init=False)
class Every(_Combined):
    """See `every`: `1 - m = (1 - m(k - n + 1)) ... (1 - m(k))` where n divides k, else 0.

    For a constant decay rho it is rho^n (the linear-time correction): 0.9999 applied every 10 steps without it would
    have a half-life of 69 thousand steps, not 6.9.
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
        """Weight of the live values in update number `step`."""
        if step % self.num_steps:
            return 0.0
        momenta = [self.schedule.momentum(each) for each in range(max(step - self.num_steps + 1, 0), step + 1)]
        if max(momenta) >= 1.0:
            return 1.0
        return -math.expm1(sum(math.log1p(-momentum) for momentum in momenta))

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {"num_steps": self.num_steps}


@dataclasses.dataclass(frozen=True, init=False)
class ScaledBatch(_Combined):
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
        """Weight of the live values in update number `step`."""
        momentum = self.schedule.momentum(step)
        return 1.0 if momentum >= 1.0 else -math.expm1(self.kappa * math.log1p(-momentum))

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {"kappa": self.kappa}


def steps_of(schedule: Schedule) -> int | None:
    """Number of updates until the `total_steps` of a schedule, or of the one that it is made of, are over.

    Of `every(n, ...)` until the last update that its inner schedule moves. None where there are no `total_steps`.
    """
    if isinstance(schedule, _Combined):
        steps = steps_of(schedule.schedule)
        if steps is None:
            return None
        if isinstance(schedule, After):
            return schedule.start_step + steps
        if isinstance(schedule, Every):
            # The update that takes in the inner update number steps - 1, the last one that moves.
            return -(-(steps - 1) // schedule.num_steps) * schedule.num_steps + 1
        return steps
    total_steps = getattr(schedule, "total_steps", None)
    return total_steps if type(total_steps) is int else None
