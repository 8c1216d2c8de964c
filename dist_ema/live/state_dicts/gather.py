"""Whole tensors on rank 0, for small models and tests; checkpoints never pass through here."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch

from dist_ema.averaging.state import AveragedState
from dist_ema.boxes.plan import Plan
from dist_ema.boxes.shards import Box
from dist_ema.disk.formats.model_files import host_bytes
from dist_ema.live.holders.replicas import Replicas
from dist_ema.ranks.calls import Call
from dist_ema.ranks.exchange import Exchange
from dist_ema.ranks.wires.wires import Wires

__all__ = ["full_state_dict"]

_YOUR_TURN = b"\1"


def full_state_dict(call: Call, state: AveragedState, replicas: Replicas, track: str | None) -> dict[str, torch.Tensor]:
    """Collective: every rank must call it. See `ShardedEMA.full_state_dict`."""
    pieces = call.together(
        lambda: state.pieces(track), lambda _: {"track": state.track(track), **state.progress}, within_swap=True
    )
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
    records_by_rank = exchange.reduce("full_state_dict", [records], operator.add, on_rank_0=True)
    boxes_by_rank = [
        [Box(fqn, tuple(offsets), tuple(sizes)) for fqn, offsets, sizes in of_rank]
        for of_rank in (records_by_rank if exchange.rank == 0 else [])
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
    if exchange.world_size > 1:
        with exchange.wires("full_state_dict") as wires:
            if exchange.rank != 0:
                _send(wires, [content for _, content in contents if content.numel()])
                return {}
            for rank, boxes in enumerate(boxes_by_rank):
                for box, part in _receive(wires, rank, boxes if rank != 0 else (), dtypes, received):
                    whole[box.fqn][box.region] = part
    for alias, fqn in plan.aliases.items():
        whole[alias] = whole[fqn]
    return whole


def _send(wires: Wires, messages: Sequence[torch.Tensor]) -> None:
    """Point to point: send messages to rank 0, when the turn of this rank has come."""
    if messages:
        wires.receive(bytearray(_YOUR_TURN), 0)
    for message in messages:
        wires.send(message, 0)


def _receive(
    wires: Wires, source: int, boxes: Sequence[Box], dtypes: dict[str, torch.dtype], received: torch.Tensor
) -> Iterator[tuple[Box, torch.Tensor]]:
    """Point to point: the values of the boxes of a rank; each is valid until the next one."""
    boxes = [box for box in boxes if box.numel]
    if boxes:
        wires.send(_YOUR_TURN, source)  # ranks that come before their turn would knock again and again
    for box in boxes:
        dtype = dtypes[box.fqn]
        part = received[: box.numel * dtype.itemsize]
        wires.receive(part, source)
        yield box, part.view(dtype).view(box.sizes)
