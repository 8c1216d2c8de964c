"""What a rank holds of a tensor that is placed on a device mesh, and the ranks that hold the same. No communication.

A mesh may have some of the ranks only: it is a slice of a larger mesh (`mesh["dp"]`), or leaves ranks out. It does not
tell what the other ranks hold. The plans of all ranks are compared afterwards (`dist_ema.construction`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dist_ema.errors import UnsupportedModelError
from dist_ema.topology.seam.layout import Holders
from dist_ema.topology.seam.loaded import shard
from dist_ema.topology.seam.runs import Runs, local_runs

__all__ = ["Placed", "place"]


class Placed(NamedTuple):
    """What this rank holds of a tensor.

    Attributes:
        runs: the runs along each dim, of which the local tensor is the product.
        holders: the ranks along the Replicate axes, which hold the same.
    """

    runs: Runs
    holders: Holders


def place(
    fqn: str, shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Any], *, last_axis: int | None = None
) -> Placed | None:
    """What this rank holds of a tensor, and the ranks that hold the same; None on a rank outside the mesh.

    Args:
        fqn: the name of the tensor, for messages.
        shape: the shape of the whole tensor.
        mesh: the mesh, which this rank is in or not.
        placements: one placement for each axis of the mesh.
        last_axis: the axis that dealt out what the other axes had left, in one piece for each of its ranks, whatever
            its placement says; None if the axes deal from the left.

    Raises:
        UnsupportedModelError: a placement is Partial or unknown, or the ranks along a sharded axis do not ascend.
    """
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    if any(placement.is_partial() for placement in placements):
        raise UnsupportedModelError(f"{fqn} has placements {placements}, expected Shard or Replicate only")
    for axis, placement in enumerate(placements):
        # FSDP2 deals rows by the rank within the group, but torch computes the box from the coordinate in the mesh.
        # `is_shard()` is False for strided shards.
        if not placement.is_replicate() and dist.get_rank(mesh.get_group(axis)) != coordinate[axis]:
            raise UnsupportedModelError(
                f"{fqn} is sharded along axis {axis} of {mesh}, whose ranks are not in ascending order: parts of torch "
                "then disagree where its rows lie. Expected a mesh of ascending ranks (init_device_mesh)"
            )
    order = sorted(range(mesh.ndim), key=lambda axis: axis == last_axis)
    runs = local_runs(
        shape,
        [mesh.size(axis) for axis in order],
        [coordinate[axis] for axis in order],
        [shard(placements[axis].dim) if axis == last_axis else placements[axis] for axis in order],
    )
    if runs is None:
        raise UnsupportedModelError(f"{fqn} has placements {placements}, of which one is neither Shard nor Replicate")
    return Placed(runs, _holders(mesh, coordinate, placements))


def _holders(mesh: DeviceMesh, coordinate: Sequence[int], placements: Sequence[Any]) -> Holders:
    axes = [axis for axis, placement in enumerate(placements) if placement.is_replicate() and mesh.size(axis) > 1]
    alike = mesh.mesh[tuple(slice(None) if axis in axes else at for axis, at in enumerate(coordinate))]
    ranks = tuple(alike.flatten().tolist())
    groups = [mesh.get_group(axis) for axis in range(mesh.ndim)]
    return Holders(ranks, ranks.index(mesh.get_rank()), tuple(groups[axis] for axis in axes), nearby=tuple(groups))
