"""The saved averages of a run, one line for each: their manifests alone are read. No communication."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from dist_ema.disk.folders import contents
from dist_ema.disk.manifest import MANIFEST_NAME, Manifest, read_manifest
from dist_ema.errors import CheckpointError, DistEMAError

__all__ = ["ListedAverage", "averages_below", "bytes_of", "holds_average", "read_listing"]


@dataclasses.dataclass(frozen=True)
class ListedAverage:
    """A saved average in the folder of a run.

    Attributes:
        folder: its folder.
        manifest: the record in it; None if that cannot be read.
        damage: why it cannot be read; "" if it can.
        file_bytes: the bytes of its files of weights, as the manifest lists them.
        saved_at: when the manifest was written, in seconds since the epoch.
    """

    folder: Path
    manifest: Manifest | None
    damage: str
    file_bytes: int
    saved_at: float


def holds_average(source: Path) -> bool:
    """Whether the path means a saved average, or a folder with one or several in it; else it has plain weights at most.

    Raises:
        CheckpointNotFoundError: there is nothing.
    """
    if source.is_file():
        return False
    folder = contents.resolve(source)
    return contents.has_manifest(folder) or bool(contents.averages_in(folder))


def averages_below(folder: Path) -> list[Path]:
    """The saved averages that a folder means: itself, or all in it and in the folders in it.

    So a folder of snapshots has them, a folder of checkpoints that hold an average, and the folder of a run.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    if contents.has_manifest(folder):
        return [folder]
    try:
        folders = contents.averages_in(folder)
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith(".") and not contents.has_manifest(path):
                folders += contents.averages_in(path)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be searched for saved averages: {error}") from error
    return folders


def read_listing(folder: Path) -> list[ListedAverage]:
    """The saved averages of a run, ascending by their number of updates; what cannot be read comes first.

    One that a rotation removes meanwhile is left out.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    listed = []
    for path in averages_below(folder):
        try:
            manifest = read_manifest(path)
            listed.append(
                ListedAverage(path, manifest, "", bytes_of(path, manifest), (path / MANIFEST_NAME).stat().st_mtime)
            )
        except (DistEMAError, OSError) as error:
            if os.path.lexists(path):
                listed.append(ListedAverage(path, None, str(error), 0, 0.0))
    return sorted(listed, key=lambda one: (-1 if one.manifest is None else one.manifest.num_updates, one.folder))


def bytes_of(folder: Path, manifest: Manifest) -> int:
    """The bytes of the files of weights of an average; format version 1 does not list them, so they are looked at."""
    if manifest.files:
        return sum(file.size_bytes for file in manifest.files.values())
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
