"""BEMA: an average without the lag that its past gives it (arXiv 2508.00180), computed only where it is looked at.

    BEMA_t = EMA_t + a_t * (theta_t - theta_0),  a_t = (rho + gamma * t)^-eta,  t the number of the latest update

An update has nothing to do for it. Every owner computes the values of its shards when they are wanted: theta_t are the
live weights of that moment, and theta_0 is read from a folder, or is a track that never moves. Parameters alone are
corrected: a corrected variance of a BatchNorm could be negative.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dist_ema.averaging.state import AveragedState
from dist_ema.averaging.tensor_blocks import cut_alike
from dist_ema.boxes.shards import Shard
from dist_ema.checks import PathLike, absolute, shown
from dist_ema.errors import ConfigError
from dist_ema.ranks.calls import Call
from dist_ema.schedules.base import Schedule, fraction_between
from dist_ema.schedules.bema import BemaSchedule
from dist_ema.schedules.merging import MergeSchedule

__all__ = ["START_TRACK", "Bema", "Correction", "Reading", "add_correction", "check_start_track", "wide"]

# The name of the track that keeps theta_0.
START_TRACK = "start"

# Elements that are in memory at a time, besides the result.
_CHUNK_NUMEL = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bema:
    """The constants of BEMA, for `average_parameters(correct=...)` and `consolidate(correct=...)`.

    Example:
        >>> from dist_ema import Bema, ShardedEMA
        >>> bema = Bema(eta=0.2, kappa=0.5, rho=10)
        >>> ema = ShardedEMA(torch.nn.Linear(2, 1), bema.schedules)  # the tracks "ema" and "start"
        >>> ema.update()  # before the first step: update number 0 is theta_0
        >>> with ema.average_parameters("ema", correct=bema):
        ...     pass

    Args:
        eta: how fast the correction fades, at least 0 (0: it never does).
        kappa: of the average's own momentum; see `BemaSchedule`. `schedules` alone uses it.
        rho: as in `BemaSchedule`, and so is `gamma`.
        gamma: see `rho`.
        floor: as `kappa`.
        update_after_step: as in `BemaSchedule`: until that update there is nothing to correct.
        start: theta_0: a model folder or file of the weights that the run began at; every rank reads its slices at
            each use. None for the track "start" of `schedules`, which takes the memory of a track.

    Raises:
        ConfigError: a value is out of its range.
    """

    eta: float = 0.2
    kappa: float = 0.5
    rho: float = 10.0
    gamma: float = 1.0
    floor: float = 0.0
    update_after_step: int = 0
    start: PathLike | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "eta", fraction_between("eta", self.eta, 0.0, math.inf, closed=True))
        object.__setattr__(self, "start", None if self.start is None else os.fspath(absolute(self.start)))
        of_average = self._average()  # checks the others
        object.__setattr__(self, "rho", of_average.rho)
        object.__setattr__(self, "gamma", of_average.gamma)

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The tracks that belong to these constants: "ema", and without `start` the track "start" too."""
        start = MergeSchedule("linear", num_steps=1, start_step=self.update_after_step)
        return {"ema": self._average(), **({START_TRACK: start} if self.start is None else {})}

    def weight(self, num_updates: int) -> float:
        """The weight a_t of the correction after so many updates of a track; 0 where there is nothing to correct.

        Args:
            num_updates: the number of updates of the track so far.
        """
        step = num_updates - 1
        age = self.rho + self.gamma * step
        return 0.0 if step <= self.update_after_step or age <= 0.0 else float(age**-self.eta)

    def _average(self) -> BemaSchedule:
        return BemaSchedule(
            kappa=self.kappa,
            rho=self.rho,
            gamma=self.gamma,
            floor=self.floor,
            update_after_step=self.update_after_step,
        )


# Collective. Fills one tensor for each of the shards from a model folder.
Reading = Callable[[Call, AveragedState, Path, Sequence[Shard], Sequence[torch.Tensor]], object]


class Correction:
    """Corrects the averages of one rank.

    Attributes:
        reads: whether theta_0 is read from disk, which all ranks do together.

    Args:
        bema: the constants.
        state: the averages of this rank.
        read: reads a model folder.
    """

    def __init__(self, bema: Bema, state: AveragedState, read: Reading) -> None:
        if not isinstance(bema, Bema):
            raise ConfigError(f"correct is {shown(bema)}, expected a dist_ema.Bema, such as Bema(start=folder)")
        self._bema = bema
        self._state = state
        self._read = read
        self.reads = bema.start is not None

    @classmethod
    def of(cls, bema: Bema | None, state: AveragedState, read: Reading) -> Correction | None:
        """The correction that the user asks for; None for none.

        Raises:
            ConfigError: `bema` is something else.
        """
        return None if bema is None else cls(bema, state, read)

    def __repr__(self) -> str:
        return repr(self._bema)

    def check(self) -> None:
        """Refuse an average without a theta_0. No communication.

        Raises:
            ConfigError: `start` is None, and no track keeps theta_0.
        """
        if not self.reads:
            check_start_track(self._state.schedules)

    @torch.no_grad()
    def __call__(self, call: Call, track: str | None, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Collective where theta_0 is read from disk: every rank must call it, when all have passed `check`.

        Args:
            call: the call in which the values are used.
            track: the average that is corrected, whose updates t counts; may be None if there is one.
            values: the averaged values of `state.shards`, which stay as they are.

        Returns:
            The corrected values, in new memory, in float32 or wider; of averaged buffers the given ones.
        """
        state = self._state
        weight = self._bema.weight(state.count_of(state.track(track)))
        parameters = [index for index, shard in enumerate(state.shards) if not shard.held.spec.is_buffer]
        shards = [state.shards[index] for index in parameters]

        def room() -> list[torch.Tensor]:
            return [torch.empty_like(values[index], dtype=wide(values[index].dtype)) for index in parameters]

        if self.reads:
            results = call.exchange.agree(call.name, room)
            self._read(call, state, Path(str(self._bema.start)), shards, results)
        else:
            results = room()
            start = state.values(START_TRACK)  # the live ones where it has none yet
            for result, index in zip(results, parameters, strict=True):
                result.copy_(start[index])
        corrected = list(values)
        for index, shard, result in zip(parameters, shards, results, strict=True):
            if weight == 0.0:
                result.copy_(values[index])
            else:
                skip = state.options.skip_nonfinite
                for part, live in cut_alike(result, shard.observed(), _CHUNK_NUMEL):
                    part.copy_(difference(live.to(part.device, part.dtype), part, skip_nonfinite=skip))
                result.mul_(weight).add_(values[index])
            corrected[index] = result
        return tuple(corrected)


def check_start_track(schedules: object) -> None:
    """Refuse tracks of which none keeps theta_0. No communication.

    Raises:
        ConfigError: the error says how to get one.
    """
    kept = dict(schedules).get(START_TRACK)  # type: ignore[call-overload]
    if not isinstance(kept, MergeSchedule) or kept.num_steps != 1:
        present = f"there is no track {START_TRACK!r}" if kept is None else f"the track {START_TRACK!r} is {kept!r}"
        raise ConfigError(
            f"correct=Bema(...) has no start=, and {present}, expected one that keeps the weights at which the average "
            "began: give start= the folder of these weights, or build the average of bema.schedules"
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are corrected."""
    return torch.promote_types(dtype, torch.float32)


def difference(live: torch.Tensor, start: torch.Tensor, *, skip_nonfinite: bool) -> torch.Tensor:
    """`theta_t - theta_0`; 0 where both are alike, which of infinities (masks) it would not be."""
    moved = (live - start).masked_fill_(live == start, 0.0)
    return moved.nan_to_num_(0.0, 0.0, 0.0) if skip_nonfinite else moved


def add_correction(
    averaged: torch.Tensor, live: torch.Tensor, start: torch.Tensor, weight: float, *, skip_nonfinite: bool
) -> torch.Tensor:
    """`averaged + weight * (live - start)`, in the dtype of `averaged`. No communication."""
    if weight == 0.0:
        return averaged
    moved = difference(live.to(averaged.dtype), start.to(averaged.dtype), skip_nonfinite=skip_nonfinite)
    return moved.mul_(weight).add_(averaged)
