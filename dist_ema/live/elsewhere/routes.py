"""How the elements of a chunk get from their owner to the receivers. Arithmetic, the same everywhere; no communication.

    directly   in a message of their own, into their place in the whole tensor: nothing is copied after that
    packed     end to end with others of the same owner, in one message; a receiver copies them to their places

A run of elements goes directly if it is long, and has one place: it lies end to end in the whole tensor, and begins
where any dtype may lie. So do rows (FSDP2, DDP). Columns (tensor parallelism) and small tensors are packed: a message
costs more than to copy them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dist_ema.averaging.averages import aligned
from dist_ema.boxes.shards import Box
from dist_ema.disk.formats.byte_ranges import strips_of_box
from dist_ema.live.elsewhere.chunks import Portion

__all__ = ["ALIGNMENT", "LEAST_DIRECT_BYTES", "Routes", "Run", "Tensors", "routes_of"]

# Any dtype may lie at a multiple of so many bytes, and NCCL is fast from there.
ALIGNMENT = 16

# Measured on gloo (launch/bench/whole_tensors.py): a shorter run is copied twice in less time than a message takes.
LEAST_DIRECT_BYTES = 256 * 2**10


class Tensors(NamedTuple):
    """The whole tensors of a stream, by their index.

    Attributes:
        shapes: their shapes.
        itemsizes: the bytes of an element.
    """

    shapes: Sequence[tuple[int, ...]]
    itemsizes: Sequence[int]


class Run(NamedTuple):
    """Elements of a box of an owner, end to end in it.

    Attributes:
        owned: the index of the box, among those that the owner has of the tensor.
        first: the first element, counted row-major within the box.
        numel: the number of elements.
        start_byte: where they begin: in the whole tensor if they go directly, else in the owner's packed message.
        nbytes: their bytes.
    """

    owned: int
    first: int
    numel: int
    start_byte: int
    nbytes: int


class Routes(NamedTuple):
    """What one owner sends of a chunk.

    Attributes:
        direct: for every portion the runs that go directly, each a message.
        packed: for every portion the runs that are packed.
        packed_bytes: of the packed message, which comes after the direct ones; 0 if there is none.
    """

    direct: list[list[Run]]
    packed: list[list[Run]]
    packed_bytes: int

    @property
    def room_bytes(self) -> int:
        """Of a buffer that has room for all messages."""
        direct = sum(aligned(run.nbytes, ALIGNMENT) for of_portion in self.direct for run in of_portion)
        return direct + aligned(self.packed_bytes, ALIGNMENT)


def routes_of(
    chunk: Sequence[Portion], owned: Sequence[Sequence[Box]], tensors: Tensors, least_direct_bytes: int
) -> Routes:
    """What one owner sends of a chunk, and how.

    Args:
        chunk: the portions of the chunk.
        owned: for every tensor the boxes that the owner has.
        tensors: the whole tensors.
        least_direct_bytes: of a run that may go directly.
    """
    direct: list[list[Run]] = [[] for _ in chunk]
    packed: list[list[Run]] = [[] for _ in chunk]
    at = 0
    for index, portion in enumerate(chunk):
        shape, itemsize = tensors.shapes[portion.tensor], tensors.itemsizes[portion.tensor]
        for number, first, numel in _runs(portion, owned[portion.tensor]):
            nbytes = numel * itemsize
            if nbytes >= least_direct_bytes:
                place = _place(owned[portion.tensor][number], shape, itemsize)
                if place is not None and (place + first * itemsize) % ALIGNMENT == 0:
                    direct[index].append(Run(number, first, numel, place + first * itemsize, nbytes))
                    continue
            at = aligned(at, itemsize)
            packed[index].append(Run(number, first, numel, at, nbytes))
            at += nbytes
    return Routes(direct, packed, at)


def _runs(portion: Portion, owned: Sequence[Box]) -> Iterator[tuple[int, int, int]]:
    """The elements of a portion: the index of a box, the first element within it, and their number."""
    first, left = portion.run(sum(box.numel for box in owned))
    for index, box in enumerate(owned):
        numel = min(max(box.numel - first, 0), left)
        if numel:
            yield index, first, numel
        first, left = max(first - box.numel, 0), left - numel


def _place(box: Box, shape: Sequence[int], itemsize: int) -> int | None:
    """The byte of the whole tensor where a box begins that lies end to end in it; None for another box."""
    strips = [strip for _, strip in itertools.islice(strips_of_box(0, shape, itemsize, box), 2)]
    return strips[0].start if len(strips) == 1 and strips[0].count == 1 else None
