"""Properties of the file system under a path: mount points, free space, and how far its locks reach.

No communication.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["free_bytes", "is_mount_point", "locks_reach_other_machines", "mounted_within"]

# The mount options and file systems whose locks other machines do not see, or may not see.
_LOCAL_OPTIONS = {"nolock", "local_lock=all", "local_lock=flock", "localflock", "noflock", "nobrl"}
_LOCAL_KINDS = re.compile(r"fuse(blk|\..*)?|9p|virtiofs|vboxsf|beegfs|prl_fs|hgfs")


@dataclasses.dataclass(frozen=True)
class _Mount:
    at: Path
    kind: str
    options: frozenset[str]


def is_mount_point(folder: Path) -> bool:
    """Whether another file system, or another folder of this one, is mounted there: such a folder cannot be renamed."""
    # ismount does not follow a parent that is a link, such as /proc/self/cwd, and takes the folder for a mount point.
    follows = not os.path.islink(folder.parent)
    if os.path.ismount(folder) if follows else folder.stat().st_dev != folder.parent.stat().st_dev:
        return True
    # A folder that is mounted a second time has the device of its parent: only the table of mounts tells.
    return any(mount.at == folder for mount in _mounts())


def mounted_within(folder: Path) -> Path | None:
    """A mount point below the folder, which removing the folder would empty; None if there is none."""
    return next((mount.at for mount in _mounts() if mount.at != folder and folder in mount.at.parents), None)


def free_bytes(path: Path) -> int | None:
    """Bytes that may still be written to the file system of the path, or of the nearest folder above that is there.

    None where the file system gives no number, or nonsense. A quota that it does not report is not counted.
    """
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        usage = shutil.disk_usage(path)
    except (OSError, AttributeError):
        return None
    return usage.free if 0 <= usage.free <= usage.total and usage.total > 0 else None


def locks_reach_other_machines(path: Path) -> bool:
    """Whether every machine that sees a file at the path sees a lock on it as well."""
    above = [mount for mount in _mounts() if path.is_relative_to(mount.at)]
    if not above:
        return False
    longest = max(len(mount.at.parts) for mount in above)
    last = [mount for mount in above if len(mount.at.parts) == longest][-1]  # it is mounted over the others
    return not _LOCAL_KINDS.fullmatch(last.kind) and not last.options & _LOCAL_OPTIONS


def _mounts() -> Iterator[_Mount]:
    """The mounts that this process sees, in the order of mounting; empty where the system has no table of mounts."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        left, _, right = line.partition(" - ")
        before, after = left.split(" "), right.split(" ")
        if len(before) >= 6 and len(after) >= 3:
            at = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before[4])
            yield _Mount(Path(at), after[0], frozenset([*before[5].split(","), *after[2].split(",")]))
