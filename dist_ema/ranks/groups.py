"""Process groups of ranks that hold the same tensors, where training has made none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from dist_ema.ranks.exchange import Exchange
from dist_ema.uninterrupted import insist

__all__ = ["groups_of", "name_of"]


def name_of(group: Any) -> str:
    """The name of a process group; None is the default group. Equal on all ranks of a group. No communication."""
    target = dist.group.WORLD if group is None else group
    return "" if target is None else str(target.group_name)


def groups_of(exchange: Exchange, action: str, sets: Sequence[tuple[int, ...]]) -> Mapping[tuple[int, ...], Any]:
    """Collective: every rank must call it. A process group for each set of ranks, of the default group's backend.

    The groups are made on all ranks in one order, and once: the next average uses them too. They end with the default
    group.

    Args:
        exchange: the control traffic of all ranks.
        action: a name of the work, for the message.
        sets: the sets of ranks, ascending, that this rank needs and is in; the ranks may bring different ones.

    Returns:
        The group of each set; None, which is the default group, for all ranks.
    """
    everyone = tuple(range(exchange.world_size))
    own = {",".join(map(str, ranks)): 0 for ranks in sets if ranks != everyone}
    of_all = exchange.reduce(action, own, lambda lower, higher: {**lower, **higher})
    if of_all:
        of_ranks = [[int(rank) for rank in key.split(",")] for key in sorted(of_all)]
        begin, wait = exchange.channel.meeting(action)

        def make() -> None:
            begin()
            wait()
            for ranks in of_ranks:
                exchange.channel.group_of(ranks)

        # Torch lets all ranks wait for one that was interrupted here, and counts the groups that each has made.
        insist(make)
    return {ranks: None if ranks == everyone else exchange.channel.group_of(ranks) for ranks in sets}
