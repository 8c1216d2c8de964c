"""Short pieces on their way to the ranks that write their pages.

Every rank knows by arithmetic to which writers it sends (writing.py); the writers learn it from announcements. So only
ranks that have bytes for each other exchange anything. They do so in rounds, one for each window of a writer's part of
a file. A rank takes part in the rounds in which it has bytes to send or to receive.

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

__all__ = ["Bytes", "Guard", "Parcels", "Part", "Window"]

# In worlds of more ranks, parcels of at most so many bytes go by relays. So a writer hears directly from as many ranks
# at most as larger parcels have room in its part of a file.
_MOST_DIRECT = 64
_SMALL_BYTES = 2**15

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


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

    def content(self) -> Bytes:
        """The bytes, one row for every stretch."""
        flat: Bytes = host_bytes(self.values, self.dtype).numpy()
        return flat.reshape(self.strip.count, self.strip.run_bytes)


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
            window = Window()
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
        head += dataclasses.astuple(part.strip)
    at = 8 * len(head)
    message[8:at].view(np.int64)[:] = head[1:]
    for part in parts:
        message[at : at + part.strip.nbytes] = part.content().reshape(-1)
        at += part.strip.nbytes
    message[:8].view(np.int64)[:] = len(parts)


class Window:
    """The bytes that a writer has received in one round, put together."""

    def __init__(self) -> None:
        self._stretches: list[tuple[Strip, Bytes]] = []

    def put_parts(self, parts: Sequence[Part]) -> None:
        """Take this rank's own bytes."""
        self._stretches += [(part.strip, part.content()) for part in parts]

    def put_message(self, message: Bytes) -> None:
        """Take the bytes of another rank."""
        count = int(message[:8].view(np.int64)[0])
        at = 8 * (1 + 4 * count)
        for numbers in message[8:at].view(np.int64).reshape(count, 4).tolist():
            strip = Strip(*numbers)
            self._stretches.append((strip, message[at : at + strip.nbytes].reshape(strip.count, strip.run_bytes)))
            at += strip.nbytes

    def stretches(self) -> Iterator[tuple[int, Bytes]]:
        """Offset in the file and bytes of every longest stretch without a gap."""
        if not self._stretches:
            return
        strips = [strip for strip, _ in self._stretches]
        origin, end = min(strip.start for strip in strips), max(strip.stop for strip in strips)
        window = np.empty(end - origin, dtype=np.uint8)
        for strip, content in self._stretches:
            first = window[strip.start - origin :]
            np.lib.stride_tricks.as_strided(first, content.shape, (strip.stride_bytes, 1))[...] = content
        starts = np.concatenate([strip.start + strip.stride_bytes * np.arange(strip.count) for strip in strips])
        stops = starts + np.repeat([strip.run_bytes for strip in strips], [strip.count for strip in strips])
        order = np.argsort(starts)
        starts, stops = starts[order], stops[order]
        gaps = np.flatnonzero(starts[1:] != stops[:-1])
        first_of, last_of = np.concatenate([[0], gaps + 1]), np.concatenate([gaps, [len(starts) - 1]])
        for start, stop in zip(starts[first_of].tolist(), stops[last_of].tolist(), strict=True):
            yield start, window[start - origin : stop - origin]
