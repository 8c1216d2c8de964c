"""Who writes a staging folder: a record beside it, locked for as long as that save lives.

Whoever finds a record of another save asks here whether its writer is dead; only then the staging folder may go.

    same boot and process table   the process is there, and is the one that began: pid and start time
    this very process             the claim is held: the thread of a save in the background may be another's
    elsewhere                     nobody holds the lock, on a file system where locks reach other machines

What none of these can tell counts as alive. A lock belongs to the process that took it: a forked child closes its copy.
No communication.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import socket
import weakref
from pathlib import Path
from typing import Any

from dist_ema.disk.folders.mounts import locks_reach_other_machines

try:
    import fcntl
except ImportError:  # pragma: no cover - no locks there
    fcntl = None  # type: ignore[assignment]

__all__ = ["Claim", "is_dead", "writer_text"]

_log = logging.getLogger(__name__)

_LONGEST_RECORD_BYTES = 4096


class Claim:
    """The right to the staging folder of one token, from `take` until `release`, or until nobody keeps the object."""

    _descriptor = -1

    def __init__(self, path: Path) -> None:
        self.path = path
        _watch_forks()
        _held[path] = self

    def take(self) -> bool:
        """Make the record, locked. False if somebody took it for a dead one in the moment before the lock."""
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _lock(self._descriptor) is False:
            return False
        os.pwrite(self._descriptor, json.dumps(_this_process()).encode(), 0)
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the record. Does not raise: a record without its process is cleared by the next save."""
        if _held.get(self.path) is not self:
            return
        self._close()
        try:
            if os.path.lexists(self.path):  # a read-only file system refuses to remove what is not there either
                self.path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s could not be removed (%s): the next save does it", self.path, error)
        _held.pop(self.path, None)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __del__(self) -> None:
        self._close()


_held: weakref.WeakValueDictionary[Path, Claim] = weakref.WeakValueDictionary()


def _forget() -> None:
    """A forked child writes none of its parent's saves, and must not outlive the parent as the holder of its locks."""
    for claim in list(_held.values()):
        claim._close()
    _held.clear()


@functools.cache
def _watch_forks() -> None:
    """Once for each process, and not at import."""
    os.register_at_fork(after_in_child=_forget)


def is_dead(path: Path) -> bool:
    """Whether the writer of that record has ended, as far as can be told; also if the record is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:  # somebody else's
        return False
    try:
        record = _record(descriptor)
        here = _this_process()
        if (record.get("boot"), record.get("table")) == (here["boot"], here["table"]):
            if record == here:
                return path not in _held
            runs = _runs(record)
            if runs is not None:
                return not runs
        locked = _lock(descriptor)
        return locked is True and (record.get("boot") == here["boot"] or locks_reach_other_machines(path))
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def writer_text(path: Path) -> str:
    """Who it is, in words."""
    try:
        record = json.loads(path.read_bytes()[:_LONGEST_RECORD_BYTES])
        return f"process {record['pid']} on {record['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "somebody"


def _record(descriptor: int) -> dict[str, Any]:
    try:
        record = json.loads(os.pread(descriptor, _LONGEST_RECORD_BYTES, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _lock(descriptor: int) -> bool | None:
    """Take the lock without waiting. False if somebody has it, None where the file system knows no locks."""
    if fcntl is None:  # pragma: no cover
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno == errno.EWOULDBLOCK else None
    return True


def _this_process() -> dict[str, Any]:
    """What tells this process from any other, now and later, here and elsewhere."""
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id") or socket.gethostname(),
        "table": _link("/proc/self/ns/pid"),  # containers count their processes apart
        "pid": os.getpid(),
        "start": _state_and_start(os.getpid())[1],
    }


def _runs(record: dict[str, Any]) -> bool | None:
    """Whether the process of the record runs, on this machine; None if that cannot be told."""
    pid, start = record.get("pid"), record.get("start")
    if not isinstance(pid, int) or pid <= 0:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    except OverflowError:
        return None
    state, now = _state_and_start(pid)
    if not state or not start:
        return None
    return state not in "ZX" and now == start


def _state_and_start(pid: int) -> tuple[str, str]:
    """The state of a process and when it began, in ticks since the boot; empty where that is not told."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (fields[0], fields[19]) if len(fields) > 19 else ("", "")


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, ValueError):
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
