"""An update as it is counted, and an average that then stands still, because its schedule is over. No communication.

There is one warning for a schedule.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

import torch

from dist_ema.averaging.state import AveragedState
from dist_ema.messages import tell
from dist_ema.schedules.base import Schedule
from dist_ema.schedules.nesting import steps_of
from dist_ema.uninterrupted.modes import without_gradients

__all__ = ["Standstill", "update_and_count"]


class Standstill:
    """The ends of some schedules.

    Attributes:
        next_step: the number of the first update that may be beyond an end; a number that no update has if there is
            none. A track that began later ends later.

    Args:
        schedules: track name -> its schedule.
        own_number: gives the number that an update of the average has for a track.
    """

    def __init__(self, schedules: Mapping[str, Schedule], own_number: Callable[[str, int], int]) -> None:
        self._own_number = own_number
        self._schedules: dict[str, Schedule] = {}
        self._ends: dict[str, int] = {}
        self.next_step = sys.maxsize
        for name, schedule in schedules.items():
            self.add(name, schedule)

    def add(self, name: str, schedule: Schedule) -> None:
        """Look at one more track."""
        self._schedules[name] = schedule
        total_steps = steps_of(schedule)
        if total_steps is not None:
            # Update number total_steps is the last of a schedule: m(K) = end_momentum.
            self._ends[name] = total_steps + 1
            self.next_step = min(self._ends.values())

    def drop(self, name: str) -> None:
        """Look at a track no more."""
        self._ends.pop(name, None)
        self.next_step = min(self._ends.values(), default=sys.maxsize)

    def tell(self, step: int) -> None:
        """Warn of the schedules that are over by update number `step`, if their momentum is 0 from there on."""
        own = {name: self._own_number(name, step) for name in self._ends}
        over = [name for name, end in self._ends.items() if end <= own[name]]
        for name in over:
            self.drop(name)
        still = [name for name in over if _is_still(self._schedules[name], own[name])]
        if still:
            names = ", ".join(f"track {name!r} with {self._schedules[name]!r}" for name in still)
            tell(
                f"update number {own[still[0]]} (counted from 0) and all later ones have a momentum of 0, so the "
                f"average stands still from here on: {names}. total_steps is the number of optimizer steps of the "
                "whole run, over all resumes: give that number, or an end_momentum above 0"
            )


def _is_still(schedule: Schedule, step: int) -> bool:
    with suppress(Exception):  # a schedule of the user may raise beyond its end
        return schedule.momentum(step) == 0.0 and schedule.momentum(step + 1) == 0.0
    return False


def _update_and_count(state: AveragedState, standstill: Standstill, found_inf: torch.Tensor | None) -> None:
    step = state.num_updates
    if found_inf is not None or not state.update_again():
        without_gradients(partial(state.update, found_inf))
    state.use.num_calls += 1
    if step >= standstill.next_step:
        standstill.tell(step)


# The module of the compiler, which `torch.compiler.disable` would load: that takes a second.
_COMPILER = "torch._dynamo"
_untraced: Callable[[AveragedState, Standstill, torch.Tensor | None], None] | None = None


def update_and_count(state: AveragedState, standstill: Standstill, found_inf: torch.Tensor | None) -> None:
    """Do one update, as `ShardedEMA.update` describes it; it counts as a use, and warns when a schedule is over.

    A compiled optimizer step traces its hooks too, and must not trace the lists and counters of an update. Nothing is
    compiled before the compiler is loaded, which may come after the first updates.
    """
    global _untraced
    if _untraced is None:
        if _COMPILER not in sys.modules:
            _update_and_count(state, standstill, found_inf)
            return
        _untraced = torch.compiler.disable(_update_and_count)
    _untraced(state, standstill, found_inf)
