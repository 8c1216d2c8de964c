"""Who holds what, over all ranks: the layouts' word for it is proved, or the holders are looked for.

In the usual run one agreement proves it (see `dist_ema.boxes.holding`) and nothing else is exchanged:

    1 all    the sums of the proofs, with the comparison of the options                 (construction.py)
    then, only if the sums say no:
    2 all    the tensors of all ranks, if these are not alike
    3 all    the ranks that hold the same division, by digests; then every tensor is covered once, or
    4 all    the ranks that hold the same tensors of a division, for tensors that are not; then all are, or
    5 all    the ranks that hold the same tensor, for those that are not; then all are, or it is an error
    6 all    a process group for holders that the layout did not name
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from dist_ema.boxes import alike
from dist_ema.boxes.coverage import Coverage
from dist_ema.boxes.holding import Proof, divided_among, owned_boxes, tensors_of
from dist_ema.boxes.owners import Division
from dist_ema.boxes.plan import Plan
from dist_ema.boxes.union import described, merged, united
from dist_ema.ranks.exchange import Exchange
from dist_ema.ranks.groups import groups_of, names_of, of_ranks
from dist_ema.ranks.holders import ranks_by_digest

__all__ = ["plan_of_all"]


def plan_of_all(exchange: Exchange, action: str, plan: Plan, proof: Proof, sums: Sequence[int]) -> Plan:
    """Collective: every rank must call it. The plan, with the holders as they are over all ranks.

    Args:
        exchange: the control traffic of all ranks.
        action: a name of the work, for the message.
        plan: what this rank has planned alone.
        proof: the proof of this plan.
        sums: the sums of the terms of all ranks' proofs; the same on every rank.

    Raises:
        RankMismatchError: a name stands for different tensors on some ranks; the same on all ranks.
        UnsupportedModelError: the ranks do not hold every element of every tensor; the same on all ranks.
    """
    if proof.holds(sums):
        return dataclasses.replace(plan, has_replicas=sums[-1] > 0)
    coverage = proof.coverage
    if not proof.shows_equal_tensors(sums):
        plan = _of_all_tensors(exchange, action, plan, proof)
        coverage = Coverage(plan.specs, exchange.channel.drawn)
    plan = _divided(exchange, action, plan, ())
    wrong = _not_covered(exchange, coverage, plan)
    for one_by_one in (False, True):
        if wrong:
            plan = _divided(exchange, action, plan, wrong, one_by_one=one_by_one)
            wrong = _not_covered(exchange, coverage, plan)
    if wrong:
        coverage.check(exchange.sum_integers(coverage.contribution(owned_boxes(plan), wrong)), wrong)
    return _with_groups(exchange, action, plan)


def _of_all_tensors(exchange: Exchange, action: str, plan: Plan, proof: Proof) -> Plan:
    """Collective. Of ranks with the same tensors the lowest tells them."""
    ((lowest, *_),) = ranks_by_digest(exchange, action, [proof.tensors[:32]])
    own = described(plan, exchange.rank) if lowest == exchange.rank else ""
    of_all = exchange.reduce(action, own, merged)
    return exchange.agree(action, lambda: united(plan, exchange.rank, of_all))


def _not_covered(exchange: Exchange, coverage: Coverage, plan: Plan) -> list[str]:
    """Collective. The tensors among which some have elements with no owner, or several."""
    return coverage.not_covered(exchange.sum_integers(coverage.by_class(owned_boxes(plan))))


def _divided(exchange: Exchange, action: str, plan: Plan, apart: Collection[str], *, one_by_one: bool = False) -> Plan:
    """Collective. Divide what is held alike among its holders; see `tensors_of`."""
    parts = tensors_of(plan, apart, one_by_one=one_by_one)
    digests = list(dict.fromkeys(part.digest for part in parts if part.digest))
    holders = dict(zip(digests, ranks_by_digest(exchange, action, digests), strict=True))
    return divided_among(plan, [(part, holders.get(part.digest, (exchange.rank,))) for part in parts], exchange.rank)


def _with_groups(exchange: Exchange, action: str, plan: Plan) -> Plan:
    """Collective. Give every division of several ranks a process group that all of them take.

    A group that training has made serves if all ranks of the division take the same: that of the layout, or one that
    happens to have these ranks (that of tensor parallelism, for norms on the other axis of its mesh).
    """
    plan = dataclasses.replace(plan, divisions=tuple(_with_known_group(plan, one) for one in plan.divisions))
    shared = [division for division in plan.divisions if len(division.ranks) > 1]
    names = 0
    for division in shared:
        key = repr((sorted(division.ranks), *division.kind))
        own = alike.digest((division.ranks, names_of(division.groups)))
        names += alike.term(key, division.position, len(division.ranks), own)
    num_without = sum(not division.groups for division in shared)
    has_replicas = any(division.averaged for division in shared)
    sums = exchange.sum_integers([names, num_without, has_replicas])
    plan = dataclasses.replace(plan, has_replicas=sums[2] > 0)
    agree_on_names = alike.are_alike(sums[0])
    if agree_on_names and sums[1] == 0:
        return plan
    without = [division for division in shared if not division.groups or not agree_on_names]
    groups = groups_of(exchange, action, [tuple(sorted(division.ranks)) for division in without])
    replaced = {
        id(division): dataclasses.replace(
            division,
            ranks=(ranks := tuple(sorted(division.ranks))),
            position=ranks.index(exchange.rank),
            groups=(groups[ranks],),
        )
        for division in without
    }
    return dataclasses.replace(
        plan, divisions=tuple(replaced.get(id(division), division) for division in plan.divisions)
    )


def _with_known_group(plan: Plan, division: Division) -> Division:
    if len(division.ranks) == 1 or division.groups:
        return division
    return dataclasses.replace(division, groups=of_ranks(plan.nearby, division.ranks))
