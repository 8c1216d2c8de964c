"""Whole tensors on rank 0, for small models and tests; checkpoints never pass through here."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from dist_ema.averaging.state import AveragedState
from dist_ema.boxes.plan import Plan
from dist_ema.boxes.shards import Box
from dist_ema.disk.formats.model_files import host_bytes
from dist_ema.live.replicas import Replicas
from dist_ema.ranks.calls import Call
from dist_ema.ranks.exchange import Exchange

__all__ = ["full_state_dict"]


def full_state_dict(call: Call, state: AveragedState, replicas: Replicas, track: str | None) -> dict[str, torch.Tensor]:
    """Collective: every rank must call it. See `ShardedEMA.full_state_dict`."""
    pieces = call.together(lambda: state.pieces(track), lambda _: {"track": state.track(track)}, within_swap=True)
    replicas.check_once(call.name, state.num_updates)
    return _whole_tensors(call.exchange, state.plan, pieces, state.dtypes())


def _whole_tensors(
    exchange: Exchange, plan: Plan, pieces: Sequence[tuple[Box, torch.Tensor]], dtypes: dict[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """Collective: every rank must call it. Every rank sends its pieces to rank 0, one at a time.

    Args:
        exchange: the control traffic of all ranks.
        plan: the model as boxes.
        pieces: the boxes this rank owns and their values; over the ranks they cover every tensor once.
        dtypes: fqn -> dtype of the pieces.

    Returns:
        On rank 0 every tensor whole, on the CPU, tied ones under each of their names; elsewhere {}.
    """
    contents = exchange.agree(
        "full_state_dict", lambda: [(box, host_bytes(values, dtypes[box.fqn])) for box, values in pieces]
    )
    records = [[box.fqn, box.offsets, box.sizes] for box, _ in contents]
    boxes_by_rank = [
        [Box(fqn, tuple(offsets), tuple(sizes)) for fqn, offsets, sizes in of_rank]
        for of_rank in exchange.reduce("full_state_dict", [records], operator.add)
    ]

    def allocate() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        if exchange.rank != 0:
            return {}, torch.empty(0)
        whole = {spec.fqn: torch.empty(spec.shape, dtype=dtypes[spec.fqn], device="cpu") for spec in plan.specs}
        for box, values in pieces:
            whole[box.fqn][box.region] = values.detach().cpu()
        boxes = [box for boxes in boxes_by_rank[1:] for box in boxes]
        longest = max((box.numel * dtypes[box.fqn].itemsize for box in boxes), default=0)
        return whole, torch.empty(longest, dtype=torch.uint8, device="cpu")

    # A rank that fails after the first message leaves the others waiting: every message that is sent must be received.
    whole, received = exchange.agree("full_state_dict", allocate)
    if exchange.rank != 0:
        for _, content in contents:
            if content.numel():
                exchange.send_bytes(content, 0)
        return {}
    for rank, boxes in enumerate(boxes_by_rank):
        for box in boxes if rank != 0 else ():
            if box.numel:
                dtype = dtypes[box.fqn]
                part = received[: box.numel * dtype.itemsize]
                exchange.receive_bytes(part, rank)
                whole[box.fqn][box.region] = part.view(dtype).view(box.sizes)
    for alias, fqn in plan.aliases.items():
        whole[alias] = whole[fqn]
    return whole
