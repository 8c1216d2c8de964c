"""Process groups of ranks that hold the same tensors, where training has made none."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from dist_ema.ranks.exchange import Exchange
from dist_ema.uninterrupted.threads import insist

__all__ = ["groups_of", "launched_without_a_group", "names_of", "of_ranks"]


def _name_of(group: Any) -> str:
    """The name of a process group; None is the default group. Equal on all ranks of a group. No communication."""
    target = dist.group.WORLD if group is None else group
    return "" if target is None else str(target.group_name)


def launched_without_a_group() -> int:
    """How many processes a launcher says that it started, if this is the first and in no process group; else 0.

    No communication. Source of the variables: torchrun (`torch.distributed.run`, "Environment Variables").
    """
    size = os.environ.get("WORLD_SIZE", "")
    is_first = os.environ.get("RANK") == "0" and not dist.is_initialized()
    return int(size) if is_first and size.isdecimal() and int(size) > 1 else 0


def names_of(groups: Sequence[Any]) -> list[str]:
    """What ranks that broadcast through these groups have alike: a name, or the sizes along several axes of a mesh.

    Along an axis each rank has a line of ranks, and so a group, of its own. No communication.
    """
    if len(groups) <= 1:
        return [_name_of(group) for group in groups]
    return [str(dist.get_world_size(group)) for group in groups]


def of_ranks(groups: Sequence[Any], ranks: Sequence[int]) -> tuple[Any, ...]:
    """The first group, by name, that has these ranks and no other; none if there is none. No communication."""
    same = (group for group in groups if sorted(dist.get_process_group_ranks(group)) == sorted(ranks))
    return tuple(sorted(same, key=_name_of)[:1])


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
    own = {_text(ranks): 0 for ranks in sets if ranks != everyone}
    of_all = exchange.reduce(action, own, lambda lower, higher: {**lower, **higher})
    if of_all:
        begin, wait = exchange.channel.meeting(action)

        def make() -> None:
            begin()
            wait()
            for text in sorted(of_all):
                exchange.channel.group_of(_ranks(text))

        if exchange.channel.is_simulated:
            make()
        else:  # torch lets all ranks wait for one that was interrupted here, and counts the groups that each has made
            insist(make)
    return {ranks: None if ranks == everyone else exchange.channel.group_of(ranks) for ranks in sets}


def _text(ranks: Sequence[int]) -> str:
    """Ascending ranks as runs of equal steps, "first:last:step": short for the slices of a mesh."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and (len(runs[-1]) == 1 or rank - runs[-1][-1] == runs[-1][1] - runs[-1][0]):
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(f"{run[0]}:{run[-1]}:{run[1] - run[0] if len(run) > 1 else 1}" for run in runs)


def _ranks(text: str) -> list[int]:
    runs = (map(int, run.split(":")) for run in text.split(","))
    return [rank for first, last, step in runs for rank in range(first, last + 1, step)]
