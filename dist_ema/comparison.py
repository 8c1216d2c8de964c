"""How far two sets of weights lie apart, tensor by tensor, in bounded memory. One process, no communication."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from dist_ema import commit
from dist_ema.errors import CheckpointNotFoundError
from dist_ema.headers import INDEX_NAME, ONE_FILE_NAME, TORCH_DTYPES, StoredTensor, read_header, read_model_folder
from dist_ema.saved import read_saved, stored_bytes

__all__ = ["Difference", "Weights", "differences", "read_weights", "relative_distance"]

# Name -> folder and place of each tensor.
Weights = dict[str, tuple[Path, StoredTensor]]

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


def relative_distance(difference: float, reference: float) -> float:
    """`||a - b|| / ||b||` from the two sums of squares."""
    if reference == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return math.sqrt(difference / reference)


def read_weights(source: Path, track: str | None) -> dict[str, tuple[Path, StoredTensor]]:
    """Name -> folder and place of each tensor of an average, a model folder, or a safetensors file.

    Raises:
        CheckpointNotFoundError: there is nothing.
        CheckpointMismatchError: there is no such track.
        CheckpointCorruptError: files are missing, damaged, or contradict each other.
    """
    if source.is_file():
        return {name: (source.parent, stored) for name, stored in read_header(source).tensors.items()}
    folder = commit.resolve(source)
    if commit.has_manifest(folder) or not any((folder / name).exists() for name in (INDEX_NAME, ONE_FILE_NAME)):
        try:
            saved = read_saved(source)
        except CheckpointNotFoundError:
            raise CheckpointNotFoundError(
                f"{source} holds neither a saved average nor {ONE_FILE_NAME}, expected one of these or such a file"
            ) from None
        chosen = saved.track(track)
        return {name: (saved.folder_of(chosen), stored) for name, stored in saved.models[chosen].tensors.items()}
    return {name: (folder, stored) for name, stored in read_model_folder(folder).tensors.items()}


def differences(
    ours: dict[str, tuple[Path, StoredTensor]], theirs: dict[str, tuple[Path, StoredTensor]]
) -> Iterator[Difference]:
    """The difference of each tensor that both have in the same shape, in our order; `theirs` is the reference."""
    for name, (folder, stored) in ours.items():
        if name not in theirs or theirs[name][1].shape != stored.shape:
            continue
        difference = reference = 0.0
        for a, b in zip(_chunks(folder, stored), _chunks(*theirs[name]), strict=True):
            difference += float((a - b).square().sum())
            reference += float(b.square().sum())
        yield Difference(name, difference, reference)


def _chunks(folder: Path, stored: StoredTensor) -> Iterator[torch.Tensor]:
    dtype = getattr(torch, TORCH_DTYPES[stored.dtype])
    for piece in stored_bytes(folder, stored, chunk_bytes=_CHUNK_NUMEL * dtype.itemsize):
        values = torch.frombuffer(piece, dtype=dtype)
        yield torch.view_as_real(values).double() if values.is_complex() else values.double()
