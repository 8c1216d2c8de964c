"""The connections of a process to the store of its process group: one, and further ones while they are needed."""

from __future__ import annotations

import _thread
import socket
from typing import Any

import torch.distributed as dist

from dist_ema.ranks.store.shared_store import SharedStore, StoreError, innermost
from dist_ema.uninterrupted.threads import End

__all__ = ["Clients"]

# How long a request may take that no other rank needs to answer.
_REQUEST_SECONDS = 10.0
_PROBE_SECONDS = 1.0
_CONNECT_SECONDS = 2.0


class Clients:
    """The clients of one rank.

        store     one for the life of the group: the thread of the calls waits in it; else any thread may use it
        side      while `store` waits: for signs of life, farewells, the names of missing ranks; closed after the call
        another   for a thread beside the calls; closed with it

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
        self._connecting: End | None = None
        self.store = SharedStore(store, prefix, seconds)

    @property
    def side(self) -> SharedStore:
        """A client that no wait blocks. It connects at its first use; see `side_within`."""
        return self.side_within(_CONNECT_SECONDS)

    def side_within(self, seconds: float) -> SharedStore:
        """A client that no wait blocks, which is connected within so long.

        A thread connects, since torch tries for minutes to reach a server that dies meanwhile, and no signal ends that.

        Raises:
            StoreError: the server is gone, or does not answer soon.
        """
        side, end = self._side, self._connecting
        if side is not None:
            return side
        if end is None:
            end = self._connecting = End()
            _thread.start_new_thread(end.come_of, (self._connect_side,))
        if not end.comes_within(seconds):
            raise StoreError("its server does not answer")
        self._connecting = None
        if end.failure is not None:
            raise end.failure
        return self.side_within(seconds)

    def _connect_side(self) -> None:
        self._side = self._connected(_REQUEST_SECONDS)

    def another(self) -> SharedStore:
        """One more client that may wait. It is closed when nobody refers to it. It may raise a `StoreError`."""
        return self._connected(self._seconds)

    def _connected(self, seconds: float) -> SharedStore:
        if not self.has_server:
            raise StoreError("its server does not listen any more")
        return SharedStore(self._of_group, self._prefix, seconds)

    def begin_with(self, prefix: str) -> None:
        """Have all names begin with another prefix. No communication."""
        self._side, self._connecting, self._prefix = None, None, prefix
        self.store.begin_with(prefix)

    def release(self) -> None:
        """Close what nobody waits beside any more. No communication."""
        self._side = self._connecting = None

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
