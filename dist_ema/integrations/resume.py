"""A run that resumes: its average is loaded, begins anew where the user allows it, or the resume is refused."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from dist_ema.disk.folders.contents import is_average, was_begun
from dist_ema.ema import ShardedEMA
from dist_ema.errors import CheckpointNotFoundError, ConfigError
from dist_ema.ranks.exchange import Exchange

__all__ = ["checked_load_arguments", "load_or_begin", "named_otherwise"]

_log = logging.getLogger(__name__)


def checked_load_arguments(on_load: object) -> dict[str, Any]:
    """Keywords of `ShardedEMA.load` for the loads that an integration makes. No communication.

    Raises:
        ConfigError: one of them is none.
    """
    known = [name for name in inspect.signature(ShardedEMA.load).parameters if name not in ("self", "path")]
    if on_load is None:
        return {}
    if not isinstance(on_load, Mapping) or not set(on_load) <= set(known):
        raise ConfigError(f"on_load is {on_load!r}, expected keywords of ShardedEMA.load: {', '.join(known)}")
    return dict(on_load)


def load_or_begin(
    ema: ShardedEMA,
    exchange: Exchange,
    folder: str,
    *,
    on_missing: Literal["error", "live"],
    hint: str,
    on_load: Mapping[str, Any],
) -> bool:
    """Collective: every rank must call it. Load the average of a checkpoint.

    Args:
        ema: the average of the model.
        exchange: the control traffic of all ranks.
        folder: where the checkpoint has its average.
        on_missing: what to do if there is none: "error", or "live" to begin with the live weights, which the
            caller does.
        hint: what the error says if there is none.
        on_load: keywords of `ShardedEMA.load`.

    Returns:
        Whether there was an average; the same on all ranks.

    Raises:
        CheckpointNotFoundError: there is no average, or its writing was cut off; the same on all ranks.
        CheckpointError: it is of another model or other tracks, or is damaged; the same on all ranks.
    """
    try:
        ema.load(folder, **on_load)
    except CheckpointNotFoundError as error:
        # A trace of the folder means that an average was saved, and `on_missing` is not about that case. Where nodes do
        # not share a disk, the trace may lie on another node than that of rank 0.
        begun = was_begun(Path(folder))
        by_rank_0, by_any = exchange.reduce("resume", [begun and exchange.rank == 0, begun], _either)
        if by_rank_0:
            raise CheckpointNotFoundError(
                f"{error}. The writing of this one was cut off: use an older checkpoint"
            ) from None
        if by_any:
            raise CheckpointNotFoundError(
                f"{error}. It lies on the disk of another node: on_missing={on_missing!r} is not about that case"
            ) from None
        others = exchange.on_rank_0("resume", lambda: named_otherwise(Path(folder).parent.glob("*")))
        if on_missing == "error":
            raise CheckpointNotFoundError(f"{error}. {others}{hint}") from None
        if exchange.rank == 0:
            _log.warning(
                "%s holds no average. %sIt starts anew from the live weights at the next update", folder, others
            )
        return False
    return True


def named_otherwise(folders: Iterable[Path]) -> str:
    """What to say of a checkpoint whose average has another name than the one that is looked for. No communication."""
    there = sorted(folder.name for folder in folders if folder.is_dir() and is_average(folder))
    if not there:
        return ""
    return f"The checkpoint has {', '.join(there)}: if that is the average, give the name= of the run that saved it. "


def _either(lower: list[bool], higher: list[bool]) -> list[bool]:
    return [first or second for first, second in zip(lower, higher, strict=True)]
