"""Schedules: the momentum of an update as a pure function of its number.

*Momentum* is the weight of the new observation, `averaged <- (1 - m) * averaged + m * live`: it is
`1 - decay`, and neither the optimizer's momentum nor BYOL's tau. Everything is float64 on the host.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from dist_ema.checks import positive_integer, real_number
from dist_ema.errors import ConfigError

__all__ = [
    "ConstantSchedule",
    "CosineSchedule",
    "Schedule",
    "momentum_of_update",
    "schedule_from_json",
    "schedule_text",
    "schedule_to_json",
]


@runtime_checkable
class Schedule(Protocol):
    """Anything that tells the momentum of update number `step` (0 for the first call)."""

    def momentum(self, step: int) -> float:
        """Weight of the live values in update number `step`, in [0, 1]."""
        ...


def _checked_momentum(name: str, value: object) -> float:
    momentum = real_number(name, value)
    if not 0.0 < momentum < 1.0:
        raise ConfigError(
            f"{name} is {momentum!r}, expected a number strictly between 0 and 1: it is the weight of the "
            "new value, usually small (0.004 is a decay of 0.996)"
        )
    return momentum


def _warn_if_large(momentum: float, given: str, meant: str) -> None:
    """The two ends of [0, 1] are easily confused: the weight of the new value is usually small."""
    if momentum > 0.5:
        warnings.warn(
            f"{given} gives the new value a weight of {momentum:g}, which is usually small; did you mean {meant}?",
            UserWarning,
            stacklevel=3,
        )


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class CosineSchedule:
    """Momentum that falls from `momentum` to `end_momentum` along half a cosine.

    `m(k) = end + (start - end) * (cos(pi * k / K) + 1) / 2` for update number k in [0, K], K =
    `total_steps` optimizer steps, so m(0) = start and m(K) = end. Beyond K it stays at `end`.

    Source: `CosineEMA` of mmpretrain (BYOL, MoCo v3); its published documentation has the sign of the
    difference reversed, its code has not. There momentum rises again beyond K; here k is clamped.
    Off by one: update number 0 copies the live values, so m(0) itself is never applied.

    Args:
        momentum: weight of the new value at the start, strictly between 0 and 1.
        end_momentum: weight of the new value at the end, from 0 to 1.
        total_steps: number of optimizer steps of the whole run, at least 1.

    Raises:
        ConfigError: a value is out of its range.
    """

    start_momentum: float
    end_momentum: float
    total_steps: int

    def __init__(self, momentum: float = 0.004, end_momentum: float = 0.0, *, total_steps: int) -> None:
        start = _checked_momentum("momentum", momentum)
        _warn_if_large(start, f"momentum={start:g}", f"momentum={1.0 - start:g}")
        end = real_number("end_momentum", end_momentum)
        if not 0.0 <= end <= 1.0:
            raise ConfigError(f"end_momentum is {end!r}, expected a number from 0 to 1")
        object.__setattr__(self, "start_momentum", start)
        object.__setattr__(self, "end_momentum", end)
        object.__setattr__(self, "total_steps", positive_integer("total_steps", total_steps))

    def __repr__(self) -> str:
        return (
            f"CosineSchedule(momentum={self.start_momentum!r}, end_momentum={self.end_momentum!r}, "
            f"total_steps={self.total_steps})"
        )

    def momentum(self, step: int) -> float:
        """Weight of the live values in update number `step`."""
        clamped_step = min(max(step, 0), self.total_steps)
        fraction = (math.cos(math.pi * clamped_step / self.total_steps) + 1.0) / 2.0
        return self.end_momentum + (self.start_momentum - self.end_momentum) * fraction

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {
            "momentum": self.start_momentum,
            "end_momentum": self.end_momentum,
            "total_steps": self.total_steps,
        }


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class ConstantSchedule:
    """The same momentum at every update; give either `decay` or `momentum = 1 - decay`.

    Source: `ExponentialMovingAverage` of mmengine, `get_ema_multi_avg_fn(decay)` of torch.

    Args:
        decay: weight of the old average, strictly between 0 and 1.
        momentum: weight of the new value, strictly between 0 and 1.

    Raises:
        ConfigError: both or none were given, or the value is out of its range.
    """

    constant: float

    def __init__(self, *, decay: float | None = None, momentum: float | None = None) -> None:
        if (decay is None) == (momentum is None):
            raise ConfigError(
                f"ConstantSchedule was given decay={decay!r} and momentum={momentum!r}, expected exactly one: "
                "decay=0.999 and momentum=0.001 mean the same"
            )
        if decay is not None:
            kept = real_number("decay", decay)
            if not 0.0 < kept < 1.0:
                raise ConfigError(f"decay is {kept!r}, expected a number strictly between 0 and 1")
            value = 1.0 - kept
            _warn_if_large(value, f"decay={kept:g}", f"decay={value:g}")
        else:
            value = _checked_momentum("momentum", momentum)
            _warn_if_large(value, f"momentum={value:g}", f"momentum={1.0 - value:g}")
        object.__setattr__(self, "constant", value)

    def __repr__(self) -> str:
        return f"ConstantSchedule(momentum={self.constant!r})"

    def momentum(self, step: int) -> float:
        """Weight of the live values in update number `step`."""
        return self.constant

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {"momentum": self.constant}


def momentum_of_update(schedule: Schedule, step: int, *, interval: int, interval_correction: bool) -> float:
    """The momentum to use in update number `step`, checked.

    With `interval_correction` it is `1 - (1 - m)^interval`: one update then forgets as much as `interval` updates
    with m would.

    Raises:
        ConfigError: the schedule gave something else than a number from 0 to 1.
    """
    momentum = real_number(f"the momentum that {schedule!r} gave at update {step}", schedule.momentum(step))
    if not 0.0 <= momentum <= 1.0:
        raise ConfigError(f"{schedule!r} gave momentum {momentum!r} at update {step}, expected a number from 0 to 1")
    if interval_correction and momentum < 1.0:
        # Without cancellation for small m.
        return -math.expm1(interval * math.log1p(-momentum))
    return momentum


_KNOWN: dict[str, type[CosineSchedule] | type[ConstantSchedule]] = {
    "CosineSchedule": CosineSchedule,
    "ConstantSchedule": ConstantSchedule,
}


def schedule_to_json(schedule: Schedule) -> dict[str, Any]:
    """A JSON object that tells `schedule`; one of ours can be rebuilt from it, another is told by its repr."""
    if isinstance(schedule, CosineSchedule | ConstantSchedule):
        return {"type": type(schedule).__name__, **schedule.to_json()}
    # The default repr holds a memory address, which differs over the ranks and runs.
    told = repr(schedule) if type(schedule).__repr__ is not object.__repr__ else type(schedule).__qualname__
    return {"type": f"{type(schedule).__module__}.{type(schedule).__qualname__}", "repr": told}


def schedule_text(saved: Mapping[str, Any]) -> str:
    """A schedule's JSON as a reader knows it: "CosineSchedule(momentum=0.1, ...)"."""
    arguments = ", ".join(
        f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in saved.items()
        if key != "type"
    )
    return f"{saved.get('type')}({arguments})"


def schedule_from_json(saved: Mapping[str, Any]) -> Schedule:
    """The schedule that `schedule_to_json` wrote.

    Raises:
        ConfigError: the type is not one of this package's schedules, or an argument is wrong.
    """
    arguments = dict(saved)
    kind = arguments.pop("type", None)
    if kind not in _KNOWN:
        raise ConfigError(f"schedule type {kind!r} cannot be rebuilt, expected one of {sorted(_KNOWN)}")
    try:
        return _KNOWN[kind](**arguments)
    except TypeError as error:
        raise ConfigError(f"{kind} cannot be rebuilt from {arguments!r}: {error}") from error
