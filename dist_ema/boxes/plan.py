"""A planned model, as one rank sees it: every tensor, the pieces that the rank holds, and the shards that it owns.

No communication.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from dist_ema.boxes.owners import Division
from dist_ema.boxes.shards import Shard, TensorSpec
from dist_ema.errors import ModelChangedError, UnsupportedModelError

__all__ = ["Plan", "Remains"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remains:
    """The part of a plan that remains in a model that has changed since.

    Attributes:
        names: fqn -> all names, for every planned tensor that is as it was; ties that were cut are left out.
        others: the fqns of the other tensors that the model has now.
    """

    names: Mapping[str, tuple[str, ...]]
    others: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A model as boxes: its tensors, the pieces that this rank holds, and the shards that it owns.

    Attributes:
        specs: every persistent tensor of the model, tied ones once; the same on every rank.
        aliases: further names of tied tensors -> the name in `specs`.
        left_out: the names in the model's state dict that the user excluded and that the files do not have.
        divisions: the pieces that this rank holds.
        drop_gathered: makes the live views valid (drops gathered copies that a wrapper keeps). No communication.
        check_model: raises `ModelChangedError` if the model has other modules or names than planned. No communication.
        remains: gives the part of the plan that remains in the model as it is now. No communication.
    """

    specs: tuple[TensorSpec, ...]
    aliases: Mapping[str, str]
    left_out: tuple[str, ...]
    divisions: tuple[Division, ...]
    drop_gathered: Callable[[], None]
    check_model: Callable[[], None]
    remains: Callable[[], Remains]

    @property
    def has_replicas(self) -> bool:
        """Whether a swap communicates."""
        return any(division.averaged and len(division.ranks) > 1 for division in self.divisions)

    def live_buffers(self, *, extra_state: bool) -> Plan:
        """The part of the plan that all ranks show with the owner's values: the buffers that are not averaged.

        Args:
            extra_state: whether extra state is among them.
        """
        buffers = (division for division in self.divisions if division.single_owner and not division.averaged)
        return dataclasses.replace(
            self, divisions=tuple(division for division in buffers if extra_state or not division.extra_state)
        )

    @property
    def names_of_tensors(self) -> dict[str, list[str]]:
        """Fqn -> all names of that tensor, the fqn first; several if the tensor is tied."""
        names = {spec.fqn: [spec.fqn] for spec in self.specs}
        for alias, fqn in self.aliases.items():
            names[fqn].append(alias)
        return names

    @property
    def names(self) -> list[str]:
        """Every name that a pattern may mean."""
        return [*(spec.fqn for spec in self.specs), *self.aliases, *self.left_out]

    def only(self, remains: Remains) -> Plan:
        """The plan of the tensors that remain, for files, manifests and comparisons.

        Its `owned` is wrong, because it would divide the tensors anew: the owners are those of the whole plan.

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
            dataclasses.replace(division, held=tuple(held for held in division.held if held.spec.fqn in remains.names))
            for division in self.divisions
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
        """The shards that this rank owns: of averaged tensors, or of those that always show their live values."""
        return tuple(
            shard
            for division in self.divisions
            if division.averaged == averaged
            for shard in division.run(division.position)
        )
