"""A plain function of the number of an update, taken for a schedule. No communication."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from dist_ema.schedules.base import Schedule

__all__ = ["FunctionSchedule", "ScheduleLike", "as_schedule"]

ScheduleLike = Schedule | Callable[[int], float]
"""A schedule, or a function from the number of an update to its momentum."""


def as_schedule(value: object) -> object:
    """A function as a schedule; anything else as it is. A class is no function: its instance is a schedule."""
    if isinstance(value, Schedule) or isinstance(value, type) or not callable(value):
        return value
    return FunctionSchedule(value)


@dataclasses.dataclass(frozen=True, repr=False)
class FunctionSchedule:
    """The momentum is what the function returns for the number of the update, from 0."""

    function: Callable[[int], float]

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`."""
        return self.function(step)

    def __repr__(self) -> str:
        """The name of the function: the repr of a function has its address, which differs over ranks and runs."""
        function = self.function
        while isinstance(function, functools.partial):
            function = function.func
        name = getattr(function, "__qualname__", type(function).__qualname__)
        return f"{getattr(function, '__module__', None) or type(function).__module__}.{name}"
