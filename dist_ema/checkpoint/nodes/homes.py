"""What rank 0 reads at a path, and what other ranks see there where nodes do not share a disk.

A save leaves its files on the node of rank 0. After a restart rank 0 may be on another node, which has nothing at that
path, or the checkpoint of an earlier time. Nothing else would tell that the run goes on from less than it had.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dist_ema.boxes.rank_runs import RankRuns
from dist_ema.checkpoint.nodes.views import node_name
from dist_ema.disk.manifest import find_saved, read_manifest
from dist_ema.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    DistEMAError,
    agreed,
    described,
    error_class,
)
from dist_ema.ranks.exchange import Exchange

__all__ = ["as_rank_0_sees", "num_updates_at", "warn_of_a_newer_one", "warn_of_blind_ranks"]


class _Record(Protocol):
    def to_json(self) -> dict[str, Any]:
        """The record as JSON. No communication."""
        ...


R = TypeVar("R", bound=_Record)

_ADVICE = (
    "start the run with rank 0 on that node, copy the folder to the node of rank 0, or save to a file system that all "
    "nodes share"
)


def num_updates_at(source: Path) -> int | None:
    """The updates of the saved average that this rank sees at a path; None if it sees none. No communication."""
    try:
        return read_manifest(find_saved(source)).num_updates
    except (OSError, DistEMAError):
        return None


def as_rank_0_sees(
    exchange: Exchange,
    action: str,
    source: Path,
    read: Callable[[], R],
    from_json: Callable[[dict[str, Any]], R],
    view: Callable[[], int | None],
) -> R:
    """Collective: every rank must call it. What rank 0 reads at a path; the other ranks make it anew from JSON.

    Args:
        exchange: the control traffic of all ranks.
        action: a name of the work, for a message.
        source: the path.
        read: reads, on rank 0 alone.
        from_json: the inverse of the result's `to_json`.
        view: the number of updates of what this rank sees at the path, 0 if it is not known; None if there is nothing.

    Raises:
        DistEMAError: `read` raised it. If other ranks see what rank 0 does not, it names them.
    """
    own: list[R] = []

    def work() -> dict[str, Any]:
        try:
            own.append(read())
        except (CheckpointNotFoundError, CheckpointCorruptError) as error:
            return {"missing": described(error)}
        return {"read": own[0].to_json()}

    answer = exchange.on_rank_0(action, work)
    if "missing" in answer:
        kind, message = answer["missing"]
        most = _most_updates(exchange, view())
        if most is not None and most[1] != 0:  # else rank 0 sees it too, so it is not missing
            num_updates, rank, node, num_ranks = most
            updates = f", of {num_updates} updates" if num_updates else ""
            message += (
                f". That is what rank 0 sees. But rank {rank}, on the node {node}, sees one at {source}{updates}, as "
                f"{num_ranks} of {exchange.world_size} ranks do in all. A save leaves its files on the node of rank 0, "
                f"and the nodes do not share this disk: {_ADVICE}"
            )
        raise agreed(error_class(kind)(message))
    return own[0] if own else from_json(answer["read"])


def warn_of_blind_ranks(exchange: Exchange, source: Path, blind: RankRuns) -> None:
    """Collective: every rank must call it."""
    exchange.warn(
        f"{len(blind)} of {exchange.world_size} ranks do not see {source} as rank 0 does: rank 0 reads for them, which "
        "is slower. Load from a file system that all nodes share"
    )


def warn_of_a_newer_one(exchange: Exchange, source: Path, num_updates: int, blind: RankRuns) -> None:
    """Collective: every rank must call it. Warns if a rank sees an average of more updates than rank 0 loads.

    Args:
        exchange: the control traffic of all ranks.
        source: the path.
        num_updates: the updates of the average that rank 0 loads.
        blind: the ranks that see something else than rank 0, or nothing.
    """
    most = _most_updates(exchange, num_updates_at(source) if exchange.rank in blind else None)
    if most is not None and most[0] > num_updates:
        exchange.warn(
            f"{source} has {num_updates} updates on the node {node_name()}, where rank 0 is, and that is loaded. But "
            f"rank {most[1]}, on the node {most[2]}, sees an average of {most[0]} updates there, as {most[3]} ranks do "
            f"in all. A save leaves its files on the node of rank 0, and the nodes do not share this disk. To go on "
            f"from the newer average {_ADVICE}"
        )


def _most_updates(exchange: Exchange, num_updates: int | None) -> list[Any] | None:
    """Collective. The largest number of updates that a rank sees, the lowest such rank, its node, how many see it."""
    own = None if num_updates is None else [num_updates, exchange.rank, node_name(), 1]
    most: list[Any] | None = exchange.reduce("comparing what the ranks see", own, _more)
    return most


def _more(lower: list[Any] | None, higher: list[Any] | None) -> list[Any] | None:
    if lower is None or higher is None:
        return higher if lower is None else lower
    if lower[0] == higher[0]:
        return [*lower[:3], lower[3] + higher[3]]
    return max(lower, higher, key=lambda seen: seen[0])
