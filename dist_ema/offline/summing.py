"""Weighted sums of tensors that lie in many places on disk. One process, no communication.

Tensors pass in bounded chunks through one float64 sum. The chunks of all sources are read into one buffer, and a file
is open only for that, so neither memory nor open files grow with the number of sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from dist_ema.disk.formats.checksums import checksum
from dist_ema.disk.formats.headers import StoredTensor
from dist_ema.disk.formats.model_files import dtype_of
from dist_ema.disk.saved_average import damage_text, read_chunk
from dist_ema.errors import CheckpointCorruptError

__all__ = ["Chunks", "StoredTensors", "TensorSource"]

# Elements of a tensor that are in memory at a time: 1 MiB of float64 for the sum, which stays in the cache of a core.
_CHUNK_NUMEL = 2**17
# Elements that are converted at a time. All at once they would leave the cache: that took twice as long.
_BLOCK_NUMEL = 2**15


class TensorSource(Protocol):
    """Tensors on disk, by name."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype on disk."""

    def read(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes of a tensor, laid out by rows, from that element on."""

    def has_checksum(self, name: str) -> bool:
        """Whether a checksum of the tensor was saved."""

    def check(self, name: str, checksum: int) -> None:
        """Raise if the checksum of the whole tensor is not the one that was saved."""


class StoredTensors:
    """The tensors of safetensors files, as a source.

    Args:
        folder: the folder of the files.
        tensors: name -> place in the files.
        checksum_of: gives the checksum that was saved of a tensor; None where there is none.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, StoredTensor],
        checksum_of: Callable[[str], int | None] = lambda name: None,
    ) -> None:
        self._folder = folder
        self._tensors = tensors
        self._checksum_of = checksum_of

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in the files."""
        return dtype_of(self._tensors[name])

    def read(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer from that element on."""
        stored = self._tensors[name]
        read_chunk(self._folder, stored, start * dtype_of(stored).itemsize, buffer)

    def has_checksum(self, name: str) -> bool:
        """Whether a checksum was saved."""
        return self._checksum_of(name) is not None

    def check(self, name: str, checksum: int) -> None:
        """Refuse bytes that are not those that were saved."""
        if self._checksum_of(name) not in (None, checksum):
            raise CheckpointCorruptError(damage_text(self._folder / self._tensors[name].file, [name]))


class Chunks:
    """Reads tensors in chunks. A chunk is overwritten by the next one.

    Args:
        progress: called with the number of bytes of every chunk that was read.
    """

    def __init__(self, progress: Callable[[int], object]) -> None:
        self._progress = progress
        self._numel = 0
        self._sum = torch.empty(0, dtype=torch.float64)
        self._block = torch.empty(_BLOCK_NUMEL, dtype=torch.float64, device="cpu")
        self._buffer = memoryview(b"")

    def summed(
        self, numel: int, parts: Sequence[tuple[TensorSource, str, float]], chunk_numel: int | None = None
    ) -> Iterator[torch.Tensor]:
        """The chunks of a weighted sum, in float64 (complex128 where a tensor is complex).

        Args:
            numel: elements of the tensor.
            parts: the sources, the names of the tensor there, and its weights.
            chunk_numel: the most elements of a chunk; None for a size that suits the caches.
        """
        checksums = [0] * len(parts)
        is_negative = any(weight < 0 for _, _, weight in parts)
        is_complex = any(source.dtype(name).is_complex for source, name, _ in parts)
        for start, count in _cuts(numel, chunk_numel):
            self._make_room(count)
            total = self._sum[: count * (2 if is_complex else 1)].zero_()
            for index, (source, name, weight) in enumerate(parts):
                values, checksums[index] = self._read(source, name, start, count, checksums[index])
                self._add(total, _real(values) if is_complex else values, weight)
            if is_negative and not total.isfinite().all():
                self._keep_equal(total, parts, start, count, is_complex=is_complex)
            yield torch.view_as_complex(total.view(count, 2)) if is_complex else total
        for (source, name, _), present in zip(parts, checksums, strict=True):
            source.check(name, present)

    def copied(
        self, numel: int, source: TensorSource, name: str, chunk_numel: int | None = None
    ) -> Iterator[torch.Tensor]:
        """The chunks of a tensor as it is."""
        present = 0
        for start, count in _cuts(numel, chunk_numel):
            self._make_room(count)
            values, present = self._read(source, name, start, count, present)
            yield values
        source.check(name, present)

    def _add(self, total: torch.Tensor, values: torch.Tensor, weight: float) -> None:
        for part, block in zip(total.split(_BLOCK_NUMEL), values.split(_BLOCK_NUMEL), strict=True):
            part.add_(self._block[: len(block)].copy_(block), alpha=weight)

    def _keep_equal(
        self,
        total: torch.Tensor,
        parts: Sequence[tuple[TensorSource, str, float]],
        start: int,
        count: int,
        *,
        is_complex: bool,
    ) -> None:
        """Set values that are infinite, and alike in all sources (masks), to themselves: inf - inf is no number."""
        first, alike = torch.empty(0), torch.ones_like(total, dtype=torch.bool)
        for index, (source, name, _) in enumerate(parts):
            values = self._read(source, name, start, count, 0, is_counted=False)[0]
            wide = (_real(values) if is_complex else values).to(torch.float64)
            first = wide.clone() if index == 0 else first
            alike &= (wide == first) & wide.isinf()
        torch.where(alike, first, total, out=total)

    def _make_room(self, numel: int) -> None:
        if numel > self._numel:
            self._sum = torch.empty(2 * numel, dtype=torch.float64, device="cpu")  # untouched pages take no memory
            self._buffer = memoryview(bytearray(numel * 8))
            self._numel = numel

    def _read(
        self, source: TensorSource, name: str, start: int, count: int, present: int, *, is_counted: bool = True
    ) -> tuple[torch.Tensor, int]:
        dtype = source.dtype(name)
        chunk = self._buffer[: count * dtype.itemsize]
        source.read(name, start, chunk)
        if is_counted:
            self._progress(chunk.nbytes)
        return torch.frombuffer(chunk, dtype=dtype), checksum(chunk, present) if source.has_checksum(name) else 0


def _cuts(numel: int, chunk_numel: int | None) -> Iterator[tuple[int, int]]:
    chunk_numel = chunk_numel or _CHUNK_NUMEL
    for start in range(0, numel, chunk_numel):
        yield start, min(chunk_numel, numel - start)


def _real(values: torch.Tensor) -> torch.Tensor:
    """Both parts of complex values, side by side."""
    return torch.view_as_real(values.to(torch.complex128)).reshape(-1)
