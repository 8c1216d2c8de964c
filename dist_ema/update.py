"""The averaged values of this rank, and the update that moves them. No communication, ever.

The averaged values of one track lie in one flat buffer per device; each shard's averaged tensor is a view of
it. Live values of the same dtype and device are averaged by one `_foreach_lerp_` over prepared lists; others
(bfloat16 weights into float32 averages, averages kept on another device) pass through a bounded scratch.

`lerp` and not `mul` + `add`: fp32(1 - m) + fp32(m) is not 1, so the second form drifts (3e-5 relative after
2,000 updates at a decay of 0.9999, against 1e-6); and lerp in fp32 gives the same bits however a tensor is cut,
so every layout of the same weights gives the same average.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence

import torch

from dist_ema.layout import Shard
from dist_ema.skipped import weight_unless

__all__ = ["Averages"]

# 2 MiB of fp32 scratch: stays in the cache between the copy and the lerp that reads it (measured best: 0.5 to 1
# million elements).
_SCRATCH_NUMEL = 512 * 1024


class Averages:
    """Averaged values of one track for the shards that this rank owns.

    Attributes:
        values: one tensor per shard, of the shard's sizes, in the order of the shards.
    """

    def __init__(self, shards: Sequence[Shard], *, dtype: torch.dtype, device: torch.device | None) -> None:
        self._shards = tuple(shards)
        devices = [shard.live().device if device is None else device for shard in self._shards]
        self._flat: dict[torch.device, torch.Tensor] = {}
        for wanted in dict.fromkeys(devices):
            numel = sum(shard.box.numel for shard, at in zip(self._shards, devices, strict=True) if at == wanted)
            with torch.inference_mode(False):  # an inference tensor could not be updated outside that mode
                self._flat[wanted] = torch.zeros(numel, dtype=dtype, device=wanted)
        self.values = self._cut(self._flat, devices)
        self._views: list[torch.Tensor] | None = None
        self._direct_averaged: list[torch.Tensor] = []
        self._direct_live: list[torch.Tensor] = []
        self._staged: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

    def _cut(self, flat: dict[torch.device, torch.Tensor], devices: Sequence[torch.device]) -> tuple[torch.Tensor, ...]:
        filled = dict.fromkeys(flat, 0)
        views = []
        for shard, device in zip(self._shards, devices, strict=True):
            start = filled[device]
            filled[device] = stop = start + shard.box.numel
            views.append(flat[device][start:stop].view(shard.sizes))
        return tuple(views)

    @property
    def nbytes(self) -> int:
        """Bytes of averaged values on this rank."""
        return sum(flat.numel() * flat.element_size() for flat in self._flat.values())

    @torch.no_grad()
    def copy_live(self, indices: Sequence[int] | None = None) -> None:
        """Set the averaged values to the live ones: of all shards, or of those of these indices. No communication."""
        chosen = range(len(self.values)) if indices is None else indices
        if chosen:
            torch._foreach_copy_(
                [self.values[index] for index in chosen], [self._shards[index].live() for index in chosen]
            )

    @torch.no_grad()
    def lerp(self, momentum: float, *, unless: torch.Tensor | None = None) -> None:
        """Average: `averaged <- (1 - momentum) * averaged + momentum * live`. No communication.

        Args:
            momentum: weight of the live values, from 0 to 1.
            unless: flag of one element; where it is not 0 nothing moves. Read on the device only.
        """
        if momentum == 0.0:
            return  # 0 * (live - averaged) is not 0 where live is not finite
        self._follow_live()
        # An empty list raises: a rank may own nothing.
        if self._direct_averaged:
            _lerp(self._direct_averaged, self._direct_live, momentum, unless)
        for averaged_group, live_group in self._staged:
            scratch = [torch.empty_like(averaged) for averaged in averaged_group]
            torch._foreach_copy_(scratch, live_group)
            _lerp(averaged_group, scratch, momentum, unless)

    def _follow_live(self) -> None:
        """Prepare the lists of an update, anew only if the memory behind some live tensor has been replaced.

        A view that still stands for the same memory returns the same object (see `dist_ema.layout.Held.view`).
        """
        views = [shard.held.view() for shard in self._shards]
        if self._views is not None and all(map(operator.is_, views, self._views)):
            return
        self._views = views
        self._direct_averaged, self._direct_live = [], []
        staged = []
        for averaged, shard in zip(self.values, self._shards, strict=True):
            live = shard.live()
            if live.dtype == averaged.dtype and live.device == averaged.device:
                self._direct_averaged.append(averaged)
                self._direct_live.append(live)
            else:
                staged.append((averaged, live))
        self._staged = list(_scratch_groups(staged))

    @torch.no_grad()
    def replace(self, values: Sequence[torch.Tensor]) -> None:
        """Set the averaged values, one tensor of the shard's sizes per shard. No communication."""
        for averaged, value in zip(self.values, values, strict=True):
            if value is not averaged:
                averaged.copy_(value)


def _lerp(averaged: list[torch.Tensor], live: list[torch.Tensor], momentum: float, unless: torch.Tensor | None) -> None:
    if unless is None:
        torch._foreach_lerp_(averaged, live, momentum)
    else:
        weights = {value.device: weight_unless(unless, momentum, value) for value in averaged}
        for value, new in zip(averaged, live, strict=True):
            value.lerp_(new, weights[value.device])


def _scratch_groups(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Pairs of averaged and live tensors, cut and grouped so that a group is at most `_SCRATCH_NUMEL` elements."""
    averaged_group: list[torch.Tensor] = []
    live_group: list[torch.Tensor] = []
    room = _SCRATCH_NUMEL
    for whole_averaged, whole_live in pairs:
        for averaged, live in _cut(whole_averaged, whole_live):
            if averaged.numel() > room and averaged_group:
                yield averaged_group, live_group
                averaged_group, live_group, room = [], [], _SCRATCH_NUMEL
            averaged_group.append(averaged)
            live_group.append(live)
            room -= averaged.numel()
    if averaged_group:
        yield averaged_group, live_group


def _cut(averaged: torch.Tensor, live: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a pair of equal shape into pieces of at most `_SCRATCH_NUMEL` elements, along dims in turn."""
    if averaged.numel() <= _SCRATCH_NUMEL:
        yield averaged, live
        return
    if averaged.is_contiguous() and live.is_contiguous():
        yield from zip(averaged.view(-1).split(_SCRATCH_NUMEL), live.view(-1).split(_SCRATCH_NUMEL), strict=True)
        return
    dim = next(dim for dim, size in enumerate(averaged.shape) if size > 1)
    rows = max(1, _SCRATCH_NUMEL // math.prod(averaged.shape[dim + 1 :]))
    for averaged_rows, live_rows in zip(averaged.split(rows, dim), live.split(rows, dim), strict=True):
        yield from _cut(averaged_rows, live_rows)
