"""The register of schedules: records, texts, the package's names and the command line know a schedule from it alone.

A schedule is one class below `@registered`. The names of the package, the types in a manifest, the calls in a text, and
the schedules that the tests and docs/schedules/catalogue.md must cover all derive from `SCHEDULES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from dist_ema.schedules.base import Schedule

__all__ = ["SCHEDULES", "Recorded", "Registration", "is_registered", "registered", "registration_of"]


class Recorded(Schedule, Protocol):
    """A schedule that a record can rebuild."""

    def to_json(self) -> dict[str, Any]:
        """The arguments of its class, as JSON, without the schedule within it, which is its `schedule`."""
        ...


Fields = Mapping[str, Any]
Kind = TypeVar("Kind", bound=type[Recorded])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Registration:
    """The entry of a schedule in the register.

    Attributes:
        name: the name that users call, in Python as in a text; it is the type in a record.
        kind: the class that a record rebuilds.
        call: the object of that name: the class, or a function that makes an instance.
        example: a text that makes an instance, for users and for the tests.
        reader_fields: the fields of a record -> the fields in a text for a reader.
    """

    name: str
    kind: Callable[..., Recorded]
    call: Callable[..., Recorded]
    example: str
    reader_fields: Callable[[Fields], Fields]

    @property
    def is_combinator(self) -> bool:
        """Whether the schedule has other schedules within it."""
        return self.inner_field is not None

    @property
    def inner_field(self) -> str | None:
        """The field with the schedule within it, or with several; None if there is none."""
        names = {field.name for field in dataclasses.fields(self.kind)}  # type: ignore[arg-type]
        return next((name for name in ("schedule", "schedules") if name in names), None)


# Name -> schedule. The register is complete once `dist_ema.schedules.catalog` is imported.
SCHEDULES: dict[str, Registration] = {}


def registered(
    *,
    example: str,
    call: Callable[..., Recorded] | None = None,
    reader_fields: Callable[[Fields], Fields] = dict,
) -> Callable[[Kind], Kind]:
    """Decorator of a frozen dataclass that is a schedule.

    Args:
        example: a text that makes an instance, such as "PowerSchedule(sigma_rel=0.1)".
        call: the function that users call, where that is not the class; its name is the schedule's name.
        reader_fields: the fields of a record -> the fields in a text for a reader, where users give other numbers.
    """

    def register(kind: Kind) -> Kind:
        name = (call or kind).__name__
        assert name not in SCHEDULES, f"two schedules are called {name}"
        SCHEDULES[name] = Registration(
            name=name, kind=kind, call=call or kind, example=example, reader_fields=reader_fields
        )
        return kind

    return register


def registration_of(schedule: Schedule) -> Registration | None:
    """The registration of a schedule that a record can rebuild; None for a class or a part that is the user's own."""
    if not getattr(schedule, "can_be_rebuilt", True):
        return None
    return next((registration for registration in SCHEDULES.values() if type(schedule) is registration.kind), None)


def is_registered(name: object) -> bool:
    """Whether records of that type can be rebuilt."""
    return isinstance(name, str) and name in SCHEDULES
