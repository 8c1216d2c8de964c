"""The kinds of values in the fields of a manifest: how a value is checked when it is read, and how it is written.

A reader refuses a value with a `ValueError` (or a `KeyError` for a missing one); `read_manifest` turns it into an error
that names the file.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from dist_ema.checks import file_name, folder_name, json_object, shown
from dist_ema.schedules.records import check_record

__all__ = [
    "Agreement",
    "Rule",
    "SavedFile",
    "SavedTensor",
    "aliases",
    "begun_at",
    "checksums",
    "counter",
    "files",
    "from_hex",
    "hexadecimal",
    "names",
    "rule",
    "rule_of",
    "starts",
    "tensors",
    "tracks",
    "written_checksums",
    "written_files",
    "written_tensors",
]


class Agreement(enum.Enum):
    """How the ranks compare a field when an average is built."""

    MODEL = "the field describes the model: ranks that differ have models of other names, shapes or dtypes"
    RUN = "the field has the options or the packages of the run, which must be alike on all ranks"
    NONE = "the field is a counter, or is known only when a file is written"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """The declaration of a field of the manifest.

    Attributes:
        read: JSON value -> the field's value; raises a `ValueError` if the JSON value is not allowed.
        write: the field's value -> JSON.
        since: the first format version whose records must have the field; None if any record may lack it. A record that
            lacks the field has its default.
        compared: how the ranks compare the field.
    """

    read: Callable[[Any], Any]
    write: Callable[[Any], Any]
    since: int | None
    compared: Agreement


def rule(
    read: Callable[[Any], Any],
    *,
    write: Callable[[Any], Any] = lambda value: value,
    since: int | None,
    compared: Agreement,
) -> dict[str, Rule]:
    """The metadata of a field: see `Rule`."""
    return {"rule": Rule(read=read, write=write, since=since, compared=compared)}


def rule_of(field: dataclasses.Field[Any]) -> Rule:
    """The declaration of a field."""
    declared: Rule = field.metadata["rule"]
    return declared


@dataclasses.dataclass(frozen=True)
class SavedTensor:
    """A whole tensor of the checkpoint; `averaged` is False if its values are live ones."""

    shape: tuple[int, ...]
    dtype: str
    averaged: bool


@dataclasses.dataclass(frozen=True)
class SavedFile:
    """A file of the checkpoint.

    Attributes:
        size_bytes: the size of the whole file.
        checksum: CRC-32 of the header (with its length) of a safetensors file, or of the whole index.
    """

    size_bytes: int
    checksum: int


def tracks(value: object) -> dict[str, dict[str, Any]]:
    """Track names and the records of their schedules."""
    return {folder_name("track name", name): _schedule(saved) for name, saved in _filled(value)}


def tensors(value: object) -> dict[str, SavedTensor]:
    """Fqns and tensors."""
    return {_name(fqn): _tensor(saved) for fqn, saved in _filled(value)}


def written_tensors(value: Mapping[str, SavedTensor]) -> dict[str, Any]:
    """The tensors as JSON."""
    return {fqn: dict(vars(tensor)) for fqn, tensor in value.items()}


def aliases(value: object) -> dict[str, str]:
    """Further names of tensors and the names that they are stored under."""
    return {_name(alias): _name(fqn) for alias, fqn in json_object(value).items()}


def starts(value: object) -> dict[str, int]:
    """Track names and the numbers of their first updates."""
    return {folder_name("track name", track): counter(first) for track, first in json_object(value).items()}


def begun_at(value: object) -> dict[str, str]:
    """Track names and the names of the tracks whose values they began at."""
    return {
        folder_name("track name", track): folder_name("track name", other)
        for track, other in json_object(value).items()
    }


def names(value: object) -> tuple[str, ...]:
    """A list of names."""
    if not isinstance(value, list):
        raise ValueError(f"expected a list of names, found {type(value).__name__}")
    return tuple(map(_name, value))


def files(value: object) -> dict[str, SavedFile]:
    """Paths in the folder and the files there."""
    return {_path(name): _file(saved) for name, saved in json_object(value).items()}


def written_files(value: Mapping[str, SavedFile]) -> dict[str, Any]:
    """The files as JSON."""
    return {
        name: {"size_bytes": file.size_bytes, "checksum": hexadecimal(file.checksum)} for name, file in value.items()
    }


def checksums(value: object) -> dict[str, dict[str, int]]:
    """Track names, fqns and the checksums of the tensors."""
    return {
        track: {fqn: from_hex(text) for fqn, text in json_object(of_track).items()}
        for track, of_track in json_object(value).items()
    }


def written_checksums(value: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """The checksums as JSON."""
    return {track: {fqn: hexadecimal(crc) for fqn, crc in of_track.items()} for track, of_track in value.items()}


def hexadecimal(value: int) -> str:
    """A checksum as the manifest spells it."""
    return f"{value:08x}"


def from_hex(value: object) -> int:
    """The checksum that eight hexadecimal digits spell."""
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{8}", value):
        raise ValueError(f"a checksum is {str(value)[:80]!r}, expected eight hexadecimal digits")
    return int(value, 16)


def _path(name: str) -> str:
    """The path of a file in the folder, or below it in those of a track and an adapter; none that leads out of it."""
    *folders, file = name.split("/")
    if len(folders) > 2:
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
    return SavedFile(counter(saved["size_bytes"]), from_hex(saved["checksum"]))


_LARGEST_SIZE = 2**62


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


def counter(value: object) -> int:
    """A number of updates, values or bytes."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"a count is {str(value)[:80]}, expected an integer of at least 0 (and below 2^63)")
    return value
