"""FSDP1 (`FullyShardedDataParallel`): parameters that lie flattened, end to end, in one sharded flat parameter.

A rank holds a contiguous run of the flat parameter, so it holds at most one run of elements of an original parameter. A
run is a few boxes: a partial row, whole rows, a partial row.

    flat parameter   |---- weight ----|- bias -|---- next ----|pad|
    rank 0 holds     [..............]
    rank 1 holds                     [..................]            weight: its last elements, bias, part of next

Only private attributes of FSDP1's handle show this. `_flat_slices`, `FSDP1.drop_gathered` and `_local_shard` alone read
them, and `test_fsdp1_internals_are_as_expected` fails loudly when torch changes them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from dist_ema.boxes.owners import boxes_of_run
from dist_ema.boxes.shards import Box, NoForm, same_memory
from dist_ema.errors import ModelChangedError, UnsupportedModelError
from dist_ema.topology.layout import HeldBox, Holders, Layout, Locator, Named, View, Where

__all__ = ["FSDP1"]

_FLAT_PARAMETER = "_flat_param"
_NO_FORM = NoForm(
    "lies in a flat parameter of FSDP1, whose shards have no form in a state dict: use save, or shard the model with "
    "FSDP2 (fully_shard)"
)


@dataclasses.dataclass(frozen=True)
class _FlatSlice:
    """One original parameter within a flat parameter.

    Attributes:
        handle: FSDP1's handle of the flat parameter.
        replicate_group: the process group across which whole shards are replicated (hybrid sharding), or None.
        shape: the whole shape of the original parameter.
        start: the index of the first element that this rank holds, in the flattened original parameter.
        numel: the number of elements that this rank holds, maybe 0.
        offset: the index of the first of them in this rank's shard of the flat parameter.
    """

    handle: Any
    replicate_group: Any
    shape: tuple[int, ...]
    start: int
    numel: int
    offset: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the sharded values that the optimizer steps."""
        return _local_shard(self.handle).dtype


class FSDP1(Layout):
    """Runs of flat parameters: the ranks of a hybrid group hold a run alike, and all ranks do so with NO_SHARD."""

    def find(self, model: nn.Module) -> Mapping[Where, Any]:
        """The original parameters, and None for the flat ones, which it hides. No communication.

        Raises:
            UnsupportedModelError: a parameter is flattened in another than row-major order, or is a DTensor.
        """
        slices: dict[Where, Any] = {}
        for module in model.modules():
            if isinstance(module, FullyShardedDataParallel):
                slices.update(_flat_slices(module))
        if not slices:
            return {}
        return dict.fromkeys(((id(module), _FLAT_PARAMETER) for module in model.modules()), None) | slices

    def claims(self, named: Named) -> bool:
        """Whether the tensor lies in a flat parameter."""
        return isinstance(named.source, _FlatSlice)

    def locator(self, model: nn.Module, rank: int, world_size: int) -> Locator:
        """The locator refuses process groups that leave ranks out."""
        return functools.partial(_locate, world_size=world_size)

    def drop_gathered(self, model: nn.Module, views: Sequence[View] = ()) -> None:
        """Drop gathered copies of flat parameters, so that the next forward gathers the shards anew. No communication.

        After a forward without gradients FSDP1's root, and every group under SHARD_GRAD_OP, keeps its gathered copy. It
        would use that copy again, though the shards have changed.

        Raises:
            ModelChangedError: the call was made within `summon_full_params`.
        """
        handles = [
            module._handle
            for module in model.modules()
            if isinstance(module, FullyShardedDataParallel) and module._handle is not None
        ]
        if any(handle._training_state.name == "SUMMON_FULL_PARAMS" for handle in handles):
            raise ModelChangedError(
                "this call was made within FSDP.summon_full_params(), where the parameters are whole and will be "
                "written back: leave that block first"
            )
        for handle in handles:
            if hasattr(handle.flat_param, "_local_shard"):  # it has run a forward
                if handle._use_orig_params:
                    # This does `parameter.data = ...`, which FSDP1 takes over at the next forward.
                    handle._writeback_orig_params()
                handle.reshard(handle.uses_sharded_strategy)
                handle.post_reshard()
                handle._prefetched = False


def _flat_slices(module: FullyShardedDataParallel) -> dict[tuple[int, str], _FlatSlice]:
    handle = module._handle
    if handle is None:
        return {}
    flat = handle.flat_param
    if not all(flat._contiguities):
        name = flat._fqns[flat._contiguities.index(False)]
        raise UnsupportedModelError(
            f"{name} is not contiguous (channels_last, say) and FSDP1 flattens it in that order; expected row-major: "
            "call .contiguous() on it before wrapping, or use FSDP2"
        )
    if handle._fsdp_extension is not None:
        raise UnsupportedModelError(
            "FSDP1 over tensor parallelism or on a slice of a larger mesh is not served: use FSDP2 there"
        )
    replicate_group = getattr(module, "_inter_node_pg", None)
    slices: dict[tuple[int, str], _FlatSlice] = {}
    for info, shape, local in zip(flat._param_infos, flat._shapes, flat._shard_param_infos, strict=True):
        slices[id(info.module), info.param_name] = _FlatSlice(
            handle=handle,
            replicate_group=replicate_group,
            shape=tuple(shape),
            start=local.intra_param_start_idx or 0,
            numel=local.numel_in_shard or 0,
            offset=local.offset_in_shard or 0,
        )
    for shared in flat._shared_param_infos:
        slices[id(shared.module), shared.param_name] = slices[id(shared.prim_module), shared.prim_param_name]
    return slices


def _locate(named: Named, world_size: int) -> tuple[list[HeldBox], Holders]:
    flat_slice: _FlatSlice = named.source
    whole = Box(named.fqns[0], (0,) * len(flat_slice.shape), flat_slice.shape)
    boxes = [
        HeldBox(box, _LocalRun(flat_slice.handle, flat_slice.offset + skipped, box.sizes), _NO_FORM)
        for skipped, box in boxes_of_run(whole, flat_slice.start, flat_slice.numel)
    ]
    shard_group = flat_slice.handle.process_group
    if not flat_slice.handle.uses_sharded_strategy:
        group, shards = shard_group, 1
    else:
        group, shards = flat_slice.replicate_group, dist.get_world_size(shard_group)
    ranks = tuple(dist.get_process_group_ranks(group)) if group is not None else (dist.get_rank(),)
    if len(ranks) * shards != world_size:
        raise UnsupportedModelError(
            f"{named.fqns[0]} is sharded by FSDP1 over {shards} ranks and replicated over {len(ranks)}, which leaves "
            f"out some of the {world_size} ranks. Expected process groups of all ranks"
        )
    return boxes, Holders(ranks, ranks.index(dist.get_rank()), () if group is None else (group,))


def _local_shard(handle: Any) -> torch.Tensor:
    """The full-precision shard that the optimizer steps; before the first forward it is the flat parameter itself."""
    flat = handle.flat_param
    shard: torch.Tensor = flat._local_shard if hasattr(flat, "_local_shard") else flat.data
    return shard


class _LocalRun:
    """A run of the flat shard, in the sizes of a box; the object stays the same while its memory does."""

    def __init__(self, handle: Any, offset: int, sizes: tuple[int, ...]) -> None:
        self._handle = handle
        self._offset = offset
        self._sizes = sizes
        self._shard = torch.empty(0, device="cpu")
        self._view = torch.empty(0, device="cpu")

    def takes_gradient(self) -> bool:
        """Whether any tensor in the flat parameter requires a gradient."""
        return bool(self._handle.flat_param.requires_grad)

    def __call__(self) -> torch.Tensor:
        shard = _local_shard(self._handle)
        if not same_memory(shard, self._shard):
            self._shard = shard.detach()
            self._view = self._shard[self._offset : self._offset + math.prod(self._sizes)].view(self._sizes)
        return self._view
