"""The modes of autograd in this thread, which no interrupt may leave otherwise than they were. No communication."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["keeping_autograd", "made_for_any_mode", "without_gradients"]


def keeping_autograd(work: Callable[[], None]) -> None:
    """Do `work`. After an exception autograd is as before: an interrupt at the end of `no_grad()` leaves it off."""
    mode = torch.is_grad_enabled()
    try:
        try:
            work()
        except BaseException:
            torch.set_grad_enabled(mode)
            raise
    except BaseException:  # a second one, before the first was dealt with
        torch.set_grad_enabled(mode)
        raise


def without_gradients(work: Callable[[], None]) -> None:
    """Do `work` with gradients off. Then autograd is as before, whatever was raised."""
    mode = torch.is_grad_enabled()
    try:
        try:
            torch.set_grad_enabled(False)
            work()
        finally:
            torch.set_grad_enabled(mode)
    except BaseException:  # a second one, before the first was dealt with
        torch.set_grad_enabled(mode)
        raise


def made_for_any_mode() -> AbstractContextManager[object]:
    """A context whose tensors can be written to in and outside of `torch.inference_mode()`. No communication.

    It does nothing outside of that mode. An interrupt at the end of `torch.inference_mode(False)` would leave open what
    ends it: whenever Python frees that, autograd is set as it was at the beginning.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
