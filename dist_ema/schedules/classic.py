"""Schedules of teacher networks and of classic averaging: cosine, linear, constant, annealed, ramped."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dist_ema.checks import positive_integer, real_number, shown
from dist_ema.errors import ConfigError
from dist_ema.schedules.base import checked_momentum, fraction_between, steps_in, warn_if_large
from dist_ema.schedules.registry import registered

__all__ = [
    "AnnealedSchedule",
    "ConstantSchedule",
    "CosineSchedule",
    "InverseGammaSchedule",
    "LinearSchedule",
    "RampSchedule",
]


@registered(example="CosineSchedule(total_steps=10_000)")
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class CosineSchedule:
    """Momentum that falls from `momentum` to `end_momentum` along half a cosine.

    `m(k) = end + (start - end) * (cos(pi * k / K) + 1) / 2` for update number k in [0, K], K =
    `total_steps` optimizer steps, so m(0) = start and m(K) = end. Beyond K it stays at `end`.

    Source: `CosineEMA` of mmpretrain (BYOL, MoCo v3). Its published documentation has the sign of the difference
    reversed, but its code has not. There momentum rises again beyond K; here k is clamped. Off by one: update number 0
    copies the live values, so m(0) itself is never applied.

    Args:
        momentum: the weight of the new value at the start, strictly between 0 and 1.
        end_momentum: the weight of the new value at the end, from 0 to 1.
        total_steps: the number of optimizer steps of the whole run, at least 1.

    Raises:
        ConfigError: a value is out of its range.
    """

    start_momentum: float
    end_momentum: float
    total_steps: int

    def __init__(self, momentum: float = 0.004, end_momentum: float = 0.0, *, total_steps: int) -> None:
        start = checked_momentum("momentum", momentum)
        warn_if_large(start, f"momentum={start:g}", f"momentum={1.0 - start:g}")
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
        """The weight of the live values in update number `step`."""
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


@registered(example="LinearSchedule(0.002, 0.0, total_steps=10_000)")
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class LinearSchedule:
    """Momentum that goes from `momentum` to `end_momentum` along a line: `m(k) = start + (end - start) * k / K`.

    k is the number of the update ([Note: counting]) and K is `total_steps`. Beyond K it stays at `end_momentum`.

    Source: the target encoders of I-JEPA and V-JEPA (arXiv 2301.08243, 2404.08471), which go from a decay of 0.996 or
    0.998 to 1: `LinearSchedule(0.002, 0.0, total_steps=...)`. Off by one: update number 0 copies the live values, so
    m(0) itself is never applied.

    Args:
        momentum: the weight of the new value at the start, from 0 to 1.
        end_momentum: the weight of the new value at the end, from 0 to 1.
        total_steps: the number of optimizer steps until the end, at least 1.

    Raises:
        ConfigError: a value is out of its range.
    """

    start_momentum: float
    end_momentum: float
    total_steps: int

    def __init__(self, momentum: float, end_momentum: float = 0.0, *, total_steps: int) -> None:
        start = fraction_between("momentum", momentum, 0.0, 1.0, closed=True)
        warn_if_large(start, f"momentum={start:g}", f"momentum={1.0 - start:g}")
        object.__setattr__(self, "start_momentum", start)
        object.__setattr__(self, "end_momentum", fraction_between("end_momentum", end_momentum, 0.0, 1.0, closed=True))
        object.__setattr__(self, "total_steps", positive_integer("total_steps", total_steps))

    def __repr__(self) -> str:
        return f"LinearSchedule({self.start_momentum!r}, {self.end_momentum!r}, total_steps={self.total_steps})"

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`."""
        if step >= self.total_steps:  # the sum below may be off by a rounding
            return self.end_momentum
        fraction = max(step, 0) / self.total_steps
        return self.start_momentum + (self.end_momentum - self.start_momentum) * fraction

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {
            "momentum": self.start_momentum,
            "end_momentum": self.end_momentum,
            "total_steps": self.total_steps,
        }


@registered(example="ConstantSchedule(decay=0.999)")
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class ConstantSchedule:
    """The same momentum at every update; give one of `decay`, `momentum = 1 - decay`, and a half-life.

    Source: `ExponentialMovingAverage` of mmengine, and `get_ema_multi_avg_fn(decay)` of torch. The half-life is that of
    Composer's `EMA`: after h updates an observation has half its weight, decay = 2^(-1/h).

    Args:
        decay: the weight of the old average, strictly between 0 and 1.
        momentum: the weight of the new value, above 0 and at most 1. With 1 every update is a copy; together with
            `interval=n` that is a hard copy on every n-th.
        half_life_steps: the number of updates after which the weight of an observation has halved, above 0.
        half_life: the same in another unit, such as tokens, images or epochs.
        per_step: how many of that unit one update is; needed with `half_life`.

    Raises:
        ConfigError: several arguments or none were given, or the value is out of its range.

    Example:
        >>> from dist_ema import ConstantSchedule
        >>> ConstantSchedule(half_life=2e9, per_step=4_000_000) == ConstantSchedule(half_life_steps=500)  # tokens
        True
    """

    constant: float
    # What was given, for the repr. A record has the momentum, which rebuilds the schedule to the bit.
    given: str = dataclasses.field(compare=False)

    def __init__(
        self,
        *unnamed: object,
        decay: float | None = None,
        momentum: float | None = None,
        half_life_steps: float | None = None,
        half_life: float | None = None,
        per_step: float | None = None,
    ) -> None:
        if unnamed:
            raise ConfigError(
                f"ConstantSchedule was given {', '.join(map(repr, unnamed))} without a name, expected one of "
                "decay=0.999 (the weight of the old average) and momentum=0.001 (the weight of the new value), which "
                "mean the same"
            )
        if half_life is not None and per_step is None:
            raise ConfigError(
                f"half_life={half_life!r} is in no unit, expected per_step beside it: how many tokens, images or "
                "epochs one update is. In updates it is half_life_steps"
            )
        if [decay, momentum, half_life_steps, half_life].count(None) != 3 or (half_life is None) != (per_step is None):
            raise ConfigError(
                f"ConstantSchedule was given decay={decay!r}, momentum={momentum!r}, half_life_steps="
                f"{half_life_steps!r} and half_life={half_life!r} with per_step={per_step!r}, expected exactly one, "
                "and per_step beside half_life alone: decay=0.999 and momentum=0.001 mean the same"
            )
        if half_life is not None:
            half_life_steps = steps_in("half_life", half_life, per_step)
        if half_life_steps is not None:
            value = -math.expm1(-math.log(2.0) / fraction_between("half_life_steps", half_life_steps, 0.0, math.inf))
        elif decay is not None:
            kept = real_number("decay", decay)
            if not 0.0 < kept < 1.0:
                raise ConfigError(f"decay is {kept!r}, expected a number strictly between 0 and 1")
            value = 1.0 - kept
            if value < 1.0:  # a larger value is refused below
                warn_if_large(value, f"decay={kept:g}", f"decay={value:g}")
        else:
            value = checked_momentum("momentum", momentum, closed=True)
            warn_if_large(value, f"momentum={value:g}", f"momentum={1.0 - value:g}")
        # A decay or half-life was near its bounds: the record could not rebuild the schedule.
        if momentum is None and not 0.0 < value < 1.0:
            raise ConfigError(
                f"decay={decay!r}, half_life_steps={half_life_steps!r} is a momentum of {value:g} in float64, expected "
                "one strictly between 0 and 1"
            )
        object.__setattr__(self, "constant", value)
        shown_as = {"half_life": half_life, "per_step": per_step} if half_life is not None else {}
        shown_as = shown_as or {"decay": decay, "momentum": momentum, "half_life_steps": half_life_steps}
        given = ", ".join(f"{name}={float(value)!r}" for name, value in shown_as.items() if value is not None)
        object.__setattr__(self, "given", given)

    def __repr__(self) -> str:
        return f"ConstantSchedule({self.given})"

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`."""
        return self.constant

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {"momentum": self.constant}


@registered(example="AnnealedSchedule(0.0002, gamma=100)")
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class AnnealedSchedule:
    """Momentum that falls like `gamma / (gamma + k)` to a floor: `m(k) = max(momentum, gamma / (gamma + k))`.

    Source: `MomentumAnnealingEMA` of mmengine with its defaults. It counts as this package does ([Note: counting]).

    Args:
        momentum: the smallest weight of the new value, strictly between 0 and 1.
        gamma: the number of updates until the weight is one half, above 0.

    Raises:
        ConfigError: a value is out of its range.
    """

    floor_momentum: float
    gamma: float

    def __init__(self, momentum: float = 0.0002, *, gamma: float = 100.0) -> None:
        object.__setattr__(self, "floor_momentum", checked_momentum("momentum", momentum))
        object.__setattr__(self, "gamma", fraction_between("gamma", gamma, 0.0, math.inf))

    def __repr__(self) -> str:
        return f"AnnealedSchedule(momentum={self.floor_momentum!r}, gamma={self.gamma!r})"

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`."""
        return max(self.floor_momentum, self.gamma / (self.gamma + step))

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {"momentum": self.floor_momentum, "gamma": self.gamma}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WarmUp:
    """A decay that grows with `t = k - update_after_step`, within bounds; the live weights are copied while t <= 0.

    The counting is that of `EMAModel.get_decay` of diffusers, which adds 1 to its step before and subtracts it again.
    """

    max_decay: float = 0.9999
    min_decay: float = 0.0
    update_after_step: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_decay", fraction_between("max_decay", self.max_decay, 0.0, 1.0))
        least = fraction_between("min_decay", self.min_decay, 0.0, self.max_decay, closed=True)
        object.__setattr__(self, "min_decay", least)
        if type(self.update_after_step) is not int or not 0 <= self.update_after_step < 2**63:
            raise ConfigError(
                f"update_after_step is {shown(self.update_after_step)}, expected an integer of at least 0, below 2^63"
            )

    def _decay(self, elapsed_steps: int) -> float:
        raise NotImplementedError

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`."""
        elapsed_steps = step - self.update_after_step
        if elapsed_steps <= 0:
            return 1.0
        return 1.0 - max(min(self._decay(elapsed_steps), self.max_decay), self.min_decay)

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return dataclasses.asdict(self)


@registered(example="InverseGammaSchedule(power=0.75)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseGammaSchedule(_WarmUp):
    """Decay that grows as `1 - (1 + t / inv_gamma)^-power`, t = k - update_after_step, within bounds.

    Source: `EMAModel(use_ema_warmup=True)` of diffusers, `ModelEmaV3(use_warmup=True)` of timm, after K. Crowson. With
    inv_gamma 1 a power of 2/3 reaches 0.999 after 31.6 thousand steps and 0.9999 after a million; 3/4 after 10 and
    215.4 thousand. The live weights are copied while t <= 0.

    Args:
        inv_gamma: the number of steps of the warm-up's beginning, above 0.
        power: the exponent of the growth, above 0.
        max_decay: the largest decay, strictly between 0 and 1.
        min_decay: the smallest decay, from 0 to `max_decay`.
        update_after_step: the number of the update at which the average begins.

    Raises:
        ConfigError: a value is out of its range.
    """

    inv_gamma: float = 1.0
    power: float = 2.0 / 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("inv_gamma", "power"):
            object.__setattr__(self, name, fraction_between(name, getattr(self, name), 0.0, math.inf))

    def _decay(self, elapsed_steps: int) -> float:
        return float(1.0 - (1.0 + elapsed_steps / self.inv_gamma) ** -self.power)


@registered(example="RampSchedule(max_decay=0.999)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RampSchedule(_WarmUp):
    """Decay that grows as `(1 + t) / (10 + t)`, t = k - update_after_step, within bounds.

    Source: `EMAModel` of diffusers, which has the formula from `ExponentialMovingAverage(num_updates=...)` of
    TensorFlow. The live weights are copied while t <= 0.

    Args:
        max_decay: the largest decay, strictly between 0 and 1.
        min_decay: the smallest decay, from 0 to `max_decay`.
        update_after_step: the number of the update at which the average begins.

    Raises:
        ConfigError: a value is out of its range.
    """

    def _decay(self, elapsed_steps: int) -> float:
        return (1.0 + elapsed_steps) / (10.0 + elapsed_steps)
