"""The places of the bytes of a box in its file: strips, which are stretches of equal length at equal distances.

    a box of whole rows              one stretch           [==========]
    a box of some columns            a stretch per row     [===]....[===]....[===]....

Pure arithmetic on byte offsets. No communication.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from dist_ema.boxes.shards import Box

__all__ = ["Cut", "Strip", "strips_of_box"]


@dataclasses.dataclass(frozen=True)
class Strip:
    """`count` stretches of `run_bytes` bytes: the first begins at `start`, the next `stride_bytes` later, and so on."""

    start: int
    run_bytes: int
    stride_bytes: int
    count: int

    @property
    def stop(self) -> int:
        """The end (exclusive) of the last stretch."""
        return self.start + (self.count - 1) * self.stride_bytes + self.run_bytes

    @property
    def nbytes(self) -> int:
        """The bytes in all stretches."""
        return self.count * self.run_bytes

    def cuts(self, start: int, stop: int) -> Iterator[Cut]:
        """The parts of the strip between two offsets of the file: whole stretches, and at most two cut ones."""
        if start >= stop:
            return
        first = max(0, (start - self.start - self.run_bytes) // self.stride_bytes + 1)
        last = min(self.count, -((self.start - stop) // self.stride_bytes))
        if first >= last:
            return
        inner_first, inner_last = first, last
        if self._is_cut(first, start, stop):
            yield self._part(first, start, stop)
            inner_first += 1
        if last - 1 >= inner_first and self._is_cut(last - 1, start, stop):
            yield self._part(last - 1, start, stop)
            inner_last -= 1
        if inner_first < inner_last:
            strip = Strip(
                self.start + inner_first * self.stride_bytes,
                self.run_bytes,
                self.stride_bytes,
                inner_last - inner_first,
            )
            yield Cut(strip, inner_first, 0)

    def _is_cut(self, row: int, start: int, stop: int) -> bool:
        place = self.start + row * self.stride_bytes
        return place < start or place + self.run_bytes > stop

    def _part(self, row: int, start: int, stop: int) -> Cut:
        place = self.start + row * self.stride_bytes
        begin, end = max(place, start), min(place + self.run_bytes, stop)
        return Cut(Strip(begin, end - begin, self.stride_bytes, 1), row, begin - place)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A part of a strip: it is a strip, which begins at stretch `row` of the whole strip, `skipped_bytes` into it."""

    strip: Strip
    row: int
    skipped_bytes: int


def strips_of_box(start: int, shape: Sequence[int], itemsize: int, box: Box) -> Iterator[tuple[tuple[int, ...], Strip]]:
    """The strips of a box of a tensor that begins at byte `start` of its file.

    It yields the index of a part of the box, along its outermost dims, and the strip of that part. The part's elements,
    row-major, are the strip's bytes in order.
    """
    if box.numel == 0:
        return
    whole = len(shape)  # dims from here on are whole
    while whole > 0 and box.sizes[whole - 1] == shape[whole - 1]:
        whole -= 1
    strides = [math.prod(shape[dim + 1 :]) * itemsize for dim in range(len(shape))]
    run_dim = max(whole - 1, 0)  # a stretch takes in all of the box along this dim and the dims after it
    run_bytes = math.prod(box.sizes[run_dim:]) * itemsize
    origin = start + sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True))
    if run_dim == 0:
        yield (), Strip(origin, run_bytes, run_bytes, 1)
        return
    row_dim = run_dim - 1
    for index in itertools.product(*(range(size) for size in box.sizes[:row_dim])):
        place = origin + sum(at * stride for at, stride in zip(index, strides[:row_dim], strict=True))
        yield index, Strip(place, run_bytes, strides[row_dim], box.sizes[row_dim])
