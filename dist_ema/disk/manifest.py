"""`manifest.json`, the record of a saved average. It is written last, so its presence in a folder means "complete"."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from dist_ema.checks import json_object
from dist_ema.disk import manifest_fields as fields
from dist_ema.disk.folders import contents
from dist_ema.disk.folders.contents import MANIFEST_NAME
from dist_ema.disk.formats.checksums import checksum
from dist_ema.disk.formats.file_kinds import kind_text
from dist_ema.disk.formats.headers import LARGEST_RECORD_BYTES, read_small
from dist_ema.disk.forms.form import FolderForm, form_from_json, form_to_json
from dist_ema.disk.manifest_fields import Agreement, SavedFile, SavedTensor
from dist_ema.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigError,
    UnsupportedModelError,
)
from dist_ema.schedules.records import schedule_text

__all__ = [
    "LIVE_TRACK",
    "MANIFEST_NAME",
    "Agreement",
    "Manifest",
    "SavedFile",
    "SavedTensor",
    "find_saved",
    "is_live",
    "read_manifest",
    "read_summed",
]

# The name of what a snapshot of the live weights has in place of averages.
LIVE_TRACK = "live"

_FORMAT = "dist_ema"
_FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The record beside the tensors. A field is declared here and nowhere else: see `manifest_fields.Rule`.

    Attributes:
        num_updates: the number of calls of `update` so far, less the steps that were skipped.
        num_refused: the number of live values that `skip_nonfinite` has left out, over all ranks and updates.
        options: the options that shape the averaged values.
        tracks: track name -> its schedule, as JSON.
        tensors: fqn -> shape, dtype and kind.
        aliases: further names of tied tensors -> the name in `tensors`.
        written_by: the versions of the packages and the number of ranks, which ranks compare; to a reader they are
            information.
        kept_buffers: the tracks whose buffers belong to the averaged weights, and are not copies of the live ones.
        files: path below the folder -> size and checksum of the file; empty in format version 1.
        checksums: track name -> fqn -> CRC-32 of the whole tensor's bytes; empty in format version 1.
        starts: track -> the number of the update of the average that is number 0 of the track; a track that is not
            there has begun with the average.
        begun_at: track -> the track at whose values it began; a track that is not there began at the live weights.
        form: the form of the folder of a track; None in folders of versions that knew one form.
    """

    num_updates: int = field(metadata=fields.rule(fields.counter, since=1, compared=Agreement.NONE))
    options: Mapping[str, Any] = field(metadata=fields.rule(json_object, since=1, compared=Agreement.RUN))
    tracks: Mapping[str, Mapping[str, Any]] = field(
        metadata=fields.rule(fields.tracks, since=1, compared=Agreement.RUN)
    )
    tensors: Mapping[str, SavedTensor] = field(
        metadata=fields.rule(fields.tensors, write=fields.written_tensors, since=1, compared=Agreement.MODEL)
    )
    aliases: Mapping[str, str] = field(metadata=fields.rule(fields.aliases, since=1, compared=Agreement.MODEL))
    written_by: Mapping[str, Any] = field(metadata=fields.rule(json_object, since=1, compared=Agreement.RUN))
    num_refused: int = field(default=0, metadata=fields.rule(fields.counter, since=None, compared=Agreement.NONE))
    kept_buffers: Sequence[str] = field(
        default=(), metadata=fields.rule(fields.names, write=list, since=None, compared=Agreement.NONE)
    )
    files: Mapping[str, SavedFile] = field(
        default_factory=dict,
        metadata=fields.rule(fields.files, write=fields.written_files, since=2, compared=Agreement.NONE),
    )
    checksums: Mapping[str, Mapping[str, int]] = field(
        default_factory=dict,
        metadata=fields.rule(fields.checksums, write=fields.written_checksums, since=2, compared=Agreement.NONE),
    )
    starts: Mapping[str, int] = field(
        default_factory=dict,
        metadata=fields.rule(fields.starts, write=dict, since=None, compared=Agreement.NONE),
    )
    begun_at: Mapping[str, str] = field(
        default_factory=dict,
        metadata=fields.rule(fields.begun_at, write=dict, since=None, compared=Agreement.NONE),
    )
    form: FolderForm | None = field(
        default=None,
        metadata=fields.rule(form_from_json, write=form_to_json, since=None, compared=Agreement.NONE),
    )

    def folder_of(self, track: str) -> str:
        """The sub-folder of the track's files: the top for a single track, else the name of the track."""
        return "." if len(self.tracks) == 1 else track

    def count_of(self, track: str) -> int:
        """The number of updates of a track: that of the average, less those before the track began."""
        return max(self.num_updates - self.starts.get(track, 0), 0)

    def changes_since(self, saved: Manifest) -> list[str]:
        """Sentences on the schedules and options in which this run differs from the run that wrote `saved`.

        Tracks that `saved` does not have are not compared.
        """
        sentences = [
            f"track {name!r} was saved with {schedule_text(saved.tracks[name])}; this run goes on with "
            f"{schedule_text(schedule)}: the new schedule alone counts, from update number {saved.count_of(name)} of "
            "it on, and the averaged values stay as they are. To keep the former schedule, build it as it was saved"
            f"{_as_saved(saved.tracks[name], schedule)}; to count the new one from 0, with a new average, call "
            "restart() after the load"
            for name, schedule in self.tracks.items()
            if name in saved.tracks and saved.tracks[name] != schedule
        ]
        return sentences + [
            f"it was saved with {key}={saved.options[key]!r}; this run goes on with {key}={value!r}"
            for key, value in self.options.items()
            if key in saved.options and saved.options[key] != value and key not in _OF_TENSORS
        ]

    def to_json(self) -> dict[str, Any]:
        """The record as JSON, without its own checksum."""
        return {"format": _FORMAT, "format_version": _FORMAT_VERSION, **self._written(*Agreement)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Manifest:
        """The manifest, of what `to_json` returned, or of what a readable version of the package has written.

        Raises:
            KeyError: the record lacks a field.
            TypeError, ValueError, ConfigError: the value of a field is not allowed.
        """
        return cls(**_values(record, record["format_version"]))

    def compared(self, agreement: Agreement) -> dict[str, Any]:
        """The fields that the ranks compare under that agreement, as JSON."""
        return self._written(agreement)

    def _written(self, *agreements: Agreement) -> dict[str, Any]:
        rules = {declared.name: fields.rule_of(declared) for declared in dataclasses.fields(self)}
        return {name: rule.write(getattr(self, name)) for name, rule in rules.items() if rule.compared in agreements}

    def to_bytes(self) -> bytes:
        """The content of the file: the record, and the CRC-32 of the record's canonical text."""
        record = self.to_json()
        own_checksum = fields.hexadecimal(_record_checksum(record))
        return json.dumps({**record, "checksum": own_checksum}, indent=1).encode() + b"\n"

    def check_size(self) -> None:
        """Refuse a manifest that would be longer than a reader takes. No communication.

        Raises:
            UnsupportedModelError: the file would be too long, with its files and checksums.
        """
        # A checksum takes a line: the name, written as JSON, and less than 20 bytes more; a tensor takes about 200.
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


def is_live(manifest: Manifest) -> bool:
    """Whether it is that of a snapshot of the live weights: one track of hard copies, called `LIVE_TRACK`."""
    record = manifest.tracks.get(LIVE_TRACK, {})
    is_copy = record.get("type") == "ConstantSchedule" and record.get("momentum") == 1.0
    return is_copy and len(manifest.tracks) == 1


def find_saved(source: Path) -> Path:
    """The folder of the average at `source`: the source itself, or the only saved average in a checkpoint.

    Raises:
        CheckpointNotFoundError: there is no saved average, or there are several to choose from.
    """
    if source.is_file():
        raise CheckpointNotFoundError(
            f"{source} is a file, expected the folder of a saved average{kind_text(source) or _OF_A_FILE}"
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
    deeper = _averages_deeper(folder)
    if deeper:
        names = ", ".join(deeper[:3]) + (", ..." if len(deeper) > 3 else "")
        raise CheckpointNotFoundError(
            f"{folder} is no saved average, and no checkpoint with one: folders in it hold {len(deeper)} ({names}). "
            "Give the folder of one of them; dist-ema inspect lists them all"
        )
    raise CheckpointNotFoundError(
        f"{folder} holds no saved average: neither it nor a folder in it has a {MANIFEST_NAME}. An export "
        "(consolidate, synthesize) has none: load its files with safetensors, or begin an average there with "
        "ShardedEMA.start_from"
    )


def _averages_deeper(folder: Path) -> list[str]:
    """The saved averages in the folders in a folder, such as that of a run; their paths below it."""
    try:
        inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        return [f"{path.name}/{contents.name_of(average)}" for path in inside for average in contents.averages_in(path)]
    except OSError:
        return []


_OF_A_FILE = ". One file has no manifest: begin an average at its weights with ShardedEMA.start_from"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a saved average, as `read_summed` does, without the checksum. No communication."""
    return read_summed(folder)[0]


def read_summed(folder: Path) -> tuple[Manifest, int]:
    """Read the manifest of a saved average, and the CRC-32 of the bytes of its file. No communication.

    A save between two reads would pair the manifest of one average with the checksum of another. So the file is read
    once.

    Raises:
        CheckpointCorruptError: there is no manifest, or it is not in order.
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
        manifest = Manifest.from_json(record)
        if version >= 2 and any(
            manifest.checksums.get(track, {}).keys() != manifest.tensors.keys() for track in manifest.tracks
        ):
            raise ValueError("there is not one checksum for each tensor of each track")
        if manifest.form is not None:
            manifest.form.check_names(manifest.tensors)
        for alias, fqn in manifest.aliases.items():
            if fqn not in manifest.tensors or alias in manifest.tensors:
                raise ValueError(f"{alias[:80]!r} is tied to {fqn[:80]!r}, expected a further name of a tensor")
    except (KeyError, TypeError, ValueError, RecursionError, ConfigError) as error:
        lacks = f"it lacks the field {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointCorruptError(
            f"{path} is not as it was written: {lacks[:300]}. Restore it from a copy, or use an older checkpoint"
        ) from error
    return manifest, checksum(content)


def _values(record: Mapping[str, Any], version: int) -> dict[str, Any]:
    """The values of the fields that a record has; a field that is not declared is ignored."""
    values = {}
    for declared in dataclasses.fields(Manifest):
        rule, name = fields.rule_of(declared), declared.name
        if name in record or (rule.since is not None and version >= rule.since):
            values[name] = rule.read(record[name])
    return values


def _check_depth(value: object, depth: int = 0) -> None:
    """Refuse a record that is nested too deep: it would exhaust the stack. No record of this package is so deep."""
    if depth > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} deep")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, depth + 1)


def _check_record(record: dict[str, Any]) -> None:
    """Refuse a record that has changed since it was written."""
    written = record.pop("checksum")
    if written != fields.hexadecimal(_record_checksum(record)):
        raise ValueError("its checksum does not fit its content: it was damaged, or edited")


def _record_checksum(record: Mapping[str, Any]) -> int:
    return checksum(json.dumps(record, sort_keys=True, separators=(",", ":")).encode())


def _as_saved(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A clause with the saved value of `total_steps`, where this run has another: a longer run is the usual reason."""
    before, after = _total_steps(saved), _total_steps(now)
    if before is None or after is None or before == after:
        return ""
    return f", total_steps={before} included, whatever the length of this run"


def _total_steps(schedule: Mapping[str, Any]) -> int | None:
    """The `total_steps` of a schedule's JSON, or of the schedule within it."""
    while isinstance(schedule.get("schedule"), dict):
        schedule = schedule["schedule"]
    total_steps = schedule.get("total_steps")
    return total_steps if type(total_steps) is int else None


_DEEPEST = 32
# The options that leave tensors out. A load compares the tensors, and speaks of these.
_OF_TENSORS = ("trainable_only", "averaged_only")
