"""Merging in place of a learning-rate decay: the weights of the last n values follow the curve of a decay.

A run at a constant learning rate, whose last n values are averaged with the weights below, stands in for a run that
decays its learning rate over these n steps (WSM, arXiv 2507.17634, theorem 1). A decay curve w falls from w(0) = 1 to
w(1) = 0. The learning rate of step j counts in every later value, so value number k of n has the weight

    c_k = w((k - 1) / n) - w(k / n),  k = 1 ... n,  and the sum of all is 1.

As a recursion, m_k = c_k / (c_1 + ... + c_k) = (w((k - 1) / n) - w(k / n)) / (1 - w(k / n)), so m_1 = 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from dist_ema.checks import positive_integer, real_number, shown, update_number
from dist_ema.errors import ConfigError
from dist_ema.schedules.registry import registered

__all__ = ["MergeSchedule"]

# How far w(0), w(1) and a falling w may be off by rounding.
_ROUNDING = 1e-9
# The most points of a curve of the user that are looked at when a schedule is made.
_MOST_POINTS = 2**20


def _linear(k: int, num_steps: int) -> float:
    """w(s) = 1 - s: equal weights."""
    return 1.0 / k


def _one_minus_sqrt(k: int, num_steps: int) -> float:
    """w(s) = 1 - sqrt(s): early values weigh most, and the length of the window does not matter."""
    return 1.0 if k == 1 else -math.expm1(0.5 * math.log1p(-1.0 / k))


def _cosine(k: int, num_steps: int) -> float:
    """w(s) = (1 + cos(pi s)) / 2, without the cancellation of two cosines."""
    half = math.pi / (2 * num_steps)
    return min(math.sin((2 * k - 1) * half) * math.sin(half) / math.sin(k * half) ** 2, 1.0)


# The name of a curve -> m_k.
_SHAPES: dict[str, Callable[[int, int], float]] = {"linear": _linear, "1-sqrt": _one_minus_sqrt, "cosine": _cosine}


@registered(example="MergeSchedule('1-sqrt', num_steps=2_000, start_step=8_000)")
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class MergeSchedule:
    """The average that a learning-rate decay over `num_steps` would have led to; see the module.

    Update number `start_step` is value 1, which is copied ([Note: counting]). Update number `start_step + num_steps -
    1` is value n. Before the first the average is the live weights, and after the last it does not move.

    Source: theorem 1 of WSM (arXiv 2507.17634), and the coefficients of Megatron-LM's `weighted_merge`. "linear" is
    `after(start_step, EqualSchedule())` and "1-sqrt" is `after(start_step, PowerSchedule(gamma=-0.5))`, both up to the
    end of the window.

    Args:
        shape: the curve of the decay: "linear", "1-sqrt", "cosine", or a function of s in [0, 1] that falls from 1 to
            0. A function cannot be rebuilt from a file, as no schedule of yours can: building the average warns of it.
        num_steps: the number n of values, at least 1.
        start_step: the number of the update that brings value 1, at least 0.

    Raises:
        ConfigError: a value is out of its range, or the function does not fall from 1 to 0: a weight would be negative.
    """

    shape: str | Callable[[float], float]
    num_steps: int
    start_step: int

    def __init__(self, shape: str | Callable[[float], float], *, num_steps: int, start_step: int = 0) -> None:
        if not callable(shape) and not (isinstance(shape, str) and shape in _SHAPES):
            raise ConfigError(
                f"shape is {shown(shape)}, expected one of {sorted(_SHAPES)}, or a function of s in [0, 1]"
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "num_steps", positive_integer("num_steps", num_steps))
        object.__setattr__(self, "start_step", update_number("start_step", start_step))
        if callable(shape):
            self._check_curve()

    def __repr__(self) -> str:
        shape = getattr(self.shape, "__qualname__", repr(self.shape)) if callable(self.shape) else repr(self.shape)
        return f"MergeSchedule({shape}, num_steps={self.num_steps}, start_step={self.start_step})"

    @property
    def can_be_rebuilt(self) -> bool:
        """Whether a record of this schedule is enough to rebuild it."""
        return isinstance(self.shape, str)

    @property
    def end_step(self) -> int:
        """The number of updates until the average stands still."""
        return self.start_step + self.num_steps

    def momentum(self, step: int) -> float:
        """The weight of the live values in update number `step`."""
        k = step - self.start_step + 1
        if k <= 1:
            return 1.0
        if k > self.num_steps:
            return 0.0
        if isinstance(self.shape, str):
            return _SHAPES[self.shape](k, self.num_steps)
        before, now = self._curve(k - 1), self._curve(k)
        past = 1.0 - now  # c_1 + ... + c_k
        return 1.0 if past <= 0.0 else min(max(before - now, 0.0) / past, 1.0)

    def to_json(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {"shape": self.shape, "num_steps": self.num_steps, "start_step": self.start_step}

    def _curve(self, k: int) -> float:
        assert callable(self.shape)
        return real_number(f"w({k}/{self.num_steps})", self.shape(k / self.num_steps))

    def _check_curve(self) -> None:
        """Refuse a curve whose values would weigh less than nothing: a run must not find that out in a step."""
        stride = -(-self.num_steps // _MOST_POINTS)
        points = [*range(0, self.num_steps, stride), self.num_steps]
        values = [self._curve(k) for k in points]
        for at, wanted in ((0, 1.0), (-1, 0.0)):
            if abs(values[at] - wanted) > _ROUNDING:
                raise ConfigError(f"the curve is {values[at]!r} at s={-at}, expected {wanted:g}: it falls from 1 to 0")
        for k, before, now in zip(points[1:], values[:-1], values[1:], strict=True):
            if now > before + _ROUNDING:
                raise ConfigError(
                    f"the curve rises from {before!r} to {now!r} at s={k / self.num_steps:g}, expected one that never "
                    "rises: value number "
                    f"{k} would have a negative weight"
                )
