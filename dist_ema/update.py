"""The update that moves the averages of this rank. No communication, ever.

Live values of the averages' dtype and device are averaged in place by one `_foreach_lerp_` over prepared lists. Others
(bfloat16 weights into float32 averages, averages kept on another device) pass through a bounded scratch; so do many
tiny tensors on a CPU, which are packed end to end. Several tracks go block by block, so that a block of live values is
read from memory once and from the cache after that. On several CPU threads blocks are shared out (workers.py). What
comes from a device into host memory is fetched one block ahead. All of it may run beside training (streams.py).

`lerp` and not `mul` + `add`: fp32(1 - m) + fp32(m) is not 1, so the second form drifts (3e-5 relative after
2,000 updates at a decay of 0.9999, against 1e-6); and lerp in fp32 gives the same bits however a tensor is cut,
so every layout of the same weights gives the same average.

[Note: compensation]
An fp32 average moves by m * (live - averaged), which at a decay of 0.99999 is about a rounding unit of the average:
much of it is lost. A compensated average also keeps what each step lost, in bfloat16, and adds it to the next (Kahan's
sum). Its operations are single ones, not fused, so that the bits do not depend on how a tensor is cut either.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from dist_ema.averages import Averages
from dist_ema.blocks import Block
from dist_ema.layout import Shard
from dist_ema.prepared import Prepared
from dist_ema.skipped import weight_unless
from dist_ema.streams import Stream

__all__ = ["Updater"]


class Updater:
    """Moves the averages of all tracks towards the live values.

    Args:
        shards: those of the averages.
        tracks: the averages, all of one dtype and on the same devices.
        skip_nonfinite: leave out live values that are infinite or not a number, element by element.
        uncounted: names of tensors of which another rank counts what is left out.
        stream: where the averages are moved; None for the current one.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        tracks: Sequence[Averages],
        *,
        skip_nonfinite: bool = False,
        uncounted: Collection[str] = (),
        stream: Stream | None = None,
    ) -> None:
        self._shards = tuple(shards)
        self._tracks = tuple(tracks)
        self._skip_nonfinite = skip_nonfinite
        self._uncounted = frozenset(uncounted) if skip_nonfinite else frozenset()
        self.stream = Stream() if stream is None else stream
        self._compensated = any(track.residuals for track in self._tracks)
        self._refused: dict[torch.device, torch.Tensor] = {}
        self._prepared: Prepared | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which prepares its own lists; the events of these could not be copied."""
        return self.__dict__ | {"_prepared": None}

    @property
    def nbytes(self) -> int:
        """Bytes of all averages on this rank."""
        return sum(track.nbytes for track in self._tracks)

    @property
    def num_refused(self) -> int:
        """Live values that were left out on this rank; waits for the device."""
        self.stream.join()
        return sum(int(count.item()) for count in self._refused.values())

    @torch.no_grad()
    def copy_live(self, fqns: Collection[str] | None = None, *, counted: bool = True) -> None:
        """Set all averages, or those of these names, to the live values; 0 for those left out. No communication.

        Args:
            fqns: names of tensors; None for all.
            counted: count what is left out; not where an average is only shown, and the next update copies again.
        """
        self.stream.join()
        for track in self._tracks:
            track.copy_live(fqns)
        if self._skip_nonfinite and self._tracks:
            for shard, *values in zip(self._shards, *(track.values for track in self._tracks), strict=True):
                if fqns is None or shard.fqn in fqns:
                    if counted and shard.fqn not in self._uncounted:
                        self._count(~torch.isfinite(values[0]))
                    for value in values:
                        value.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def _count(self, refused: torch.Tensor) -> None:
        if refused.device not in self._refused:
            with torch.inference_mode(False):
                self._refused[refused.device] = torch.zeros((), dtype=torch.int64, device=refused.device)
            self.stream.keep([self._refused[refused.device]])
        self._refused[refused.device] += refused.sum()

    @torch.no_grad()
    def lerp(self, momenta: Sequence[float], *, unless: torch.Tensor | None = None) -> None:
        """Average: `averaged <- (1 - momentum) * averaged + momentum * live`. No communication.

        Done when `stream` is joined; until then nobody may write to the live values.

        Args:
            momenta: of each track, the weight of the live values, from 0 to 1.
            unless: flag of one element; where it is not 0 nothing moves. Read on the device only.
        """
        # 0 * (live - averaged) is not 0 where live is not finite, so a momentum of 0 does nothing.
        active = [(index, momentum) for index, momentum in enumerate(momenta) if momentum != 0.0]
        if not active:
            return
        prepared = self._ready()
        flag = None if unless is None else self.stream.hold(unless)
        self.stream.run(lambda: self._move_all(prepared, active, flag))

    def _ready(self) -> Prepared:
        if self._prepared is None or not self._prepared.holds():
            self._prepared = None  # its memory goes before the new one comes
            self._prepared = Prepared(
                self._shards,
                self._tracks,
                skip_nonfinite=self._skip_nonfinite,
                uncounted=self._uncounted,
            )
            self.stream.keep(self._prepared.used())
        return self._prepared

    def _move_all(self, prepared: Prepared, active: Sequence[tuple[int, float]], unless: torch.Tensor | None) -> None:
        """The part of an update that touches tensors only."""
        if prepared.is_fetched and unless is not None:
            # Told once, before copies are under way that the flag would come after.
            if unless.item() != 0.0:
                return
            unless = None

        def work(block: Block, live: list[torch.Tensor]) -> None:
            if self._skip_nonfinite:
                self._lerp_finite(block, live, active, unless)
                return
            for index, momentum in active:
                self._move(block, index, live, momentum, unless)

        prepared.for_each(work)

    def _lerp_finite(
        self,
        block: Block,
        live: list[torch.Tensor],
        active: Sequence[tuple[int, float]],
        unless: torch.Tensor | None,
    ) -> None:
        finite = [torch.isfinite(value) for value in live]
        for each in finite if block.counted else ():
            self._count(~each)
        for index, momentum in active:
            averaged = block.tracks[index]
            # The averaged value stands for one that is left out: lerp(a, a, m) is a.
            kept = [torch.where(*three) for three in zip(finite, live, averaged, strict=True)]
            self._move(block, index, kept, momentum, unless)

    def _move(
        self,
        block: Block,
        index: int,
        live: list[torch.Tensor],
        momentum: float,
        unless: torch.Tensor | None,
    ) -> None:
        if self._compensated:
            residuals = block.tracks[len(self._tracks) + index]
            _compensated_lerp(block.tracks[index], residuals, live, momentum, unless)
        else:
            _lerp(block.tracks[index], live, momentum, unless)


def _lerp(averaged: list[torch.Tensor], live: list[torch.Tensor], momentum: float, unless: torch.Tensor | None) -> None:
    if unless is None:
        torch._foreach_lerp_(averaged, live, momentum)
    else:
        of_devices = {value.device: value for value in averaged}
        weights = {device: weight_unless(unless, momentum, value) for device, value in of_devices.items()}
        for value, new in zip(averaged, live, strict=True):
            value.lerp_(new, weights[value.device])


def _compensated_lerp(
    averaged: list[torch.Tensor],
    residuals: list[torch.Tensor],
    live: list[torch.Tensor],
    momentum: float,
    unless: torch.Tensor | None,
) -> None:
    """See [Note: compensation]: averaged + residual is what is averaged."""
    if momentum == 1.0:  # the live values themselves, which averaged + (live - averaged) need not be
        _lerp(averaged, live, momentum, unless)
        for residual in residuals:
            residual.mul_(0.0 if unless is None else 1.0 - weight_unless(unless, momentum, residual))
        return
    skips: dict[torch.device, torch.Tensor] = {}
    if unless is not None:
        skips = {device: (unless.reshape(()) != 0).to(device) for device in {value.device for value in averaged}}
    for value, residual, new in zip(averaged, residuals, live, strict=True):
        step = (new - value).mul_(momentum)
        moved = residual.to(value.dtype).mul_(1.0 - momentum)
        step.add_(moved)
        torch.add(value, step, out=moved)
        lost = step.add_(value - moved)
        if unless is not None:
            skipped = skips[value.device]
            moved, lost = torch.where(skipped, value, moved), torch.where(skipped, residual.to(value.dtype), lost)
        value.copy_(moved)
        residual.copy_(lost)
