"""What changes with each update, besides the averages: the counters, and what has not begun. No communication.

[Note: tracks that begin later]
`num_updates` counts the updates of the average. A track that was added to a run counts from its own start: update
number k of the average is update number k - start of the track, and everything that depends on the number of an update
(the momentum, `interval`, the first copy) takes that. A track that begins at the live weights has its update number 0
at the next update, which copies; so it is, bit for bit, an average that was built at that moment. A track that begins
at the values of another one has them for its update number 0: its next update is number 1.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from dist_ema.averaging.counting.skipped_steps import LateFlag
from dist_ema.boxes.shards import Box

__all__ = ["BEGUN_TOGETHER", "LIVE", "Beginnings", "KeptBuffers", "Now", "start_at"]

# What a new track begins at, besides the names of tracks.
LIVE = "live"


class KeptBuffers(NamedTuple):
    """Buffers that belong to the averaged weights of one track, in place of the live ones, until these weights move.

    Attributes:
        num_updates: the counter when they were kept.
        values: box -> the values, of what this rank holds of the buffers that are not averaged.
    """

    num_updates: int
    values: Mapping[Box, torch.Tensor]


class Beginnings(NamedTuple):
    """The tracks that have not begun with the average.

    Attributes:
        starts: track -> the number of its first update; a track that is not there has begun with the average.
        begun_at: track -> the track whose values it began at; a track that is not there began at the live weights.
    """

    starts: Mapping[str, int] = {}
    begun_at: Mapping[str, str] = {}


BEGUN_TOGETHER = Beginnings()


_ALL_STARTED: frozenset[str] = frozenset()


class Now(NamedTuple):
    """The counters of now. It is replaced as a whole, so that its fields always agree.

    Attributes:
        num_updates: the number of updates so far; the latest counts unless it is known to be skipped.
        last_skipped: the flag of the latest update, while it is not known whether it was skipped; else None.
        not_started: fqns of tensors whose average a checkpoint did not have: their next use copies the live values.
        num_refused_before: how many live values were left out before a checkpoint was loaded; one rank has it for all.
        kept: track -> the buffers that a swap has kept with its average, or a checkpoint had; they may be out of date.
        starts, begun_at: see `Beginnings`.
        momenta: the checksum of the momenta so far, where the ranks may have different ones.
    """

    num_updates: int = 0
    last_skipped: LateFlag | None = None
    not_started: frozenset[str] = _ALL_STARTED
    num_refused_before: int = 0
    kept: Mapping[str, KeptBuffers] = {}  # never changed in place
    starts: Mapping[str, int] = {}
    begun_at: Mapping[str, str] = {}
    momenta: int = 0

    @property
    def is_ordinary(self) -> bool:
        """Whether the next update is of all tensors and tracks alike, and no flag is waited for."""
        return bool(self.num_updates) and not self.not_started and not self.starts and self.last_skipped is None

    def after_update(self, step: int, flag: LateFlag | None) -> Now:
        """The counters after update number `step`, which takes in what has not started."""
        kept = {} if self.not_started else self.kept  # averages that had not started move in any case
        fields = (step + 1, flag, _ALL_STARTED, self.num_refused_before, kept, self.starts, self.begun_at, self.momenta)
        return tuple.__new__(Now, fields)  # every update makes one; `Now()` takes half as long again

    def with_momenta(self, momenta: Sequence[float]) -> Now:
        """The counters with the momenta of one more update in their checksum."""
        # Three digits: the functions of C may round differently on other machines.
        text = " ".join(f"{momentum:.3g}" for momentum in momenta)
        return self._replace(momenta=zlib.crc32(text.encode(), self.momenta))

    def own_number(self, track: str, step: int) -> int:
        """The number that an update of the average has for a track."""
        return step - self.starts.get(track, 0)

    def latest_averaging(self, track: str, latest: int, interval: int) -> int:
        """The number of the latest update that moved a track; below its start if none did.

        Args:
            track: the name of the track.
            latest: the number of the latest update.
            interval: the option.
        """
        own = self.own_number(track, latest)
        return latest - own % interval if own >= 0 else latest

    def without(self, track: str) -> Now:
        """The counters without those of a track."""
        return self._replace(
            kept={name: value for name, value in self.kept.items() if name != track},
            starts={name: value for name, value in self.starts.items() if name != track},
            begun_at={name: value for name, value in self.begun_at.items() if name != track},
        )

    def counted_anew(self, num_updates: int) -> Now:
        """The counters of averages that were taken over with another number of updates; every track has begun."""
        latest = max(num_updates - 1, 0)
        starts = {name: min(start, latest) for name, start in self.starts.items()}
        return Now(
            num_updates,
            num_refused_before=self.num_refused_before,
            starts={name: start for name, start in starts.items() if start},
            begun_at=self.begun_at,
        )


def start_at(num_updates: int, *, live: bool) -> int:
    """The number of the first update of a track that is added after so many updates; see the note above.

    Args:
        num_updates: the number of updates of the average.
        live: whether it begins at the live weights, and not at the values of another track.
    """
    return num_updates if live else max(num_updates - 1, 0)
