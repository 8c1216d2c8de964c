"""Folders that are either whole or not there: staged beside the target, committed by rename.

For a target `ema`, in the same parent folder:

    .ema.staging   being written; worthless until committed
    .ema.old       the former content, between the two renames of a commit over an existing folder

    commit:   ema -> .ema.old     .ema.staging -> ema     delete .ema.old
    reader:   ema if it is there, else .ema.old: the whole new one or the whole old one

Every function works on local files only and is called by one rank. No communication.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from dist_ema.errors import CheckpointError, CheckpointNotFoundError

__all__ = ["discard", "publish", "resolve", "stage", "staging_of", "sync_folder"]

# What this package, and only this package, puts into the folders it owns. Anything else is somebody's own.
_OWN_FILE = re.compile(
    r"manifest\.json|model\.safetensors(\.index\.json)?|model-\d{5,}-of-\d{5,}\.safetensors"
    r"|(generation_)?config\.json"
)


def stage(target: Path) -> Path:
    """Make the empty staging folder of `target`, after clearing what a killed commit left behind.

    Raises:
        CheckpointError: the target exists and holds something that this package did not write.
        OSError: the folder cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    old = _old(target)
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)
    if target.exists():
        _check_replaceable(target)
    discard(target)
    staging = staging_of(target)
    staging.mkdir()
    return staging


def publish(target: Path) -> None:
    """Rename the staged folder to its final name, replacing what is there; durable on return."""
    sync_folder(staging_of(target))
    old = _old(target)
    if target.exists():
        target.rename(old)
    staging_of(target).rename(target)
    sync_folder(target.parent)
    if old.exists():
        shutil.rmtree(old)


def discard(target: Path) -> None:
    """Remove the staged folder of `target`, if there is one."""
    if staging_of(target).exists():
        shutil.rmtree(staging_of(target))


def resolve(target: Path) -> Path:
    """The folder to read for `target`: itself, or the former one if a commit was cut off between its renames.

    Raises:
        CheckpointNotFoundError: neither exists.
    """
    for folder in (target, _old(target)):
        if folder.is_dir():
            return folder
    if target.exists():
        raise CheckpointNotFoundError(f"{target} is a file, expected the folder of a saved average")
    raise CheckpointNotFoundError(
        f"there is no folder {target}, expected a saved average: check the path; under accelerate it is "
        "<output_dir>/<name>, written by save_state once the average is attached"
    )


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder and of its sub-folders durable."""
    for path in (*(entry for entry in folder.iterdir() if entry.is_dir()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def staging_of(target: Path) -> Path:
    """The folder in which `target` is being written."""
    return target.parent / f".{target.name}.staging"


def _old(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _check_replaceable(target: Path) -> None:
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file, expected a folder to write or a free name")
    foreign = [
        str(path.relative_to(target))
        for path in sorted(target.rglob("*"))
        if not path.is_dir() and not _OWN_FILE.fullmatch(path.name)
    ]
    if foreign:
        raise CheckpointError(
            f"{target} holds files that are not an average's ({', '.join(foreign[:3])}), and saving replaces the "
            "whole folder: give the name of a new or empty folder"
        )
