"""Which of the runs that have written into a store this one is.

torchrun's agent keeps one store while it starts the ranks again and again. What former ranks left there, dead ones now,
must not be taken for the words of the present ones. No number tells: each agent counts its starts for itself.

So rank 0 draws a name for each generation, under which the ranks write. Another rank trusts a name that appears after
it has begun to look, or whose rank 0 lives: it gives signs until all ranks have come.
"""

from __future__ import annotations

import os
import secrets
import time

from dist_ema.ranks.store.shared_store import SharedStore

__all__ = ["Generation", "outlives_ranks"]

_KEY, _SIGN = "generation", "sign"
# All ranks together look up some ten thousand times a second at most.
_PAUSE_SECONDS_OF_A_RANK = 1e-4


def outlives_ranks() -> bool:
    """Whether the store of the process group may hold what ranks of a former start have left. No communication."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


class Generation:
    """The name of this generation of ranks, as one of them learns it.

    Args:
        store: a client, which has a prefix of its own from the join on.
        rank: the rank of this process. Rank 0 writes a new name at once.
        size: the number of ranks.
    """

    def __init__(self, store: SharedStore, rank: int, size: int) -> None:
        self._store = store
        self._first = None if rank == 0 else store.look(_KEY)
        self._own = secrets.token_hex(8) if rank == 0 else None
        self._known = self._own
        self._signs: dict[str, str | None] = {}
        self._pause, self._longest_pause = 0.002, max(0.02, size * _PAUSE_SECONDS_OF_A_RANK)
        if self._own is not None:
            store.put(_KEY, self._own)

    def name(self) -> str | None:
        """The name, or None if this rank does not know it yet; then it has waited for a moment."""
        if self._known is not None:
            return self._known
        name = self._store.look(_KEY)
        if name is not None:
            sign = self._store.look(f"{name}/{_SIGN}")
            if name != self._first or self._signs.setdefault(name, sign) != sign:
                self._known = name
                return name
        time.sleep(self._pause)
        self._pause = min(1.5 * self._pause, self._longest_pause)
        return None

    def sign(self, store: SharedStore) -> None:
        """On rank 0: give a sign of life, by a client that has the name in its prefix. Elsewhere nothing."""
        if self._own is not None:
            store.count(_SIGN)
