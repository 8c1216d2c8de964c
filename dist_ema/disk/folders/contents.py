"""What lies at a target and beside it: which folder is ours, which is whole, which one to read.

For a target `ema`, in the same parent folder:

    .ema.old              the former content, between the two renames of a commit over an existing folder
    .ema.staging-TOKEN    being written; worthless until committed
    .ema.writer-TOKEN     who writes the staging folder of the same token (claims.py)
    .ema.old-TOKEN        a former content on its way out
    .ema.trash-TOKEN      a staging folder on its way out

    reader:   ema if it is whole, else .ema.old if that is whole: the whole new one or the whole old one

Nothing here changes a folder. No communication.
"""

from __future__ import annotations

import enum
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

from dist_ema.disk.formats.checksums import checksum
from dist_ema.disk.formats.headers import read_header, read_model_folder, read_small
from dist_ema.errors import CheckpointCorruptError, CheckpointNotFoundError

__all__ = [
    "MARK",
    "MARK_VALUE",
    "OWN_FILE",
    "Content",
    "averages_in",
    "beside",
    "content_of",
    "fingerprint",
    "former_average",
    "has_manifest",
    "is_average",
    "is_export",
    "is_whole",
    "name_of",
    "old_of",
    "resolve",
    "track_folders",
    "was_begun",
]

# What this package puts into the folders it owns; whatever else is there was added by somebody.
OWN_FILE = re.compile(r"manifest\.json|model\.safetensors(\.index\.json)?|model-\d{5,}-of-\d{5,}\.safetensors")

# In the header of every safetensors file this package writes: tells its exports from somebody's model folder.
MARK, MARK_VALUE = "written_by", "dist_ema"

# Files that hold somebody's weights, whatever tool wrote them.
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|distcp|npz|gguf|h5|msgpack)|manifest\.json")


class Content(enum.Enum):
    """What a folder holds."""

    NOTHING = "nothing"
    AVERAGE = "a whole saved average"
    EXPORT = "a whole export"
    PART = "what is left of an average or export of ours"
    ADDED = "files beside the weights, and no weights"
    FOREIGN = "a file, or somebody's weights"


def content_of(folder: Path) -> Content:
    """What is there now. The tensors are not read."""
    if not os.path.lexists(folder):
        return Content.NOTHING
    if not folder.is_dir():
        return Content.FOREIGN
    if not any(folder.iterdir()):
        return Content.NOTHING
    if has_manifest(folder):
        record = _manifest(folder)
        if record.get("format") == "dist_ema":
            return Content.AVERAGE if _has_files(folder, record) else Content.PART
        return Content.PART if is_average(folder) else Content.FOREIGN
    if is_export(folder):
        return Content.EXPORT if _is_whole_model(folder) else Content.PART
    weights = [Path(at, name) for at, _, names in os.walk(folder) for name in names if _WEIGHTS.fullmatch(name.lower())]
    if not weights:
        return Content.ADDED
    return (
        Content.PART if all(path.suffix == ".safetensors" and _is_marked(path) for path in weights) else Content.FOREIGN
    )


def is_whole(folder: Path) -> bool:
    """Whether the folder is a saved average or an export with all of its files."""
    return content_of(folder) in (Content.AVERAGE, Content.EXPORT)


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


def _has_files(folder: Path, record: dict[str, Any]) -> bool:
    """Whether every file that the manifest lists is there, at its size; format version 1 lists none."""
    try:
        files = record.get("files", {}).items()
        return all((folder / name).stat().st_size == file["size_bytes"] for name, file in files)
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return False


def _is_whole_model(folder: Path) -> bool:
    """Whether no file of an export is missing, where its names tell; all that are there have been looked at."""
    if not any(OWN_FILE.fullmatch(path.name) for path in folder.glob("*.safetensors*")):
        return True  # the names of another library
    try:
        read_model_folder(folder)
    except CheckpointCorruptError:
        return False
    return True


def fingerprint(folder: Path) -> object:
    """What tells the average or export in the folder from any other, also after a rename; None if there is none.

    Of an average its manifest, which has the checksums of all tensors: what other ranks have done to their files may be
    told late on a network file system. Of an export the names, sizes and numbers of its files.
    """
    if has_manifest(folder):
        try:
            return checksum(read_small(folder / "manifest.json"))
        except CheckpointCorruptError:
            return "unreadable"
    try:
        found = [(name, os.stat(folder / name)) for name in sorted(os.listdir(folder)) if OWN_FILE.fullmatch(name)]
    except OSError:
        return None
    return tuple((name, stat.st_size, stat.st_ino) for name, stat in found) or None


def resolve(target: Path) -> Path:
    """The folder to read for `target`: itself, or the former one if that is whole and the target is not.

    So it is between the renames of a commit. Warns if the target is there and holds something else.

    Raises:
        CheckpointNotFoundError: neither exists.
    """
    old = old_of(target)
    if os.path.lexists(old):
        found = content_of(target)
        if found in (Content.NOTHING, Content.ADDED, Content.PART) and is_whole(old):
            if found is not Content.NOTHING:
                _warn(target, found)
            return old
    for folder in (target, old):
        if folder.is_dir() and any(folder.iterdir()):
            return folder
    for aside in beside(target, "old"):  # two writers died within moments: commit.py, _clear
        if is_whole(aside):
            return aside
    if target.is_dir():
        return target
    if target.exists():
        raise CheckpointNotFoundError(f"{target} is a file, expected the folder of a saved average")
    raise CheckpointNotFoundError(
        f"there is no folder {target}, expected a saved average: check the path; under accelerate it is "
        "<output_dir>/<name>, written by save_state once the average is attached"
    )


def former_average(target: Path) -> Path | None:
    """The former average of a target that holds something else than an average; warns if there is one."""
    old = old_of(target)
    if not os.path.lexists(old) or content_of(old) is not Content.AVERAGE:
        return None
    _warn(target, content_of(target))
    return old


def _warn(target: Path, found: Content) -> None:
    warnings.warn(
        f"{target} holds {found.value}, where a save was cut off between its renames. The former content is whole and "
        f"is read instead: {old_of(target)}. The next save brings them together, or says what is in its way",
        UserWarning,
        stacklevel=4,
    )


def averages_in(folder: Path) -> list[Path]:
    """The saved averages in a folder, by name; a former one stands for one whose commit was cut off."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    names |= {name_of(path) for path in folder.glob(".*.old")}
    found = []
    for name in sorted(names):
        if os.path.lexists(old_of(folder / name)):
            try:
                found.append(resolve(folder / name))
            except CheckpointNotFoundError:  # renamed at this moment
                found.append(folder / name)
        else:
            found.append(folder / name)
    return [path for path in found if has_manifest(path)]


def name_of(folder: Path) -> str:
    """The name of a committed folder, also of a former one whose commit was cut off."""
    return folder.name[1:-4] if folder.name.startswith(".") else folder.name


def was_begun(target: Path) -> bool:
    """Whether there is a trace of `target`: the folder, a former one, or one whose writing was cut off."""
    return os.path.lexists(target) or any(True for _ in beside(target, "old", "staging", "writer", "trash"))


def old_of(target: Path) -> Path:
    """The place of the former content."""
    return target.parent / f".{target.name}.old"


def beside(target: Path, *kinds: str) -> list[Path]:
    """What lies beside the target, of some kinds: with a token, or without one as former versions named it."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.({'|'.join(kinds)})(-[0-9a-f]{{8,}})?")
    try:
        return [target.parent / name for name in sorted(os.listdir(target.parent)) if pattern.fullmatch(name)]
    except OSError:
        return []


def track_folders(target: Path) -> set[str]:
    """The sub-folders of the tracks, where there are several."""
    tracks = _manifest(target).get("tracks")
    return set(tracks) if isinstance(tracks, dict) and len(tracks) > 1 else set()
