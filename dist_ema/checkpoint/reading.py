"""Every rank reads the bytes of its own boxes, and no others.

For a rank that cannot see the folder (where every node has its own disk), rank 0 reads, in bounded chunks. A file of
torch.save is mapped into memory by each rank that sees it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_ema.boxes.plan import Plan
from dist_ema.boxes.rank_runs import RankRuns
from dist_ema.boxes.shards import Box, Held, Shard
from dist_ema.disk.formats.byte_ranges import strips_of_box
from dist_ema.disk.formats.checksums import PartialChecksums, whole_checksums
from dist_ema.disk.formats.headers import StoredModel, StoredTensor, open_regular, read_exactly
from dist_ema.disk.formats.model_files import dtype_of
from dist_ema.disk.formats.pickles import PartBytes
from dist_ema.disk.saved_average import damage_text
from dist_ema.errors import CheckpointCorruptError
from dist_ema.ranks.exchange import Exchange
from dist_ema.ranks.wires.wires import Wires

__all__ = ["ModelReading", "Targets", "Wanted", "read_boxes"]

# The stored name of a tensor, the box of it to read, and a contiguous tensor of the box's sizes that is to be filled.
Wanted = Sequence[tuple[str, Box, torch.Tensor]]

# What is read, summed and (for a rank without the folder) sent at a time.
_CHUNK_BYTES = 8 * 2**20

# One tensor per shard to be filled. A tensor that the checkpoint does not have stays as it is.
Targets = Sequence[torch.Tensor]

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# The name of a file, the part that is read of a file of torch.save, and whether it is a file of safetensors.
_File = tuple[str, str, bool]


class ModelReading:
    """Reading one model folder into the shards of all ranks."""

    def __init__(self, exchange: Exchange, action: str, folder: Path, model: StoredModel, blind: RankRuns) -> None:
        self._exchange = exchange
        self._action = action
        self._folder = folder
        self._model = model
        self._blind = blind
        self._sizes_bytes = {name: stored.nbytes for name, stored in model.tensors.items()}

    def run(
        self, shards: Sequence[Shard], names: Mapping[str, str], values: Targets, expected: Mapping[str, int]
    ) -> None:
        """Collective. Fill the tensors of the shards.

        Args:
            shards: the shards of this rank.
            names: fqn of a shard -> its stored name, where there is one.
            values: one tensor per shard.
            expected: stored name -> checksum to compare; the ranks together read each byte of these tensors once.
        """
        tensors = self._model.tensors
        wanted = [
            (names[shard.fqn], dataclasses.replace(shard.box, fqn=names[shard.fqn]), value)
            for shard, value in zip(shards, values, strict=True)
            if shard.fqn in names
        ]
        partial = PartialChecksums(self._sizes_bytes)
        failure = read_boxes(self._exchange, self._folder, tensors, wanted, self._blind, partial)
        self._exchange.raise_together(self._action, failure)
        if expected:
            combined = self._exchange.xor_on_rank_0(partial.partial())

            def check() -> None:
                checksums = whole_checksums(self._sizes_bytes, combined or [])
                damaged = [name for name, value in expected.items() if checksums[name] != value]
                if damaged:
                    raise CheckpointCorruptError(damage_text(self._folder, damaged))

            self._exchange.on_rank_0(self._action, check)

    def kept(self, buffers: Plan, common: Collection[str], checksums: Mapping[str, int]) -> dict[Box, torch.Tensor]:
        """Collective. The values of what this rank holds of the buffers.

        Args:
            buffers: the buffers.
            common: the names that the checkpoint has as this run expects them.
            checksums: fqn -> checksum to compare.
        """
        held = [held for division in buffers.divisions for held in division.held if held.spec.fqn in common]
        owned = {shard.held.box for shard in buffers.owned(averaged=False)}
        values = self._exchange.agree(self._action, lambda: {piece.box: _like(piece) for piece in held})
        live = {spec.fqn for spec in buffers.specs if spec.is_buffer and not spec.averaged}
        names = {fqn: fqn for fqn in live.intersection(common)}
        expected = {fqn: value for fqn, value in checksums.items() if fqn in names}
        for is_owner in (True, False):  # the bytes that checksums are compared for are read once, by the owners
            shards = [Shard(piece, piece.box) for piece in held if (piece.box in owned) == is_owner]
            self.run(shards, names, [values[shard.box] for shard in shards], expected if is_owner else {})
        return values


def _like(held: Held) -> torch.Tensor:
    live = held.values()
    return torch.empty(live.shape, dtype=live.dtype, device=live.device)


def read_boxes(
    exchange: Exchange,
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    wanted: Wanted,
    blind: Sequence[int],
    checksums: PartialChecksums,
) -> Exception | None:
    """Collective: every rank must call it. Only rank 0 and the ranks in `blind` communicate.

    The extra memory is one chunk.

    Args:
        exchange: the traffic of all ranks.
        folder: where the files lie.
        tensors: stored name -> place; the same on every rank.
        wanted: the boxes that this rank needs; their values are converted to the dtype of the tensor to fill.
        blind: the ranks that cannot see the folder; the same on every rank, rank 0 not among them.
        checksums: sums what this rank reads.

    Returns:
        The failure of this rank, if there was one; the caller must have the ranks agree on it.

    Raises:
        CommunicationError: other ranks are gone.
    """
    files = sorted({(stored.file, stored.part or "", stored.part is None) for stored in tensors.values()})
    source: _Disk | _RankZero
    failure: Exception | None = None
    if blind:
        with exchange.wires("reading for other ranks") as wires:
            for rank in blind:
                if exchange.rank == 0:
                    failure = _serve(wires, rank, _Disk(folder, files)) or failure
                elif exchange.rank == rank:
                    source = _RankZero(wires)
                    failure = _read(source, files, tensors, wanted, checksums)
                    source.finish()
    if exchange.rank not in blind:
        failure = _read(_Disk(folder, files), files, tensors, wanted, checksums) or failure
    return failure


@torch.no_grad()
def _read(
    source: _Disk | _RankZero,
    files: Sequence[_File],
    tensors: Mapping[str, StoredTensor],
    wanted: Wanted,
    checksums: PartialChecksums,
) -> Exception | None:
    try:
        staging = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, device="cpu")
        for name, box, values in wanted:
            stored = tensors[name]
            file = files.index((stored.file, stored.part or "", stored.part is None))
            dtype = dtype_of(stored)
            direct = values.device.type == "cpu" and values.dtype == dtype
            for index, strip in strips_of_box(stored.start, stored.shape, dtype.itemsize, box):
                for skipped_bytes, part in _blocks(values[index].reshape(strip.count, -1), dtype.itemsize):
                    host = part if direct else staging[: part.numel() * dtype.itemsize].view(dtype).view(part.shape)
                    rows: Bytes = host.reshape(-1).view(torch.uint8).numpy().reshape(len(part), -1)
                    row, within = divmod(skipped_bytes, strip.run_bytes)
                    start = strip.start + row * strip.stride_bytes + within
                    source.fill(file, start, strip.stride_bytes, rows)
                    checksums.add_rows(name, start - stored.start, strip.stride_bytes, rows)
                    if not direct:
                        part.copy_(host)
        source.close()
    except Exception as error:
        with suppress(Exception):  # the first failure is the one to raise
            source.close()
        return error
    return None


def _blocks(values: torch.Tensor, itemsize: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows of a 2-D tensor in blocks of bounded size, and how many bytes of the file's dtype lie before the block.

    A block is of whole rows. A long row is cut into several blocks.
    """
    count, numel = values.shape
    if count == 1 or numel * itemsize > _CHUNK_BYTES:
        step = max(1, _CHUNK_BYTES // itemsize)
        for row in range(count):
            for first in range(0, numel, step):
                yield (row * numel + first) * itemsize, values[row : row + 1, first : first + step]
        return
    step = _CHUNK_BYTES // (numel * itemsize)
    for row in range(0, count, step):
        yield row * numel * itemsize, values[row : row + step]


class _Disk:
    """The files, as this rank sees them."""

    def __init__(self, folder: Path, files: Sequence[_File]) -> None:
        self._folder = folder
        self._files = files
        self._open: dict[int, int | PartBytes] = {}  # at most one: tensors come nearly file by file

    def fill(self, file: int, start: int, stride_bytes: int, rows: Bytes) -> None:
        """Read the rows; a row begins `stride_bytes` after the former one."""
        if file not in self._open:
            self.close()
            name, part, is_safetensors = self._files[file]
            path = self._folder / name
            self._open[file] = open_regular(path) if is_safetensors else PartBytes(path, part)
        source = self._open[file]
        if isinstance(source, PartBytes):
            source.fill(start, stride_bytes, rows)
            return
        for number, row in enumerate(rows):
            read_exactly(source, row, start + number * stride_bytes)

    def close(self) -> None:
        """Close the files."""
        while self._open:
            source = self._open.popitem()[1]
            if not isinstance(source, PartBytes):
                os.close(source)


# A request: file, start, stride_bytes, number of rows, bytes of a row. 0 rows end the service. The answer is the bytes.
_REQUEST_NUMEL = 5
_YOUR_TURN = b"\1"


class _RankZero:
    """The files, which rank 0 reads for this rank when its turn has come."""

    def __init__(self, wires: Wires) -> None:
        self._wires = wires
        # A lack of memory must show here: an answer that was asked for must be received.
        self._request = np.zeros(_REQUEST_NUMEL, dtype=np.int64)
        self._answer = np.empty(_CHUNK_BYTES, dtype=np.uint8)
        wires.receive(bytearray(_YOUR_TURN), 0)

    def fill(self, file: int, start: int, stride_bytes: int, rows: Bytes) -> None:
        """Have rank 0 read the rows."""
        answer = self._answer[: rows.size]
        self._request[:] = (file, start, stride_bytes, *rows.shape)
        self._ask()
        self._wires.receive(answer, 0)
        rows[...] = answer.reshape(rows.shape)

    def close(self) -> None:
        """Nothing is open here."""

    def finish(self) -> None:
        """Tell rank 0 that this rank has all bytes."""
        self._request[:] = 0
        self._ask()

    def _ask(self) -> None:
        self._wires.send(self._request.view(np.uint8), 0)


def _serve(wires: Wires, rank: int, disk: _Disk) -> Exception | None:
    """Read for a blind rank; it gets answers of the right size even after a failure here."""
    failure: Exception | None = None
    request = np.zeros(_REQUEST_NUMEL, dtype=np.int64)
    answer = np.zeros(_CHUNK_BYTES, dtype=np.uint8)
    # Ranks that come before their turn would knock again and again.
    wires.send(_YOUR_TURN, rank)
    while True:
        wires.receive(request.view(np.uint8), rank)
        file, start, stride_bytes, count, run_bytes = request.tolist()
        rows = answer[: count * run_bytes]
        try:
            if count == 0:
                disk.close()
                return failure
            disk.fill(file, start, stride_bytes, rows.reshape(count, run_bytes))
        except Exception as error:
            failure = failure or error
            if count == 0:
                return failure
        wires.send(rows, rank)
