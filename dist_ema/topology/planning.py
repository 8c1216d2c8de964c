"""`plan_model`: every tensor of a model as boxes; pieces that several ranks hold alike are divided among them."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from dist_ema.boxes.owners import Division
from dist_ema.boxes.plan import Plan, Remains
from dist_ema.boxes.shards import Held, TensorSpec
from dist_ema.errors import UnsupportedModelError
from dist_ema.options import Options
from dist_ema.topology.dtensor import DTensors
from dist_ema.topology.experts import DeclaredExperts, with_parts
from dist_ema.topology.extra import ExtraStates, extra_states
from dist_ema.topology.fsdp1 import FSDP1
from dist_ema.topology.masters import Masters
from dist_ema.topology.names import check_against_state_dict, check_unchanged, named_tensors, unchanged_names
from dist_ema.topology.plain import Plain
from dist_ema.topology.seam.layout import FlatPlace, HeldBox, Holders, Layout, Named, View, Where
from dist_ema.topology.values import check_tensor, foreign_kind
from dist_ema.topology.zero3 import ZeRO3

__all__ = ["LAYOUTS", "is_adapted", "plan_model", "trained_parameters"]

# Every layout. The first one that claims a tensor has it, so the last one gets the tensors of no special kind.
LAYOUTS: tuple[Layout, ...] = (DeclaredExperts(), FSDP1(), ZeRO3(), DTensors(), ExtraStates(), Plain())


def plan_model(
    model: nn.Module, options: Options, *, rank: int, world_size: int, averaged: Collection[str] | None = None
) -> Plan:
    """Plan the averaging of `model` on this rank. No communication.

    A tensor that cannot be stored is left out of the plan if `exclude` names it. With `averaged_only` so is one that is
    not averaged: no file will have it.

    Args:
        model: a plain, DDP, FSDP1 or FSDP2 module, or a module of DTensors, possibly wrapped further.
        options: the options of the average, resolved.
        rank: this rank in the default process group.
        world_size: the number of ranks in the default process group.
        averaged: the names of the tensors to average; None for those that the options say.

    Raises:
        UnsupportedModelError: a tensor or a layout cannot be served exactly.
        ConfigError: `experts` does not fit the model, or there are no masters.
    """
    declare = functools.partial(with_parts, experts=options.experts, rank=rank, world_size=world_size)
    _drop_gathered(model)
    elsewhere = _elsewhere(model)
    tensors = declare(named_tensors(model, elsewhere))
    extra, left_out = extra_states(model, options)
    extra = declare(extra)
    wanted = [(named, _spec(named, _is_wanted(named, options, averaged))) for named in tensors]
    planned = [(named, spec) for named, spec in wanted if _is_storable(named, spec, options)]
    planned += [(named, _spec(named, False)) for named in extra]
    located = _located(model, planned, options, rank, world_size)
    specs = tuple(spec for _, spec, _, _ in located)
    in_plan = {spec.fqn for spec in specs}
    left_out += [fqn for named in tensors if named.fqns[0] not in in_plan for fqn in named.fqns]
    if not elsewhere:  # otherwise state_dict() communicates, and the tests alone compare its names
        in_files = [named for named, spec, _, _ in located if spec.averaged or not options.averaged_only]
        known = [*left_out, *(key for named in (*tensors, *extra) for key in named.keys)]
        left_out += check_against_state_dict(model, [key for named in in_files for key in named.keys], known, options)
    masters = Masters(model) if options.masters else None
    members: dict[tuple[Any, ...], list[Held]] = {}
    places: dict[str, FlatPlace] = {}
    holders: dict[tuple[Any, ...], Holders] = {}
    nearby: dict[Any, None] = {}
    for named, spec, boxes, held_by in located:
        if masters is not None and spec.averaged and not spec.is_buffer:
            boxes, held_by = masters.averaged(named, boxes, held_by)
        key: tuple[Any, ...] = (held_by.ranks, spec.averaged, spec.is_buffer, named.is_extra_state)
        if held_by.flat is not None:
            places[spec.fqn] = held_by.flat
            key += (held_by.flat.buffer,)
        members.setdefault(key, []).extend(
            Held(spec, held_box.box, held_box.view, held_box.form, held_box.slot, held_box.source) for held_box in boxes
        )
        holders.setdefault(key, held_by)
        nearby.update(dict.fromkeys(held_by.nearby))
    if masters is not None:
        masters.check()
    views = [held.view for group in members.values() for held in group]

    # The records keep no tensor: the memory of a tensor that was replaced would stay for as long as the average does.
    kept, kept_extra = (
        [dataclasses.replace(named, source=None) for named in some if named.fqns[0] in in_plan]
        for some in (tensors, extra)
    )

    def tensors_of_now() -> list[Named]:
        drop_gathered()
        now = declare(named_tensors(model, _elsewhere(model)))
        # A library of quantised weights may pack them anew at any time.
        return [named for named in now if not ignored.issuperset(named.fqns)]

    def drop_gathered() -> None:
        _drop_gathered(model, views)

    def check_model() -> None:
        check_unchanged(kept, tensors_of_now())

    def remains() -> Remains:
        return unchanged_names([*kept, *kept_extra], [*tensors_of_now(), *declare(extra_states(model, options)[0])])

    ignored = frozenset(left_out)
    divisions = tuple(_division(members[key], held_by, places, *key[1:4]) for key, held_by in holders.items())
    return Plan(
        specs=specs,
        aliases={alias: named.fqns[0] for named, _, _, _ in located for alias in named.fqns[1:]},
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


def is_adapted(model: nn.Module) -> bool:
    """Whether PEFT has put adapters into a model whose other parameters are frozen, by the classes of the modules."""
    _drop_gathered(model)
    of_peft = any(
        base.__module__.partition(".")[0] == "peft" for module in model.modules() for base in type(module).__mro__
    )
    return of_peft and not all(parameter.requires_grad for parameter in model.parameters())


def _is_wanted(named: Named, options: Options, averaged: Collection[str] | None) -> bool:
    """Whether a tensor is to be averaged, if its dtype can be."""
    if averaged is not None:
        return any(fqn in averaged for fqn in named.fqns)
    parameter = named.source if hasattr(named.source, "requires_grad") else getattr(named.owner, named.attribute, None)
    requires_grad = bool(getattr(parameter, "requires_grad", False))
    return options.averages(named.fqns, is_buffer=named.is_buffer, requires_grad=requires_grad)


def _is_storable(named: Named, spec: TensorSpec, options: Options) -> bool:
    """Whether files can have the values of a tensor; if not, the user leaves it out of them.

    Raises:
        UnsupportedModelError: they cannot, and the options leave it in.
    """
    may_lack = not spec.averaged and bool(options.averaged_only)
    kind = foreign_kind(named.source)
    if kind is None:
        try:
            check_tensor(named)
        except UnsupportedModelError:
            if not may_lack:
                raise
            return False
        return True
    if may_lack or options.excludes(named.fqns):
        return False
    raise UnsupportedModelError(
        f"{named.fqns[0]} is a {kind}, whose bytes alone are not its values: it can be neither averaged nor stored in "
        "a safetensors file. If it is of a frozen base under what is trained, give trainable_only=True and "
        "averaged_only=True: files then hold the averaged tensors alone. Or leave it out of the average and of the "
        f"files by choice with exclude={named.fqns[0]!r} or a pattern (include= does not), or convert it to a plain "
        "tensor first"
    )


# A tensor, what files say of it, the boxes of it that this rank holds, and the ranks that hold them alike.
_Located = tuple[Named, TensorSpec, Sequence[HeldBox], Holders]


def _located(
    model: nn.Module, planned: Sequence[tuple[Named, TensorSpec]], options: Options, rank: int, world_size: int
) -> list[_Located]:
    """Where the tensors lie, by the layouts; without those that have no place and need none."""
    locators = [(layout, layout.locator(model, rank, world_size)) for layout in LAYOUTS]
    located: list[_Located] = []
    for named, spec in planned:
        try:
            boxes, holders = next(locate for layout, locate in locators if layout.claims(named))(named)
        except UnsupportedModelError:
            if spec.averaged or not options.averaged_only:
                raise
            continue
        located.append((named, spec, boxes, holders))
    return located


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
