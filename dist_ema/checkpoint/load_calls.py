"""The calls that load: what all ranks check together before they read. The stages of the reading are in loading.py."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Sequence
from pathlib import Path

import torch

from dist_ema.averaging.state import AveragedState
from dist_ema.boxes.shards import Shard
from dist_ema.checkpoint.loading import Escapes, load_average, load_model
from dist_ema.checkpoint.record import manifest_of
from dist_ema.checks import PathLike, absolute, positive_integer, working_folder
from dist_ema.options import Patterns, name_patterns
from dist_ema.ranks.calls import Call

__all__ = ["load", "read_start", "start_from"]


def load(call: Call, state: AveragedState, path: PathLike, new: Patterns, dropped: Patterns, *, verify: bool) -> None:
    """Collective: every rank must call it. See `ShardedEMA.load`."""
    source, escapes = _agreed(call, path, new, dropped, verify=verify)
    exchange = call.exchange
    now = manifest_of(state, exchange.world_size)
    filled = exchange.agree(call.name, state.targets)
    kept = state.plan.live_buffers(extra_state=False) if state.takes_buffers else None
    saved, loaded, buffers = load_average(
        exchange, source, state.to_load, state.fqns_to_load, now, escapes, filled, kept, verify=verify
    )
    for change in now.changes_since(saved):
        exchange.warn(f"{source}: {change}")
    refused = saved.num_refused if exchange.rank == 0 else 0
    state.restore(filled, loaded, saved.num_updates, num_refused=refused, buffers=buffers)


def start_from(
    call: Call, state: AveragedState, path: PathLike, num_updates: int, new: Patterns, dropped: Patterns
) -> None:
    """Collective: every rank must call it. See `ShardedEMA.start_from`."""
    source, escapes = _agreed(call, path, new, dropped, num_updates=num_updates)
    start = positive_integer("num_updates", num_updates)  # the call has compared it over the ranks
    filled = call.exchange.agree(call.name, state.targets)
    first = next(iter(filled.values()))
    loaded = load_model(call.exchange, source, state.plan, state.shards, escapes, first[: len(state.shards)])
    state.restore(dict.fromkeys(filled, first), loaded, start)


def read_start(
    call: Call, state: AveragedState, source: Path, shards: Sequence[Shard], targets: Sequence[torch.Tensor]
) -> None:
    """Collective: every rank must call it. Fill one tensor for each of some averaged shards from a model folder.

    The folder may lack averaged buffers, which are not corrected.

    Raises:
        CheckpointError: the folder is missing or damaged, or of another model; the same on all ranks.
    """
    buffers = tuple(glob.escape(spec.fqn) for spec in state.plan.specs if spec.averaged and spec.is_buffer)
    load_model(call.exchange, source, state.plan, shards, Escapes(new=buffers), targets)


def _agreed(call: Call, path: PathLike, new: Patterns, dropped: Patterns, **further: object) -> tuple[Path, Escapes]:
    """The checked arguments, the same on all ranks."""

    def prepare() -> tuple[Path, Escapes]:
        return absolute(path), Escapes(name_patterns("new", new), name_patterns("dropped", dropped))

    return call.together(
        prepare,
        lambda checked: {
            "path": str(checked[0]),
            **dataclasses.asdict(checked[1]),
            **{name: str(value) for name, value in further.items()},
        },
        after_saves=True,
        working_folder=working_folder(path),
    )
