"""The saved averages of one run in one folder; every track of them is a source of a sum. No communication.

There are many of them: for one average only its folder and its checksums are kept, and once what all have in common.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_ema.checks import positive_integer
from dist_ema.disk.folders import contents
from dist_ema.disk.formats.headers import StoredTensor
from dist_ema.disk.listing import averages_below
from dist_ema.disk.manifest import Manifest, is_live, read_manifest
from dist_ema.disk.saved_average import SavedAverage, read_saved
from dist_ema.errors import CheckpointCorruptError, CheckpointMismatchError, ConfigError
from dist_ema.offline.posthoc import Profile
from dist_ema.schedules.base import Schedule
from dist_ema.schedules.profiles import EqualSchedule
from dist_ema.schedules.records import schedule_from_json, schedule_text

__all__ = ["Snapshots", "Source", "read_snapshots"]


# A manifest may say any number, and every update is looked at: so many take an hour. No run is longer.
_MOST_UPDATES = 10**9


@dataclasses.dataclass(frozen=True)
class Source:
    """One track of one saved average.

    Attributes:
        folder: the folder of the track's files.
        snapshot: the folder of the saved average.
        track: the name of the track.
        profile: the weights of the observations in the average.
        tensors: fqn -> place in the files.
        checksums: the CRC-32 of every tensor, in the order of the latest manifest; empty if none were saved.
        is_live: whether it is a snapshot of the live weights.
    """

    folder: Path
    snapshot: Path
    track: str
    profile: Profile
    tensors: Mapping[str, StoredTensor]
    checksums: Sequence[int]
    is_live: bool


@dataclasses.dataclass(frozen=True)
class Snapshots:
    """The saved averages whose sum is an average after `num_updates` updates.

    Attributes:
        latest: the last of the saved averages; all have its model.
        num_updates: the number of updates of the average to make, at least that of `latest`.
        sources: every track of every saved average, ascending by its number of updates.
    """

    latest: SavedAverage
    num_updates: int
    sources: tuple[Source, ...]

    def profile(self, schedule: Schedule) -> Profile:
        """The profile of the average that `schedule` would have made in the same run."""
        options = self.latest.manifest.options
        return Profile(schedule, self.num_updates, options["interval"], options["interval_correction"])


def read_snapshots(folder: Path, num_updates: int | None) -> Snapshots:
    """Read every saved average in `folder`, or in a folder in it, that had at most `num_updates` updates.

    Args:
        folder: a folder of `ShardedEMA.snapshot`, a folder of checkpoints that hold an average, or a saved average.
        num_updates: the number of updates of the average to make; None for that of the latest saved average.

    Raises:
        CheckpointNotFoundError: there is no such folder.
        CheckpointMismatchError: they are not all of one model and one run, or one of the schedules is unknown.
        CheckpointCorruptError: one of them is damaged.
        ConfigError: none of them can be used, or none is as late as `num_updates`.
    """
    saved = sorted((read_manifest(path).num_updates, path) for path in averages_below(contents.resolve(folder)))
    last = saved[-1][0] if saved else 0
    wanted = last if num_updates is None else positive_integer("num_updates", num_updates)
    if wanted > last > 0:
        raise ConfigError(
            f"num_updates is {wanted}, but the latest of {len(saved)} saved averages in {folder} had {last}: what was "
            "observed later is in none of them"
        )
    if wanted > _MOST_UPDATES:
        raise ConfigError(f"{folder} has an average of {wanted} updates, expected at most {_MOST_UPDATES:,}")
    usable = [(count, path) for count, path in saved if 0 < count <= wanted]
    if not usable:
        raise ConfigError(
            f"{folder} and the folders in it hold {len(saved)} saved averages, none of them with 1 to {max(wanted, 1)} "
            "updates: write some with ShardedEMA.snapshot"
        )
    latest = read_saved(usable[-1][1])
    known: list[Mapping[str, StoredTensor]] = []
    sources: list[Source] = []
    latest_live = 0  # the number of updates of the latest live snapshot so far
    for count, path in usable:
        of_path = list(_sources(path, latest, known, latest_live))
        if any(source.is_live for source in of_path):
            latest_live = count
        sources += of_path
    if not sources:
        raise CheckpointMismatchError(
            f"{folder} has only tracks that began at the values of other tracks: which weights their observations have "
            "cannot be told"
        )
    return Snapshots(latest, wanted, tuple(sources))


def _sources(path: Path, latest: SavedAverage, known: list[Mapping[str, StoredTensor]], since: int) -> Iterator[Source]:
    """The tracks of the average at `path` whose profiles are known.

    Args:
        path: the folder.
        latest: the latest saved average.
        known: the layouts of files so far: most snapshots share one.
        since: the number of updates of the live snapshot before this one. A snapshot of the live weights stands for the
            updates since then: it counts as the equal average of these.
    """
    saved = latest if path == latest.folder else read_saved(path)
    for difference in _differences(saved.manifest, latest.manifest):
        raise CheckpointMismatchError(
            f"{path} cannot be summed with {latest.folder}: {difference}. Give a folder with saved averages of one run"
        )
    live = is_live(saved.manifest)
    for track, schedule in saved.manifest.tracks.items():
        if track in saved.manifest.begun_at or saved.manifest.count_of(track) == 0:
            continue
        tensors: Mapping[str, StoredTensor] = saved.models[track].tensors
        if tensors not in known:
            known.append(tensors)
        of_track = saved.manifest.checksums.get(track, {})
        yield Source(
            saved.folder_of(track),
            path,
            track,
            Profile(EqualSchedule(), saved.manifest.num_updates, begin=since)
            if live
            else _profile(path, track, schedule, saved.manifest),
            known[known.index(tensors)],
            array("I", (of_track[fqn] for fqn in latest.manifest.tensors if of_track)),
            live,
        )


def _profile(path: Path, track: str, schedule: Mapping[str, Any], manifest: Manifest) -> Profile:
    try:
        rebuilt = schedule_from_json(schedule)
    except ConfigError as error:
        raise CheckpointMismatchError(
            f"{path} has the track {track!r}, averaged by {schedule_text(schedule)}, which only its author can rebuild "
            f"({error}): which weights its observations have cannot be told"
        ) from None
    interval, correction = manifest.options.get("interval"), manifest.options.get("interval_correction")
    if type(interval) is not int or interval < 1 or not isinstance(correction, bool):
        raise CheckpointCorruptError(
            f"{path} was saved with interval={interval!r}, interval_correction={correction!r}, expected an integer of "
            "at least 1, and true or false"
        )
    return Profile(rebuilt, manifest.num_updates, interval, correction, manifest.starts.get(track, 0))


def _differences(manifest: Manifest, other: Manifest) -> Iterator[str]:
    """The reasons why one cannot be summed with the other."""
    for fqn in sorted(manifest.tensors.keys() ^ other.tensors.keys()):
        yield f"only one of them has {fqn[:200]!r}"
    for fqn, tensor in manifest.tensors.items():
        there = other.tensors[fqn]
        if tensor.shape != there.shape:
            yield f"{fqn[:200]!r} is {list(tensor.shape)} there, {list(there.shape)} here"
        if tensor.averaged != there.averaged:
            yield f"{fqn[:200]!r} is averaged in only one of them"
    if manifest.aliases != other.aliases:
        yield f"tied weights are {dict(manifest.aliases)} there, {dict(other.aliases)} here"
    shared = manifest.tracks.keys() & other.tracks.keys()  # tracks may have come and gone
    if is_live(manifest) != is_live(other):
        shared = set()
    elif not shared:
        yield f"it has the tracks {', '.join(manifest.tracks)}, the other {', '.join(other.tracks)}"
    for track in shared:
        schedule = manifest.tracks[track]
        if manifest.starts.get(track, 0) != other.starts.get(track, 0):
            yield f"track {track!r} began at update {manifest.starts.get(track, 0)}, there at another one"
        if schedule != other.tracks[track]:
            yield f"track {track!r} is {schedule_text(schedule)} there, {schedule_text(other.tracks[track])} here"
    for key in manifest.options.keys() & other.options.keys() - {"dtype"}:
        if manifest.options[key] != other.options[key]:
            yield f"it was averaged with {key}={manifest.options[key]!r}, the other with {key}={other.options[key]!r}"
