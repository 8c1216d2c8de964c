"""What torch's distributed checkpoints take an entry of a state dict for. No communication."""

from __future__ import annotations

from typing import Any

import torch

from dist_ema.boxes.shards import Box
from dist_ema.topology.seam.loaded import is_dtensor

__all__ = ["chunks_of"]


def chunks_of(fqn: str, entry: torch.Tensor) -> list[Box]:
    """The boxes that torch's DCP writes for an entry on this rank, and reads into it.

    They are not what a rank holds where several strided shards cut a dim (packed columns): DCP knows one chunk for a
    DTensor.

    Args:
        fqn: the name of the tensor.
        entry: the entry; a plain tensor stands for the whole one.
    """
    if not is_dtensor(entry):
        return [Box(fqn, (0,) * entry.ndim, tuple(entry.shape))]
    chunked: Any = entry
    chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunked.__create_chunk_list__()]
    return [Box(fqn, offsets, sizes) for offsets, sizes in chunks]
