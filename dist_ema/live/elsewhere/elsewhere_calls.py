"""The calls that bring an average elsewhere, with what one keeps for the next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from dist_ema.averaging.state import AveragedState
from dist_ema.live.elsewhere.copying import copy_to
from dist_ema.live.elsewhere.ownership import Ownership
from dist_ema.live.elsewhere.stream import NamedTensors, whole_tensors
from dist_ema.live.holders.replicas import Replicas
from dist_ema.options import Patterns
from dist_ema.ranks.calls import Call

__all__ = ["ElsewhereCalls", "NamedTensors"]


class ElsewhereCalls:
    """The calls of one average.

    Args:
        state: the averages of this rank.
        replicas: the tensors that several ranks hold alike.
    """

    def __init__(self, state: AveragedState, replicas: Replicas) -> None:
        self._state = state
        self._replicas = replicas
        self._ownership = Ownership()

    def copy_to(
        self,
        call: Call,
        module: nn.Module | Sequence[nn.Module],
        track: str | None,
        include: Patterns,
        exclude: Patterns,
    ) -> None:
        """Collective: every rank must call it. See `ShardedEMA.copy_to`."""
        copy_to(call, self._state, self._replicas, module, track, include, exclude)

    def stream(
        self,
        call: Call,
        track: str | None,
        dtype: torch.dtype | None,
        bucket_bytes: int,
        ranks: Iterable[int] | None,
    ) -> NamedTensors:
        """Collective: every rank must call it. See `ShardedEMA.whole_tensors`."""
        return whole_tensors(call, self._state, self._replicas, self._ownership, track, dtype, bucket_bytes, ranks)
