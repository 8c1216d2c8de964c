"""DTensors: FSDP2, HSDP, tensor parallelism, and their combinations on one mesh."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dist_ema.errors import UnsupportedModelError
from dist_ema.layout import Box
from dist_ema.topology.placed import Holders, Named, Piece

__all__ = ["is_dtensor", "place_dtensor", "reshard_fsdp2"]


def is_dtensor(value: object) -> bool:
    """Whether `value` is a DTensor."""
    return isinstance(value, DTensor)


def reshard_fsdp2(model: nn.Module) -> None:
    """Make the parameters' names resolve to the sharded DTensors again. No communication.

    After a forward without gradients the root group stays gathered: its names then yield plain tensors that are
    dropped at the next reshard, so reads through them are stale and writes are lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def place_dtensor(named: Named, world_size: int) -> tuple[Piece, Holders]:
    """The local box of a DTensor, and the ranks that hold the same one. No communication.

    Raises:
        UnsupportedModelError: the mesh leaves ranks out, or a placement is Partial.
    """
    tensor: DTensor = named.source
    fqn, mesh, placements = named.fqns[0], tensor.device_mesh, tensor.placements
    if mesh.size() != world_size:
        raise UnsupportedModelError(
            f"{fqn} lives on a device mesh of {mesh.size()} of {world_size} ranks: the ranks outside hold a second "
            "copy that the mesh does not tell of. Expected a mesh of all ranks, with a Replicate axis"
        )
    if any(placement.is_partial() for placement in placements):
        raise UnsupportedModelError(f"{fqn} has placements {placements}, expected Shard or Replicate only")
    (chunk,) = tensor.__create_chunk_list__()
    box = Box(fqn, tuple(chunk.offsets), tuple(chunk.sizes))
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # the mesh spans all ranks
    axes = [axis for axis, placement in enumerate(placements) if placement.is_replicate() and mesh.size(axis) > 1]
    alike = mesh.mesh[tuple(slice(None) if axis in axes else at for axis, at in enumerate(coordinate))]
    ranks = tuple(alike.flatten().tolist())
    groups = tuple(mesh.get_group(axis) for axis in axes)
    return Piece(box, _LocalValues(named)), Holders(ranks, ranks.index(mesh.get_rank()), groups)


class _LocalValues:
    """The local tensor of the sharded parameter, taken anew at each use.

    By name it may be a gathered copy (see `reshard_fsdp2`), so the DTensor is kept. Another DTensor under the name is
    followed if it lies alike: then it has replaced the first (`load_state_dict(assign=True)`). Over tensor
    parallelism a gathered copy is a DTensor too, on the smaller mesh.
    """

    def __init__(self, named: Named) -> None:
        self._owner = named.owner
        self._attribute = named.attribute
        self._sharded: DTensor = named.source

    def __call__(self) -> torch.Tensor:
        current = getattr(self._owner, self._attribute)
        if current is not self._sharded and isinstance(current, DTensor) and _lie_alike(current, self._sharded):
            self._sharded = current
        with torch.no_grad():
            return self._sharded.to_local()


def _lie_alike(one: DTensor, other: DTensor) -> bool:
    return one.device_mesh == other.device_mesh and one.placements == other.placements
