"""An average that stands still, because its schedule is over: one warning for a schedule. No communication."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress

from dist_ema.messages import tell
from dist_ema.schedules.base import Schedule
from dist_ema.schedules.nesting import steps_of

__all__ = ["Standstill"]


class Standstill:
    """The ends of some schedules.

    Attributes:
        next_step: the number of the first update beyond the next end; a number that no update has if there is none.

    Args:
        schedules: track name -> its schedule.
    """

    def __init__(self, schedules: Mapping[str, Schedule]) -> None:
        steps = {name: steps_of(schedule) for name, schedule in schedules.items()}
        self._schedules = schedules
        # Update number total_steps is the last of a schedule: m(K) = end_momentum.
        self._ends = {name: total_steps + 1 for name, total_steps in steps.items() if total_steps is not None}
        self.next_step = min(self._ends.values(), default=sys.maxsize)

    def tell(self, step: int) -> None:
        """Warn of the schedules that are over by update number `step`, if their momentum is 0 from there on."""
        over = [name for name, end in self._ends.items() if end <= step]
        for name in over:
            del self._ends[name]
        self.next_step = min(self._ends.values(), default=sys.maxsize)
        still = [name for name in over if _is_still(self._schedules[name], step)]
        if still:
            names = ", ".join(f"track {name!r} with {self._schedules[name]!r}" for name in still)
            tell(
                f"update number {step} (counted from 0) and all later ones have a momentum of 0, so the average stands "
                f"still from here on: {names}. total_steps is the number of optimizer steps of the whole run, over all "
                "resumes: give that number, or an end_momentum above 0"
            )


def _is_still(schedule: Schedule, step: int) -> bool:
    with suppress(Exception):  # a schedule of the user may raise beyond its end
        return schedule.momentum(step) == 0.0 and schedule.momentum(step + 1) == 0.0
    return False
