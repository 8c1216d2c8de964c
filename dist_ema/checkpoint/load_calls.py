"""The calls that load: what all ranks check together before they read. The stages of the reading are in loading.py."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from dist_ema.averaging.state import AveragedState
from dist_ema.boxes.shards import EXTRA_STATE, Shard
from dist_ema.checkpoint.fitting import Escapes
from dist_ema.checkpoint.loading import load_average, load_model
from dist_ema.checkpoint.record import manifest_of
from dist_ema.checkpoint.tracks.changes import NewTracks, TrackChanges
from dist_ema.checks import PathLike, absolute, positive_integer, working_folder
from dist_ema.disk.manifest import Manifest
from dist_ema.errors import CheckpointMismatchError, ConfigError, agreed
from dist_ema.options import Patterns, name_patterns
from dist_ema.ranks.calls import Call
from dist_ema.ranks.exchange import Exchange

__all__ = ["load", "read_start", "start_from"]


def load(
    call: Call,
    state: AveragedState,
    path: PathLike,
    tensors: tuple[Patterns, Patterns, bool],
    tracks: tuple[NewTracks, Patterns, Mapping[str, str] | None],
    *,
    verify: bool,
) -> None:
    """Collective: every rank must call it. See `ShardedEMA.load`.

    Args:
        call: the call.
        state: the averages of this rank.
        path: as in `ShardedEMA.load`.
        tensors: `new`, `dropped` and `options_changed` of `ShardedEMA.load`.
        tracks: `new_tracks`, `dropped_tracks` and `renamed_tracks` of `ShardedEMA.load`.
        verify: as in `ShardedEMA.load`.
    """

    def check() -> TrackChanges:
        changes = TrackChanges.of(state.schedules, *tracks)
        if not state.takes_tracks and (changes.new or changes.all_new or changes.dropped):
            raise ConfigError(
                "new_tracks or dropped_tracks with into: a teacher holds one average from its construction on. Load "
                "without it, or rename its track (renamed_tracks)"
            )
        return changes

    new, dropped, options_changed = tensors
    source, escapes, changes = _agreed(
        call, path, new, dropped, check, options_changed=bool(options_changed), verify=verify
    )
    exchange = call.exchange
    now = manifest_of(state, exchange.world_size, part=state.plan)
    filled = exchange.agree(call.name, state.targets)
    kept = state.plan.live_buffers(extra_state=False) if state.takes_buffers else None
    left_out = frozenset(state.plan.left_out)  # of a quantised base there are as many names as in the checkpoint
    saved, sources, loaded, buffers = load_average(
        exchange,
        source,
        state.to_load,
        state.fqns_to_load,
        now,
        left_out,
        escapes,
        changes,
        filled,
        kept,
        verify=verify,
    )
    _warn_of_other_tensors(exchange, source, saved, now, left_out)
    for change in now.changes_since(changes.as_named(saved)):
        exchange.warn(f"{source}: {change}")
    refused = saved.num_refused if exchange.rank == 0 else 0
    state.restore(
        {track: filled[track] for track in sources.names},
        loaded,
        saved.num_updates,
        num_refused=refused,
        buffers=buffers,
        beginnings=sources.beginnings,
    )


def start_from(
    call: Call, state: AveragedState, path: PathLike, num_updates: int | None, new: Patterns, dropped: Patterns
) -> None:
    """Collective: every rank must call it. See `ShardedEMA.start_from`."""
    source, escapes, _ = _agreed(call, path, new, dropped, TrackChanges, num_updates=num_updates)
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


def _warn_of_other_tensors(
    exchange: Exchange, source: Path, saved: Manifest, now: Manifest, left_out: Collection[str]
) -> None:
    """Collective: every rank must call it. Warn of tensors that are not averaged, and that one side alone writes."""
    live = {fqn for fqn, tensor in now.tensors.items() if not tensor.averaged and not fqn.endswith(EXTRA_STATE)}
    writes_less = bool(now.options["averaged_only"]) and not saved.options.get("averaged_only")
    not_read = [
        fqn
        for fqn, stored in saved.tensors.items()
        if not fqn.endswith(EXTRA_STATE) and (fqn in left_out or (fqn in live and (stored.averaged or writes_less)))
    ]
    if not_read:
        exchange.warn(
            f"{source} has {len(not_read)} tensors that this run does not average ({not_read[0]}, ...), as it was "
            "saved with other options (trainable_only, averaged_only, exclude): they are not read. Files of this run "
            "have their live values, or with averaged_only=True nothing of them"
        )
    missing = [fqn for fqn in now.tensors if fqn in live and fqn not in saved.tensors]
    if missing and saved.options.get("averaged_only") and not now.options["averaged_only"]:
        exchange.warn(
            f"{source} was saved with averaged_only=True, without {len(missing)} tensors that are not averaged "
            f"({missing[0]}, ...): they keep their live values, which files of this run have"
        )


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


def _agreed(
    call: Call,
    path: PathLike,
    new: Patterns,
    dropped: Patterns,
    changes: Callable[[], TrackChanges],
    *,
    options_changed: bool = False,
    **further: object,
) -> tuple[Path, Escapes, TrackChanges]:
    """The checked arguments, the same on all ranks."""

    def prepare() -> tuple[Path, Escapes, TrackChanges]:
        escapes = Escapes(name_patterns("new", new), name_patterns("dropped", dropped), options_changed)
        return absolute(path), escapes, changes()

    return call.together(
        prepare,
        lambda checked: {
            "path": str(checked[0]),
            **dataclasses.asdict(checked[1]),
            **checked[2].to_json(),
            **{name: str(value) for name, value in further.items()},
        },
        after_saves=True,
        working_folder=working_folder(path),
    )
