"""Schedules within each other: the base of all combinators."""

from __future__ import annotations

import dataclasses

from dist_ema.errors import ConfigError
from dist_ema.schedules.base import Schedule

__all__ = ["DEEPEST", "Combined", "steps_of"]

# The largest number of schedules within each other. A reader of a record walks down as many levels.
DEEPEST = 20


@dataclasses.dataclass(frozen=True)
class Combined:
    """A schedule that is made of another one."""

    schedule: Schedule

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule) or isinstance(self.schedule, type):
            raise ConfigError(
                f"schedule is {self.schedule!r}, expected a schedule such as ConstantSchedule(decay=0.999)"
            )
        depth, inner = 1, self.schedule
        while isinstance(inner, Combined) and depth <= DEEPEST:
            depth, inner = depth + 1, inner.schedule
        if depth > DEEPEST:
            raise ConfigError(f"there are more than {DEEPEST} schedules within each other, expected at most that many")

    def steps_around(self, inner_steps: int) -> int:
        """The number of updates until so many updates of the inner schedule are over."""
        return inner_steps


def steps_of(schedule: Schedule) -> int | None:
    """The number of updates until the `total_steps` of a schedule, or of the schedule within it, are over.

    For `every(n, ...)` it is the number until the last update that moves. None where there are no `total_steps`.
    """
    if isinstance(schedule, Combined):
        steps = steps_of(schedule.schedule)
        return None if steps is None else schedule.steps_around(steps)
    total_steps = getattr(schedule, "total_steps", None)
    return total_steps if type(total_steps) is int else None
