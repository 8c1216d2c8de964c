"""`plan_model`: every tensor of a model as boxes; pieces that several ranks hold alike are divided among them."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from dist_ema.boxes.owners import Division
from dist_ema.boxes.plan import Plan, Remains
from dist_ema.boxes.shards import Held, TensorSpec
from dist_ema.errors import UnsupportedModelError
from dist_ema.options import Experts
from dist_ema.topology.dtensor import DTensors
from dist_ema.topology.experts import DeclaredExperts, with_parts
from dist_ema.topology.extra import ExtraStates, extra_states
from dist_ema.topology.fsdp1 import FSDP1
from dist_ema.topology.masters import Masters
from dist_ema.topology.names import check_against_state_dict, check_unchanged, named_tensors, unchanged_names
from dist_ema.topology.plain import Plain
from dist_ema.topology.seam.layout import FlatPlace, Holders, Layout, Named, View, Where
from dist_ema.topology.values import check_tensor, foreign_kind
from dist_ema.topology.zero3 import ZeRO3

__all__ = ["LAYOUTS", "plan_model", "trained_parameters"]

# Every layout. The first one that claims a tensor has it, so the last one gets the tensors of no special kind.
LAYOUTS: tuple[Layout, ...] = (DeclaredExperts(), FSDP1(), ZeRO3(), DTensors(), ExtraStates(), Plain())


def plan_model(
    model: nn.Module,
    *,
    averages: Callable[[Sequence[str]], bool],
    excludes: Callable[[Sequence[str]], bool],
    update_buffers: bool,
    masters: bool = False,
    experts: Sequence[Experts] = (),
    rank: int,
    world_size: int,
) -> Plan:
    """Plan the averaging of `model` on this rank. No communication.

    Args:
        model: a plain, DDP, FSDP1 or FSDP2 module, or a module of DTensors, possibly wrapped further.
        averages: all canonical names of a tensor (several if it is tied) -> whether it is to be averaged.
        excludes: all canonical names of a tensor -> whether the user's own patterns exclude it. An excluded tensor that
            cannot be stored is left out of the files.
        update_buffers: whether floating-point buffers are averaged like parameters.
        masters: whether the fp32 masters of DeepSpeed's optimizer are averaged, not the live parameters.
        experts: the plain tensors that the user declares to be parts of what several ranks hold.
        rank: this rank in the default process group.
        world_size: the number of ranks in the default process group.

    Raises:
        UnsupportedModelError: a tensor or a layout cannot be served exactly.
        ConfigError: `experts` does not fit the model, or there are no masters.
    """
    declare = functools.partial(with_parts, experts=experts, rank=rank, world_size=world_size)
    _drop_gathered(model)
    elsewhere = _elsewhere(model)
    tensors = declare(named_tensors(model, elsewhere))
    stored, left_out = _storable(tensors, excludes)
    extra, extra_left_out = extra_states(model, excludes)
    extra = declare(extra)
    left_out += extra_left_out
    if not elsewhere:  # otherwise state_dict() communicates, and the tests alone compare its names
        names = [fqn for named in (*stored, *extra) for fqn in named.keys]
        known = [*left_out, *(key for named in tensors for key in named.keys)]
        left_out += check_against_state_dict(model, names, known, excludes)
    locators = [(layout, layout.locator(model, rank, world_size)) for layout in LAYOUTS]
    specs: list[TensorSpec] = []
    aliases: dict[str, str] = {}
    masters_of_model = Masters(model) if masters else None
    members: dict[tuple[Any, ...], list[Held]] = {}
    places: dict[str, FlatPlace] = {}
    holders: dict[tuple[Any, ...], Holders] = {}
    nearby: dict[Any, None] = {}
    for named in [*stored, *extra]:
        wanted = not named.is_extra_state and averages(named.fqns) and (update_buffers or not named.is_buffer)
        spec = _spec(named, wanted)
        specs.append(spec)
        aliases.update(dict.fromkeys(named.fqns[1:], spec.fqn))
        boxes, held_by = next(locate for layout, locate in locators if layout.claims(named))(named)
        if masters_of_model is not None and spec.averaged and not spec.is_buffer:
            boxes, held_by = masters_of_model.averaged(named, boxes, held_by)
        key: tuple[Any, ...] = (held_by.ranks, spec.averaged, spec.is_buffer, named.is_extra_state)
        if held_by.flat is not None:
            places[spec.fqn] = held_by.flat
            key += (held_by.flat.buffer,)
        members.setdefault(key, []).extend(
            Held(spec, held_box.box, held_box.view, held_box.form, held_box.slot, held_box.source) for held_box in boxes
        )
        holders.setdefault(key, held_by)
        nearby.update(dict.fromkeys(held_by.nearby))
    if masters_of_model is not None:
        masters_of_model.check()
    views = [held.view for group in members.values() for held in group]

    # The records keep no tensor: the memory of a tensor that was replaced would stay for as long as the average does.
    planned = [dataclasses.replace(named, source=None) for named in tensors]
    planned_extra = [dataclasses.replace(named, source=None) for named in extra]

    def drop_gathered() -> None:
        _drop_gathered(model, views)

    def check_model() -> None:
        drop_gathered()
        check_unchanged(planned, declare(named_tensors(model, _elsewhere(model))))

    def remains() -> Remains:
        drop_gathered()
        now = named_tensors(model, _elsewhere(model)) + extra_states(model, excludes)[0]
        return unchanged_names([*planned, *planned_extra], declare(now))

    divisions = tuple(_division(members[key], held_by, places, *key[1:4]) for key, held_by in holders.items())
    return Plan(
        specs=tuple(specs),
        aliases=aliases,
        left_out=tuple(left_out),
        divisions=divisions,
        nearby=tuple(nearby),
        has_replicas=any(division.averaged and len(division.ranks) > 1 for division in divisions),
        drop_gathered=drop_gathered,
        check_model=check_model,
        remains=remains,
    )


def _division(
    held: list[Held],
    held_by: Holders,
    places: Mapping[str, FlatPlace],
    averaged: bool,
    single_owner: bool,
    extra_state: bool,
) -> Division:
    cuts = None
    if held_by.flat is not None:
        held.sort(key=lambda piece: places[piece.spec.fqn].start)
        cuts = _cuts(held, places, held_by.flat.run_numel, len(held_by.ranks))
    return Division(
        held=tuple(held),
        ranks=held_by.ranks,
        position=held_by.position,
        groups=tuple(held_by.groups),
        averaged=averaged,
        single_owner=single_owner,
        extra_state=extra_state,
        cuts=cuts,
    )


def _cuts(
    held: Sequence[Held], places: Mapping[str, FlatPlace], run_numel: int, num_runs: int
) -> tuple[tuple[int, int], ...]:
    """Where the equal runs of a flat buffer begin in the tensors that lie in it; see `Division.cuts`."""
    starts = [places[piece.spec.fqn].start for piece in held]
    cuts = []
    for element in range(0, run_numel * num_runs, run_numel):
        index = max(bisect.bisect_right(starts, element) - 1, 0)
        within = max(element - starts[index], 0)
        cuts.append((index, within) if within < held[index].box.numel else (index + 1, 0))  # padding has no owner
    return (*cuts, (len(held), 0))


def trained_parameters(model: nn.Module) -> Mapping[int, str]:
    """Identity -> raw name of every parameter that requires a gradient, as an optimizer has them."""
    _drop_gathered(model)
    return {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _storable(tensors: Sequence[Named], excludes: Callable[[Sequence[str]], bool]) -> tuple[list[Named], list[str]]:
    """The tensors whose values files can have, and the names of those that the user leaves out of the files."""
    stored, left_out = [], []
    for named in tensors:
        kind = foreign_kind(named.source)
        if kind is None:
            check_tensor(named)
            stored.append(named)
        elif excludes(named.fqns):
            left_out += named.fqns
        else:
            raise UnsupportedModelError(
                f"{named.fqns[0]} is a {kind}, whose bytes alone are not its values: it can be neither averaged nor "
                "stored in a safetensors file. Leave it out of the average and of the files by choice with "
                f"exclude={named.fqns[0]!r} or a pattern (include= does not), or convert it to a plain tensor first"
            )
    return stored, left_out


def _spec(named: Named, wanted: bool) -> TensorSpec:
    fqn = named.fqns[0]
    if wanted and named.dtype.is_complex:
        raise UnsupportedModelError(
            f"{fqn} has dtype {named.dtype}, expected a real one: exclude it (exclude={fqn!r}) to keep it live"
        )
    return TensorSpec(fqn, named.shape, named.dtype, wanted and named.dtype.is_floating_point, named.is_buffer)


def _drop_gathered(model: nn.Module, views: Sequence[View] = ()) -> None:
    for layout in LAYOUTS:
        layout.drop_gathered(model, views)


def _elsewhere(model: nn.Module) -> dict[Where, Any]:
    """The sources of the tensors that the modules do not show as they are, of all layouts."""
    return {where: source for layout in LAYOUTS for where, source in layout.find(model).items()}
