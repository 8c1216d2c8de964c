"""The average that belongs to the weights which a run of a Trainer (fit, validate, test, predict) has loaded.

Lightning loads a checkpoint before `on_fit_start` under some strategies, and after it under others. So the average is
loaded at its first use in a run, which is later than both.
"""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_ema.disk.manifest import find_saved, read_manifest
from dist_ema.ema import ShardedEMA
from dist_ema.errors import CheckpointMismatchError, CheckpointNotFoundError, ConfigError
from dist_ema.integrations.lightning_saves import near, place_of
from dist_ema.integrations.resume import named_otherwise
from dist_ema.integrations.watch import Watch
from dist_ema.live.blending import Blending
from dist_ema.messages import tell
from dist_ema.ranks.exchange import Exchange
from dist_ema.schedules.base import Schedule
from dist_ema.schedules.records import schedule_from_json, schedule_to_json

__all__ = ["AverageOfRuns", "Schedules"]

_log = logging.getLogger(__name__)

Schedules = Schedule | Mapping[str, Schedule]

_OF_ANOTHER = (
    "the average {name!r} is that of another module than the Trainer evaluates here: this evaluation is one of the "
    "live weights. Give ckpt_path= of a checkpoint that has an average, or evaluate the module that was trained"
)


class AverageOfRuns:
    """The average of a callback, over all runs that the callback takes part in.

    Attributes:
        ema: the average; None before a run has needed one.
        watch: what notices that the updates are never used, or made twice; None where `ema` is.
        exchange: the control traffic of all ranks.

    Args:
        schedule: as the callback got it.
        name: the name of the average.
        begins_anew: whether a checkpoint without an average begins it anew, and is no error.
        on_load: keywords of `ShardedEMA.load`.
        blending: when the average is blended back into the live weights; None for never.
        options: the options of `ShardedEMA`.
    """

    def __init__(
        self,
        schedule: Schedules | Callable[[int], Schedules],
        name: str,
        *,
        begins_anew: bool,
        on_load: Mapping[str, Any],
        blending: Blending | None,
        options: Mapping[str, Any],
    ) -> None:
        self.ema: ShardedEMA | None = None
        self.watch: Watch | None = None
        self.exchange = Exchange()
        self._schedule: Any = schedule
        self._name = name
        self._begins_anew = begins_anew
        self._blending = blending
        self._on_load = on_load
        self._options = options
        self._built_with: Any = None
        # Whose average it is; and of a run that needed no average, the module and the checkpoint loaded into it.
        self._trainer: weakref.ref[Any] | None = None
        self._module: weakref.ref[Any] | None = None
        self._parts: list[int] = []
        self._unread: tuple[weakref.ref[Any], Any] | None = None
        # The average of the weights that the present run has loaded, which may be none.
        self._of_run: ShardedEMA | None = None
        self._is_current = False
        self._num_updates_saved: int | None = None

    def begin_run(self) -> None:
        """Note that a new run has begun, in another process group perhaps. No communication."""
        self.exchange = Exchange()
        self._of_run, self._is_current = None, False
        self._num_updates_saved = None

    def expect(self, num_updates: int) -> None:
        """Note the number of updates that the loaded checkpoint was saved with. No communication."""
        self._num_updates_saved = num_updates

    def end_run(self, trainer: Any, module: Any) -> None:
        """Note a checkpoint whose average the run did not need: the next one loads it. No communication."""
        if not self._is_current and trainer.ckpt_path:
            self._unread = (weakref.ref(module), trainer.ckpt_path)

    def is_of(self, module: Any) -> bool:
        """Whether it is the average of that module. No communication."""
        return self.ema is not None and self._module is not None and self._module() is module

    def current(self, trainer: Any, module: Any) -> ShardedEMA | None:
        """Collective at its first call in a run: every rank must call it. The average of the weights that were loaded.

        It is None where nothing was trained or loaded: the average would be the live model.

        Raises:
            CheckpointNotFoundError: the checkpoint has no average.
            CheckpointMismatchError: the average beside it is of another time.
        """
        if self._is_current:
            return self._of_run
        trains = trainer.state.fn == "fit"
        path = trainer.ckpt_path or (self._unread[1] if self._unread and self._unread[0]() is module else None)
        self._unread = None
        place = self._place(path) if path else None
        goes_on = not trains or (self._trainer is not None and self._trainer() is trainer)
        if path and self._parts != _parts_of(module):
            goes_on = False  # Lightning replaces modules at the end of `fit` (sync_batchnorm)
        ema = self.ema if self.is_of(module) and goes_on else None
        if trains or (ema is None and place is not None):
            schedules = self._schedules(trainer, place)
            if ema is None or _records(schedules) != self._built_with:
                ema = self._build(trainer, module, schedules, None if path else ema)
        if ema is not None:
            self.ema = ema
        elif self.ema is not None and self.exchange.rank == 0:
            tell(_OF_ANOTHER.format(name=self._name))
        if ema is not None and path:
            self._load(ema, place, path)
        self._of_run, self._is_current = ema, True
        return ema

    def _place(self, path: Any) -> Path | None:
        """Collective: every rank must call it. The folder of the average of a checkpoint; None where there is none."""

        def look() -> tuple[str, bool, str]:
            try:
                place = place_of(path, self._name)
            except ConfigError:  # a URL, which Lightning has read
                if self._begins_anew:
                    return "", False, ""
                raise
            is_there = os.path.lexists(place)
            return str(place), is_there, "" if is_there else named_otherwise(near(path))

        place, is_there, others = self.exchange.on_rank_0("EMACallback", look)
        if is_there:
            return Path(place)
        if not self._begins_anew:
            raise CheckpointNotFoundError(
                f"the checkpoint {path} has no average: there is no {place}. {others}If it was moved, move both. If "
                "the run that saved it had no average, give EMACallback(on_missing='live'): the average then starts "
                "from the loaded weights, at the first update"
            )
        if self.exchange.rank == 0:
            _log.warning("%s holds no average. %sIt starts anew from the live weights at the next update", path, others)
        return None

    def _build(self, trainer: Any, module: Any, schedules: Schedules, former: ShardedEMA | None) -> ShardedEMA:
        """Collective: every rank must call it. A new average, which goes on from a former one of the same model."""
        kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
        # FSDP's own wrapper has parameters. That of DDP has none, and would be kept alive beyond `fit`.
        ema = ShardedEMA(trainer.strategy.model if "FSDPStrategy" in kinds else module, schedules, **self._options)
        if former is not None and former.num_updates and former.tracks == ema.tracks:
            for track in ema.tracks:
                values = former.sharded_state_dict(track)
                ema.load_sharded_state_dict(values, track=track, num_updates=former.num_updates)
        if self.watch is not None:
            self.watch.forget()
        self.watch = Watch(
            ema,
            self._name,
            rank=self.exchange.rank,
            ends=self._options.get("into") is None,
            hook="EMACallback",
            save_it="every checkpoint of the Trainer has them (ModelCheckpoint, trainer.save_checkpoint), and "
            "EMACallback(consolidate=True) exports them",
            blending=self._blending,
        )
        self._built_with = _records(schedules)
        self._trainer, self._module, self._parts = weakref.ref(trainer), weakref.ref(module), _parts_of(module)
        return ema

    def _schedules(self, trainer: Any, place: Path | None) -> Schedules:
        """Collective where the schedule is a function. In a run that only evaluates, that of the checkpoint."""
        schedule = self._schedule
        if isinstance(schedule, Schedule | Mapping) or not callable(schedule):
            return schedule  # type: ignore[no-any-return]
        if trainer.state.fn != "fit" and place is not None:
            records = self.exchange.on_rank_0("EMACallback", lambda: dict(read_manifest(find_saved(place)).tracks))
            return {track: schedule_from_json(record) for track, record in records.items()}

        def of_steps() -> Schedules:
            steps = trainer.estimated_stepping_batches
            if not 1 <= steps < math.inf:
                raise ConfigError(
                    f"schedule is a function of the number of optimizer steps, and the Trainer has no such number (it "
                    f"says {steps}): give Trainer(max_steps=...), or a schedule"
                )
            return schedule(int(steps))  # type: ignore[no-any-return]

        return self.exchange.agree("EMACallback", of_steps)

    def _load(self, ema: ShardedEMA, place: Path | None, path: Any) -> None:
        """Collective: every rank must call it. Load the average of a checkpoint; without one it begins anew."""
        if self.watch is not None:
            self.watch.start_over()
        if place is None:
            ema.restart()
            return
        ema.load(place, **self._on_load)
        if self._num_updates_saved not in (None, ema.num_updates):
            raise CheckpointMismatchError(
                f"{place} has {ema.num_updates} updates, the checkpoint {path} was saved with "
                f"{self._num_updates_saved}: a save was cut off between the two, or one of them was replaced. Use "
                "another checkpoint"
            )


def _parts_of(module: Any) -> list[int]:
    return [id(part) for part in module.modules()]


def _records(schedules: Schedules) -> Any:
    if isinstance(schedules, Mapping):
        return {track: schedule_to_json(schedule) for track, schedule in schedules.items()}
    return schedule_to_json(schedules)
