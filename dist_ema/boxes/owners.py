"""The owners: tensors that several ranks hold alike are divided, with one owner for each element. No communication.

The tensors that several ranks hold alike are laid end to end, and the line is cut in runs of nearly equal numbers of
elements. Rank i of the holders owns run i:

    elements   0                                                        total
               |---- wte (rows) ----|-- w1 --|-b1-|------ w2 ------|-b2-|
    3 ranks    [      run 0      ][       run 1       ][     run 2      ]

Cuts fall between rows where the shares are then even to 0.1%, otherwise within a row. A run is contiguous in row-major
order, and so it is in the final file.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from dist_ema.boxes.shards import Box, Held, Shard

__all__ = ["Division", "boxes_of_run", "cut_points", "run_between"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Division:
    """Pieces of tensors that the same ranks hold alike, divided among these ranks: one owner per element.

    Attributes:
        held: the pieces, in the order of the model; their boxes are equal on all of the ranks.
        ranks: the global ranks that hold the pieces.
        position: the index of this rank in `ranks`.
        groups: the process groups through which a broadcast reaches all of `ranks`, for `exchange`.
        averaged: whether the average keeps values for these tensors.
        single_owner: whether the first rank owns all of it (buffers, as in DDP) and nothing is divided. The ranks may
            then have different values.
        extra_state: whether these are no tensors of the model, but `get_extra_state` makes them anew at every use.
    """

    held: tuple[Held, ...]
    ranks: tuple[int, ...]
    position: int
    groups: tuple[Any, ...] = ()
    averaged: bool = True
    single_owner: bool = False
    extra_state: bool = False

    def run(self, position: int) -> list[Shard]:
        """The shards of the rank at `position` in `ranks`."""
        boxes, points = self._boxes, self._points
        run = run_between(boxes, points[position], points[position + 1])
        return [Shard(self.held[index], box) for index, box in run]

    @functools.cached_property
    def _boxes(self) -> list[Box]:
        return [held.box for held in self.held]

    @functools.cached_property
    def _points(self) -> list[tuple[int, int]]:
        if self.single_owner:
            return [(0, 0)] + [(len(self.held), 0)] * len(self.ranks)
        return cut_points(self._boxes, len(self.ranks))


def cut_points(boxes: Sequence[Box], parts: int) -> list[tuple[int, int]]:
    """The points that cut the boxes, laid end to end, in `parts` runs of nearly equal numbers of elements.

    It returns `parts + 1` points (index of a box, element within it), in order; run i lies between points i and i + 1.
    A cut falls on the multiple of the box's grain that is nearest to the exact point. The work is pure arithmetic:
    linear in the number of boxes, logarithmic in it for each part.
    """
    ends = list(itertools.accumulate(box.numel for box in boxes))
    total = ends[-1] if ends else 0
    finest = max(_FINEST_GRAIN, total // parts // _GRAINS_PER_SHARE)
    points = [(0, 0)]
    for part in range(1, parts):
        target = (total * part + parts // 2) // parts
        index = bisect.bisect_right(ends, target)
        if index >= len(boxes):
            points.append((len(boxes), 0))
            continue
        numel = boxes[index].numel
        grain = _grain(boxes[index].sizes, finest)
        element = (target - (ends[index] - numel) + grain // 2) // grain * grain
        points.append((index, element) if element < numel else (index + 1, 0))
    points.append((len(boxes), 0))
    return points


# A run differs from its exact share by at most one grain: 1 / 1024 of a share, or 64 elements in a tiny model.
_GRAINS_PER_SHARE = 1024
_FINEST_GRAIN = 64


def _grain(sizes: Sequence[int], finest: int) -> int:
    """The elements between two possible cuts of a box: its outermost slices of at most `finest`, else 64."""
    inner = math.prod(sizes)
    for size in sizes:
        inner //= size
        if 1 < inner <= finest:
            return inner
    return _FINEST_GRAIN


def run_between(boxes: Sequence[Box], start: tuple[int, int], stop: tuple[int, int]) -> list[tuple[int, Box]]:
    """The run of elements from point `start` to point `stop` (half-open): pairs of a box's index and a box within it.

    Empty boxes are left out.
    """
    run = []
    for index in range(start[0], min(stop[0] + 1, len(boxes))):
        first = start[1] if index == start[0] else 0
        last = stop[1] if index == stop[0] else boxes[index].numel
        run += [(index, part) for _, part in boxes_of_run(boxes[index], first, max(last - first, 0))]
    return run


def boxes_of_run(box: Box, start: int, numel: int) -> Iterator[tuple[int, Box]]:
    """The run of `numel` elements from element `start` of a box, counted row-major within the box, as boxes.

    It yields the number of elements of the run before a box, and the box: a partial row, whole rows, a partial row, and
    so on inward; at most `2 * len(box.sizes) - 1` boxes.
    """
    if numel == 0:
        return
    if numel == box.numel:
        yield 0, box
        return
    yield from _boxes_below(box, (), start, start + numel, 0)


def _boxes_below(box: Box, prefix: tuple[int, ...], start: int, stop: int, skipped: int) -> Iterator[tuple[int, Box]]:
    """The elements [start, stop) of the part of the box at index `prefix`, as boxes."""
    rest = box.sizes[len(prefix) + 1 :]
    inner = math.prod(rest)
    first, last = -(-start // inner), stop // inner  # whole slices along this dim: [first, last)
    if first > last:  # the run lies within one slice
        yield from _boxes_below(box, (*prefix, last), start - last * inner, stop - last * inner, skipped)
        return
    if start < first * inner:
        head = first - 1
        yield from _boxes_below(box, (*prefix, head), start - head * inner, inner, skipped)
    if first < last:
        corner = (*prefix, first, *(0 for _ in rest))
        offsets = tuple(offset + at for offset, at in zip(box.offsets, corner, strict=True))
        yield skipped + first * inner - start, Box(box.fqn, offsets, (*(1 for _ in prefix), last - first, *rest))
    if stop > last * inner:
        yield from _boxes_below(box, (*prefix, last), 0, stop - last * inner, skipped + last * inner - start)
