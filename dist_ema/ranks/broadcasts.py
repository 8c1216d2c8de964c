"""Broadcasts of values to the ranks that hold the same tensor, in training's own process groups.

A rank that leaves these groups spoils them for training. So a broadcast that the ranks have agreed on is not cut off:
it is given as steps (see [Note: interrupts] in uninterrupted/jobs.py), which one call of C begins; an interrupt
cannot cut that in two. What an interrupt leaves is done before the interrupt is raised.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dist_ema.uninterrupted.jobs import Steps

__all__ = ["Passing", "broadcast_steps"]

_call = operator.methodcaller("__call__")


class Passing:
    """One message of a group: begun once, by one call of C, and then waited for.

    Args:
        begin: begins the message, and returns torch's handle of it.
    """

    def __init__(self, begin: Callable[[], Any]) -> None:
        self._works: list[Any] = []  # one handle, when the message is begun; None in its place when it is through
        self._waits: list[Any] = []  # what torch's wait returned
        self._has_failed = False
        # The map ends with its first use: a second call begins nothing, and no reference to the group is left here.
        self.begin: Callable[[], None] = partial(self._works.extend, map(_call, (begin,)))

    def wait(self) -> None:
        """Wait until the message is through; may be called again.

        Raises:
            RuntimeError: the message failed, or could not be begun.
        """
        if self._has_failed or not self._works:
            raise RuntimeError("the message was not begun, or has failed")
        try:
            if self._works[0] is not None and not self._waits:
                # One call of C. An interrupt between the wait and its record would have us wait again, and gloo waits
                # for the next message of the sender then.
                self._waits.extend(map(_call, (self._works[0].wait,)))
        except Exception:
            self._has_failed = True
            self._works.clear()  # it would keep connections open
            raise
        self._works[0] = None

    def add_to(self, steps: Steps) -> None:
        """Add the beginning and the wait to some steps."""
        steps.again(self.begin)
        steps.again(self.wait)


def broadcast_steps(
    steps: Steps,
    owner: int,
    values: torch.Tensor,
    ranks: Sequence[int],
    groups: Sequence[dist.ProcessGroup | None],
    room: Callable[[int, torch.device], torch.Tensor],
) -> None:
    """Collective: every rank in `ranks` must do the steps. Send the values of `owner` to all of them.

    With several groups (several Replicate axes of a mesh) the values are sent along one axis after the other: first
    within the owner's own line of the first axis, then from every rank of that line along the second, and so on.

    Args:
        steps: the steps to which the broadcast is added.
        owner: the global rank whose values are sent.
        values: contiguous bytes (uint8), read on the owner and overwritten elsewhere.
        ranks: the global ranks of all holders, row-major over the axes of `groups`.
        groups: this rank's process group along every axis; None is the default group.
        room: returns scratch of so many bytes on a device, which is free again after the broadcast.
    """
    grid = torch.tensor(ranks, device="cpu").view([dist.get_world_size(group) for group in groups])
    own_index, owner_index = (_index_in(grid, rank) for rank in (dist.get_rank(), owner))
    for axis, group in enumerate(groups):
        # A line in which no rank has the values yet does nothing for this axis; a later axis reaches it.
        if own_index[axis + 1 :] == owner_index[axis + 1 :]:
            carrier = (*own_index[:axis], owner_index[axis], *own_index[axis + 1 :])
            _add(steps, values, int(grid[carrier]), group, room)


def _add(
    steps: Steps,
    values: torch.Tensor,
    sender: int,
    group: dist.ProcessGroup | None,
    room: Callable[[int, torch.device], torch.Tensor],
) -> None:
    sent = values
    if values.device.type == "cpu" and dist.get_backend(group) == "nccl":
        # The parameters are offloaded to the host, and only NCCL reaches the replicas.
        sent = room(values.numel(), torch.device("cuda", torch.cuda.current_device()))
        steps.again(partial(sent.copy_, values))
    target: Any = dist.group.WORLD if group is None else group
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = dist.get_group_rank(target, sender), 0
    Passing(partial(target.broadcast, [sent], options)).add_to(steps)
    if sent is not values:
        steps.again(partial(values.copy_, sent))


def _index_in(grid: torch.Tensor, rank: int) -> tuple[int, ...]:
    return tuple((grid == rank).nonzero()[0].tolist())
