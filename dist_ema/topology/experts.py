"""Plain tensors that each rank has of its own, as `experts=` declares them: parts of what a group holds together.

A rank cannot see what the others hold under a name, and planning does not communicate. So the tensors of the ranks of a
group are equal in size and number, and the place in the group tells where one lies. Ranks that prove this wrong are
refused when all plans are compared: by the shapes of whole tensors, and by `check_numbers`.

    Experts("w", dim=0), 2 ranks             Experts("experts.{}.w", dim=None), 2 ranks

    rank 0   w of 4 rows                     experts.0.w  experts.1.w
    rank 1   w of 4 rows                     experts.0.w  experts.1.w
    files    w of 8 rows                     experts.0.w  experts.1.w  experts.2.w  experts.3.w

Numbers are renamed in every layout: listed experts may be DTensors, over ranks that hold the same ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from dist_ema.boxes.plan import Plan
from dist_ema.boxes.shards import Box
from dist_ema.errors import CheckpointMismatchError, ConfigError
from dist_ema.messages import MOST_NAMED, first_of
from dist_ema.options import Experts
from dist_ema.topology.extra import whole_state
from dist_ema.topology.plain import PlainForm, whole_tensor
from dist_ema.topology.seam.layout import HeldBox, Holders, Layout, Locator, Named, Part
from dist_ema.topology.seam.loaded import dtensor_from_local, is_dtensor, shard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["DeclaredExperts", "check_numbers", "with_parts"]


class DeclaredExperts(Layout):
    """Declared plain tensors: a rank holds one box of a larger tensor, or a tensor of its own with a number for all."""

    def claims(self, named: Named) -> bool:
        """Whether the tensor was declared, and lies in no other layout."""
        return named.part is not None and _is_plain(named)

    def locator(self, model: nn.Module, rank: int, world_size: int) -> Locator:
        """The locator names this rank alone: which ranks hold copies does not follow from a group of experts.

        It refuses tensors that DDP keeps alike over ranks of the group.
        """
        synchronised: dict[int, dist.ProcessGroup] = {}
        for ddp in (module for module in model.modules() if isinstance(module, DistributedDataParallel)):
            for name, parameter in ddp.module.named_parameters():
                if name not in ddp.parameters_to_ignore:
                    synchronised[id(parameter)] = ddp.process_group

        def locate(named: Named) -> tuple[list[HeldBox], Holders]:
            assert named.part is not None  # it was claimed
            _check_not_alike(named, named.part, synchronised.get(id(named.source)), world_size)
            return [_box_of(named, named.part)], Holders((rank,), 0)

        return locate


def _check_not_alike(named: Named, part: Part, group: dist.ProcessGroup | None, world_size: int) -> None:
    """Refuse a tensor that DDP keeps alike on ranks that hold different experts, as the user says."""
    if group is None:
        return
    of_experts = range(world_size) if part.group is None else dist.get_process_group_ranks(part.group)
    alike = sorted(set(of_experts).intersection(dist.get_process_group_ranks(group)))
    if len(alike) > 1:
        ranks = first_of([str(rank) for rank in alike[:MOST_NAMED]], len(alike))
        raise ConfigError(
            f"{named.fqns[0]} is declared by experts= to be another tensor on each of the ranks {ranks}, but "
            "DistributedDataParallel keeps it alike there. Keep it out of DDP, by "
            "DistributedDataParallel._set_params_and_buffers_to_ignore_for_model before wrapping, or leave out the "
            "declaration"
        )


def _box_of(named: Named, part: Part) -> HeldBox:
    held = whole_state(named) if named.is_extra_state else whole_tensor(named)
    box = Box(named.fqns[0], part.offsets, tuple(named.source.shape))
    return dataclasses.replace(held, box=box, form=part.form)


def with_parts(tensors: Sequence[Named], *, experts: Sequence[Experts], rank: int, world_size: int) -> list[Named]:
    """The tensors of a model, with the names and shapes that the declared ones have over all ranks. No communication.

    Args:
        tensors: the tensors as this rank's model has them.
        experts: the declarations.
        rank: this rank in the default process group.
        world_size: the number of ranks in the default process group.

    Raises:
        ConfigError: a declaration does not fit the model or this rank; the error names the tensor.
    """
    if not experts:
        return list(tensors)
    declared = [(named, _declaration(named, experts)) for named in tensors]
    numbers: dict[str, set[int]] = {}
    for named, declaration in declared:
        for prefix, number, _ in _numbered(named, declaration):
            numbers.setdefault(prefix, set()).add(number)
    for prefix, present in numbers.items():
        if present != set(range(len(present))):
            raise ConfigError(
                f"{prefix}* are numbered {sorted(present)} on rank {rank}, and experts= declares them with dim=None: "
                "expected every rank to number its own experts from 0 on. If the numbers are those of all ranks "
                "already, leave the declaration out: names that each rank has of its own need none"
            )
    parts = []
    for named, declaration in declared:
        if declaration is None or (declaration.dim is not None and named.is_extra_state):
            parts.append(named)
            continue
        position, size = _place(named, declaration.group, rank, world_size)
        if declaration.dim is None:
            parts.append(_renumbered(named, declaration, numbers, position))
        else:
            parts.append(_part_along(named, declaration.dim, declaration.group, position, size))
    _check_names(parts)
    return parts


def check_numbers(plan: Plan, experts: Sequence[Experts], world_size: int) -> None:
    """Refuse lists of experts of which ranks hold unequal parts: their numbers over all ranks are wrong.

    No communication.

    Args:
        plan: the plan, with the tensors of all ranks.
        experts: the declarations.
        world_size: the number of ranks in the default process group.

    Raises:
        ConfigError: the error names the list.
    """
    own = [held.spec.fqn for division in plan.divisions for held in division.held]
    for declaration in experts:
        of_all = declaration.numbers(plan.names)
        size = world_size if declaration.group is None else dist.get_world_size(declaration.group)
        for prefix, numbers in declaration.numbers(own).items():
            if of_all[prefix] != set(range(size * len(numbers))):
                present = first_of([str(number) for number in sorted(of_all[prefix])[:MOST_NAMED]], len(of_all[prefix]))
                raise ConfigError(
                    f"{prefix} has {len(numbers)} experts on this rank, and experts= has a group of {size} ranks for "
                    f"them, but the ranks have the numbers {present} together: expected 0 to "
                    f"{size * len(numbers) - 1}. Give all ranks of a group equally many experts, and each the group of "
                    "all ranks whose experts differ from its own"
                )


def _declaration(named: Named, experts: Sequence[Experts]) -> Experts | None:
    """The declaration that a tensor falls under."""
    matching = [declaration for declaration in experts if declaration.declares(named.fqns)]
    if len(matching) > 1:
        raise ConfigError(
            f"{named.fqns[0]} is declared twice by experts=, by {matching[0].patterns} and by {matching[1].patterns}: "
            "expected one declaration for a tensor. Give narrower patterns"
        )
    return matching[0] if matching else None


def _numbered(named: Named, declaration: Experts | None) -> list[tuple[str, int, str]]:
    """The names of a listed expert's tensor as (what is before the number, the number, what is behind it)."""
    if declaration is None or declaration.dim is not None:
        return []
    numbered = []
    for fqn in named.fqns:
        at = declaration.number_at(fqn)
        if at is None:
            raise ConfigError(
                f"{fqn} is tied to the expert's tensor {next(name for name in named.fqns if name != fqn)}, which "
                f"experts= declares: {fqn} would be another tensor on every rank. Expected tensors whose names are all "
                "numbered: untie them, or include this name in the patterns"
            )
        parts = fqn.split(".")
        numbered.append(("".join(f"{part}." for part in parts[:at]), int(parts[at]), ".".join(parts[at + 1 :])))
    return numbered


def _renumbered(named: Named, declaration: Experts, numbers: dict[str, set[int]], position: int) -> Named:
    """The tensor of a listed expert, under the number that it has over all ranks of the group."""
    names = [
        ".".join(filter(None, (f"{prefix}{number + position * len(numbers[prefix])}", rest)))
        for prefix, number, rest in _numbered(named, declaration)
    ]
    part = Part(named.fqns, (0,) * len(named.shape), PlainForm(), declaration.group)
    return dataclasses.replace(named, fqns=names, part=part)


def _part_along(named: Named, dim: int, group: Any, position: int, size: int) -> Named:
    """A tensor of this rank as a part of the whole one, along a dimension."""
    fqn, shape = named.fqns[0], list(named.shape)
    if not _is_plain(named):
        kind = "a DTensor" if is_dtensor(named.source) else "sharded by FSDP"
        raise ConfigError(
            f"{fqn} is {kind}, and experts= declares it: expected a plain tensor, because a sharded one shows by "
            "itself where it lies. Leave it out of the patterns, or out of FSDP (ignored_params, ignored_states)"
        )
    if not -len(shape) <= dim < len(shape):
        raise ConfigError(
            f"{fqn} has shape {shape}, and experts= declares it with dim={dim}: expected a dimension that the tensor "
            "has. Give narrower patterns, or one declaration for every dim"
        )
    dim %= len(shape)
    offsets = [0] * len(shape)
    offsets[dim], shape[dim] = position * shape[dim], size * shape[dim]
    form = PlainForm() if size == 1 else _StackedForm(group, dim, tuple(shape))
    return dataclasses.replace(named, shape=tuple(shape), part=Part(named.fqns, tuple(offsets), form, group))


def _place(named: Named, group: Any, rank: int, world_size: int) -> tuple[int, int]:
    """The place of this rank in the group, and the number of ranks in it."""
    if group is None:
        return rank, world_size
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ConfigError(
            f"{named.fqns[0]} is declared by experts= on rank {rank} with the group {group!r}, expected a process "
            "group that this rank is in: give every rank the group of the ranks that hold the other experts, such as "
            "mesh['ep'].get_group(), or None for all ranks"
        )
    return dist.get_rank(group), dist.get_world_size(group)


def _check_names(tensors: Sequence[Named]) -> None:
    """Refuse a number that makes the name of another tensor."""
    taken: dict[str, Named] = {}
    for named in tensors:
        for fqn in named.fqns:
            if taken.setdefault(fqn, named) is not named:
                raise ConfigError(
                    f"{fqn} is the name of two tensors of this rank, as experts= numbers them: {named.keys[0]} and "
                    f"{taken[fqn].keys[0]}. Expected patterns that cover every tensor of a list"
                )


def _is_plain(named: Named) -> bool:
    return isinstance(named.source, torch.Tensor) and not is_dtensor(named.source)


class _StackedForm:
    """The tensors of the ranks of a group stand for a DTensor that is sharded over the group.

    The tensor as it is would be taken for a replica: a checkpoint of torch would keep that of one rank.
    """

    def __init__(self, group: Any, dim: int, shape: tuple[int, ...]) -> None:
        self._group, self._dim, self._shape = group, dim, shape

    def wrap(self, values: torch.Tensor) -> torch.Tensor:
        stride = tuple(math.prod(self._shape[at + 1 :]) for at in range(len(self._shape)))
        return dtensor_from_local(values, self._mesh(values), [shard(self._dim)], self._shape, stride)

    def unwrap(self, fqn: str, entry: torch.Tensor) -> torch.Tensor:
        if not is_dtensor(entry) or not self._is_laid_out_here(entry):
            raise CheckpointMismatchError(
                f"the entry of {fqn} is a {type(entry).__name__} of {list(entry.shape)}, expected a DTensor of "
                f"{list(self._shape)} that is sharded along dim {self._dim} over the ranks of its group of experts, as "
                "sharded_state_dict gives it"
            )
        with torch.no_grad():
            return entry.to_local()

    def _is_laid_out_here(self, entry: DTensor) -> bool:
        placed = (entry.placements, tuple(entry.shape)) == ((shard(self._dim),), self._shape)
        return placed and entry.device_mesh == self._mesh(entry)

    def _mesh(self, values: torch.Tensor) -> DeviceMesh:
        """The ranks of the group as a mesh. No communication."""
        group: Any = dist.group.WORLD if self._group is None else self._group
        return DeviceMesh.from_group(group, values.device.type)
