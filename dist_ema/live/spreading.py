"""Putting the averaged weights into the live model, and the live ones back.

Owners write their boxes into the live tensors. Where several ranks hold the same tensor (DDP, Replicate axes), each
owner then broadcasts its run to the others, in buckets of bounded size. There every rank also gets the buffers of
rank 0, which are those of the files. Under plain FSDP nothing is communicated, and each rank keeps its own buffers.
The live values are kept aside first: one copy of what this rank holds of the averaged tensors. All persistent buffers
are kept aside too, since a forward within the swap may change them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from dist_ema.averaging.tensor_blocks import cut_alike
from dist_ema.boxes.owners import Division
from dist_ema.boxes.plan import Plan
from dist_ema.boxes.shards import Box, Shard
from dist_ema.ranks.broadcasts import broadcast_steps
from dist_ema.uninterrupted.jobs import Job, Lane, Steps

__all__ = ["LiveBackup", "put_average", "spread", "spread_all"]

# Small tensors are packed until a bucket has this many bytes; a larger contiguous tensor is sent as it lies.
_BUCKET_BYTES = 8 * 2**20

_NO_BUFFERS: Mapping[Box, torch.Tensor] = {}


class LiveBackup:
    """The live values of all averaged tensors and all persistent buffers that this rank holds, kept aside.

    No communication. The caller has checked that the model is the planned one.

    Attributes:
        is_restored: whether the live values were put back.
    """

    @torch.no_grad()
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._held = [held for division in plan.divisions if division.averaged for held in division.held]
        self._values = [held.values().clone(memory_format=torch.preserve_format) for held in self._held]
        # A swap changes the buffers that other ranks own; a forward within the swap may change all of them.
        for division in plan.live_buffers(extra_state=False).divisions:
            self._held += division.held
            self._values += [torch.empty_like(live).copy_(live) for live in (held.values() for held in division.held)]
        self.is_restored = False

    @torch.no_grad()
    def restore(self, *, anyway: bool = False) -> None:
        """Put the kept values back, bit for bit; after an interrupt, again from the beginning. No communication.

        Args:
            anyway: put the values back also if gathered copies cannot be dropped, which then raises: what is saved and
                stepped from now on must be live.
        """
        try:
            self._plan.drop_gathered()
        except BaseException:
            if anyway:
                self._put_back()
            raise
        self._put_back()

    def _put_back(self) -> None:
        if not self.is_restored:
            for held, value in zip(self._held, self._values, strict=True):
                held.restore(value)
            self.is_restored = True


def put_average(
    plan: Plan,
    values: Sequence[torch.Tensor],
    meeting: Sequence[Callable[[], None]] = (),
    buffers: Mapping[Box, torch.Tensor] = _NO_BUFFERS,
    weight: float = 1.0,
) -> None:
    """Collective along replicas only: every rank that holds the same tensors must call it.

    An interrupt does not cut off what the ranks have begun together: it is raised afterwards.

    Args:
        plan: the model as boxes.
        values: averaged values of `plan.owned(averaged=True)`, converted to the live dtypes on the way.
        meeting: steps after which no rank can stay out; see `Channel.meeting`.
        buffers: as for `spread_all`.
        weight: the weight of the averaged values; the live ones have the rest.
    """
    plan.drop_gathered()
    spread_all(plan, values, lambda shard: shard.live(), meeting, buffers, weight=weight)


def spread_all(
    plan: Plan,
    values: Sequence[torch.Tensor],
    target: Callable[[Shard], torch.Tensor | None],
    meeting: Sequence[Callable[[], None]] = (),
    buffers: Mapping[Box, torch.Tensor] = _NO_BUFFERS,
    *,
    extra_state: bool = False,
    weight: float = 1.0,
) -> None:
    """As `spread`, and where that communicates all ranks are also given the buffers that their owner has.

    Elsewhere each rank gets its own kept ones.

    Args:
        plan: the model as boxes.
        values: averaged values of `plan.owned(averaged=True)`, converted on the way.
        target: as for `spread`.
        meeting: as for `put_average`.
        buffers: what this rank holds of the buffers that are kept with the average; else their live values count.
        extra_state: whether what `get_extra_state` returns is among the buffers.
        weight: the weight of the averaged values; what the targets have has the rest.
    """
    given: list[_Given] = [(plan, values, True)]
    own: list[tuple[torch.Tensor, torch.Tensor]] = []
    shown = plan.live_buffers(extra_state=extra_state)
    if plan.has_replicas:
        owned = shown.owned(averaged=False)
        shared = [shard.within(buffers.get(shard.held.box, shard.held.values())) for shard in owned]
        given.append((shown, shared, False))
    elif buffers:
        held = [piece for division in shown.divisions for piece in division.held if piece.box in buffers]
        pairs = ((target(Shard(piece, piece.box)), buffers[piece.box]) for piece in held)
        own += [(shown_there, value) for shown_there, value in pairs if shown_there is not None]
    _spread(given, target, meeting, own, weight)


def spread(
    plan: Plan, values: Sequence[torch.Tensor], target: Callable[[Shard], torch.Tensor | None], *, averaged: bool = True
) -> None:
    """Collective along replicas only: every rank that holds the same tensors must call it.

    Args:
        plan: the model as boxes.
        values: values of `plan.owned(averaged=averaged)`, converted on the way.
        target: returns the tensor that is to have the values of a shard, on its owner and on all ranks that hold it;
            None to leave it out, on all of them alike.
        averaged: whether the averaged tensors are spread, or those that always show the live values.
    """
    _spread([(plan, values, averaged)], target, ())


# A plan, the values of what this rank owns of it, and whether these are of the averaged tensors.
_Given = tuple[Plan, Sequence[torch.Tensor], bool]


def _spread(
    given: Sequence[_Given],
    target: Callable[[Shard], torch.Tensor | None],
    meeting: Sequence[Callable[[], None]],
    own: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    weight: float = 1.0,
) -> None:
    def make(worker: int) -> Steps:
        steps = Steps()
        for step in meeting:
            steps.again(step)
        room = _Room()
        for plan, values, averaged in given:
            _add_spreading(steps, plan, values, target, averaged, room, weight if averaged else 1.0)
        for live, value in own:
            steps.again(functools.partial(live.copy_, value))
        return steps

    with torch.no_grad():
        Job([Lane(make)])()


def _add_spreading(
    steps: Steps,
    plan: Plan,
    values: Sequence[torch.Tensor],
    target: Callable[[Shard], torch.Tensor | None],
    averaged: bool,
    room: _Room,
    weight: float,
) -> None:
    for shard, value in zip(plan.owned(averaged=averaged), values, strict=True):
        own = target(shard)
        if own is None:
            continue
        if weight == 1.0:
            steps.again(functools.partial(own.copy_, value))
        else:
            _add_blending(steps, own, value, weight, room)
    for division in plan.divisions:
        if division.averaged != averaged or len(division.ranks) == 1:
            continue
        for position, owner in enumerate(division.ranks):
            targets = map(target, division.run(position))
            for bucket in _buckets([of_shard for of_shard in targets if of_shard is not None]):
                _add_refreshing(steps, bucket, owner, division, room)


def _add_blending(steps: Steps, live: torch.Tensor, value: torch.Tensor, weight: float, room: _Room) -> None:
    """Two steps for a chunk, since either may be done again: one reads the live values, and the other writes them."""
    dtype = torch.promote_types(live.dtype, value.dtype)
    for averaged, chunk in cut_alike(value, live, _BUCKET_BYTES // dtype.itemsize):
        blended = room(chunk.numel() * dtype.itemsize, live.device, "blended").view(dtype).view(chunk.shape)
        steps.again(functools.partial(_blend, blended, chunk, averaged, weight))
        steps.again(functools.partial(chunk.copy_, blended))


def _blend(blended: torch.Tensor, live: torch.Tensor, averaged: torch.Tensor, weight: float) -> None:
    live, averaged = live.to(blended.dtype), averaged.to(blended.device, blended.dtype)
    torch.lerp(live, averaged, weight, out=blended)
    # Between two equal infinities (masks) it would be nan.
    torch.where(torch.isinf(live) | torch.isinf(averaged), live, blended, out=blended)


class _Room:
    """Scratch on each device, used by one broadcast after the other."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.device], torch.Tensor] = {}

    def __call__(self, nbytes: int, device: torch.device, use: str = "sent") -> torch.Tensor:
        memory = self._memory.get((use, device))
        if memory is None or memory.numel() < nbytes:
            memory = torch.empty(max(nbytes, _BUCKET_BYTES), dtype=torch.uint8, device=device)
            self._memory[use, device] = memory
        return memory[:nbytes]


def _buckets(run: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors of a run, in lists of one dtype and device that are sent together; a large one is sent alone."""
    bucket: list[torch.Tensor] = []
    bucket_bytes = 0
    for part in (part for whole in run for part in _parts(whole)):
        part_bytes = part.numel() * part.element_size()
        other_kind = bucket and (part.dtype != bucket[0].dtype or part.device != bucket[0].device)
        if bucket and (other_kind or bucket_bytes + part_bytes > _BUCKET_BYTES):
            yield bucket
            bucket, bucket_bytes = [], 0
        bucket.append(part)
        bucket_bytes += part_bytes
    if bucket:
        yield bucket


def _parts(whole: torch.Tensor) -> Iterable[torch.Tensor]:
    """The tensor whole; its rows in several parts if it is large and not contiguous, since it is packed then."""
    whole_bytes = whole.numel() * whole.element_size()
    if whole.is_contiguous() or whole_bytes <= _BUCKET_BYTES:
        return [whole]
    parts: Sequence[torch.Tensor] = whole.split(max(1, whole.shape[0] * _BUCKET_BYTES // whole_bytes))
    return parts


def _add_refreshing(steps: Steps, bucket: Sequence[torch.Tensor], owner: int, division: Division, room: _Room) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        broadcast_steps(steps, owner, _bytes(bucket[0]), division.ranks, division.groups, room)
        return
    numel = sum(part.numel() for part in bucket)
    packed = room(numel * bucket[0].element_size(), bucket[0].device, "packed").view(bucket[0].dtype)
    runs = packed.split([part.numel() for part in bucket])
    copies = [run.view(part.shape) for run, part in zip(runs, bucket, strict=True)]
    if division.ranks[division.position] == owner:
        steps.again(functools.partial(_copy_all, copies, bucket))
    broadcast_steps(steps, owner, _bytes(packed), division.ranks, division.groups, room)
    if division.ranks[division.position] != owner:
        steps.again(functools.partial(_copy_all, bucket, copies))


def _copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor as bytes, which every backend sends: gloo knows few dtypes."""
    flat = values.detach().view(-1)
    return (torch.view_as_real(flat).view(-1) if flat.is_complex() else flat).view(torch.uint8)
