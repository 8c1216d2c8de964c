"""The average cut in chunks that are sent one after the other. Arithmetic, the same on every rank; no communication.

A chunk is some small tensors, or one portion of a large one. Of a large tensor every owner gives the same portion of
what it owns of it, so that each chunk is about evenly divided among the owners:

    tensors    | wte (large)                          | ln | bias | w1 (large)            |
    chunks     |   1   |   2   |   3   |   4   |   5  |     6     |  7  |  8  |  9  |  10 |

    chunk 2    portion 2 of 5 of what rank 0 owns of wte, portion 2 of 5 of what rank 1 owns of it, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Portion", "Sized", "chunks_of"]

# A large portion begins at a multiple of so many elements: what is aligned in a tensor stays so in its portions.
_GRAIN = 16
_GRAINS_OF_A_LARGE_PORTION = 64


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
        start, stop = self._cut(numel, self.number), self._cut(numel, self.number + 1)
        return start, stop - start

    def _cut(self, numel: int, number: int) -> int:
        at = numel * number // self.total
        is_fine = number == self.total or numel // self.total < _GRAIN * _GRAINS_OF_A_LARGE_PORTION
        return at if is_fine else at // _GRAIN * _GRAIN


def chunks_of(tensors: Sequence[Sized], most_bytes: int) -> list[tuple[Portion, ...]]:
    """The chunks: every tensor, in order, the empty ones too.

    Args:
        tensors: the tensors of the stream.
        most_bytes: bytes of a chunk; one that is cut off a large tensor may have a few elements more for every owner.
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
