"""Words for the caller: a warning at the line that called the package, and where two records differ.

No communication.
"""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

__all__ = ["level_of_caller", "tell", "told_difference"]

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


def level_of_caller() -> int:
    """The stack level, seen from the caller of this function, of the code that called this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("dist_ema."):
        level, frame = level + 1, frame.f_back
    return level


def told_difference(digests: Sequence[str], told: Sequence[tuple[str, str | None]]) -> str:
    """What the ranks are told whose records differ.

    Args:
        digests: of the record of each rank.
        told: of each rank, its record as JSON, and the working folder from which a path in it was taken.
    """
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    (ours, here), (theirs, there) = told[0], told[other]
    difference = _first_difference(json.loads(ours), json.loads(theirs))
    cause = ""
    if difference.startswith("path: ") and None not in (here, there) and here != there:
        cause = f" (a relative path, taken from the working directories {here} and {there}: give an absolute one)"
    return (
        f"rank 0 and rank {other} differ in {difference}{cause}. Build the same model, give the same schedule and "
        "options, and call the same methods on every rank"
    )


def _first_difference(ours: Any, theirs: Any, prefix: str = "") -> str:
    """Where two JSON values first differ, and how."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            if key not in ours or key not in theirs:
                return f"{prefix}{key} (only on one of them)"
            if ours[key] != theirs[key]:
                return _first_difference(ours[key], theirs[key], f"{prefix}{key}: ")
        return f"{prefix}the order of {len(ours)} entries"
    return f"{prefix}{ours!r} against {theirs!r}"
