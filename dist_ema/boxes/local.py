"""The boxes that a rank holds of a tensor, end to end: what its local tensor has. No communication.

They are the product of runs along each dim (`dist_ema.topology.seam.runs`), so a box begins where those before it end:

    runs [2, 4) and [6, 8) of dim 0, all of dim 1        box at (2, 0)  ->  rows [0, 2) of the local tensor
                                                         box at (6, 0)  ->  rows [2, 4)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dist_ema.boxes.shards import Box

__all__ = ["end_to_end"]


def end_to_end(boxes: Sequence[Box]) -> tuple[tuple[int, ...], Mapping[Box, Box]]:
    """The sizes of the local tensor that has these boxes of one tensor, and each box within it."""
    starts, sizes = [], []
    for dim in range(len(boxes[0].sizes)):
        starts_of_dim, size = {}, 0
        for offset, length in sorted({(box.offsets[dim], box.sizes[dim]) for box in boxes}):
            starts_of_dim[offset] = size
            size += length
        starts.append(starts_of_dim)
        sizes.append(size)
    places = {
        box: Box(box.fqn, tuple(of_dim[at] for of_dim, at in zip(starts, box.offsets, strict=True)), box.sizes)
        for box in boxes
    }
    return tuple(sizes), places
