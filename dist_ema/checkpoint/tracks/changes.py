"""Tracks that differ between a checkpoint and the run that loads it: which one each track of the run begins at.

A change that has been made before is no error: a script that resumes again and again may keep its arguments, though the
later checkpoints have the new tracks. No communication.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from dist_ema.averaging.counting.now import LIVE, Beginnings, start_at
from dist_ema.disk.manifest import Manifest
from dist_ema.errors import CheckpointMismatchError, ConfigError
from dist_ema.options import Patterns

__all__ = ["NewTracks", "TrackChanges", "TrackSources", "track_names"]

NewTracks = Mapping[str, str] | str | None
"""Track -> the track of the checkpoint at whose values it begins, or "live"; one word for all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackSources:
    """Where the tracks of a run begin.

    Attributes:
        names: track -> the track of the checkpoint whose values it takes; without those that begin at the live weights.
        beginnings: the tracks that have not begun with the average.
    """

    names: Mapping[str, str]
    beginnings: Beginnings


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackChanges:
    """The changes of tracks that a load allows.

    Attributes:
        new: track of this run that the checkpoint may lack -> where it begins: a track of the checkpoint, or "live".
        all_new: where all other missing tracks begin; None if they are an error.
        dropped: tracks that the checkpoint may have and this run has not.
        renamed: the name in the checkpoint -> the name in this run.
    """

    new: Mapping[str, str] = dataclasses.field(default_factory=dict)
    all_new: str | None = None
    dropped: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, tracks: Collection[str], new: NewTracks, dropped: Patterns, renamed: object) -> TrackChanges:
        """The checked arguments of `ShardedEMA.load`.

        Args:
            tracks: the tracks of this run.
            new: as `new_tracks`.
            dropped: as `dropped_tracks`.
            renamed: as `renamed_tracks`.

        Raises:
            ConfigError: an argument is of another type, or names a track that this run does not have, or has.
        """
        own, known = _pairs("new_tracks", {} if new is None or isinstance(new, str) else new), list(tracks)
        names, gone = _pairs("renamed_tracks", {} if renamed is None else renamed), track_names(dropped)
        for argument, given in (("new_tracks", own), ("renamed_tracks has the new name", names.values())):
            for name in given:
                if name not in tracks:
                    raise ConfigError(
                        f"{argument} {name!r}, expected one of the tracks of this average: {known}. It is new_tracks="
                        "{new: start}, and renamed_tracks={old: new}"
                    )
        for name in (*gone, *names):
            if name in tracks:
                raise ConfigError(
                    f"dropped_tracks or renamed_tracks (the former name) has {name!r}, which is a track of this "
                    f"average: {known}"
                )
        twice = set(own) & set(names.values()) | set(gone) & set(names)
        if twice or len(set(names.values())) < len(names):
            raise ConfigError(
                f"renamed_tracks is {names!r}, expected every track once, and none of new_tracks or dropped_tracks"
            )
        return cls(new=own, all_new=new if isinstance(new, str) else None, dropped=gone, renamed=names)

    def to_json(self) -> dict[str, Any]:
        """What the ranks compare."""
        return {
            "new_tracks": self.all_new or dict(self.new),
            "dropped_tracks": list(self.dropped),
            "renamed_tracks": dict(self.renamed),
        }

    def as_named(self, saved: Manifest) -> Manifest:
        """The manifest with the names of this run."""
        return dataclasses.replace(
            saved,
            tracks={self.renamed.get(name, name): schedule for name, schedule in saved.tracks.items()},
            starts={self.renamed.get(name, name): first for name, first in saved.starts.items()},
        )

    def sources(self, where: object, saved: Manifest, tracks: Collection[str]) -> TrackSources:
        """Where the tracks of this run begin, in a checkpoint with that manifest.

        Args:
            where: the checkpoint, for a message.
            saved: its manifest.
            tracks: the tracks of this run.

        Raises:
            CheckpointMismatchError: the tracks differ, and no argument says how. The message has the call.
        """
        former = {new: old for old, new in self.renamed.items() if old in saved.tracks and new not in saved.tracks}
        names, missing = {}, []
        starts: dict[str, int] = {}
        begun_at: dict[str, str] = {}
        for track in tracks:
            source = former.get(track, track)
            if source in saved.tracks:
                names[track] = source
                if source in saved.starts:
                    starts[track] = saved.starts[source]
                if source in saved.begun_at:
                    begun_at[track] = saved.begun_at[source]
                continue
            begins_at = self.new.get(track, self.all_new)
            if begins_at is None:
                missing.append(track)
                continue
            if begins_at != LIVE and begins_at not in saved.tracks:
                raise CheckpointMismatchError(
                    f"new_tracks has the track {track!r} begin at {begins_at!r}, but {where} holds the tracks "
                    f"{sorted(saved.tracks)}: name one of these, as the checkpoint calls it, or {LIVE!r}"
                )
            live = begins_at == LIVE or saved.count_of(begins_at) == 0
            if not live:
                names[track] = begun_at[track] = begins_at
            starts[track] = start_at(saved.num_updates, live=live)
        used = {former.get(track, track) for track in tracks}
        extra = [name for name in saved.tracks if name not in used and name not in self.dropped]
        if missing or extra:
            raise CheckpointMismatchError(self._other_tracks(where, saved, tracks, missing, extra))
        starts = {track: first for track, first in starts.items() if first}
        return TrackSources(names=names, beginnings=Beginnings(starts, begun_at))

    def _other_tracks(
        self, where: object, saved: Manifest, tracks: Collection[str], missing: list[str], extra: list[str]
    ) -> str:
        live = dict.fromkeys(missing, LIVE)
        new = self.all_new or {**self.new, **live}
        gone = [*self.dropped, *extra]
        names = {old: now for old, now in self.renamed.items() if old in saved.tracks}
        arguments = [f"new_tracks={new!r}"] if new else []
        arguments += [f"dropped_tracks={gone!r}"] if gone else []
        arguments += [f"renamed_tracks={names!r}"] if names else []
        hint = ", where a new track may begin at another track of the checkpoint too" if new else ""
        text = (
            f"{where} holds the tracks {sorted(saved.tracks)}, expected {sorted(tracks)}: give the same track names as "
            f"the run that saved it, or call load(path, {', '.join(arguments).replace(chr(39), chr(34))}){hint}"
        )
        if len(missing) == len(extra) == 1:
            renamed = {**names, extra[0]: missing[0]}
            text += f". If it has another name now: load(path, renamed_tracks={renamed!r})".replace(chr(39), chr(34))
        return text


def track_names(value: Patterns) -> tuple[str, ...]:
    """One name, several, or None, as a tuple of names.

    Raises:
        ConfigError: the value is of another type.
    """
    names = (
        ()
        if value is None
        else tuple(value)
        if isinstance(value, Iterable) and not isinstance(value, str)
        else (value,)
    )
    if not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"dropped_tracks is {value!r}, expected a list of names of tracks")
    return names


def _pairs(argument: str, value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for pair in value.items() for name in pair):
        raise ConfigError(f'{argument} is {value!r}, expected names of tracks, such as {{"slow": "fast"}}')
    return dict(value)
