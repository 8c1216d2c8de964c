"""Whether ranks that should hold the same weights do.

A plain module in an initialised process group is taken for a replica on every rank. If nothing keeps the replicas alike
(no DDP, no all-reduce of one's own), each rank averages its share of another model, and the whole is a mosaic.
"""

from __future__ import annotations

import hashlib

import torch

from dist_ema.exchange import Exchange
from dist_ema.layout import Held
from dist_ema.plan import Plan

__all__ = ["first_differing_replica", "warn_of_differing_replicas"]


def warn_of_differing_replicas(exchange: Exchange, plan: Plan) -> None:
    """Collective: every rank must call it. Warns on rank 0 if a tensor that all ranks hold is not alike on them."""
    differing = first_differing_replica(exchange, plan)
    if differing is not None:
        exchange.warn(
            f"{differing} is not the same on all ranks, though each holds it whole: the saved average is a mosaic of "
            "different models. Wrap the model in DistributedDataParallel, or keep the ranks alike yourself"
        )


@torch.no_grad()
def first_differing_replica(exchange: Exchange, plan: Plan) -> str | None:
    """Collective: every rank must call it. Name of a parameter that all ranks hold, but not alike; None if all agree.

    Looks at the first and the last element of each, so it costs one small copy to the host and one gather of digests.
    """
    held = [
        each
        for division in plan.divisions
        if len(division.ranks) == exchange.world_size > 1 and not division.single_owner
        for each in division.held
        if each.box.numel
    ]
    if exchange.sum_integers([len(held)]) == [0]:
        return None
    own = _samples(held)
    digests = exchange.gather_objects(hashlib.sha256(b"".join(own)).digest())
    if len(set(digests)) == 1:
        return None
    samples = exchange.gather_objects(own)
    for other in samples[1:]:
        for each, ours, theirs in zip(held, samples[0], other, strict=True):
            if ours != theirs:
                return each.spec.fqn
    return None


def _samples(held: list[Held]) -> list[bytes]:
    """The bytes of two elements of each, brought to the host at once per dtype and device."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    ends = []
    for index, each in enumerate(held):
        values = each.values()
        first, last = (0,) * values.dim(), (-1,) * values.dim()
        ends.append(torch.stack([values[first], values[last]]))
        by_kind.setdefault((values.device, values.dtype), []).append(index)
    told = [b""] * len(held)
    for indices in by_kind.values():
        content = torch.cat([ends[index] for index in indices]).cpu().view(torch.uint8).view(len(indices), -1)
        for index, row in zip(indices, content, strict=True):
            told[index] = row.numpy().tobytes()
    return told
