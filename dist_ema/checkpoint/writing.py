"""Every rank writes its bytes at their places in the files of one folder.

Some network file systems lose data where two clients write into one page: so one rank writes each page of a file. Long
stretches are written by the rank that has them. Short stretches, and the ends of long ones, are sent to the writer of
their page first, which writes them in long stretches (the two-phase writing of MPI-IO, R. Thakur et al. 1999):

    page       |        |        |        |        |        |        |
    rank 0     .............[====|========|====]...................    writes the two whole pages within
    rank 1     ................................[===|=====]..........   sends its bytes to the writers of the pages
               ^ the file is divided evenly among the writers

Exchanges go in rounds. In a round, a writer receives at most one window of its part of the file, and in the first one
the few bytes of other windows besides. So the buffers are bounded whatever the sizes. A rank that does not share the
folder sends everything.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from dist_ema.boxes.shards import Box
from dist_ema.checkpoint.parcels import Bytes, Guard, Parcels, Part, Window
from dist_ema.disk.formats.byte_ranges import Strip, strips_of_box
from dist_ema.disk.formats.checksums import PartialChecksums
from dist_ema.disk.formats.model_files import Entry, FileLayout, ModelFiles, host_bytes, write_all
from dist_ema.ranks.exchange import Exchange
from dist_ema.ranks.wires.wires import Wires

__all__ = ["Pieces", "write_tensors"]

Pieces = Sequence[tuple[Box, torch.Tensor]]

# The largest page of the systems in use: 4 KiB on x86, 64 KiB on some ARM.
_PAGE_BYTES = 64 * 2**10
# A small file has few writers: each further one costs every rank a message.
_LEAST_PAGES = 16
# Shorter stretches are sent to the writer of their page.
_LONG_BYTES = 2**18
# What a writer receives in one round; a multiple of the page.
_WINDOW_BYTES = 8 * 2**20
# What is brought to the host and converted at a time.
_CHUNK_BYTES = 8 * 2**20
# What is summed up and then written at a time: it stays in the processor's cache between the two, and the kernel lets
# one rank at a time write to a file.
_WRITE_BYTES = 2**19


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
    guard = Guard()  # a rank that has failed goes on: the other ranks wait for its messages
    by_file: dict[str, list[Part]] = {}
    guard(lambda: by_file.update(_parts_by_file(files, pieces, with_headers=exchange.rank == 0)))
    writings = [_FileWriting(exchange, folder / file.name, file, writers, checksums, guard) for file in files.files]
    parcels = Parcels(exchange.rank, guard)
    for number, (file, writing) in enumerate(zip(files.files, writings, strict=True)):
        guard(writing.divide, by_file.get(file.name, []), partial(parcels.put, number))
    if exchange.world_size == 1:
        for number, writing in enumerate(writings):
            writing.write(parcels.windows(None, number))
        return guard.failure
    with exchange.wires(f"writing {folder}") as wires:
        if any(writing.may_receive for writing in writings):
            wires.listen()
        for number, writing in enumerate(writings):
            windows = parcels.windows(wires, number)
            writing.write(windows if number else _after_announcing(windows, parcels, exchange, wires, folder))
    return guard.failure


def _after_announcing(
    windows: Iterable[Window], parcels: Parcels, exchange: Exchange, wires: Wires, folder: Path
) -> Iterator[Window]:
    """Collective: every rank must take the first window. By then the disk is at work on what is written in place."""
    parcels.announce(exchange, wires, f"writing {folder}")
    yield from windows


def _parts_by_file(files: ModelFiles, pieces: Pieces, *, with_headers: bool) -> dict[str, list[Part]]:
    by_file: dict[str, list[Part]] = {file.name: [] for file in files.files}
    for file in files.files if with_headers else ():
        header = torch.frombuffer(bytearray(file.header), dtype=torch.uint8)
        by_file[file.name].append(Part(Strip(0, header.numel(), header.numel(), 1), header.view(1, -1), torch.uint8))
    places = files.locate()
    for box, values in pieces:
        file, entry = places[box.fqn]
        by_file[file.name] += _parts_of_box(entry, box, values)
    return by_file


def _parts_of_box(entry: Entry, box: Box, values: torch.Tensor) -> Iterator[Part]:
    for index, strip in strips_of_box(entry.start, entry.shape, entry.dtype.itemsize, box):
        rows = values[index].reshape(strip.count, -1)
        if strip.run_bytes < _LONG_BYTES:
            yield Part(strip, rows, entry.dtype)
        else:
            for number in range(strip.count):
                start = strip.start + number * strip.stride_bytes
                yield Part(Strip(start, strip.run_bytes, strip.run_bytes, 1), rows[number : number + 1], entry.dtype)


class _FileWriting:
    """The writing of one file by one rank."""

    def __init__(
        self,
        exchange: Exchange,
        path: Path,
        file: FileLayout,
        writers: Sequence[int],
        checksums: PartialChecksums | None,
        guard: Guard,
    ) -> None:
        self._path = path
        self._size_bytes = file.size_bytes
        self._writers = writers
        self._rank = exchange.rank
        self._writes = exchange.rank in writers
        self._alone = exchange.world_size == 1
        self._checksums = checksums
        self._entries = sorted(file.entries.values(), key=lambda entry: entry.start)
        self._starts = [entry.start for entry in self._entries]
        self._guard = guard
        self._direct: list[Part] = []
        self._descriptor = -1

    def write(self, windows: Iterable[Window]) -> None:
        """Write the parts that this rank writes in place, and then the windows, as they come."""
        try:
            self._guard(self._write_direct)
            for window in windows:
                self._guard(self._write_window, window)
            if self._descriptor >= 0:
                self._guard(os.fsync, self._descriptor)
        finally:
            self._close()

    def _close(self) -> None:
        """Close the file. A network file system may report only now that a write has failed."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            try:
                os.close(descriptor)
            except Exception as error:
                self._guard.failure = self._guard.failure or error

    def divide(self, parts: Sequence[Part], send: Callable[[int, int, Part], None]) -> None:
        """Keep the parts that this rank writes in place; send the others to the writers of their pages.

        Args:
            parts: the parts of this rank.
            send: takes the window and its writer, and what lies in that window.
        """
        if self._alone:
            self._direct = sorted(parts, key=lambda part: part.strip.start)
            return
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
                self._direct += part.between(first, last)
                exchanged += part.between(last, stop)
        for part in exchanged:
            for window, writer, cut in self._by_window(part):
                send(window, writer, cut)

    def _write_direct(self) -> None:
        for part in self._direct:
            for row in range(part.strip.count):
                start = part.strip.start + row * part.strip.stride_bytes
                step = max(1, _CHUNK_BYTES // part.dtype.itemsize)
                for index, chunk in enumerate(part.values[row].split(step)):
                    self._write(start + index * step * part.dtype.itemsize, host_bytes(chunk, part.dtype).numpy())

    def _write(self, offset: int, content: Bytes) -> None:
        if self._descriptor < 0:
            self._descriptor = os.open(self._path, os.O_WRONLY)
        for start in range(0, len(content), _WRITE_BYTES):
            piece = content[start : start + _WRITE_BYTES]
            self._add_checksums(offset + start, piece)
            write_all(self._descriptor, piece, offset + start)

    def _add_checksums(self, offset: int, content: Bytes) -> None:
        if self._checksums is None:
            return
        stop = offset + len(content)
        for index in range(max(bisect.bisect_right(self._starts, offset) - 1, 0), len(self._entries)):
            entry = self._entries[index]
            if entry.start >= stop:
                break
            first, last = max(entry.start, offset), min(entry.start + entry.nbytes, stop)
            if first < last:
                self._checksums.add(entry.fqn, first - entry.start, content[first - offset : last - offset])

    @property
    def may_receive(self) -> bool:
        """Whether a part of the file is this rank's to write."""
        return self._writes and self._writers.index(self._rank) * self._domain_bytes < self._size_bytes

    @property
    def _domain_bytes(self) -> int:
        """The bytes of the file that are a writer's: whole pages, and not too few of them."""
        return max(-(-self._size_bytes // (len(self._writers) * _PAGE_BYTES)), _LEAST_PAGES) * _PAGE_BYTES

    def _by_window(self, part: Part) -> Iterator[tuple[int, int, Part]]:
        """Number of the window, its writer and the cut for every window that the part reaches into."""
        at = part.strip.start
        while at < part.strip.stop:
            domain, within = divmod(at, self._domain_bytes)
            number = within // _WINDOW_BYTES
            end = min(domain * self._domain_bytes + (number + 1) * _WINDOW_BYTES, (domain + 1) * self._domain_bytes)
            for cut in part.between(at, end):
                yield number, self._writers[domain], cut
            at = end

    def _write_window(self, window: Window) -> None:
        for offset, content in window.stretches():
            self._write(offset, content)


def _extents(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts that lie end to end in the file, in order."""
    extent: list[Part] = []
    for part in sorted(parts, key=lambda part: part.strip.start):
        if extent and extent[-1].strip.stop != part.strip.start:
            yield extent
            extent = []
        extent.append(part)
    if extent:
        yield extent
