"""Schedules within each other: the base of all combinators."""

from __future__ import annotations

import dataclasses

from dist_ema.errors import ConfigError
from dist_ema.schedules.base import Schedule

__all__ = ["DEEPEST", "Combined", "check_inner", "horizon_of", "inner_of", "steps_of"]

# The largest number of schedules within each other. A reader of a record walks down as many levels.
DEEPEST = 20


@dataclasses.dataclass(frozen=True)
class Combined:
    """A schedule that is made of another one."""

    schedule: Schedule

    def __post_init__(self) -> None:
        check_inner(self.schedule)

    def steps_around(self, inner_steps: int) -> int:
        """The number of updates until so many updates of the inner schedule are over."""
        return inner_steps


def inner_of(schedule: Schedule) -> tuple[Schedule, ...]:
    """The schedules that a schedule is made of; empty for one that is not made of others."""
    if isinstance(schedule, Combined):
        return (schedule.schedule,)
    several: tuple[Schedule, ...] = getattr(schedule, "schedules", ())
    return several


def check_inner(*schedules: object) -> None:
    """Refuse what is no schedule, and schedules that are too deep within each other.

    Raises:
        ConfigError: one of them cannot be part of a schedule.
    """
    for schedule in schedules:
        if not isinstance(schedule, Schedule) or isinstance(schedule, type):
            raise ConfigError(f"schedule is {schedule!r}, expected a schedule such as ConstantSchedule(decay=0.999)")
        if hasattr(schedule, "momentum_for"):
            raise ConfigError(f"{schedule!r} is within another schedule, expected per_batch as the outermost one")
        if 1 + _depth(schedule, DEEPEST) > DEEPEST:
            raise ConfigError(f"there are more than {DEEPEST} schedules within each other, expected at most that many")


def _depth(schedule: Schedule, most: int) -> int:
    """How many schedules are within each other below this one; no deeper than `most` is looked."""
    return max((1 + _depth(inner, most - 1) for inner in inner_of(schedule)), default=0) if most > 0 else 0


def horizon_of(schedule: Schedule) -> int | None:
    """The number of updates after which a schedule has nothing new: `steps_of`, or the end of a merge."""
    if isinstance(schedule, Combined):
        steps = horizon_of(schedule.schedule)
        return None if steps is None else schedule.steps_around(steps)
    end_step = getattr(schedule, "end_step", None)
    return end_step if type(end_step) is int else steps_of(schedule)


def steps_of(schedule: Schedule) -> int | None:
    """The number of updates until the `total_steps` of a schedule, or of the schedule within it, are over.

    For `every(n, ...)` it is the number until the last update that moves. None where there are no `total_steps`.
    """
    if isinstance(schedule, Combined):
        steps = steps_of(schedule.schedule)
        return None if steps is None else schedule.steps_around(steps)
    total_steps = getattr(schedule, "total_steps", None)
    return total_steps if type(total_steps) is int else None
