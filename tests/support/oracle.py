"""A naive twin of the averaging rule: whole tensors, one at a time, written as plainly as possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch


class NaiveAverage:
    """Keeps every tensor whole, in `dtype`; call k copies at k = 0 and lerps at every multiple of `interval`."""

    def __init__(
        self, momentum: Callable[[int], float], *, interval: int = 1, dtype: torch.dtype = torch.float32
    ) -> None:
        self.momentum = momentum
        self.interval = interval
        self.dtype = dtype
        self.num_updates = 0
        self.values: dict[str, torch.Tensor] = {}

    def update(self, live: Mapping[str, torch.Tensor]) -> None:
        step = self.num_updates
        for name, value in live.items():
            wide = value.detach().to(self.dtype)
            if step == 0:
                self.values[name] = wide.clone()
            elif step % self.interval == 0:
                self.values[name] = torch.lerp(self.values[name], wide, self.momentum(step))
        self.num_updates += 1
