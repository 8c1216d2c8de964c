"""The content of a target and of the folders beside it: which ones this package wrote, which are whole, which to read.

For a target `ema`, in the same parent folder:

    .ema.old              the former content, between the two renames of a commit over an existing folder
    .ema.staging-TOKEN    a folder that is being written; worthless until it is committed
    .ema.writer-TOKEN     the record of the writer of the staging folder of the same token (claims.py)
    .ema.old-TOKEN        a former content that is being removed, or a target that was not whole
    .ema.trash-TOKEN      a staging folder that is being removed

    reader:   ema if it is whole, else .ema.old if that is whole: the whole new content or the whole old content

No function here changes a folder. No communication.
"""

from __future__ import annotations

import enum
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_ema.disk.formats.checksums import checksum
from dist_ema.disk.formats.file_names import WEIGHTS_FILE, index_name
from dist_ema.disk.formats.headers import read_header, read_model_folder, read_small
from dist_ema.errors import CheckpointCorruptError, CheckpointNotFoundError

__all__ = [
    "ADAPTER_CONFIG_NAME",
    "FOLDER",
    "MANIFEST_NAME",
    "MARK",
    "MARK_VALUE",
    "OWN_FILE",
    "SMALL_FILES",
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
    "own_files",
    "resolve",
    "takes_adapters",
    "track_folders",
    "was_begun",
]

# The names of the files that this package writes into a folder; the user has added every other file.
# The record of a saved average. It is written last, so a folder that has it is complete.
MANIFEST_NAME = "manifest.json"

OWN_FILE = re.compile(rf"manifest\.json|{WEIGHTS_FILE.pattern}")

# The mark in the header of every safetensors file of this package: it tells an export from another tool's model folder.
MARK, MARK_VALUE = "written_by", "dist_ema"

# Further marks in a header: the names of the small files that were written beside the file, and, in a folder with
# several adapters, the name of its sub-folder. They tell the files of this package in an export, which has no manifest.
SMALL_FILES, FOLDER = "small_files", "folder"

# By this file PEFT finds an adapter.
ADAPTER_CONFIG_NAME = "adapter_config.json"
# By this file a folder is a checkpoint of the Trainer.
_TRAINER_STATE_NAME = "trainer_state.json"

# The names of files of weights, whatever tool wrote them.
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|distcp|npz|gguf|h5|msgpack)|manifest\.json")


class Content(enum.Enum):
    """The kinds of content of a folder."""

    NOTHING = "nothing"
    AVERAGE = "a whole saved average"
    EXPORT = "a whole export"
    PART = "what is left of an average or export of this package"
    ADDED = "files beside the weights, and no weights"
    FOREIGN = "a file, or weights of another tool"


def content_of(folder: Path) -> Content:
    """The present content of a folder. The tensors are not read."""
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
    return os.path.lexists(folder / MANIFEST_NAME)


def is_average(folder: Path) -> bool:
    """Whether the folder is a saved average of this package; with a damaged manifest the marks of its tensors tell."""
    if not has_manifest(folder):
        return False
    if _manifest(folder).get("format") == "dist_ema":
        return True
    return any(_is_marked(path) for pattern in ("*.safetensors", "*/*.safetensors") for path in folder.glob(pattern))


def is_export(folder: Path) -> bool:
    """Whether the folder is an export: it has files of this package, and no manifest."""
    if has_manifest(folder):
        return False
    files = list(folder.glob("*.safetensors")) or list(_parts_of_export(folder))
    return bool(files) and all(_is_marked(path) for path in files)


def _parts_of_export(folder: Path) -> Iterator[Path]:
    """The files that an export has in sub-folders, one for each of several adapters."""
    for path in folder.glob("*/*.safetensors"):
        if _marks(path).get(FOLDER) == path.parent.name:
            yield path


def _manifest(folder: Path) -> dict[str, Any]:
    """The record of the manifest, unchecked; empty if it cannot be read."""
    try:
        record = json.loads(read_small(folder / MANIFEST_NAME))
    except (CheckpointCorruptError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def takes_adapters(folder: Path) -> bool:
    """Whether a sub-folder with an adapter at its top would be taken for one of this folder's adapters.

    It is so in a folder that PEFT has saved, and in a checkpoint of the Trainer of transformers.
    """
    return any((folder / name).is_file() for name in (ADAPTER_CONFIG_NAME, _TRAINER_STATE_NAME))


def own_files(folder: Path) -> set[str]:
    """The paths below a folder of what this package has written there. The user has added all other files.

    They are what the manifest lists. An export has none: the headers of its files tell, or else the names.
    """
    record = _manifest(folder)
    if record.get("format") == "dist_ema":
        return {MANIFEST_NAME, *_listed(record)}
    own = {MANIFEST_NAME}
    for path in [*folder.glob("*.safetensors"), *_parts_of_export(folder)]:
        marks = _marks(path)
        if marks.get(MARK) == MARK_VALUE:
            names = [path.name, *marks.get(SMALL_FILES, "").split()]
            of_weights = WEIGHTS_FILE.fullmatch(path.name)
            names += [index_name(of_weights[1])] if of_weights else []
            above = path.parent.relative_to(folder)
            own |= {str(above / name) for name in names}  # one that leads out of the folder is no file in it
    return own


def _listed(record: dict[str, Any]) -> Iterator[str]:
    """The paths of the files in a manifest, and of the small files of all tracks."""
    files, tracks, form = record.get("files"), record.get("tracks"), record.get("form")
    yield from files if isinstance(files, dict) else ()
    small_files = form.get("small_files") if isinstance(form, dict) else ()
    for name in small_files if isinstance(small_files, list) else ():
        yield str(name)
        for track in tracks if isinstance(tracks, dict) else ():
            yield f"{track}/{name}"


def _is_marked(path: Path) -> bool:
    return _marks(path).get(MARK) == MARK_VALUE


def _marks(path: Path) -> Mapping[str, str]:
    """The text in the header of a file; empty if it cannot be read."""
    try:
        return read_header(path).metadata
    except CheckpointCorruptError:
        return {}


def _has_files(folder: Path, record: dict[str, Any]) -> bool:
    """Whether every file that the manifest lists is there and has its size; format version 1 lists no files."""
    try:
        files = record.get("files", {}).items()
        return all((folder / name).stat().st_size == file["size_bytes"] for name, file in files)
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return False


def _is_whole_model(folder: Path) -> bool:
    """Whether no file of an export is missing, as far as names tell; the caller has checked those that are there."""
    if not any(OWN_FILE.fullmatch(path.name) for path in folder.glob("*.safetensors*")):
        return True  # another library chose the names
    try:
        read_model_folder(folder)
    except CheckpointCorruptError:
        return False
    return True


def fingerprint(folder: Path) -> object:
    """A value that tells the average or export in the folder from any other, also after a rename; None without one.

    For an average it is the checksum of the manifest, which has the checksums of all tensors: a network file system may
    show late what other ranks have done to their files. For an export it is the names, sizes and numbers of its files.
    """
    if has_manifest(folder):
        try:
            return checksum(read_small(folder / MANIFEST_NAME))
        except CheckpointCorruptError:
            return "unreadable"
    try:
        names = [name for name in sorted(os.listdir(folder)) if OWN_FILE.fullmatch(name)]
        names = names or sorted(str(path.relative_to(folder)) for path in _parts_of_export(folder))
        stats = [(name, os.stat(folder / name)) for name in names]
    except OSError:
        return None
    return tuple((name, stat.st_size, stat.st_ino) for name, stat in stats) or None


def resolve(target: Path) -> Path:
    """The folder to read for `target`: the target, or the former folder if that is whole and the target is not.

    The latter is so between the renames of a commit. It warns if the target is there and has other content.

    Raises:
        CheckpointNotFoundError: neither exists.
    """
    old = old_of(target)
    if os.path.lexists(old):
        content = content_of(target)
        if content in (Content.NOTHING, Content.ADDED, Content.PART) and is_whole(old):
            if content is not Content.NOTHING:
                _warn(target, content)
            return old
    for folder in (target, old):
        if folder.is_dir() and any(folder.iterdir()):
            return folder
    for aside in beside(target, "old"):  # two writers died within moments: see `_clear` in commit.py
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
    """The former average of a target whose content is no average; it warns if there is one."""
    old = old_of(target)
    if not os.path.lexists(old) or content_of(old) is not Content.AVERAGE:
        return None
    _warn(target, content_of(target))
    return old


def _warn(target: Path, content: Content) -> None:
    warnings.warn(
        f"{target} holds {content.value}, where a save was cut off between its renames. The former content is whole "
        f"and is read instead: {old_of(target)}. The next save brings them together, or says what is in its way",
        UserWarning,
        stacklevel=4,
    )


def averages_in(folder: Path) -> list[Path]:
    """The saved averages in a folder, by name; a former average stands for one whose commit was cut off."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    names |= {name_of(path) for path in folder.glob(".*.old")}
    candidates = []
    for name in sorted(names):
        if os.path.lexists(old_of(folder / name)):
            try:
                candidates.append(resolve(folder / name))
            except CheckpointNotFoundError:  # it was renamed at this moment
                candidates.append(folder / name)
        else:
            candidates.append(folder / name)
    return [path for path in candidates if has_manifest(path)]


def name_of(folder: Path) -> str:
    """The name of a committed folder, also of a former folder that stands for one whose commit was cut off."""
    return folder.name[1:-4] if folder.name.startswith(".") else folder.name


def was_begun(target: Path) -> bool:
    """Whether there is a trace of `target`: the folder, its former content, or a save that was cut off."""
    return os.path.lexists(target) or any(True for _ in beside(target, "old", "staging", "writer", "trash"))


def old_of(target: Path) -> Path:
    """The path of the former content."""
    return target.parent / f".{target.name}.old"


def beside(target: Path, *kinds: str) -> list[Path]:
    """The paths of some kinds beside the target: with a token, or without one, as former versions named them."""
    begin = f".{target.name}."  # of thousands of siblings few are looked at
    pattern = re.compile(rf"({'|'.join(kinds)})(-[0-9a-f]{{8,}})?")
    try:
        names = [name for name in os.listdir(target.parent) if name.startswith(begin)]
    except OSError:
        return []
    return [target.parent / name for name in sorted(names) if pattern.fullmatch(name, len(begin))]


def track_folders(target: Path) -> set[str]:
    """The sub-folders of the tracks; empty where there is one track."""
    tracks = _manifest(target).get("tracks")
    return set(tracks) if isinstance(tracks, dict) and len(tracks) > 1 else set()
