"""Which rank owns which boxes of every tensor: exchanged once, and kept for the streams that follow."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

import torch

from dist_ema.boxes.shards import Box, TensorSpec
from dist_ema.ranks.exchange import Exchange

__all__ = ["Ownership", "boxes_by_tensor"]

# For every tensor the boxes that one rank owns.
Owned = list[list[Box]]


class Ownership:
    """The boxes that all ranks own, for a plan that does not change."""

    def __init__(self) -> None:
        self._kept: tuple[int, dict[str, str]] | None = None  # in an epoch of the exchange
        self._decoded: dict[int, Owned] = {}

    def of_all(
        self, exchange: Exchange, action: str, specs: Sequence[TensorSpec], own: Owned, owners: Sequence[int]
    ) -> dict[int, Owned]:
        """Collective: every rank must call it; only the first time anything is sent.

        Args:
            exchange: the control traffic of all ranks.
            action: a name of the work, for the message.
            specs: the tensors.
            own: the boxes that this rank owns.
            owners: the ranks whose boxes this rank wants to know.

        Returns:
            For each of these ranks its boxes.
        """
        if self._kept is None or self._kept[0] != exchange.epoch:
            texts = exchange.reduce(action, {str(exchange.rank): _text(own)}, lambda lower, higher: lower | higher)
            self._kept, self._decoded = (exchange.epoch, texts), {}
        for rank in owners:
            if rank not in self._decoded:
                self._decoded[rank] = own if rank == exchange.rank else _owned(self._kept[1][str(rank)], specs)
        return {rank: self._decoded[rank] for rank in owners}


def boxes_by_tensor(
    specs: Sequence[TensorSpec], pieces: Sequence[tuple[Box, torch.Tensor]]
) -> tuple[Owned, list[list[torch.Tensor]]]:
    """For every tensor the boxes of the pieces that are not empty, and their values."""
    index_of = {spec.fqn: index for index, spec in enumerate(specs)}
    boxes: Owned = [[] for _ in specs]
    values: list[list[torch.Tensor]] = [[] for _ in specs]
    for box, value in pieces:
        if box.numel:
            boxes[index_of[box.fqn]].append(box)
            values[index_of[box.fqn]].append(value)
    return boxes, values


def _text(own: Owned) -> str:
    """Numbers of boxes repeat: packed, a box takes a few bytes."""
    record = [[[box.offsets, box.sizes] for box in of_tensor] for of_tensor in own]
    return base64.b85encode(zlib.compress(json.dumps(record, separators=(",", ":")).encode())).decode()


def _owned(text: str, specs: Sequence[TensorSpec]) -> Owned:
    record: list[Any] = json.loads(zlib.decompress(base64.b85decode(text)))
    return [
        [Box(spec.fqn, tuple(offsets), tuple(sizes)) for offsets, sizes in of_tensor]
        for spec, of_tensor in zip(specs, record, strict=True)
    ]
