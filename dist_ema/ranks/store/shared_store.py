"""The store that all ranks share: short texts under names.

It is the store of the process group itself, so it needs no port and no host name of its own. A client is one
connection; while it waits, its other calls wait too.

Each request is one message and at most one answer, of the calling rank. The server serves one request after the other:
it is the only process that sees all ranks.
"""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist

__all__ = ["SharedStore", "StoreError", "innermost"]

# torch's server drops a client that sends more than 8 MiB at once.
_MOST_CHARACTERS = 2**20
# A text that a key may not hold marks a look at it.
_NO_TEXT = "\0"
_IN_PARTS = "\1"
# Between two looks at a file.
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 2e-4, 1e-2

P = ParamSpec("P")
T = TypeVar("T")


class StoreError(RuntimeError):
    """The store does not answer: its server is gone, or a wait took too long."""


def _asks(request: Callable[P, T]) -> Callable[P, T]:
    """The request, which raises a StoreError in place of what torch raises."""

    @functools.wraps(request)
    def asking(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return request(*arguments, **options)
        except RuntimeError as error:
            raise StoreError((str(error).splitlines() or [type(error).__name__])[0]) from error

    return asking


class SharedStore:
    """A client of the store. Every method may raise a `StoreError`.

    Args:
        store: a store of torch; the client is a clone of it.
        prefix: the beginning of all names.
        seconds: the longest wait for a text.
    """

    def __init__(self, store: Any, prefix: str, seconds: float) -> None:
        self._store: Any = _clone(store)
        self._store.set_timeout(datetime.timedelta(seconds=seconds))
        self._prefix = f"{prefix}/"
        self._seconds = seconds
        self._is_file = isinstance(innermost(store), dist.FileStore)  # type: ignore[attr-defined]
        self._num_parts: dict[str, int] = {}  # of the long texts that this client has written or read

    def begin_with(self, prefix: str) -> None:
        """Have all names begin with another prefix. No communication."""
        self._prefix = f"{prefix}/"

    @_asks
    def put(self, key: str, text: str) -> None:
        """Write a text."""
        self._store.set(self._prefix + key, self._shortened(key, text))

    @_asks
    def claim(self, key: str, text: str) -> str:
        """Write a text, unless there is one. Returns the text that is there then."""
        return self._whole(key, self._store.compare_set(self._prefix + key, "", self._shortened(key, text)).decode())

    @_asks
    def take(self, key: str) -> str:
        """The text, which is not empty; waits until there is one."""
        if self._is_file:
            self._look_until_there(key)
        while not (text := self._store.get(self._prefix + key).decode()):
            pass  # torch's server ends a wait also where a comparison has found nothing
        return self._whole(key, text)

    def _look_until_there(self, key: str) -> None:
        """Wait for a text in a file, at which torch itself would look a hundred times a second at most."""
        pause, deadline = _SHORTEST_PAUSE_SECONDS, time.monotonic() + self._seconds
        while not self._store.check([self._prefix + key]) and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(1.2 * pause, _LONGEST_PAUSE_SECONDS)

    @_asks
    def look(self, key: str) -> str | None:
        """The text, or None if there is none yet. Does not wait.

        A comparison that fails neither waits nor reads a stale copy in any store of torch. But it must find a text:
        without one, torch's server would end the waits of all clients for that key.
        """
        if not self._store.check([self._prefix + key]):
            return None
        text: str = self._store.compare_set(self._prefix + key, _NO_TEXT, _NO_TEXT).decode()
        return None if text == _NO_TEXT else self._whole(key, text)

    @_asks
    def append(self, key: str, text: str) -> None:
        """Add a short text to the end of the present one."""
        self._store.append(self._prefix + key, text)

    @_asks
    def count(self, key: str) -> int:
        """Add 1 to a number. Returns the sum."""
        total: int = self._store.add(self._prefix + key, 1)
        return total

    @_asks
    def delete(self, key: str) -> None:
        """Remove a text that this client has written or read, or a short one."""
        for number in range(self._num_parts.pop(key, 0)):
            self._store.delete_key(f"{self._prefix}{key}/{number}")
        self._store.delete_key(self._prefix + key)

    def _shortened(self, key: str, text: str) -> str:
        """The text, or a mark in its place after its parts were written."""
        if len(text) <= _MOST_CHARACTERS:
            return text
        starts = range(0, len(text), _MOST_CHARACTERS)
        for number, start in enumerate(starts):
            self._store.set(f"{self._prefix}{key}/{number}", text[start : start + _MOST_CHARACTERS])
        self._num_parts[key] = len(starts)
        return f"{_IN_PARTS}{len(starts)}"

    def _whole(self, key: str, text: str) -> str:
        if not text.startswith(_IN_PARTS):
            return text
        num_parts = self._num_parts[key] = int(text[1:])
        return "".join(self._store.get(f"{self._prefix}{key}/{number}").decode() for number in range(num_parts))


def innermost(store: Any) -> Any:
    """The store within those that only add a prefix to names. No communication."""
    while isinstance(store, dist.PrefixStore):  # type: ignore[attr-defined]
        store = store.underlying_store
    return store


@_asks
def _clone(store: Any) -> Any:
    return store.clone()
