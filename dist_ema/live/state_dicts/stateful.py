"""All tracks of an average as one dict: for torch's distributed checkpoints, and whole in one process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dist_ema import habits
from dist_ema.averaging.counting.now import Beginnings
from dist_ema.averaging.state import AveragedState
from dist_ema.boxes.shards import Box
from dist_ema.disk.manifest import Manifest
from dist_ema.errors import CheckpointMismatchError, ConfigError
from dist_ema.live.distance import sum_refused
from dist_ema.live.holders.replicas import Replicas
from dist_ema.live.state_dicts import sharded
from dist_ema.live.state_dicts.dict_record import manifest_of_dict, record_of, record_tensors
from dist_ema.ranks.calls import Call, Calls

__all__ = ["StatefulAverages", "load_whole", "stateful", "whole"]

# Takes the tensors of a track, and returns the values of the owned shards.
_Taking = Callable[[Mapping[str, Any]], Sequence[torch.Tensor]]

_Buffers = Mapping[Box, torch.Tensor]

_OF_SEVERAL_RANKS = (
    "{call}() was called on {world_size} ranks, each of which has a part of the average, and torch.save would keep the "
    "part of one: call ema.save(path) and ema.load(path) on every rank, or give torch.distributed.checkpoint "
    '{{"ema": ema.stateful()}}'
)


class StatefulAverages:
    """A `Stateful` of torch's DCP: `dcp.save({"model": ..., "ema": ema.stateful()}, checkpoint_id=folder)`.

    It holds no tensors between its calls: `dcp.load` calls `state_dict` too, and reads into it.

    Args:
        calls: the calls of the average.
        state: the averages of this rank.
        replicas: the tensors that several ranks hold alike.
    """

    def __init__(self, calls: Calls, state: AveragedState, replicas: Replicas) -> None:
        self._calls = calls
        self._state = state
        self._replicas = replicas

    @property
    def state_dict(self) -> Callable[[], dict[str, Any]]:
        """Collective: every rank must call it, as `dcp.save` and `dcp.load` do. Every averaged tensor of every track.

        The tensors are in new memory, one copy of what this rank's model holds for a track. Under DDP that is the whole
        average, of which DCP writes one copy. The call raises a `SwapError` while the averaged weights are in the
        model, and a `RankMismatchError` if the ranks made different numbers of updates.

        Raises:
            ConfigError: accelerate's `register_for_checkpointing` asks, whose main process alone would make the call.
        """
        habits.refuse_registration()  # a method could not
        return functools.partial(self._calls, "state_dict", self._sharded)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Collective: every rank must call it, as `dcp.load` does. Take over all averages and counters, or none.

        It warns of another schedule or option, as `load` does.

        Args:
            state_dict: what `dcp.load` has read.

        Raises:
            SwapError: the averaged weights are in the model.
            CheckpointMismatchError: names, layouts or tracks are not those of this average.
            CheckpointCorruptError: the counters or texts are no such.
        """
        state = self._state
        self._calls(
            "load_state_dict",
            lambda call: _load(call, state, state_dict, lambda tensors: sharded.values_in(state.plan, tensors)),
        )

    def _sharded(self, call: Call) -> dict[str, Any]:
        state = self._state
        record = call.together(lambda: record_of(state), lambda record: state.progress)
        if state.options.skip_nonfinite:
            record = dataclasses.replace(record, num_refused=sum_refused(call.exchange, state))
        tensors = {track: sharded.averaged_state_dict(call, state, self._replicas, track) for track in state.schedules}
        # DCP would pickle an empty dict, and a rank may hold nothing.
        held = {track: of_track for track, of_track in tensors.items() if of_track}
        entries = record_tensors(record)
        entries |= {name: torch.tensor(entries[name], device="cpu") for name in ("num_updates", "num_refused")}
        return entries | ({"tracks": held} if held else {})


def stateful(call: Call, state: AveragedState, replicas: Replicas, calls: Calls) -> StatefulAverages:
    """Collective: every rank must call it. See `ShardedEMA.stateful`."""
    call.together(lambda: sharded.check_chunks(state.plan), lambda _: {}, within_swap=True)
    return StatefulAverages(calls, state, replicas)


def whole(call: Call, state: AveragedState) -> dict[str, Any]:
    """No communication. See `ShardedEMA.state_dict`."""
    _refuse_ranks(call)
    record = call.alone(lambda: record_of(state))
    record = dataclasses.replace(record, num_refused=state.num_refused if state.options.skip_nonfinite else 0)
    averaged = {spec.fqn: spec for spec in state.plan.specs if spec.averaged}
    tracks = {}
    for track in state.schedules:
        pieces = state.pieces(track, state.plan.averaged_part())
        devices = {box.fqn: value.device for box, value in pieces}
        tracks[track] = tensors = {
            fqn: torch.empty(spec.shape, dtype=state.options.dtype, device=devices.get(fqn))
            for fqn, spec in averaged.items()
        }
        with torch.no_grad():
            for box, value in pieces:
                tensors[box.fqn][box.region] = value
    kept = {track: _whole_buffers(state, track) for track in record.kept_buffers}
    return {"tracks": tracks, **({"kept_buffers": kept} if kept else {}), **record_tensors(record)}


def _whole_buffers(state: AveragedState, track: str) -> dict[str, torch.Tensor]:
    """Copies of the buffers that are kept with a track; one process has them whole."""
    return {box.fqn: values.clone() for box, values in state.shown_buffers(track).items()}


def load_whole(call: Call, state: AveragedState, state_dict: Mapping[str, Any]) -> None:
    """Take over a dict in one process; on several ranks refused. See `ShardedEMA.load_state_dict`."""
    _refuse_ranks(call)

    def take(tensors: Mapping[str, Any]) -> list[torch.Tensor]:
        shapes = {spec.fqn: spec.shape for spec in state.plan.specs if spec.averaged}
        given = {
            name: tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            for name, value in tensors.items()
        }
        if given != shapes:
            differing = sorted(fqn for fqn in shapes.keys() | given.keys() if shapes.get(fqn) != given.get(fqn))
            fqn = differing[0]
            raise CheckpointMismatchError(
                f"the state dict is of another model: {len(differing)} tensors differ. {fqn} is "
                f"{given.get(fqn, 'missing')} there, and {shapes.get(fqn, 'no averaged tensor')} here"
            )
        return [tensors[shard.fqn][shard.box.region] for shard in state.shards]

    def take_buffers(track: str) -> dict[Box, torch.Tensor]:
        given = state_dict.get("kept_buffers", {})[track]
        return {box: given[box.fqn].to(values, copy=True).view(values.shape) for box, values in _buffers(state).items()}

    _load(call, state, state_dict, take, take_buffers)


def _buffers(state: AveragedState) -> dict[Box, torch.Tensor]:
    """The live values of the buffers that are not averaged."""
    divisions = state.plan.live_buffers(extra_state=False).divisions
    return {held.box: held.values() for division in divisions for held in division.held}


def _load(
    call: Call,
    state: AveragedState,
    state_dict: Mapping[str, Any],
    take: _Taking,
    take_buffers: Callable[[str], _Buffers] | None = None,
) -> None:
    """Collective: every rank must call it. Take over all tracks and counters of a dict, or none of them.

    Args:
        call: the call in which it is loaded.
        state: the averages of this rank.
        state_dict: the entries.
        take: reads the tensors of a track.
        take_buffers: reads the buffers that were kept with the average of a track; None if the dict cannot have them.
    """
    exchange = call.exchange

    def prepare() -> tuple[Manifest, Manifest, dict[str, Sequence[torch.Tensor]], dict[str, _Buffers]]:
        now = record_of(state)
        saved = manifest_of_dict(state_dict, now)
        filled = {track: take(_tensors_of(state_dict, track)) for track in state.schedules}
        if take_buffers is None or not state.takes_buffers:
            return now, saved, filled, {}
        try:
            return now, saved, filled, {track: take_buffers(track) for track in saved.kept_buffers}
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointMismatchError(
                f"the state dict has other kept buffers than this model has buffers, or lacks them: {error!r}"
            ) from error

    now, saved, filled, buffers = call.together(
        prepare, lambda prepared: {"num_updates": prepared[1].num_updates}, after_saves=True
    )
    for change in now.changes_since(saved):
        exchange.warn(f"the state dict: {change}")
    if saved.kept_buffers and not buffers:
        exchange.warn(
            f"recalibrated buffers were kept with the average (track {', '.join(saved.kept_buffers)}) when this state "
            "was saved, and are not in it: the average shows the live buffers. Run update_bn in "
            "average_parameters(keep_buffers=True) again; save(path) and load(path) would have kept them"
        )
    # What a teacher has besides the averages stays as it is.
    others = [shard.live().clone(memory_format=torch.contiguous_format) for shard in state.to_load[len(state.shards) :]]
    fqns = {spec.fqn for spec in state.plan.specs if spec.averaged}
    refused = saved.num_refused if exchange.rank == 0 else 0
    restored = {track: [*values, *others] for track, values in filled.items()}
    beginnings = Beginnings(saved.starts, saved.begun_at)
    state.restore(restored, fqns, saved.num_updates, num_refused=refused, buffers=buffers, beginnings=beginnings)


def _tensors_of(state_dict: Mapping[str, Any], track: str) -> Mapping[str, Any]:
    """The tensors of a track; none where a rank holds nothing."""
    tracks = state_dict.get("tracks", {})
    tensors = tracks.get(track, {}) if isinstance(tracks, Mapping) else None
    if not isinstance(tensors, Mapping):
        raise CheckpointMismatchError(
            f"the state dict has no tensors by name in ['tracks'][{track!r}], expected what state_dict() of an average "
            "gives"
        )
    return tensors


def _refuse_ranks(call: Call) -> None:
    if call.exchange.world_size > 1:
        raise ConfigError(_OF_SEVERAL_RANKS.format(call=call.name, world_size=call.exchange.world_size))
