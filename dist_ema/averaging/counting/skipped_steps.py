"""Steps that a fused optimizer skipped: the device knows first, and the host one call later. No communication.

A `GradScaler` hands a fused optimizer its overflow flag, `optimizer.found_inf`, and calls `step()` in any case.
Reading the flag at once would make the host wait for the device. So the update of that step is weighted by
`1 - found_inf` on the device, the flag travels to the host meanwhile, and the counter is corrected before anything
depends on it: at the next update at the latest. This costs 4 bytes to the host, and one lerp per tensor instead of one
for all.
"""

from __future__ import annotations

import torch

__all__ = ["LateFlag", "weight_unless"]


class LateFlag:
    """A flag on the device, on its way to the host."""

    def __init__(self, flag: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if flag.is_cuda:
            self._host = torch.empty(1, dtype=flag.dtype, pin_memory=True, device="cpu")
            self._host.copy_(flag.reshape(1), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(flag.device))
        else:
            self._host = flag.detach().reshape(1).clone()

    def is_set(self) -> bool:
        """Whether the flag was not 0; waits for the copy if it is still under way."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._host.item())


def weight_unless(flag: torch.Tensor, momentum: float, like: torch.Tensor) -> torch.Tensor:
    """`momentum`, or 0 where the flag is set: a 0-dim tensor on the device and of the dtype of `like`."""
    kept = (flag.reshape(()) == 0).to(device=like.device, dtype=like.dtype)
    return kept * momentum
