"""The averages of one rank that lie in the tensors of a teacher.

`restore` and `take_over` are collective along replicas: after these the teacher of every rank holds the averages. All
else communicates nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from dist_ema.averaging.averages import Averages
from dist_ema.averaging.state import AveragedState
from dist_ema.averaging.streams import Stream, join_all
from dist_ema.averaging.update import Updater
from dist_ema.boxes.shards import Shard
from dist_ema.live.teacher import Teacher, TeacherAverages, copy_pairs
from dist_ema.options import Options
from dist_ema.schedules.base import Schedule
from dist_ema.uninterrupted.jobs import Job, Lane, Once

__all__ = ["TeacherState"]


class _RoundingUpdater(Updater):
    """Moves averages that are kept beside a teacher of a coarser dtype, and rounds them into it.

    Args:
        teacher: the teacher.
        shards: as of `Updater`.
        tracks: as of `Updater`.
        options: as of `Updater`.
    """

    def __init__(self, teacher: Teacher, shards: Sequence[Shard], tracks: Sequence[Averages], **options: Any) -> None:
        super().__init__(shards, tracks, **options)
        self._teacher = teacher

    def complete(self) -> None:
        """As `Updater.complete`; the teacher shows what it has left."""
        was_begun = self._begun is not None
        super().complete()
        if was_begun:
            self._show()

    def mend(self) -> None:
        """As `Updater.mend`; the teacher shows what was mended."""
        super().mend()
        self._show()

    def _run(self, stream: Stream, job: Job) -> None:
        try:
            super()._run(stream, job)
        finally:  # the averages have moved, whatever was raised
            try:
                self._show()
            except BaseException:
                self._show()
                raise

    def _show(self) -> None:
        Job([Lane.of(self._teacher.show_averaged)])()


class TeacherState(AveragedState):
    """The one track of an average that a teacher holds.

    Every rank averages all that it holds of the teacher, not only what it owns. The owners write the files.

    Args:
        teacher: the module that holds the averages.
        options: the options of the user.
        schedules: the track name -> its schedule; one entry.
    """

    takes_buffers = False  # every update gives the teacher the live ones
    takes_tracks = False
    repeats = False  # every update begins with `_begin_update`

    def __init__(self, teacher: Teacher, options: Options, schedules: Mapping[str, Schedule]) -> None:
        super().__init__(teacher.plan, options, schedules)
        self._teacher = teacher

    def allocate(self) -> None:
        """Copy the model to the teacher."""
        teacher, skip = self._teacher, self.options.skip_nonfinite
        if teacher.is_rounded:
            teacher.keep(Averages(teacher.whole_shards, dtype=self.options.dtype, device=None).values)
        self.averages = {name: TeacherAverages(self.shards, teacher) for name in self.schedules}
        everything = TeacherAverages(teacher.whole_shards, teacher)
        kind = functools.partial(_RoundingUpdater, teacher) if teacher.is_rounded else Updater
        self._updater = kind(teacher.whole_shards, [everything], skip_nonfinite=skip, uncounted=teacher.repeated)
        self._copy_live(None, [Lane.of(teacher.show_live)], counted=False)

    def _begin_update(self) -> list[Lane]:
        join_all()  # an average of the teacher may still read its tensors
        self._teacher.drop_gathered()
        return [Lane.of(self._teacher.show_live)]

    @property
    def to_load(self) -> tuple[Shard, ...]:
        """The averaged shards, then the shards of the teacher's other tensors."""
        return self.shards + self._teacher.shown.owned(averaged=False)

    @property
    def fqns_to_load(self) -> set[str]:
        """The names of the tensors that `to_load` has on any rank."""
        return super().fqns_to_load | {spec.fqn for spec in self._teacher.shown.specs}

    def targets(self) -> dict[str, Sequence[torch.Tensor]]:
        """As `AveragedState.targets`; always a second copy on the host, since a teacher is always in use."""
        # A file has the bytes row by row, whatever the memory format of the live tensors (channels_last, say).
        shown = [
            shard.live().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for shard in self.to_load[len(self.shards) :]
        ]
        return {name: [*self._host_copies(), *shown] for name in self.averages}

    def _replacing_all(self, filled: Mapping[str, Sequence[torch.Tensor]], not_started: Collection[str]) -> list[Lane]:
        (values,) = filled.values()  # of the one track
        num_averaged = len(self.shards)
        pairs = self._teacher.gather(values[:num_averaged], values[num_averaged:])
        lanes = [Lane.of(functools.partial(copy_pairs, pairs))]
        if not_started:  # the teacher may run forward before the next update
            lanes.append(self._updater.copying_live(not_started, counted=False))
        return lanes

    def _replacing(self, track: str, values: Sequence[torch.Tensor]) -> Lane:
        return Lane.of(functools.partial(copy_pairs, self._teacher.gather(values, None)))

    def restart(self) -> None:
        """Forget the averages: the teacher is a copy of the model at once."""
        self._teacher.drop_gathered()
        self._copy_live(self._forgetting(), [Lane.of(self._teacher.show_live)], counted=False)

    def _copy_live(self, count: Once | None = None, first: Sequence[Lane] = (), *, counted: bool = True) -> None:
        super()._copy_live(count, first, counted=counted)
        self._teacher.drop_gathered()

    def _start_from_live(self) -> None:
        super()._start_from_live()
        if self._now.not_started:
            self._teacher.drop_gathered()

    def _show_live(self, track: str, fqns: Collection[str] | None) -> None:
        # Every rank that holds a replica of the teacher copies, not its owners alone.
        if self.num_updates == 0:
            self._copy_live(None, [Lane.of(self._teacher.show_live)], counted=False)
        self._start_from_live()
