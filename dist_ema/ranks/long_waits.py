"""Deeds that are done only when a wait gets long: one thread does them, so a short wait costs nothing."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

__all__ = ["Deed", "watch"]

_REST_SECONDS = 1.0


@dataclasses.dataclass
class Deed:
    """A function that another thread calls once a wait has taken `seconds`.

    Attributes:
        seconds: the time from the beginning of the wait.
        do: the function; its argument is the seconds waited so far. Its errors are dropped.
        growth: the deed is done again whenever the wait has become so many times as long; 0 for never.
    """

    seconds: float
    do: Callable[[float], None]
    growth: float = 0.0


class Watch:
    """A thread that does the deeds if the wait from `begin` to `end` takes so long; one wait at a time in a process.

    The thread sleeps until a deed is due. The beginning of a wait wakes it only if a deed is due sooner.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._deeds: list[Deed] = []
        self._began = 0.0
        self._wakes = 0.0
        self._thread: threading.Thread | None = None

    def begin(self, deeds: Sequence[Deed]) -> None:
        """Begin a wait."""
        with self._changed:
            self._began = time.monotonic()
            self._deeds = list(deeds)
            due = self._due()
            if self._thread is None or not self._thread.is_alive():  # a forked process has no thread
                self._thread = threading.Thread(target=self._run, name="dist_ema-notice", daemon=True)
                self._wakes = due
                self._thread.start()
            elif due < self._wakes:
                self._changed.notify()

    def end(self) -> None:
        """End the wait."""
        with self._changed:
            self._deeds = []

    def _due(self) -> float:
        return min((self._began + deed.seconds for deed in self._deeds), default=float("inf"))

    def _run(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                if now < self._due():
                    # Between waits the thread wakes now and then, so that the next wait need not wake it.
                    self._wakes = min(self._due(), now + _REST_SECONDS)
                    self._changed.wait(self._wakes - now)
                    continue
                waited = now - self._began
                deed = min(self._deeds, key=lambda pending: pending.seconds)
                self._deeds.remove(deed)
                if deed.growth:
                    self._deeds.append(dataclasses.replace(deed, seconds=waited * deed.growth))
            with suppress(Exception):
                deed.do(waited)


watch = Watch()
