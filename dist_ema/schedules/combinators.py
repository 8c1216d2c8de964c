"""Schedules made of schedules: a later start, one after the other, a coarser rhythm, another batch size."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dist_ema.checks import positive_integer, update_number
from dist_ema.errors import ConfigError
from dist_ema.schedules.base import Schedule, fraction_between
from dist_ema.schedules.nesting import Combined, check_inner, steps_of
from dist_ema.schedules.registry import registered

__all__ = ["after", "chain", "every", "per_batch", "scaled_batch"]


# The largest `steps` of `every`, which computes the momentum of one update from as many of the inner schedule.
_MOST_STEPS = 10**6


def after(step: int, schedule: Schedule) -> After:
    """`schedule` begins at update number `step`, where its count begins; until then the average is the live weights.

    Args:
        step: the number of the update, at least 1.
        schedule: what follows.

    Raises:
        ConfigError: `step` is not an integer of at least 1.
    """
    return After(step, schedule)


def chain(*parts: tuple[int, Schedule]) -> Chain:
    """One schedule after the other: each begins at the number of an update, and its own count begins there.

    A warm-up before a cosine (DINOv3): `chain((0, LinearSchedule(0.01, 0.004, total_steps=1_000)), (1_000,
    CosineSchedule(0.004, total_steps=99_000)))`.

    The trap: a schedule whose first momentum is 1 (EqualSchedule, PowerSchedule, the warm-ups) begins its part with a
    copy of the live weights, as it does in `after`.

    Args:
        parts: pairs of the number of the update at which a schedule begins, and the schedule; the first begins at 0.

    Raises:
        ConfigError: the numbers do not rise from 0, or a part is no such pair.
    """
    if not parts or not all(isinstance(part, tuple | list) and len(part) == 2 for part in parts):
        raise ConfigError(f"chain was given {parts!r}, expected pairs such as (0, LinearSchedule(...)), (1_000, ...)")
    return Chain([start for start, _ in parts], [schedule for _, schedule in parts])


def every(steps: int, schedule: Schedule) -> Every:
    """One update in `steps`, which forgets as much as all of them would have.

    Args:
        steps: the number of updates of which one averages, from 1 to 1,000,000.
        schedule: the momentum of every single update.

    Raises:
        ConfigError: `steps` is not an integer from 1 to 1,000,000.
    """
    return Every(steps, schedule)


def per_batch(reference_size: float, schedule: Schedule) -> PerBatch:
    """`schedule` holds for a batch of `reference_size`; an update with another batch forgets in proportion to its size.

    The batch size of an update is given by `update(batch_size=...)`, or by `expect_batch_size` where a hook calls
    `update`. It must be the outermost of schedules within each other.

    Args:
        reference_size: the batch size that the schedule was tuned at, above 0, in the unit of `update(batch_size=...)`.
        schedule: the schedule as it was tuned.

    Raises:
        ConfigError: `reference_size` is not above 0.
    """
    return PerBatch(reference_size, schedule)


def scaled_batch(kappa: float, schedule: Schedule) -> ScaledBatch:
    """`schedule` was tuned at some batch size, and is used for a batch `kappa` times as large.

    Args:
        kappa: the batch size of this run over that of the tuning, above 0.
        schedule: the schedule as it was tuned.

    Raises:
        ConfigError: `kappa` is not above 0.
    """
    return ScaledBatch(kappa, schedule)


@registered(example="after(100, EqualSchedule())", call=after)
@dataclasses.dataclass(frozen=True, init=False)
class After(Combined):
    """See `after`. Update number `start_step` copies the live weights: it is update number 0 of the inner schedule."""

    start_step: int

    def __init__(self, start_step: int, schedule: Schedule) -> None:
        object.__setattr__(self, "start_step", positive_integer("start_step", start_step))
        object.__setattr__(self, "schedule", schedule)
        self.__post_init__()

    def __repr__(self) -> str:
        return f"after({self.start_step}, {self.schedule!r})"

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`."""
        return 1.0 if step <= self.start_step else self.schedule.momentum(step - self.start_step)

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {"start_step": self.start_step}

    def steps_around(self, inner_steps: int) -> int:
        """The number of updates until so many updates of the inner schedule are over."""
        return self.start_step + inner_steps


def _pairs(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a record of `Chain` as the pairs that users give."""
    starts, schedules = fields.get("starts"), fields.get("schedules")
    if not isinstance(starts, list) or not isinstance(schedules, list):
        return fields
    return {str(start): (start, schedule) for start, schedule in zip(starts, schedules, strict=False)}


@registered(
    example="chain((0, ConstantSchedule(decay=0.9)), (100, CosineSchedule(total_steps=900)))",
    call=chain,
    reader_fields=_pairs,
)
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Chain:
    """See `chain`."""

    starts: tuple[int, ...]
    schedules: tuple[Schedule, ...]

    def __init__(self, starts: Sequence[int], schedules: Sequence[Schedule]) -> None:
        check_inner(*schedules)
        numbers = [update_number("start", start) for start in starts]
        rises = all(before < after for before, after in itertools.pairwise(numbers))
        if len(numbers) != len(schedules) or not numbers or numbers[0] != 0 or not rises:
            raise ConfigError(f"the parts of a chain begin at {list(starts)!r}, expected numbers that rise from 0")
        object.__setattr__(self, "starts", tuple(numbers))
        object.__setattr__(self, "schedules", tuple(schedules))

    def __repr__(self) -> str:
        parts = (f"({start}, {schedule!r})" for start, schedule in zip(self.starts, self.schedules, strict=True))
        return f"chain({', '.join(parts)})"

    @property
    def total_steps(self) -> int | None:
        """The number of updates until the last part is over; None if it does not end."""
        steps = steps_of(self.schedules[-1])
        return None if steps is None else self.starts[-1] + steps

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`."""
        at = max(bisect.bisect_right(self.starts, step) - 1, 0)
        return self.schedules[at].momentum(step - self.starts[at])

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {"starts": list(self.starts)}


@registered(example="every(10, ConstantSchedule(decay=0.999))", call=every)
@dataclasses.dataclass(frozen=True, init=False)
class Every(Combined):
    """See `every`: `1 - m = (1 - m(k - n + 1)) ... (1 - m(k))` where n divides k, else 0.

    For a constant decay rho the new decay is rho^n (the linear-time correction). Without it a decay of 0.9999, applied
    every 10 steps, would have a half-life of 69 thousand steps, not 6.9 thousand.
    """

    num_steps: int

    def __init__(self, num_steps: int, schedule: Schedule) -> None:
        object.__setattr__(self, "num_steps", positive_integer("num_steps", num_steps))
        if self.num_steps > _MOST_STEPS:
            raise ConfigError(f"num_steps is {self.num_steps}, expected at most {_MOST_STEPS:,}")
        object.__setattr__(self, "schedule", schedule)
        self.__post_init__()

    def __repr__(self) -> str:
        return f"every({self.num_steps}, {self.schedule!r})"

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`."""
        if step % self.num_steps:
            return 0.0
        momenta = [self.schedule.momentum(inner) for inner in range(max(step - self.num_steps + 1, 0), step + 1)]
        if max(momenta) >= 1.0:
            return 1.0
        return -math.expm1(sum(math.log1p(-momentum) for momentum in momenta))

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {"num_steps": self.num_steps}

    def steps_around(self, inner_steps: int) -> int:
        """The number of updates up to the one that takes in inner update number `inner_steps - 1`, the last to move."""
        return -(-(inner_steps - 1) // self.num_steps) * self.num_steps + 1


@registered(example="scaled_batch(8, ConstantSchedule(decay=0.999))", call=scaled_batch)
@dataclasses.dataclass(frozen=True, init=False)
class ScaledBatch(Combined):
    """See `scaled_batch`: decay rho becomes rho^kappa (Busbridge et al., arXiv 2307.13813, definition 1.2).

    The optimizer's own scaling rule must be applied too. The inner schedule counts the updates of the new batch size.
    """

    kappa: float

    def __init__(self, kappa: float, schedule: Schedule) -> None:
        object.__setattr__(self, "kappa", fraction_between("kappa", kappa, 0.0, math.inf))
        object.__setattr__(self, "schedule", schedule)
        self.__post_init__()

    def __repr__(self) -> str:
        return f"scaled_batch({self.kappa!r}, {self.schedule!r})"

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`."""
        momentum = self.schedule.momentum(step)
        return 1.0 if momentum >= 1.0 else -math.expm1(self.kappa * math.log1p(-momentum))

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {"kappa": self.kappa}


@registered(example="per_batch(1024, ConstantSchedule(decay=0.999))", call=per_batch)
@dataclasses.dataclass(frozen=True, init=False)
class PerBatch(Combined):
    """See `per_batch`: `1 - m = (1 - m_ref(k))^(B_k / B_ref)` for a batch of size B_k at update number k.

    Source: the scaling rule of Busbridge et al. (arXiv 2307.13813, definition 1.2), applied to every update with a
    kappa of its own, B_k / B_ref. The optimizer's own scaling rule must be applied too.
    """

    reference_size: float

    def __init__(self, reference_size: float, schedule: Schedule) -> None:
        size = fraction_between("reference_size", reference_size, 0.0, math.inf)
        object.__setattr__(self, "reference_size", size)
        object.__setattr__(self, "schedule", schedule)
        self.__post_init__()

    def __repr__(self) -> str:
        return f"per_batch({self.reference_size!r}, {self.schedule!r})"

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`, for a batch of the reference size."""
        return self.schedule.momentum(step)

    def momentum_for(self, step: int, batch_size: float | None) -> float:
        """The weight of the live values in update number `step`, for a batch of that size.

        Raises:
            ConfigError: the batch size is not known, or not above 0.
        """
        if batch_size is None:
            raise ConfigError(
                f"{self!r} wants the batch size of every update, and none was given: call update(batch_size=...), or "
                "expect_batch_size(...) before the step where a hook calls update. No file has these sizes: such an "
                "average can be neither synthesized nor a source of synthesize"
            )
        momentum = self.schedule.momentum(step)
        kappa = fraction_between("batch_size", batch_size, 0.0, math.inf) / self.reference_size
        return 1.0 if momentum >= 1.0 else -math.expm1(kappa * math.log1p(-momentum))

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {"reference_size": self.reference_size}
