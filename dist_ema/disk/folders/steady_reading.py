"""Reading folders into which somebody may be saving: again, if they were replaced meanwhile. No communication.

A save replaces a whole folder by two renames, so a reader that opens its files one after the other may find the first
in the old folder and the second in the new one, or nothing at all for a moment.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from dist_ema.disk.folders.contents import beside, fingerprint, has_manifest, old_of
from dist_ema.errors import CheckpointError, DistEMAError

__all__ = ["Attempts", "ReplacedError", "generation", "steadily"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

# A folder that is replaced each time is read this often at least, and for so long.
LEAST_ATTEMPTS = 3
LEAST_SECONDS = 30.0


class ReplacedError(CheckpointError):
    """What was being read has been replaced, though every single read went well. Told to `steadily` only."""


def steadily(sources: Sequence[Path], read: Callable[[Callable[[], None]], T]) -> T:
    """What `read` returns, of one state of the folders: read again if they were replaced while it ran.

    Args:
        sources: what is read: folders of averages or exports, or folders that hold such; files too.
        read: does all of the reading. It may call its argument before it makes anything of what it has read: that
            raises if the folders were replaced.

    Raises:
        CheckpointError: every attempt met a save.
        DistEMAError: what `read` raised while nothing was replaced.
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
    """How often folders were read and found to be replaced."""

    def __init__(self, sources: Sequence[Path]) -> None:
        self._sources = ", ".join(map(str, sources))
        self._count = 0
        self._began = time.monotonic()

    def count_one(self) -> None:
        """Another attempt has met a save."""
        self._count += 1
        _log.debug("%s: replaced while it was read, so it is read again", self._sources)

    @property
    def are_enough(self) -> bool:
        """Whether to give up."""
        return self._count >= LEAST_ATTEMPTS and time.monotonic() - self._began >= LEAST_SECONDS

    def refusal(self) -> CheckpointError:
        """What to raise then."""
        return CheckpointError(
            f"{self._sources} was replaced each of {self._count} times that it was read: somebody saves into it faster "
            "than it can be read. Read a folder that nobody saves into, such as an export under a name of its own"
        )


def generation(sources: Sequence[Path]) -> object:
    """What tells the present state of the folders from every other one that saves may make of them. Does not raise."""
    return [list(_states(source)) for source in sources]


def _states(source: Path) -> Iterator[object]:
    if os.path.isfile(source):
        yield _numbers(source)
        return
    for folder in (source, *beside(source, "old")):
        yield folder.name, fingerprint(folder), _numbers(folder)[:1], _numbers(folder / "manifest.json")
    if not has_manifest(source) and not has_manifest(old_of(source)):
        # The averages in a checkpoint; snapshots may lie in folders of checkpoints.
        for folder in _folders_in(source):
            for inner in (folder, *_folders_in(folder)):
                numbers = _numbers(inner / "manifest.json")
                if numbers:
                    yield inner, numbers


def _folders_in(folder: Path) -> list[Path]:
    """The folders in it that a reader may look at."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [folder / name for name in names if not name.startswith(".") or name.endswith(".old")]


def _numbers(path: Path) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns
