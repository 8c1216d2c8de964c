"""The elements of a DTensor that a rank holds, by the arithmetic of this package. No communication.

Placements are applied along the mesh axes from the left. A placement deals out the runs of one dim, laid end to end:

    Shard(0) over 2 ranks               0 1 2 3 4 5 6 7    one part for each rank: rank 0 holds [0, 4)
    _StridedShard(0, split_factor=2)    0 1 2 3|4 5 6 7    a part of each of two halves: rank 0 holds [0, 2) and [4, 6)

Torch shows the first run only, though a rank may hold several: a strided shard on one axis alone (the "packed_colwise"
of transformers) makes them. Under FSDP2 over tensor parallelism a later axis takes one of the halves, so one run is
left. The part of a rank is the product of its runs over the dims: one box for each choice of a run in every dim.

                 [0, 2)   [4, 6)         the local tensor of the rank has the boxes laid end to end along each dim
        [0, 1)  | box 0 | box 1 |
        [2, 3)  | box 2 | box 3 |
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from dist_ema.boxes.shards import Box

__all__ = ["Runs", "boxes_in_whole", "local_runs", "sizes_of"]

# Half-open [start, stop) along one dim.
Run = tuple[int, int]
# For each dim the runs that a rank holds, in order; an empty list where it holds nothing.
Runs = list[list[Run]]


def local_runs(
    shape: Sequence[int], axis_sizes: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> Runs | None:
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
    runs: Runs = [[(0, size)] if size else [] for size in shape]
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


def sizes_of(runs: Runs) -> tuple[int, ...]:
    """The sizes of the local tensor that has the runs."""
    return tuple(sum(stop - start for start, stop in of_dim) for of_dim in runs)


def boxes_in_whole(local: Box, runs: Runs) -> Iterator[tuple[Box, Box]]:
    """The boxes of the whole tensor that a box of the local tensor has; of an empty one, one empty box.

    Args:
        local: a box of the local tensor.
        runs: the runs of the local tensor.

    Yields:
        A box of the whole tensor, and the box of the local tensor that has its elements.
    """
    if not local.numel:
        yield Box(local.fqn, tuple(of_dim[0][0] if of_dim else 0 for of_dim in runs), local.sizes), local
        return
    for pieces in itertools.product(*map(_pieces, runs, local.offsets, local.sizes)):
        whole_at, local_at, sizes = zip(*pieces, strict=True) if pieces else ((), (), ())
        yield Box(local.fqn, whole_at, sizes), Box(local.fqn, local_at, sizes)


def _pieces(runs: Sequence[Run], first: int, size: int) -> Iterator[tuple[int, int, int]]:
    """The runs of the elements [first, first + size) of the local tensor: begin in the whole, begin there, length."""
    for start, stop in _between(runs, first, first + size):
        yield start, first, stop - start
        first += stop - start


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
