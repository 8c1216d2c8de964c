"""The update that moves the averages of this rank. No communication, ever.

Live values of the averages' dtype and device are averaged in place by one `_foreach_lerp_` over prepared lists. Others
(bfloat16 weights into float32 averages, averages kept on another device) pass through a bounded scratch; so do many
tiny tensors on a CPU, which are packed end to end. Several tracks go block by block, so that a block of live values is
read from memory once and from the cache after that. On several CPU threads blocks are shared out (cpu_threads.py).
Blocks that come from a device into host memory are fetched one ahead. An update may run beside training (streams.py).

An update is a job (uninterrupted/jobs.py): all of its steps are done, or none. Where nothing but the momenta changes,
the steps of the latest update are done again. Tensors that may have infinities are watched (infinities.py), and
averaged with care.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from dist_ema.averaging.averages import Averages
from dist_ema.averaging.infinities import Watch, masks_of
from dist_ema.averaging.moves import Moves, adding_up
from dist_ema.averaging.prepared_update import Prepared
from dist_ema.averaging.streams import Stream
from dist_ema.boxes.shards import Shard
from dist_ema.errors import SwapError
from dist_ema.uninterrupted.jobs import InLine, Job, Lane, Once, Steps, is_within
from dist_ema.uninterrupted.modes import made_for_any_mode

__all__ = ["Updater"]


# Errors of torch and Python where there is no memory, or no such operation on a device: then the next update looks.
_NO_ROOM = (MemoryError, RuntimeError, NotImplementedError, torch.OutOfMemoryError)


class Updater:
    """Moves the averages of all tracks towards the live values.

    Args:
        shards: the shards of the averages.
        tracks: the averages, all of one dtype and on the same devices.
        skip_nonfinite: whether live values that are infinite or not a number are left out, element by element.
        uncounted: names of tensors of which another rank counts what is left out.
        stream: the stream on which the averages are moved; None for the current one.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        tracks: Sequence[Averages],
        *,
        skip_nonfinite: bool = False,
        uncounted: Collection[str] = (),
        stream: Stream | None = None,
    ) -> None:
        self._shards = tuple(shards)
        self._tracks = tuple(tracks)
        self._skip_nonfinite = skip_nonfinite
        self._uncounted = frozenset(uncounted) if skip_nonfinite else frozenset()
        self.stream = Stream() if stream is None else stream
        self._refused: dict[torch.device, torch.Tensor] = {}
        self._moves = Moves(
            len(self._tracks),
            skip_nonfinite=skip_nonfinite,
            compensated=any(track.residuals for track in self._tracks),
            counter=self._counter,
        )
        self._prepared: Prepared | None = None
        self._watch = Watch(self._shards, self._tracks, is_free=skip_nonfinite)
        self._begun: Job | InLine | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which prepares its own lists; the events of these could not be copied."""
        self.complete()
        return self.__dict__ | {"_prepared": None}

    def of_tracks(self, tracks: Sequence[Averages]) -> Updater:
        """One that moves other tracks of the same shards, on the same stream, and goes on counting what is left out."""
        other = Updater(
            self._shards,
            tracks,
            skip_nonfinite=self._skip_nonfinite,
            uncounted=self._uncounted,
            stream=self.stream,
        )
        other._refused = self._refused
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of all averages on this rank."""
        return sum(track.nbytes for track in self._tracks)

    @property
    def num_refused(self) -> int:
        """How many live values were left out on this rank; waits for the device."""
        self.stream.join()
        return sum(int(count.item()) for count in self._refused.values())

    def complete(self) -> None:
        """Do what two exceptions in a row have left undone of the latest job. No communication.

        Raises:
            SwapError: the job is not left, but under way beneath this call, which a signal handler makes.
        """
        job = self._begun
        if job is not None:
            if job.is_left:
                if is_within(job):
                    raise SwapError(
                        "a signal handler has called the average in the middle of its update, where a part has moved "
                        "and a part has not: let the handler set a flag, and look at it after update()"
                    )
                job.finish(again=True)
            self._begun = None

    def run(self, job: Job) -> None:
        """Do a job in line, after what `stream` has been given: it is whole, whatever is raised meanwhile."""
        self.stream.join()
        self._run(Stream(), job)

    def set(self, job: Job, *, look_later: bool = False) -> None:
        """As `run`, for a job that sets averages otherwise than by an update.

        Args:
            job: the job that sets the averages.
            look_later: whether the next update looks for infinities, where it need not wait for a device.
        """
        self._watch.forget()
        self.run(job)
        if look_later and all(value.device.type == "cpu" for track in self._tracks for value in track.values):
            return
        mode = torch.is_grad_enabled()
        try:
            self._watch.look()
        except Exception as error:
            torch.set_grad_enabled(mode)  # see ranks/calls.py
            if type(error) not in _NO_ROOM:  # what a signal handler raises goes on
                raise

    def mend(self) -> None:
        """Before averages are used: see `dist_ema.averaging.infinities`."""
        self._watch.mend()

    def _run(self, stream: Stream, job: Job) -> None:
        self._begun = job
        try:
            try:
                stream.run(job)
                job.count()
            except BaseException:
                job.withdraw()
                raise
        except BaseException:  # a second one, before the first was dealt with
            job.withdraw()
            raise
        self._begun = None

    @torch.no_grad()
    def copy_live(self, fqns: Collection[str] | None = None, *, counted: bool = True) -> None:
        """Set all averages, or those of these names, to the live values; 0 for those left out. No communication.

        Args:
            fqns: names of tensors; None for all.
            counted: whether what is left out counts; it does not where the next update copies again.
        """
        self.set(Job([self.copying_live(fqns, counted=counted)]))

    def copying_live(
        self, fqns: Collection[str] | None = None, *, tracks: Sequence[int] | None = None, counted: bool = True
    ) -> Lane:
        """The lane that does what `copy_live` does, for a job of `set`; `tracks` are the indices of some tracks."""
        copied = self._tracks if tracks is None else [self._tracks[index] for index in tracks]
        return Lane(lambda worker: self._steps_of_copy(copied, fqns, counted=counted))

    def _steps_of_copy(self, tracks: Sequence[Averages], fqns: Collection[str] | None, *, counted: bool) -> Steps:
        steps = Steps()
        refused: dict[torch.device, list[torch.Tensor]] = {}

        def copy() -> None:
            refused.clear()
            for track in tracks:
                track.copy_live(fqns)
            for shard, *values in zip(self._shards, *(track.values for track in tracks), strict=True):
                if self._skip_nonfinite and (fqns is None or shard.fqn in fqns):
                    # A mask that never moved is no overflow.
                    taken = ~values[0].isnan() if masks_of(shard) else values[0].isfinite()
                    if shard.fqn not in self._uncounted:
                        refused.setdefault(taken.device, []).append((~taken).sum())
                    for value in values:
                        value.masked_fill_(~taken, 0.0)

        steps.again(copy)
        if self._skip_nonfinite and counted:
            for device in {value.device for track in self._tracks[:1] for value in track.values}:
                counter = self._counter(device)
                count = torch.zeros_like(counter)
                steps.again(partial(adding_up, count, refused))
                steps.once(partial(counter.add_, count), counter)
        return steps

    def _counter(self, device: torch.device) -> torch.Tensor:
        if device not in self._refused:
            with made_for_any_mode():
                counter = torch.zeros((), dtype=torch.int64, device=device)
            self.stream.keep([counter])
            self._refused[device] = counter
        return self._refused[device]

    def lerp(
        self,
        momenta: Sequence[float],
        count: Once | None = None,
        *,
        unless: torch.Tensor | None = None,
        first: Sequence[Lane] = (),
        beginning: Sequence[int] = (),
    ) -> None:
        """Average: `averaged <- (1 - momentum) * averaged + momentum * live`. No communication.

        The caller has turned gradients off. It is done when `stream` is joined; until then no work may write to the
        live values.

        Args:
            momenta: for every track the weight of the live values, from 0 to 1.
            count: counts the update.
            unless: a flag of one element; if it is not 0 nothing moves. Only the device reads it.
            first: further lanes of the same job.
            beginning: indices of tracks that are set to the live values, in line; their momenta are 0.
        """
        moves = any(momenta)
        if beginning:
            # What is left out of the live values counts once, where another track is averaged.
            first = [*first, self.copying_live(tracks=beginning, counted=not moves)]
        if not moves and beginning:
            self.set(Job(first, count))
            return
        if not moves:
            self._run(Stream(), Job(first, count))
            return
        prepared = self._ready(flagged=unless is not None)
        flag = None if unless is None else self.stream.flag_of_now(unless)
        lanes = self._moves.lanes(prepared, momenta, flag)
        if first or self._watch.due:
            looks = [Lane(partial(self._steps_of_look, self._watch.due))] if self._watch.due else []
            lanes = [*first, *lanes, *looks]
        stream = self.stream
        if beginning:
            stream.join()
            stream = Stream()
            self._watch.forget()  # the next update looks at what is copied now
        self._run(stream, Job(lanes, count, prepared.share))

    def can_repeat(self) -> bool:
        """Whether the next update may be made of the latest one's steps, and the momenta alone may differ.

        No communication. The memory of all tensors is compared.
        """
        kept = self._moves.kept
        return (
            kept is not None
            and kept.prepared is self._prepared
            and self._begun is None
            and self.stream.is_in_line
            and self._watch.is_idle
            and kept.prepared.is_current(flagged=False)
        )

    def repeat(self, momenta: Sequence[float], count: Callable[[], Any]) -> None:
        """As `lerp`, at once after `can_repeat`, and with gradients or without. No communication.

        Args:
            momenta: as in `lerp`; none of them is 0.
            count: a call of C that counts the update, and may be made again.
        """
        self._begun = job = InLine(self._moves.kept_steps(momenta), count)
        job()
        self._begun = None

    def _ready(self, *, flagged: bool) -> Prepared:
        prepared = self._prepared
        if prepared is None or not prepared.is_current(flagged=flagged):
            prepared = None
            self._watch.follow()
        watched = self._watch.watched()
        if prepared is None or prepared.watched != watched:
            self._prepared = prepared = None  # its memory is freed before the new memory is made
            self._moves.forget()
            prepared = Prepared(
                self._shards,
                self._tracks,
                skip_nonfinite=self._skip_nonfinite,
                uncounted=self._uncounted,
                watched=watched,
                flagged=flagged,
            )
            self.stream.keep(prepared.used())
            self._prepared = prepared
        return prepared

    def _steps_of_look(self, due: Mapping[int, Any], worker: int) -> Steps:
        steps = Steps()
        steps.again(partial(self._watch.look_again, due))
        return steps
