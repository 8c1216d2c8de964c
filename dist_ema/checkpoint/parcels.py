"""Short pieces on their way to the ranks that write their pages.

Every rank knows by arithmetic to which writers it sends (writing.py); the writers learn it from announcements. So only
ranks that have bytes for each other exchange anything. They do so in rounds, one for each window of a writer's part of
a file. A rank takes part in the rounds in which it has bytes to send or to receive. What is little goes in the first.

In a large world small parcels go by relays: every rank has a few bytes of a 1-D tensor, and the writer of their page
would hear from all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from dist_ema.disk.formats.byte_ranges import Strip
from dist_ema.disk.formats.model_files import host_bytes
from dist_ema.ranks import relays
from dist_ema.ranks.exchange import Exchange
from dist_ema.ranks.wires.wires import Wires

__all__ = ["Bytes", "Desk", "Guard", "Parcels", "Part", "Window"]

# In worlds of more ranks, parcels of at most so many bytes go by relays. So a writer hears directly from as many ranks
# at most as larger parcels have room in its part of a file.
_MOST_DIRECT = 64
_SMALL_BYTES = 2**15
# What a writer receives at most in the first round of a file on top of a window: few bytes do not wait for theirs.
_EARLY_BYTES = 8 * 2**20
# Up to so many bytes, what touches is written together. What overlaps lies in one window.
_JOINED_BYTES = 2**20

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
# The stretches in the file, and the function that puts their bytes into rows.
_Pieces = list[tuple[Strip, Callable[[Bytes], None]]]


@dataclasses.dataclass(frozen=True)
class Part:
    """Bytes of this rank that lie at `strip` in the file: a rectangle of `values`, one row for every stretch."""

    strip: Strip
    values: torch.Tensor
    dtype: torch.dtype

    def between(self, start: int, stop: int) -> Iterator[Part]:
        """The parts of this part between two offsets of the file."""
        for cut in self.strip.cuts(start, stop):
            strip, itemsize = cut.strip, self.dtype.itemsize
            first = cut.skipped_bytes // itemsize
            rows = self.values[cut.row : cut.row + strip.count, first : first + strip.run_bytes // itemsize]
            yield Part(strip, rows, self.dtype)

    def copy_to(self, rows: Bytes) -> None:
        """Convert and copy the bytes: one row of contiguous bytes for every stretch."""
        itemsize = self.dtype.itemsize
        if rows.ctypes.data % itemsize == 0 and rows.strides[0] % itemsize == 0:
            torch.from_numpy(rows).view(self.dtype).copy_(self.values.detach())  # without a contiguous copy in between
        else:
            rows[...] = host_bytes(self.values, self.dtype).numpy().reshape(rows.shape)


class Guard:
    """Does local work, and keeps its failure for later: the other ranks wait for the messages of this rank.

    Attributes:
        failure: the first failure; after it no work is done.
    """

    def __init__(self) -> None:
        self.failure: Exception | None = None

    def __call__(self, work: Callable[..., object], *arguments: Any) -> None:
        """Do the work, unless some failed before."""
        try:
            if self.failure is None:
                work(*arguments)
        except Exception as error:
            self.failure = error


class Parcels:
    """The parcels of one rank for one model folder.

    Args:
        rank: this rank.
        guard: keeps failures.
    """

    def __init__(self, rank: int, guard: Guard) -> None:
        self._rank = rank
        self._guard = guard
        # Of each round, which is a window of a file: writer -> what it gets, source -> how much comes from there.
        self._sent: dict[tuple[int, int], dict[int, list[Part]]] = {}
        self._received_bytes: dict[tuple[int, int], dict[int, int]] = {}
        self._relayed: dict[tuple[int, int], list[Bytes]] = {}
        self._message = np.empty(0, dtype=np.uint8)
        self._inbox: Bytes | None = None
        self._desk = Desk()

    def put(self, file: int, window: int, writer: int, part: Part) -> None:
        """Add a part, which lies in one window, to what a writer gets; the writer may be this rank."""
        self._sent.setdefault((file, window), {}).setdefault(writer, []).append(part)

    def announce(self, exchange: Exchange, wires: Wires, action: str) -> None:
        """Collective: every rank must call it, when it has put in all parts.

        Args:
            exchange: the control traffic of all ranks.
            wires: the wires of the work.
            action: a name of the work, for the message.
        """
        if exchange.world_size > _MOST_DIRECT:
            self._relay(exchange, wires, action)
        self._send_few_at_once(_EARLY_BYTES // exchange.world_size)
        to_writer: dict[int, list[tuple[int, int, int]]] = {}
        for (file, window), by_writer in self._sent.items():
            for writer, parts in by_writer.items():
                if writer != self._rank:
                    to_writer.setdefault(writer, []).append((file, window, _parcel_bytes(parts)))
        wires.announce(to_writer)
        longest = max((size for rounds in to_writer.values() for *_, size in rounds), default=0)
        # A lack of memory must show before the first message: every announced message must be sent.
        self._message = exchange.agree(action, lambda: np.empty(longest, dtype=np.uint8))
        for source, rounds in wires.announced():
            for file, window, size in rounds:
                self._received_bytes.setdefault((file, window), {})[source] = size
        most = max((sum(by_source.values()) for by_source in self._received_bytes.values()), default=0)
        self._guard(self._take_memory, most)

    def _send_few_at_once(self, few_bytes: int) -> None:
        """Move what a writer gets of a file to one round, the first, if it is little in all: a round has its price."""
        by_pair: dict[tuple[int, int], list[int]] = {}
        for file, window in sorted(self._sent):
            for writer in self._sent[file, window]:
                by_pair.setdefault((file, writer), []).append(window)
        for (file, writer), windows in by_pair.items():
            if windows == [0] or sum(_parcel_bytes(self._sent[file, window][writer]) for window in windows) > few_bytes:
                continue
            parts = [part for window in windows for part in self._sent[file, window].pop(writer)]
            self._sent.setdefault((file, 0), {})[writer] = parts
        self._sent = {place: by_writer for place, by_writer in self._sent.items() if by_writer}

    def _take_memory(self, most_bytes: int) -> None:
        self._inbox = np.empty(most_bytes, dtype=np.uint8)

    def _relay(self, exchange: Exchange, wires: Wires, action: str) -> None:
        letters: list[tuple[int, bytes]] = []
        self._guard(lambda: letters.extend(self._letters()))
        for content in relays.deliver(exchange, wires, action, letters):
            letter: Bytes = np.frombuffer(content, dtype=np.uint8)
            file, window = letter[:16].view(np.int64).tolist()
            self._relayed.setdefault((file, window), []).append(letter[16:])

    def _letters(self) -> Iterator[tuple[int, bytes]]:
        """Takes out the small parcels for other ranks, each with its round before its bytes."""
        for place, by_writer in self._sent.items():
            for writer in [writer for writer in by_writer if writer != self._rank]:
                size = _parcel_bytes(by_writer[writer])
                if size <= _SMALL_BYTES:
                    letter = np.empty(16 + size, dtype=np.uint8)
                    letter[:16].view(np.int64)[:] = place
                    _pack(letter[16:], by_writer.pop(writer))
                    yield writer, letter.tobytes()

    def windows(self, wires: Wires | None, file: int) -> Iterator[Window]:
        """Point to point: pass on the parcels of a file, round after round. Yields what this rank is to write."""
        places = {place for place in (*self._sent, *self._received_bytes, *self._relayed) if place[0] == file}
        for place in sorted(places):
            window = Window(self._desk)
            by_writer = self._sent.pop(place, {})
            self._guard(window.put_parts, by_writer.pop(self._rank, []))
            for content in self._relayed.pop(place, []):
                self._guard(window.put_message, content)
            self._pass_round(wires, by_writer, self._received_bytes.pop(place, {}), window)
            yield window

    def _pass_round(
        self, wires: Wires | None, by_writer: dict[int, list[Part]], sizes: dict[int, int], window: Window
    ) -> None:
        receiving: dict[int, Bytes | int] = dict(sizes)
        if self._inbox is not None:
            at = 0
            for source, size in sizes.items():
                receiving[source] = self._inbox[at : at + size]
                at += size
        if wires is not None and (by_writer or receiving):
            # Each rank begins with the writers after it, so that not all send to one writer first.
            in_turn = sorted(by_writer, key=lambda writer: (writer < self._rank, writer))
            wires.pass_all([(writer, partial(self._packed, by_writer[writer])) for writer in in_turn], receiving)
        for content in receiving.values():
            if not isinstance(content, int):
                self._guard(window.put_message, content)

    def _packed(self, parts: Sequence[Part]) -> Bytes:
        message = self._message[: _parcel_bytes(parts)]
        message[:8] = 0  # no strips, unless the packing succeeds
        self._guard(_pack, message, parts)
        return message


# A parcel: the number of strips, four integers for every strip (start, run_bytes, stride_bytes, count), their bytes.


def _parcel_bytes(parts: Sequence[Part]) -> int:
    return 8 * (1 + 4 * len(parts)) + sum(part.strip.nbytes for part in parts)


def _pack(message: Bytes, parts: Sequence[Part]) -> None:
    head = [len(parts)]
    for part in parts:
        strip = part.strip
        head += (strip.start, strip.run_bytes, strip.stride_bytes, strip.count)
    at = 8 * len(head)
    message[8:at].view(np.int64)[:] = head[1:]
    for part in parts:
        part.copy_to(message[at : at + part.strip.nbytes].reshape(part.strip.count, part.strip.run_bytes))
        at += part.strip.nbytes
    message[:8].view(np.int64)[:] = len(parts)


class Desk:
    """Memory on which one window after the other is put together; fresh memory costs the kernel as much as a copy."""

    def __init__(self) -> None:
        self._bytes: Bytes = np.empty(0, dtype=np.uint8)

    @property
    def num_bytes(self) -> int:
        """Its size: that of the longest stretch so far."""
        return len(self._bytes)

    def take(self, size_bytes: int) -> Bytes:
        """So many bytes, which the next call may give again."""
        if len(self._bytes) < size_bytes:
            self._bytes = np.empty(size_bytes, dtype=np.uint8)
        return self._bytes[:size_bytes]


class Window:
    """The bytes that a writer has received in one round, put together.

    Args:
        desk: where that is done.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._pieces: _Pieces = []

    def put_parts(self, parts: Sequence[Part]) -> None:
        """Take this rank's own bytes."""
        self._pieces += [(part.strip, part.copy_to) for part in parts]

    def put_message(self, message: Bytes) -> None:
        """Take the bytes of another rank; they must stay where they are until the window is written."""
        count = int(message[:8].view(np.int64)[0])
        at = 8 * (1 + 4 * count)
        for numbers in message[8:at].view(np.int64).reshape(count, 4).tolist():
            strip = Strip(*numbers)
            self._pieces.append((strip, partial(_copy_rows, message[at : at + strip.nbytes])))
            at += strip.nbytes

    def stretches(self) -> Iterator[tuple[int, Bytes]]:
        """Offset in the file and bytes of every longest stretch without a gap; the bytes are valid until the next."""
        for pieces in _entangled(self._pieces):
            strips = [strip for strip, _ in pieces]
            origin, end = strips[0].start, max(strip.stop for strip in strips)
            place = self._desk.take(end - origin)
            for strip, copy_to in pieces:
                shape, strides = (strip.count, strip.run_bytes), (strip.stride_bytes, 1)
                copy_to(np.lib.stride_tricks.as_strided(place[strip.start - origin :], shape, strides))
            for start, stop in _without_gaps(strips):
                yield start, place[start - origin : stop - origin]


def _copy_rows(content: Bytes, rows: Bytes) -> None:
    rows[...] = content.reshape(rows.shape)


def _entangled(pieces: _Pieces) -> Iterator[_Pieces]:
    """The pieces in order, in groups. No two groups overlap; those that touch are one up to `_JOINED_BYTES`."""
    group: _Pieces = []
    stop = 0
    for piece in sorted(pieces, key=lambda piece: piece[0].start):
        strip = piece[0]
        if group and (strip.start > stop or (strip.start == stop and strip.stop - group[0][0].start > _JOINED_BYTES)):
            yield group
            group = []
        group.append(piece)
        stop = max(stop, strip.stop)
    if group:
        yield group


def _without_gaps(strips: Sequence[Strip]) -> Iterator[tuple[int, int]]:
    """The offsets of the longest stretches without a gap that the strips, which do not overlap, make together."""
    first_start, last_stop = min(strip.start for strip in strips), max(strip.stop for strip in strips)
    if sum(strip.nbytes for strip in strips) == last_stop - first_start:
        yield first_start, last_stop
        return
    starts = np.concatenate([strip.start + strip.stride_bytes * np.arange(strip.count) for strip in strips])
    stops = starts + np.repeat([strip.run_bytes for strip in strips], [strip.count for strip in strips])
    order = np.argsort(starts)
    starts, stops = starts[order], stops[order]
    gaps = np.flatnonzero(starts[1:] != stops[:-1])
    first_of, last_of = np.concatenate([[0], gaps + 1]), np.concatenate([gaps, [len(starts) - 1]])
    yield from zip(starts[first_of].tolist(), stops[last_of].tolist(), strict=True)
