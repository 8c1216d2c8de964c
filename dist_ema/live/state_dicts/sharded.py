"""The averages laid out like the model's own state dict, for the checkpoints of other tools (`dcp.save`), and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dist_ema.averaging.state import AveragedState
from dist_ema.boxes.local import end_to_end
from dist_ema.boxes.plan import Plan
from dist_ema.boxes.shards import Box, Form, Held, NoForm, Shard
from dist_ema.checks import positive_integer
from dist_ema.errors import CheckpointMismatchError, UnsupportedModelError
from dist_ema.live.holders.replicas import Replicas
from dist_ema.live.spreading import spread_all
from dist_ema.live.swap import agreed_values, meeting
from dist_ema.ranks.calls import Call
from dist_ema.topology.chunks import chunks_of

__all__ = ["averaged_state_dict", "check_chunks", "sharded_state_dict", "take_over", "values_in"]


def sharded_state_dict(
    call: Call, state: AveragedState, replicas: Replicas, track: str | None
) -> dict[str, torch.Tensor]:
    """Collective along replicas only: see `ShardedEMA.sharded_state_dict`."""
    values, _ = agreed_values(call, state, replicas, track, lambda: _check_forms(state.plan))
    buffers = state.shown_buffers(track)
    return _sharded_tensors(state.plan, values, state.options.dtype, meeting(call, state), buffers)


def averaged_state_dict(call: Call, state: AveragedState, replicas: Replicas, track: str) -> dict[str, torch.Tensor]:
    """Collective along replicas only: the part of `sharded_state_dict` that is averaged, each tensor under one name."""
    plan = _averaged_part(state.plan)
    values, _ = agreed_values(call, state, replicas, track, lambda: _check_forms(plan))
    return _sharded_tensors(plan, values, state.options.dtype, meeting(call, state), {})


def check_chunks(plan: Plan) -> None:
    """Refuse a model of which torch's DCP would write other boxes than this rank holds. No communication.

    Raises:
        UnsupportedModelError: the error names the tensor.
    """
    for fqn, of_name in _held_by_name(_averaged_part(plan)).items():
        sizes, _ = end_to_end([held.box for held in of_name])
        live = of_name[0].values()
        entry = _form(of_name[0]).wrap(torch.empty(sizes, dtype=live.dtype, device=live.device))
        chunks = {box for box in chunks_of(fqn, entry) if box.numel}
        if chunks != {held.box for held in of_name if held.box.numel}:
            raise UnsupportedModelError(
                f"{fqn} is cut in several pieces along a dim (packed columns), of which torch.distributed.checkpoint "
                "knows one, and writes others than this rank holds: call save(path) and load(path) beside dcp.save"
            )


def take_over(
    call: Call, state: AveragedState, state_dict: Mapping[str, Any], track: str | None, num_updates: int | None
) -> None:
    """Collective: every rank must call it. See `ShardedEMA.load_sharded_state_dict`."""

    def prepare() -> tuple[str, list[torch.Tensor], int]:
        count = max(state.num_updates, 1) if num_updates is None else positive_integer("num_updates", num_updates)
        return state.track(track), values_in(state.plan, state_dict), count

    name, values, count = call.together(
        prepare, lambda prepared: {"track": prepared[0], "num_updates": prepared[2]}, after_saves=True
    )
    state.take_over(name, values, count)


def _check_forms(plan: Plan) -> None:
    """Refuse a model whose pieces have no form in a state dict. No communication.

    Raises:
        UnsupportedModelError: the model is under FSDP1.
    """
    for of_name in _held_by_name(plan).values():
        for held in of_name:
            _form(held)


@torch.no_grad()
def _sharded_tensors(
    plan: Plan,
    values: Sequence[torch.Tensor],
    dtype: torch.dtype,
    meeting: Sequence[Callable[[], None]],
    buffers: Mapping[Box, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Collective along replicas only: every rank that holds the same tensors must call it.

    Args:
        plan: the model as boxes; `_check_forms` has passed.
        values: averaged values of `plan.owned(averaged=True)`.
        dtype: the dtype of the averaged entries.
        meeting: steps after which no rank can stay out; see `Channel.meeting`.
        buffers: what this rank holds of the buffers that are kept with the average.

    Returns:
        Every tensor that this rank's model has, under all of its names, in new memory: plain or a DTensor, as the model
        has it.
    """
    plan.drop_gathered()
    held_by_name = _held_by_name(plan)
    whole: dict[str, torch.Tensor] = {}  # what this rank holds of a tensor, its boxes end to end
    parts: dict[Box, torch.Tensor] = {}
    for fqn, of_name in held_by_name.items():
        sizes, places = end_to_end([held.box for held in of_name])
        live = {held.box: held.values() for held in of_name}
        first, averaged = live[of_name[0].box], of_name[0].spec.averaged
        whole[fqn] = torch.empty(sizes, dtype=dtype if averaged else first.dtype, device=first.device)
        for box, place in places.items():
            parts[box] = whole[fqn][place.region]
            if not averaged:
                parts[box].copy_(live[box])

    def target(shard: Shard) -> torch.Tensor:
        return shard.within(parts[shard.held.box])

    # All ranks get the buffers of their owner, as within a swap.
    spread_all(plan, values, target, meeting, buffers, extra_state=True)
    held_names = [spec.fqn for spec in plan.specs if spec.fqn in held_by_name]
    state = {fqn: _form(held_by_name[fqn][0]).wrap(whole[fqn]) for fqn in held_names}
    return state | {alias: state[fqn] for alias, fqn in plan.aliases.items() if fqn in state}


def values_in(plan: Plan, state_dict: Mapping[str, Any]) -> list[torch.Tensor]:
    """The values of `plan.owned(averaged=True)` in a dict of `_sharded_tensors`, sharing memory. No communication.

    Raises:
        CheckpointMismatchError: names, shapes or layouts are not the model's.
    """
    held_by_name = _held_by_name(plan)
    expected = [fqn for fqn, of_name in held_by_name.items() if of_name[0].spec.averaged]
    known = {*(spec.fqn for spec in plan.specs), *plan.aliases}
    missing, extra = sorted(set(expected) - state_dict.keys()), sorted(state_dict.keys() - known)
    if missing or extra:
        raise CheckpointMismatchError(
            f"the state dict lacks {len(missing)} averaged tensors {missing[:3]} and has {len(extra)} unknown ones "
            f"{extra[:3]}, expected what sharded_state_dict of this model gives"
        )
    parts: dict[Box, torch.Tensor] = {}
    for fqn in expected:
        sizes, places = end_to_end([held.box for held in held_by_name[fqn]])
        whole = _form(held_by_name[fqn][0]).unwrap(fqn, state_dict[fqn])
        if whole.shape != sizes:
            raise CheckpointMismatchError(
                f"the entry of {fqn} has {list(whole.shape)} on this rank, expected {list(sizes)}"
            )
        parts.update((box, whole[place.region]) for box, place in places.items())
    return [shard.within(parts[shard.held.box]) for shard in plan.owned(averaged=True)]


def _averaged_part(plan: Plan) -> Plan:
    """The averaged tensors of a plan, without the further names of tied ones."""
    return dataclasses.replace(plan.averaged_part(), aliases={})


def _held_by_name(plan: Plan) -> dict[str, list[Held]]:
    """What this rank holds of each tensor; a name of which it holds nothing is not there."""
    by_name: dict[str, list[Held]] = {}
    for division in plan.divisions:
        for held in division.held:
            by_name.setdefault(held.spec.fqn, []).append(held)
    return by_name


def _form(held: Held) -> Form:
    if isinstance(held.form, NoForm):
        raise UnsupportedModelError(f"{held.spec.fqn} {held.form.reason}")
    return held.form
