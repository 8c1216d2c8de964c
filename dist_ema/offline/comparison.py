"""How far two sets of weights lie apart, tensor by tensor, in bounded memory. One process, no communication."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from dist_ema.disk.formats.checksums import checksum
from dist_ema.disk.formats.model_files import dtype_of
from dist_ema.disk.saved_average import damage_text, stored_bytes
from dist_ema.disk.sources import Weights
from dist_ema.errors import CheckpointCorruptError
from dist_ema.live.distance import relative_distance

__all__ = ["Difference", "differences"]

# Elements of both sides that are in memory at a time.
_CHUNK_NUMEL = 2**20


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of one tensor: sums of squares over its elements, in float64."""

    name: str
    difference: float
    reference: float

    @property
    def relative(self) -> float:
        """Relative L2 distance; infinite where only the reference is zero."""
        return relative_distance(self.difference, self.reference)


def differences(
    weights: Weights, reference: Weights, progress: Callable[[int], object] = lambda num_bytes: None
) -> Iterator[Difference]:
    """The difference of every tensor that both have in the same shape, in the order of `weights`.

    Args:
        weights: one set.
        reference: the other.
        progress: called with the number of bytes of every chunk that was read.

    Raises:
        CheckpointCorruptError: the bytes of a tensor are not those that were saved.
    """
    for name, stored in weights.model.tensors.items():
        other = reference.model.tensors.get(name)
        if other is None or other.shape != stored.shape:
            continue
        difference_squares = reference_squares = 0.0
        for a, b in zip(_chunks(weights, name, progress), _chunks(reference, name, progress), strict=True):
            difference_squares += float((a - b).square().sum())
            reference_squares += float(b.square().sum())
        yield Difference(name, difference_squares, reference_squares)


def _chunks(weights: Weights, name: str, progress: Callable[[int], object]) -> Iterator[torch.Tensor]:
    """The chunks of a tensor; its checksum is compared at the end, where one was saved."""
    stored = weights.model.tensors[name]
    dtype = dtype_of(stored)
    total = 0
    for chunk in stored_bytes(weights.folder, stored, chunk_bytes=_CHUNK_NUMEL * dtype.itemsize):
        total = checksum(chunk, total)
        values = torch.frombuffer(chunk, dtype=dtype)
        yield torch.view_as_real(values).double() if values.is_complex() else values.double()
        progress(chunk.nbytes)
    if weights.checksums.get(name, total) != total:
        raise CheckpointCorruptError(damage_text(weights.folder / stored.file, [name]))
