"""The modes of autograd in this thread, which no interrupt may leave otherwise than they were. No communication."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["made_for_any_mode", "without_gradients"]


def without_gradients(work: Callable[[], None]) -> None:
    """Do `work` with gradients off. Autograd is as before then: `no_grad()` leaves it off if its end is interrupted."""
    mode = torch.is_grad_enabled()
    try:
        try:
            torch.set_grad_enabled(False)
            work()
            torch.set_grad_enabled(mode)
        except BaseException:  # not `finally`: it would be one place less for two interrupts
            torch.set_grad_enabled(mode)
            raise
    except BaseException:  # a second one, before the first was dealt with
        torch.set_grad_enabled(mode)
        raise


def made_for_any_mode() -> AbstractContextManager[object]:
    """A context whose tensors can be written to in and outside of `torch.inference_mode()`. No communication.

    It does nothing outside of that mode. An interrupt at the end of `torch.inference_mode(False)` would leave open what
    ends it: whenever Python frees that, autograd is set as it was at the beginning.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
