"""Buffers that were computed for the averaged weights within a swap, and stay with the average. No communication.

`update_bn` in the block gives BatchNorm the statistics of the averaged weights. They are no average, and would be wrong
beside the live weights. So at the end of the block they are kept with the average, and the live buffers come back.
"""

from __future__ import annotations

import torch

from dist_ema.averaging.state import AveragedState
from dist_ema.errors import ConfigError

__all__ = ["check_keeping", "keep_buffers"]


def check_keeping(state: AveragedState, keep: object, *, is_corrected: bool) -> None:
    """Refuse buffers that cannot be kept.

    Raises:
        ConfigError: `keep` is not a bool, or a teacher holds the averages, or these are corrected.
    """
    if not isinstance(keep, bool):
        raise ConfigError(f"keep_buffers is {keep!r}, expected True or False")
    if keep and is_corrected:
        raise ConfigError(
            "keep_buffers and correct are given: the buffers would fit the corrected weights, and be kept with the "
            "average, which is not corrected. Leave one of them out"
        )
    if keep and not state.takes_buffers:
        raise ConfigError(
            "keep_buffers is True for an average with into=, whose teacher is given the live buffers at every update: "
            "build the average without into=; or consolidate it, load that model, and run update_bn there"
        )


@torch.no_grad()
def keep_buffers(state: AveragedState, track: str) -> None:
    """Keep the buffers that are in the model now with the average of a track, which is in the model.

    An averaged buffer that was changed since the swap began takes the place of its average, which goes on from it.
    """
    averages, replaced = state.averages[track], []
    residuals = averages.residuals or (None,) * len(state.shards)
    for shard, average, residual in zip(state.shards, averages.values, residuals, strict=True):
        live = shard.live()
        if shard.held.spec.is_buffer and not torch.equal(average.to(live.device, live.dtype), live):
            replaced.append((average, live))
            if residual is not None:
                replaced.append((residual, torch.zeros_like(residual)))
    divisions = state.plan.live_buffers(extra_state=False).divisions
    values = {held.box: held.values().clone() for division in divisions for held in division.held}
    state.keep_buffers(track, values, replaced)
