"""How far two sets of weights lie apart, tensor by tensor, in bounded memory. One process, no communication."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from dist_ema.disk.formats.checksums import checksum
from dist_ema.disk.formats.headers import TORCH_DTYPES
from dist_ema.disk.saved_average import damage_told, stored_bytes
from dist_ema.disk.sources import Weights
from dist_ema.errors import CheckpointCorruptError
from dist_ema.live.distance import relative_distance

__all__ = ["Difference", "differences"]

# Elements of both sides that are in memory at a time.
_CHUNK_NUMEL = 2**20


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of one tensor: sums of squares over its elements, in float64."""

    name: str
    difference: float
    reference: float

    @property
    def relative(self) -> float:
        """Relative L2 distance; infinite where only the reference is zero."""
        return relative_distance(self.difference, self.reference)


def differences(ours: Weights, theirs: Weights) -> Iterator[Difference]:
    """The difference of each tensor that both have in the same shape, in our order; `theirs` is the reference.

    Raises:
        CheckpointCorruptError: a tensor is not the one that was saved.
    """
    for name, stored in ours.model.tensors.items():
        other = theirs.model.tensors.get(name)
        if other is None or other.shape != stored.shape:
            continue
        difference = reference = 0.0
        for a, b in zip(_chunks(ours, name), _chunks(theirs, name), strict=True):
            difference += float((a - b).square().sum())
            reference += float(b.square().sum())
        yield Difference(name, difference, reference)


def _chunks(weights: Weights, name: str) -> Iterator[torch.Tensor]:
    """A tensor in pieces; its checksum is compared at the end, where there is one."""
    stored = weights.model.tensors[name]
    dtype = getattr(torch, TORCH_DTYPES[stored.dtype])
    found = 0
    for piece in stored_bytes(weights.folder, stored, chunk_bytes=_CHUNK_NUMEL * dtype.itemsize):
        found = checksum(piece, found)
        values = torch.frombuffer(piece, dtype=dtype)
        yield torch.view_as_real(values).double() if values.is_complex() else values.double()
    if weights.checksums.get(name, found) != found:
        raise CheckpointCorruptError(damage_told(weights.folder / stored.file, [name]))
