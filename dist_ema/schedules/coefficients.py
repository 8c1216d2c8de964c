"""The weights of a merge of n values, oldest first; the formula stands in merging.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from dist_ema.checks import real_number
from dist_ema.schedules.merging import MergeSchedule

__all__ = ["SHAPES", "merge_coefficients"]


def _linear_weight(k: int, num_steps: int) -> float:
    return 1.0 / num_steps


def _one_minus_sqrt_weight(k: int, num_steps: int) -> float:
    """sqrt(k / n) - sqrt((k - 1) / n), without the cancellation."""
    return 1.0 / (math.sqrt(num_steps) * (math.sqrt(k) + math.sqrt(k - 1)))


def _cosine_weight(k: int, num_steps: int) -> float:
    half = math.pi / (2 * num_steps)
    return math.sin((2 * k - 1) * half) * math.sin(half)


# The name of a curve -> c_k.
_WEIGHTS: dict[str, Callable[[int, int], float]] = {
    "linear": _linear_weight,
    "1-sqrt": _one_minus_sqrt_weight,
    "cosine": _cosine_weight,
}
SHAPES = tuple(_WEIGHTS)


def merge_coefficients(shape: str | Callable[[float], float], num_values: int) -> tuple[float, ...]:
    """The weights c_1 ... c_n of the values, oldest first; they sum to 1. See merging.py.

    Args:
        shape: as `MergeSchedule` takes it.
        num_values: the number n of values, at least 1.

    Raises:
        ConfigError: as `MergeSchedule`.
    """
    MergeSchedule(shape, num_steps=num_values)  # raises
    if isinstance(shape, str):
        return tuple(_WEIGHTS[shape](k, num_values) for k in range(1, num_values + 1))
    heights = [real_number(f"w({k}/{num_values})", shape(k / num_values)) for k in range(num_values + 1)]
    falls = [max(before - now, 0.0) for before, now in itertools.pairwise(heights)]
    return tuple(fall / math.fsum(falls) for fall in falls)
