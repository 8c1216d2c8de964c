"""Files that the user has added to a folder go with it into the next one. Local files only; no communication."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from dist_ema.disk.folders.contents import own_files, track_folders
from dist_ema.disk.formats.file_names import WEIGHTS_FILE, stem_in

__all__ = ["carry_over", "sync"]


def carry_over(source: Path, staging: Path, unfit: Collection[str] = ()) -> None:
    """Give the new folder what the user has added to the former one: a config.json, a tokenizer, notes.

    Args:
        source: the former folder.
        staging: the new one.
        unfit: the names of the files that are left behind.
    """
    _carry(
        source, staging, _Former(source, own_files(source), track_folders(source), stem_in(staging), frozenset(unfit))
    )


class _Former(NamedTuple):
    """The former folder, and what of it is left behind.

    Attributes:
        folder: the folder.
        own: the paths in it of what this package wrote.
        tracks: the sub-folders of its tracks.
        stem: what the names of the new weights begin with: a loader could take others of that name for them.
        unfit: the names of files that do not describe the new weights.
    """

    folder: Path
    own: set[str]
    tracks: set[str]
    stem: str | None
    unfit: Collection[str]

    def leaves(self, path: Path) -> bool:
        """Whether a file of the folder is left behind."""
        below = str(path.relative_to(self.folder))
        if below in self.own:
            return True
        if path.parent != self.folder and path.parent.name not in self.tracks:
            return False
        weights = WEIGHTS_FILE.fullmatch(path.name)
        return path.name in self.unfit or (weights is not None and self.stem in (None, weights[1]))


def _carry(source: Path, staging: Path, former: _Former) -> None:
    for path in source.iterdir():
        added = staging / path.name
        if not path.is_dir() or path.is_symlink():
            if not former.leaves(path) and not os.path.lexists(added):
                _link(path, added)
        elif not added.is_dir() and (path.parent == former.folder and path.name in former.tracks):
            continue
        elif not os.path.lexists(added):
            added.mkdir()
            _carry(path, added, former)
            if any(path.iterdir()) and not any(added.iterdir()):  # all of it was written by this package
                added.rmdir()
            else:
                shutil.copystat(path, added)
        elif added.is_dir() and not added.is_symlink():
            _carry(path, added, former)


def _link(source: Path, target: Path) -> None:
    """Give the file a second name where the file system can do that, else copy it durably."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
        if not target.is_symlink():
            sync(target)


def sync(path: Path) -> None:
    """Make a file, or the entries of a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
