"""Many sockets served by one thread: each connection is a task, which waits in `poll` together with all others.

A task is a generator. It yields what it waits for, and goes on when that is there. Only the main loop waits, in one
system call, which an interrupt ends at once. No communication of its own.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Generator
from typing import NamedTuple, TypeAlias

__all__ = ["Sockets", "Task", "Tasks", "Wait", "WireError", "read", "sleep", "write"]

# How often a wait is interrupted to look whether it still makes sense.
_CHECK_SECONDS = 0.5


class WireError(RuntimeError):
    """A message did not get through."""


class Wait(NamedTuple):
    """What a task waits for.

    Attributes:
        at: a socket, or None to wait for the deadline only.
        events: events of `select.poll` at the socket; 0 to wait until something else lets the task go on.
        deadline: on the monotonic clock; the task then gets a TimeoutError. None for no deadline.
    """

    at: socket.socket | None
    events: int
    deadline: float | None


Task: TypeAlias = Generator[Wait, None, None]


class Tasks:
    """The tasks of one thread.

    Args:
        check: raises if waiting makes no sense any more; it is called every half a second.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._waits: dict[Task, Wait] = {}
        self._checked_at = time.monotonic()

    def __contains__(self, task: Task) -> bool:
        return task in self._waits

    def advance(self, task: Task, error: Exception | None = None) -> None:
        """Begin a task or let it go on, with an error if that is given, until it waits or ends."""
        try:
            self._waits[task] = next(task) if error is None else task.throw(error)
        except StopIteration:
            self._waits.pop(task, None)

    def end(self, task: Task) -> None:
        """End a task where it waits."""
        self._waits.pop(task, None)
        task.close()

    def end_all(self) -> None:
        """End all tasks."""
        while self._waits:
            self._waits.popitem()[0].close()

    def step(self, paused: Task | None = None) -> None:
        """Wait until some task can go on, for half a second at most, and let it.

        Args:
            paused: a task that must not go on now.
        """
        poll, by_descriptor, now = select.poll(), dict[int, Task](), time.monotonic()
        until = now + _CHECK_SECONDS
        for task, wait in self._waits.items():
            if wait.at is not None and task is not paused:
                poll.register(wait.at, wait.events)
                by_descriptor[wait.at.fileno()] = task
            if wait.deadline is not None:
                until = min(until, wait.deadline)
        for descriptor, _ in poll.poll(max(0.0, until - now) * 1000):
            if by_descriptor[descriptor] in self._waits:  # else another task has ended it
                self.advance(by_descriptor[descriptor])
        now = time.monotonic()
        for task, wait in list(self._waits.items()):
            if wait.deadline is not None and wait.deadline <= now and self._waits.get(task) is wait:
                self.advance(task, TimeoutError("no answer in time"))
        if now - self._checked_at >= _CHECK_SECONDS:
            self._check()
            self._checked_at = time.monotonic()


class Sockets:
    """What is open, so that nothing is left open whatever interrupt comes.

    Args:
        insist: has work done whole, whatever is raised meanwhile: an interrupt within would lose a descriptor.
    """

    def __init__(self, insist: Callable[[Callable[[], None]], None]) -> None:
        self._insist = insist
        self._open: list[socket.socket] = []
        self._has_ended = False

    def open(self, make: Callable[[], socket.socket]) -> socket.socket:
        """Open a socket that does not block."""

        def keep() -> None:
            kept = make()
            self._open.append(kept)
            if self._has_ended:  # an interrupt came between the beginning of this work and the wait for its end
                kept.close()

        self._insist(keep)
        opened = self._open[-1]
        opened.setblocking(False)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return opened

    def close(self, opened: socket.socket) -> None:
        """Close a socket; doing it twice does no harm."""
        opened.close()
        if opened in self._open:
            self._open.remove(opened)

    def close_all(self) -> None:
        """Close every socket, also one that a thread is about to open."""
        self._has_ended = True
        try:
            while self._open:
                self._open[-1].close()
                self._open.pop()
        finally:
            for opened in self._open:
                opened.close()


def read(connection: socket.socket, values: memoryview, deadline: float | None = None) -> Task:
    """A task's step: fill `values`. Raises an OSError if the other side ends the connection before."""
    at = 0
    while at < len(values):
        num_read = _tried(connection.recv_into, values[at:])
        if num_read is None:
            yield Wait(connection, select.POLLIN, deadline)
        elif num_read == 0:
            raise ConnectionResetError("the other side closed the connection")
        else:
            at += num_read


def write(connection: socket.socket, values: memoryview) -> Task:
    """A task's step: send all of `values`. Raises an OSError if the connection has ended."""
    at = 0
    while at < len(values):
        num_written = _tried(connection.send, values[at:])
        if num_written is None:
            yield Wait(connection, select.POLLOUT, None)
        else:
            at += num_written


def _tried(act: Callable[[memoryview], int], values: memoryview) -> int | None:
    """The result; None if it cannot be done now."""
    # A task must not wait within the `except`: its frame and the traceback would keep each other alive.
    try:
        return act(values)
    except BlockingIOError:
        return None


def sleep(seconds: float) -> Task:
    """A task's step: let others go on for so long."""
    try:
        yield Wait(None, 0, time.monotonic() + seconds)
    except TimeoutError:
        return
