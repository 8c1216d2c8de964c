"""What files would hold now, and the manifest that says it. No communication."""

from __future__ import annotations

import dataclasses

import torch

from dist_ema._version import __version__
from dist_ema.averaging.state import AveragedState
from dist_ema.boxes.plan import Plan
from dist_ema.disk.manifest import LIVE_TRACK, Manifest, SavedTensor
from dist_ema.schedules.classic import ConstantSchedule
from dist_ema.schedules.records import schedule_to_json

__all__ = ["dtype_name", "in_files", "live_manifest_of", "manifest_of"]


def in_files(state: AveragedState) -> Plan:
    """The part of the plan that files hold now; who owns what is as in the whole plan.

    With `averaged_only` these are the averaged tensors. Buffers that are kept with an average belong to it.
    """
    if not state.options.averaged_only:
        return state.plan
    with_buffers = any(state.kept_buffers(track) is not None for track in state.schedules)
    return state.plan.averaged_part(with_buffers=with_buffers)


def manifest_of(
    state: AveragedState, world_size: int, floating: torch.dtype | None = None, part: Plan | None = None
) -> Manifest:
    """The manifest of the averages of now; files and checksums are not in it yet.

    Args:
        state: the averages of this rank.
        world_size: the number of ranks that write them.
        floating: the dtype that every floating-point tensor gets; None keeps its own.
        part: the part of the plan that is written (`Plan.only`); None for all that files hold.
    """
    plan = part or in_files(state)
    dtypes = state.dtypes(floating)
    stored = {} if floating is None else {"dtype": dtype_name(floating)}
    return Manifest(
        num_updates=state.num_updates,
        options={**state.options.to_json(), **stored},
        tracks={name: schedule_to_json(schedule) for name, schedule in state.schedules.items()},
        tensors={spec.fqn: SavedTensor(spec.shape, dtype_name(dtypes[spec.fqn]), spec.averaged) for spec in plan.specs},
        aliases=plan.aliases,
        kept_buffers=[name for name in state.schedules if state.kept_buffers(name) is not None],
        starts=state.beginnings.starts,
        begun_at=state.beginnings.begun_at,
        written_by={"dist_ema": __version__, "torch": torch.__version__, "world_size": world_size},
    )


def live_manifest_of(state: AveragedState, world_size: int, floating: torch.dtype | None, part: Plan) -> Manifest:
    """The manifest of a snapshot of the live weights: of a track that copies at every update.

    Args:
        state: the averages of this rank.
        world_size: the number of ranks that write.
        floating: the dtype that every floating-point tensor gets; None keeps its own.
        part: the part of the plan that is written.
    """
    dtypes = state.live_dtypes(floating)
    now = manifest_of(state, world_size, floating, part)
    return dataclasses.replace(
        now,
        tracks={LIVE_TRACK: schedule_to_json(ConstantSchedule(momentum=1.0))},
        tensors={
            fqn: dataclasses.replace(tensor, dtype=dtype_name(dtypes[fqn])) for fqn, tensor in now.tensors.items()
        },
        starts={},
        begun_at={},
        kept_buffers=[],
    )


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as the manifest spells it: "float32"."""
    return str(dtype).removeprefix("torch.")
