"""
From a model to boxes: the only module that knows the parallelisms.

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

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist_ema.errors import UnsupportedModelError
from dist_ema.layout import Box, Division, Held, Plan, TensorSpec

__all__ = ["canonical_name", "plan_model", "trained_parameters"]

# Child names that wrappers of torch reserve for the module they wrap (torch.compile, activation checkpointing).
_WRAPPED_CHILD = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


def plan_model(
    model: nn.Module,
    *,
    averages: Callable[[str], bool],
    update_buffers: bool,
    rank: int,
    world_size: int,
) -> Plan:
    """
    Plan the averaging of `model` on this rank. No communication.

    Args:
        model: plain, DDP or FSDP2 (`fully_shard`) module, possibly wrapped by `torch.compile`.
        averages: canonical name -> whether that tensor is to be averaged.
        update_buffers: whether floating-point buffers are averaged like parameters.
        rank: this rank in the default process group.
        world_size: ranks in the default process group.

    Raises:
        UnsupportedModelError: something cannot be served exactly, or there is nothing to average.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"model is {type(model).__name__}, expected a torch.nn.Module")
    settle = functools.partial(_reshard, _fsdp_modules(model))
    settle()
    plain_group, plain_ranks = _plain_replicas(model, rank, world_size)
    specs: list[TensorSpec] = []
    aliases: dict[str, str] = {}
    names_by_id: dict[int, str] = {}
    seen: set[str] = set()
    gathered: dict[tuple[Any, ...], list[Held]] = {}
    divisions: dict[tuple[Any, ...], tuple[tuple[int, ...], int, Any, bool]] = {}
    for raw_name, tensor, is_buffer in _persistent_tensors(model):
        fqn, owner, attribute = _resolve(model, raw_name)
        if id(tensor) in names_by_id:
            if fqn != names_by_id[id(tensor)]:
                aliases[fqn] = names_by_id[id(tensor)]
            continue
        if fqn in seen:
            raise UnsupportedModelError(f"two different tensors of the model are called {fqn!r}: rename one")
        seen.add(fqn)
        names_by_id[id(tensor)] = fqn
        averaged = tensor.is_floating_point() and averages(fqn) and (update_buffers or not is_buffer)
        _check_tensor(fqn, tensor, averages(fqn))
        spec = TensorSpec(fqn, tuple(tensor.shape), tensor.dtype, averaged, is_buffer)
        specs.append(spec)
        if isinstance(tensor, DTensor):
            box, ranks, position, group = _place_dtensor(fqn, tensor, world_size)
            view: Callable[[], torch.Tensor] = functools.partial(_local_values, tensor)
        else:
            box = Box(fqn, (0,) * tensor.dim(), tuple(tensor.shape))
            ranks, position, group = plain_ranks, plain_ranks.index(rank), plain_group
            view = functools.partial(_plain_values, owner, attribute)
        key = (ranks, averaged, is_buffer)
        gathered.setdefault(key, []).append(Held(spec, box, view))
        divisions.setdefault(key, (ranks, position, group, is_buffer))
    if not any(spec.averaged for spec in specs):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no floating-point parameter to average among its {len(specs)} tensors; "
            "expected at least one: check the model, and include= and exclude="
        )
    return Plan(
        specs=tuple(specs),
        aliases=aliases,
        divisions=tuple(
            Division(held=tuple(gathered[key]), ranks=ranks, position=position, group=group, single_owner=single)
            for key, (ranks, position, group, single) in divisions.items()
        ),
        settle=settle,
    )


def canonical_name(model: nn.Module, raw_name: str) -> str:
    """
    The name of a parameter or buffer without the prefixes of wrappers.

    Wrappers are recognised by type or by a child name that torch reserves, so a user's own attribute called
    `module` keeps its name.
    """
    return _resolve(model, raw_name)[0]


def _resolve(model: nn.Module, raw_name: str) -> tuple[str, nn.Module, str]:
    """Canonical name of a tensor, the module that holds it, and the attribute it is there."""
    owner: Any = model
    kept = []
    *path, attribute = raw_name.split(".")
    for part in path:
        wraps = part in _WRAPPED_CHILD or (part == "module" and isinstance(owner, DistributedDataParallel))
        if not wraps:
            kept.append(part)
        owner = getattr(owner, part)
    return ".".join([*kept, attribute]), owner, attribute


def trained_parameters(model: nn.Module) -> Mapping[int, str]:
    """Identity -> canonical name of every parameter that requires a gradient, as an optimizer holds them."""
    _reshard(_fsdp_modules(model))
    return {
        id(parameter): canonical_name(model, name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _persistent_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(raw name, tensor, is it a buffer) of all parameters and persistent buffers, tied ones repeatedly."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter, False
    saved = {id(value) for value in model.state_dict(keep_vars=True).values()}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if id(buffer) in saved:
            yield name, buffer, True


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
    """
    Make the parameters' names resolve to the sharded DTensors again. No communication.

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


def _check_tensor(fqn: str, tensor: torch.Tensor, wanted: bool) -> None:
    if tensor.is_meta:
        raise UnsupportedModelError(f"{fqn} is on the meta device and has no values: materialise the model first")
    if tensor.layout is not torch.strided:
        raise UnsupportedModelError(f"{fqn} has layout {tensor.layout}, expected a dense tensor")
    if tensor.is_complex() and wanted:
        raise UnsupportedModelError(
            f"{fqn} has dtype {tensor.dtype}, expected a real one: exclude it (exclude={fqn!r}) to keep it live"
        )


def _plain_values(owner: nn.Module, attribute: str) -> torch.Tensor:
    """Looked up by name: buffers are often assigned anew in the forward, and so by `.to()`."""
    values = getattr(owner, attribute)
    assert isinstance(values, torch.Tensor)  # it was one when the plan was made
    return values.detach()


def _local_values(tensor: DTensor) -> torch.Tensor:
    with torch.no_grad():
        return tensor.to_local()


def _place_dtensor(
    fqn: str, tensor: DTensor, world_size: int
) -> tuple[Box, tuple[int, ...], int, dist.ProcessGroup | None]:
    """The local box of a DTensor, the ranks that hold the same box, this rank's index among them, their group."""
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
    group = mesh.get_group(axes[0]) if axes else None
    return box, tuple(ranks.flatten().tolist()), coordinate[axes[0]] if axes else 0, group
