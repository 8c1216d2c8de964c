"""The writer of a staging folder: a record beside it names the writer, and is locked for as long as that save lives.

A staging folder of another save may be removed only if its writer is dead. This module asks the record:

    same boot and process table   dead unless the process runs and is the one that began: pid and start time
    this very process             dead unless the claim is kept: a save in the background has a thread of its own
    another machine               dead if no process has the lock, on a file system where locks reach other machines

A writer counts as alive where none of these can tell. A lock belongs to the process that took it: a forked child closes
its copy. No communication.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import socket
import weakref
from pathlib import Path
from typing import Any

from dist_ema.disk.folders.mounts import locks_reach_other_machines

__all__ = ["Claim", "is_dead", "writer_text"]

_log = logging.getLogger(__name__)

_LONGEST_RECORD_BYTES = 4096


class Claim:
    """The right to the staging folder of one token, from `take` until `release`, or until the object is freed."""

    _descriptor = -1

    def __init__(self, path: Path) -> None:
        self.path = path
        _watch_forks()
        _claims[path] = self

    def take(self) -> bool:
        """Make the record, locked. False if another save took it for a dead one in the moment before the lock."""
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
        if _claims.get(self.path) is not self:
            return
        self._close()
        try:
            if os.path.lexists(self.path):  # a read-only file system refuses to remove even a file that is not there
                self.path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s could not be removed (%s): the next save does it", self.path, error)
        _claims.pop(self.path, None)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __del__(self) -> None:
        self._close()


_claims: weakref.WeakValueDictionary[Path, Claim] = weakref.WeakValueDictionary()


def _forget() -> None:
    """A forked child must not keep the locks of its parent beyond the parent's life: it writes none of its saves."""
    for claim in list(_claims.values()):
        claim._close()
    _claims.clear()


@functools.cache
def _watch_forks() -> None:
    """Register `_forget` once in a process, and not at import."""
    os.register_at_fork(after_in_child=_forget)


def is_dead(path: Path) -> bool:
    """Whether the writer of that record has certainly ended; true as well if the record is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:  # the record of another user
        return False
    try:
        record = _record(descriptor)
        here = _this_process()
        if (record.get("boot"), record.get("table")) == (here["boot"], here["table"]):
            if record == here:
                return path not in _claims
            runs = _runs(record)
            if runs is not None:
                return not runs
        locked = _lock(descriptor)
        return locked is True and (record.get("boot") == here["boot"] or locks_reach_other_machines(path))
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def writer_text(path: Path) -> str:
    """The writer of a staging folder, in words."""
    try:
        record = json.loads(path.read_bytes()[:_LONGEST_RECORD_BYTES])
        return f"process {record['pid']} on {record['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"


def _record(descriptor: int) -> dict[str, Any]:
    try:
        record = json.loads(os.pread(descriptor, _LONGEST_RECORD_BYTES, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _lock(descriptor: int) -> bool | None:
    """Take the lock without waiting. False if another process has it, None where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno == errno.EWOULDBLOCK else None
    return True


def _this_process() -> dict[str, Any]:
    """The record that tells this process from any other, now and later, on this machine and on others."""
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id") or socket.gethostname(),
        "table": _link("/proc/self/ns/pid"),  # containers count their processes apart
        "pid": os.getpid(),
        "start": _state_and_start(os.getpid())[1],
    }


def _runs(record: dict[str, Any]) -> bool | None:
    """Whether the process of the record runs on this machine; None if the system does not tell."""
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
    """The state of a process and its start, in ticks since the boot; empty where the system does not tell."""
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
