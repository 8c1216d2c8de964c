"""dist_ema: a DDP- and FSDP-aware exponential moving average of model weights for PyTorch.

The public surface: the names in `_HOME`, every error, and every registered schedule. They are imported at first use, so
that the command line answers without loading torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from dist_ema._version import __version__ as __version__

if TYPE_CHECKING:
    from dist_ema.checkpoint.snapshots.window import SnapshotWindow as SnapshotWindow
    from dist_ema.checkpoint.snapshots.window import log_spaced as log_spaced
    from dist_ema.ema import ShardedEMA as ShardedEMA
    from dist_ema.errors import *  # noqa: F403
    from dist_ema.integrations.accelerate import attach as attach
    from dist_ema.live.correction import Bema as Bema
    from dist_ema.offline.consolidation import consolidate_checkpoint as consolidate_checkpoint
    from dist_ema.offline.merging.writing import merge as merge
    from dist_ema.offline.synthesis import synthesize as synthesize
    from dist_ema.options import Experts as Experts
    from dist_ema.schedules.catalog import *  # noqa: F403

if os.name != "posix":
    raise ImportError(
        f"dist_ema runs on POSIX systems alone, such as Linux and macOS, and this one is {os.name!r}: it locks folders "
        "with flock, and its ranks talk through POSIX sockets. On Windows, run it in WSL 2"
    )

# Name -> its module.
_HOME = {
    "Bema": "dist_ema.live.correction",
    "Experts": "dist_ema.options",
    "ShardedEMA": "dist_ema.ema",
    "SnapshotWindow": "dist_ema.checkpoint.snapshots.window",
    "attach": "dist_ema.integrations.accelerate",
    "consolidate_checkpoint": "dist_ema.offline.consolidation",
    "log_spaced": "dist_ema.checkpoint.snapshots.window",
    "merge": "dist_ema.offline.merging.writing",
    "synthesize": "dist_ema.offline.synthesis",
}


def _light() -> dict[str, Any]:
    """What needs no torch, by name: errors, and what a registered schedule is called by."""
    errors = importlib.import_module("dist_ema.errors")
    schedules = importlib.import_module("dist_ema.schedules.records").SCHEDULES
    light = {name: getattr(errors, name) for name in errors.__all__}
    return light | {name: registration.call for name, registration in schedules.items()}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(["__version__", *_HOME, *_light()])
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name.startswith("_") or name not in (light := _light()):
        raise AttributeError(f"module 'dist_ema' has no attribute {name!r}")
    else:
        value = light[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__getattr__("__all__"))
