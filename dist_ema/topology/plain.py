"""Plain tensors: in one process, in DDP, ignored by FSDP, or buffers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_ema.boxes.shards import Box, Slot, same_memory
from dist_ema.errors import CheckpointMismatchError, ModelChangedError
from dist_ema.topology.seam.layout import HeldBox, Holders, Layout, Locator, Named
from dist_ema.topology.seam.loaded import is_dtensor

__all__ = ["Plain", "PlainForm", "holders_of_plain", "whole_tensor"]


def holders_of_plain(model: nn.Module, rank: int, world_size: int) -> Callable[[Named], Holders]:
    """A plain tensor -> the ranks that hold it: those of the DDP that wraps its module, else all ranks.

    No communication.
    """
    of_all = Holders(_all_ranks(world_size), rank, (None,))
    by_module: dict[int, Holders] = {}
    for ddp in (module for module in model.modules() if isinstance(module, DistributedDataParallel)):
        holders = _holders_in(ddp.process_group, rank, world_size)
        if len(holders.ranks) == world_size:
            of_all = holders
        by_module.update((id(module), holders) for module in ddp.modules())  # of nested ones the inner one comes last
    return lambda named: by_module.get(id(named.owner), of_all)


def _holders_in(group: dist.ProcessGroup, rank: int, world_size: int) -> Holders:
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == world_size:
        return Holders(_all_ranks(world_size), rank, (group,))
    return Holders(tuple(ranks), ranks.index(rank), (group,))


@functools.lru_cache(maxsize=1)
def _all_ranks(world_size: int) -> tuple[int, ...]:
    """One tuple for all averages of a process: of ten thousand ranks it takes half a megabyte."""
    return tuple(range(world_size))


class Plain(Layout):
    """Whole tensors, in one process, in DDP, ignored by FSDP, or buffers: all ranks hold them, or those of the DDP."""

    def claims(self, named: Named) -> bool:
        """Whether the source is a tensor; a layout before this one claims the tensors of its own kind."""
        return isinstance(named.source, torch.Tensor)

    def locator(self, model: nn.Module, rank: int, world_size: int) -> Locator:
        """The locator gives a whole tensor as one box."""
        holders_of = holders_of_plain(model, rank, world_size)
        return lambda named: ([whole_tensor(named)], holders_of(named))


def whole_tensor(named: Named) -> HeldBox:
    """The whole tensor, looked up by name at every use.

    A kept tensor would be stale: a forward often assigns buffers anew, and `load_state_dict(assign=True)` and `.to()`
    replace parameters.
    """
    box = Box(named.fqns[0], (0,) * len(named.shape), named.shape)
    # nn.Module has no public name for its tables; looking a name up in them is ten times faster than getattr.
    table = vars(named.owner)["_buffers" if named.is_buffer else "_parameters"]
    return HeldBox(box, _PlainValues(named), PlainForm(), Slot(table, named.attribute))


class PlainForm:
    """A whole tensor stands for itself."""

    def wrap(self, values: torch.Tensor) -> torch.Tensor:
        """The values themselves."""
        return values

    def unwrap(self, fqn: str, entry: torch.Tensor) -> torch.Tensor:
        """The entry itself, unless it is a DTensor."""
        if is_dtensor(entry):
            raise CheckpointMismatchError(f"the entry of {fqn} is a DTensor, expected a plain tensor as in the model")
        return entry


class _PlainValues:
    """The tensor under a name, without its autograd history; the object stays the same while its memory does."""

    def __init__(self, named: Named) -> None:
        self._owner = named.owner
        self._attribute = named.attribute
        self._is_parameter = not named.is_buffer
        self._seen: Any = None
        self._view = torch.empty(0, device="cpu")

    def __call__(self) -> torch.Tensor:
        values: Any = getattr(self._owner, self._attribute)
        if values is not self._seen:
            self._check(values)
        if values is not self._seen or not same_memory(values, self._view):
            self._seen, self._view = values, values.detach()
        return self._view

    def takes_gradient(self) -> bool:
        """Whether the tensor under the name requires a gradient."""
        return bool(getattr(getattr(self._owner, self._attribute, None), "requires_grad", False))

    def _check(self, values: object) -> None:
        name = f"{self._attribute!r} of {type(self._owner).__name__}"
        if is_dtensor(values):
            raise ModelChangedError(
                f"{name} was plain when the average was built and is a DTensor now: wrap the model first (fully_shard, "
                "parallelize_module), then build the ShardedEMA"
            )
        if not isinstance(values, torch.Tensor) or (self._is_parameter and not isinstance(values, nn.Parameter)):
            raise ModelChangedError(
                f"{name} is a {type(values).__name__} now (removed, parametrized or wrapped since?): build a new "
                "ShardedEMA after changing a model"
            )
