"""Reading folders into which a job may be saving: a folder that was replaced meanwhile is read again. No communication.

A save replaces a whole folder by two renames. So a reader that opens its files one after the other may get the first
from the old folder and the second from the new one, or meet no folder at all for a moment.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from dist_ema.disk.folders.contents import MANIFEST_NAME, beside, fingerprint, has_manifest, old_of
from dist_ema.errors import CheckpointError, DistEMAError

__all__ = ["Attempts", "ReplacedError", "generation", "steadily"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

# Before a reader gives up a folder that is replaced every time, it makes this many attempts, and goes on for so long.
LEAST_ATTEMPTS = 3
LEAST_SECONDS = 30.0


class ReplacedError(CheckpointError):
    """The folders were replaced while they were read, though every single read went well. Only `steadily` sees it."""


def steadily(sources: Sequence[Path], read: Callable[[Callable[[], None]], T]) -> T:
    """Return what `read` returns of one state of the folders: they are read again if they were replaced while it ran.

    Args:
        sources: the paths that are read: folders of averages or exports, folders that contain such, or files.
        read: does all of the reading. It may call its argument before it uses what it has read: the argument raises if
            the folders were replaced.

    Raises:
        CheckpointError: every attempt met a save.
        DistEMAError: `read` raised it while no folder was replaced.
    """
    attempts = Attempts(sources)
    while True:
        before = generation(sources)

        def check(before: object = before) -> None:
            if generation(sources) != before:
                raise ReplacedError("it was replaced while it was read")

        try:
            result = read(check)
            check()
        except (DistEMAError, OSError) as error:
            if generation(sources) == before and not isinstance(error, ReplacedError):
                if isinstance(error, DistEMAError):
                    raise
                raise CheckpointError(f"{', '.join(map(str, sources))} cannot be read: {error}") from error
            attempts.count_one()
            if attempts.are_enough:
                raise attempts.refusal() from error
        else:
            return result


class Attempts:
    """The number of times that folders were replaced while they were read."""

    def __init__(self, sources: Sequence[Path]) -> None:
        self._sources = ", ".join(map(str, sources))
        self._count = 0
        self._began = time.monotonic()

    def count_one(self) -> None:
        """Count an attempt that has met a save."""
        self._count += 1
        _log.debug("%s: replaced while it was read, so it is read again", self._sources)

    @property
    def are_enough(self) -> bool:
        """Whether to give up."""
        return self._count >= LEAST_ATTEMPTS and time.monotonic() - self._began >= LEAST_SECONDS

    def refusal(self) -> CheckpointError:
        """The error to raise then."""
        return CheckpointError(
            f"{self._sources} was replaced each of {self._count} times that it was read: a job saves into it faster "
            "than it can be read. Read a folder that no job saves into, such as an export under a name of its own"
        )


def generation(sources: Sequence[Path]) -> object:
    """A value that tells the present state of the folders from every other state that saves make. It does not raise."""
    return [list(_states(source)) for source in sources]


def _states(source: Path) -> Iterator[object]:
    if os.path.isfile(source):
        yield _numbers(source)
        return
    for folder in (source, *beside(source, "old")):
        yield folder.name, fingerprint(folder), _numbers(folder)[:1], _numbers(folder / MANIFEST_NAME)
    if not has_manifest(source) and not has_manifest(old_of(source)):
        # The source may be a checkpoint with averages in it, or a folder of checkpoints, as snapshots are.
        for folder in _folders_in(source):
            for inner in (folder, *_folders_in(folder)):
                numbers = _numbers(inner / MANIFEST_NAME)
                if numbers:
                    yield inner, numbers


def _folders_in(folder: Path) -> list[Path]:
    """The folders in a folder that a reader may open."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [folder / name for name in names if not name.startswith(".") or name.endswith(".old")]


def _numbers(path: Path) -> tuple[int, ...]:
    try:
        stat = os.stat(path)
    except OSError:
        return ()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
