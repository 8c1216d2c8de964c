"""The averaged values of this rank, and the update that moves them. No communication, ever.

The averaged values of one track lie in one flat buffer per device; each shard's averaged tensor is a view of
it. Live values of the same dtype and device are averaged by one `_foreach_lerp_` over prepared lists; others
(bfloat16 weights into float32 averages, averages kept on another device) pass through a bounded scratch. Several tracks
go block by block, so that a block of live values is read from memory once and from the cache after that.

`lerp` and not `mul` + `add`: fp32(1 - m) + fp32(m) is not 1, so the second form drifts (3e-5 relative after
2,000 updates at a decay of 0.9999, against 1e-6); and lerp in fp32 gives the same bits however a tensor is cut,
so every layout of the same weights gives the same average.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch

from dist_ema.layout import Shard
from dist_ema.skipped import weight_unless

__all__ = ["Averages", "Updater", "copy_each", "cut_alike"]

# 2 MiB of fp32 scratch: stays in the cache between the copy and the lerp that reads it (measured best: 0.5 to 1
# million elements).
_SCRATCH_NUMEL = 512 * 1024

# Elements of a block of several tracks: 2 MiB of fp32 on a CPU; on a GPU it must outlast its launch and fit the cache.
_BLOCK_NUMEL = {"cpu": 512 * 1024, "cuda": 4 * 2**20}


class Averages:
    """Averaged values of one track, for the shards that this rank owns, in memory of their own."""

    def __init__(self, shards: Sequence[Shard], *, dtype: torch.dtype, device: torch.device | None) -> None:
        self._shards: tuple[Shard, ...] = tuple(shards)
        devices = [shard.live().device if device is None else device for shard in self._shards]
        self._flat: dict[torch.device, torch.Tensor] = {}
        for wanted in dict.fromkeys(devices):
            numel = sum(shard.box.numel for shard, at in zip(self._shards, devices, strict=True) if at == wanted)
            with torch.inference_mode(False):  # an inference tensor could not be updated outside that mode
                self._flat[wanted] = torch.zeros(numel, dtype=dtype, device=wanted)
        self._values = self._cut(self._flat, devices)

    def _cut(self, flat: dict[torch.device, torch.Tensor], devices: Sequence[torch.device]) -> tuple[torch.Tensor, ...]:
        filled = dict.fromkeys(flat, 0)
        views = []
        for shard, device in zip(self._shards, devices, strict=True):
            start = filled[device]
            filled[device] = stop = start + shard.box.numel
            views.append(flat[device][start:stop].view(shard.sizes))
        return tuple(views)

    @property
    def values(self) -> tuple[torch.Tensor, ...]:
        """One tensor per shard, of the shard's sizes, in the order of the shards."""
        return self._values

    @property
    def nbytes(self) -> int:
        """Bytes of averaged values on this rank."""
        return sum(flat.numel() * flat.element_size() for flat in self._flat.values())

    def views(self) -> Sequence[torch.Tensor]:
        """Other objects than before if the memory behind `values` was replaced, which does not happen to ours."""
        return ()

    @torch.no_grad()
    def copy_live(self, fqns: Collection[str] | None = None) -> None:
        """Set the averaged values to the live ones: of all tensors, or of those of these names. No communication."""
        pairs = [
            (value, shard.live())
            for value, shard in zip(self.values, self._shards, strict=True)
            if fqns is None or shard.fqn in fqns
        ]
        copy_each([value for value, _ in pairs], [live for _, live in pairs])

    @torch.no_grad()
    def replace(self, values: Sequence[torch.Tensor]) -> None:
        """Set the averaged values, one tensor of the shard's sizes per shard. No communication."""
        for averaged, value in zip(self.values, values, strict=True):
            if value is not averaged:
                averaged.copy_(value)


def copy_each(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy tensors pairwise, converted on the way."""
    if targets:  # an empty list raises
        torch._foreach_copy_(list(targets), list(sources))


class _Group(NamedTuple):
    """Live tensors that are averaged by one call, and the averaged ones of each track."""

    live: list[torch.Tensor]
    tracks: list[list[torch.Tensor]]


class Updater:
    """Moves the averages of all tracks towards the live values.

    Args:
        shards: those of the averages.
        tracks: the averages, all of one dtype and on the same devices.
        skip_nonfinite: leave out live values that are infinite or not a number, element by element.
    """

    def __init__(self, shards: Sequence[Shard], tracks: Sequence[Averages], *, skip_nonfinite: bool = False) -> None:
        self._shards = tuple(shards)
        self._tracks = tuple(tracks)
        self._skip_nonfinite = skip_nonfinite
        self._refused: dict[torch.device, torch.Tensor] = {}
        self._views: list[torch.Tensor] | None = None
        self._whole = _Group([], [])
        self._blocks: list[_Group] = []
        self._staged: list[_Group] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all averages on this rank."""
        return sum(track.nbytes for track in self._tracks)

    @property
    def num_refused(self) -> int:
        """Live values that were left out on this rank; waits for the device."""
        return sum(int(count.item()) for count in self._refused.values())

    @torch.no_grad()
    def copy_live(self, fqns: Collection[str] | None = None) -> None:
        """Set all averages, or those of these names, to the live values; 0 for those left out. No communication."""
        for track in self._tracks:
            track.copy_live(fqns)
        if self._skip_nonfinite and self._tracks:
            for shard, *values in zip(self._shards, *(track.values for track in self._tracks), strict=True):
                if fqns is None or shard.fqn in fqns:
                    self._count(~torch.isfinite(values[0]))
                    for value in values:
                        value.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def _count(self, refused: torch.Tensor) -> None:
        count = self._refused.setdefault(refused.device, torch.zeros((), dtype=torch.int64, device=refused.device))
        count += refused.sum()

    @torch.no_grad()
    def lerp(self, momenta: Sequence[float], *, unless: torch.Tensor | None = None) -> None:
        """Average: `averaged <- (1 - momentum) * averaged + momentum * live`. No communication.

        Args:
            momenta: of each track, the weight of the live values, from 0 to 1.
            unless: flag of one element; where it is not 0 nothing moves. Read on the device only.
        """
        # 0 * (live - averaged) is not 0 where live is not finite, so a momentum of 0 does nothing.
        active = [(index, momentum) for index, momentum in enumerate(momenta) if momentum != 0.0]
        if not active:
            return
        self._follow_live()
        for group in [self._whole] if len(active) == 1 else self._blocks:
            for index, momentum in active:
                _lerp(group.tracks[index], group.live, momentum, unless)
        for group in self._staged:
            scratch = [torch.empty_like(averaged) for averaged in group.tracks[0]]
            torch._foreach_copy_(scratch, group.live)
            if self._skip_nonfinite:
                self._lerp_finite(group, scratch, active, unless)
                continue
            for index, momentum in active:
                _lerp(group.tracks[index], scratch, momentum, unless)

    def _lerp_finite(
        self,
        group: _Group,
        live: list[torch.Tensor],
        active: Sequence[tuple[int, float]],
        unless: torch.Tensor | None,
    ) -> None:
        finite = [torch.isfinite(value) for value in live]
        for each in finite:
            self._count(~each)
        for index, momentum in active:
            averaged = group.tracks[index]
            # The averaged value stands for one that is left out: lerp(a, a, m) is a.
            kept = [torch.where(*three) for three in zip(finite, live, averaged, strict=True)]
            _lerp(averaged, kept, momentum, unless)

    def _follow_live(self) -> None:
        """Prepare the lists of an update, anew only if the memory behind some live tensor has been replaced.

        A view that still stands for the same memory returns the same object (see `dist_ema.layout.Held.view`).
        """
        views = [shard.held.view() for shard in self._shards]
        for track in self._tracks:
            views += track.views()
        if self._views is not None and all(map(operator.is_, views, self._views)):
            return
        self._views = views
        values = [track.values for track in self._tracks]
        direct: list[tuple[int, torch.Tensor]] = []
        staged: list[tuple[int, torch.Tensor]] = []
        for index, shard in enumerate(self._shards):
            live, averaged = shard.live(), values[0][index]
            alike = live.dtype == averaged.dtype and live.device == averaged.device and not self._skip_nonfinite
            (direct if alike else staged).append((index, live))
        self._whole = _Group(
            [live for _, live in direct], [[of_track[index] for index, _ in direct] for of_track in values]
        )
        block_numel = _BLOCK_NUMEL.get(direct[0][1].device.type, _SCRATCH_NUMEL) if direct else _SCRATCH_NUMEL
        self._blocks = self._grouped(direct, values, block_numel) if len(self._tracks) > 1 else []
        self._staged = self._grouped(staged, values, _SCRATCH_NUMEL)

    def _grouped(
        self, chosen: Sequence[tuple[int, torch.Tensor]], values: Sequence[Sequence[torch.Tensor]], numel: int
    ) -> list[_Group]:
        """Groups of at most `numel` elements. All tracks are cut alike, since their tensors lie alike."""
        by_track = [list(_groups([(of_track[index], live) for index, live in chosen], numel)) for of_track in values]
        return [_Group(same[0][1], [averaged for averaged, _ in same]) for same in zip(*by_track, strict=True)]


def _lerp(averaged: list[torch.Tensor], live: list[torch.Tensor], momentum: float, unless: torch.Tensor | None) -> None:
    if not averaged:  # a rank may own nothing; an empty list raises
        return
    if unless is None:
        torch._foreach_lerp_(averaged, live, momentum)
    else:
        weights = {value.device: weight_unless(unless, momentum, value) for value in averaged}
        for value, new in zip(averaged, live, strict=True):
            value.lerp_(new, weights[value.device])


def _groups(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], numel: int
) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Pairs of averaged and live tensors, cut and grouped so that a group is at most `numel` elements."""
    averaged_group: list[torch.Tensor] = []
    live_group: list[torch.Tensor] = []
    room = numel
    for whole_averaged, whole_live in pairs:
        for averaged, live in cut_alike(whole_averaged, whole_live, numel):
            if averaged.numel() > room and averaged_group:
                yield averaged_group, live_group
                averaged_group, live_group, room = [], [], numel
            averaged_group.append(averaged)
            live_group.append(live)
            room -= averaged.numel()
    if averaged_group:
        yield averaged_group, live_group


def cut_alike(averaged: torch.Tensor, live: torch.Tensor, numel: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a pair of equal shape into pieces of at most `numel` elements, along dims in turn."""
    if averaged.numel() <= numel:
        yield averaged, live
        return
    if averaged.is_contiguous() and live.is_contiguous():
        yield from zip(averaged.view(-1).split(numel), live.view(-1).split(numel), strict=True)
        return
    dim = next(dim for dim, size in enumerate(averaged.shape) if size > 1)
    rows = max(1, numel // math.prod(averaged.shape[dim + 1 :]))
    for averaged_rows, live_rows in zip(averaged.split(rows, dim), live.split(rows, dim), strict=True):
        yield from cut_alike(averaged_rows, live_rows, numel)
