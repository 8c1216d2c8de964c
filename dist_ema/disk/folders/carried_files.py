"""Files that the user has added to a folder go with it into the next one. Local files only; no communication."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from dist_ema.disk.folders.contents import OWN_FILE, track_folders

__all__ = ["carry_over", "sync"]


def carry_over(source: Path, staging: Path, unfit: Collection[str] = ()) -> None:
    """Give the new folder what the user has added to the former one: a config.json, a tokenizer, notes.

    Args:
        source: the former folder.
        staging: the new one.
        unfit: the names of the files that are left behind.
    """
    tracks = track_folders(source)
    for path in source.iterdir():
        added = staging / path.name
        if path.name in tracks and path.is_dir() and not path.is_symlink():
            if added.is_dir():
                carry_over(path, added, unfit)
        elif path.is_dir() and added.is_dir() and not path.is_symlink():
            carry_over(path, added, unfit)
        elif OWN_FILE.fullmatch(path.name) or path.name in unfit or os.path.lexists(added):
            continue
        elif path.is_dir() and not path.is_symlink():
            shutil.copytree(path, added, symlinks=True, copy_function=_link)
        else:
            _link(path, added)


def _link(source: str | Path, target: str | Path) -> None:
    """Give the file a second name where the file system can do that, else copy it durably."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
        if not Path(target).is_symlink():
            sync(Path(target))


def sync(path: Path) -> None:
    """Make a file, or the entries of a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
