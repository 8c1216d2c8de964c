"""A planned model: what several ranks hold alike, divided among them; and the whole, as one rank sees it.

No communication.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from dist_ema.errors import ModelChangedError, UnsupportedModelError
from dist_ema.layout import Box, Held, Shard, TensorSpec, cut_points, run_between

__all__ = ["Division", "Plan", "Remains"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Division:
    """Pieces of tensors that the same ranks hold alike, divided among these ranks: one owner per element.

    Attributes:
        held: the pieces, in the order of the model; equal boxes on each of the ranks.
        ranks: the global ranks that hold them.
        position: index of this rank in `ranks`.
        groups: process groups through which a broadcast reaches all of `ranks`, for `exchange`.
        averaged: whether the average keeps values for these tensors.
        single_owner: give everything to the first rank (buffers, as DDP does), instead of dividing it. Each rank may
            then have values of its own.
        extra_state: these are no tensors of the model, but made anew at each use by `get_extra_state`.
    """

    held: tuple[Held, ...]
    ranks: tuple[int, ...]
    position: int
    groups: tuple[Any, ...] = ()
    averaged: bool = True
    single_owner: bool = False
    extra_state: bool = False

    def run(self, position: int) -> list[Shard]:
        """The shards of the rank at `position` in `ranks`."""
        boxes, points = self._boxes, self._points
        pieces = run_between(boxes, points[position], points[position + 1])
        return [Shard(self.held[index], box) for index, box in pieces]

    @functools.cached_property
    def _boxes(self) -> list[Box]:
        return [held.box for held in self.held]

    @functools.cached_property
    def _points(self) -> list[tuple[int, int]]:
        if self.single_owner:
            return [(0, 0)] + [(len(self.held), 0)] * len(self.ranks)
        return cut_points(self._boxes, len(self.ranks))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remains:
    """What is left of a plan in a model that has changed since.

    Attributes:
        names: fqn -> all names, of each planned tensor that is as it was; ties that were cut are left out.
        others: fqns of what else the model has now.
    """

    names: Mapping[str, tuple[str, ...]]
    others: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A model as boxes: what exists, what this rank holds of it, and what it owns.

    Attributes:
        specs: every persistent tensor of the model, tied ones once; the same on every rank.
        aliases: further names of tied tensors -> the name in `specs`.
        left_out: names in the model's state dict that the user excluded and that the files do not have.
        divisions: what this rank holds of the tensors.
        settle: makes the live views valid (drops gathered copies that a wrapper keeps). No communication.
        verify: raises `ModelChangedError` if the model has other modules or names than planned. No communication.
        remains: what is left of the plan in the model as it is now. No communication.
    """

    specs: tuple[TensorSpec, ...]
    aliases: Mapping[str, str]
    left_out: tuple[str, ...]
    divisions: tuple[Division, ...]
    settle: Callable[[], None]
    verify: Callable[[], None]
    remains: Callable[[], Remains]

    @property
    def has_replicas(self) -> bool:
        """Whether putting averages into the model communicates."""
        return any(division.averaged and len(division.ranks) > 1 for division in self.divisions)

    def live_buffers(self, *, extra_state: bool) -> Plan:
        """The part of it that ranks show as the owner has it: the buffers that are not averaged.

        Args:
            extra_state: whether what `get_extra_state` returns is among them.
        """
        chosen = (each for each in self.divisions if each.single_owner and not each.averaged)
        return dataclasses.replace(
            self, divisions=tuple(each for each in chosen if extra_state or not each.extra_state)
        )

    @property
    def names_of_tensors(self) -> dict[str, list[str]]:
        """Fqn -> all names of that tensor, the fqn first; several if it is tied."""
        names = {spec.fqn: [spec.fqn] for spec in self.specs}
        for alias, fqn in self.aliases.items():
            names[fqn].append(alias)
        return names

    @property
    def names(self) -> list[str]:
        """Every name that a pattern may mean."""
        return [*(spec.fqn for spec in self.specs), *self.aliases, *self.left_out]

    def only(self, remains: Remains) -> Plan:
        """The tensors that remain, for files, manifests and comparisons.

        Their owners are those of the whole plan: ask that one what is `owned`, this one would deal the tensors anew.

        Raises:
            ModelChangedError: no averaged tensor remains.
        """
        specs = tuple(spec for spec in self.specs if spec.fqn in remains.names)
        if not any(spec.averaged for spec in specs):
            raise ModelChangedError(
                f"none of the {sum(spec.averaged for spec in self.specs)} averaged tensors is in the model as it was "
                "when the average was built: only_unchanged=True has nothing to write"
            )
        divisions = (
            dataclasses.replace(each, held=tuple(held for held in each.held if held.spec.fqn in remains.names))
            for each in self.divisions
        )
        return dataclasses.replace(
            self,
            specs=specs,
            aliases={alias: fqn for alias, fqn in self.aliases.items() if alias in remains.names.get(fqn, ())},
            divisions=tuple(divisions),
        )

    def check_not_empty(self) -> None:
        """Refuse a plan that averages nothing.

        Raises:
            UnsupportedModelError: no tensor is averaged.
        """
        if not any(spec.averaged for spec in self.specs):
            raise UnsupportedModelError(
                f"the model has no floating-point parameter to average among its {len(self.specs)} tensors, expected "
                "at least one: check the model, and include= and exclude="
            )

    def owned(self, *, averaged: bool) -> tuple[Shard, ...]:
        """The shards this rank owns: of averaged tensors, or of those that are always shown live."""
        return tuple(
            shard
            for division in self.divisions
            if division.averaged == averaged
            for shard in division.run(division.position)
        )
