"""How far the live weights lie from an average, measured where the shards are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from dist_ema.averaging.state import AveragedState
from dist_ema.averaging.tensor_blocks import cut_alike
from dist_ema.boxes.plan import Plan
from dist_ema.errors import ConfigError
from dist_ema.options import matches_any, name_patterns
from dist_ema.ranks.calls import Call
from dist_ema.ranks.exchange import Exchange

__all__ = ["Groups", "distances", "metrics", "num_refused", "relative_distance", "sum_refused"]

Groups = Mapping[str, str | Iterable[str]]
"""Name of a group -> glob pattern or patterns of the names in it."""

WHOLE = "all"

# Elements of both sides that are converted at a time.
_CHUNK_NUMEL = 2**20


def distances(
    call: Call, state: AveragedState, tracks: Sequence[str | None], groups: Groups | None
) -> list[dict[str, float]]:
    """Collective: every rank must call it. `ShardedEMA.distance` of several tracks.

    Args:
        call: the call in which the distances are measured.
        state: the averages of this rank.
        tracks: the names of the averages; None for the only one.
        groups: as in `ShardedEMA.distance`.
    """

    def prepare() -> tuple[list[str], dict[str, set[str]]]:
        return [state.track(track) for track in tracks], _checked_groups(state.plan, groups)

    def same(prepared: tuple[list[str], dict[str, set[str]]]) -> dict[str, Any]:
        names, members = prepared
        return {"tracks": names, "groups": {group: sorted(fqns) for group, fqns in members.items()}}

    names, members = call.together(prepare, same)
    return [_distances(call.exchange, state, name, members) for name in names]


def metrics(call: Call, state: AveragedState, prefix: str, groups: Groups | None) -> dict[str, float]:
    """Collective: every rank must call it. See `ShardedEMA.metrics`."""
    tracks = list(state.schedules)
    by_track = distances(call, state, tracks, groups)  # first: no rank fails alone before the others have come
    numbers = {f"{prefix}/num_updates": float(state.num_updates)}
    for track, by_group in zip(tracks, by_track, strict=True):
        numbers.update(_metrics_of(state, track, prefix, by_group))
    return numbers


def num_refused(call: Call, state: AveragedState) -> int:
    """Collective: every rank must call it. See `ShardedEMA.num_refused`."""
    call.together(lambda: None, lambda _: {}, within_swap=True, of_changed=True)
    return sum_refused(call.exchange, state)


def sum_refused(exchange: Exchange, state: AveragedState) -> int:
    """Collective: every rank must call it. The live values that `skip_nonfinite` has left out, on all ranks."""
    (total,) = exchange.sum_integers([state.num_refused])
    return total


def _checked_groups(plan: Plan, groups: Groups | None) -> dict[str, set[str]]:
    """Group -> fqns of its averaged tensors; by default the model's children, then all of them together.

    Raises:
        ConfigError: a group is called "all", or none of its patterns matches an averaged name.
    """
    known_as = plan.names_of_tensors
    names = {spec.fqn: known_as[spec.fqn] for spec in plan.specs if spec.averaged}
    members: dict[str, set[str]] = {WHOLE: set(names)}
    if groups is None:
        for fqn in names:
            members.setdefault(fqn.split(".")[0], set()).add(fqn)
        members[WHOLE] = set(names)  # a child of that name does not hide the whole
        return members
    if not isinstance(groups, Mapping):
        raise ConfigError(
            f"groups is {groups!r}, expected group names and their patterns, such as {{'norms': '*norm*'}}"
        )
    for group, patterns in groups.items():
        globs = name_patterns(f"groups[{group!r}]", patterns)
        members[group] = {fqn for fqn, known in names.items() if matches_any(known, globs)}
        if group == WHOLE or not members[group]:
            raise ConfigError(
                f"groups has {group!r}: {patterns!r}, expected another name than {WHOLE!r} and patterns that match "
                f"some of the {len(names)} averaged names ({', '.join(list(names)[:3])}, ...)"
            )
    return members


@torch.no_grad()
def _distances(
    exchange: Exchange, state: AveragedState, track: str, members: Mapping[str, set[str]]
) -> dict[str, float]:
    """Collective: every rank must call it. Group -> `||live - averaged|| / ||live||`, the same on every rank.

    The sums of squares are in float64. Both sides are read once, in chunks. The host waits for the device once. Each
    rank sends two numbers a group.

    Args:
        exchange: the control traffic of all ranks.
        state: the averages of this rank.
        track: the name of the average.
        members: group -> fqns.
    """
    squares: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for shard, averaged in zip(state.shards, state.values(track), strict=True):
        wide = torch.promote_types(averaged.dtype, torch.float32)
        for averaged_chunk, live_chunk in cut_alike(averaged, shard.live(), _CHUNK_NUMEL):
            live = live_chunk.to(averaged.device, wide)
            both = torch.stack([_square(live - averaged_chunk), _square(live)])
            squares.setdefault(averaged.device, []).append((shard.fqn, both))
    by_name: dict[str, list[float]] = {}
    for of_device in squares.values():
        for (fqn, _), row in zip(of_device, torch.stack([both for _, both in of_device]).tolist(), strict=True):
            by_name[fqn] = [a + b for a, b in zip(by_name.get(fqn, [0.0, 0.0]), row, strict=True)]
    own = [
        math.fsum(by_name[fqn][side] for fqn in sorted(fqns & by_name.keys()))
        for fqns in members.values()
        for side in (0, 1)
    ]
    total = exchange.sum_floats(own)
    return {
        group: relative_distance(difference, reference)
        for group, difference, reference in zip(members, total[::2], total[1::2], strict=True)
    }


def relative_distance(difference: float, reference: float) -> float:
    """`||a - b|| / ||b||` from the two sums of squares."""
    if reference == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return math.sqrt(difference / reference)


def _metrics_of(state: AveragedState, track: str, prefix: str, by_group: Mapping[str, float]) -> dict[str, float]:
    """The metrics of one average, from its distance in each group. No communication."""
    start = f"{prefix}/" if len(state.schedules) == 1 else f"{prefix}/{track}/"
    parts = {f"{start}distance/{group}": distance for group, distance in by_group.items() if group != WHOLE}
    return {f"{start}momentum": state.momentum(track), f"{start}distance": by_group[WHOLE], **parts}


def _square(values: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm.square()
