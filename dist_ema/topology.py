"""From a model to boxes: the only module that knows the parallelisms.

`plan_model` finds every persistent tensor of a model, its canonical name, the box of it that this rank holds
and the ranks that hold the same box. Everything above sees `dist_ema.layout.Plan`. No communication.

| live tensor | box | ranks that hold it alike |
|---|---|---|
| plain, one process | everything | this one |
| plain, in DDP or in a plain module of an initialised process group | everything | all ranks |
| DTensor | its local piece | the ranks along the Replicate axes of its mesh |
| buffer | everything | all ranks, owned by rank 0: its copy is the one DDP broadcasts |
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist_ema.errors import UnsupportedModelError
from dist_ema.layout import Box, Division, Held, Plan, TensorSpec

__all__ = ["plan_model", "trained_parameters"]

# Child names that wrappers of torch reserve for the module they wrap (torch.compile, activation checkpointing).
_WRAPPED_CHILD = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


def plan_model(
    model: nn.Module,
    *,
    averages: Callable[[Sequence[str]], bool],
    update_buffers: bool,
    rank: int,
    world_size: int,
) -> Plan:
    """Plan the averaging of `model` on this rank. No communication.

    Args:
        model: plain, DDP or FSDP2 (`fully_shard`) module, possibly wrapped by `torch.compile`.
        averages: all canonical names of a tensor (several if tied) -> whether it is to be averaged.
        update_buffers: whether floating-point buffers are averaged like parameters.
        rank: this rank in the default process group.
        world_size: ranks in the default process group.

    Raises:
        UnsupportedModelError: something cannot be served exactly.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"model is {type(model).__name__}, expected a torch.nn.Module")
    settle = functools.partial(_reshard, _fsdp_modules(model))
    settle()
    plain_group, plain_ranks = _plain_replicas(model, rank, world_size)
    specs: list[TensorSpec] = []
    aliases: dict[str, str] = {}
    members: dict[tuple[Any, ...], list[Held]] = {}
    holders: dict[tuple[Any, ...], _Holders] = {}
    for named in _named_tensors(model):
        tensor, fqn = named.tensor, named.fqns[0]
        _check_tensor(fqn, tensor)
        wanted = averages(named.fqns) and (update_buffers or not named.is_buffer)
        if wanted and tensor.is_complex():
            raise UnsupportedModelError(
                f"{fqn} has dtype {tensor.dtype}, expected a real one: exclude it (exclude={fqn!r}) to keep it live"
            )
        averaged = wanted and tensor.is_floating_point()
        spec = TensorSpec(fqn, tuple(tensor.shape), tensor.dtype, averaged, named.is_buffer)
        specs.append(spec)
        aliases.update(dict.fromkeys(named.fqns[1:], fqn))
        if isinstance(tensor, DTensor):
            box, held_by = _place_dtensor(fqn, tensor, world_size)
            view: Callable[[], torch.Tensor] = functools.partial(_local_values, tensor)
        else:
            box = Box(fqn, (0,) * tensor.dim(), tuple(tensor.shape))
            held_by = _Holders(plain_ranks, plain_ranks.index(rank), plain_group)
            view = functools.partial(_plain_values, named.owner, named.attribute)
        key = (held_by.ranks, averaged, named.is_buffer)
        members.setdefault(key, []).append(Held(spec, box, view))
        holders.setdefault(key, held_by)
    divisions = tuple(
        Division(
            held=tuple(members[key]),
            ranks=held_by.ranks,
            position=held_by.position,
            group=held_by.group,
            single_owner=members[key][0].spec.is_buffer,
        )
        for key, held_by in holders.items()
    )
    return Plan(specs=tuple(specs), aliases=aliases, divisions=divisions, settle=settle)


def trained_parameters(model: nn.Module) -> Mapping[int, str]:
    """Identity -> canonical name of every parameter that requires a gradient, as an optimizer holds them."""
    _reshard(_fsdp_modules(model))
    return {id(named.tensor): named.fqns[0] for named in _named_tensors(model) if named.tensor.requires_grad}


@dataclasses.dataclass(frozen=True)
class _Holders:
    """The ranks that hold a box alike, this rank's index among them, and their process group."""

    ranks: tuple[int, ...]
    position: int
    group: dist.ProcessGroup | None


@dataclasses.dataclass
class _Named:
    """A parameter or persistent buffer; `fqns` has all canonical names of a tied one, the first met first."""

    tensor: torch.Tensor
    is_buffer: bool
    fqns: list[str]
    owner: nn.Module
    attribute: str


def _named_tensors(model: nn.Module) -> list[_Named]:
    """Every parameter and persistent buffer once, in the order of the model."""
    saved = {id(value) for value in model.state_dict(keep_vars=True).values()}
    candidates: list[tuple[str, torch.Tensor, bool]] = [
        *((name, parameter, False) for name, parameter in model.named_parameters(remove_duplicate=False)),
        *((name, buffer, True) for name, buffer in model.named_buffers(remove_duplicate=False) if id(buffer) in saved),
    ]
    found: dict[int, _Named] = {}
    taken: dict[str, int] = {}
    for raw_name, tensor, is_buffer in candidates:
        fqn, owner, attribute = _resolve(model, raw_name)
        if taken.setdefault(fqn, id(tensor)) != id(tensor):
            raise UnsupportedModelError(f"two different tensors of the model are called {fqn!r}: rename one")
        named = found.setdefault(id(tensor), _Named(tensor, is_buffer, [], owner, attribute))
        if fqn not in named.fqns:
            named.fqns.append(fqn)
    return list(found.values())


def _resolve(model: nn.Module, raw_name: str) -> tuple[str, nn.Module, str]:
    """Canonical name of a tensor, the module that holds it, and the attribute it is there.

    Prefixes of wrappers are dropped. Wrappers are recognised by type or by a child name that torch reserves, so a
    user's own attribute called `module` keeps its name.
    """
    owner: Any = model
    kept = []
    *path, attribute = raw_name.split(".")
    for part in path:
        wraps = part in _WRAPPED_CHILD or (part == "module" and isinstance(owner, DistributedDataParallel))
        if not wraps:
            kept.append(part)
        owner = getattr(owner, part)
    return ".".join([*kept, attribute]), owner, attribute


def _fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    found: list[FSDPModule] = []
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise UnsupportedModelError(
                f"module {name!r} is wrapped by FSDP1 (FullyShardedDataParallel), expected a plain, DDP or FSDP2 "
                "model: set fsdp_version: 2 in the accelerate configuration, or use fully_shard"
            )
        if isinstance(module, FSDPModule):
            found.append(module)
    return found


def _reshard(modules: list[FSDPModule]) -> None:
    """Make the parameters' names resolve to the sharded DTensors again. No communication.

    After a forward without gradients the root group stays gathered: its names then yield plain tensors that
    are dropped at the next reshard, so reads through them are stale and writes are lost.
    """
    for module in modules:
        module.reshard()


def _plain_replicas(model: nn.Module, rank: int, world_size: int) -> tuple[Any, tuple[int, ...]]:
    """Process group and ranks that hold the model's plain tensors alike."""
    group = model.process_group if isinstance(model, DistributedDataParallel) else None
    ranks = tuple(dist.get_process_group_ranks(group)) if group is not None else tuple(range(world_size))
    if len(ranks) != world_size:
        raise UnsupportedModelError(
            f"DistributedDataParallel spans ranks {list(ranks)} of {world_size}: every rank outside would own a "
            "second average. Expected a group of all ranks"
        )
    return group, ranks


def _check_tensor(fqn: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise UnsupportedModelError(f"{fqn} is on the meta device and has no values: materialise the model first")
    if tensor.layout is not torch.strided:
        raise UnsupportedModelError(f"{fqn} has layout {tensor.layout}, expected a dense tensor")


def _plain_values(owner: nn.Module, attribute: str) -> torch.Tensor:
    """Looked up by name: buffers are often assigned anew in the forward, and so by `.to()`."""
    values = getattr(owner, attribute)
    assert isinstance(values, torch.Tensor)  # it was one when the plan was made
    return values.detach()


def _local_values(tensor: DTensor) -> torch.Tensor:
    with torch.no_grad():
        return tensor.to_local()


def _place_dtensor(fqn: str, tensor: DTensor, world_size: int) -> tuple[Box, _Holders]:
    """The local box of a DTensor, and the ranks that hold the same one."""
    mesh, placements = tensor.device_mesh, tensor.placements
    if mesh.size() != world_size:
        raise UnsupportedModelError(
            f"{fqn} lives on a device mesh of {mesh.size()} of {world_size} ranks: the ranks outside hold a second "
            "copy that the mesh does not tell of. Expected a mesh of all ranks, with a Replicate axis"
        )
    if any(placement.is_partial() for placement in placements):
        raise UnsupportedModelError(f"{fqn} has placements {placements}, expected Shard or Replicate only")
    axes = [axis for axis, placement in enumerate(placements) if placement.is_replicate() and mesh.size(axis) > 1]
    if len(axes) > 1:
        raise UnsupportedModelError(
            f"{fqn} is replicated along {len(axes)} axes of its mesh, expected at most one: flatten these axes"
        )
    (chunk,) = tensor.__create_chunk_list__()
    box = Box(fqn, tuple(chunk.offsets), tuple(chunk.sizes))
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # the mesh spans all ranks
    ranks = mesh.mesh[tuple(slice(None) if axis in axes else at for axis, at in enumerate(coordinate))]
    position = coordinate[axes[0]] if axes else 0
    return box, _Holders(tuple(ranks.flatten().tolist()), position, mesh.get_group(axes[0]) if axes else None)
