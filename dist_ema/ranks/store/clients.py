"""The connections of a process to the store of its process group: one, and further ones while they are needed."""

from __future__ import annotations

import socket
from typing import Any

import torch.distributed as dist

from dist_ema.ranks.store.shared_store import SharedStore, innermost

__all__ = ["Clients"]

# How long a request may take that no other rank needs to answer.
_REQUEST_SECONDS = 10.0
_PROBE_SECONDS = 1.0


class Clients:
    """The clients of one rank.

    A client that waits blocks its other calls. So while `store` waits, `side` is asked; it connects at its first use.

    Args:
        store: the store of the process group.
        prefix: the beginning of all names.
        seconds: the longest wait for a text.

    Attributes:
        store: the client that waits; whoever has nothing to wait for may use it meanwhile.
    """

    def __init__(self, store: Any, prefix: str, seconds: float) -> None:
        self._of_group = store
        self._prefix = prefix
        self._seconds = seconds
        self._side: SharedStore | None = None
        self.store = SharedStore(store, prefix, seconds)

    @property
    def side(self) -> SharedStore:
        """A client that no wait blocks."""
        side = self._side
        if side is None:
            side = self._side = SharedStore(self._of_group, self._prefix, _REQUEST_SECONDS)
        return side

    def another(self) -> SharedStore:
        """One more client that may wait. It is closed when nobody refers to it."""
        return SharedStore(self._of_group, self._prefix, self._seconds)

    def begin_with(self, prefix: str) -> None:
        """Have all names begin with another prefix. No communication."""
        self._side, self._prefix = None, prefix
        self.store.begin_with(prefix)

    def release(self) -> None:
        """Close what nobody waits beside any more. No communication."""
        self._side = None

    @property
    def has_server(self) -> bool:
        """Whether torch's server still listens; True for a store without one. Unlike a request, it prints nothing."""
        store = innermost(self._of_group)
        if not isinstance(store, dist.TCPStore):  # type: ignore[attr-defined]
            return True
        try:
            socket.create_connection((store.host, store.port), timeout=_PROBE_SECONDS).close()
        except OSError:
            return False
        return True
