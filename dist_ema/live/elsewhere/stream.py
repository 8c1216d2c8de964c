"""A stream of whole tensors: chunk by chunk, each sent while the caller works on the tensors of the one before.

    1 all    agree on the request; the first time, exchange who owns what (ownership.py); take memory for two chunks
    2 all    begin chunk 0
    3 all    fill chunk k + 1, wait for chunk k, begin chunk k + 1; the receivers complete the tensors of chunk k

    sent       [ chunk 0          ][ chunk 1                    ][ chunk 2 ...
    this rank         [ fill 1    ][ complete 0 ][ ... ][ fill 2 ][ complete 1 ][ ...

The messages are those of training's own process group. A rank that leaves them would spoil that group, so one that ends
its stream early (`break`, an exception in its loop) does what is left of steps 3 first, in the buffers that it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from dist_ema.averaging.state import AveragedState
from dist_ema.boxes.shards import Box, TensorSpec
from dist_ema.checks import positive_integer
from dist_ema.errors import CommunicationError, ConfigError
from dist_ema.live.elsewhere.chunks import Portion, Sized, chunks_of
from dist_ema.live.elsewhere.ownership import Ownership, boxes_by_tensor
from dist_ema.live.elsewhere.places import Left, Places
from dist_ema.live.elsewhere.routes import LEAST_DIRECT_BYTES, Tensors
from dist_ema.live.holders.replicas import Replicas
from dist_ema.options import floating_dtype
from dist_ema.ranks.broadcasts import Passing
from dist_ema.ranks.calls import Call
from dist_ema.ranks.deliveries import deliveries, device_of_messages
from dist_ema.uninterrupted.jobs import Job, Lane, Steps
from dist_ema.uninterrupted.threads import insist

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
            "dtype": str(floating_dtype("dtype", dtype)),
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
            bucket_bytes=bucket_bytes,
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


class _Sent(NamedTuple):
    """A chunk that is sent: its messages, and for every portion what is left to do when they are through."""

    messages: list[Passing]
    left: list[list[Left]]


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
        bucket_bytes: bytes of messages that a rank may keep.
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
        bucket_bytes: int,
        device: torch.device,
    ) -> None:
        self._state = state
        self._specs: Sequence[TensorSpec] = state.plan.specs
        self._names = state.plan.names_of_tensors
        self._rank, self._world_size = rank, world_size
        self._receivers = receivers
        self._receives = receivers is None or rank in receivers
        sized = [Sized(spec.numel, dtype.itemsize) for spec, dtype in zip(self._specs, dtypes, strict=True)]
        most_bytes = _most_bytes(bucket_bytes, device)
        self._chunks = chunks_of(sized, most_bytes)
        self._places = Places(
            self._chunks,
            Tensors([spec.shape for spec in self._specs], [dtype.itemsize for dtype in dtypes]),
            dtypes,
            owned,
            values,
            rank=rank,
            receives=self._receives,
            device=device,
            least_direct_bytes=min(LEAST_DIRECT_BYTES, max(1, most_bytes // 8)),
            most_bytes=2 * max(bucket_bytes, *(numel * itemsize for numel, itemsize in sized), 0),
        )
        self._sent: dict[int, _Sent] = {}
        self._num_through = 0  # chunks that have been sent
        self._is_met = False
        self._is_over = False
        if self._chunks:
            self._fill(0)

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
                is_last = number + 1 == len(self._chunks)
                if not is_last:
                    self._fill(number + 1)
                left = self._wait(number)
                if not is_last:
                    self._begin(number + 1)
                if self._receives:
                    yield from self._whole(chunk, left)
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
                self._fill(number, early=False)  # nobody wants the tensors any more
                self._begin(number)
                self._wait(number)
        finally:
            self._is_over = True
            self._state.is_streamed = False
            self._sent = {}
            self._places.drop()

    def _fill(self, number: int, *, early: bool = True) -> None:
        """Give the messages of a chunk memory and contents, unless they have it."""
        if number not in self._sent:
            messages, left = self._places.lay(number, early=early)
            self._sent[number] = _Sent(deliveries(messages, self._receivers, self._rank, self._world_size), left)

    def _begin(self, number: int) -> None:
        """Begin the messages of a chunk; after an interrupt, those that are left."""
        with self._get_through(number):
            for message in self._sent[number].messages:
                message.begin()

    def _wait(self, number: int) -> list[list[Left]]:
        """Wait for the messages of a chunk. Returns what is left to do for every portion of it."""
        with self._get_through(number):
            for message in self._sent[number].messages:
                message.wait()
        self._num_through = number + 1  # first: messages that are forgotten would be begun again
        return self._sent.pop(number).left

    @contextmanager
    def _get_through(self, number: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._num_through = len(self._chunks)  # nothing more gets through
            raise CommunicationError(
                f"whole_tensors: chunk {number + 1} of {len(self._chunks)} did not get through "
                f"({str(error).splitlines()[0]}). A rank is gone, or neither exhausted its stream nor closed it: the "
                "process group cannot be used any more"
            ) from error

    def _whole(self, chunk: Sequence[Portion], left: Sequence[Sequence[Left]]) -> NamedTensors:
        """The tensors that are whole with this chunk, each completed when it is asked for."""
        for portion, of_portion in zip(chunk, left, strict=True):
            whole = self._places.complete(portion, of_portion)
            if whole is not None:
                for name in self._names[self._specs[portion.tensor].fqn]:
                    yield name, whole
            del whole
