"""Texts for the caller: a warning at the line that called the package, and where two records differ.

No communication.
"""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

__all__ = ["MOST_NAMED", "difference_text", "first_of", "level_of_caller", "tell"]

# The most ranks that a message names.
MOST_NAMED = 8
# Libraries that call the hooks of this package: such a warning is about the hook, not about a line of the library.
_HOSTS = ("accelerate.", "torch.", "transformers.", "lightning.", "lightning_fabric.", "pytorch_lightning.")
# The frames of this package, and those between them: `torch.compiler.disable` wraps functions.
_PACKAGE = ("dist_ema.", "torch._dynamo.")

# A record as JSON, and the working folder to which a path in it is relative.
Record = Sequence[str | None]


def tell(message: str) -> None:
    """Warn at the line that called this package; at the line here if another library called a hook."""
    level, frame = 1, sys._getframe(1)
    while _name(frame).startswith(_PACKAGE) and frame.f_back is not None:
        if _name(frame.f_back).startswith(_HOSTS) and not _name(frame.f_back).startswith(_PACKAGE):
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level + 1)


def _name(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def first_of(names: Sequence[str], count: int) -> str:
    """The first of some names, of which there are `count`: "1, 3 and 5 more"."""
    return ", ".join(names) + (f" and {count - len(names)} more" if count > len(names) else "")


def level_of_caller() -> int:
    """The stack level, seen from the caller of this function, of the code that called this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("dist_ema."):
        level, frame = level + 1, frame.f_back
    return level


def difference_text(other: int, of_rank_0: Record, of_other: Record) -> str:
    """The message for ranks whose records differ.

    Args:
        other: the first rank whose record differs from that of rank 0.
        of_rank_0: the record of rank 0, as JSON, and the working folder to which a path in it is relative, as
            `node:folder`.
        of_other: the record of the other rank, likewise.
    """
    (first, first_folder), (second, second_folder) = of_rank_0, of_other
    difference = _first_difference(json.loads(first or "null"), json.loads(second or "null"))
    cause = ""
    if difference.startswith("path: ") and None not in (first_folder, second_folder) and first_folder != second_folder:
        (first_node, _, first_folder), (second_node, _, second_folder) = (
            str(folder).partition(":") for folder in (first_folder, second_folder)
        )
        cause = (
            f" (a relative path, resolved in the working directories {first_folder} and {second_folder}, of rank 0 on "
            f"the node {first_node} and rank {other} on the node {second_node}: give an absolute one)"
        )
    return (
        f"rank 0 and rank {other} differ in {difference}{cause}. Build the same model, give the same schedule and "
        "options, and call the same methods on every rank"
    )


def _first_difference(first: Any, second: Any, prefix: str = "") -> str:
    """Where two JSON values first differ, and how."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in [*first, *(key for key in second if key not in first)]:
            if key not in first or key not in second:
                return f"{prefix}{key} (only on one of them)"
            if first[key] != second[key]:
                return _first_difference(first[key], second[key], f"{prefix}{key}: ")
        return f"{prefix}the order of {len(first)} entries"
    return f"{prefix}{first!r} against {second!r}"
