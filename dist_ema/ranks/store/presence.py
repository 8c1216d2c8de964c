"""Which ranks are still there, and what they last did.

A late rank is not a dead one. So a rank counts as gone only if that is certain:

    its process has ended    a rank of the same machine sees that, within a second or two, and tells all
    its machine is silent    no rank of it has given a sign of life for two minutes

Each rank looks after the next one of its machine. No rank waits for another here, and none hears from more than a few.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from dist_ema.ranks.store.processes import Process, host_identity, this_process
from dist_ema.ranks.store.shared_store import SharedStore

__all__ = ["Presence"]

# A rank gives a sign of life so often at least, and a rank that waits looks for those of others as often.
_SIGN_SECONDS = 10.0
# In small worlds it is more often: all ranks together give a hundred signs a second at most, until the limit above.
_SIGN_SECONDS_OF_A_RANK = 0.01
_LEAST_SIGN_SECONDS = 1.0
# A rank that waits for the first call of all looks so often who of its machine has come.
_MEETING_SECONDS = 2.0
# A machine without a sign of life for so long is gone. Python may stand still in a rank for a while, not in all.
_SILENT_SECONDS = 120.0


class Presence:
    """The signs of life of this rank, and those of the others. The methods take a client that does not wait now.

    Args:
        store: a client.
        rank: the rank of this process.
        size: the number of ranks.
        doing: what this rank does: the number of its updates, and the call it is in ("" outside).

    Attributes:
        knows_all: whether the processes of this machine are known.
    """

    def __init__(self, store: SharedStore, rank: int, size: int, doing: Callable[[], tuple[int, str]]) -> None:
        self._rank = rank
        self._doing = doing
        self._host = host_identity()
        self._neighbours: dict[int, Process] = {}
        self.knows_all = False
        self._shown: tuple[int, str] | None = None
        self._changed = time.time()
        self._sign_seconds = min(max(size * _SIGN_SECONDS_OF_A_RANK, _LEAST_SIGN_SECONDS), _SIGN_SECONDS)
        self._next_sign = time.monotonic() + self._sign_seconds
        self._signs: dict[str, tuple[str | None, float]] = {}
        self._next_look = 0.0
        self._next_meeting = time.monotonic() + _MEETING_SECONDS
        store.append(f"host/{self._host}", f"{rank} {' '.join(map(str, this_process()))}\n")

    @property
    def is_first(self) -> bool:
        """Whether this is the lowest rank of its machine."""
        return self._rank <= min(self._neighbours, default=self._rank)

    def show(self, client: Callable[[], SharedStore], *, waits: bool) -> None:
        """Give a sign of life, and write down what this rank does, if it is time.

        Args:
            client: gives a client, which may have to connect.
            waits: whether this rank waits for others; then it does not tell that it has come to a call.
        """
        now = time.monotonic()
        doing = self._doing()
        is_elsewhere = self._shown is None or doing[1] != self._shown[1]  # it has come to a call, or out of one
        if doing != self._shown:
            self._shown, self._changed = doing, time.time()
        if (is_elsewhere and not waits) or now >= self._next_sign:
            self._next_sign = now + self._sign_seconds
            store = client()
            store.put(f"seen/{self._rank}", json.dumps([*doing, self._changed, self._host]))
            store.count(f"sign/{self._host}")

    def gone(self, client: Callable[[], SharedStore], *, have_met: bool) -> str | None:
        """How the next rank of this machine is gone; None while it is there.

        Args:
            client: gives a client, which may have to connect.
            have_met: whether all ranks have made a call together.
        """
        if not self.knows_all and (have_met or time.monotonic() >= self._next_meeting):
            self._next_meeting = time.monotonic() + _MEETING_SECONDS
            lines = (client().look(f"host/{self._host}") or "").splitlines()
            self._neighbours = {int(rank): Process(int(pid), int(start)) for rank, pid, start in map(str.split, lines)}
            self.knows_all = have_met
        following = min(self._neighbours, key=lambda rank: (rank <= self._rank, rank), default=self._rank)
        if following == self._rank or not self.has_ended(following):
            return None
        return f"rank {following} is gone: its process {self._neighbours[following].pid} has ended"

    def has_ended(self, rank: int) -> bool:
        """Whether a rank was a process of this machine that has ended, as far as is known. No communication."""
        return rank in self._neighbours and self._neighbours[rank].is_gone()

    def silent(self, store: SharedStore, ranks: Sequence[int]) -> str | None:
        """How one of some ranks is gone with its machine; None if none is. To be asked again and again."""
        if time.monotonic() < self._next_look:
            return None
        self._next_look = time.monotonic() + _SIGN_SECONDS
        for rank in ranks:
            seen = store.look(f"seen/{rank}")
            host = "" if seen is None else str(json.loads(seen)[3])
            if not host or host == self._host:
                continue
            sign, now = store.look(f"sign/{host}"), time.monotonic()
            former, since = self._signs.get(host, (None, now))
            self._signs[host] = (sign, since if sign == former else now)
            if sign == former and now - since > _SILENT_SECONDS:
                return f"rank {rank} is gone: no rank of its machine has given a sign of life for {now - since:.0f} s"
        return None

    def last_seen(self, store: SharedStore, ranks: Sequence[int]) -> list[str]:
        """What each of some ranks did when it was last seen."""
        return [_shown(store.look(f"seen/{rank}")) for rank in ranks]


def _shown(seen: str | None) -> str:
    if seen is None:
        return "not seen yet"
    num_updates, call, changed, _ = json.loads(seen)
    place = f"{call}, after update {num_updates}" if call else f"update {num_updates}"
    return f"last seen in {place}, {max(time.time() - changed, 0.0):.0f} s ago"
