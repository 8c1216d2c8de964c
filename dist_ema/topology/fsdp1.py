"""FSDP1 (`FullyShardedDataParallel`): parameters that lie flattened, end to end, in one sharded flat parameter.

A rank holds a contiguous run of the flat parameter, so it holds at most one run of elements of an original parameter. A
run is a few boxes: a partial row, whole rows, a partial row.

    flat parameter   |---- weight ----|- bias -|---- next ----|pad|
    rank 0 holds     [..............]
    rank 1 holds                     [..................]            weight: its last elements, bias, part of next

Over tensor parallelism an original parameter is a DTensor, and it is its local tensor that lies in the flat parameter:
the boxes of a run are then those of the whole tensor that this part of the local tensor has (`runs.boxes_in_whole`).

Only private attributes of FSDP1's handle show this. `_flat_slices`, `FSDP1.drop_gathered` and `_local_shard` alone read
them, and `test_fsdp1_internals_are_as_expected` fails loudly when torch changes them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.boxes.owners import boxes_of_run
from dist_ema.boxes.shards import Box, NoForm, same_memory
from dist_ema.errors import ModelChangedError, UnsupportedModelError
from dist_ema.topology.seam.layout import HeldBox, Holders, Layout, Locator, Named, View, Where
from dist_ema.topology.seam.loaded import is_fsdp1
from dist_ema.topology.seam.meshes import place
from dist_ema.topology.seam.runs import boxes_in_whole, sizes_of

if TYPE_CHECKING:
    from torch.distributed.fsdp import FullyShardedDataParallel

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
        requires_grad: whether the original parameter requires a gradient.
        replicate_group: the process group across which whole shards are replicated (hybrid sharding), or None.
        shape: the whole shape of the original parameter.
        local_shape: the shape of what was flattened: the parameter itself, or its local tensor.
        placed: the mesh and the placements of that local tensor, or None.
        start: the index of the first element that this rank holds, in what was flattened.
        numel: the number of elements that this rank holds, maybe 0.
        offset: the index of the first of them in this rank's shard of the flat parameter.
    """

    handle: Any
    requires_grad: bool
    replicate_group: Any
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    placed: Any
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
            UnsupportedModelError: a parameter is flattened in another than row-major order.
        """
        slices: dict[Where, Any] = {}
        for module in model.modules():
            if is_fsdp1(module):
                slices.update(_flat_slices(module))
        if not slices:
            return {}
        return dict.fromkeys(((id(module), _FLAT_PARAMETER) for module in model.modules()), None) | slices

    def claims(self, named: Named) -> bool:
        """Whether the tensor lies in a flat parameter."""
        return isinstance(named.source, _FlatSlice)

    def locator(self, model: nn.Module, rank: int, world_size: int) -> Locator:
        """The locator refuses what `meshes.place` refuses, where an original parameter is a DTensor."""
        return functools.partial(_locate, rank=rank)

    def drop_gathered(self, model: nn.Module, views: Sequence[View] = ()) -> None:
        """Drop gathered copies of flat parameters, so that the next forward gathers the shards anew. No communication.

        After a forward without gradients FSDP1's root, and every group under SHARD_GRAD_OP, keeps its gathered copy. It
        would use that copy again, though the shards have changed.

        Raises:
            ModelChangedError: the call was made within `summon_full_params`.
        """
        handles = [module._handle for module in model.modules() if is_fsdp1(module) and module._handle is not None]
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
    replicate_group = getattr(module, "_inter_node_pg", None)
    slices: dict[tuple[int, str], _FlatSlice] = {}
    originals = zip(flat._param_infos, flat._shapes, flat._param_extensions, flat._shard_param_infos, strict=True)
    for info, shape, placed, local in originals:
        # Without use_orig_params it is gone, and all that lies in a flat parameter requires a gradient, or nothing.
        original = dict(info.module.named_parameters(recurse=False)).get(info.param_name)
        slices[id(info.module), info.param_name] = _FlatSlice(
            handle=handle,
            requires_grad=bool((flat if original is None else original).requires_grad),
            replicate_group=replicate_group,
            shape=tuple(shape if placed is None else placed.shape),
            local_shape=tuple(shape),
            placed=placed,
            start=local.intra_param_start_idx or 0,
            numel=local.numel_in_shard or 0,
            offset=local.offset_in_shard or 0,
        )
    for shared in flat._shared_param_infos:
        slices[id(shared.module), shared.param_name] = slices[id(shared.prim_module), shared.prim_param_name]
    return slices


def _locate(named: Named, rank: int) -> tuple[list[HeldBox], Holders]:
    flat_slice: _FlatSlice = named.source
    handle, fqn = flat_slice.handle, named.fqns[0]
    flattened = Box(fqn, (0,) * len(flat_slice.local_shape), flat_slice.local_shape)
    group = flat_slice.replicate_group if handle.uses_sharded_strategy else handle.process_group
    ranks = (rank,) if group is None else tuple(dist.get_process_group_ranks(group))
    holders = Holders(ranks, ranks.index(rank), () if group is None else (group,))
    runs = [[(0, size)] if size else [] for size in flat_slice.shape]
    if flat_slice.placed is not None:
        placed = place(fqn, flat_slice.shape, flat_slice.placed.mesh, flat_slice.placed.placements)
        if placed is None or sizes_of(placed.runs) != flat_slice.local_shape:
            raise UnsupportedModelError(
                f"{fqn} has {list(flat_slice.local_shape)} on this rank, which its placements "
                f"{flat_slice.placed.placements} of {list(flat_slice.shape)} do not explain: its layout is not "
                "understood. Make it with distribute_tensor before it is wrapped"
            )
        runs = placed.runs
        if len(ranks) == 1:  # else the ranks of the group alone are named, and others that hold the same are found
            holders = placed.holders
    boxes = []
    for skipped, local in boxes_of_run(flattened, flat_slice.start, flat_slice.numel):
        run = _LocalRun(handle, flat_slice.offset + skipped, local)
        boxes += [
            HeldBox(box, run if part.sizes == local.sizes else _PartOfRun(run, part), _NO_FORM)
            for box, part in boxes_in_whole(local, runs)
        ]
    return boxes, holders


def _local_shard(handle: Any) -> torch.Tensor:
    """The full-precision shard that the optimizer steps; before the first forward it is the flat parameter itself."""
    flat = handle.flat_param
    shard: torch.Tensor = flat._local_shard if hasattr(flat, "_local_shard") else flat.data
    return shard


class _LocalRun:
    """A run of the flat shard, in the sizes of a box; the object stays the same while its memory does."""

    def __init__(self, handle: Any, offset: int, box: Box) -> None:
        self.box = box
        self._handle = handle
        self._offset = offset
        self._shard = torch.empty(0, device="cpu")
        self._view = torch.empty(0, device="cpu")

    def takes_gradient(self) -> bool:
        """Whether any tensor in the flat parameter requires a gradient."""
        return bool(self._handle.flat_param.requires_grad)

    def __call__(self) -> torch.Tensor:
        shard = _local_shard(self._handle)
        if not same_memory(shard, self._shard):
            self._shard = shard.detach()
            self._view = self._shard[self._offset : self._offset + self.box.numel].view(self.box.sizes)
        return self._view


class _PartOfRun:
    """A part of the box of a run, where it lies apart from the rest in the whole tensor."""

    def __init__(self, run: _LocalRun, part: Box) -> None:
        self._run = run
        starts = (at - start for at, start in zip(part.offsets, run.box.offsets, strict=True))
        self._region = tuple(slice(at, at + size) for at, size in zip(starts, part.sizes, strict=True))
        self._seen: torch.Tensor | None = None
        self._view = torch.empty(0, device="cpu")

    def takes_gradient(self) -> bool:
        """As of the run."""
        return self._run.takes_gradient()

    def __call__(self) -> torch.Tensor:
        values = self._run()
        if values is not self._seen:
            self._seen, self._view = values, values[self._region]
        return self._view
