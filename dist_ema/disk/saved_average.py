"""A saved average as it lies on disk: its manifest and the headers of its files, which must agree.

The module loads no torch. No communication.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_ema.disk.folders.steady_reading import steadily
from dist_ema.disk.formats.checksums import checksum
from dist_ema.disk.formats.file_names import index_name
from dist_ema.disk.formats.headers import (
    TORCH_DTYPES,
    StoredFile,
    StoredModel,
    StoredTensor,
    open_regular,
    read_exactly,
    read_model_folder,
    read_small,
)
from dist_ema.disk.forms.form import TOP
from dist_ema.disk.manifest import MANIFEST_NAME, Manifest, SavedFile, find_saved, read_summed
from dist_ema.errors import CheckpointCorruptError, CheckpointMismatchError

__all__ = [
    "SavedAverage",
    "check_files",
    "damage_text",
    "damaged_tensors",
    "read_chunk",
    "read_saved",
    "stored_bytes",
    "was_replaced",
]

_CHUNK_BYTES = 8 * 2**20


@dataclasses.dataclass(frozen=True)
class SavedAverage:
    """A saved average whose manifest and headers were read.

    Attributes:
        folder: the folder of the average.
        manifest: the record in it.
        manifest_checksum: CRC-32 of the manifest file: folders with the same one have the same average.
        models: track name -> its files.
    """

    folder: Path
    manifest: Manifest
    manifest_checksum: int
    models: Mapping[str, StoredModel]

    def to_json(self) -> dict[str, Any]:
        """The average as JSON, for ranks that cannot read the folder."""
        return {
            "folder": str(self.folder),
            "manifest": self.manifest.to_json(),
            "manifest_checksum": self.manifest_checksum,
            "models": {track: model.to_json() for track, model in self.models.items()},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> SavedAverage:
        """The average, of what `to_json` returned."""
        models = {track: StoredModel.from_json(model) for track, model in record["models"].items()}
        manifest = Manifest.from_json(record["manifest"])
        return cls(Path(record["folder"]), manifest, record["manifest_checksum"], models)

    def folder_of(self, track: str) -> Path:
        """The folder of a track's files."""
        return self.folder / self.manifest.folder_of(track)

    def track(self, name: str | None) -> str:
        """The track of that name, or the only one.

        Raises:
            CheckpointMismatchError: there is no such track, or there are several to choose from.
        """
        tracks = list(self.manifest.tracks)
        if name is None and len(tracks) == 1:
            return tracks[0]
        if name is None:
            raise CheckpointMismatchError(
                f"{self.folder} holds {len(tracks)} tracks: name one of these by track= (--track): {', '.join(tracks)}"
            )
        if name not in tracks:
            raise CheckpointMismatchError(f"{self.folder} has no track {name!r}, expected one of: {', '.join(tracks)}")
        return name


def read_saved(source: Path, tracks: Sequence[str] | None = None) -> SavedAverage:
    """Find the average at `source`, that folder or the only one in it, and check its manifest against its files.

    If a save replaces the folder meanwhile, it is read again.

    Args:
        source: the folder of the average, or of the checkpoint that has it.
        tracks: the tracks whose files are checked; None for all.

    Raises:
        CheckpointNotFoundError: there is no saved average.
        CheckpointMismatchError: a newer version of the format wrote it.
        CheckpointCorruptError: files are missing, damaged, or contradict each other.
    """
    return steadily([source], lambda check: _read_saved(source, tracks))


def _read_saved(source: Path, tracks: Sequence[str] | None) -> SavedAverage:
    folder = find_saved(source)
    manifest, manifest_checksum = read_summed(folder)
    models = {}
    check_files(folder, manifest)
    for track in manifest.tracks if tracks is None else tracks:
        below = manifest.folder_of(track)
        models[track] = _read_model(folder / below, manifest)
        _check_tensors(folder / below, manifest, models[track])
        _check_files(folder, below, manifest, models[track])
    return SavedAverage(folder, manifest, manifest_checksum, models)


def _read_model(folder: Path, manifest: Manifest) -> StoredModel:
    """The files of a track, by the names of the manifest."""
    form = manifest.form
    if form is None:
        return read_model_folder(folder)
    places = {(form.folder_of(fqn), form.name_of(fqn)): fqn for fqn in manifest.tensors}
    files: dict[str, StoredFile] = {}
    tensors: dict[str, StoredTensor] = {}
    index_checksum = None
    for below in dict.fromkeys(sub_folder for sub_folder, _ in places):
        model = read_model_folder(folder / below, form.stem)
        above = "" if below == TOP else f"{below}/"
        index_checksum = model.index_checksum
        for file, header in model.files.items():
            renamed = {name: dataclasses.replace(at, file=above + file) for name, at in header.tensors.items()}
            files[above + file] = dataclasses.replace(header, tensors=renamed)
        for name, stored in model.tensors.items():
            fqn = places.get((below, name), name)
            tensors[fqn] = files[above + stored.file].tensors[name]
    return StoredModel(files, tensors, index_checksum, form.stem, form.names)


def was_replaced(saved: SavedAverage) -> bool:
    """Whether another average has taken the folder since it was read, or no average is there."""
    try:
        return checksum(read_small(saved.folder / MANIFEST_NAME)) != saved.manifest_checksum
    except CheckpointCorruptError:
        return True


def check_files(folder: Path, manifest: Manifest) -> None:
    """Refuse a folder that lacks a file of the manifest, or has it at another size; the files are not read.

    Raises:
        CheckpointCorruptError: a file is missing, or has another size.
    """
    for name, file in manifest.files.items():
        try:
            size_bytes = (folder / name).stat().st_size
        except OSError:
            raise CheckpointCorruptError(f"{folder / name} is missing, though {MANIFEST_NAME} lists it") from None
        if size_bytes != file.size_bytes:
            raise CheckpointCorruptError(
                f"{folder / name} is damaged: it has {size_bytes} bytes, {MANIFEST_NAME} says {file.size_bytes}"
            )


def _check_tensors(folder: Path, manifest: Manifest, model: StoredModel) -> None:
    for fqn, saved in manifest.tensors.items():
        stored = model.tensors.get(fqn)
        if stored is None:
            raise CheckpointCorruptError(f"{folder} lacks {fqn[:200]!r}, though its {MANIFEST_NAME} lists it")
        shape, dtype = stored.shape, TORCH_DTYPES[stored.dtype]
        if (shape, dtype) != (saved.shape, saved.dtype):
            raise CheckpointCorruptError(
                f"{folder / stored.file} has {fqn[:200]!r} as {dtype}{list(shape)}, its {MANIFEST_NAME} says "
                f"{saved.dtype}{list(saved.shape)}"
            )
    if len(model.tensors) != len(manifest.tensors):
        extra = [fqn for fqn in model.tensors if fqn not in manifest.tensors]
        raise CheckpointCorruptError(f"{folder} holds tensors that its {MANIFEST_NAME} does not list: {extra[:3]}")


def _check_files(folder: Path, below: str, manifest: Manifest, model: StoredModel) -> None:
    if not manifest.files:  # format version 1
        return
    present = {name: SavedFile(file.size_bytes, file.header_checksum) for name, file in model.files.items()}
    if model.index_checksum is not None:
        name = index_name(model.stem)
        present[name] = SavedFile((folder / below / name).stat().st_size, model.index_checksum)
    prefix = "" if below == "." else f"{below}/"
    for name, file in present.items():
        if manifest.files.get(prefix + name) != file:
            raise CheckpointCorruptError(
                f"{folder / below / name} is not the file that was saved: its size or its header's checksum differs "
                f"from what {MANIFEST_NAME} says"
            )


def damaged_tensors(saved: SavedAverage) -> Iterator[tuple[str, int, bool]]:
    """Read every tensor of every track. Yields its name (with its track), its bytes, and whether it is damaged.

    Whole files are read in bounded chunks. A tensor without a checksum (format version 1) counts as sound.
    """
    for track, model in saved.models.items():
        expected = saved.manifest.checksums.get(track, {})
        for fqn, stored in model.tensors.items():
            present = 0
            for chunk in stored_bytes(saved.folder_of(track), stored):
                present = checksum(chunk, present)
            yield f"{track}: {fqn}", stored.nbytes, expected.get(fqn, present) != present


def stored_bytes(folder: Path, stored: StoredTensor, *, chunk_bytes: int = _CHUNK_BYTES) -> Iterator[memoryview]:
    """The bytes of a tensor, in chunks of at most `chunk_bytes`; a chunk is overwritten by the next one.

    Raises:
        CheckpointCorruptError: the file is missing or too short.
    """
    buffer = memoryview(bytearray(min(chunk_bytes, stored.nbytes)))
    descriptor = _open(folder / stored.file)
    try:
        for done in range(0, stored.nbytes, chunk_bytes):
            chunk = buffer[: min(chunk_bytes, stored.nbytes - done)]
            read_exactly(descriptor, chunk, stored.start + done)
            yield chunk
    finally:
        os.close(descriptor)


def read_chunk(folder: Path, stored: StoredTensor, offset_bytes: int, buffer: memoryview) -> None:
    """Fill `buffer` from that offset of a tensor; the file is open for that long only.

    Raises:
        CheckpointCorruptError: the file is missing or too short.
    """
    descriptor = _open(folder / stored.file)
    try:
        read_exactly(descriptor, buffer, stored.start + offset_bytes)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        return open_regular(path)
    except OSError as error:
        raise CheckpointCorruptError(f"{path} cannot be read: {error.strerror}") from error


def damage_text(path: Path, names: Sequence[str]) -> str:
    """The text of an error about tensors whose checksums differ."""
    return (
        f"{path} is damaged: the bytes of {len(names)} tensors are not those that were saved "
        f"({', '.join(names[:3])}). Restore the folder from a copy, or use an older checkpoint"
    )
