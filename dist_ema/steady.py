"""Reading folders into which somebody may be saving: again, if they were replaced meanwhile. No communication.

A save replaces a whole folder by two renames, so a reader that opens its files one after the other may find the first
in the old folder and the second in the new one, or nothing at all for a moment.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from dist_ema.errors import CheckpointError, DistEMAError
from dist_ema.folders import beside, fingerprint, has_manifest, old_of

__all__ = ["ATTEMPTS", "ReplacedError", "generation", "note_replaced", "steadily", "told"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

# How often a folder is read that is replaced each time.
ATTEMPTS = 20


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
    for attempt in range(ATTEMPTS):
        before = generation(sources)

        def check(before: object = before) -> None:
            if generation(sources) != before:
                raise ReplacedError(told(sources))

        try:
            result = read(check)
            check()
        except (DistEMAError, OSError) as error:
            if generation(sources) == before and not isinstance(error, ReplacedError):
                raise
            if attempt == ATTEMPTS - 1:
                raise CheckpointError(told(sources)) from error
            note_replaced(sources)
        else:
            return result
    raise AssertionError("the last attempt returns or raises")


def note_replaced(sources: Sequence[Path]) -> None:
    """Log that the folders are read again."""
    _log.debug("%s: replaced while it was read, so it is read again", ", ".join(map(str, sources)))


def told(sources: Sequence[Path]) -> str:
    """What to say of folders that are replaced all the time."""
    return (
        f"{', '.join(map(str, sources))} was replaced {ATTEMPTS} times while it was read: somebody saves into it "
        "faster than it can be read. Read a folder that nobody saves into, such as an export under a name of its own"
    )


def generation(sources: Sequence[Path]) -> object:
    """What tells the present state of the folders from every other one that saves may make of them."""
    return [list(_states(source)) for source in sources]


def _states(source: Path) -> Iterator[object]:
    yield _numbers(source) if source.is_file() else None
    for folder in (source, *beside(source, "old")):
        yield folder.name, fingerprint(folder), _numbers(folder)[:1], _numbers(folder / "manifest.json")
    if not has_manifest(source) and not has_manifest(old_of(source)):
        # The averages in a checkpoint; snapshots may lie in folders of checkpoints.
        for pattern in ("*/manifest.json", "*/*/manifest.json"):
            for path in sorted(source.glob(pattern)):
                name = path.parent.name
                if not name.startswith(".") or name.endswith(".old"):
                    yield path, _numbers(path)


def _numbers(path: Path) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns
