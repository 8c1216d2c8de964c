"""A planned model, as one rank sees it: every tensor, and what the rank holds and owns of each.

No communication.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dist_ema.boxes.owners import Division
from dist_ema.boxes.shards import EXTRA_STATE, Shard, TensorSpec
from dist_ema.errors import ModelChangedError, UnsupportedModelError

__all__ = ["Plan", "Remains"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remains:
    """What is left of a plan in a model that has changed since.

    Attributes:
        names: fqn -> all names, of the planned tensors that have not changed; ties that were cut are left out.
        others: fqns of the other tensors that the model has now.
    """

    names: Mapping[str, tuple[str, ...]]
    others: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A model as boxes: what exists, what this rank holds of it, and what it owns.

    Attributes:
        specs: all persistent tensors that any rank has, tied ones once; the same on every rank when the ranks have
            compared their plans. A rank need not hold any part of a tensor.
        aliases: further names of tied tensors -> the name in `specs`.
        left_out: names of the model's tensors, and of other entries of its state dict, that are not in the plan: by the
            user's choice the files do not have them.
        divisions: the divisions of what this rank holds.
        nearby: process groups of this rank that training has made, for divisions whose ranks no layout names.
        has_replicas: whether putting averages into the model communicates. It does on all ranks if several ranks, any,
            hold an averaged tensor alike.
        drop_gathered: makes the live views valid (drops gathered copies that a wrapper keeps). No communication.
        check_model: raises `ModelChangedError` if the model has other modules or names than planned. No communication.
        remains: what is left of the plan in the model as it is now. No communication.
    """

    specs: tuple[TensorSpec, ...]
    aliases: Mapping[str, str]
    left_out: tuple[str, ...]
    divisions: tuple[Division, ...]
    nearby: tuple[Any, ...]
    has_replicas: bool
    drop_gathered: Callable[[], None]
    check_model: Callable[[], None]
    remains: Callable[[], Remains]

    def averaged_part(self, *, with_buffers: bool = False) -> Plan:
        """The part of the plan that is averaged; who owns what stays as it is.

        Args:
            with_buffers: whether the other buffers are in it too, without extra state.
        """
        buffers = self.live_buffers(extra_state=False).divisions if with_buffers else ()
        fqns = {spec.fqn for spec in self.specs if spec.averaged}
        if with_buffers:
            fqns |= {spec.fqn for spec in self.specs if spec.is_buffer and not spec.fqn.endswith(EXTRA_STATE)}
        specs = tuple(spec for spec in self.specs if spec.fqn in fqns)
        return dataclasses.replace(
            self,
            specs=specs,
            aliases={alias: fqn for alias, fqn in self.aliases.items() if fqn in fqns},
            divisions=(*(division for division in self.divisions if division.averaged), *buffers),
        )

    def live_buffers(self, *, extra_state: bool) -> Plan:
        """The part of the plan of which all ranks show the owner's values: the buffers that are not averaged.

        Args:
            extra_state: whether what `get_extra_state` returns is among them.
        """
        buffers = (division for division in self.divisions if division.single_owner and not division.averaged)
        return dataclasses.replace(
            self, divisions=tuple(division for division in buffers if extra_state or not division.extra_state)
        )

    @property
    def names_of_tensors(self) -> dict[str, list[str]]:
        """Fqn -> all names of that tensor, the fqn first; a tied tensor has several."""
        names = {spec.fqn: [spec.fqn] for spec in self.specs}
        for alias, fqn in self.aliases.items():
            names[fqn].append(alias)
        return names

    @property
    def names(self) -> list[str]:
        """Every name that a pattern may mean."""
        return [*self.names_in_plan, *self.left_out]

    @property
    def names_in_plan(self) -> list[str]:
        """Every name of a tensor in the plan."""
        return [*(spec.fqn for spec in self.specs), *self.aliases]

    def lost(self, remains: Remains) -> dict[str, list[str]]:
        """Fqn -> the names that do not remain, of the tensors that this rank holds a part of and that have changed."""
        held = {held.spec.fqn for division in self.divisions for held in division.held}
        lost = {
            fqn: [name for name in names if name not in remains.names.get(fqn, ())]
            for fqn, names in self.names_of_tensors.items()
            if fqn in held
        }
        return {fqn: names for fqn, names in lost.items() if names}

    def without(self, lost: Mapping[str, Sequence[str]], others: Sequence[str]) -> Remains:
        """What remains over all ranks, from what any rank has lost, and the tensors that any rank has now instead."""
        names = {
            fqn: tuple(name for name in names if name not in lost.get(fqn, ()))
            for fqn, names in self.names_of_tensors.items()
            if fqn not in lost.get(fqn, ())
        }
        return Remains(names=names, others=tuple(others))

    def gone(self, remains: Remains) -> tuple[str, ...]:
        """The fqns of the planned tensors that do not remain, over all ranks."""
        return tuple(spec.fqn for spec in self.specs if spec.fqn not in remains.names)

    def only(self, remains: Remains) -> Plan:
        """The tensors that remain over all ranks, for files, manifests and comparisons.

        Do not use `owned` of the result, which would divide the tensors anew: the owners are those of the whole plan.

        Raises:
            ModelChangedError: no averaged tensor remains.
        """
        gone = set(self.gone(remains))
        specs = tuple(spec for spec in self.specs if spec.fqn not in gone)
        if not any(spec.averaged for spec in specs):
            raise ModelChangedError(
                f"none of the {sum(spec.averaged for spec in self.specs)} averaged tensors is in the model as it was "
                "when the average was built: only_unchanged=True has nothing to write"
            )
        divisions = (
            dataclasses.replace(division, held=tuple(held for held in division.held if held.spec.fqn not in gone))
            for division in self.divisions
        )
        return dataclasses.replace(
            self,
            specs=specs,
            aliases={
                alias: fqn
                for alias, fqn in self.aliases.items()
                if fqn not in gone and alias in remains.names.get(fqn, (alias,))
            },
            divisions=tuple(divisions),
        )

    def check_not_empty(self, *, trainable_only: bool) -> None:
        """Refuse a plan that averages nothing.

        Args:
            trainable_only: whether what requires no gradient was not to be averaged.

        Raises:
            UnsupportedModelError: no tensor is averaged.
        """
        if any(spec.averaged for spec in self.specs):
            return
        if trainable_only:
            raise UnsupportedModelError(
                f"trainable_only=True (the default with adapters of PEFT), but of the {len(self.specs)} tensors of the "
                "model none that include= and exclude= leave in requires a gradient, expected at least one floating-"
                "point parameter: build the average when the parameters to train are marked (requires_grad_(True); "
                "PeftModel.from_pretrained(..., is_trainable=True)), or give trainable_only=False"
            )
        raise UnsupportedModelError(
            f"the model has no floating-point parameter to average among its {len(self.specs)} tensors, expected "
            "at least one: check the model, and include= and exclude="
        )

    def owned(self, *, averaged: bool) -> tuple[Shard, ...]:
        """The shards this rank owns: of averaged tensors, or of those that always show the live values."""
        return tuple(
            shard
            for division in self.divisions
            if division.averaged == averaged
            for shard in division.run(division.position)
        )
