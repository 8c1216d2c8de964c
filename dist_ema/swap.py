"""Putting the averaged weights into the live model, and the live ones back.

Owners write their boxes into the live tensors; where several ranks hold the same tensor (DDP, Replicate axes)
each owner then broadcasts its run to the others, in buckets of bounded size. There every rank is also shown the
buffers that the files hold, rank 0's. Under plain FSDP nothing is communicated, and each rank keeps its own buffers.
The live values are kept aside first: one copy of what this rank holds of the averaged tensors, and of all persistent
buffers, which a forward within the swap may change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from dist_ema.exchange import broadcast_from
from dist_ema.layout import Shard
from dist_ema.plan import Division, Plan

__all__ = ["LiveBackup", "put_average", "spread", "spread_buffers"]

# Small pieces are packed until a bucket has this many bytes; a larger contiguous piece travels as it lies.
_BUCKET_BYTES = 8 * 2**20


class LiveBackup:
    """The live values of all averaged tensors and all persistent buffers that this rank holds, kept aside.

    No communication.

    Attributes:
        is_restored: whether they were put back.
    """

    @torch.no_grad()
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        plan.verify()
        self._held = [held for division in plan.divisions if division.averaged for held in division.held]
        self._values = [held.values().clone(memory_format=torch.preserve_format) for held in self._held]
        # Of these a swap changes those of other ranks, and a forward within it maybe all.
        for division in plan.live_buffers(extra_state=False).divisions:
            self._held += division.held
            self._values += [torch.empty_like(live).copy_(live) for live in (held.values() for held in division.held)]
        self.is_restored = False

    @torch.no_grad()
    def restore(self, *, anyway: bool = False) -> None:
        """Put the kept values back, bit for bit; where that was cut off, again from the beginning. No communication.

        Args:
            anyway: also if gathered copies cannot be dropped, which then raises: what is saved and stepped from now on
                must be live.
        """
        try:
            self._plan.settle()
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


@torch.no_grad()
def put_average(plan: Plan, values: Sequence[torch.Tensor]) -> None:
    """Collective along replicas only: every rank that holds the same tensors must call it.

    Args:
        plan: the model as boxes.
        values: averaged values of `plan.owned(averaged=True)`, converted to the live dtypes on the way.
    """
    plan.settle()
    spread(plan, values, lambda shard: shard.live())
    if plan.has_replicas:
        spread_buffers(plan, lambda shard: shard.live())


@torch.no_grad()
def spread(
    plan: Plan, values: Sequence[torch.Tensor], place: Callable[[Shard], torch.Tensor], *, averaged: bool = True
) -> None:
    """Collective along replicas only: every rank that holds the same tensors must call it.

    Args:
        plan: the model as boxes.
        values: values of `plan.owned(averaged=averaged)`, converted on the way.
        place: where the values of a shard are to be, on its owner and on all other ranks that hold it.
        averaged: the averaged tensors, or those that are always shown live.
    """
    for shard, value in zip(plan.owned(averaged=averaged), values, strict=True):
        place(shard).copy_(value)
    for division in plan.divisions:
        if division.averaged != averaged or len(division.ranks) == 1:
            continue
        for position, owner in enumerate(division.ranks):
            for bucket in _buckets([place(shard) for shard in division.run(position)]):
                _refresh(bucket, owner, division)


def spread_buffers(plan: Plan, place: Callable[[Shard], torch.Tensor], *, extra_state: bool = False) -> None:
    """Collective along replicas only. Have all ranks show the buffers that are not averaged as their owner has them.

    Args:
        plan: the model as boxes.
        place: as in `spread`.
        extra_state: whether what `get_extra_state` returns is among them.
    """
    buffers = plan.live_buffers(extra_state=extra_state)
    spread(buffers, [shard.live() for shard in buffers.owned(averaged=False)], place, averaged=False)


def _buckets(run: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The pieces of a run, in groups of one dtype and device that are sent together; a large one goes alone."""
    bucket: list[torch.Tensor] = []
    bucket_bytes = 0
    for piece in (part for whole in run for part in _parts(whole)):
        piece_bytes = piece.numel() * piece.element_size()
        other_kind = bucket and (piece.dtype != bucket[0].dtype or piece.device != bucket[0].device)
        if bucket and (other_kind or bucket_bytes + piece_bytes > _BUCKET_BYTES):
            yield bucket
            bucket, bucket_bytes = [], 0
        bucket.append(piece)
        bucket_bytes += piece_bytes
    if bucket:
        yield bucket


def _parts(piece: torch.Tensor) -> Iterable[torch.Tensor]:
    """The piece, or rows of it where it would have to be packed and is large."""
    piece_bytes = piece.numel() * piece.element_size()
    if piece.is_contiguous() or piece_bytes <= _BUCKET_BYTES:
        return [piece]
    parts: Sequence[torch.Tensor] = piece.split(max(1, piece.shape[0] * _BUCKET_BYTES // piece_bytes))
    return parts


def _refresh(pieces: Sequence[torch.Tensor], owner: int, division: Division) -> None:
    if len(pieces) == 1 and pieces[0].is_contiguous():
        broadcast_from(owner, _bytes(pieces[0]), division.ranks, division.groups)
        return
    packed = torch.cat([piece.reshape(-1) for piece in pieces])
    broadcast_from(owner, _bytes(packed), division.ranks, division.groups)
    if division.ranks[division.position] != owner:
        parts = packed.split([piece.numel() for piece in pieces])
        for piece, part in zip(pieces, parts, strict=True):
            piece.copy_(part.view(piece.shape))


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor as bytes, which every backend sends: gloo knows few dtypes."""
    flat = values.detach().view(-1)
    return (torch.view_as_real(flat).view(-1) if flat.is_complex() else flat).view(torch.uint8)
