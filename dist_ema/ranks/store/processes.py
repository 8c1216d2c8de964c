"""Which process a rank is, and whether it is still there. No communication."""

from __future__ import annotations

import functools
import os
import socket
from typing import NamedTuple

__all__ = ["Process", "host_identity", "namespace_identity", "this_process"]


class Process(NamedTuple):
    """A process of this machine.

    Attributes:
        pid: its number.
        started: when it started, in ticks of the kernel; a number that is used again has another start. 0 if unknown.
    """

    pid: int
    started: int

    def is_gone(self) -> bool:
        """Whether the process has ended. False where the system does not tell."""
        state, started = _status(self.pid)
        is_another = bool(self.started and started and started != self.started)
        return state in ("", "Z", "X") or is_another


@functools.cache
def host_identity() -> str:
    """A text that is the same for two processes if they see the same processes: of one machine and one container."""
    return namespace_identity("pid") or socket.gethostname()


def namespace_identity(kind: str) -> str | None:
    """A text that processes of one machine have alike if they share a namespace; None where the system has none.

    Args:
        kind: the kind of namespace, as /proc names it.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            machine = file.read().strip()
        return f"{machine}/{os.stat(f'/proc/self/ns/{kind}').st_ino}"
    except OSError:
        return None


def this_process() -> Process:
    """The calling process."""
    return Process(os.getpid(), _status(os.getpid())[1])


def _status(pid: int) -> tuple[str, int]:
    """State and start of a process; the state is empty if there is no such process, "?" if it is unknown."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The name of the program, in parentheses, may hold anything.
            fields = file.read().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (FileNotFoundError, ProcessLookupError):
        return ("" if os.path.exists("/proc/self/stat") else _state_without_proc(pid)), 0
    except (OSError, ValueError, IndexError):
        return "?", 0


def _state_without_proc(pid: int) -> str:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "?"
