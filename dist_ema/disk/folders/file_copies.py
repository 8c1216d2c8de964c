"""A file that is needed under two names: one file with two names, or two files that share blocks until one is changed.

No communication.
"""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

__all__ = ["clone", "give_second_name"]

_FICLONE = 0x40049409  # of linux/fs.h: the target gets the blocks of the source, copied on write


def clone(source: Path, target: Path) -> bool:
    """Make `target` a durable copy that shares blocks with `source`; False, and no file, where that cannot be done.

    btrfs, XFS, bcachefs, ZFS and NFS 4.2 can do it, within one file system. ext4, tmpfs and most parallel file systems
    cannot.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        reading = os.open(source, os.O_RDONLY)
    except OSError:
        return False
    try:
        writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.ioctl(writing, _FICLONE, reading)
            os.fsync(writing)
        except OSError:
            target.unlink()
            return False
        finally:
            os.close(writing)
    finally:
        os.close(reading)
    return True


def give_second_name(source: Path, target: Path) -> bool:
    """Make `target` a second name of the file `source` (a hard link); False where the file system has no such links."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
