"""A window of live snapshots that always spans about the last part of the run so far. No communication.

After every snapshot one is given up, if there are too many: the oldest, once the next one is old enough to begin the
window; else the one whose neighbours are closest together, because it is missed least. So gaps grow with the run, and
no snapshot is needed that was not kept. The latest is always kept.
"""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dist_ema.checks import positive_integer
from dist_ema.disk.folders import contents
from dist_ema.disk.manifest import is_live, read_manifest
from dist_ema.errors import ConfigError, DistEMAError
from dist_ema.schedules.base import fraction_between

__all__ = ["SnapshotWindow", "log_spaced", "trim"]

_NAME = re.compile(r"live-(\d{9})")
_TRASH = re.compile(r"\.live-\d{9}\.trash-[0-9a-f]{12}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapshotWindow:
    """Which live snapshots to keep: `num_folders` that span about the last `fraction` of the updates so far.

    Args:
        fraction: the part of the run, above 0 and at most 1; 0.2 keeps what a decay over the last 20% would have seen.
        num_folders: how many are kept, at least 3.

    Raises:
        ConfigError: a value is out of its range.

    Example:
        >>> from dist_ema import SnapshotWindow
        >>> window = SnapshotWindow(fraction=0.2, num_folders=10)
    """

    fraction: float
    num_folders: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "fraction", fraction_between("fraction", self.fraction, 0.0, 1.0, closed=True))
        if self.fraction == 0.0 or positive_integer("num_folders", self.num_folders) < 3:
            raise ConfigError(
                f"SnapshotWindow has fraction={self.fraction!r} and num_folders={self.num_folders!r}, expected a "
                "fraction above 0 and at least 3 folders: both ends of the window and one between them"
            )

    def kept(self, steps: Sequence[int], now: int) -> list[int]:
        """Those of the snapshots that are kept, ascending.

        Args:
            steps: the numbers of updates of the snapshots, none above `now`.
            now: the number of updates so far.
        """
        kept = sorted(steps)
        begin = now - self.fraction * now
        while len(kept) > 1 and kept[1] <= begin:
            del kept[0]
        while len(kept) > self.num_folders:
            gaps = [later - earlier for earlier, later in zip(kept, kept[2:], strict=False)]
            del kept[1 + gaps.index(min(gaps))]
        return kept


def log_spaced(num: int, *, last: int, first: int = 1) -> frozenset[int]:
    """Numbers of updates at equal ratios, for `if ema.num_updates in steps: ema.snapshot_live(...)`.

    Args:
        num: how many, at least 2; early ones that would coincide move up.
        last: the largest.
        first: the smallest.

    Raises:
        ConfigError: there are not so many numbers from `first` to `last`.

    Example:
        >>> from dist_ema import log_spaced
        >>> sorted(log_spaced(5, last=10_000))
        [1, 10, 100, 1000, 10000]
    """
    num, first, last = (positive_integer(*pair) for pair in (("num", num), ("first", first), ("last", last)))
    if num < 2 or last - first + 1 < num:
        raise ConfigError(f"num is {num}, expected 2 to {max(last - first + 1, 2)}, the numbers from {first} to {last}")
    steps: list[int] = []
    for index in range(num):
        wanted = round(first * (last / first) ** (index / (num - 1)))
        steps.append(min(max(wanted, steps[-1] + 1 if steps else first), last - (num - 1 - index)))
    return frozenset(steps)


def trim(folder: Path, window: SnapshotWindow, now: int) -> list[str]:
    """Remove the live snapshots in a folder that the window does not keep. One process calls it.

    It touches nothing that `snapshot_live` has not written, no folder to which a user has added a file, and no snapshot
    of more updates than `now`.

    Returns:
        The names of what was removed.
    """
    with suppress(OSError):
        for path in folder.iterdir():
            if _TRASH.fullmatch(path.name):  # an earlier removal was cut off
                shutil.rmtree(path, ignore_errors=True)
    steps = {step: path for step, path in _snapshots(folder) if step <= now}
    removed = []
    for step in sorted(steps.keys() - set(window.kept(list(steps), now))):
        path = steps[step]
        trash = folder / f".{path.name}.trash-{secrets.token_hex(6)}"
        with suppress(OSError):  # another job has removed it; or it stays, and the next call removes it
            path.rename(trash)  # no reader finds half of it
            shutil.rmtree(trash, ignore_errors=True)
            removed.append(path.name)
    return removed


def _snapshots(folder: Path) -> list[tuple[int, Path]]:
    """The live snapshots whose folders have only files of this package."""
    snapshots = []
    for path in sorted(folder.iterdir()):
        name = _NAME.fullmatch(path.name)
        if name is None or path.is_symlink() or not contents.is_average(path):
            continue
        with suppress(DistEMAError, OSError):
            files = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()}
            if is_live(read_manifest(path)) and files <= set(map(os.path.normpath, contents.own_files(path))):
                snapshots.append((int(name[1]), path))
    return snapshots
