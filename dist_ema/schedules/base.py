"""The interface of a schedule, and the checks that all schedules of this package share.

*Momentum* is the weight of the new observation, `averaged <- (1 - m) * averaged + m * live`: it is
`1 - decay`, and neither the optimizer's momentum nor BYOL's tau. All arithmetic is float64 on the host.

[Note: counting]
`step` is the number of an update, and counts from 0. Update number 0 copies the live weights whatever the schedule
says, so the average then has one observation; after update number k it has k + 1. Tools that count observations, or
steps from 1, are shifted accordingly; every schedule states the shift.
"""

from __future__ import annotations

import contextvars
import math
import warnings
from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

from dist_ema.checks import real_number
from dist_ema.errors import ConfigError

__all__ = [
    "Schedule",
    "checked_momentum",
    "fraction_between",
    "momentum_of_update",
    "rebuilding",
    "steps_in",
    "warn_if_large",
]


@runtime_checkable
class Schedule(Protocol):
    """An object that gives the momentum of update number `step` (0 for the first call)."""

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`, in [0, 1]."""
        ...


def checked_momentum(name: str, value: object, *, closed: bool = False) -> float:
    """`value` as a momentum strictly between 0 and 1; 1 is allowed too if `closed`.

    Raises:
        ConfigError: the value is no such number.
    """
    momentum = real_number(name, value)
    if not (0.0 < momentum < 1.0 or (closed and momentum == 1.0)):
        raise ConfigError(
            f"{name} is {momentum!r}, expected a number strictly between 0 and 1: it is the weight of the "
            "new value, usually small (0.004 is a decay of 0.996)"
        )
    return momentum


T = TypeVar("T")

_is_rebuilding: contextvars.ContextVar[bool] = contextvars.ContextVar("_is_rebuilding", default=False)


def rebuilding(work: Callable[[], T]) -> T:
    """Do `work`, which rebuilds schedules, without their warnings: the user had them when the schedule was built.

    It runs in a context of its own, which C leaves: after an interrupt later schedules warn as before.
    """

    def quietly() -> T:
        _is_rebuilding.set(True)
        return work()

    return contextvars.copy_context().run(quietly)


# A momentum from here on looks like a decay. A momentum of 1 copies, which is meant.
_LIKE_A_DECAY = 0.9


def warn_if_large(momentum: float, given: str, meant: str) -> None:
    """Warn of a momentum that looks like a decay: users confuse the two, and a momentum is usually small."""
    if _LIKE_A_DECAY <= momentum < 1.0 and not _is_rebuilding.get():
        warnings.warn(
            f"{given} gives the new value a weight of {momentum:g}, which is usually small; did you mean {meant}?",
            UserWarning,
            stacklevel=3,
        )


def fraction_between(name: str, value: object, low: float, high: float, *, closed: bool = False) -> float:
    """`value` as a float between two bounds, which are allowed values only if `closed`.

    Raises:
        ConfigError: the value is no such number.
    """
    number = real_number(name, value)
    if not (low <= number <= high if closed else low < number < high):
        allowed = f"from {low:g} to {high:g}" if closed else f"between {low:g} and {high:g}"
        raise ConfigError(f"{name} is {number!r}, expected a number {allowed}")
    return number


def steps_in(name: str, length: object, per_step: object) -> float:
    """The updates in a length that is given in tokens, images or epochs, of which `per_step` are one update.

    Raises:
        ConfigError: a value is not above 0.
    """
    return fraction_between(name, length, 0.0, math.inf) / fraction_between("per_step", per_step, 0.0, math.inf)


def momentum_of_update(
    schedule: Schedule, step: int, *, interval: int, interval_correction: bool, batch_size: float | None = None
) -> float:
    """The momentum to use in update number `step`, checked.

    With `interval_correction` it is `1 - (1 - m)^interval`: one update then forgets as much as `interval` updates
    with m would.

    Raises:
        ConfigError: the schedule gave a momentum that is no number from 0 to 1, or it wants a batch size and none is
            given.
    """
    of_batch = getattr(schedule, "momentum_for", None)  # of `per_batch` alone; a look at a Protocol takes 14 us
    momentum = schedule.momentum(step) if of_batch is None else of_batch(step, batch_size)
    if type(momentum) is not float:  # only then the message is built, which takes longer than all the rest
        momentum = real_number(f"the momentum that {schedule!r} gave at update {step}", momentum)
    if not 0.0 <= momentum <= 1.0:
        raise ConfigError(f"{schedule!r} gave momentum {momentum!r} at update {step}, expected a number from 0 to 1")
    if interval_correction and momentum < 1.0:
        # The formula has no cancellation for small m.
        return -math.expm1(interval * math.log1p(-momentum))
    return momentum
