"""Which ranks hold what alike: what a layout names is proved over all ranks, or the ranks are found by digests.

No communication. A layout names the ranks that hold boxes alike, as far as it shows. Three sums over all ranks prove
that this is true:

    coverage    every element of every tensor has exactly one owner (coverage.py)
    holders     ranks that are named together hold equal boxes of equal tensors, and name the same process groups for
                their broadcasts (alike.py)
    tensors     all ranks have the same tensors

If a sum says no, the ranks exchange digests of what they hold, and those with equal digests are the holders. A digest
stands for one division first. Where some tensors belong to more ranks than their neighbours do (norms that tensor
parallelism leaves whole), their elements come out owned twice; then a digest stands for these tensors of a division. If
that does not do either (an embedding on the first and the last stage of a pipeline), it stands for one tensor.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from dist_ema.boxes import alike
from dist_ema.boxes.coverage import Coverage
from dist_ema.boxes.owners import Division
from dist_ema.boxes.plan import Plan
from dist_ema.boxes.shards import Box, Held

__all__ = ["Proof", "Tensors", "divided_among", "owned_boxes", "tensors_of"]


def owned_boxes(plan: Plan) -> list[Box]:
    """The boxes that this rank owns, averaged or not."""
    return [shard.box for averaged in (True, False) for shard in plan.owned(averaged=averaged)]


@dataclasses.dataclass(frozen=True)
class Proof:
    """What proves over all ranks that a plan is right, before anything is exchanged.

    Attributes:
        coverage: the fingerprints of the tensors of this rank.
        tensors: a digest of all tensors that this rank has.
        terms: what this rank contributes to the sums over all ranks.
    """

    coverage: Coverage
    tensors: str
    terms: list[int]

    @staticmethod
    def of(
        plan: Plan, rank: int, world_size: int, seed: int, names_of: Callable[[Sequence[Any]], Sequence[str]]
    ) -> Proof:
        """The proof of a plan.

        Args:
            plan: the plan.
            rank: this rank.
            world_size: the number of ranks.
            seed: random, and the same on every rank.
            names_of: what the ranks that take these process groups have alike.
        """
        coverage = Coverage(plan.specs, seed)
        holders = 0
        for division in plan.divisions:
            if len(division.ranks) > 1:
                own = alike.digest((_content(division.held, division), names_of(division.groups)))
                name = repr((division.ranks, *division.kind))
                holders += alike.term(name, division.position, len(division.ranks), own)
        names = plan.names_of_tensors
        tensors = alike.digest(([(spec, names[spec.fqn]) for spec in plan.specs], plan.left_out))
        of_tensors = alike.term("tensors", rank, world_size, tensors)
        owned = coverage.fingerprint(owned_boxes(plan))
        return Proof(coverage, tensors, [owned, holders, of_tensors, int(plan.has_replicas)])

    def shows_equal_tensors(self, sums: Sequence[int]) -> bool:
        """Whether all ranks have the same tensors."""
        return alike.are_alike(sums[2])

    def holds(self, sums: Sequence[int]) -> bool:
        """Whether the plans of all ranks are right as they are."""
        return self.shows_equal_tensors(sums) and alike.are_alike(sums[1]) and self.coverage.is_whole(sums[0])


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Pieces of a division whose holders are asked for together.

    Attributes:
        held: the pieces.
        of: the division, as the layout names it.
    """

    held: tuple[Held, ...]
    of: Division

    @functools.cached_property
    def digest(self) -> str:
        """Equal on the ranks that hold the same elements of the same tensors; "" for no elements."""
        flags, boxes = _content(self.held, self.of)
        return alike.digest((flags, sorted(boxes)))[:32] if boxes else ""


def tensors_of(plan: Plan, apart: Collection[str], *, one_by_one: bool) -> list[Tensors]:
    """What this rank holds, by division.

    Args:
        plan: the plan.
        apart: the names of tensors that do not go with the others of their division.
        one_by_one: whether each of these goes alone; else those of a division go together.
    """
    parts = []
    apart = frozenset(apart)
    for division in plan.divisions:
        if division.cuts is not None:
            parts.append(Tensors(division.held, division))
            continue
        # Of pieces without elements each rank has its own, whatever the others have. "" is no name of a tensor.
        groups: dict[str | None, list[Held]] = {}
        for held in division.held:
            fqn = held.spec.fqn
            group = "" if fqn not in apart else fqn if one_by_one else "apart"
            groups.setdefault(group if held.box.numel else None, []).append(held)
        parts += [Tensors(tuple(pieces), division) for pieces in groups.values()]
    return parts


def divided_among(plan: Plan, holders: Sequence[tuple[Tensors, Sequence[int]]], rank: int) -> Plan:
    """The plan with each piece divided among the ranks that hold it.

    Ranks that hold the same pieces get the same divisions of them, in the same order, whatever else they hold.

    Args:
        plan: the plan, with the tensors of all ranks.
        holders: all that this rank holds, and the ranks that hold the same.
        rank: this rank.
    """
    place = {spec.fqn: index for index, spec in enumerate(plan.specs)}
    pieces: dict[tuple[Any, ...], list[Held]] = {}
    named: dict[tuple[Any, ...], list[Division]] = {}
    divisions = []
    for tensors, ranks in holders:
        division = tensors.of
        if division.cuts is not None:  # whoever else holds the same: no other rank could be an owner
            divisions.append(division)
            continue
        key = (tuple(ranks), *division.kind)
        pieces.setdefault(key, []).extend(tensors.held)
        named.setdefault(key, []).append(division)
    for key in sorted(pieces):
        ranks, averaged, single_owner, extra_state = key
        same = [division for division in named[key] if sorted(division.ranks) == list(ranks)]
        groups: tuple[Any, ...] = ()  # of several ranks: to be made
        if len(ranks) > 1 and len(same) == len(named[key]):
            # The order of the ranks belongs to the groups: it is row-major over their axes.
            ranks, groups = same[0].ranks, same[0].groups
        divisions.append(
            Division(
                held=tuple(sorted(pieces[key], key=lambda held: (place[held.spec.fqn], held.box.offsets))),
                ranks=ranks,
                position=ranks.index(rank),
                groups=groups,
                averaged=averaged,
                single_owner=single_owner,
                extra_state=extra_state,
            )
        )
    return dataclasses.replace(plan, divisions=tuple(divisions))


def _content(pieces: Iterable[Held], division: Division) -> tuple[tuple[bool, ...], list[tuple[Any, ...]]]:
    boxes = [(held.spec.fqn, held.box.offsets, held.box.sizes) for held in pieces if held.box.numel]
    return division.kind, boxes
