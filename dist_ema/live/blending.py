"""The rhythm in which the average is blended back into the live weights while a hook updates it. No communication."""

from __future__ import annotations

import dataclasses

from dist_ema.checks import positive_integer
from dist_ema.schedules.base import fraction_between

__all__ = ["Blending", "checked_weight"]


def checked_weight(name: str, value: object) -> float:
    """The weight of the average in what becomes live.

    Raises:
        ConfigError: it is not above 0 and at most 1.
    """
    weight = fraction_between(name, value, 0.0, 1.0, closed=True)
    return weight if weight > 0.0 else fraction_between(name, value, 0.0, 1.0)  # which raises


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blending:
    """Blend after every so many updates. It follows from their number alone, so that a resume keeps the rhythm.

    Attributes:
        every: the number of updates.
        weight: the weight of the average in what becomes live.
        interval: the option of the average: where it leaves out the update after which a blend is due, the blend waits
            for the next update that averages.
    """

    every: int
    weight: float
    interval: int

    @classmethod
    def of(cls, every: object, weight: object, interval: object) -> Blending | None:
        """The rhythm that the user asks for; None for no blending.

        Raises:
            ConfigError: a value is out of its range.
        """
        if every is None:
            return None
        return cls(
            every=positive_integer("blend_every", every),
            weight=checked_weight("blend_weight", weight),
            interval=positive_integer("interval", interval),
        )

    def is_due(self, num_updates: int, start: int = 0) -> bool:
        """Whether a blend follows the latest of so many updates. Update number 0 is a copy, and has none.

        Args:
            num_updates: the number of updates.
            start: the number of the update at which the track began: its `interval` counts from there.
        """
        own_number = num_updates - 1 - start
        if own_number < 1 or own_number % self.interval:
            return False
        return num_updates // self.every > max(num_updates - self.interval, 0) // self.every
