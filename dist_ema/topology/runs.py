"""Which elements of a DTensor a rank holds, by our own arithmetic. No communication.

Placements are applied along the mesh axes from the left. Each deals out the runs of one dim, laid end to end:

    Shard(0) over 2 ranks               0 1 2 3 4 5 6 7    one chunk for each rank: rank 0 holds [0, 4)
    _StridedShard(0, split_factor=2)    0 1 2 3|4 5 6 7    two pieces, of each a chunk: rank 0 holds [0, 2) and [4, 6)

Under FSDP2 over tensor parallelism a later axis takes one of the pieces, so that one run is left. On one axis alone
(the "packed_colwise" of transformers) several are: such a part is no box, though torch tells of the first run only.
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
        shape: of the whole tensor.
        axis_sizes: ranks along each axis of the mesh.
        coordinate: position of the rank on each axis.
        placements: one for each axis. Of a sharding one only `dim` and `split_factor` are read.

    Returns:
        For each dim its runs in order, not adjacent; none where this rank holds nothing. None if a placement is of a
        kind that is not known.
    """
    runs: list[list[Run]] = [[(0, size)] if size else [] for size in shape]
    for size, position, placement in zip(axis_sizes, coordinate, placements, strict=True):
        if placement.is_replicate():
            continue
        pieces = getattr(placement, "split_factor", 1 if placement.is_shard() else None)
        dim = getattr(placement, "dim", None)
        if not isinstance(pieces, int) or not isinstance(dim, int):
            return None
        dealt = (_chunk(runs[dim], pieces, index) for index in range(pieces))
        runs[dim] = [run for piece in dealt for run in _chunk(piece, size, position)]
    return [_joined(each) for each in runs]


def _chunk(runs: Sequence[Run], parts: int, index: int) -> list[Run]:
    """Part `index` of the runs laid end to end, cut as `torch.chunk` does: equal parts, the last short or empty."""
    length = -(-sum(stop - start for start, stop in runs) // parts)
    return _between(runs, index * length, (index + 1) * length)


def _between(runs: Sequence[Run], first: int, last: int) -> list[Run]:
    """Elements [first, last) of the runs laid end to end."""
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
