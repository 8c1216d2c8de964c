"""Schedules whose averaging length grows with the run: power functions, fractions of the run, equal weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dist_ema.checks import positive_integer
from dist_ema.errors import ConfigError
from dist_ema.schedules.base import fraction_between, steps_in
from dist_ema.schedules.registry import registered

__all__ = ["EqualSchedule", "HalfLifeSchedule", "PowerSchedule"]

# The relative width of the flattest profile, gamma = 0: equal weights.
_WIDEST_SIGMA_REL = 12.0**-0.5


def sigma_rel_of_gamma(gamma: float) -> float:
    """The relative width of a power-function profile, `sqrt((g + 1) / ((g + 2)^2 (g + 3)))` (EDM2, eq. 123)."""
    if gamma > 1e50:  # the cube would overflow; the limit is the same to the last digit
        return 1.0 / gamma
    return math.sqrt((gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0)))


def gamma_of_sigma_rel(sigma_rel: float) -> float:
    """The exponent of a relative width: the positive root of g^3 + 7 g^2 + (16 - s^-2) g + 12 - s^-2 = 0 (EDM2, 126).

    Raises:
        ConfigError: `sigma_rel` is not above 1e-9 and at most 12^-1/2.
    """
    sigma = fraction_between("sigma_rel", sigma_rel, 1e-9, _WIDEST_SIGMA_REL * (1.0 + 1e-12))
    inverse = sigma**-2
    low, high = 0.0, inverse  # the width falls as gamma grows; at gamma = s^-2 it is below s
    for _ in range(200):
        middle = (low + high) / 2.0
        if middle in (low, high):
            break
        low, high = (middle, high) if sigma_rel_of_gamma(middle) > sigma else (low, middle)
    gamma = (low + high) / 2.0
    for _ in range(3):  # Newton's steps on the cubic, for the last digits
        value = ((gamma + 7.0) * gamma + 16.0 - inverse) * gamma + 12.0 - inverse
        slope = (3.0 * gamma + 14.0) * gamma + 16.0 - inverse
        gamma -= value / slope
    return max(gamma, 0.0)


def _by_width(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a record of `PowerSchedule`, with the width that users give in place of gamma."""
    gamma = fields.get("gamma")
    return {"sigma_rel": sigma_rel_of_gamma(gamma)} if isinstance(gamma, float) and gamma >= 0.0 else fields


@registered(example="PowerSchedule(sigma_rel=0.1)", reader_fields=_by_width)
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class PowerSchedule:
    """The average of a power-function profile: an observation of time tau has a weight in proportion to tau^gamma.

    `beta(t) = (1 - 1/t)^(gamma + 1)` for the t-th step, `m = 1 - beta` (EDM2: arXiv 2312.02696, eq. 127).
    Update number k is step t = k + 1 ([Note: counting]). The first has beta 0, so the copy of update 0 is part of the
    formula. The averaging length is a fixed share of the run so far, whenever that ends: `sigma_rel`, the width of the
    profile over the length of the run, is 0.05 to 0.25 in the paper.

    Args:
        sigma_rel: the relative width, above 0 and at most 0.2887 (equal weights).
        gamma: the exponent, above -1; give it instead of `sigma_rel`. Below 0 early values weigh most: -0.5 is the
            average that a learning-rate decay along 1 - sqrt would have led to (see `MergeSchedule`).

    Raises:
        ConfigError: both arguments or none were given, or the value is out of its range.
    """

    gamma: float
    # What was given, for the repr. A record has gamma.
    given: str = dataclasses.field(compare=False)

    def __init__(self, *, sigma_rel: float | None = None, gamma: float | None = None) -> None:
        if (sigma_rel is None) == (gamma is None):
            raise ConfigError(
                f"PowerSchedule was given sigma_rel={sigma_rel!r} and gamma={gamma!r}, expected exactly one, such as "
                "sigma_rel=0.1"
            )
        value = gamma_of_sigma_rel(sigma_rel) if sigma_rel is not None else gamma
        object.__setattr__(self, "gamma", fraction_between("gamma", value, -1.0, math.inf))
        given = f"gamma={self.gamma!r}" if sigma_rel is None else f"sigma_rel={float(sigma_rel)!r}"
        object.__setattr__(self, "given", given)

    def __repr__(self) -> str:
        return f"PowerSchedule({self.given})"

    @property
    def sigma_rel(self) -> float:
        """Relative width of the profile."""
        return sigma_rel_of_gamma(self.gamma)

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`."""
        if step == 0:
            return 1.0
        return -math.expm1((self.gamma + 1.0) * math.log1p(-1.0 / (step + 1)))

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {"gamma": self.gamma}


@registered(example="HalfLifeSchedule(fraction=0.05)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfLifeSchedule:
    """A half-life that is a fraction of the steps so far: `decay = 2^(-1 / (fraction * t))` for the t-th step.

    Update number k is step t = k + 1 ([Note: counting]). With `max_half_life_steps` the half-life grows to that number
    and stays there: the ramp of EDM and StyleGAN3.

    Source: `half_life_fraction` of torchtitan (arXiv 2602.03702: 0.05); `ema_rampup_ratio` of EDM (arXiv 2206.00364),
    `beta = 0.5^(1 / min(max_half_life, fraction * t))`. EDM2 counts as this package does; in EDM t = k, one update
    behind.

    Args:
        fraction: the half-life as a fraction of the steps so far, above 0.
        max_half_life_steps: the largest half-life in updates; None for no limit.
        max_half_life: the same in another unit, such as tokens, images or epochs.
        per_step: how many of that unit one update is; needed with `max_half_life`.

    Raises:
        ConfigError: a value is out of its range.
    """

    fraction: float = 0.05
    max_half_life_steps: float | None = None
    max_half_life: dataclasses.InitVar[float | None] = None
    per_step: dataclasses.InitVar[float | None] = None

    def __post_init__(self, max_half_life: float | None, per_step: float | None) -> None:
        if (max_half_life is None) != (per_step is None) or (
            max_half_life is not None and self.max_half_life_steps is not None
        ):
            raise ConfigError(
                f"HalfLifeSchedule was given max_half_life={max_half_life!r}, per_step={per_step!r} and "
                f"max_half_life_steps={self.max_half_life_steps!r}, expected max_half_life and per_step together, or "
                "max_half_life_steps, or none"
            )
        if max_half_life is not None:
            steps = steps_in("max_half_life", max_half_life, per_step)
            object.__setattr__(self, "max_half_life_steps", steps)
        for name in ("fraction", "max_half_life_steps"):
            value = getattr(self, name)
            if value is not None or name == "fraction":
                object.__setattr__(self, name, fraction_between(name, value, 0.0, math.inf))

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`."""
        half_life_steps = self.fraction * (step + 1)
        if self.max_half_life_steps is not None:
            half_life_steps = min(half_life_steps, self.max_half_life_steps)
        return -math.expm1(-math.log(2.0) / half_life_steps)

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return dataclasses.asdict(self)


@registered(example="EqualSchedule()")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EqualSchedule:
    """Equal weights of every n-th observation: `m(k) = 1 / (k / n + 1)` where n divides k, else 0. SWA.

    The trap: `every(500, EqualSchedule())` averages over all observations, sampled, and its first one, the copy, weighs
    like one observation and not like one sample. The schedule usually begins at a late step: `after(90_000,
    EqualSchedule(every_steps=500))`.

    Source: the default `avg_fn` of torch's `AveragedModel` (arXiv 1803.05407) and `StochasticWeightAverage` of mmengine
    with its `interval`. Both count as this package does.

    Args:
        every_steps: the number n, at least 1.

    Raises:
        ConfigError: `every_steps` is no such integer.
    """

    every_steps: int = 1

    def __post_init__(self) -> None:
        positive_integer("every_steps", self.every_steps)

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`."""
        return 0.0 if step % self.every_steps else 1.0 / (step // self.every_steps + 1)

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return dataclasses.asdict(self)
