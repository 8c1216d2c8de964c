"""Warnings that one rank gives alone, at the line of the caller. No communication."""

from __future__ import annotations

import sys
import types
import warnings

__all__ = ["tell"]

# Libraries that call our hooks: such a warning is about the hook, not about a line of theirs.
_HOSTS = ("accelerate.", "torch.", "transformers.")
# What stands between our own frames: `torch.compiler.disable` wraps functions.
_OURS = ("dist_ema.", "torch._dynamo.")


def tell(message: str) -> None:
    """Warn, at the line that called this package, or at our own where the hook of another library did."""
    level, frame = 1, sys._getframe(1)
    while _name(frame).startswith(_OURS) and frame.f_back is not None:
        if _name(frame.f_back).startswith(_HOSTS) and not _name(frame.f_back).startswith(_OURS):
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level + 1)


def _name(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__"))
