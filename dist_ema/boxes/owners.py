"""Who owns what: tensors that several ranks hold alike are divided, with one owner for an element. No communication.

Such tensors are laid end to end, and the line is cut in runs of nearly equal numbers of elements; rank i of the holders
owns run i:

    elements   0                                                        total
               |---- wte (rows) ----|-- w1 --|-b1-|------ w2 ------|-b2-|
    3 ranks    [      run 0      ][       run 1       ][     run 2      ]

Cuts fall between rows where that leaves the shares even to 0.1%, else within a row. A run is contiguous in row-major
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
        held: the pieces, in the order of the model; equal boxes on each of the ranks.
        ranks: the global ranks that hold them.
        position: index of this rank in `ranks`.
        groups: process groups through which a broadcast reaches all of `ranks`, for `broadcast_steps`.
        averaged: whether the average keeps values for these tensors.
        single_owner: whether the first rank owns everything (buffers, as in DDP). Every rank may then have values of
            its own.
        extra_state: whether these are no tensors of the model, but made anew at each use by `get_extra_state`.
        cuts: where each run begins, and the last one ends, if the rank of a run alone has the values that are averaged;
            else None. A point is the index of a piece and an element within it.
    """

    held: tuple[Held, ...]
    ranks: tuple[int, ...]
    position: int
    groups: tuple[Any, ...] = ()
    averaged: bool = True
    single_owner: bool = False
    extra_state: bool = False
    cuts: tuple[tuple[int, int], ...] | None = None

    @property
    def kind(self) -> tuple[bool, bool, bool]:
        """What, besides its ranks, tells it from other divisions: averaged, of a single owner, extra state."""
        return self.averaged, self.single_owner, self.extra_state

    def run(self, position: int) -> list[Shard]:
        """The shards of the rank at `position` in `ranks`."""
        run = run_between(self._boxes, self._point(position), self._point(position + 1))
        return [Shard(self.held[index], box) for index, box in run]

    @functools.cached_property
    def _boxes(self) -> list[Box]:
        return [held.box for held in self.held]

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(box.numel for box in self._boxes))

    def _point(self, part: int) -> tuple[int, int]:
        """Where run number `part` begins. Those of ten thousand ranks are not kept: this rank needs a few."""
        if self.cuts is not None:
            return self.cuts[part]
        if self.single_owner:
            return (len(self.held), 0) if part else (0, 0)
        return _cut_point(self._boxes, self._ends, part, len(self.ranks))


def cut_points(boxes: Sequence[Box], parts: int) -> list[tuple[int, int]]:
    """Where the boxes, laid end to end, are cut in `parts` runs of nearly equal numbers of elements.

    Returns `parts + 1` points (index of a box, element within it), in order; run i lies between points i and i + 1. A
    cut falls on the multiple of the box's grain that is nearest to the exact one. The time is linear in the number of
    boxes, and logarithmic in it for every part.
    """
    ends = list(itertools.accumulate(box.numel for box in boxes))
    return [_cut_point(boxes, ends, part, parts) for part in range(parts + 1)]


def _cut_point(boxes: Sequence[Box], ends: Sequence[int], part: int, parts: int) -> tuple[int, int]:
    """The point where run number `part` begins; `ends` has where each box ends."""
    if part in (0, parts):
        return (len(boxes) if part else 0, 0)
    total = ends[-1] if ends else 0
    target = (total * part + parts // 2) // parts
    index = bisect.bisect_right(ends, target)
    if index >= len(boxes):
        return (len(boxes), 0)
    numel = boxes[index].numel
    grain = _grain(boxes[index].sizes, max(_FINEST_GRAIN, total // parts // _GRAINS_PER_SHARE))
    element = (target - (ends[index] - numel) + grain // 2) // grain * grain
    return (index, element) if element < numel else (index + 1, 0)


# A run differs from its exact share by at most one grain: 1 / 1024 of a share, or 64 elements in a tiny model.
_GRAINS_PER_SHARE = 1024
_FINEST_GRAIN = 64


def _grain(sizes: Sequence[int], finest: int) -> int:
    """Elements between two points where a box may be cut: its outermost slices of at most `finest`, else 64."""
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

    Yields the number of elements of the run before a box, and the box: a partial row, whole rows, a partial row, and so
    on inward; at most `2 * len(box.sizes) - 1` boxes.
    """
    if numel == 0:
        return
    if numel == box.numel:
        yield 0, box
        return
    yield from _boxes_below(box, (), start, start + numel, 0)


def _boxes_below(box: Box, prefix: tuple[int, ...], start: int, stop: int, skipped: int) -> Iterator[tuple[int, Box]]:
    """The boxes of the elements [start, stop) of the part of the box at index `prefix`."""
    rest = box.sizes[len(prefix) + 1 :]
    inner = math.prod(rest)
    first, last = -(-start // inner), stop // inner  # whole slices along this dim: [first, last)
    if first > last:  # within one slice
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
