"""Which ranks see what rank 0 has put on disk: one decision for all ranks of a node.

The ranks of a node see the same file systems. But they look at different moments, and a network file system shows a
new folder late. A node that was split would be served by other nodes though it has the folder, rank by rank as chance
has it. So a rank that saw nothing looks again after all ranks have looked: what one rank of the node saw, the kernel
shows to the others now. If a rank still sees nothing, its whole node counts as one without the folder. Only on the node
of rank 0, which certainly has it, each rank counts for itself.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dist_ema.boxes.rank_runs import RankRuns, merged_runs
from dist_ema.disk.formats.checksums import checksum
from dist_ema.ranks.exchange import Exchange
from dist_ema.ranks.store.processes import host_identity

__all__ = ["blind_ranks", "file_view", "node_name"]

_MOUNTS = Path("/proc/self/ns/mnt")


def node_name() -> str:
    """The name of this node, for a message. No communication."""
    return socket.gethostname()


def file_view() -> str:
    """A short text that processes share if they see the same file systems. No communication.

    It is of the machine, of the mounts that this process sees (containers on one machine have their own), and of its
    root folder.
    """
    view: list[object] = [host_identity()]
    with suppress(OSError):
        view.append(_MOUNTS.stat().st_ino)
    with suppress(OSError):
        root = os.stat("/")
        view += [root.st_dev, root.st_ino]
    return f"{checksum(repr(view).encode()):08x}"


def blind_ranks(exchange: Exchange, action: str, first_look: Callable[[], bool], look: Callable[[], bool]) -> RankRuns:
    """Collective: every rank must call it. The ranks that do not see what rank 0 does. Rank 0 is not among them.

    Args:
        exchange: the control traffic of all ranks.
        action: a name of the work, for a message.
        first_look: whether this rank sees it; it may take a while. Not called on rank 0.
        look: the same, without a wait.
    """
    rank = exchange.rank
    sees = rank == 0 or first_look()
    if not _runs_of(exchange, action, blind=not sees):
        return RankRuns([])
    sees = sees or look()
    view = file_view()
    of_rank_0 = exchange.broadcast_object(view)
    blind_views = exchange.reduce(action, [] if sees else [view], lambda lower, higher: sorted({*lower, *higher}))
    if view != of_rank_0:
        sees = view not in blind_views
    return _runs_of(exchange, action, blind=not sees)


def _runs_of(exchange: Exchange, action: str, *, blind: bool) -> RankRuns:
    return RankRuns(exchange.reduce(action, [[exchange.rank, exchange.rank]] if blind else [], merged_runs))
