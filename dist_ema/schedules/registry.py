"""The register of schedules: all that records, texts, the package's names and the command line know of a schedule.

A schedule is one class below `@registered`. The names of the package, the types in a manifest, the calls in a text, and
the schedules that the tests and docs/schedules.md must cover are all read off `SCHEDULES`.
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
        """The arguments of its class, as JSON; all but a schedule that it is made of, which is its `schedule`."""
        ...


Fields = Mapping[str, Any]
Kind = TypeVar("Kind", bound=type[Recorded])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Registration:
    """What the package knows of a schedule.

    Attributes:
        name: what users call, in Python as in a text, and what a record has as its type.
        kind: the class that a record rebuilds.
        call: what the name stands for: the class, or a function that makes one.
        example: a text that makes one; for users, and for the tests.
        shown: the fields of a record -> what a reader is shown of them.
    """

    name: str
    kind: Callable[..., Recorded]
    call: Callable[..., Recorded]
    example: str
    shown: Callable[[Fields], Fields]

    @property
    def is_combinator(self) -> bool:
        """Whether it is made of another schedule."""
        return "schedule" in {field.name for field in dataclasses.fields(self.kind)}  # type: ignore[arg-type]


# Name -> schedule. Whole once `dist_ema.schedules.catalog` is imported.
SCHEDULES: dict[str, Registration] = {}


def registered(
    *,
    example: str,
    call: Callable[..., Recorded] | None = None,
    shown: Callable[[Fields], Fields] = dict,
) -> Callable[[Kind], Kind]:
    """Decorator of a frozen dataclass that is a schedule.

    Args:
        example: a text that makes one, such as "PowerSchedule(sigma_rel=0.1)".
        call: the function that users call, where that is not the class; its name is the schedule's.
        shown: the fields of a record -> what a reader is shown of them, where users choose by another number.
    """

    def register(kind: Kind) -> Kind:
        name = (call or kind).__name__
        assert name not in SCHEDULES, f"two schedules are called {name}"
        SCHEDULES[name] = Registration(name=name, kind=kind, call=call or kind, example=example, shown=shown)
        return kind

    return register


def registration_of(schedule: Schedule) -> Registration | None:
    """The registration of the schedule's own class; None for a class that is not this package's."""
    return next((known for known in SCHEDULES.values() if type(schedule) is known.kind), None)


def is_registered(name: object) -> bool:
    """Whether a record of that type can be rebuilt."""
    return isinstance(name, str) and name in SCHEDULES
