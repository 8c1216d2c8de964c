"""Texts that ranks leave for one another within one piece of work of all ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping

from dist_ema.ranks.store.link import Link
from dist_ema.ranks.store.shared_store import SharedStore

__all__ = ["Board"]

_CHECK_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 0.05


class Board:
    """Where the ranks of one piece of work leave texts for each other.

    Every method may raise a StoreError: the store is gone.

    Args:
        store: a client that no wait blocks.
        link: the link of the work.
        name: the beginning of all keys; the same on all ranks, and used once.
    """

    def __init__(self, store: SharedStore, link: Link, name: str) -> None:
        self._store = store
        self._link = link
        self._name = name

    def post(self, key: str, text: str) -> None:
        """Publish a text."""
        self._store.put(f"{self._name}/{key}", text)

    def look_up(self, key: str) -> str:
        """The text under a key; waits until some rank has posted it.

        The store could wait itself, but neither a signal nor a rank that leaves would end that.

        Raises:
            LeftError: the work has ended on other ranks.
        """
        pause, checked_at = 0.001, time.monotonic()
        while (text := self._store.look(f"{self._name}/{key}")) is None:
            if time.monotonic() - checked_at >= _CHECK_SECONDS:
                self.check()
                checked_at = time.monotonic()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        return text

    def announce(self, texts: Mapping[str, str]) -> None:
        """Add each text to what is under its key. All are there when this returns."""
        for key, text in texts.items():
            self._store.append(f"{self._name}/{key}", text)
        if texts:
            self._store.look(f"{self._name}/")  # any answer shows that the requests before it were served

    def announced(self, key: str) -> str:
        """All that was added under a key; "" if nothing was."""
        return self._store.look(f"{self._name}/{key}") or ""

    def forget(self, key: str) -> None:
        """Remove a key."""
        self._store.delete(f"{self._name}/{key}")

    def check(self) -> None:
        """Raise a LeftError if the work has ended on other ranks."""
        self._link.check(self._store)
