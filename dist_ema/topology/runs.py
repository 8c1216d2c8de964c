"""The elements of a DTensor that a rank holds, by the arithmetic of this package. No communication.

Placements are applied along the mesh axes from the left. A placement deals out the runs of one dim, laid end to end:

    Shard(0) over 2 ranks               0 1 2 3 4 5 6 7    one part for each rank: rank 0 holds [0, 4)
    _StridedShard(0, split_factor=2)    0 1 2 3|4 5 6 7    a part of each of two halves: rank 0 holds [0, 2) and [4, 6)

Torch shows the first run only, though a rank may hold several, which are no box: a strided shard on one axis alone (the
"packed_colwise" of transformers) makes them. Under FSDP2 over tensor parallelism a later axis takes one of the halves,
so one run is left.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

__all__ = ["local_runs"]

# Half-open [start, stop) along one dim.
Run = tuple[int, int]


def local_runs(
    shape: Sequence[int], axis_sizes: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> list[list[Run]] | None:
    """The runs along each dim that a rank holds; its part of the tensor is their product. No communication.

    Args:
        shape: the shape of the whole tensor.
        axis_sizes: the number of ranks along each axis of the mesh.
        coordinate: the position of the rank on each axis.
        placements: one placement for each axis. Only `dim` and `split_factor` of a sharding placement are read.

    Returns:
        For each dim its runs in order, not adjacent; an empty list where this rank holds nothing. None if the kind of a
        placement is unknown.
    """
    runs: list[list[Run]] = [[(0, size)] if size else [] for size in shape]
    for size, position, placement in zip(axis_sizes, coordinate, placements, strict=True):
        if placement.is_replicate():
            continue
        num_parts = getattr(placement, "split_factor", 1 if placement.is_shard() else None)
        dim = getattr(placement, "dim", None)
        if not isinstance(num_parts, int) or not isinstance(dim, int):
            return None
        parts = (_part(runs[dim], num_parts, index) for index in range(num_parts))
        runs[dim] = [run for part in parts for run in _part(part, size, position)]
    return [_joined(of_dim) for of_dim in runs]


def _part(runs: Sequence[Run], num_parts: int, index: int) -> list[Run]:
    """Part `index` of the runs laid end to end, cut as `torch.chunk` does: equal parts, the last short or empty."""
    length = -(-sum(stop - start for start, stop in runs) // num_parts)
    return _between(runs, index * length, (index + 1) * length)


def _between(runs: Sequence[Run], first: int, last: int) -> list[Run]:
    """The elements [first, last) of the runs laid end to end."""
    ends = list(itertools.accumulate((stop - start for start, stop in runs), initial=0))
    cut = [
        (start + max(first - begin, 0), min(stop, start + last - begin))
        for (start, stop), begin in zip(runs, ends[:-1], strict=True)
    ]
    return [(start, stop) for start, stop in cut if start < stop]


def _joined(runs: Sequence[Run]) -> list[Run]:
    joined: list[Run] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
