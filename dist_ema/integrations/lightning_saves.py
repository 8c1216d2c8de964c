"""Where the average of a Lightning checkpoint lies, and what is called when Lightning saves or removes one.

    X.ckpt, a file               X.<name>/ beside it
    X.ckpt, a folder             X.ckpt/<name>/ in it
    last.ckpt, a link to X.ckpt  the average of X.ckpt; last.<name> is a link to it, for people

Lightning tells its callbacks of a save without the path, and of a removal not at all. Every save goes through
`trainer.save_checkpoint`, every removal through `trainer.strategy.remove_checkpoint`: both are extended on the objects.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_ema.checks import absolute, local
from dist_ema.disk.folders.contents import is_average

__all__ = ["extend", "link_last", "near", "place_for", "place_of", "remove_average", "writes_folders"]

_EXTENSION = ".ckpt"


def place_of(checkpoint: object, name: str) -> Path:
    """The folder of the average of a checkpoint that is there; of a link that of its target.

    Raises:
        ConfigError: the path is a URL.
    """
    path = absolute(checkpoint)
    return path / name if path.is_dir() else _beside(path, name)


def near(checkpoint: object) -> list[Path]:
    """The folders in which a checkpoint that is there may have averages, of any name."""
    path = absolute(checkpoint)
    if path.is_dir():
        return list(path.glob("*"))
    return [folder for folder in path.parent.glob("*") if folder.name.startswith(f"{_stem(path)}.")]


def place_for(checkpoint: object, name: str, *, as_folder: bool) -> Path:
    """The folder of the average of a checkpoint that is about to be written.

    Raises:
        ConfigError: the path is a URL.
    """
    path = _unlinked(checkpoint)
    if not as_folder:
        return _beside(path, name)
    if path.is_file():  # the strategy does the same, a moment later
        path.unlink()
    return path / name


def remove_average(checkpoint: object, name: str) -> None:
    """Remove the average beside a checkpoint that was removed; one in its folder went with it."""
    place = _beside(_unlinked(checkpoint), name)
    if place.is_symlink():
        place.unlink()
    elif is_average(place):
        shutil.rmtree(place)


def link_last(trainer: Any, name: str) -> None:
    """Link the averages of the checkpoints that `ModelCheckpoint(save_last="link")` has linked, as these are."""
    for callback in trainer.checkpoint_callbacks:
        last = getattr(callback, "last_model_path", "")
        if not last or not os.path.islink(last) or os.path.isdir(last):
            continue
        link, target = _beside(_unlinked(last), name), place_of(last, name)
        if os.path.realpath(link) == str(target) or not target.is_dir():
            continue
        remove_average(last, name)
        if not os.path.lexists(link):
            link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)


def writes_folders(strategy: Any) -> bool:
    """Whether the checkpoints of a strategy are folders; Lightning has no public name for it."""
    return bool(
        getattr(strategy, "_save_distributed_checkpoint", False)
        or getattr(strategy, "_state_dict_type", "full") == "sharded"
    )


def _beside(path: Path, name: str) -> Path:
    return path.with_name(f"{_stem(path)}.{name}")


def _stem(path: Path) -> str:
    return path.name.removesuffix(_EXTENSION)


def _unlinked(checkpoint: object) -> Path:
    """The absolute path, which may be a link itself."""
    return Path(os.path.abspath(os.path.expanduser(local(checkpoint))))


def extend(target: Any, method: str, extended: Callable[..., Any]) -> None:
    """Extend a method of an object, whose class stays as it is.

    Args:
        target: the object.
        method: the name of the method.
        extended: is called in its place, with the former method first.
    """
    former = getattr(target, method)
    setattr(target, method, functools.wraps(former)(functools.partial(extended, former)))
