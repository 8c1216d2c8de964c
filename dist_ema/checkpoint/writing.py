"""Every rank writes its bytes at their places in the files of one folder.

Some network file systems lose data where two clients write into one page: so one rank writes each page of a file. Long
stretches are written by the rank that has them. Short stretches, and the ends of long ones, are sent to the writer of
their page first, which writes them in long stretches (the two-phase writing of MPI-IO, R. Thakur et al. 1999):

    page       |        |        |        |        |        |        |
    rank 0     .............[====|========|====]...................    writes the two whole pages within
    rank 1     ................................[===|=====]..........   sends its bytes to the writers of the pages
               ^ the file is divided evenly among the writers

Exchanges go in rounds. In a round, a writer receives at most one window of its part of the file, so the buffers are
bounded whatever the sizes. A rank that does not share the folder sends everything.
"""

from __future__ import annotations

import bisect
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_ema.boxes.shards import Box
from dist_ema.disk.formats.byte_ranges import Strip, strips_of_box
from dist_ema.disk.formats.checksums import PartialChecksums
from dist_ema.disk.formats.model_files import Entry, FileLayout, ModelFiles, host_bytes, write_all
from dist_ema.ranks.exchange import Exchange

__all__ = ["Pieces", "write_tensors"]

Pieces = Sequence[tuple[Box, torch.Tensor]]

# The largest page of the systems in use: 4 KiB on x86, 64 KiB on some ARM.
_PAGE_BYTES = 64 * 2**10
# Shorter stretches are sent to the writer of their page.
_LONG_BYTES = 2**20
# What a writer receives in one round; a multiple of the page.
_WINDOW_BYTES = 8 * 2**20
# What is brought to the host, converted and written at a time.
_CHUNK_BYTES = 8 * 2**20

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclasses.dataclass(frozen=True)
class _Part:
    """Bytes of this rank that lie at `strip` in the file: a rectangle of `values`, one row for every stretch."""

    strip: Strip
    values: torch.Tensor
    dtype: torch.dtype

    def between(self, start: int, stop: int) -> Iterator[_Part]:
        """The parts of this part between two offsets of the file."""
        for cut in self.strip.cuts(start, stop):
            strip, itemsize = cut.strip, self.dtype.itemsize
            first = cut.skipped_bytes // itemsize
            rows = self.values[cut.row : cut.row + strip.count, first : first + strip.run_bytes // itemsize]
            yield _Part(strip, rows, self.dtype)

    def content(self) -> Bytes:
        """The bytes, one row for every stretch."""
        flat: Bytes = host_bytes(self.values, self.dtype).numpy()
        return flat.reshape(self.strip.count, self.strip.run_bytes)


def write_tensors(
    exchange: Exchange,
    folder: Path,
    files: ModelFiles,
    pieces: Pieces,
    writers: Sequence[int],
    checksums: PartialChecksums | None,
) -> Exception | None:
    """Collective: every rank must call it. Fill the files of a folder, which exist at their full sizes.

    Args:
        exchange: the traffic of all ranks.
        folder: the folder of the files, for the ranks that share it.
        files: the layout of the files.
        pieces: every box this rank owns, and its values, converted to the files' dtypes on the way.
        writers: the ranks that share the folder, in order; the same on every rank.
        checksums: sums what this rank writes, or None.

    Returns:
        The failure of this rank, if there was one, after all ranks are through; the caller must have the ranks agree
        on it.

    Raises:
        CommunicationError: other ranks are gone.
    """
    failure: Exception | None = None
    by_file: dict[str, list[_Part]] = {}
    try:
        by_file = _parts_by_file(files, pieces, with_headers=exchange.rank == 0)
    except Exception as error:
        failure = error
    for file in files.files:
        # A rank that has failed goes on: the other ranks wait for its messages.
        writing = _FileWriting(exchange, folder / file.name, file, writers, checksums, failure)
        failure = writing.run(by_file.get(file.name, []))
    return failure


def _parts_by_file(files: ModelFiles, pieces: Pieces, *, with_headers: bool) -> dict[str, list[_Part]]:
    by_file: dict[str, list[_Part]] = {file.name: [] for file in files.files}
    for file in files.files if with_headers else ():
        header = torch.frombuffer(bytearray(file.header), dtype=torch.uint8)
        by_file[file.name].append(_Part(Strip(0, header.numel(), header.numel(), 1), header.view(1, -1), torch.uint8))
    places = files.locate()
    for box, values in pieces:
        file, entry = places[box.fqn]
        by_file[file.name] += _parts_of_box(entry, box, values)
    return by_file


def _parts_of_box(entry: Entry, box: Box, values: torch.Tensor) -> Iterator[_Part]:
    for index, strip in strips_of_box(entry.start, entry.shape, entry.dtype.itemsize, box):
        rows = values[index].reshape(strip.count, -1)
        if strip.run_bytes < _LONG_BYTES:
            yield _Part(strip, rows, entry.dtype)
        else:
            for number in range(strip.count):
                start = strip.start + number * strip.stride_bytes
                yield _Part(Strip(start, strip.run_bytes, strip.run_bytes, 1), rows[number : number + 1], entry.dtype)


class _FileWriting:
    """The writing of one file by all ranks."""

    def __init__(
        self,
        exchange: Exchange,
        path: Path,
        file: FileLayout,
        writers: Sequence[int],
        checksums: PartialChecksums | None,
        failure: Exception | None,
    ) -> None:
        self._exchange = exchange
        self._path = path
        self._size_bytes = file.size_bytes
        self._writers = writers
        self._writes = exchange.rank in writers
        self._alone = exchange.world_size == 1
        self._checksums = checksums
        self._entries = sorted(file.entries.values(), key=lambda entry: entry.start)
        self._starts = [entry.start for entry in self._entries]
        self._failure = failure
        self._descriptor = -1

    def run(self, parts: list[_Part]) -> Exception | None:
        """Collective. Write the parts; returns the first failure of this rank."""
        divided: list[list[_Part]] = []
        try:
            self._guarded(lambda: divided.extend(self._divide(parts)))
            direct, exchanged = divided or ([], [])
            self._guarded(self._write_direct, direct)
            if not self._alone:
                self._write_exchanged(exchanged)
            if self._descriptor >= 0:
                self._guarded(os.fsync, self._descriptor)
        finally:
            self._close()
        return self._failure

    def _close(self) -> None:
        """Close the file. A network file system may report only now that a write has failed."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            try:
                os.close(descriptor)
            except Exception as error:
                self._failure = self._failure or error

    def _guarded(self, work: Any, *arguments: Any) -> None:
        """Do local work. Its failure is kept for later, since the other ranks wait for the messages of this rank."""
        try:
            if self._failure is None:
                work(*arguments)
        except Exception as error:
            self._failure = error

    def _divide(self, parts: list[_Part]) -> tuple[list[_Part], list[_Part]]:
        """The parts that this rank writes, and those that it sends to the writers of their pages."""
        if self._alone:
            return sorted(parts, key=lambda part: part.strip.start), []
        direct: list[_Part] = []
        exchanged = [part for part in parts if part.strip.count > 1]
        for extent in _extents(part for part in parts if part.strip.count == 1):
            start, stop = extent[0].strip.start, extent[-1].strip.stop
            first = -(-start // _PAGE_BYTES) * _PAGE_BYTES
            last = stop if stop == self._size_bytes else stop // _PAGE_BYTES * _PAGE_BYTES
            if not self._writes or stop - start < _LONG_BYTES or first >= last:
                exchanged += extent
                continue
            for part in extent:
                exchanged += part.between(start, first)
                direct += part.between(first, last)
                exchanged += part.between(last, stop)
        return direct, exchanged

    def _write_direct(self, parts: Sequence[_Part]) -> None:
        for part in parts:
            for row in range(part.strip.count):
                start = part.strip.start + row * part.strip.stride_bytes
                step = max(1, _CHUNK_BYTES // part.dtype.itemsize)
                for index, chunk in enumerate(part.values[row].split(step)):
                    self._write(start + index * step * part.dtype.itemsize, host_bytes(chunk, part.dtype).numpy())

    def _write(self, offset: int, content: Bytes) -> None:
        if self._descriptor < 0:
            self._descriptor = os.open(self._path, os.O_WRONLY)
        if self._checksums is not None:
            for entry in self._entries[max(bisect.bisect_right(self._starts, offset) - 1, 0) :]:
                if entry.start >= offset + len(content):
                    break
                first, last = max(entry.start, offset), min(entry.start + entry.nbytes, offset + len(content))
                if first < last:
                    self._checksums.add(entry.fqn, first - entry.start, content[first - offset : last - offset])
        write_all(self._descriptor, content, offset)

    @property
    def _domain_bytes(self) -> int:
        """The bytes of the file that are a writer's: whole pages."""
        return -(-self._size_bytes // (len(self._writers) * _PAGE_BYTES)) * _PAGE_BYTES

    def _write_exchanged(self, parts: Sequence[_Part]) -> None:
        """Collective: every rank must call it."""
        rank, world_size = self._exchange.rank, self._exchange.world_size
        num_rounds = -(-self._domain_bytes // _WINDOW_BYTES)
        sent_bytes = torch.zeros(world_size, num_rounds, dtype=torch.int64, device="cpu")
        outbox: dict[tuple[int, int], list[_Part]] = {}
        self._guarded(self._sort, parts, outbox)
        for (number, writer), cuts in outbox.items():
            sent_bytes[writer, number] = _message_bytes(cuts)
        received_bytes = self._exchange.transpose_integers(sent_bytes)
        sent_bytes[rank] = received_bytes[rank] = 0  # what stays here
        # A lack of memory must show before the first message: every announced message must be sent and received.
        message, inbox = self._exchange.agree(
            f"writing {self._path.name}",
            lambda: (
                np.empty(int(sent_bytes.max()), dtype=np.uint8),
                np.empty(int(received_bytes.sum(0).max()), dtype=np.uint8),
            ),
        )
        for number in range(num_rounds):
            window, taken = _Window(), 0
            for shift in range(world_size):
                target, source = (rank + shift) % world_size, (rank - shift) % world_size
                cuts = outbox.pop((number, target), [])
                if shift == 0:
                    self._guarded(window.put_parts, cuts)
                    continue
                sent = received = None
                if cuts:
                    packed = message[: int(sent_bytes[target, number])]
                    packed[:8] = 0  # no strips, unless the packing succeeds
                    self._guarded(_pack, packed, cuts)
                    sent = torch.from_numpy(packed)
                size = int(received_bytes[source, number])
                answer = inbox[taken : taken + size]
                if size:
                    received, taken = torch.from_numpy(answer), taken + size
                self._exchange.pass_on(sent, target, received, source)
                if size:
                    self._guarded(window.put_message, answer)
            self._guarded(self._write_window, window)

    def _sort(self, parts: Sequence[_Part], outbox: dict[tuple[int, int], list[_Part]]) -> None:
        """Put the parts into the outbox, by round and writer."""
        for part in parts:
            for number, writer, cut in self._by_window(part):
                outbox.setdefault((number, writer), []).append(cut)

    def _by_window(self, part: _Part) -> Iterator[tuple[int, int, _Part]]:
        """Round, writer and cut for every window that the part reaches into."""
        at = part.strip.start
        while at < part.strip.stop:
            domain, within = divmod(at, self._domain_bytes)
            number = within // _WINDOW_BYTES
            end = min(domain * self._domain_bytes + (number + 1) * _WINDOW_BYTES, (domain + 1) * self._domain_bytes)
            for cut in part.between(at, end):
                yield number, self._writers[domain], cut
            at = end

    def _write_window(self, window: _Window) -> None:
        for offset, content in window.stretches():
            self._write(offset, content)


def _extents(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Parts that lie end to end in the file, in order."""
    extent: list[_Part] = []
    for part in sorted(parts, key=lambda part: part.strip.start):
        if extent and extent[-1].strip.stop != part.strip.start:
            yield extent
            extent = []
        extent.append(part)
    if extent:
        yield extent


# A message: the number of strips, four integers for every strip (start, run_bytes, stride_bytes, count), their bytes.


def _message_bytes(cuts: Sequence[_Part]) -> int:
    return 8 * (1 + 4 * len(cuts)) + sum(cut.strip.nbytes for cut in cuts)


def _pack(message: Bytes, cuts: Sequence[_Part]) -> None:
    head = [len(cuts)]
    for cut in cuts:
        head += dataclasses.astuple(cut.strip)
    at = 8 * len(head)
    message[:at].view(np.int64)[:] = head
    for cut in cuts:
        message[at : at + cut.strip.nbytes] = cut.content().reshape(-1)
        at += cut.strip.nbytes


class _Window:
    """The bytes that a writer has received in one round, put together."""

    def __init__(self) -> None:
        self._stretches: list[tuple[Strip, Bytes]] = []

    def put_parts(self, parts: Sequence[_Part]) -> None:
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
