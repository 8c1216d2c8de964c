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

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from dist_ema.averages import Averages
from dist_ema.blocks import Block, make_blocks
from dist_ema.guard import Guard
from dist_ema.layout import Shard
from dist_ema.skipped import weight_unless
from dist_ema.streams import Stream
from dist_ema.workers import SERIAL_NUMEL, num_workers, share_out

__all__ = ["Updater"]

# Elements of a piece of a compensated average, so that its temporaries stay in the cache (measured: half the time).
_COMPENSATED_NUMEL = 2**17

# Elements of all averages together that are worth waking other threads for.
_FEWEST_SHARED_NUMEL = 2**20


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
        self._compensated = bool(self._tracks) and any(track.residuals for track in self._tracks)
        self._refused: dict[torch.device, torch.Tensor] = {}
        self._guard: Guard | None = None
        self._blocks: list[Block] = []
        self._workers = 1
        # One for each thread, on each device.
        self._scratches: dict[torch.device, list[torch.Tensor]] = {}
        self._landings: list[torch.Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which prepares its own lists; events could not be copied."""
        return self.__dict__ | {"_guard": None, "_blocks": [], "_scratches": {}, "_landings": []}

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
        self.stream.join()
        if self._guard is None or not self._guard.holds():
            self._prepare()
        flag = None if unless is None else self.stream.hold(unless)
        self.stream.run(lambda: self._move_all(active, flag))

    def _move_all(self, active: Sequence[tuple[int, float]], unless: torch.Tensor | None) -> None:
        """The part of an update that touches tensors only."""

        def work(block: Block, worker: int) -> None:
            values = block.values(self._scratches[block.tracks[0][0].device][worker])
            if self._skip_nonfinite:
                self._lerp_finite(block, values, active, unless)
                return
            for index, momentum in active:
                self._move(block, index, values, momentum, unless)

        if not self._landings:
            share_out(work, self._blocks, self._workers)
            return
        # Once, and before copies are under way that it would wait for.
        if unless is not None and unless.item() != 0.0:
            return
        unless = None
        for block in self._fetched():
            work(block, 0)

    def _fetched(self) -> Iterator[Block]:
        """The blocks, the next one on its way while one is worked on: it lands where the one before has been used."""
        self._blocks[0].fetch()
        for block, following in zip(self._blocks, [*self._blocks[1:], None], strict=True):
            if following is not None:
                following.fetch()
            yield block

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

    def _prepare(self) -> None:
        """Make the blocks of an update, for the memory that the live tensors have now."""
        self._guard = None  # until all is made: an exception midway must not leave half of it in use
        live = [shard.live() for shard in self._shards]
        filled = [index for index, value in enumerate(live) if value.numel()]
        live = [live[index] for index in filled]
        rows = [track.values for track in self._tracks]
        if self._compensated:
            rows += [track.residuals for track in self._tracks]
        tracks = [[row[index] for index in filled] for row in rows]
        others = [held for track in self._tracks for held in track.held()]
        guard = Guard(list(dict.fromkeys([*(shard.held for shard in self._shards), *others])))
        on_cpu = all(value.device.type == "cpu" for values in (live, *tracks) for value in values)
        numel = sum(value.numel() for values in tracks for value in values)
        # Refused values are counted in one place: not for several threads.
        self._workers = num_workers() if on_cpu and numel >= _FEWEST_SHARED_NUMEL and not self._skip_nonfinite else 1
        self._blocks = []
        for counted in (True, False):
            chosen = [i for i, index in enumerate(filled) if (self._shards[index].fqn in self._uncounted) != counted]
            self._blocks += make_blocks(
                [live[index] for index in chosen],
                [[row[index] for index in chosen] for row in tracks],
                whole=len(tracks) == 1 and not self._skip_nonfinite,  # else there are temporaries, or several tracks
                piece_numel=SERIAL_NUMEL if self._workers > 1 else _COMPENSATED_NUMEL if self._compensated else None,
                counted=counted,
            )
        self._scratches = self._allocate({value.device: value.dtype for value in (tracks[0] if tracks else ())})
        self._landings = self._make_landings(pinned=not on_cpu)
        with torch.inference_mode(False):
            for index, block in enumerate(self._blocks if self._landings else ()):
                block.land_in(self._landings[index % 2])
        scratches = itertools.chain(*self._scratches.values())
        self.stream.keep([*live, *itertools.chain(*tracks), *scratches])
        self._guard = guard

    def _allocate(self, wanted: Mapping[torch.device, torch.dtype]) -> dict[torch.device, list[torch.Tensor]]:
        numel = max((block.scratch_numel for block in self._blocks), default=0)
        # Neither another thread nor a later update could write to an inference tensor.
        with torch.inference_mode(False):
            return {
                device: [torch.empty(numel, dtype=dtype, device=device) for _ in range(self._workers)]
                for device, dtype in wanted.items()
            }

    def _make_landings(self, *, pinned: bool) -> list[torch.Tensor]:
        nbytes = max((block.landing_bytes for block in self._blocks), default=0)
        if nbytes == 0 or (self._landings and self._landings[0].numel() == nbytes):
            return self._landings if nbytes else []
        with torch.inference_mode(False):
            return [torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned) for _ in range(2)]


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
    skips = (
        {} if unless is None else {at: (unless.reshape(()) != 0).to(at) for at in {each.device for each in averaged}}
    )
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
