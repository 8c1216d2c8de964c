"""Folders that are either whole or not there: staged beside the target, committed by rename.

For a target `ema`, in the same parent folder:

    .ema.staging   being written; worthless until committed
    .ema.old       the former content, between the two renames of a commit over an existing folder

    commit:   ema -> .ema.old     .ema.staging -> ema     delete .ema.old
    reader:   ema if it is there, else .ema.old: the whole new one or the whole old one

Every function works on local files only and is called by one rank. No communication.
"""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_ema.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from dist_ema.headers import read_header, read_small

__all__ = [
    "MARK",
    "MARK_VALUE",
    "averages_in",
    "discard",
    "has_manifest",
    "is_average",
    "is_export",
    "link",
    "name_of",
    "publish",
    "resolve",
    "stage",
    "staging_of",
    "sync_folder",
    "was_begun",
]

# What this package puts into the folders it owns; whatever else is there was added by somebody.
_OWN_FILE = re.compile(r"manifest\.json|model\.safetensors(\.index\.json)?|model-\d{5,}-of-\d{5,}\.safetensors")


# In the header of every safetensors file this package writes: tells its exports from somebody's model folder.
MARK, MARK_VALUE = "written_by", "dist_ema"


def has_manifest(folder: Path) -> bool:
    """Whether the folder looks like a saved average."""
    return os.path.lexists(folder / "manifest.json")


def is_average(folder: Path) -> bool:
    """Whether the folder is a saved average of this package; a damaged manifest counts if the tensors are ours."""
    if not has_manifest(folder):
        return False
    if _manifest(folder).get("format") == "dist_ema":
        return True
    return any(_is_marked(path) for pattern in ("*.safetensors", "*/*.safetensors") for path in folder.glob(pattern))


def is_export(folder: Path) -> bool:
    """Whether the folder is an export: files of ours, no manifest."""
    files = list(folder.glob("*.safetensors"))
    return bool(files) and not has_manifest(folder) and all(_is_marked(path) for path in files)


def _manifest(folder: Path) -> dict[str, Any]:
    """What the manifest says, unchecked; nothing if it cannot be read."""
    try:
        record = json.loads(read_small(folder / "manifest.json"))
    except (CheckpointCorruptError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _is_marked(path: Path) -> bool:
    try:
        return read_header(path).metadata.get(MARK) == MARK_VALUE
    except CheckpointCorruptError:
        return False


def stage(target: Path, replaceable: Callable[[Path], bool]) -> Path:
    """Make the empty staging folder of `target`, after clearing what a killed commit left behind.

    Args:
        target: the folder that will be committed.
        replaceable: whether a folder that is there may be replaced: `is_average` or `is_export`.

    Raises:
        CheckpointError: the target exists and is something else.
        OSError: the folder cannot be written.
    """
    _make_parents(target)
    old = _old(target)
    if old.exists():
        if _is_filled(target):
            _remove(old)
        else:
            if target.is_dir():
                target.rmdir()
            old.rename(target)
    if target.exists():
        _check_replaceable(target, replaceable)
    discard(target)
    staging = staging_of(target)
    staging.mkdir()
    return staging


def _make_parents(target: Path) -> None:
    """Make the folders above the target, durably."""
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync(folder.parent)


def publish(target: Path) -> None:
    """Rename the staged folder to its final name, replacing what is there; durable on return.

    Files that somebody has added to the former folder are carried over.
    """
    if target.exists():
        _carry_over(target, staging_of(target))
    sync_folder(staging_of(target))
    old = _old(target)
    if target.exists():
        target.rename(old)
    try:
        staging_of(target).rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    _sync(target.parent)
    _remove(old)


def discard(target: Path) -> None:
    """Remove the staged folder of `target`, if there is one."""
    _remove(staging_of(target))
    for trash in target.parent.glob(f".{glob.escape(target.name)}.trash-*"):
        shutil.rmtree(trash, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a folder; one that cannot be removed now (NFS keeps files that somebody reads) goes out of the way."""
    if not folder.exists():
        return
    try:
        shutil.rmtree(folder)
    except OSError:
        if folder.exists():
            base = folder.name.rpartition(".")[0]
            folder.rename(folder.parent / f"{base}.trash-{secrets.token_hex(4)}")


def _is_filled(folder: Path) -> bool:
    """Whether something is there that is not an empty folder."""
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def resolve(target: Path) -> Path:
    """The folder to read for `target`: itself, or the former one if a commit was cut off between its renames.

    Raises:
        CheckpointNotFoundError: neither exists.
    """
    for folder in (target, _old(target)):
        if folder.is_dir() and _is_filled(folder):
            return folder
    if target.is_dir():
        return target
    if target.exists():
        raise CheckpointNotFoundError(f"{target} is a file, expected the folder of a saved average")
    raise CheckpointNotFoundError(
        f"there is no folder {target}, expected a saved average: check the path; under accelerate it is "
        "<output_dir>/<name>, written by save_state once the average is attached"
    )


def was_begun(target: Path) -> bool:
    """Whether there is a trace of `target`: the folder, a former one, or one whose writing was cut off."""
    return any(os.path.lexists(path) for path in (target, _old(target), staging_of(target)))


def averages_in(folder: Path) -> list[Path]:
    """The saved averages in a folder, by name; a former one stands for one whose commit was cut off."""
    found = {path.name: path for path in folder.iterdir() if not path.name.startswith(".")}
    for path in folder.glob(".*.old"):
        if not _is_filled(found.get(name_of(path), folder / "-")):
            found[name_of(path)] = path
    return [found[name] for name in sorted(found) if has_manifest(found[name])]


def name_of(folder: Path) -> str:
    """The name of a committed folder, also of a former one whose commit was cut off."""
    return folder.name[1:-4] if folder.name.startswith(".") else folder.name


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder, and of all folders below it, durable."""
    for path, _, _ in os.walk(folder):
        _sync(Path(path))


def _sync(path: Path) -> None:
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


def _check_replaceable(target: Path, replaceable: Callable[[Path], bool]) -> None:
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file, expected a folder to write or a free name")
    working = _working_folder()
    if working is not None and (target == working or target in working.parents):
        raise CheckpointError(f"{target} is the working folder, and saving replaces the whole folder: name one in it")
    if any(target.iterdir()) and not replaceable(target):
        told = "a saved average" if is_average(target) else "no saved average of ours"
        raise CheckpointError(
            f"{target} is {told}, and this call would "
            "replace it by something else: give the name of a new or empty folder"
        )


def _carry_over(source: Path, staging: Path) -> None:
    """Give the new folder what somebody has added to the former one: a config.json, a tokenizer, notes."""
    tracks = _track_folders(source)
    for path in source.iterdir():
        added = staging / path.name
        if path.name in tracks and path.is_dir() and not path.is_symlink():
            if added.is_dir():
                _carry_over(path, added)
        elif path.is_dir() and added.is_dir() and not path.is_symlink():
            _carry_over(path, added)
        elif _OWN_FILE.fullmatch(path.name) or added.exists():
            continue
        elif path.is_dir() and not path.is_symlink():
            shutil.copytree(path, added, symlinks=True, copy_function=link)
        else:
            link(path, added)


def link(source: str | Path, target: str | Path) -> None:
    """Give the file a second name where the file system can, else copy it durably."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
        if not Path(target).is_symlink():
            _sync(Path(target))


def _track_folders(target: Path) -> set[str]:
    tracks = _manifest(target).get("tracks")
    return set(tracks) if isinstance(tracks, dict) and len(tracks) > 1 else set()


def _working_folder() -> Path | None:
    """The working folder; None if it has been removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None
