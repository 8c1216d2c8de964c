"""A stream of whole tensors: chunk by chunk, each sent while the caller works on the tensors of the one before.

    1 all    agree on the request; the first time, exchange who owns what (ownership.py); take memory for two chunks
    2 all    begin chunk 0
    3 all    wait for chunk k, begin chunk k + 1; the receivers put the tensors of chunk k together, one at a time

    buffer 0   [ chunk 0: sent | its tensors are put together ] [ chunk 2: sent ...
    buffer 1                   [ chunk 1: sent               | its tensors are put together ] ...

The messages are those of training's own process group. A rank that leaves them would spoil that group, so one that ends
its stream early (`break`, an exception in its loop) does what is left of steps 3 first, in the buffers that it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from dist_ema.averaging.averages import aligned
from dist_ema.averaging.state import AveragedState
from dist_ema.boxes.shards import Box, TensorSpec
from dist_ema.checks import positive_integer
from dist_ema.errors import CommunicationError, ConfigError
from dist_ema.live.elsewhere.chunks import SEGMENT_ALIGNMENT, Part, Portion, Sized, chunks_of, parts_of
from dist_ema.live.elsewhere.ownership import Ownership, boxes_by_tensor
from dist_ema.live.holders.replicas import Replicas
from dist_ema.ranks.broadcasts import Passing
from dist_ema.ranks.calls import Call
from dist_ema.ranks.deliveries import deliveries, device_of_messages
from dist_ema.uninterrupted import Job, Lane, Steps, insist

__all__ = ["NamedTensors", "whole_tensors"]

NamedTensors = Iterator[tuple[str, torch.Tensor]]
"""Name and whole tensor, one after the other."""


def whole_tensors(
    call: Call,
    state: AveragedState,
    replicas: Replicas,
    ownership: Ownership,
    track: str | None,
    dtype: torch.dtype | None,
    bucket_bytes: int,
    ranks: Iterable[int] | None,
) -> NamedTensors:
    """Collective: every rank must call it, and exhaust or close what it returns. See `ShardedEMA.whole_tensors`."""
    exchange, specs = call.exchange, state.plan.specs

    def prepare() -> tuple[dict[str, Any], Sequence[tuple[Box, torch.Tensor]]]:
        request = {
            "track": state.track(track),
            "dtype": str(_checked_dtype(dtype)),
            "bucket_bytes": positive_integer("bucket_bytes", bucket_bytes),
            "ranks": _checked_ranks(ranks, exchange.world_size),
        }
        return request, state.pieces(track)

    request, pieces = call.together(prepare, lambda prepared: {**prepared[0], **state.progress})
    replicas.check_once(call.name, state.num_updates)
    receivers: list[int] | None = request["ranks"]
    own, values = boxes_by_tensor(specs, pieces)
    receives = receivers is None or exchange.rank in receivers
    owners = range(exchange.world_size) if receives else [exchange.rank]
    owned = ownership.of_all(exchange, call.name, specs, own, owners)
    dtypes = state.dtypes(dtype)
    device = device_of_messages(exchange.world_size)
    if device is None:
        device = next((value.device for of_tensor in values for value in of_tensor), torch.device("cpu"))
    stream = exchange.agree(
        call.name,
        lambda: _Stream(
            state,
            [dtypes[spec.fqn] for spec in specs],
            values,
            owned,
            rank=exchange.rank,
            world_size=exchange.world_size,
            receivers=receivers,
            most_bytes=_most_bytes(bucket_bytes, device),
            device=device,
        ),
    )
    tensors = stream.tensors()
    try:
        try:
            stream.begin(exchange.channel.meeting(call.name))
            next(tensors)  # from here on its end does what is left
        except BaseException:
            stream.end()
            raise
    except BaseException:  # a second one, before the first was dealt with
        stream.end()
        raise
    if not receives:
        deque(tensors, maxlen=0)
    return tensors


# Measured on gloo (launch/bench/whole_tensors.py): beyond this a chunk leaves the cache before it is unpacked.
_MOST_BYTES_ON_A_HOST = 16 * 2**20


def _most_bytes(bucket_bytes: int, device: torch.device) -> int:
    """Bytes of a chunk: two of them are a bucket, or less."""
    most = max(1, bucket_bytes // 2)
    return min(most, _MOST_BYTES_ON_A_HOST) if device.type == "cpu" else most


def _checked_dtype(dtype: object) -> object:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype is {dtype!r}, expected a floating-point one such as torch.bfloat16, or None")
    return dtype


def _checked_ranks(ranks: Iterable[int] | None, world_size: int) -> list[int] | None:
    """The ranks that are to receive, ascending; None for all."""
    if ranks is None:
        return None
    wanted = list(ranks) if isinstance(ranks, Iterable) else [ranks]
    known = range(world_size)
    if not wanted or any(isinstance(rank, bool) or rank not in known for rank in wanted):
        raise ConfigError(
            f"ranks is {ranks!r}, expected some of the ranks 0 to {world_size - 1} of the default process group, or "
            "None for all of them"
        )
    return None if set(wanted) == set(known) else sorted({int(rank) for rank in wanted})


class _Stream:
    """The chunks of one stream on this rank. It takes all memory for messages at the beginning.

    Args:
        state: the averages of this rank.
        dtypes: for every tensor the dtype in which it is sent.
        values: for every tensor the values of the boxes that this rank owns.
        owned: the ranks of which this one knows what they own -> their boxes.
        rank: this rank.
        world_size: the number of ranks.
        receivers: the ranks that get the tensors; None for all.
        most_bytes: bytes of a chunk.
        device: where messages are sent from, and where the tensors will lie.
    """

    def __init__(
        self,
        state: AveragedState,
        dtypes: Sequence[torch.dtype],
        values: Sequence[Sequence[torch.Tensor]],
        owned: Mapping[int, Sequence[Sequence[Box]]],
        *,
        rank: int,
        world_size: int,
        receivers: Sequence[int] | None,
        most_bytes: int,
        device: torch.device,
    ) -> None:
        self._state = state
        self._specs: Sequence[TensorSpec] = state.plan.specs
        self._names = state.plan.names_of_tensors
        self._dtypes = dtypes
        self._itemsizes = [dtype.itemsize for dtype in dtypes]
        self._values = values
        self._owned = owned
        self._rank, self._world_size = rank, world_size
        self._receivers = receivers
        self._receives = receivers is None or rank in receivers
        self._device = device
        sized = [Sized(spec.numel, itemsize) for spec, itemsize in zip(self._specs, self._itemsizes, strict=True)]
        self._chunks = chunks_of(sized, most_bytes)
        longest = max((self._length(chunk) for chunk in self._chunks), default=0)
        with torch.inference_mode(False):  # the stream may go on outside of that mode
            self._buffers = [
                torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(min(2, len(self._chunks)))
            ]
        self._messages: dict[int, list[Passing]] = {}
        self._growing = torch.empty(0)  # the tensor that is put together
        self._num_through = 0  # chunks that have been sent
        self._is_met = False
        self._is_over = False

    def _length(self, chunk: Sequence[Portion]) -> int:
        return sum(
            aligned(parts_of(chunk, boxes, self._itemsizes)[1], SEGMENT_ALIGNMENT) for boxes in self._owned.values()
        )

    def begin(self, meeting: Sequence[Any]) -> None:
        """Collective: every rank must call it. Begin the first chunk on all ranks, or on none."""

        def make(worker: int) -> Steps:
            steps = Steps()
            for step in meeting:
                steps.again(step)
            steps.again(self._meet)
            if self._chunks:
                steps.again(partial(self._begin, 0))
            return steps

        Job([Lane(make)])()

    def _meet(self) -> None:
        self._state.is_streamed = True
        self._is_met = True

    def tensors(self) -> NamedTensors:
        """The tensors, after a first entry without meaning. Its end, however it comes, does what is left to do."""
        try:
            yield "", torch.empty(0)
            for number, chunk in enumerate(self._chunks):
                self._wait(number)
                if number + 1 < len(self._chunks):
                    self._begin(number + 1)
                if self._receives:
                    yield from self._whole(number, chunk)
        finally:
            try:
                self.end()
            finally:
                self.end()

    def end(self) -> None:
        """Take part in what is left, in a thread that no signal handler interrupts; further calls do nothing."""
        if self._is_met and not self._is_over:
            if self._num_through == len(self._chunks):
                self._finish()
            else:
                insist(self._finish)

    def _finish(self) -> None:
        try:
            for number in range(self._num_through, len(self._chunks)):
                self._begin(number)
                self._wait(number)
        finally:
            self._is_over = True
            self._state.is_streamed = False
            self._buffers, self._messages = [], {}

    @torch.no_grad()
    def _begin(self, number: int) -> None:
        """Fill this rank's segment and begin the messages of a chunk; after an interrupt, those that are left."""
        if number not in self._messages:
            segments = self._segments(number)
            own, _ = parts_of(self._chunks[number], self._owned[self._rank], self._itemsizes)
            for portion, parts in zip(self._chunks[number], own, strict=True):
                for part in parts:
                    source = self._values[portion.tensor][part.owned]
                    outer = self._owned[self._rank][portion.tensor][part.owned]
                    self._in_segment(segments[self._rank], portion, part).copy_(source[_within(part.box, outer)])
            self._messages[number] = deliveries(segments, self._receivers, self._rank, self._world_size)
        for message in self._messages[number]:
            message.begin()

    def _wait(self, number: int) -> None:
        try:
            for message in self._messages[number]:
                message.wait()
        except RuntimeError as error:
            self._num_through = len(self._chunks)  # nothing more gets through
            raise CommunicationError(
                f"whole_tensors: chunk {number + 1} of {len(self._chunks)} did not get through "
                f"({str(error).splitlines()[0]}). A rank is gone, or neither exhausted its stream nor closed it: the "
                "process group cannot be used any more"
            ) from error
        self._num_through = number + 1  # first: messages that are forgotten would be begun again
        del self._messages[number]

    def _segments(self, number: int) -> dict[int, torch.Tensor]:
        """Owner -> the bytes that it has in a chunk, in the buffer of the chunk; owners of nothing are left out."""
        segments, at = {}, 0
        for owner, boxes in self._owned.items():
            _, nbytes = parts_of(self._chunks[number], boxes, self._itemsizes)
            if nbytes:
                segments[owner] = self._buffers[number % 2][at : at + nbytes]
            at += aligned(nbytes, SEGMENT_ALIGNMENT)
        return segments

    def _in_segment(self, segment: torch.Tensor, portion: Portion, part: Part) -> torch.Tensor:
        return segment[part.start_byte : part.stop_byte].view(self._dtypes[portion.tensor]).view(part.box.sizes)

    def _whole(self, number: int, chunk: Sequence[Portion]) -> NamedTensors:
        """The tensors that are whole with this chunk, each put together when it is asked for."""
        segments = self._segments(number)
        parts = {owner: parts_of(chunk, self._owned[owner], self._itemsizes)[0] for owner in segments}
        for index, portion in enumerate(chunk):
            if portion.number == 0:
                self._growing = self._new(portion.tensor)
            self._fill(portion, {owner: of_owner[index] for owner, of_owner in parts.items()}, segments)
            if portion.is_last:
                whole, self._growing = self._growing, torch.empty(0)
                for name in self._names[self._specs[portion.tensor].fqn]:
                    yield name, whole
                del whole

    def _new(self, tensor: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty(self._specs[tensor].shape, dtype=self._dtypes[tensor], device=self._device)

    @torch.no_grad()
    def _fill(
        self, portion: Portion, parts: Mapping[int, Sequence[Part]], segments: Mapping[int, torch.Tensor]
    ) -> None:
        for owner, of_owner in parts.items():
            for part in of_owner:
                self._growing[part.box.region].copy_(self._in_segment(segments[owner], portion, part))


def _within(inner: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(
        slice(at - start, at - start + size)
        for at, start, size in zip(inner.offsets, outer.offsets, inner.sizes, strict=True)
    )
