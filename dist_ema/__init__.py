"""dist_ema: a DDP- and FSDP-aware exponential moving average of model weights for PyTorch.

The names below are the public surface. They are imported at first use, so that the command line answers without
loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dist_ema._version import __version__

if TYPE_CHECKING:
    from dist_ema.ema import ShardedEMA
    from dist_ema.errors import (
        AttachError,
        CheckpointCorruptError,
        CheckpointError,
        CheckpointMismatchError,
        CheckpointNotFoundError,
        CommunicationError,
        ConfigError,
        DistEMAError,
        ModelChangedError,
        RankMismatchError,
        SwapError,
        UnsupportedModelError,
    )
    from dist_ema.integrations.accelerate import attach
    from dist_ema.offline import consolidate_checkpoint
    from dist_ema.schedules import ConstantSchedule, CosineSchedule

__all__ = [
    "AttachError",
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CommunicationError",
    "ConfigError",
    "ConstantSchedule",
    "CosineSchedule",
    "DistEMAError",
    "ModelChangedError",
    "RankMismatchError",
    "ShardedEMA",
    "SwapError",
    "UnsupportedModelError",
    "__version__",
    "attach",
    "consolidate_checkpoint",
]

_HOME = {
    "ShardedEMA": "dist_ema.ema",
    "attach": "dist_ema.integrations.accelerate",
    "consolidate_checkpoint": "dist_ema.offline",
    "ConstantSchedule": "dist_ema.schedules",
    "CosineSchedule": "dist_ema.schedules",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dist_ema' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME.get(name, "dist_ema.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
