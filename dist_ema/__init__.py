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
    from dist_ema.offline.consolidation import consolidate_checkpoint
    from dist_ema.offline.synthesis import synthesize
    from dist_ema.schedules.classic import (
        AnnealedSchedule,
        ConstantSchedule,
        CosineSchedule,
        InverseGammaSchedule,
        RampSchedule,
    )
    from dist_ema.schedules.combinators import after, every, scaled_batch
    from dist_ema.schedules.profiles import EqualSchedule, HalfLifeSchedule, PowerSchedule

__all__ = [
    "AnnealedSchedule",
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
    "EqualSchedule",
    "HalfLifeSchedule",
    "InverseGammaSchedule",
    "ModelChangedError",
    "PowerSchedule",
    "RampSchedule",
    "RankMismatchError",
    "ShardedEMA",
    "SwapError",
    "UnsupportedModelError",
    "__version__",
    "after",
    "attach",
    "consolidate_checkpoint",
    "every",
    "scaled_batch",
    "synthesize",
]

_HOME = {
    "ShardedEMA": "dist_ema.ema",
    "attach": "dist_ema.integrations.accelerate",
    "consolidate_checkpoint": "dist_ema.offline.consolidation",
    "synthesize": "dist_ema.offline.synthesis",
    **dict.fromkeys(
        ["AnnealedSchedule", "ConstantSchedule", "CosineSchedule", "InverseGammaSchedule", "RampSchedule"],
        "dist_ema.schedules.classic",
    ),
    **dict.fromkeys(["EqualSchedule", "HalfLifeSchedule", "PowerSchedule"], "dist_ema.schedules.profiles"),
    **dict.fromkeys(["after", "every", "scaled_batch"], "dist_ema.schedules.combinators"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dist_ema' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME.get(name, "dist_ema.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
