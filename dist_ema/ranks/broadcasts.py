"""Values of one rank given to the other ranks that hold the same tensor, by training's own process groups.

Nobody can leave these groups without spoiling them for training. So a broadcast that the ranks have agreed on is not
cut off: it is given as steps (see [Note: interrupts] in uninterrupted.py), each begun by one call of C, which an
interrupt cannot cut in two; what an interrupt leaves is done before it goes on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dist_ema.uninterrupted import Steps

__all__ = ["Passing", "broadcast_steps"]

_call = operator.methodcaller("__call__")


class Passing:
    """One message of a group: begun once, by one call of C, and then waited for.

    Args:
        begin: begins it, and returns torch's handle of it.
    """

    def __init__(self, begin: Callable[[], Any]) -> None:
        self._works: list[Any] = []  # one, once it is begun; None in its place when it is through
        self._has_failed = False
        # The map ends with its first use, so a second call of it begins nothing; then nothing here holds the group.
        self.begin: Callable[[], None] = partial(self._works.extend, map(_call, (begin,)))

    def wait(self) -> None:
        """Wait until it is through; may be called again.

        Raises:
            RuntimeError: it failed, or could not be begun.
        """
        if self._has_failed or not self._works:
            raise RuntimeError("the message was not begun, or has failed")
        try:
            if self._works[0] is not None:
                self._works[0].wait()
        except Exception:
            self._has_failed = True
            self._works.clear()  # it would keep connections open
            raise
        self._works[0] = None

    def add_to(self, steps: Steps) -> None:
        """Add what it takes to some steps."""
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
    """Collective: each of `ranks` must do the steps. Send the values of `owner` to all of them.

    With several groups (several Replicate axes of a mesh) the values travel along one axis after the other: first
    within the owner's own line of the first axis, then from every rank of that line along the second, and so on.

    Args:
        steps: the broadcast is added to them.
        owner: global rank whose values are sent.
        values: contiguous bytes (uint8), read on the owner and overwritten elsewhere.
        ranks: global ranks of all holders, laid out row-major over the axes of `groups`.
        groups: this rank's process group along each axis; None is the default group.
        room: scratch of so many bytes on a device, which is free again after the broadcast.
    """
    grid = torch.tensor(ranks, device="cpu").view([dist.get_world_size(group) for group in groups])
    mine, owners = (_place_in(grid, rank) for rank in (dist.get_rank(), owner))
    for axis, group in enumerate(groups):
        # Lines in which nobody has the values yet sit this axis out; a later axis reaches them.
        if mine[axis + 1 :] == owners[axis + 1 :]:
            carrier = (*mine[:axis], owners[axis], *mine[axis + 1 :])
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
        # Parameters offloaded to the host, replicas reachable by NCCL only.
        sent = room(values.numel(), torch.device("cuda", torch.cuda.current_device()))
        steps.again(partial(sent.copy_, values))
    target: Any = dist.group.WORLD if group is None else group
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = dist.get_group_rank(target, sender), 0
    Passing(partial(target.broadcast, [sent], options)).add_to(steps)
    if sent is not values:
        steps.again(partial(values.copy_, sent))


def _place_in(grid: torch.Tensor, rank: int) -> tuple[int, ...]:
    return tuple((grid == rank).nonzero()[0].tolist())
