"""The calls that load: what all ranks check together before they read. The stages of the reading are in loading.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dist_ema.averaging.state import AveragedState
from dist_ema.checkpoint.fitting import Escapes
from dist_ema.checkpoint.loading import load_average, load_model
from dist_ema.checkpoint.record import manifest_of
from dist_ema.checks import PathLike, absolute, positive_integer, working_folder
from dist_ema.errors import CheckpointMismatchError, agreed
from dist_ema.options import Patterns, name_patterns
from dist_ema.ranks.calls import Call

__all__ = ["load", "start_from"]


def load(call: Call, state: AveragedState, path: PathLike, new: Patterns, dropped: Patterns, *, verify: bool) -> None:
    """Collective: every rank must call it. See `ShardedEMA.load`."""
    source, escapes = _agreed(call, path, new, dropped, verify=verify)
    exchange = call.exchange
    now = manifest_of(state, exchange.world_size)
    filled = exchange.agree(call.name, state.targets)
    saved, loaded = load_average(
        exchange, source, state.to_load, state.fqns_to_load, now, escapes, filled, verify=verify
    )
    for change in now.changes_since(saved):
        exchange.warn(f"{source}: {change}")
    refused = saved.num_refused if exchange.rank == 0 else 0
    state.restore(filled, loaded, saved.num_updates, num_refused=refused)


def start_from(
    call: Call, state: AveragedState, path: PathLike, num_updates: int | None, new: Patterns, dropped: Patterns
) -> None:
    """Collective: every rank must call it. See `ShardedEMA.start_from`."""
    source, escapes = _agreed(call, path, new, dropped, num_updates=num_updates)
    if num_updates is not None:
        num_updates = positive_integer("num_updates", num_updates)  # the call has compared it over the ranks
    filled = call.exchange.agree(call.name, state.targets)
    first = next(iter(filled.values()))
    loaded, stored = load_model(call.exchange, source, state.plan, state.shards, escapes, first[: len(state.shards)])
    if num_updates is None and stored == 0:  # the same on all ranks
        raise agreed(
            CheckpointMismatchError(
                f"{source} is an average of 0 updates: its next update would copy the live weights. Begin without it, "
                "or give num_updates=1 to average from its weights on"
            )
        )
    state.restore(dict.fromkeys(filled, first), loaded, num_updates or stored or 1)


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
