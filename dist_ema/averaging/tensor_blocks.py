"""The parts of an update: blocks of live tensors, with the averaged tensors of every track. No communication."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from dist_ema.averaging.averages import ALIGNED_NUMEL, aligned, copy_pairwise, copying
from dist_ema.averaging.fused.launches import Launch, can_move, is_aligned
from dist_ema.averaging.streams import has_streams
from dist_ema.uninterrupted.jobs import Steps
from dist_ema.uninterrupted.modes import made_for_any_mode

__all__ = ["SCRATCH_NUMEL", "Block", "by_strides", "cut_alike", "make_blocks"]

# Elements of a block: 4 MiB of fp32 stay in a CPU's cache between the copy and the lerp that reads them, or from one
# track to the next, and are long enough to stream (measured best: 0.5 to 1.5 million elements, for one track and for
# three). On a GPU a block must outlast its launch and fit the cache.
SCRATCH_NUMEL = 2**20
_BLOCK_NUMEL = {"cuda": 4 * 2**20}

# A tensor of fewer elements is cheaper packed than averaged by itself (measured: 0.1 and 0.45 us of host time each).
_TINY_NUMEL = 2048
_FEWEST_PACKED = 4

# Elements of all averages of a small model, whose blocks go as one: a call takes as long as the lerp of 3,000 elements.
_TOGETHER_NUMEL = 2**17

_ALIGNED_BYTES = 64


class Block:
    """Live tensors that are averaged together.

    Attributes:
        tracks: for every track its averaged tensors, shaped like those that `bring` gives.
        scratch_numel: the elements of scratch that `bring` needs.
        landing_bytes: the bytes of host memory that `fetch` needs.
        counted: whether this rank counts which live values are left out.
        watched: whether there may be infinities on either side (`dist_ema.averaging.infinities`).
        masks: the infinities of the live tensors that are no overflow.
        launch: does the whole update of the block in one kernel; None if torch's kernels do it.
    """

    scratch_numel = 0
    landing_bytes = 0
    counted = True
    watched = False
    masks: tuple[float, ...] = ()
    launch: Launch | None = None

    def __init__(self, live: list[torch.Tensor], tracks: list[list[torch.Tensor]]) -> None:
        self._live = live
        self.tracks = tracks

    def land_in(self, landing: torch.Tensor) -> None:
        """Have `fetch` use these bytes of host memory."""

    def fetch(self) -> None:
        """Begin to copy live values of another device; the host does not wait. It comes before the steps of `bring`."""

    def bring(self, scratch: torch.Tensor, steps: Steps) -> list[torch.Tensor]:
        """Tensors with the live values, in the averages' dtype and on their device, when these steps are done."""
        return self._live


class _Staged(Block):
    """Live tensors that are converted."""

    def __init__(self, live: list[torch.Tensor], tracks: list[list[torch.Tensor]]) -> None:
        super().__init__(live, tracks)
        self._sizes = [aligned(value.numel(), ALIGNED_NUMEL) for value in live]
        self.scratch_numel = sum(self._sizes)
        # The latest scratch and its parts: cutting it takes longer than copying a small tensor.
        self._cut: tuple[torch.Tensor | None, list[torch.Tensor]] = (None, [])

    def bring(self, scratch: torch.Tensor, steps: Steps) -> list[torch.Tensor]:
        known, parts = self._cut
        if known is not scratch:
            flat = scratch[: self.scratch_numel].split_with_sizes(self._sizes)
            parts = [part[: value.numel()].view(value.shape) for part, value in zip(flat, self._live, strict=True)]
            self._cut = scratch, parts
        steps.again(copying(parts, self._live))
        return parts


class _Fetched(_Staged):
    """Live tensors of a device, whose averages are in host memory: they are copied as they are, and converted there."""

    def __init__(self, live: list[torch.Tensor], tracks: list[list[torch.Tensor]]) -> None:
        super().__init__(live, tracks)
        self._source = live
        if all(value.dtype == own.dtype for value, own in zip(live, tracks[0], strict=True)):
            self.scratch_numel = 0
        # A part begins at a byte where a tensor of any dtype may.
        *self._starts, self.landing_bytes = itertools.accumulate(
            (aligned(value.nbytes, _ALIGNED_BYTES) for value in live), initial=0
        )
        modules = {value.device: torch.get_device_module(value.device) for value in live}
        # The host sleeps until an arrival: the first one comes only when the device has done the step.
        options = {device: {"blocking": True} if device.type == "cuda" else {} for device in modules}
        self._arrivals = [(of.Event(**options[device]), of, device) for device, of in modules.items()]

    def land_in(self, landing: torch.Tensor) -> None:
        self._live = [
            landing[start : start + value.nbytes].view(value.dtype).view(value.shape)
            for start, value in zip(self._starts, self._source, strict=True)
        ]

    def fetch(self) -> None:
        copy_pairwise(self._live, self._source, non_blocking=True)
        for arrival, of, device in self._arrivals:
            arrival.record(of.current_stream(device))

    def bring(self, scratch: torch.Tensor, steps: Steps) -> list[torch.Tensor]:
        for arrival, _, _ in self._arrivals:
            steps.again(arrival.synchronize)
        return super().bring(scratch, steps) if self.scratch_numel else self._live


class _Packed(Block):
    """Tiny live tensors, whose averaged ones lie end to end: one flat tensor for every track."""

    def __init__(self, live: list[torch.Tensor], tracks: list[list[torch.Tensor]]) -> None:
        self._numel = sum(value.numel() for value in live)
        self.scratch_numel = self._start = aligned(self._numel, ALIGNED_NUMEL)
        own = tracks[0][0]
        if live[0].dtype != own.dtype:
            nbytes = self._numel * live[0].element_size()
            self.scratch_numel += aligned(math.ceil(nbytes / own.element_size()), ALIGNED_NUMEL)
        flat = [[averaged[0].as_strided((self._numel,), (1,))] for averaged in tracks]
        super().__init__([value.view(-1) for value in live], flat)

    def bring(self, scratch: torch.Tensor, steps: Steps) -> list[torch.Tensor]:
        packed = scratch[: self._numel]
        dtype = self._live[0].dtype
        if dtype == packed.dtype:
            steps.again(partial(torch.cat, self._live, out=packed))
        else:  # to convert while packing is slower
            with made_for_any_mode():  # the steps may be done again in another mode
                unconverted = scratch[self._start : self.scratch_numel].view(dtype)[: self._numel]
            steps.again(partial(torch.cat, self._live, out=unconverted))
            steps.again(partial(packed.copy_, unconverted))
        return [packed]


class _Together(Block):
    """Several blocks of a small model: one lerp for all."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._sizes = [aligned(block.scratch_numel, ALIGNED_NUMEL) for block in blocks]
        self.scratch_numel = sum(self._sizes)
        rows = zip(*(block.tracks for block in blocks), strict=True)
        super().__init__([], [[value for values in row for value in values] for row in rows])

    def bring(self, scratch: torch.Tensor, steps: Steps) -> list[torch.Tensor]:
        brought: list[torch.Tensor] = []
        parts = scratch[: self.scratch_numel].split_with_sizes(self._sizes)
        for block, part in zip(self._blocks, parts, strict=True):
            brought += block.bring(part, steps)
        return brought


def make_blocks(
    live: Sequence[torch.Tensor],
    tracks: Sequence[Sequence[torch.Tensor]],
    *,
    whole: bool = False,
    chunk_numel: int | None = None,
    counted: bool = True,
    watched: bool = False,
    masks: tuple[float, ...] = (),
    fuse: Callable[..., Launch | None] | None = None,
) -> list[Block]:
    """Blocks that cover these tensors.

    Args:
        live: the live tensors; at least one, and none of them empty.
        tracks: for every track its averaged tensors, of the same shapes; all of one dtype, and laid out alike.
        whole: whether all tensors that need no scratch are one block.
        chunk_numel: the most elements of a chunk, if tensors are to be cut.
        counted: an attribute of the blocks.
        watched: an attribute of the blocks.
        masks: an attribute of the blocks.
        fuse: makes the launch of one kernel for live tensors and their averaged ones, or returns None.
    """
    is_small = _is_small(live, tracks)
    packs, rest = _packs(live, tracks, _TOGETHER_NUMEL if is_small else _TINY_NUMEL)
    blocks: list[Block] = [_Packed(*_selected(pack, live, tracks)) for pack in packs]
    if fuse is not None:
        fused, rest = _fused(rest, live, tracks, fuse)
        blocks += fused
    kinds: dict[type[Block], list[int]] = {Block: [], _Staged: [], _Fetched: []}
    for index in rest:
        kinds[_kind(live[index], tracks[0][index])].append(index)
    for kind, indices in kinds.items():
        for alike in by_strides(indices, live, tracks[0]):
            if kind is Block and whole and chunk_numel is None:
                blocks.append(Block(*_selected(alike, live, tracks)))
                continue
            numel = _BLOCK_NUMEL.get(tracks[0][alike[0]].device.type, SCRATCH_NUMEL)
            blocks += [kind(*tensors) for tensors in _cut_to_size(*_selected(alike, live, tracks), numel, chunk_numel)]
    if is_small and len(blocks) > 1 and not any(block.launch or block.landing_bytes for block in blocks):
        blocks = [_Together(blocks)]
    for block in blocks:
        block.counted, block.watched, block.masks = counted, watched, masks
    return blocks


def _is_small(live: Sequence[torch.Tensor], tracks: Sequence[Sequence[torch.Tensor]]) -> bool:
    """Whether these tensors on a CPU go as one block."""
    on_cpu = all(value.device.type == "cpu" for value in itertools.chain(live, *tracks))
    return on_cpu and sum(value.numel() for averaged in tracks for value in averaged) <= _TOGETHER_NUMEL


def _fused(
    indices: Sequence[int],
    live: Sequence[torch.Tensor],
    tracks: Sequence[Sequence[torch.Tensor]],
    fuse: Callable[..., Launch | None],
) -> tuple[list[Block], list[int]]:
    """A block for each kernel that one launch can do; and the indices of all other tensors."""
    alike: dict[object, list[int]] = {}
    rest: list[int] = []
    for index in indices:
        value, rows = live[index], [averaged[index] for averaged in tracks]
        kind = (value.device, value.dtype, is_aligned(value, *rows)) if can_move(value, rows) else None
        (rest if kind is None else alike.setdefault(kind, [])).append(index)
    blocks: list[Block] = []
    for of_kind in alike.values():
        tensors = _selected(of_kind, live, tracks)
        launch = fuse(*tensors)
        if launch is None:
            rest += of_kind
        else:
            blocks.append(Block(*tensors))
            blocks[-1].launch = launch
    return blocks, sorted(rest)


def _selected(
    indices: Sequence[int], live: Sequence[torch.Tensor], tracks: Sequence[Sequence[torch.Tensor]]
) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    return [live[index] for index in indices], [[averaged[index] for index in indices] for averaged in tracks]


def _kind(live: torch.Tensor, averaged: torch.Tensor) -> type[Block]:
    if _is_afar(live, averaged):
        return _Fetched
    return Block if live.dtype == averaged.dtype and live.device == averaged.device else _Staged


def _is_afar(live: torch.Tensor, averaged: torch.Tensor) -> bool:
    return averaged.device.type == "cpu" != live.device.type and has_streams(live.device)


def by_strides(
    indices: Sequence[int], live: Sequence[torch.Tensor], averaged: Sequence[torch.Tensor]
) -> list[list[int]]:
    """The indices in lists for one call: off the CPU, tensors whose strides differ from their averages' stand apart.

    One such pair (channels_last, say) in a list makes torch launch the whole list tensor by tensor.
    """
    alike: list[int] = []
    others: list[int] = []
    for index in indices:
        on_cpu = live[index].device.type == "cpu"
        (alike if on_cpu or live[index].stride() == averaged[index].stride() else others).append(index)
    return [listed for listed in (alike, others) if listed]


def _packs(
    live: Sequence[torch.Tensor], tracks: Sequence[Sequence[torch.Tensor]], converted_numel: int
) -> tuple[list[list[int]], list[int]]:
    """Runs of tiny tensors on the CPU whose averaged ones lie end to end; and the indices of all other tensors.

    Those that are converted, and so copied in any case, have at most `converted_numel` elements.
    """
    runs: list[list[int]] = []
    rest: list[int] = []
    stop = numel = 0
    for index, (value, *averaged) in enumerate(zip(live, *tracks, strict=True)):
        on_cpu = value.device.type == averaged[0].device.type == "cpu"
        most = _TINY_NUMEL if value.dtype == averaged[0].dtype else converted_numel
        if not on_cpu or value.numel() > most or not all(map(torch.Tensor.is_contiguous, (value, *averaged))):
            rest.append(index)
            continue
        follows = runs and index == runs[-1][-1] + 1 and averaged[0].data_ptr() == stop
        # A teacher's tensors may lie end to end by chance, or be mapped from one file.
        follows = follows and _share_storage(averaged[0], tracks[0][index - 1])
        if follows and live[index - 1].dtype == value.dtype and numel + value.numel() <= SCRATCH_NUMEL:
            runs[-1].append(index)
            numel += value.numel()
        else:
            runs.append([index])
            numel = value.numel()
        stop = averaged[0].data_ptr() + averaged[0].nbytes
    packs = [run for run in runs if len(run) >= _FEWEST_PACKED]
    rest += [index for run in runs if len(run) < _FEWEST_PACKED for index in run]
    return packs, sorted(rest)


def _share_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _cut_to_size(
    live: Sequence[torch.Tensor],
    tracks: Sequence[Sequence[torch.Tensor]],
    numel: int,
    chunk_numel: int | None,
) -> Iterator[tuple[list[torch.Tensor], list[list[torch.Tensor]]]]:
    """The tensors, cut and put together so that a list has at most `numel` elements, for all tracks alike."""
    live_chunks: list[torch.Tensor] = []
    track_chunks: list[list[torch.Tensor]] = [[] for _ in tracks]
    room = numel
    for whole, *averaged in zip(live, *tracks, strict=True):
        cuts = [list(cut_alike(of_track, whole, chunk_numel or numel)) for of_track in averaged]
        for chunks in zip(*cuts, strict=True):
            chunk = chunks[0][1]
            if chunk.numel() > room and live_chunks:
                yield live_chunks, track_chunks
                live_chunks, track_chunks, room = [], [[] for _ in tracks], numel
            live_chunks.append(chunk)
            for of_track, (averaged_chunk, _) in zip(track_chunks, chunks, strict=True):
                of_track.append(averaged_chunk)
            room -= chunk.numel()
    if live_chunks:
        yield live_chunks, track_chunks


def cut_alike(averaged: torch.Tensor, live: torch.Tensor, numel: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a pair of equal shape into chunks of at most `numel` elements, along dims in turn."""
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
