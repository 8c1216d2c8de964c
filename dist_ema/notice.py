"""Words for who watches a log while a call waits: one thread tells, after a while, what is being waited for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["noticed"]

_log = logging.getLogger(__name__)

# A wait that goes on is told again when it has become this many times as long.
_GROWTH = 10.0


@contextmanager
def noticed(seconds: float, tell: Callable[[float], str]) -> Iterator[None]:
    """Log a warning if the block takes longer than `seconds`. No communication of its own.

    Args:
        seconds: until the first warning.
        tell: seconds waited so far -> the text; called in another thread.
    """
    _watch.begin(seconds, tell)
    try:
        yield
    finally:
        _watch.end()


class _Watch:
    """One wait at a time, and a thread that sleeps until it is worth a word; begun waits need not wake it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tell: Callable[[float], str] | None = None
        self._began = self._due = 0.0
        self._wakes = 0.0  # when the thread will look; 0 if there is none
        self._thread: threading.Thread | None = None

    def begin(self, seconds: float, tell: Callable[[float], str]) -> None:
        with self._changed:
            self._began = time.monotonic()
            self._due = self._began + seconds
            self._tell = tell
            if self._thread is None or not self._thread.is_alive():  # a fork has none
                self._thread = threading.Thread(target=self._run, name="dist_ema-notice", daemon=True)
                self._wakes = self._due
                self._thread.start()
            elif self._due < self._wakes:
                self._changed.notify()

    def end(self) -> None:
        with self._changed:
            self._tell = None

    def _run(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                due = self._tell is not None and now >= self._due
                if not due:
                    # Idle it looks as rarely as for the wait before.
                    self._wakes = self._due if self._tell is not None else now + max(self._due - self._began, 1.0)
                    self._changed.wait(self._wakes - now)
                    continue
                tell, waited = self._tell, now - self._began
                self._due = self._began + _GROWTH * waited
            try:
                text = tell(waited) if tell is not None else ""
            except Exception:  # the store is gone: the wait itself will say so
                continue
            _log.warning("%s", text)


_watch = _Watch()
