"""DTensors: FSDP2, HSDP, tensor and expert parallelism, and their combinations, on one mesh or on slices of it."""

from __future__ import annotations

import functools
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dist_ema.boxes.shards import Box, Slot, same_memory
from dist_ema.errors import CheckpointMismatchError, ModelChangedError, UnsupportedModelError
from dist_ema.topology.seam.layout import HeldBox, Holders, Layout, Locator, Named, View
from dist_ema.topology.seam.loaded import dtensor_from_local, is_dtensor, is_fsdp2
from dist_ema.topology.seam.meshes import place
from dist_ema.topology.seam.runs import boxes_in_whole, sizes_of
from dist_ema.topology.values import name_of_inner

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

__all__ = ["DTensors"]


class DTensors(Layout):
    """DTensors: a rank holds the boxes of its local tensor, as do the ranks along the Replicate axes of the mesh."""

    def claims(self, named: Named) -> bool:
        """Whether the source is a DTensor."""
        return is_dtensor(named.source)

    def locator(self, model: nn.Module, rank: int, world_size: int) -> Locator:
        """The locator refuses a Partial placement, an axis of ranks that do not ascend, and another local shape."""
        return functools.partial(_locate, model=model, rank=rank)

    def drop_gathered(self, model: nn.Module, views: Sequence[View] = ()) -> None:
        """Make the parameters' names resolve to the sharded DTensors again. No communication.

        After a forward without gradients the root group of FSDP2 stays gathered: its names then yield plain tensors,
        whose reads are stale and whose writes are lost, because the next reshard drops them. After a forward that an
        exception cut off, `reshard()` does nothing until the iteration is reset.

        Raises:
            ModelChangedError: a group cannot be resharded.
        """
        modules = [module for module in model.modules() if is_fsdp2(module)]
        for module in modules:
            _finish_gathers(module)
            module.reshard()
        sharded = [view for view in views if isinstance(view, _LocalValues | _PartOfLocal)]
        if all(view.is_sharded() for view in sharded):
            return
        for module in modules:
            _end_forward(module)
        if not all(view.is_sharded() for view in sharded):
            raise ModelChangedError(
                "FSDP still holds gathered weights: a forward or backward of this model is under way, or was cut off. "
                "Run one whole forward (and backward, if with gradients) before swapping or saving"
            )


def _finish_gathers(module: FSDPModule) -> None:
    """Let a gather that was started ahead (prefetched, or `unshard(async_op=True)`) arrive, so that reshard drops it.

    Otherwise the next forward would use its old values. The call waits for communication under way, and starts none.
    """
    for group in _groups(module):
        if group._all_gather_result is not None:
            group.wait_for_unshard()


def _end_forward(module: FSDPModule) -> None:
    """End a forward that an exception cut off, as FSDP sees it, and reshard. No communication."""
    if hasattr(module, "reset_iter_state"):
        with suppress(RuntimeError, AttributeError):  # the module is no root, or has not run yet
            module.reset_iter_state()
    else:  # before torch 2.13
        for group in _groups(module):
            group._training_state = type(group._training_state).IDLE
        module.reshard()


def _groups(module: FSDPModule) -> list[Any]:
    """FSDP2's records of gathered parameters; the one place of its private names, which differ over torch versions.

    `test_a_forward_cut_off_by_an_exception_does_not_leave_the_average_in_the_model` and
    `test_a_gather_started_before_a_swap_does_not_bring_the_other_weights` guard them.
    """
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def _locate(named: Named, model: nn.Module, rank: int) -> tuple[list[HeldBox], Holders]:
    tensor: DTensor = named.source
    fqn = named.fqns[0]
    mesh, placements = tensor.device_mesh, tensor.placements
    placed = place(fqn, tensor.shape, mesh, placements, last_axis=_axis_of_fsdp(named, model))
    if placed is None:
        return _nothing_held(named), Holders((rank,), 0)
    sizes = sizes_of(placed.runs)
    with torch.no_grad():
        held = tuple(tensor.to_local().shape)
    if held != sizes:
        raise UnsupportedModelError(
            f"{fqn} has {list(held)} on this rank, expected {list(sizes)} of {list(tensor.shape)} by its placements "
            f"{placements}: its layout is not understood. Make it with distribute_tensor, or DTensor.from_local with "
            "shape= and stride="
        )
    values, form = _LocalValues(named), _DTensorForm(tensor)
    local = Box(fqn, (0,) * len(sizes), sizes)
    boxes = [
        HeldBox(box, values if part.sizes == sizes else _PartOfLocal(values, part), form, values.slot)
        for box, part in boxes_in_whole(local, placed.runs)
    ]
    return boxes, placed.holders


def _nothing_held(named: Named) -> list[HeldBox]:
    """Of a tensor on a mesh that this rank is not in: an empty box, which gives it its entry in a state dict.

    A tensor of no dim has no empty box, and no entry.
    """
    if not named.shape:
        return []
    sizes = (0,) * len(named.shape)
    nothing = torch.empty(sizes, dtype=named.dtype, device=named.source.to_local().device)
    return [HeldBox(Box(named.fqns[0], sizes, sizes), lambda: nothing, _FormElsewhere(named.source))]


def _axis_of_fsdp(named: Named, model: nn.Module) -> int | None:
    """The mesh axis along which FSDP2 dealt out the rows of a strided shard; None where the axes deal from the left.

    `fully_shard` cuts the local tensor that it is given, so its axis comes last. Its placement says as much, unless a
    further axis has a strided shard of the same dim (packed columns under FSDP2). Torch 2.11 then gives it a plain
    Shard, and torch 2.13 a strided one that is not true from the left either.
    """
    tensor: DTensor = named.source
    placements: Sequence[Any] = tensor.placements
    first, *others = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()] or [0]
    dim = getattr(placements[first], "dim", None)
    strided = [placements[axis].dim % tensor.ndim for axis in others if hasattr(placements[axis], "split_factor")]
    if dim is None or dim % tensor.ndim not in strided:
        return None
    managed = any(is_fsdp2(module) and named.owner in module.modules() for module in model.modules())
    return first if managed else None


class _LocalValues:
    """The local tensor of the sharded parameter, taken anew at every use.

    The DTensor is kept, because its name may resolve to a gathered copy (see `DTensors.drop_gathered`). Over tensor
    parallelism a gathered copy is a DTensor too, on the smaller mesh. Another DTensor under the name that lies alike
    has replaced the kept one (`load_state_dict(assign=True)`).

    Attributes:
        slot: where the module keeps the DTensor; None if torch does not name its local tensor.
    """

    def __init__(self, named: Named) -> None:
        self._owner = named.owner
        self._attribute = named.attribute
        # The attribute is not read: SimpleFSDP's modules have a property there, which gathers the whole tensor.
        self._table: MutableMapping[str, Any] = vars(named.owner)["_buffers" if named.is_buffer else "_parameters"]
        self._sharded: DTensor = named.source
        self._view = torch.empty(0, device="cpu")
        inner = name_of_inner(self._sharded)
        self.slot = None if inner is None else Slot(self._table, self._attribute, inner)

    def _current(self) -> Any:
        """The entry of the model's table under the name; None if it was removed."""
        return self._table.get(self._attribute)

    def is_sharded(self) -> bool:
        """Whether the name resolves to the sharded tensor, or to a DTensor that replaced it."""
        current = self._current()
        if current is None:
            return True  # the tensor was removed from the model, which is not FSDP's work
        return is_dtensor(current) and _lie_alike(current, self._sharded)

    def takes_gradient(self) -> bool:
        """Whether the sharded parameter requires a gradient."""
        return self._sharded.requires_grad

    def __call__(self) -> torch.Tensor:
        current = self._current()
        if current is None:
            raise ModelChangedError(
                f"{self._attribute!r} of {type(self._owner).__name__} was removed since the average was built: build a "
                "new ShardedEMA after changing a model"
            )
        if current is not self._sharded and is_dtensor(current) and _lie_alike(current, self._sharded):
            self._sharded = current
        with torch.no_grad():
            # From torch 2.13 on a new object at each call. Before that the one that the DTensor keeps: had it been kept
            # here too, `local.data = ...` would go unnoticed.
            local = self._sharded.to_local()
        if not same_memory(local, self._view):
            self._view = local.detach()
        return self._view


class _PartOfLocal:
    """A part of the local tensor; the object stays the same while its memory does."""

    def __init__(self, local: _LocalValues, part: Box) -> None:
        self._local = local
        self._part = part
        self._seen: torch.Tensor | None = None
        self._view = torch.empty(0, device="cpu")

    def is_sharded(self) -> bool:
        """As of the local tensor."""
        return self._local.is_sharded()

    def takes_gradient(self) -> bool:
        """As of the local tensor."""
        return self._local.takes_gradient()

    def __call__(self) -> torch.Tensor:
        local = self._local()
        if local is not self._seen:
            self._seen, self._view = local, local[self._part.region]
        return self._view


class _DTensorForm:
    """The local tensor is shown as a DTensor that is laid out like the live one."""

    def __init__(self, live: DTensor) -> None:
        self._mesh, self._placements = live.device_mesh, live.placements
        self._shape, self._stride = live.shape, live.stride()

    def wrap(self, values: torch.Tensor) -> torch.Tensor:
        return dtensor_from_local(values, self._mesh, self._placements, self._shape, self._stride)

    def unwrap(self, fqn: str, entry: torch.Tensor) -> torch.Tensor:
        alike = is_dtensor(entry) and (entry.device_mesh, entry.placements, entry.shape) == (
            self._mesh,
            self._placements,
            self._shape,
        )
        if not is_dtensor(entry) or not alike:
            raise CheckpointMismatchError(
                f"the entry of {fqn} is a {type(entry).__name__} of {list(entry.shape)}, expected a DTensor of "
                f"{list(self._shape)} placed {self._placements} as in the model"
            )
        with torch.no_grad():
            return entry.to_local()


class _FormElsewhere(_DTensorForm):
    """A DTensor on a mesh that this rank is not in; torch gives it a local tensor of one dim, without elements."""

    def unwrap(self, fqn: str, entry: torch.Tensor) -> torch.Tensor:
        return super().unwrap(fqn, entry).view((0,) * len(self._shape))


def _lie_alike(one: DTensor, other: DTensor) -> bool:
    return one.device_mesh == other.device_mesh and one.placements == other.placements
