"""`manifest.json`: what a saved average is. Written last, so its presence in a folder means "complete"."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_ema.checks import file_name, folder_name, shown
from dist_ema.disk.folders import contents
from dist_ema.disk.formats.checksums import checksum
from dist_ema.disk.formats.file_kinds import told_kind
from dist_ema.disk.formats.headers import LARGEST_RECORD_BYTES, read_small
from dist_ema.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigError,
    UnsupportedModelError,
)
from dist_ema.schedules.records import check_record, schedule_text

__all__ = ["MANIFEST_NAME", "Manifest", "SavedFile", "SavedTensor", "find_saved", "read_manifest", "read_summed"]

MANIFEST_NAME = "manifest.json"
_FORMAT = "dist_ema"
_FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, 2)


@dataclasses.dataclass(frozen=True)
class SavedTensor:
    """A whole tensor of the checkpoint; `averaged` is False where it is a copy of the live one."""

    shape: tuple[int, ...]
    dtype: str
    averaged: bool


@dataclasses.dataclass(frozen=True)
class SavedFile:
    """A file of the checkpoint.

    Attributes:
        size_bytes: of the whole file.
        checksum: CRC-32 of the header (length included) of a safetensors file, of the whole of an index.
    """

    size_bytes: int
    checksum: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The record beside the tensors.

    Attributes:
        num_updates: calls of `update` so far.
        num_refused: live values that `skip_nonfinite` has left out, over all ranks and updates.
        options: the options that shape the averaged values.
        tracks: track name -> its schedule, as JSON.
        tensors: fqn -> shape, dtype and kind.
        aliases: further names of tied tensors -> the name in `tensors`.
        written_by: versions of the packages and the number of ranks, for the reader's information.
        files: path below the folder -> what the file must be; empty in format version 1.
        checksums: track name -> fqn -> CRC-32 of the whole tensor's bytes; empty in format version 1.
    """

    num_updates: int
    options: Mapping[str, Any]
    tracks: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, SavedTensor]
    aliases: Mapping[str, str]
    written_by: Mapping[str, Any]
    num_refused: int = 0
    files: Mapping[str, SavedFile] = dataclasses.field(default_factory=dict)
    checksums: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)

    def folder_of(self, track: str) -> str:
        """Sub-folder of the track's files: the top for a single track, else its name."""
        return "." if len(self.tracks) == 1 else track

    def changes_since(self, saved: Manifest) -> list[str]:
        """Sentences on what this run does otherwise than the run that wrote `saved`: schedules and options."""
        told = [
            f"track {name!r} was saved with {schedule_text(saved.tracks[name])}; this run goes on with "
            f"{schedule_text(schedule)}: the new schedule alone counts, from update number {saved.num_updates} of it "
            "on, and the averaged values stay as they are. To keep the former schedule, build it as it was saved"
            f"{_as_saved(saved.tracks[name], schedule)}; to count the new one from 0, with a new average, call "
            "restart() after the load"
            for name, schedule in self.tracks.items()
            if saved.tracks[name] != schedule
        ]
        return told + [
            f"it was saved with {key}={saved.options[key]!r}; this run goes on with {key}={value!r}"
            for key, value in self.options.items()
            if key in saved.options and saved.options[key] != value
        ]

    def to_json(self) -> dict[str, Any]:
        """The record as JSON, without its own checksum."""
        record = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **dataclasses.asdict(self)}
        for file in record["files"].values():
            file["checksum"] = _hex(file["checksum"])
        record["checksums"] = {
            track: {fqn: _hex(value) for fqn, value in of_track.items()} for track, of_track in self.checksums.items()
        }
        return record

    def to_bytes(self) -> bytes:
        """The file's content: the record, and the CRC-32 of the record's canonical text."""
        record = self.to_json()
        return json.dumps({**record, "checksum": _hex(_record_checksum(record))}, indent=1).encode() + b"\n"

    def check_size(self) -> None:
        """See that the file will not be longer than a reader takes. No communication.

        Raises:
            UnsupportedModelError: it would be, with files and checksums.
        """
        # A line of a checksum is its name, written as JSON, and less than 20 bytes more; a tensor takes about 200.
        names_bytes = sum(len(json.dumps(fqn)) for fqn in self.tensors) + 20 * len(self.tensors)
        checksums_bytes = len(self.tracks) * names_bytes
        if 2 * (checksums_bytes + names_bytes + 200 * len(self.tensors)) < LARGEST_RECORD_BYTES:
            return
        num_bytes = len(self.to_bytes()) + checksums_bytes
        if num_bytes > LARGEST_RECORD_BYTES:
            raise UnsupportedModelError(
                f"{MANIFEST_NAME} would have {num_bytes:,} bytes, for {len(self.tensors):,} tensors in "
                f"{len(self.tracks)} tracks, expected at most {LARGEST_RECORD_BYTES:,}: use fewer tracks, or fewer "
                "and shorter names"
            )


def find_saved(source: Path) -> Path:
    """The folder of the average at `source`: that folder itself, or the only one in a checkpoint that holds it.

    Raises:
        CheckpointNotFoundError: there is none, or several to choose from.
    """
    if source.is_file():
        raise CheckpointNotFoundError(
            f"{source} is a file, expected the folder of a saved average{told_kind(source) or _OF_A_FILE}"
        )
    folder = contents.resolve(source)
    if contents.is_average(folder):
        return folder
    inside = contents.averages_in(folder)
    former = contents.former_average(source) if not inside and folder == source else None
    if former is not None:
        return former
    if (folder / MANIFEST_NAME).exists():
        return folder
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = ", ".join(contents.name_of(path) for path in inside)
        raise CheckpointNotFoundError(f"{folder} holds several averages ({names}): give the folder of one of them")
    raise CheckpointNotFoundError(
        f"{folder} holds no saved average: neither it nor a folder in it has a {MANIFEST_NAME}. An export "
        "(consolidate, synthesize) has none: load its files with safetensors, or begin an average there with "
        "ShardedEMA.start_from"
    )


_OF_A_FILE = ". One file has no manifest: begin an average at its weights with ShardedEMA.start_from"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a saved average: as `read_summed`, without its checksum. No communication."""
    return read_summed(folder)[0]


def read_summed(folder: Path) -> tuple[Manifest, int]:
    """Read the manifest of a saved average, and the CRC-32 of the bytes that it was read from. No communication.

    The file is read once: a save between two reads would pair the manifest of one average with the checksum of
    another.

    Raises:
        CheckpointCorruptError: there is none, or it cannot be understood.
        CheckpointMismatchError: a newer version of the format wrote it.
    """
    path = folder / MANIFEST_NAME
    if not os.path.lexists(path):
        raise CheckpointCorruptError(
            f"{folder} has no {MANIFEST_NAME}, expected a folder written by ShardedEMA.save: it is another kind "
            "of folder, or its writing was cut off"
        )
    content = read_small(path)
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path} is not a readable JSON file: {str(error)[:300]}") from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise CheckpointCorruptError(f"{path} is not a manifest of dist_ema")
    version = record.get("format_version")
    if version not in _READABLE_VERSIONS or isinstance(version, bool):
        raise CheckpointMismatchError(
            f"{path} has format version {version!r}, expected one of {_READABLE_VERSIONS}: read it with the version of "
            "dist_ema that wrote it, or a newer one"
        )
    try:
        _check_depth(record)
        if version >= 2:
            _check_record(record)
        manifest = Manifest(
            num_updates=_counter(record["num_updates"]),
            num_refused=_counter(record.get("num_refused", 0)),
            options=_object(record["options"]),
            tracks={folder_name("track name", name): _schedule(saved) for name, saved in _filled(record["tracks"])},
            tensors={_name(fqn): _tensor(saved) for fqn, saved in _filled(record["tensors"])},
            aliases={_name(alias): _name(fqn) for alias, fqn in _object(record["aliases"]).items()},
            written_by=_object(record["written_by"]),
            files={_path(name): _file(saved) for name, saved in _object(record.get("files", {})).items()},
            checksums={
                track: {fqn: _from_hex(value) for fqn, value in _object(of_track).items()}
                for track, of_track in _object(record.get("checksums", {})).items()
            },
        )
        if version >= 2 and any(
            manifest.checksums.get(track, {}).keys() != manifest.tensors.keys() for track in manifest.tracks
        ):
            raise ValueError("there is not one checksum for each tensor of each track")
        for alias, fqn in manifest.aliases.items():
            if fqn not in manifest.tensors or alias in manifest.tensors:
                raise ValueError(f"{alias[:80]!r} is tied to {fqn[:80]!r}, expected a further name of a tensor")
    except (KeyError, TypeError, ValueError, RecursionError, ConfigError) as error:
        lacks = f"it lacks the field {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointCorruptError(
            f"{path} is not as it was written: {lacks[:300]}. Restore it from a copy, or use an older checkpoint"
        ) from error
    return manifest, checksum(content)


def _check_depth(value: object, depth: int = 0) -> None:
    """Refuse a record that is nested beyond all that we write; it would exhaust the stack of whoever walks it."""
    if depth > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} deep")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(each, depth + 1)


def _check_record(record: dict[str, Any]) -> None:
    """Refuse a record that is not the one that was written."""
    told = record.pop("checksum")
    if told != _hex(_record_checksum(record)):
        raise ValueError("its checksum does not fit its content: it was damaged, or edited")


def _record_checksum(record: Mapping[str, Any]) -> int:
    return checksum(json.dumps(record, sort_keys=True, separators=(",", ":")).encode())


def _hex(value: int) -> str:
    return f"{value:08x}"


def _from_hex(value: object) -> int:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{8}", value):
        raise ValueError(f"a checksum is {str(value)[:80]!r}, expected eight hexadecimal digits")
    return int(value, 16)


def _path(name: str) -> str:
    """A file in the folder or in the folder of a track; no way out of it."""
    *folders, file = name.split("/")
    if len(folders) > 1:
        raise ValueError(f"a file has the path {name[:80]!r}")
    for folder in folders:
        folder_name("track name", folder)
    file_name("files", file)
    return name


def _name(value: object) -> str:
    """The name of a tensor: text that a file can carry."""
    if not isinstance(value, str):
        raise ValueError(f"a name is {shown(value)}, expected text")
    value.encode()  # half of a surrogate pair is a ValueError
    return value


def _file(value: object) -> SavedFile:
    saved = dict(_filled(value))
    return SavedFile(_counter(saved["size_bytes"]), _from_hex(saved["checksum"]))


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return value


def _as_saved(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The saved value of `total_steps`, where this run has another: a longer run is the usual reason."""
    before, after = _total_steps(saved), _total_steps(now)
    if before is None or after is None or before == after:
        return ""
    return f", total_steps={before} included, whatever the length of this run"


def _total_steps(schedule: Mapping[str, Any]) -> int | None:
    """The `total_steps` of a schedule's JSON, or of the schedule in it."""
    while isinstance(schedule.get("schedule"), dict):
        schedule = schedule["schedule"]
    total_steps = schedule.get("total_steps")
    return total_steps if type(total_steps) is int else None


_LARGEST_SIZE = 2**62
_DEEPEST = 32


def _filled(value: object) -> list[tuple[Any, Any]]:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"expected an object with entries, found {type(value).__name__}")
    return list(value.items())


def _schedule(value: object) -> dict[str, Any]:
    schedule = dict(_filled(value))
    check_record(schedule)
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
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"a count is {str(value)[:80]}, expected an integer of at least 0 (and below 2^63)")
    return value
