"""Where the messages of a chunk lie on this rank. No communication.

    buffers    two, taken at the beginning, for the chunk that is used and the one that is sent: what is packed
    wholes     the tensors themselves: what goes directly

A tensor into which messages go directly is taken one chunk before it is handed out. Where that would take too much
memory, or nobody wants the tensor any more, the buffer has room for its messages too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from dist_ema.averaging.averages import aligned
from dist_ema.boxes.owners import boxes_of_run
from dist_ema.boxes.shards import Box
from dist_ema.live.elsewhere.chunks import Portion
from dist_ema.live.elsewhere.routes import ALIGNMENT, Routes, Run, Tensors, routes_of
from dist_ema.uninterrupted.modes import made_for_any_mode

__all__ = ["Laid", "Left", "Places"]


class Left(NamedTuple):
    """A run of elements that must be copied from a buffer to its place in the whole tensor.

    Attributes:
        box: the box that the elements belong to.
        run: the elements.
        place: their bytes.
    """

    box: Box
    run: Run
    place: torch.Tensor


class Laid(NamedTuple):
    """A chunk whose messages have memory.

    Attributes:
        messages: owner -> the bytes (uint8) of each of its messages.
        left: for every portion what is left to do when the messages are through.
    """

    messages: dict[int, list[torch.Tensor]]
    left: list[list[Left]]


class Places:
    """The memory of one stream on this rank.

    Args:
        chunks: the chunks of the stream.
        tensors: the whole tensors.
        dtypes: for every tensor the dtype in which it is sent.
        owned: the ranks of which this one knows what they own -> for every tensor their boxes.
        values: for every tensor the values of the boxes that this rank owns.
        rank: this rank.
        receives: whether this rank gets the tensors.
        device: where messages are sent from, and where the tensors will lie.
        least_direct_bytes: of a run that goes directly.
        most_bytes: of all memory.
    """

    def __init__(
        self,
        chunks: Sequence[Sequence[Portion]],
        tensors: Tensors,
        dtypes: Sequence[torch.dtype],
        owned: Mapping[int, Sequence[Sequence[Box]]],
        values: Sequence[Sequence[torch.Tensor]],
        *,
        rank: int,
        receives: bool,
        device: torch.device,
        least_direct_bytes: int,
        most_bytes: int,
    ) -> None:
        self._chunks, self._tensors, self._dtypes = chunks, tensors, dtypes
        self._owned, self._values = owned, values
        self._rank, self._receives, self._device = rank, receives, device
        self._least_direct_bytes = least_direct_bytes
        self._wholes: dict[int, torch.Tensor] = {}  # begun, and not handed out yet
        rooms = (sum(routes.room_bytes for routes in self._routes(number).values()) for number in range(len(chunks)))
        room = max(rooms, default=0)
        with made_for_any_mode():  # the stream may go on outside of that mode
            # On a host what is not used of them is not taken.
            self._buffers = [torch.empty(room, dtype=torch.uint8, device=device) for _ in range(min(2, len(chunks)))]
        self._most_early_bytes = most_bytes - len(self._buffers) * room

    def _routes(self, number: int) -> dict[int, Routes]:
        return {
            owner: routes_of(self._chunks[number], boxes, self._tensors, self._least_direct_bytes)
            for owner, boxes in self._owned.items()
        }

    @torch.no_grad()
    def lay(self, number: int, *, early: bool) -> Laid:
        """Give the messages of a chunk memory, and fill those that this rank sends. It may be done again.

        Args:
            number: of the chunk. Nobody needs the buffer of the last but one any more.
            early: take the tensors that messages go into, as far as memory allows; else the buffer has them all.
        """
        chunk, routes = self._chunks[number], self._routes(number)
        messages: dict[int, list[torch.Tensor]] = {}
        left: list[list[Left]] = [[] for _ in chunk]
        buffer, at = self._buffers[number % 2], 0
        for owner, of_owner in routes.items():
            of_messages = []
            for index, portion in enumerate(chunk):
                for run in of_owner.direct[index]:
                    whole = self._early(portion.tensor) if early and self._receives else None
                    if whole is not None:
                        place = _bytes_of(whole)[run.start_byte : run.start_byte + run.nbytes]
                    else:
                        place = buffer[at : at + run.nbytes]
                        at += aligned(run.nbytes, ALIGNMENT)
                        left[index].append(Left(self._owned[owner][portion.tensor][run.owned], run, place))
                    if owner == self._rank:
                        place = self._own(portion.tensor, run, place)
                    of_messages.append(place)
            if of_owner.packed_bytes:
                segment = buffer[at : at + of_owner.packed_bytes]
                at += aligned(of_owner.packed_bytes, ALIGNMENT)
                for index, portion in enumerate(chunk):
                    for run in of_owner.packed[index]:
                        place = segment[run.start_byte : run.start_byte + run.nbytes]
                        left[index].append(Left(self._owned[owner][portion.tensor][run.owned], run, place))
                        if owner == self._rank:
                            self._fill(portion.tensor, run, place)
                of_messages.append(segment)
            if of_messages:
                messages[owner] = of_messages
        return Laid(messages, left)

    def _early(self, tensor: int) -> torch.Tensor | None:
        """The whole tensor, if it is begun or may be."""
        if tensor not in self._wholes:
            if sum(self._nbytes(other) for other in (*self._wholes, tensor)) > self._most_early_bytes:
                return None
            self._begin(tensor)
        return self._wholes[tensor]

    def _nbytes(self, tensor: int) -> int:
        return torch.Size(self._tensors.shapes[tensor]).numel() * self._tensors.itemsizes[tensor]

    def _begin(self, tensor: int) -> None:
        with made_for_any_mode():
            self._wholes[tensor] = torch.empty(
                self._tensors.shapes[tensor], dtype=self._dtypes[tensor], device=self._device
            )

    def _own(self, tensor: int, run: Run, place: torch.Tensor) -> torch.Tensor:
        """The bytes of a run that this rank sends: a rank that keeps no copy sends its value itself, if it can."""
        value = self._values[tensor][run.owned]
        is_as_sent = value.dtype == self._dtypes[tensor] and value.device == self._device and value.is_contiguous()
        if is_as_sent and not self._receives:
            start = run.first * value.element_size()
            return _bytes_of(value)[start : start + run.nbytes]
        self._fill(tensor, run, place)
        return place

    def _fill(self, tensor: int, run: Run, place: torch.Tensor) -> None:
        outer, value = self._owned[self._rank][tensor][run.owned], self._values[tensor][run.owned]
        elements = place.view(self._dtypes[tensor])
        for skipped, part in boxes_of_run(outer, run.first, run.numel):
            elements[skipped : skipped + part.numel].view(part.sizes).copy_(value[_within(part, outer)])

    @torch.no_grad()
    def complete(self, portion: Portion, left: Sequence[Left]) -> torch.Tensor | None:
        """Copy what is left of a portion to its places.

        Returns:
            The tensor if it is whole now, without a reference to it; else None.
        """
        if portion.tensor not in self._wholes:
            self._begin(portion.tensor)
        whole = self._wholes[portion.tensor]
        for box, run, place in left:
            elements = place.view(whole.dtype)
            for skipped, part in boxes_of_run(box, run.first, run.numel):
                whole[part.region].copy_(elements[skipped : skipped + part.numel].view(part.sizes))
        return self._wholes.pop(portion.tensor) if portion.is_last else None

    def drop(self) -> None:
        """Give all memory back."""
        self._buffers, self._wholes = [], {}


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _within(inner: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(
        slice(at - start, at - start + size)
        for at, start, size in zip(inner.offsets, outer.offsets, inner.sizes, strict=True)
    )
