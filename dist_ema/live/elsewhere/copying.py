"""The average in another module that is laid out like the model: no gather, and no memory but the module's own.

Owners write their boxes into the tensors of the module, rounded to its dtype. Where several ranks hold the same tensors
(DDP, Replicate axes) an owner has a part of what each of them holds, and broadcasts it, in the dtype of the module.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dist_ema.averaging.state import AveragedState
from dist_ema.boxes.counterparts import matched, tensors_by_names
from dist_ema.boxes.plan import Plan
from dist_ema.boxes.shards import Held, Shard
from dist_ema.errors import ConfigError, RankMismatchError, UnsupportedModelError, agreed
from dist_ema.live.holders.replicas import Replicas
from dist_ema.live.spreading import spread_all
from dist_ema.live.swap import meeting
from dist_ema.live.teacher import copy_pairs
from dist_ema.options import Options, Patterns, matches_any, name_patterns
from dist_ema.ranks.calls import Call
from dist_ema.topology.parts import whole_model
from dist_ema.topology.planning import plan_model

__all__ = ["copy_to"]


def copy_to(
    call: Call,
    state: AveragedState,
    replicas: Replicas,
    module: nn.Module | Sequence[nn.Module],
    track: str | None,
    include: Patterns,
    exclude: Patterns,
) -> None:
    """Collective: every rank must call it. See `ShardedEMA.copy_to`."""
    plan, exchange = state.plan, call.exchange

    def prepare() -> tuple[_Target, tuple[torch.Tensor, ...]]:
        picks = _picking(include, exclude)
        of_module = plan_model(
            whole_model(module),
            Options(
                exclude=name_patterns("exclude", exclude),
                trainable_only=False,
                averaged_only=False,
                experts=state.options.experts,
            ),
            rank=exchange.rank,
            world_size=exchange.world_size,
        )
        _check_patterns({"include": include, "exclude": exclude}, [*plan.names, *of_module.names])
        return _Target(plan, of_module, picks), state.values(track)

    target, values = call.together(
        prepare,
        lambda _: {
            "track": state.track(track),
            **state.progress,
            "include": name_patterns("include", include),
            "exclude": name_patterns("exclude", exclude),
        },
    )
    if plan.has_replicas:
        _check_dtypes(call, target)
        replicas.check_once(call.name, state.num_updates)
    plan.drop_gathered()
    target.drop_gathered()
    live = functools.partial(copy_pairs, target.live_pairs())
    spread_all(plan, values, target.of, [*meeting(call, state), live], state.shown_buffers(state.track(track)))


def _picking(include: Patterns, exclude: Patterns) -> Callable[[Sequence[str]], bool]:
    """Whether a tensor of these names is to be copied."""
    included, excluded = name_patterns("include", include), name_patterns("exclude", exclude)

    def picks(names: Sequence[str]) -> bool:
        return (not included or matches_any(names, included)) and not matches_any(names, excluded)

    return picks


def _check_patterns(given: Mapping[str, Patterns], names: Sequence[str]) -> None:
    for option, value in given.items():
        for pattern in name_patterns(option, value):
            if not matches_any(names, [pattern]):
                raise ConfigError(
                    f"{option} has the pattern {pattern!r}, which matches no name of the model or of the module "
                    f"({', '.join(names[:3])}, ...)"
                )


class _Target:
    """The tensors of another module that are to have the average. No communication.

    Args:
        plan: the plan of the model.
        of_module: the plan of the other module.
        picks: all names of a tensor -> whether it is to be copied.

    Raises:
        UnsupportedModelError: names, shapes, dtypes or layouts do not fit.
        ConfigError: the module is the model, or shares memory with it.
    """

    def __init__(self, plan: Plan, of_module: Plan, picks: Callable[[Sequence[str]], bool]) -> None:
        self.drop_gathered = of_module.drop_gathered
        own, others = _picked(plan, picks), _picked(of_module, picks)
        # The plan of the model has the tensors of all ranks (stages, experts), that of the module those of this rank.
        held_here = {held.spec.fqn for division in plan.divisions for held in division.held}
        missing = sorted(sorted(names) for names in own.keys() - others.keys() if own[names] in held_here)
        extra = sorted(sorted(names) for names in others.keys() - own.keys())
        if missing or extra:
            lacks = f"lacks {len(missing)} tensors of the model ({_shown(missing)})"
            more = f"has {len(extra)} that the model lacks ({_shown(extra)})"
            raise UnsupportedModelError(
                f"the module {' and '.join([lacks] * bool(missing) + [more] * bool(extra))}, expected the same names, "
                "tied alike: leave out by exclude= what only one of them has"
            )
        self._fqns = {others[names]: fqn for names, fqn in own.items() if names in others}
        _check_specs(plan, of_module, self._fqns)
        self._counterparts = matched(_part(plan, own.values()), of_module, self._fqns, "the module")
        self._live = [
            (self._counterparts[held.box], held)
            for division in plan.divisions
            if not division.averaged and not division.extra_state
            for held in division.held
            if held.box in self._counterparts
        ]
        for division in plan.divisions:
            for held in division.held:
                _check_memory(held, self._counterparts.get(held.box))

    def of(self, shard: Shard) -> torch.Tensor | None:
        """Where the values of a shard of the model go; None if they are not copied."""
        counterpart = self._counterparts.get(shard.held.box)
        return None if counterpart is None else shard.within(counterpart.values())

    def live_pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Tensors of the module that are not averaged, and the live values of this rank for them."""
        return [(target.values(), held.values()) for target, held in self._live]

    def dtypes(self) -> dict[str, str]:
        """Fqn of what this rank holds -> dtype in the module."""
        return {box.fqn: str(held.spec.dtype) for box, held in self._counterparts.items()}


def _shown(tensors: Sequence[Sequence[str]]) -> str:
    """The first names of tensors, which may have several."""
    names = [" = ".join(map(repr, names)) for names in tensors[:3]]
    return ", ".join([*names, *["..."] * (len(tensors) > 3)])


def _picked(plan: Plan, picks: Callable[[Sequence[str]], bool]) -> dict[frozenset[str], str]:
    """All names of a tensor that is to be copied -> its fqn. Extra state is no tensor of the model."""
    made = {held.spec.fqn for division in plan.divisions if division.extra_state for held in division.held}
    return {names: fqn for names, fqn in tensors_by_names(plan).items() if fqn not in made and picks(sorted(names))}


def _part(plan: Plan, fqns: Any) -> Plan:
    """What this rank holds of these tensors, to be compared: its owners are not those of the plan."""
    wanted = set(fqns)
    return dataclasses.replace(
        plan,
        divisions=tuple(
            dataclasses.replace(division, held=tuple(held for held in division.held if held.spec.fqn in wanted))
            for division in plan.divisions
        ),
    )


def _check_specs(plan: Plan, of_module: Plan, fqns: Mapping[str, str]) -> None:
    own = {spec.fqn: spec for spec in plan.specs}
    for spec in of_module.specs:
        if spec.fqn not in fqns:
            continue
        expected = own[fqns[spec.fqn]]
        if spec.shape != expected.shape:
            raise UnsupportedModelError(
                f"{spec.fqn} of the module has {list(spec.shape)}, expected {list(expected.shape)} as in the model: "
                "exclude it, or build the module alike"
            )
        if spec.dtype != expected.dtype and not (spec.dtype.is_floating_point and expected.dtype.is_floating_point):
            raise UnsupportedModelError(
                f"{spec.fqn} of the module is {spec.dtype}, expected {expected.dtype} as in the model, or floating-"
                "point types on both sides"
            )


def _check_memory(held: Held, counterpart: Held | None) -> None:
    if counterpart is None:
        return
    live, target = held.values(), counterpart.values()
    if target.is_inference():
        raise UnsupportedModelError(
            f"{held.spec.fqn} of the module was made in torch.inference_mode(), where alone torch lets it be written: "
            "build the module without that mode"
        )
    if live.numel() and live.data_ptr() == target.data_ptr():
        raise ConfigError(
            f"{held.spec.fqn} of the module is the model's own tensor, expected another module: call copy_to_model() "
            "to put the average into the model itself"
        )


def _check_dtypes(call: Call, target: _Target) -> None:
    """Collective: every rank must call it. Bytes are sent in the dtype of the module, so all must have the same."""
    own = {fqn: [dtype] for fqn, dtype in target.dtypes().items()}

    def merge(left: dict[str, list[str]], right: dict[str, list[str]]) -> dict[str, list[str]]:
        return {fqn: sorted({*left.get(fqn, ()), *right.get(fqn, ())}) for fqn in left | right}

    for fqn, dtypes in sorted(call.exchange.reduce(call.name, own, merge).items()):
        if len(dtypes) > 1:
            raise agreed(
                RankMismatchError(
                    f"{fqn} of the module is {' and '.join(dtypes)} on different ranks, expected one dtype"
                )
            )
