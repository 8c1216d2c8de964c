"""The averages of one rank, their counter, and what may be done with them now.

Only `restore` and `take_over` communicate, and only for a teacher that several ranks hold alike.

`ShardedEMA` is this state plus the calls that communicate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dist_ema._version import __version__
from dist_ema.averaging.averages import Averages
from dist_ema.averaging.skipped_steps import LateFlag
from dist_ema.averaging.streams import Stream, join_all, stream_beside
from dist_ema.averaging.update import Updater
from dist_ema.averaging.usage import Use
from dist_ema.boxes.plan import Plan
from dist_ema.boxes.shards import Box, Shard
from dist_ema.disk.manifest import Manifest, SavedTensor
from dist_ema.errors import ConfigError, SwapError
from dist_ema.live.teacher import Teacher, TeacherAverages, copy_pairs
from dist_ema.options import Options
from dist_ema.schedules.base import Schedule, momentum_of_update
from dist_ema.schedules.records import schedule_to_json
from dist_ema.uninterrupted import Job, Lane, Once

__all__ = ["AveragedState", "dtype_name"]


class _Now(NamedTuple):
    """What changes with each update, besides the averages.

    Attributes:
        num_updates: updates so far, with the latest if that is not known to be skipped.
        last_skipped: tells whether it was, if that is not known yet.
        not_started: fqns of tensors whose average a checkpoint did not have: the live values at their next use.
        num_refused_before: live values that were left out before a checkpoint was loaded; on one rank, for all.
    """

    num_updates: int = 0
    last_skipped: LateFlag | None = None
    not_started: frozenset[str] = frozenset()
    num_refused_before: int = 0


class AveragedState:
    """All tracks of a `ShardedEMA` on this rank.

    Attributes:
        plan: the model as boxes.
        teacher: the module that holds the averages, if they are to run forward.
        texts: dtype of the weights in a folder -> small files that the model wants beside them.
        options: what the user chose.
        schedules: track name -> schedule.
        shards: the boxes whose average this rank keeps.
        averages: track name -> averaged values; empty until `allocate`.
        swapped: the track whose averaged weights are in the model, or None.
        use: what has been done with the averages.
    """

    def __init__(
        self,
        plan: Plan,
        options: Options,
        schedules: Mapping[str, Schedule],
        texts: Callable[[torch.dtype], Mapping[str, bytes]] = lambda dtype: {},
        teacher: Teacher | None = None,
    ) -> None:
        self.plan = plan if teacher is None else teacher.plan
        self.teacher = teacher
        self.texts = texts
        self.options = options
        self.schedules = dict(schedules)
        self.shards = plan.owned(averaged=True)
        self.averages: Mapping[str, Averages] = {}
        self._updater = Updater((), ())
        self.swapped: str | None = None
        self.use = Use()
        # Puts the live weights back, if the end of a swap has begun but was cut off.
        self.leave: Callable[[], None] | None = None
        # Replaced as a whole by one assignment, so that its parts always agree.
        self._now = _Now()

    def allocate(self) -> None:
        """Make room for the averaged values."""
        dtype, device, skip = self.options.dtype, self.options.device, self.options.skip_nonfinite
        if self.teacher is None:
            residual_dtype = torch.bfloat16 if self.options.compensated else None
            self.averages = {
                name: Averages(self.shards, dtype=dtype, device=device, residual_dtype=residual_dtype)
                for name in self.schedules
            }
            tracks = list(self.averages.values())
            self._updater = Updater(self.shards, tracks, skip_nonfinite=skip, stream=self._stream(tracks))
            return
        self.averages = {name: TeacherAverages(self.shards, self.teacher) for name in self.schedules}
        everything = TeacherAverages(self.teacher.held, self.teacher)
        repeated = self.teacher.repeated
        self._updater = Updater(self.teacher.held, [everything], skip_nonfinite=skip, uncounted=repeated)
        self._copy_live(None, [Lane.of(self.teacher.show_live)], counted=False)

    def _stream(self, tracks: Sequence[Averages]) -> Stream:
        if not self.options.overlap:
            return Stream()
        averaged = {value.device for track in tracks for value in track.values}
        return stream_beside({shard.live().device for shard in self.shards}, averaged)

    def join(self) -> None:
        """See that what is done from now on, on the current stream, comes after an update that runs beside training."""
        self._updater.stream.join()

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which must not begin before averages and counter are what they are to be."""
        self.join()
        self._updater.complete()
        _ = self.num_updates  # takes a skipped step back; the event that it waits for could not be copied
        return self.__dict__

    def stop_overlapping(self) -> None:
        """Have further updates run in line."""
        try:
            self.join()
        finally:
            self._updater.stream = Stream()

    @property
    def num_updates(self) -> int:
        """Updates so far, less the steps that turned out to be skipped."""
        now = self._now
        if now.last_skipped is not None:
            counted = now.num_updates - now.last_skipped.is_set()
            self._now = now = now._replace(num_updates=counted, last_skipped=None)
        return now.num_updates

    @property
    def nbytes(self) -> int:
        """Bytes of averaged values on this rank."""
        return self._updater.nbytes

    @property
    def num_refused(self) -> int:
        """Live values that were left out on this rank; waits for the device."""
        return self._now.num_refused_before + self._updater.num_refused

    def update(self, found_inf: torch.Tensor | None) -> None:
        """One update of all tracks: see `ShardedEMA.update`. Whole or not at all: see [Note: interrupts]."""
        self._updater.complete()
        step, options = self.num_updates, self.options
        first: list[Lane] = []
        if self.teacher is not None:
            join_all()  # an average of the teacher itself, say
            self.teacher.settle()
            first = [Lane.of(self.teacher.show_live)]
        flag = None if found_inf is None else LateFlag(found_inf)
        now = self._now._replace(num_updates=step + 1, last_skipped=flag, not_started=frozenset())
        count = Once(self, "_now", now)
        if step == 0:
            self._copy_live(count, first)
        elif step % options.interval == 0:
            # All momenta before the first lerp: a schedule that fails must not leave the tracks at odds.
            momenta = [self._momentum(schedule, step) for schedule in self.schedules.values()]
            self._start_from_live()
            self._updater.lerp(momenta, count, unless=found_inf, first=first)
        elif self._now.not_started:
            self._updater.set(Job([*first, self._updater.copying_live(self._now.not_started)], count))
        else:
            self._updater.run(Job(first, count))

    @property
    def loaded(self) -> tuple[Shard, ...]:
        """The shards to read from a checkpoint: the averaged ones, then what else a teacher shows."""
        return self.shards + (() if self.teacher is None else self.teacher.shown.owned(averaged=False))

    @property
    def loaded_fqns(self) -> set[str]:
        """Names of the tensors that `loaded` has, on some rank."""
        shown = () if self.teacher is None else self.teacher.shown.specs
        return {spec.fqn for spec in self.plan.specs if spec.averaged} | {spec.fqn for spec in shown}

    def targets(self) -> dict[str, Sequence[torch.Tensor]]:
        """Where a checkpoint may be read to, per track and shard of `loaded`, before it is known to be good.

        Before the first update the averages hold nothing that counts (`values` shows the live weights), so they are
        filled in place and a resume needs no memory. Later, and for a teacher, which counts from the beginning, it
        takes a second copy, on the host, until `restore`.
        """
        if self.num_updates == 0 and self.teacher is None:
            return {name: averages.values for name, averages in self.averages.items()}
        # Row by row whatever the live ones are (channels_last, say), as the bytes of a file are.
        shown = [
            shard.live().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for shard in self.loaded[len(self.shards) :]
        ]
        return {
            name: [*(torch.empty(shard.sizes, dtype=self.options.dtype, device="cpu") for shard in self.shards), *shown]
            for name in self.averages
        }

    def restore(
        self,
        filled: Mapping[str, Sequence[torch.Tensor]],
        found: set[str],
        num_updates: int,
        *,
        num_refused: int | None = None,
    ) -> None:
        """Take over averages and a counter, whole or not at all. Collective along replicas for a teacher.

        Args:
            filled: what `targets` gave, now with the values of a checkpoint or, past the averaged shards, live ones.
            found: fqns that the checkpoint had; the others start from the live weights.
            num_updates: its counter.
            num_refused: live values that were left out until then, to be told by this rank; None to go on counting.
        """
        not_started = frozenset(spec.fqn for spec in self.plan.specs if spec.averaged) - found
        before = self._now.num_refused_before
        if num_refused is not None:
            before = num_refused - self._updater.num_refused
        numel = len(self.shards)
        if self.teacher is None:
            lanes = [
                Lane.of(functools.partial(averages.replace, filled[name][:numel]))
                for name, averages in self.averages.items()
            ]
        else:
            ((values, *_),) = (filled.values(),)
            pairs = self.teacher.gather(values[:numel], values[numel:])
            lanes = [Lane.of(functools.partial(copy_pairs, pairs))]
            if not_started:  # it may run forward before the next update
                lanes.append(self._updater.copying_live(not_started, counted=False))
        self._take(lanes, _Now(num_updates, None, not_started, before))

    def take_over(self, track: str, values: Sequence[torch.Tensor], num_updates: int) -> None:
        """Take over the averages of one track; the others stay, or start from the live weights of this moment.

        Collective along replicas for a teacher, as `restore`.
        """
        step, not_started = self.num_updates, self._now.not_started
        lanes = []
        if step == 0 or not_started:
            lanes = [self._updater.copying_live(None if step == 0 else not_started)]
        if self.teacher is None:
            lanes.append(Lane.of(functools.partial(self.averages[track].replace, values)))
        else:
            lanes.append(Lane.of(functools.partial(copy_pairs, self.teacher.gather(values, None))))
        self._take(lanes, _Now(num_updates, None, frozenset(), self._now.num_refused_before))

    def restart(self) -> None:
        """Forget the averages: the next update copies the live weights, as the first; a teacher has them at once."""
        count = Once(self, "_now", _Now(num_refused_before=self._now.num_refused_before))
        if self.teacher is None:
            count.call()
        else:
            self.teacher.settle()
            self._copy_live(count, [Lane.of(self.teacher.show_live)], counted=False)

    def _take(self, lanes: Sequence[Lane], now: _Now) -> None:
        self._updater.set(Job(lanes, Once(self, "_now", now)), look_later=True)

    def momentum(self, track: str) -> float:
        """The momentum of the latest update that averaged: 1 for the copy of update number 0."""
        latest = max(self.num_updates - 1, 0)
        latest -= latest % self.options.interval
        return 1.0 if latest == 0 else self._momentum(self.schedules[track], latest)

    def _momentum(self, schedule: Schedule, step: int) -> float:
        options = self.options
        return momentum_of_update(
            schedule, step, interval=options.interval, interval_correction=options.interval_correction
        )

    def _copy_live(self, count: Once | None = None, first: Sequence[Lane] = (), *, counted: bool = True) -> None:
        self._updater.set(Job([*first, self._updater.copying_live(counted=counted)], count))
        if self.teacher is not None:
            self.teacher.settle()

    def _start_from_live(self) -> None:
        """Set averages that have not started to the live values; at their next use again, until an update counts."""
        if self._now.not_started:
            self._updater.set(Job([self._updater.copying_live(self._now.not_started, counted=False)]))
            if self.teacher is not None:
                self.teacher.settle()

    def track(self, name: str | None) -> str:
        """The track of that name, or the only one.

        Raises:
            ConfigError: there is no such track, or several to choose from.
        """
        if name is None and len(self.schedules) == 1:
            return next(iter(self.schedules))
        if name is None or name not in self.schedules:
            raise ConfigError(f"track is {name!r}, expected one of {list(self.schedules)}")
        return name

    def values(self, track: str | None, fqns: Collection[str] | None = None) -> tuple[torch.Tensor, ...]:
        """The averaged values of `shards`; before the first update these are the live ones of this moment.

        With `fqns` only those of these names count.
        """
        self.use.is_given = True
        self._updater.complete()
        averages = self.averages[self.track(track)]
        step, not_started = self.num_updates, self._now.not_started
        if self.teacher is not None:  # all that hold a replica of it, not its owners alone
            if step == 0:
                self._copy_live(None, [Lane.of(self.teacher.show_live)], counted=False)
            self._start_from_live()
        elif step == 0:
            averages.copy_live(fqns)
        elif not_started:
            averages.copy_live(not_started if fqns is None else not_started.intersection(fqns))
        if step:
            self._updater.mend()
        return averages.values

    def pieces(self, track: str | None, part: Plan | None = None) -> list[tuple[Box, torch.Tensor]]:
        """Every box this rank owns and its values: the averaged ones, then those that are always shown live.

        Args:
            track: which average.
            part: what remains of `plan` (`Plan.only`), and is all that is wanted; None for the whole of it.
        """
        join_all()
        if part is None:
            self.plan.verify()
        fqns = {spec.fqn for spec in (part or self.plan).specs}
        dtypes = self.dtypes()
        averaged = zip(self.shards, self.values(track, fqns), strict=True)
        with torch.no_grad():
            # The live dtype may have changed since the plan was made (`model.to(...)`); files keep the planned one.
            live = [
                (shard.box, shard.live().to(dtypes[shard.fqn]))
                for shard in self.plan.owned(averaged=False)
                if shard.fqn in fqns
            ]
        return [(shard.box, value) for shard, value in averaged if shard.fqn in fqns] + live

    def begin(self, call: str) -> None:
        """Begin a call that uses averages or writes live weights: after all updates that run beside training.

        Raises:
            SwapError: the averaged weights are in the model.
        """
        self.refuse_while_swapped(call)
        join_all()
        self._updater.complete()

    def refuse_while_swapped(self, call: str) -> None:
        """Refuse a call that would mix up averaged and live weights.

        Raises:
            SwapError: the averaged weights are in the model.
        """
        if self.leave is not None:
            self.leave()
        if self.swapped is not None:
            raise SwapError(
                f"{call}() was called while the averaged weights of track {self.swapped!r} are in the model: leave the "
                "average_parameters() block first"
            )

    def dtypes(self, floating: torch.dtype | None = None) -> dict[str, torch.dtype]:
        """Fqn -> dtype in files and state dicts; `floating` replaces that of every floating-point tensor."""
        own = {spec.fqn: self.options.dtype if spec.averaged else spec.dtype for spec in self.plan.specs}
        if floating is None:
            return own
        return {fqn: floating if dtype.is_floating_point else dtype for fqn, dtype in own.items()}

    def manifest(self, world_size: int, floating: torch.dtype | None = None, part: Plan | None = None) -> Manifest:
        """What a checkpoint written now says of itself; `floating` as in `dtypes`, `part` as in `pieces`."""
        plan = part or self.plan
        dtypes = self.dtypes(floating)
        stored = {} if floating is None else {"dtype": dtype_name(floating)}
        return Manifest(
            num_updates=self.num_updates,
            options={**self.options.to_json(), **stored},
            tracks={name: schedule_to_json(schedule) for name, schedule in self.schedules.items()},
            tensors={
                spec.fqn: SavedTensor(spec.shape, dtype_name(dtypes[spec.fqn]), spec.averaged) for spec in plan.specs
            },
            aliases=plan.aliases,
            written_by={"dist_ema": __version__, "torch": torch.__version__, "world_size": world_size},
        )


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as the manifest spells it: "float32"."""
    return str(dtype).removeprefix("torch.")
