"""Schedules as JSON, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_ema.errors import ConfigError
from dist_ema.schedules.base import Schedule
from dist_ema.schedules.classic import (
    AnnealedSchedule,
    ConstantSchedule,
    CosineSchedule,
    InverseGammaSchedule,
    RampSchedule,
)
from dist_ema.schedules.combinators import After, Every, ScaledBatch
from dist_ema.schedules.profiles import EqualSchedule, HalfLifeSchedule, PowerSchedule

__all__ = ["is_known", "schedule_from_json", "schedule_text", "schedule_to_json"]

_SIMPLE: dict[str, Any] = {
    each.__name__: each
    for each in (
        AnnealedSchedule,
        ConstantSchedule,
        CosineSchedule,
        EqualSchedule,
        HalfLifeSchedule,
        InverseGammaSchedule,
        PowerSchedule,
        RampSchedule,
    )
}
_COMBINED: dict[str, Any] = {"after": After, "every": Every, "scaled_batch": ScaledBatch}
_DEEPEST = 20


def is_known(schedule: Schedule) -> bool:
    """Whether it can be rebuilt from its JSON: one of ours, made of ours."""
    if type(schedule) in _COMBINED.values():
        return is_known(schedule.schedule)  # type: ignore[attr-defined]
    return type(schedule) in _SIMPLE.values()


def schedule_to_json(schedule: Schedule) -> dict[str, Any]:
    """A JSON object that tells `schedule`; one of ours can be rebuilt from it, another is told by its repr."""
    for name, kind in _COMBINED.items():
        if type(schedule) is kind:
            return {"type": name, **schedule.to_json(), "schedule": schedule_to_json(schedule.schedule)}  # type: ignore[attr-defined]
    if type(schedule) in _SIMPLE.values():
        return {"type": type(schedule).__name__, **schedule.to_json()}  # type: ignore[attr-defined]
    # The default repr holds a memory address, which differs over the ranks and runs.
    told = repr(schedule) if type(schedule).__repr__ is not object.__repr__ else type(schedule).__qualname__
    return {"type": f"{type(schedule).__module__}.{type(schedule).__qualname__}", "repr": told}


def schedule_text(saved: Mapping[str, Any]) -> str:
    """A schedule's JSON as a reader knows it: "CosineSchedule(momentum=0.1, ...)"."""
    return f"{saved.get('type')}({', '.join(_argument_text(*each) for each in saved.items() if each[0] != 'type')})"


def _argument_text(name: str, value: object) -> str:
    if isinstance(value, dict):
        return f"{name}={schedule_text(value)}"
    return f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"


def schedule_from_json(saved: Mapping[str, Any], *, _depth: int = 0) -> Schedule:
    """The schedule that `schedule_to_json` wrote.

    Raises:
        ConfigError: the type is not one of this package's schedules, or an argument is wrong.
    """
    arguments = dict(saved)
    kind = arguments.pop("type", None)
    try:
        if kind in _COMBINED and _depth < _DEEPEST:
            inner = schedule_from_json(arguments.pop("schedule"), _depth=_depth + 1)
            rebuilt: Schedule = _COMBINED[kind](**arguments, schedule=inner)
            return rebuilt
        if kind in _SIMPLE:
            rebuilt = _SIMPLE[kind](**arguments)
            return rebuilt
    except (TypeError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{kind} cannot be rebuilt from {arguments!r}: {error!r}") from error
    raise ConfigError(f"schedule type {kind!r} cannot be rebuilt, expected one of {sorted((*_SIMPLE, *_COMBINED))}")
