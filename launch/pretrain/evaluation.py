"""Validation loss over fixed windows: the same number from one process, from many, or from a fresh one."""

from __future__ import annotations

import torch
from byte_lm import next_byte_loss
from torch import Tensor, nn
from torch.distributed import all_reduce

WINDOWS_PER_BATCH = 32


@torch.no_grad()
def validation_loss(model: nn.Module, windows: Tensor, *, rank: int = 0, num_ranks: int = 1) -> float:
    """Mean loss in nats per byte over ``windows`` (count, context + 1), on the device they lie on.

    Collective: every rank must call it. The batches are cut before they are dealt out, and their sums are
    added in float64, so the result does not depend on ``num_ranks`` beyond float64 rounding. Each rank runs
    the model equally often, since a sharded forward is itself collective: a rank without a batch left
    repeats one and counts it as nothing.
    """
    batches = windows.split(WINDOWS_PER_BATCH)
    total = torch.zeros(2, dtype=torch.float64, device=windows.device)  # sum of losses, count
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(batches), num_ranks):
            mine = first + rank
            batch = batches[mine if mine < len(batches) else 0]
            losses = next_byte_loss(model, batch, reduction="none")
            if mine < len(batches):
                total += torch.stack([losses.double().sum(), total.new_tensor(losses.numel())])
    finally:
        model.train(was_training)
    if num_ranks > 1:
        all_reduce(total)
    return float(total[0] / total[1])
