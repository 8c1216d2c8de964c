"""The averaged values of one track on this rank: where they lie, and how they are set as a whole. No communication.

The values of all shards lie in one flat buffer per device; on a CPU they lie end to end. An averaged tensor is a view
of that buffer. The residuals of a compensated average (`dist_ema.averaging.update`) lie beside them in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch

from dist_ema.boxes.shards import Held, Shard
from dist_ema.uninterrupted.modes import made_for_any_mode

__all__ = ["ALIGNED_NUMEL", "Averages", "aligned", "copy_pairwise", "copying"]

# Elements; 32 bytes or more for every averaged dtype.
ALIGNED_NUMEL = 16


class Averages:
    """The averaged values of one track, for the shards that this rank owns, in memory of their own."""

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        dtype: torch.dtype,
        device: torch.device | None,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        self._shards: tuple[Shard, ...] = tuple(shards)
        devices = [shard.observed().device if device is None else device for shard in self._shards]
        self._values = self._zeros(devices, dtype)
        self._residuals = () if residual_dtype is None else self._zeros(devices, residual_dtype)

    def _zeros(self, devices: Sequence[torch.device], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        flat: dict[torch.device, torch.Tensor] = {}
        for wanted in dict.fromkeys(devices):
            numels = [shard.box.numel for shard, at in zip(self._shards, devices, strict=True) if at == wanted]
            total = sum(_room(numel, wanted) for numel in numels)
            with made_for_any_mode():  # an inference tensor could not be updated outside that mode
                flat[wanted] = torch.zeros(total, dtype=dtype, device=wanted)
        filled = dict.fromkeys(flat, 0)
        views = []
        for shard, device in zip(self._shards, devices, strict=True):
            start = filled[device]
            filled[device] = start + _room(shard.box.numel, device)
            views.append(flat[device][start : start + shard.box.numel].view(shard.sizes))
        return tuple(views)

    @property
    def values(self) -> tuple[torch.Tensor, ...]:
        """One tensor per shard, of the shard's sizes, in the order of the shards."""
        return self._values

    @property
    def residuals(self) -> tuple[torch.Tensor, ...]:
        """The rounding errors of the values, of the same sizes; empty unless the average is compensated."""
        return self._residuals

    @property
    def nbytes(self) -> int:
        """Bytes of averaged values and residuals on this rank."""
        return sum(tensor.nbytes for tensor in (*self.values, *self.residuals))

    def held_by_teacher(self) -> Sequence[Held]:
        """The tensors of a teacher module that `values` lie in; their memory may be replaced. Else empty."""
        return ()

    @torch.no_grad()
    def copy_live(self, fqns: Collection[str] | None = None) -> None:
        """Set the averaged values of all tensors, or of those of these names, to the live ones. No communication."""
        indices = [index for index, shard in enumerate(self._shards) if fqns is None or shard.fqn in fqns]
        values, residuals = self.values, self.residuals
        copy_pairwise([values[index] for index in indices], [self._shards[index].observed() for index in indices])
        for index in indices if residuals else ():
            residuals[index].zero_()

    @torch.no_grad()
    def replace(self, values: Sequence[torch.Tensor]) -> None:
        """Set the averaged values, one tensor of the shard's sizes per shard. No communication."""
        for averaged, value in zip(self.values, values, strict=True):
            if value is not averaged:
                averaged.copy_(value)
        for residual in self.residuals:
            residual.zero_()


def _room(numel: int, device: torch.device) -> int:
    """Elements that a tensor takes in a flat buffer; on a GPU tensors are aligned, so that they load as vectors."""
    return numel if device.type == "cpu" else aligned(numel, ALIGNED_NUMEL)


def aligned(size: int, grain: int) -> int:
    """The least multiple of `grain` that is at least `size`."""
    return -(-size // grain) * grain


def copying(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> Callable[[], Any]:
    """The call of C that copies tensors pairwise, converted on the way. The lists must not be empty."""
    return partial(torch._foreach_copy_, targets, sources)


def copy_pairwise(
    targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], *, non_blocking: bool = False
) -> None:
    """Copy tensors pairwise, converted on the way."""
    if targets:  # torch raises for an empty list
        torch._foreach_copy_(list(targets), list(sources), non_blocking)
