"""The average cut in chunks that are sent one after the other. Arithmetic, the same on every rank; no communication.

A chunk is some small tensors, or one portion of a large one. Of a large tensor every owner gives the same portion of
what it owns of it, so that each chunk is about evenly divided among the owners:

    tensors    | wte (large)                          | ln | bias | w1 (large)            |
    chunks     |   1   |   2   |   3   |   4   |   5  |     6     |  7  |  8  |  9  |  10 |

    chunk 2    portion 2 of 5 of what rank 0 owns of wte, portion 2 of 5 of what rank 1 owns of it, ...

In a chunk the bytes of one owner lie end to end, in the order of the tensors: its *segment*.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dist_ema.averaging.averages import aligned
from dist_ema.boxes.owners import boxes_of_run
from dist_ema.boxes.shards import Box

__all__ = ["SEGMENT_ALIGNMENT", "Part", "Portion", "Sized", "chunks_of", "parts_of"]

# A segment begins where any dtype may lie.
SEGMENT_ALIGNMENT = 16


class Sized(NamedTuple):
    """A whole tensor of the stream: the number of its elements, and the bytes of one."""

    numel: int
    itemsize: int


class Portion(NamedTuple):
    """Portion number `number` of `total` equal ones of what each rank owns of the tensor of that index."""

    tensor: int
    number: int
    total: int

    @property
    def is_last(self) -> bool:
        """Whether the tensor is whole with this portion."""
        return self.number == self.total - 1

    def run(self, numel: int) -> tuple[int, int]:
        """Of `numel` elements the first of the portion, and how many it has."""
        start, stop = numel * self.number // self.total, numel * (self.number + 1) // self.total
        return start, stop - start


class Part(NamedTuple):
    """Elements of a tensor within a segment.

    Attributes:
        owned: the index of the box, among those of the owner, in which they lie.
        box: their box.
        start_byte: where they begin in the segment.
        stop_byte: where they end.
    """

    owned: int
    box: Box
    start_byte: int
    stop_byte: int


def chunks_of(tensors: Sequence[Sized], most_bytes: int) -> list[tuple[Portion, ...]]:
    """The chunks: every tensor, in order, the empty ones too.

    Args:
        tensors: the tensors of the stream.
        most_bytes: bytes of a chunk; one that is cut off a large tensor may have one element more for every owner.
    """
    chunks: list[tuple[Portion, ...]] = []
    small: list[Portion] = []
    small_bytes = 0
    for index, (numel, itemsize) in enumerate(tensors):
        nbytes = numel * itemsize
        if small and small_bytes + nbytes > most_bytes:
            chunks.append(tuple(small))
            small, small_bytes = [], 0
        if nbytes <= most_bytes:
            small.append(Portion(index, 0, 1))
            small_bytes += nbytes
        else:
            count = min(-(-nbytes // most_bytes), numel)
            chunks += [(Portion(index, number, count),) for number in range(count)]
    return [*chunks, tuple(small)] if small else chunks


def parts_of(
    chunk: Sequence[Portion], owned: Sequence[Sequence[Box]], itemsizes: Sequence[int]
) -> tuple[list[list[Part]], int]:
    """What one owner's segment of a chunk has.

    Args:
        chunk: the portions of the chunk.
        owned: for every tensor the boxes that the owner has.
        itemsizes: for every tensor the bytes of an element.

    Returns:
        For every portion its parts; and the bytes of the segment.
    """
    parts = []
    at = 0
    for portion in chunk:
        itemsize = itemsizes[portion.tensor]
        of_portion = list(_parts(portion, owned[portion.tensor], itemsize, aligned(at, itemsize)))
        parts.append(of_portion)
        at = of_portion[-1].stop_byte if of_portion else at
    return parts, at


def _parts(portion: Portion, owned: Sequence[Box], itemsize: int, at: int) -> Iterator[Part]:
    first, left = portion.run(sum(box.numel for box in owned))
    for index, box in enumerate(owned):
        numel = min(max(box.numel - first, 0), left)
        for skipped, part in boxes_of_run(box, first, numel) if numel else ():
            start = at + skipped * itemsize
            yield Part(index, part, start, start + part.numel * itemsize)
        at += numel * itemsize
        first, left = max(first - box.numel, 0), left - numel
