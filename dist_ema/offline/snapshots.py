"""The saved averages of one run that lie in one folder, each track of each a source of a sum. No communication.

They are many: of each only its place and its checksums are kept, and what all have in common once.
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
from dist_ema.disk.manifest import Manifest, read_manifest
from dist_ema.disk.saved_average import SavedAverage, read_saved
from dist_ema.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, ConfigError
from dist_ema.offline.posthoc import Profile
from dist_ema.schedules.base import Schedule
from dist_ema.schedules.records import schedule_from_json, schedule_text

__all__ = ["Snapshots", "Source", "read_snapshots"]


# Every update is looked at: an hour's work. No run is longer, but a manifest may say anything.
_MOST_UPDATES = 10**9


@dataclasses.dataclass(frozen=True)
class Source:
    """One track of one saved average.

    Attributes:
        folder: of the track's files.
        snapshot: folder of the average.
        track: its name.
        profile: the weights of the observations in it.
        tensors: fqn -> where it lies.
        checksums: CRC-32 of each tensor, in the order of the latest manifest; empty if it was saved without.
    """

    folder: Path
    snapshot: Path
    track: str
    profile: Profile
    tensors: Mapping[str, StoredTensor]
    checksums: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Snapshots:
    """What can be summed up to an average after `num_updates` updates.

    Attributes:
        latest: the last of the saved averages; its model is that of all.
        num_updates: of the average to make, at least that of `latest`.
        sources: every track of every saved average, ascending by its number of updates.
    """

    latest: SavedAverage
    num_updates: int
    sources: tuple[Source, ...]

    def profile(self, schedule: Schedule) -> Profile:
        """The profile of the average that `schedule` would have made in the same run."""
        return dataclasses.replace(self.sources[0].profile, schedule=schedule, num_updates=self.num_updates)


def read_snapshots(folder: Path, num_updates: int | None) -> Snapshots:
    """Find every saved average in `folder`, or in a folder in it, that had at most `num_updates` updates.

    Args:
        folder: of `ShardedEMA.snapshot`, of checkpoints that hold an average, or a saved average itself.
        num_updates: of the average to make; None for that of the latest saved one.

    Raises:
        CheckpointNotFoundError: there is no such folder.
        CheckpointMismatchError: they are not all of one model and one run, or nobody knows one of the schedules.
        CheckpointCorruptError: one is damaged.
        ConfigError: there is none that can be used, or none as late as `num_updates`.
    """
    found = sorted((read_manifest(path).num_updates, path) for path in _averages(contents.resolve(folder)))
    last = found[-1][0] if found else 0
    wanted = last if num_updates is None else positive_integer("num_updates", num_updates)
    if wanted > last > 0:
        raise ConfigError(
            f"num_updates is {wanted}, but the latest of {len(found)} saved averages in {folder} had {last}: what was "
            "observed later is in none of them"
        )
    if wanted > _MOST_UPDATES:
        raise ConfigError(f"{folder} has an average of {wanted} updates, expected at most {_MOST_UPDATES:,}")
    usable = [(count, path) for count, path in found if 0 < count <= wanted]
    if not usable:
        raise ConfigError(
            f"{folder} and the folders in it hold {len(found)} saved averages, none of them with 1 to {max(wanted, 1)} "
            "updates: write some with ShardedEMA.snapshot"
        )
    latest = read_saved(usable[-1][1])
    known: list[Mapping[str, StoredTensor]] = []
    sources = [source for _, path in usable for source in _sources(path, latest, known)]
    return Snapshots(latest, wanted, tuple(sources))


def _averages(folder: Path) -> list[Path]:
    if contents.has_manifest(folder):
        return [folder]
    try:
        found = contents.averages_in(folder)
        for path in folder.iterdir():
            if path.is_dir() and not path.name.startswith(".") and not contents.has_manifest(path):
                found += contents.averages_in(path)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be searched for saved averages: {error}") from error
    return found


def _sources(path: Path, latest: SavedAverage, known: list[Mapping[str, StoredTensor]]) -> Iterator[Source]:
    """The tracks of the average at `path`. `known` are the layouts of files so far: most snapshots share one."""
    saved = latest if path == latest.folder else read_saved(path)
    for difference in _differences(saved.manifest, latest.manifest):
        raise CheckpointMismatchError(
            f"{path} cannot be summed with {latest.folder}: {difference}. Give a folder with saved averages of one run"
        )
    for track, schedule in saved.manifest.tracks.items():
        tensors: Mapping[str, StoredTensor] = saved.models[track].tensors
        if tensors not in known:
            known.append(tensors)
        of_track = saved.manifest.checksums.get(track, {})
        yield Source(
            saved.folder_of(track),
            path,
            track,
            _profile(path, track, schedule, saved.manifest),
            known[known.index(tensors)],
            array("I", (of_track[fqn] for fqn in latest.manifest.tensors if of_track)),
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
    return Profile(rebuilt, manifest.num_updates, interval, correction)


def _differences(ours: Manifest, theirs: Manifest) -> Iterator[str]:
    """Why one cannot be summed with the other."""
    for fqn in sorted(ours.tensors.keys() ^ theirs.tensors.keys()):
        yield f"only one of them has {fqn[:200]!r}"
    for fqn, tensor in ours.tensors.items():
        other = theirs.tensors[fqn]
        if tensor.shape != other.shape:
            yield f"{fqn[:200]!r} is {list(tensor.shape)} there, {list(other.shape)} here"
        if tensor.averaged != other.averaged:
            yield f"{fqn[:200]!r} is averaged in only one of them"
    if ours.aliases != theirs.aliases:
        yield f"tied weights are {dict(ours.aliases)} there, {dict(theirs.aliases)} here"
    if ours.tracks.keys() != theirs.tracks.keys():
        yield f"it has the tracks {', '.join(ours.tracks)}, the other {', '.join(theirs.tracks)}"
    for track, schedule in ours.tracks.items():
        if schedule != theirs.tracks[track]:
            yield f"track {track!r} is {schedule_text(schedule)} there, {schedule_text(theirs.tracks[track])} here"
    for key in ours.options.keys() & theirs.options.keys() - {"dtype"}:
        if ours.options[key] != theirs.options[key]:
            yield f"it was averaged with {key}={ours.options[key]!r}, the other with {key}={theirs.options[key]!r}"
