"""The averaged values of one track on this rank: where they lie, and how they are set as a whole. No communication.

Those of all shards lie end to end in one flat buffer per device; each shard's averaged tensor is a view of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from dist_ema.layout import Held, Shard

__all__ = ["Averages", "copy_each"]


class Averages:
    """Averaged values of one track, for the shards that this rank owns, in memory of their own."""

    def __init__(self, shards: Sequence[Shard], *, dtype: torch.dtype, device: torch.device | None) -> None:
        self._shards: tuple[Shard, ...] = tuple(shards)
        devices = [shard.live().device if device is None else device for shard in self._shards]
        self._flat: dict[torch.device, torch.Tensor] = {}
        for wanted in dict.fromkeys(devices):
            numel = sum(shard.box.numel for shard, at in zip(self._shards, devices, strict=True) if at == wanted)
            with torch.inference_mode(False):  # an inference tensor could not be updated outside that mode
                self._flat[wanted] = torch.zeros(numel, dtype=dtype, device=wanted)
        self._values = self._cut(self._flat, devices)

    def _cut(self, flat: dict[torch.device, torch.Tensor], devices: Sequence[torch.device]) -> tuple[torch.Tensor, ...]:
        filled = dict.fromkeys(flat, 0)
        views = []
        for shard, device in zip(self._shards, devices, strict=True):
            start = filled[device]
            filled[device] = stop = start + shard.box.numel
            views.append(flat[device][start:stop].view(shard.sizes))
        return tuple(views)

    @property
    def values(self) -> tuple[torch.Tensor, ...]:
        """One tensor per shard, of the shard's sizes, in the order of the shards."""
        return self._values

    @property
    def nbytes(self) -> int:
        """Bytes of averaged values on this rank."""
        return sum(flat.numel() * flat.element_size() for flat in self._flat.values())

    def held(self) -> Sequence[Held]:
        """The tensors of somebody's module that `values` lie in, whose memory may be replaced; ours have their own."""
        return ()

    @torch.no_grad()
    def copy_live(self, fqns: Collection[str] | None = None) -> None:
        """Set the averaged values to the live ones: of all tensors, or of those of these names. No communication."""
        pairs = [
            (value, shard.live())
            for value, shard in zip(self.values, self._shards, strict=True)
            if fqns is None or shard.fqn in fqns
        ]
        copy_each([value for value, _ in pairs], [live for _, live in pairs])

    @torch.no_grad()
    def replace(self, values: Sequence[torch.Tensor]) -> None:
        """Set the averaged values, one tensor of the shard's sizes per shard. No communication."""
        for averaged, value in zip(self.values, values, strict=True):
            if value is not averaged:
                averaged.copy_(value)


def copy_each(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy tensors pairwise, converted on the way."""
    if targets:  # an empty list raises
        torch._foreach_copy_(list(targets), list(sources))
