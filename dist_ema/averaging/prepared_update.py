"""An update made ready: the blocks that it moves, for the memory that live tensors have now, and its scratch memory.

It is made at the first update, and anew whenever live memory was replaced. No communication.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import torch

from dist_ema.averaging.averages import Averages
from dist_ema.averaging.cpu_threads import SERIAL_NUMEL, num_workers, share_out
from dist_ema.averaging.fused.launches import is_ready, launch_for
from dist_ema.averaging.infinities import masks_of
from dist_ema.averaging.live_memory import Guard
from dist_ema.averaging.tensor_blocks import Block, make_blocks
from dist_ema.boxes.shards import Shard
from dist_ema.uninterrupted.jobs import Lane, Steps
from dist_ema.uninterrupted.modes import made_for_any_mode

__all__ = ["Prepared"]

# Elements of a chunk of a compensated average, so that its temporaries stay in a CPU's cache (measured: half the time).
_COMPENSATED_NUMEL = 2**17

# Elements of all averages together that are worth waking other threads for.
_FEWEST_SHARED_NUMEL = 2**20


class Prepared:
    """The lists of an update, which are valid while `is_current`.

    Attributes:
        blocks: the parts of the update.
        is_fetched: whether live values come from a device into host memory.
        is_repeated: whether updates without a flag do the same steps each time, in one thread; gradients may be on.
        watched: the shards that may have infinities.

    Args:
        shards: the shards of the averages.
        tracks: the averages, all of one dtype and on the same devices.
        skip_nonfinite: whether live values may be left out. Such work takes temporaries of the size of a block, and
            counts: it goes one block after the other.
        uncounted: names of tensors of which another rank counts what is left out.
        watched: indices of the shards that may have infinities.
        flagged: whether the update that begins has a flag.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        tracks: Sequence[Averages],
        *,
        skip_nonfinite: bool,
        uncounted: Collection[str],
        watched: frozenset[int] = frozenset(),
        flagged: bool = False,
    ) -> None:
        self.watched = watched
        # Aliases of its own: whoever has the views may ask them for a gradient.
        live = [shard.observed().detach() for shard in shards]
        filled = [index for index, value in enumerate(live) if value.numel()]
        compensated = any(track.residuals for track in tracks)
        rows = [track.values for track in tracks] + [track.residuals for track in tracks if compensated]
        self._live = [live[index] for index in filled]
        self._averaged = [[row[index] for index in filled] for row in rows]
        others = [held for track in tracks for held in track.held_by_teacher()]
        of_live = [shard.held for shard in shards if shard.held.source is None]
        of_sources = [shard.observed for shard in shards if shard.held.source is not None]
        self._guard = Guard(list(dict.fromkeys([*of_live, *others])), of_sources)
        on_cpu = all(value.device.type == "cpu" for values in (self._live, *self._averaged) for value in values)
        numel = sum(value.numel() for values in self._averaged for value in values)
        self._workers = num_workers() if on_cpu and numel >= _FEWEST_SHARED_NUMEL and not skip_nonfinite else 1
        if self._workers > 1:
            # All views of a buffer share one version; every tensor needs its own, which shows an interrupted thread
            # whether it has moved that tensor.
            with made_for_any_mode():
                self._averaged = [[value.data for value in values] for values in self._averaged]
        chunk_numel = SERIAL_NUMEL if self._workers > 1 else _COMPENSATED_NUMEL if on_cpu and compensated else None
        fuse = partial(launch_for, num_tracks=len(tracks), skips=skip_nonfinite, shared=bool(others), flagged=flagged)
        self.blocks: list[Block] = []
        kinds: dict[tuple[bool, bool, tuple[float, ...]], list[int]] = {}
        for at, index in enumerate(filled):
            masks = masks_of(shards[index]) if index in watched else ()
            kinds.setdefault((shards[index].fqn not in uncounted, index in watched, masks), []).append(at)
        for (counted, is_watched, masks), positions in kinds.items():
            self.blocks += make_blocks(
                [self._live[at] for at in positions],
                [[row[at] for at in positions] for row in self._averaged],
                whole=len(rows) == 1 and not skip_nonfinite and not is_watched,
                chunk_numel=chunk_numel,
                counted=counted,
                watched=is_watched,
                masks=masks,
                fuse=None if is_watched else partial(fuse, counts=counted and skip_nonfinite),
            )
        self._launches = [block.launch for block in self.blocks if block.launch is not None]
        # Neither another thread nor a later update could write to an inference tensor.
        with made_for_any_mode():
            self._scratches = self._make_scratches()
            self._landings = self._make_landings(pinned=not on_cpu)
            for index, block in enumerate(self.blocks if self._landings else ()):
                block.land_in(self._landings[index % 2])
        self.is_fetched = bool(self._landings)
        self.is_repeated = self._workers == 1 and not (self.is_fetched or watched)

    def is_current(self, *, flagged: bool) -> bool:
        """Whether live tensors and averages have the memory that they had, and launches can go, with a flag or not."""
        return self._guard.is_current() and (
            not self._launches
            or all(launch.is_current() and is_ready(launch, flagged=flagged) for launch in self._launches)
        )

    def used(self) -> Iterator[torch.Tensor]:
        """All tensors that the work reads or writes."""
        tables = (launch.used() for launch in self._launches)
        return itertools.chain(self._live, *self._averaged, *self._scratches.values(), *tables)

    def lanes(self, make: Callable[[Sequence[Block], int], Steps]) -> list[Lane]:
        """Lanes for all blocks; `make(blocks, worker)` returns the steps that move some of the blocks."""
        if self._workers == 1:
            return [Lane(partial(make, self.blocks))]
        return [Lane(partial(make, [block])) for block in self.blocks]

    @property
    def share(self) -> Callable[[Sequence[Lane]], None] | None:
        """Does the lanes in as many threads as are worth it; None where that is this one."""
        return None if self._workers == 1 else self._share_out

    def _share_out(self, lanes: Sequence[Lane]) -> None:
        share_out(Lane.run, lanes, self._workers)

    def brought(self, blocks: Sequence[Block], worker: int, steps: Steps) -> Iterator[tuple[Block, list[torch.Tensor]]]:
        """The blocks, with tensors of the live values in the averages' dtype and on their device.

        They have these values after the steps that were added so far, and before the steps of the next block: every
        second fetched block lands in the same host memory.
        """
        if self.is_fetched:
            steps.again(blocks[0].fetch)
        for block, following in itertools.zip_longest(blocks, blocks[1:]):
            if self.is_fetched and following is not None:
                steps.again(following.fetch)
            yield block, block.bring(self._scratches[block.tracks[0][0].device][worker], steps)

    def _make_scratches(self) -> dict[torch.device, list[torch.Tensor]]:
        """Scratch memory for every thread, on every device."""
        numel = max((block.scratch_numel for block in self.blocks), default=0)
        wanted = {value.device: value.dtype for value in itertools.chain(*self._averaged[:1])}
        return {
            device: [torch.empty(numel, dtype=dtype, device=device) for _ in range(self._workers)]
            for device, dtype in wanted.items()
        }

    def _make_landings(self, *, pinned: bool) -> list[torch.Tensor]:
        nbytes = max((block.landing_bytes for block in self.blocks), default=0)
        count = 2 if nbytes else 0
        return [torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned) for _ in range(count)]
