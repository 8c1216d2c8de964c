"""Schedules as JSON and as text, and back."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from dist_ema.checks import shown
from dist_ema.errors import ConfigError
from dist_ema.schedules.base import Schedule, rebuilding
from dist_ema.schedules.classic import (
    AnnealedSchedule,
    ConstantSchedule,
    CosineSchedule,
    InverseGammaSchedule,
    RampSchedule,
)
from dist_ema.schedules.combinators import DEEPEST, After, Every, ScaledBatch, after, every, scaled_batch
from dist_ema.schedules.profiles import EqualSchedule, HalfLifeSchedule, PowerSchedule, sigma_rel_of_gamma

__all__ = ["check_record", "is_known", "schedule_from_json", "schedule_from_text", "schedule_text", "schedule_to_json"]

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
_CALLS: dict[str, Any] = {**_SIMPLE, "after": after, "every": every, "scaled_batch": scaled_batch}
_LONGEST_TEXT = 1000  # characters
_LARGEST_NUMBER = 2.0**53


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
    """A schedule's JSON as a reader knows it: "CosineSchedule(momentum=0.1, ...)", "after(100, EqualSchedule())"."""
    kind = str(saved.get("type"))  # a record within another may say anything
    if kind == PowerSchedule.__name__ and isinstance(saved.get("gamma"), float) and saved["gamma"] >= 0.0:
        return f"{kind}(sigma_rel={sigma_rel_of_gamma(saved['gamma']):.6g})"  # as users choose it
    told = {name: _value_text(value) for name, value in saved.items() if name != "type"}
    parts = told.values() if kind in _COMBINED else (f"{name}={value}" for name, value in told.items())
    return f"{kind}({', '.join(parts)})"


def _value_text(value: object) -> str:
    if isinstance(value, dict):
        return schedule_text(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def schedule_from_json(saved: Mapping[str, Any]) -> Schedule:
    """The schedule that `schedule_to_json` wrote. Of what its user was warned of, nobody is warned again.

    Raises:
        ConfigError: the type is not one of this package's schedules, or an argument is wrong.
    """
    with rebuilding():
        return _rebuilt(saved, 0, None)


def check_record(saved: Mapping[str, Any]) -> None:
    """See that a record of one of ours rebuilds it; a record of another type passes, only its author can judge it.

    Raises:
        ConfigError: it is not what `schedule_to_json` writes.
    """
    with rebuilding():
        _rebuilt(saved, 0, EqualSchedule())


def _rebuilt(saved: object, depth: int, unknown: Schedule | None) -> Schedule:
    """The schedule of a record; `unknown` stands for one of a type that is none of ours."""
    if not isinstance(saved, Mapping) or not isinstance(saved.get("type"), str):
        raise ConfigError(f"a schedule is {shown(saved)}, expected an object with the name of its type")
    if depth > DEEPEST:
        raise ConfigError(f"a schedule has more than {DEEPEST} schedules within each other")
    kind, arguments = saved["type"], {name: _argument(value) for name, value in saved.items() if name != "type"}
    if kind not in _COMBINED and kind not in _SIMPLE:
        if unknown is not None:
            return unknown
        raise ConfigError(
            f"schedule type {shown(kind)} cannot be rebuilt, expected one of {sorted((*_SIMPLE, *_COMBINED))}"
        )
    try:
        if kind in _SIMPLE:
            rebuilt: Schedule = _SIMPLE[kind](**arguments)
            return rebuilt
        rebuilt = _COMBINED[kind](**{**arguments, "schedule": _rebuilt(arguments.get("schedule"), depth + 1, unknown)})
        return rebuilt
    except (TypeError, KeyError, ValueError, ArithmeticError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{kind} cannot be rebuilt from {shown(arguments)}: {shown(error)}") from error


def _argument(value: object) -> object:
    """A whole number that another JSON writer wrote as 1e9 is a whole number."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST_NUMBER
    return int(value) if is_whole else value  # type: ignore[call-overload]


def schedule_from_text(text: str) -> Schedule:
    """The schedule that a Python expression tells: "PowerSchedule(gamma=6.94)", "after(10_000, EqualSchedule())".

    Understands calls of this package's schedules with numbers and None, and every repr of theirs. Nothing is evaluated.

    Raises:
        ConfigError: it is anything else, or an argument is wrong.
    """
    if len(text) > _LONGEST_TEXT:
        raise ConfigError(f"the schedule has {len(text)} characters, expected at most {_LONGEST_TEXT}")
    try:
        text = text.strip()
        expression = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"the schedule {text[:200]!r} is no expression: {error}") from None
    return _schedule_of(expression, text, 0)


def _schedule_of(node: ast.expr, text: str, depth: int) -> Schedule:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in _CALLS:
        raise _refusal(node, text, f"a call of one of {', '.join(sorted(_CALLS))}")
    names = {each.arg for each in node.keywords}
    if depth > DEEPEST or None in names or len(names) < len(node.keywords):
        raise _refusal(node, text, f"each argument once, no '**', at most {DEEPEST} schedules within each other")
    arguments = [_argument_of(each, text, depth) for each in node.args]
    named = {str(each.arg): _argument_of(each.value, text, depth) for each in node.keywords}
    try:
        found: Schedule = _CALLS[node.func.id](*arguments, **named)
    except TypeError as error:
        raise ConfigError(f"the schedule {text[:200]!r} has wrong arguments: {error}") from None
    return found


def _argument_of(node: ast.expr, text: str, depth: int) -> object:
    if isinstance(node, ast.Call):
        return _schedule_of(node, text, depth + 1)
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError):
        value = ...
    if value is None or (type(value) in (int, float) and abs(value) <= _LARGEST_NUMBER):
        return value
    raise _refusal(node, text, "a number of at most 2^53, None, or a schedule")


def _refusal(node: ast.expr, text: str, expected: str) -> ConfigError:
    found = ast.get_source_segment(text, node) or text
    return ConfigError(f"the schedule {text[:200]!r} has {found[:80]!r}, expected {expected}")
