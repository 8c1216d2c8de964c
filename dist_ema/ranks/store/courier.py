"""The thread that makes the requests to the store of the ranks.

A wait for the store is C++, which no signal handler interrupts. So a thread waits, and the main thread waits for it,
which Ctrl-C ends at once. While the thread has nothing to do, it looks now and then whether the other ranks are there.
"""

from __future__ import annotations

import _thread
import atexit
import functools
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

from dist_ema.uninterrupted.threads import End, outlast

__all__ = ["Courier"]

T = TypeVar("T")

_REST_SECONDS = 1.0
# How long the interpreter waits for the thread at its exit. A thread that returned from C++ later would abort it.
_EXIT_SECONDS = 5.0


class Courier:
    """One thread of a process, which does calls one after the other. It starts with the first call.

    Args:
        rest: called about once a second by the thread while it has nothing to do.

    Attributes:
        put: gives the thread a call. It is C: no signal handler cuts it in two. `begin` comes before it.
    """

    def __init__(self, rest: Callable[[], None]) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._rest = rest
        self._threads: dict[int, int] = {}  # of this process, and of those that it was forked from
        self._end = End()
        self.put: Callable[[Callable[[], None]], None] = self._calls.put

    def begin(self) -> None:
        """Start the thread, unless it was started.

        Raises:
            RuntimeError: there can be no more threads.
        """
        if os.getpid() not in self._threads:
            _stop_at_exit(self)
            _thread.start_new_thread(self._serve, ())

    def fetch(self, work: Callable[[], T], wait: Callable[[End], None]) -> T:
        """Have the thread do `work`. Returns its result, or raises its exception.

        Args:
            work: what to do.
            wait: waits for the end of it.
        """
        results: list[T] = []
        end = End()
        self.begin()
        self.put(partial(end.come_of, lambda: results.append(work())))
        wait(end)
        if end.failure is not None:
            raise end.failure
        return results[0]

    def insist(self, work: Callable[[], None]) -> None:
        """Have the thread, which no signal handler interrupts, do short work, and wait for it whatever is raised.

        It raises the exception of the work, else the latest exception that came while it waited.
        """
        latest: BaseException | None = None

        def wait(end: End) -> None:
            nonlocal latest
            latest = outlast((end,))

        self.fetch(work, wait)
        if latest is not None:
            raise latest

    def stop(self) -> None:
        """End the thread, after the calls that it was given."""
        if os.getpid() in self._threads:
            self._calls.put(None)
            self._end.comes_within(_EXIT_SECONDS)

    def _serve(self) -> None:
        if self._threads.setdefault(os.getpid(), threading.get_ident()) == threading.get_ident():
            self._end.come_of(self._go_on)

    def _go_on(self) -> None:
        while True:
            try:
                call = self._calls.get(timeout=_REST_SECONDS)
            except Empty:
                with suppress(Exception):
                    self._rest()
                continue
            if call is None:
                return
            call()


@functools.cache
def _stop_at_exit(courier: Courier) -> None:
    """Once for each courier, and not at import."""
    atexit.register(courier.stop)
