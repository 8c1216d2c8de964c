"""Pictures of schedules: the momentum of each update, and how far back the average looks. No communication."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_ema.errors import ConfigError
from dist_ema.schedules.base import Schedule

__all__ = ["draw_schedules", "mean_ages"]

_MOST_STEPS = 5_000_000


def mean_ages(schedule: Schedule, num_steps: int) -> tuple[list[float], list[float]]:
    """Momentum of updates 0 to `num_steps - 1`, and the mean age of the values in the average after each, in updates.

    The age counts from the copy of update 0. An update with momentum m makes all that is in the average one update
    older, gives it the weight 1 - m, and adds a value of age 0: `age <- (1 - m) * (age + 1)`. For a constant m it tends
    to `(1 - m) / m`.
    """
    momenta, ages = [], []
    age = 0.0
    for step in range(num_steps):
        momentum = 1.0 if step == 0 else schedule.momentum(step)
        age = (1.0 - momentum) * (age + 1.0)
        momenta.append(momentum)
        ages.append(age)
    return momenta, ages


def draw_schedules(schedules: Mapping[str, Schedule], num_steps: int, path: Path, *, now: int | None = None) -> None:
    """Draw the momentum and the mean age over `num_steps` updates, to PNG or SVG by the name of `path`.

    Args:
        schedules: label -> schedule.
        num_steps: updates along the axis.
        path: of the picture.
        now: an update to mark.

    Raises:
        ConfigError: too many steps, matplotlib is missing, or it does not know the picture's format.
    """
    if not 2 <= num_steps <= _MOST_STEPS:
        raise ConfigError(f"steps is {num_steps}, expected 2 to {_MOST_STEPS:,}")
    try:
        from matplotlib.figure import Figure  # an optional dependency
    except ImportError:
        raise ConfigError("plotting needs matplotlib, which is not installed: pip install 'dist-ema[plot]'") from None
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    stride = max(1, num_steps // 2000)
    for label, schedule in schedules.items():
        momenta, ages = mean_ages(schedule, num_steps)
        steps = list(range(1, num_steps, stride))
        above.plot(steps, [momenta[step] for step in steps], label=label)
        below.plot(steps, [ages[step] for step in steps], label=label)
    above.set_ylabel("momentum (weight of the new value)")
    below.set_ylabel("mean age of the average (updates)")
    below.set_xlabel("update")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if now is not None:
            axes.axvline(now, color="#666666", linewidth=0.8, linestyle="--")
    above.legend(frameon=False)
    options: dict[str, Any] = {"dpi": 150}
    try:
        figure.savefig(path, **options)
    except ValueError as error:
        raise ConfigError(f"the picture {path} cannot be written: {error}") from None
