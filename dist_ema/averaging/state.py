"""The averages of one rank, their counter, and what may be done with them now. No communication.

`ShardedEMA` is this state plus the calls that communicate. Where the averages lie in the tensors of a teacher module,
`TeacherState` (live/teacher_state.py) takes the place of this class, and overrides the methods that differ; two of its
methods communicate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch

from dist_ema.averaging.averages import Averages, copy_pairwise
from dist_ema.averaging.counting.now import BEGUN_TOGETHER, LIVE, Beginnings, KeptBuffers, Now, start_at
from dist_ema.averaging.counting.skipped_steps import LateFlag
from dist_ema.averaging.streams import Stream, join_all, stream_beside
from dist_ema.averaging.update import Updater
from dist_ema.averaging.usage import Use
from dist_ema.boxes.plan import Plan
from dist_ema.boxes.shards import Box, Shard
from dist_ema.errors import ConfigError, SwapError
from dist_ema.options import Options, with_floating
from dist_ema.schedules.base import Schedule, momentum_of_update
from dist_ema.schedules.records import is_known
from dist_ema.uninterrupted.jobs import Job, Lane, Once
from dist_ema.uninterrupted.modes import without_gradients

__all__ = ["AveragedState"]


class AveragedState:
    """All tracks of a `ShardedEMA` on this rank.

    Attributes:
        plan: the model as boxes.
        options: the options of the user.
        schedules: track name -> schedule.
        shards: the boxes whose average this rank keeps.
        averages: track name -> averaged values; empty until `allocate`.
        use: what has been done with the averages.
        takes_buffers: whether buffers can be kept with the averages.
        takes_tracks: whether tracks may come and go.
        repeats: whether an update may be made of the steps of the latest one.
    """

    takes_buffers = True
    takes_tracks = True
    repeats = True

    def __init__(self, plan: Plan, options: Options, schedules: Mapping[str, Schedule]) -> None:
        self.plan = plan
        self.options = options
        self.schedules = dict(schedules)
        self.shards = plan.owned(averaged=True)
        self.averages: Mapping[str, Averages] = {}
        self.use = Use()
        self.batch_size: float | None = None  # of the next updates, and of the latest one
        self._updater = Updater((), ())
        self._swapped: str | None = None
        self._leave: Callable[[], None] | None = None
        self.is_streamed = False
        self._watches_momenta = _may_differ(self.schedules)
        # It is replaced as a whole by one assignment, so that its fields always agree.
        self._now = Now()

    def allocate(self) -> None:
        """Allocate the averaged values."""
        self.averages = {name: self.new_averages() for name in self.schedules}
        tracks = list(self.averages.values())
        skip = self.options.skip_nonfinite
        self._updater = Updater(self.shards, tracks, skip_nonfinite=skip, stream=self._stream(tracks))

    def new_averages(self) -> Averages:
        """Memory for one more track."""
        options = self.options
        residual_dtype = torch.bfloat16 if options.compensated else None
        return Averages(self.shards, dtype=options.dtype, device=options.device, residual_dtype=residual_dtype)

    def _stream(self, tracks: Sequence[Averages]) -> Stream:
        if not self.options.overlap:
            return Stream()
        averaged = {value.device for track in tracks for value in track.values}
        return stream_beside({shard.observed().device for shard in self.shards}, averaged)

    def join(self) -> None:
        """Have the current stream do its further work after an update that runs beside training."""
        self._updater.stream.join()

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which must not begin before averages and counter are up to date."""
        self.join()
        self._updater.complete()
        _ = self.num_updates  # takes a skipped step back; the event of its flag could not be copied
        return self.__dict__ | {"is_streamed": False}  # a stream goes on with the original

    def stop_overlapping(self) -> None:
        """Run further updates in line."""
        try:
            self.join()
        finally:
            self._updater.stream = Stream()

    @property
    def num_updates(self) -> int:
        """The number of updates so far, without those of skipped steps."""
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
        """How many live values were left out on this rank; waits for the device."""
        return self._now.num_refused_before + self._updater.num_refused

    def update(self, found_inf: torch.Tensor | None) -> None:
        """One update of all tracks: see `ShardedEMA.update`. Whole or not at all: see [Note: interrupts]."""
        self._updater.complete()
        step = self.num_updates
        first = self._begin_update()
        flag = None if found_inf is None else LateFlag(found_inf)
        now = self._now.after_update(step, flag)
        # All momenta come before the first lerp: a schedule that fails must not leave the tracks at odds.
        if step == 0:
            self._copy_live(Once(self, "_now", now), first)
        elif now.starts:
            self._update_tracks_apart(step, now, found_inf, first)
        elif step % self.options.interval == 0:
            momenta = [self._momentum(schedule, step) for schedule in self.schedules.values()]
            self._start_from_live()
            self._updater.lerp(momenta, self._counting(now, momenta), unless=found_inf, first=first)
        else:
            self._only_count(Once(self, "_now", now), first)

    def update_again(self) -> bool:
        """One update, whole or not at all, if it can be made of the steps of the latest one. No communication.

        Gradients may be on. So it is for schedules of this package alone: those of users may be anything, and change
        the model.

        Returns:
            Whether it is done; else nothing is, and `update` does it.
        """
        now = self._now
        step = now.num_updates
        may_repeat = self.repeats and now.is_ordinary and not self._watches_momenta
        if not may_repeat or step % self.options.interval or not self._updater.can_repeat():
            return False
        momenta = list(map(self._momentum, self.schedules.values(), repeat(step)))
        now = now.after_update(step, None)
        if 0.0 in momenta:
            without_gradients(partial(self._updater.lerp, momenta, Once(self, "_now", now)))
        else:
            self._updater.repeat(momenta, partial(setattr, self, "_now", now))
        return True

    def _counting(self, now: Now, momenta: Sequence[float]) -> Once:
        """Sets the counters of an update with these momenta."""
        return Once(self, "_now", now.with_momenta(momenta) if self._watches_momenta else now)

    @property
    def progress(self) -> dict[str, int]:
        """What must be alike on all ranks: the number of updates and, where users give them, their momenta."""
        momenta = (
            {"momenta so far (made of batch_size=, or by a schedule of your own; checksums)": self._now.momenta}
            if self._watches_momenta
            else {}
        )
        return {"num_updates": self.num_updates, **momenta}

    def _update_tracks_apart(self, step: int, now: Now, found_inf: torch.Tensor | None, first: Sequence[Lane]) -> None:
        """An update where tracks have numbers of their own: see [Note: tracks that begin later]."""
        interval = self.options.interval
        own = [self._now.own_number(track, step) for track in self.schedules]
        self.use.first_start = step - own[0]
        if all(number % interval for number in own):
            self._only_count(Once(self, "_now", now), first)
            return
        momenta = [
            0.0 if number == 0 or number % interval else self._momentum(schedule, number)
            for schedule, number in zip(self.schedules.values(), own, strict=True)
        ]
        self._start_from_live()
        beginning = [index for index, number in enumerate(own) if number == 0]
        count = self._counting(now, momenta)
        self._updater.lerp(momenta, count, unless=found_inf, first=first, beginning=beginning)

    def _only_count(self, count: Once, first: Sequence[Lane]) -> None:
        """An update that `interval` leaves out."""
        if self._now.not_started:
            self._updater.set(Job([*first, self._updater.copying_live(self._now.not_started)], count))
        else:
            self._updater.run(Job(first, count))

    def _begin_update(self) -> list[Lane]:
        """The lanes that an update does first, besides its own work."""
        return []

    @property
    def to_load(self) -> tuple[Shard, ...]:
        """The shards that a load reads from a checkpoint, the averaged ones first."""
        return self.shards

    @property
    def fqns_to_load(self) -> set[str]:
        """The names of the tensors that `to_load` has on any rank."""
        return {spec.fqn for spec in self.plan.specs if spec.averaged}

    def targets(self) -> dict[str, Sequence[torch.Tensor]]:
        """The tensors to read a checkpoint into, per track and shard of `to_load`, before it is known to be good.

        Before the first update the averages have no value that counts (`values` shows the live weights): they are
        filled in place, and a resume needs no memory. Later a load needs a second copy, on the host, until `restore`.
        """
        if self.num_updates == 0 and not self._now.kept:
            return {name: averages.values for name, averages in self.averages.items()}
        return {name: self._host_copies() for name in self.averages}

    def _host_copies(self) -> Sequence[torch.Tensor]:
        """New tensors on the host for one track."""
        return [torch.empty(shard.sizes, dtype=self.options.dtype, device="cpu") for shard in self.shards]

    def restore(
        self,
        filled: Mapping[str, Sequence[torch.Tensor]],
        fqns: set[str],
        num_updates: int,
        *,
        num_refused: int | None = None,
        buffers: Mapping[str, Mapping[Box, torch.Tensor]] | None = None,
        beginnings: Beginnings = BEGUN_TOGETHER,
    ) -> None:
        """Take over averages and a counter, whole or not at all.

        Args:
            filled: the tensors of `targets`, with the values of a checkpoint; of the shards behind the averaged ones
                they may be the live values. Tracks that begin at the live weights need none.
            fqns: the names in the checkpoint; the averages of the others start from the live weights.
            num_updates: the counter of the checkpoint.
            num_refused: how many live values were left out until then, for this rank to count; None to go on counting.
            buffers: track -> box -> values of the buffers that were saved as kept with its average.
            beginnings: the tracks that have not begun with the average.
        """
        not_started = frozenset(spec.fqn for spec in self.plan.specs if spec.averaged) - fqns
        before = self._now.num_refused_before if num_refused is None else num_refused - self._updater.num_refused
        kept = {track: KeptBuffers(num_updates, values) for track, values in (buffers or {}).items()}
        self.use.tracks_with_buffers |= kept.keys()
        now = Now(num_updates, None, not_started, before, kept, beginnings.starts, beginnings.begun_at)
        self._take(self._replacing_all(filled, not_started), now)

    def _replacing_all(self, filled: Mapping[str, Sequence[torch.Tensor]], not_started: Collection[str]) -> list[Lane]:
        """Lanes that set all averages to the filled `targets`; those of the names `not_started` are set later."""
        return [self._replacing(name, values) for name, values in filled.items()]

    def _replacing(self, track: str, values: Sequence[torch.Tensor]) -> Lane:
        """The lane that sets the averages of one track."""
        return Lane.of(partial(self.averages[track].replace, values))

    def take_over(self, track: str, values: Sequence[torch.Tensor], num_updates: int) -> None:
        """Take over the averages of one track; the others stay, or start from the live weights of now."""
        step, not_started = self.num_updates, self._now.not_started
        lanes = []
        if step == 0 or not_started:
            lanes = [self._updater.copying_live(None if step == 0 else not_started)]
        unbegun = [index for index, name in enumerate(self.schedules) if step and not self.count_of(name)]
        if unbegun:
            lanes.append(self._updater.copying_live(tracks=unbegun, counted=False))
        lanes.append(self._replacing(track, values))
        self._take(lanes, self._now.counted_anew(num_updates))

    def add_track(self, name: str, schedule: Schedule, averages: Averages, start: str) -> None:
        """Average one more track from the next update on, whole or not at all.

        Args:
            name: the name of the track, which no other one has.
            schedule: its schedule.
            averages: its memory (`new_averages`).
            start: "live", or the track at whose values it begins.
        """
        num_updates, now = self.num_updates, self._now
        live = start == LIVE or self.count_of(start) == 0  # the average of no update is the live model
        if not live:
            is_given = self.use.is_given
            averages.replace(self.values(start))
            self.use.is_given = is_given
            if (kept := self.kept_buffers(start)) is not None:
                now = now._replace(kept={**self._now.kept, name: kept._replace(num_updates=num_updates)})
                self.use.tracks_with_buffers.add(name)
            now = now._replace(begun_at={**now.begun_at, name: start})
        first = start_at(num_updates, live=live)
        if first:
            now = now._replace(starts={**now.starts, name: first})
        self._set_tracks({**self.schedules, name: schedule}, {**self.averages, name: averages}, now)

    def drop_track(self, name: str) -> None:
        """Average a track no more, and free its memory."""
        schedules = {track: schedule for track, schedule in self.schedules.items() if track != name}
        averages = {track: self.averages[track] for track in schedules}
        _ = self.num_updates  # takes a skipped step back
        self._set_tracks(schedules, averages, self._now.without(name))

    def _set_tracks(self, schedules: dict[str, Schedule], averages: Mapping[str, Averages], now: Now) -> None:
        self._updater.complete()
        updater = self._updater.of_tracks(list(averages.values()))
        # One call of C, so that an interrupt finds the former tracks or the new ones.
        self.use.first_start = 0  # the next update tells, if it is another number
        watches = _may_differ(schedules)
        self.__dict__.update(
            schedules=schedules, averages=averages, _updater=updater, _watches_momenta=watches, _now=now
        )

    @property
    def beginnings(self) -> Beginnings:
        """The tracks that have not begun with the average."""
        return Beginnings(self._now.starts, self._now.begun_at)

    def own_number(self, track: str, step: int) -> int:
        """The number that an update of the average has for a track."""
        return self._now.own_number(track, step)

    def count_of(self, track: str) -> int:
        """The number of updates of a track: that of the average, less those before it began."""
        return self._now.own_number(track, self.num_updates)

    def restart(self) -> None:
        """Forget the averages: the next update copies the live weights, as the first does."""
        self._forgetting().call()

    def _forgetting(self) -> Once:
        self.use.is_begun_on_purpose, self.use.first_start = True, 0
        return Once(self, "_now", Now(num_refused_before=self._now.num_refused_before))

    def _take(self, lanes: Sequence[Lane], now: Now) -> None:
        self.use.is_begun_on_purpose, self.use.first_start = True, 0
        self._updater.set(Job(lanes, Once(self, "_now", now)), look_later=True)

    def momentum(self, track: str) -> float:
        """The momentum of the latest update that averaged: 1 for the copy of update number 0; nan if unknown."""
        latest = self._now.latest_averaging(track, max(self.num_updates - 1, 0), self.options.interval)
        own = self._now.own_number(track, latest)
        if own <= 0:
            return 1.0
        schedule = self.schedules[track]
        is_unknown = self.batch_size is None and hasattr(schedule, "momentum_for")  # of a run before a resume
        return math.nan if is_unknown else self._momentum(schedule, own)

    def _momentum(self, schedule: Schedule, step: int) -> float:
        options = self.options
        return momentum_of_update(
            schedule,
            step,
            interval=options.interval,
            interval_correction=options.interval_correction,
            batch_size=self.batch_size,
        )

    def _copy_live(self, count: Once | None = None, first: Sequence[Lane] = (), *, counted: bool = True) -> None:
        self._updater.set(Job([*first, self._updater.copying_live(counted=counted)], count))

    def _start_from_live(self) -> None:
        """Set averages that have not started to the live values. Each use does so again, until an update counts."""
        if self._now.not_started:
            self._updater.set(Job([self._updater.copying_live(self._now.not_started, counted=False)]))

    def track(self, name: str | None) -> str:
        """The name of the track; for None that of the only one.

        Raises:
            ConfigError: there is no such track, or several to choose from.
        """
        if name is None and len(self.schedules) == 1:
            return next(iter(self.schedules))
        if not isinstance(name, str) or name not in self.schedules:
            raise ConfigError(f"track is {name!r}, expected one of {list(self.schedules)}")
        return name

    def values(self, track: str | None, fqns: Collection[str] | None = None) -> tuple[torch.Tensor, ...]:
        """The averaged values of `shards`; before the first update these are the live ones of now.

        With `fqns`, only the values of these names are valid.
        """
        self.use.is_given = True
        self._updater.complete()
        track = self.track(track)
        averages = self.averages[track]
        self._show_live(track, self._not_kept(track, fqns))
        if self.num_updates:
            self._updater.mend()
        return averages.values

    def _show_live(self, track: str, fqns: Collection[str] | None) -> None:
        """Set averages that have not started to the live values of now; with `fqns` only those of these names."""
        averages, not_started = self.averages[track], self._now.not_started
        if self.count_of(track) == 0:
            averages.copy_live(fqns)
        elif not_started:
            averages.copy_live(not_started if fqns is None else not_started.intersection(fqns))

    def _not_kept(self, track: str, fqns: Collection[str] | None) -> Collection[str] | None:
        """The names, or all (None), without those of averaged buffers whose values a swap has kept."""
        if self.kept_buffers(track) is None:
            return fqns
        shown = {spec.fqn for spec in self.plan.specs if not (spec.averaged and spec.is_buffer)}
        return shown if fqns is None else shown.intersection(fqns)

    def kept_buffers(self, track: str) -> KeptBuffers | None:
        """The buffers that are kept with the average of a track; None where it shows the live ones.

        They fit the averaged weights of the moment when they were kept. They count until an update moves these: one
        that `interval` leaves out does not, nor a step that was skipped.
        """
        latest = self.num_updates - 1  # it takes a skipped step back, so these updates were made
        kept = self._now.kept.get(track)
        if kept is None or latest < 0:
            return kept
        if self._now.latest_averaging(track, latest, self.options.interval) >= kept.num_updates:
            self._now = self._now._replace(kept={name: it for name, it in self._now.kept.items() if name != track})
            return None
        return kept

    def shown_buffers(self, track: str | None) -> Mapping[Box, torch.Tensor]:
        """Box -> values of the kept buffers of a track, as far as this rank holds them; within its swap the model's."""
        track = self.track(track)
        kept = None if self._swapped == track else self.kept_buffers(track)
        return {} if kept is None else kept.values

    def keep_buffers(
        self, track: str, values: Mapping[Box, torch.Tensor], averaged: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Keep buffers with the average of a track.

        Args:
            track: the name of the track.
            values: box -> the values, which are not changed later, of all that this rank holds and does not average.
            averaged: pairs of an averaged value of a buffer (or what rounding took of it) and what replaces it.
        """
        kept = {**self._now.kept, track: KeptBuffers(self.num_updates, values)}
        copy = partial(copy_pairwise, [pair[0] for pair in averaged], [pair[1] for pair in averaged])
        self._updater.set(Job([Lane.of(copy)], Once(self, "_now", self._now._replace(kept=kept))))
        self.use.tracks_with_buffers.add(track)

    def pieces(self, track: str | None, part: Plan | None = None) -> list[tuple[Box, torch.Tensor]]:
        """Every box this rank owns and its values: the averaged boxes, then those that always show the live values.

        Args:
            track: the name of the average; None for the only one.
            part: the part of `plan` that is wanted (`Plan.only`); None for the whole plan.
        """
        join_all()
        fqns = {spec.fqn for spec in (part or self.plan).specs}
        dtypes = self.dtypes()
        kept = self.shown_buffers(track)
        averaged = zip(self.shards, self.values(track, fqns), strict=True)
        with torch.no_grad():
            # The live dtype may have changed since the plan was made (`model.to(...)`); files keep the planned one.
            live = [
                (shard.box, shard.within(kept.get(shard.held.box, shard.held.values())).to(dtypes[shard.fqn]))
                for shard in self.plan.owned(averaged=False)
                if shard.fqn in fqns
            ]
        return [(shard.box, value) for shard, value in averaged if shard.fqn in fqns] + live

    def live_pieces(self, part: Plan) -> list[tuple[Box, torch.Tensor]]:
        """Every box this rank owns of a part of the plan, and its live values, as an update would see them."""
        join_all()
        fqns = {spec.fqn for spec in part.specs}
        with torch.no_grad():
            averaged = [(shard.box, shard.observed().detach()) for shard in self.shards if shard.fqn in fqns]
            others = [(shard.box, shard.live().detach()) for shard in self.plan.owned(averaged=False)]
        return averaged + [(box, value) for box, value in others if box.fqn in fqns]

    def begin(self, call: str) -> None:
        """Begin a call that uses averages or writes live weights: after all updates that run beside training.

        Raises:
            SwapError: the averaged weights are in the model.
        """
        self.refuse_while_swapped(call)
        join_all()
        self._updater.complete()

    def check_model(self) -> None:
        """Refuse a model that is not as it was planned.

        Raises:
            ModelChangedError: the model has other modules, names or shapes.
        """
        self.plan.check_model()

    @property
    def swapped(self) -> str | None:
        """The track whose averaged weights are in the model, or None."""
        return self._swapped

    def swap_in(self, track: str) -> None:
        """Record that the averaged weights of a track are in the model."""
        self._swapped = track

    def swap_ends_by(self, leave: Callable[[], None]) -> None:
        """Record that the end of the swap has begun; if an interrupt cuts it off, the next call calls `leave`."""
        self._leave = leave

    @property
    def is_swap_ending(self) -> bool:
        """Whether the end of a swap has begun, and `swap_out` was not called."""
        return self._leave is not None

    def swap_out(self) -> None:
        """Record that the live weights are in the model."""
        self._swapped = None
        self._leave = None

    def refuse_while_swapped(self, call: str) -> None:
        """Refuse a call that would mix up averaged and live weights, or the averages of two updates in a stream.

        Raises:
            SwapError: the averaged weights are in the model, or are being streamed.
        """
        if self._leave is not None:
            self._leave()
        if self._swapped is not None:
            raise SwapError(
                f"{call}() was called while the averaged weights of track {self._swapped!r} are in the model: leave "
                "the average_parameters() block first"
            )
        if self.is_streamed:
            raise SwapError(f"{call}() was called within a stream of whole_tensors(): exhaust it, or call its close()")

    def dtypes(self, floating: torch.dtype | None = None) -> dict[str, torch.dtype]:
        """Fqn -> dtype in files and state dicts; `floating` replaces that of every floating-point tensor."""
        own = {spec.fqn: self.options.dtype if spec.averaged else spec.dtype for spec in self.plan.specs}
        return with_floating(own, floating)

    def live_dtypes(self, floating: torch.dtype | None = None) -> dict[str, torch.dtype]:
        """As `dtypes`, of the live weights."""
        return with_floating({spec.fqn: spec.dtype for spec in self.plan.specs}, floating)


def _may_differ(schedules: Mapping[str, Schedule]) -> bool:
    """Whether the momenta are made of what each rank gives: a batch size, or a schedule of the user's own."""
    return any(hasattr(schedule, "momentum_for") or not is_known(schedule) for schedule in schedules.values())
