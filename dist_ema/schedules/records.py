"""Schedules as JSON and as text, and back."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import dist_ema.schedules.catalog  # noqa: F401, it registers them
from dist_ema.checks import shown
from dist_ema.errors import ConfigError
from dist_ema.schedules.base import Schedule, rebuilding
from dist_ema.schedules.functions import FunctionSchedule
from dist_ema.schedules.nesting import DEEPEST, inner_of
from dist_ema.schedules.registry import SCHEDULES, is_registered, registration_of

__all__ = [
    "SCHEDULES",
    "check_record",
    "is_known",
    "schedule_from_json",
    "schedule_from_text",
    "schedule_text",
    "schedule_to_json",
]

_LONGEST_TEXT = 1000  # characters
_LARGEST_NUMBER = 2.0**53


def is_known(schedule: Schedule) -> bool:
    """Whether a schedule can be rebuilt from its JSON: it is one of this package, and so are those within it."""
    registration = registration_of(schedule)
    if registration is None:
        return False
    return all(is_known(inner) for inner in inner_of(schedule))


def schedule_to_json(schedule: Schedule) -> dict[str, Any]:
    """The JSON object of a schedule: it can rebuild a schedule of this package, and has the repr of any other."""
    registration = registration_of(schedule)
    if registration is not None:
        known: Any = schedule
        records = [schedule_to_json(inner) for inner in inner_of(schedule)]
        field = registration.inner_field
        inner = {} if field is None else {field: records[0] if field == "schedule" else records}
        return {"type": registration.name, **known.to_json(), **inner}
    # The default repr has a memory address, which differs over the ranks and runs.
    text = repr(schedule) if type(schedule).__repr__ is not object.__repr__ else type(schedule).__qualname__
    own_type = f"{type(schedule).__module__}.{type(schedule).__qualname__}"
    return {"type": text if isinstance(schedule, FunctionSchedule) else own_type, "repr": text}


def schedule_text(saved: Mapping[str, Any]) -> str:
    """A schedule's JSON as a call: "CosineSchedule(momentum=0.1, ...)", "after(100, EqualSchedule())"."""
    kind = str(saved.get("type"))  # the type of a record within another may be any JSON value
    fields: Mapping[str, Any] = {name: value for name, value in saved.items() if name != "type"}
    is_combinator = False
    if fields == {"repr": kind}:  # a function
        return kind
    if is_registered(kind):
        fields, is_combinator = SCHEDULES[kind].reader_fields(fields), SCHEDULES[kind].is_combinator
    texts = {name: _value_text(value, quoted=is_registered(kind)) for name, value in fields.items()}
    parts = texts.values() if is_combinator else (f"{name}={text}" for name, text in texts.items())
    return f"{kind}({', '.join(parts)})"


def _value_text(value: object, *, quoted: bool = True) -> str:
    """A value as `schedule_from_text` reads it; the repr of a user's own schedule is shown as it is."""
    if isinstance(value, dict):
        return schedule_text(value)
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_value_text, value))})"
    if isinstance(value, str) and quoted:
        return repr(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def schedule_from_json(saved: Mapping[str, Any]) -> Schedule:
    """The schedule that `schedule_to_json` wrote. It gives no warnings, because its user has had them.

    Raises:
        ConfigError: the type is not one of this package's schedules, or an argument is wrong.
    """
    return rebuilding(lambda: _rebuilt(saved, 0, None))


def check_record(saved: Mapping[str, Any]) -> None:
    """Refuse a record that cannot rebuild a schedule of this package; a record of another type passes unchecked.

    Raises:
        ConfigError: `schedule_to_json` writes no such record.
    """
    rebuilding(lambda: _rebuilt(saved, 0, _Unknown()))


class _Unknown:
    """A stand-in for a schedule that only its author can rebuild."""

    def momentum(self, step: int) -> float:
        raise NotImplementedError


def _rebuilt(saved: object, depth: int, unknown: Schedule | None) -> Schedule:
    """The schedule of a record; `unknown` stands in for a schedule whose type is not of this package."""
    if not isinstance(saved, Mapping) or not isinstance(saved.get("type"), str):
        raise ConfigError(f"a schedule is {shown(saved)}, expected an object with the name of its type")
    if depth > DEEPEST:
        raise ConfigError(f"a schedule has more than {DEEPEST} schedules within each other")
    kind, arguments = saved["type"], {name: _argument(value) for name, value in saved.items() if name != "type"}
    if not is_registered(kind):
        if unknown is not None:
            return unknown
        raise ConfigError(f"schedule type {shown(kind)} cannot be rebuilt, expected one of {sorted(SCHEDULES)}")
    try:
        inner: dict[str, object] = {}
        field = SCHEDULES[kind].inner_field
        if field == "schedule":
            inner = {field: _rebuilt(arguments.get(field), depth + 1, unknown)}
        elif field is not None:
            inner = {field: [_rebuilt(record, depth + 1, unknown) for record in _listed(arguments.get(field))]}
        return SCHEDULES[kind].kind(**{**arguments, **inner})
    except (TypeError, KeyError, ValueError, ArithmeticError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{kind} cannot be rebuilt from {shown(arguments)}: {shown(error)}") from error


def _listed(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ConfigError(f"the schedules within one are {shown(value)}, expected a list")
    return value


def _argument(value: object) -> object:
    """An argument of a record: a whole number is an int, though another JSON writer may write it as 1e9."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST_NUMBER
    return int(value) if is_whole else value  # type: ignore[call-overload]


def schedule_from_text(text: str) -> Schedule:
    """The schedule of a Python expression: "PowerSchedule(gamma=6.94)", "after(10_000, EqualSchedule())".

    It understands calls of this package's schedules with numbers, text and None, and their reprs. Nothing is evaluated.

    Raises:
        ConfigError: the text is no such expression, or an argument is wrong.
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
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not is_registered(node.func.id):
        raise _refusal(node, text, f"a call of one of {', '.join(sorted(SCHEDULES))}")
    names = {keyword.arg for keyword in node.keywords}
    if depth > DEEPEST or None in names or len(names) < len(node.keywords):
        raise _refusal(node, text, f"each argument once, no '**', at most {DEEPEST} schedules within each other")
    arguments = [_argument_of(argument, text, depth) for argument in node.args]
    named = {str(keyword.arg): _argument_of(keyword.value, text, depth) for keyword in node.keywords}
    try:
        schedule: Schedule = SCHEDULES[node.func.id].call(*arguments, **named)
    except TypeError as error:
        raise ConfigError(f"the schedule {text[:200]!r} has wrong arguments: {error}") from None
    return schedule


def _argument_of(node: ast.expr, text: str, depth: int) -> object:
    if isinstance(node, ast.Call):
        return _schedule_of(node, text, depth + 1)
    if isinstance(node, ast.Tuple):
        return tuple(_argument_of(part, text, depth) for part in node.elts)
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError):
        value = ...
    if value is None or isinstance(value, str) or (type(value) in (int, float) and abs(value) <= _LARGEST_NUMBER):
        return value
    raise _refusal(node, text, "a number of at most 2^53, text, None, a schedule, or a pair of these")


def _refusal(node: ast.expr, text: str, expected: str) -> ConfigError:
    part = ast.get_source_segment(text, node) or text
    return ConfigError(f"the schedule {text[:200]!r} has {part[:80]!r}, expected {expected}")
