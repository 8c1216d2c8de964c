"""Pictures: the momentum of every update, how far back an average looks, the weights of a sum. No communication."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_ema.errors import ConfigError
from dist_ema.offline.pictures import dress, new_figure, save_figure
from dist_ema.schedules.base import Schedule

__all__ = ["MOST_POINTS", "draw_profiles", "draw_schedules", "mean_ages"]

# The most points of a curve.
MOST_POINTS = 500

_MOST_STEPS = 5_000_000
_MOST_SNAPSHOTS = 24

# The size of a legend, and the characters of that size that are as wide as the figure.
_LEGEND_POINTS = 10.0
_LEGEND_CHARACTERS = 84


def mean_ages(schedule: Schedule, num_steps: int) -> tuple[list[float], list[float]]:
    """Momentum of updates 0 to `num_steps - 1`, and the mean age of the averaged values after them, in updates.

    The age counts from the copy of update 0. An update with momentum m makes the averaged values one update older,
    gives them the weight 1 - m, and adds a value of age 0: `age <- (1 - m) * (age + 1)`. For a constant m the age tends
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


def draw_schedules(
    schedules: Mapping[str, Schedule],
    num_steps: int,
    path: Path,
    *,
    now: int | None = None,
    replace: bool = False,
) -> None:
    """Draw the momentum and the mean age over `num_steps` updates, to PNG or SVG by the name of `path`.

    Args:
        schedules: label -> schedule.
        num_steps: updates along the axis.
        path: of the picture.
        now: an update to mark.
        replace: whether a file that is there is replaced.

    Raises:
        ConfigError: too many steps, the path is taken, matplotlib is missing, or it does not know the picture's format.
    """
    if not 2 <= num_steps <= _MOST_STEPS:
        raise ConfigError(f"steps is {num_steps}, expected 2 to {_MOST_STEPS:,}")
    figure = new_figure()
    above, below = figure.subplots(2, 1, sharex=True)
    stride = -(-num_steps // MOST_POINTS)
    smallest, largest = math.inf, 0.0
    for label, schedule in schedules.items():
        momenta, ages = mean_ages(schedule, num_steps)
        steps = list(range(1, num_steps, stride))
        smallest, largest = min(smallest, *momenta[1:]), max(largest, *momenta[1:])
        above.plot(steps, [momenta[step] for step in steps], label=label)
        below.plot(steps, [ages[step] for step in steps])
    above.set_ylabel("momentum")
    below.set_ylabel("mean age (updates)")
    below.set_xlabel("update")
    if largest > 50.0 * smallest > 0.0:
        above.set_yscale("log")
    else:
        above.set_ylim(bottom=0)
    below.set_ylim(bottom=0)
    for axes in (above, below):
        dress(axes)
        if now is not None:
            axes.axvline(now, color="#666666", linewidth=0.8, linestyle="--")
    # Above the axes, and as wide as the figure: a long schedule within them would cover curves, or squeeze the axes.
    size = min(_LEGEND_POINTS, _LEGEND_POINTS * _LEGEND_CHARACTERS / max(map(len, schedules)))
    figure.legend(handles=above.get_lines()[: len(schedules)], frameon=False, loc="outside upper left", fontsize=size)
    save_figure(figure, path, replace=replace)


def draw_profiles(
    edges: Sequence[int],
    target: tuple[str, Sequence[float]],
    achieved: tuple[str, Sequence[float]],
    snapshots: Sequence[Sequence[float]],
    path: Path,
    *,
    replace: bool = False,
) -> None:
    """Draw the profile of a wanted average, and that of the sum of snapshots that comes nearest.

    Args:
        edges: update numbers, ascending.
        target: the label, and the weights of all observations between two edges.
        achieved: the same of the sum.
        snapshots: the weights of every snapshot; some of them are drawn, faintly.
        path: the file of the picture, PNG or SVG by its name.
        replace: whether a file that is there is replaced.

    Raises:
        ConfigError: the path is taken, matplotlib is missing, or it does not know the picture's format.
    """
    figure = new_figure()
    axes = figure.subplots()
    middles = [(start + stop - 1) / 2 for start, stop in itertools.pairwise(edges)]
    widths = [stop - start for start, stop in itertools.pairwise(edges)]

    def plot(weights: Sequence[float], **style: Any) -> list[float]:
        heights = [weight / width for weight, width in zip(weights, widths, strict=True)]
        while heights and heights[-1] == 0.0:  # the curve ends here
            heights.pop()
        axes.plot(middles[: len(heights)], heights, **style)
        return heights

    for index in sorted({number * len(snapshots) // _MOST_SNAPSHOTS for number in range(_MOST_SNAPSHOTS)}):
        plot(snapshots[index], color="#bbbbbb", linewidth=0.5, label=None if index else "snapshots")
    wanted = plot(target[1], color="#1f5fa8", linewidth=4.0, alpha=0.35, label=target[0])
    nearest = plot(achieved[1], color="#b0622f", linewidth=1.2, label=achieved[0])
    # The profiles of early snapshots are high and narrow, and would hide the others.
    axes.set_ylim(min(1.1 * min(nearest), 0.0), 1.5 * max(wanted))
    axes.set_xlabel("update")
    axes.set_ylabel("weight of its observation")
    dress(axes)
    axes.legend(loc="upper left", edgecolor="none", framealpha=1.0)
    save_figure(figure, path, replace=replace)
