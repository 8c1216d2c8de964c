"""`manifest.json`: what a saved average is. Written last, so its presence in a folder means "complete"."""

from __future__ import annotations

import dataclasses
import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_ema import commit
from dist_ema.checks import folder_name
from dist_ema.errors import CheckpointCorruptError, CheckpointMismatchError, CheckpointNotFoundError, ConfigError
from dist_ema.schedules import schedule_text

__all__ = ["MANIFEST_NAME", "Manifest", "SavedTensor", "find_saved", "read_manifest"]

MANIFEST_NAME = "manifest.json"
_FORMAT = "dist_ema"
_FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class SavedTensor:
    """A whole tensor of the checkpoint; `averaged` is False where it is a copy of the live one."""

    shape: tuple[int, ...]
    dtype: str
    averaged: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The record beside the tensors.

    Attributes:
        num_updates: calls of `update` so far.
        options: the options that shape the averaged values.
        tracks: track name -> its schedule, as JSON.
        tensors: fqn -> shape, dtype and kind.
        aliases: further names of tied tensors -> the name in `tensors`.
        written_by: versions of the packages and the number of ranks, for the reader's information.
    """

    num_updates: int
    options: Mapping[str, Any]
    tracks: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, SavedTensor]
    aliases: Mapping[str, str]
    written_by: Mapping[str, Any]

    def folder_of(self, track: str) -> str:
        """Sub-folder of the track's files: the top for a single track, else its name."""
        return "." if len(self.tracks) == 1 else track

    def changes_since(self, saved: Manifest) -> list[str]:
        """Sentences on what this run does otherwise than the run that wrote `saved`: schedules and options."""
        told = [
            f"track {name!r} was saved with {schedule_text(saved.tracks[name])}; this run goes on with "
            f"{schedule_text(schedule)}"
            for name, schedule in self.tracks.items()
            if saved.tracks[name] != schedule
        ]
        return told + [
            f"it was saved with {key}={saved.options.get(key)!r}; this run goes on with {key}={value!r}"
            for key, value in self.options.items()
            if saved.options.get(key) != value
        ]

    def to_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return {"format": _FORMAT, "format_version": _FORMAT_VERSION, **dataclasses.asdict(self)}

    def to_bytes(self) -> bytes:
        """The file's content."""
        return json.dumps(self.to_json(), indent=1).encode() + b"\n"


def find_saved(source: Path) -> Path:
    """The folder of the average at `source`: that folder itself, or the only one in a checkpoint that holds it.

    Raises:
        CheckpointNotFoundError: there is none, or several to choose from.
    """
    folder = commit.resolve(source)
    if (folder / MANIFEST_NAME).exists():
        return folder
    inside = sorted(path.parent for path in folder.glob(f"*/{MANIFEST_NAME}") if not path.parent.name.startswith("."))
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = ", ".join(path.name for path in inside)
        raise CheckpointNotFoundError(f"{folder} holds several averages ({names}): give the folder of one of them")
    raise CheckpointNotFoundError(
        f"{folder} holds no saved average: neither it nor a folder in it has a {MANIFEST_NAME}. An export "
        "(ShardedEMA.consolidate) has none: load its files with safetensors"
    )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a saved average. No communication.

    Raises:
        CheckpointCorruptError: there is none, or it cannot be understood.
        CheckpointMismatchError: a newer version of the format wrote it.
    """
    path = folder / MANIFEST_NAME
    try:
        record = json.loads(_read_small(path))
    except FileNotFoundError:
        raise CheckpointCorruptError(
            f"{folder} has no {MANIFEST_NAME}, expected a folder written by ShardedEMA.save: it is another kind "
            "of folder, or its writing was cut off"
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointCorruptError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise CheckpointCorruptError(f"{path} is not a manifest of dist_ema")
    version = record.get("format_version")
    if version != _FORMAT_VERSION or isinstance(version, bool):
        raise CheckpointMismatchError(
            f"{path} has format version {version!r}, expected {_FORMAT_VERSION}: read it with the version of "
            "dist_ema that wrote it, or a newer one"
        )
    try:
        return Manifest(
            num_updates=_counter(record["num_updates"]),
            options=dict(record["options"]),
            tracks={folder_name("track name", name): _schedule(saved) for name, saved in _filled(record["tracks"])},
            tensors={str(fqn): _tensor(saved) for fqn, saved in _filled(record["tensors"])},
            aliases=dict(record["aliases"]),
            written_by=dict(record["written_by"]),
        )
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointCorruptError(f"{path} lacks or misstates a field: {error!r}") from error


_LARGEST_BYTES = 512 * 2**20
_LARGEST_SIZE = 2**62


def _read_small(path: Path) -> bytes:
    """The content of a regular file of a size that a manifest may have; a pipe would never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_BYTES:
        raise ValueError("it is no regular file, or larger than any manifest")
    return path.read_bytes()


def _filled(value: object) -> list[tuple[Any, Any]]:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"expected an object with entries, found {type(value).__name__}")
    return list(value.items())


def _schedule(value: object) -> dict[str, Any]:
    schedule = dict(_filled(value))
    if not isinstance(schedule.get("type"), str):
        raise ValueError("a schedule has no type")
    return schedule


def _tensor(value: object) -> SavedTensor:
    saved = dict(_filled(value))
    shape, dtype, averaged = saved["shape"], saved["dtype"], saved["averaged"]
    sizes_are_fine = isinstance(shape, list) and all(type(size) is int and 0 <= size < _LARGEST_SIZE for size in shape)
    if not sizes_are_fine or math.prod(shape) >= _LARGEST_SIZE:
        raise ValueError(f"a tensor has the shape {str(shape)[:80]}")
    if not isinstance(dtype, str) or not isinstance(averaged, bool):
        raise ValueError(f"a tensor has dtype {str(dtype)[:80]} and averaged {str(averaged)[:80]}")
    return SavedTensor(tuple(shape), dtype, averaged)


def _counter(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"num_updates is {value!r}, expected an integer of at least 0")
    return value
