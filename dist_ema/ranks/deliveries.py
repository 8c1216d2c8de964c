"""Messages from the owners of values to ranks that want all of them, in training's own default process group.

An owner sends what it has to each rank that wants it. Where all ranks want it, and they are many or have NCCL, it
broadcasts that. Each message is begun by one call of C: see broadcasts.py. All ranks begin theirs in one order, by
owners, then by what the owner sends, then by receivers, so none waits for a message that comes after its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dist_ema.ranks.broadcasts import Passing

__all__ = ["deliveries", "device_of_messages"]

# Messages of training from rank to rank have the tag 0, if they have one.
_TAG = 0x0E3A

# Measured on 2 and 4 ranks of gloo (launch/bench/whole_tensors.py): to send to each of so few ranks takes less CPU time
# than a broadcast. To more ranks one owner would send more than each rank of a broadcast's tree.
_FEW = 4


def deliveries(
    segments: Mapping[int, Sequence[torch.Tensor]], receivers: Sequence[int] | None, rank: int, world_size: int
) -> list[Passing]:
    """Collective: every rank must begin its messages, in order. No communication before that.

    Args:
        segments: owner -> for each of its messages contiguous bytes (uint8), read on the owner and overwritten
            elsewhere. A receiver has those of all owners, another rank has its own.
        receivers: the ranks that want the bytes of all owners, ascending; None for all ranks.
        rank: this rank in the default group.
        world_size: the number of ranks.
    """
    if world_size == 1:
        return []
    group: Any = dist.group.WORLD
    messages = []
    for owner, of_owner in sorted(segments.items()):
        for segment in of_owner:
            if receivers is None and (world_size > _FEW or segment.device.type != "cpu"):
                options = dist.BroadcastOptions()
                options.rootRank, options.rootTensor = owner, 0
                messages.append(Passing(partial(group.broadcast, [segment], options)))
            elif rank == owner:
                others = [receiver for receiver in receivers or range(world_size) if receiver != rank]
                messages += [Passing(partial(group.send, [segment], receiver, _TAG)) for receiver in others]
            elif receivers is None or rank in receivers:
                messages.append(Passing(partial(group.recv, [segment], owner, _TAG)))
    return messages


def device_of_messages(world_size: int) -> torch.device | None:
    """Where the default group sends from: the present GPU under NCCL, else host memory; None for a rank alone."""
    if world_size == 1:
        return None
    if "cuda:nccl" in dist.get_backend_config() and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
