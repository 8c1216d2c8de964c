"""Post-hoc averages: which weights of saved averages make an average that was not tracked. No files.

After t updates an average holds the observation of update number k with the weight

    p(k) = m_k (1 - m_{k+1}) ... (1 - m_{t-1}),    m_0 = 1,    p(0) + ... + p(t-1) = 1

These weights are its *profile*, whatever was observed. So a sum of averages is an average, whose profile is the sum of
their profiles. The sum that is nearest to a wanted profile p* solves A x = b with A_ij = <p_i, p_j> and b_i = <p_i, p*>
(EDM2: arXiv 2312.02696, section 3.2). The paper has the products of power functions in closed form (eq. 151) in
continuous time; here they are summed over the updates that took place, which is exact for every schedule, interval and
run, however short.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch

from dist_ema.errors import ConfigError
from dist_ema.schedules.base import Schedule, momentum_of_update

__all__ = ["Fit", "Profile", "fit", "inner_products", "masses"]

# Updates whose momenta are in memory at a time: half a MiB for a schedule.
_STRETCH = 2**16

# The least that is added to the unit diagonal. Below it the rounding of A itself would decide; see `fit`.
_LEAST_RIDGE = 1e-10


@dataclasses.dataclass(frozen=True)
class Profile:
    """The profile of `schedule` after `num_updates` updates (at least 1), of which one in `interval` averaged.

    The average began at the live weights of update number `begin`, which is number 0 of the schedule.
    """

    schedule: Schedule
    num_updates: int
    interval: int = 1
    interval_correction: bool = False
    begin: int = 0

    def momenta(self, start: int, stop: int) -> torch.Tensor:
        """The momenta of updates number `start` to `stop - 1`, as `AveragedState.update` uses them."""
        momenta = torch.zeros(stop - start, dtype=torch.float64, device="cpu")
        first = -(-max(start - self.begin, 1) // self.interval) * self.interval + self.begin
        steps = range(first, stop, self.interval)
        given = [
            momentum_of_update(
                self.schedule, step - self.begin, interval=self.interval, interval_correction=self.interval_correction
            )
            for step in steps
        ]
        if given:
            momenta[steps.start - start :: self.interval] = torch.tensor(given, dtype=torch.float64, device="cpu")
        if start <= self.begin < stop:  # nothing of the updates before it is left
            momenta[self.begin - start] = 1.0
        return momenta


@dataclasses.dataclass(frozen=True)
class Fit:
    """The answer of `fit`.

    Attributes:
        weights: one for every profile; their sum is 1.
        error: how far the sum is from the wanted profile, `||sum_i x_i p_i - p*|| / ||p*||`.
        amplification: `sum_i |x_i|`. The rounding of stored averages may be larger in the sum by this factor.
    """

    weights: tuple[float, ...]
    error: float
    amplification: float


def fit(profiles: Sequence[Profile], target: Profile, rounding: Sequence[float]) -> Fit:
    """The weights whose sum of `profiles` is nearest to `target` in L2, divided by their sum (EDM2 does the same).

    Of several equal profiles the least rounded has the weight, the others get 0. If one of the profiles is the target
    itself, all others get 0.

    Many profiles are nearly alike, and A is nearly singular: huge weights of both signs would fight for the last digits
    of the profile, and amplify the rounding of the stored averages. So A is scaled to a unit diagonal, and every entry
    of the diagonal is raised by `rounding^2`. This minimises the squared error of the profile plus that of the
    rounding, if every stored average is off by so much in a direction of its own.

    Args:
        profiles: the profiles of the saved averages.
        target: the wanted profile.
        rounding: the relative rounding error of every stored average: 2^-8 for bfloat16.

    Raises:
        ConfigError: the profiles have nothing in common with the target.
    """
    _, kinds = _kinds([*profiles, target])
    keys = [(kind, profile.num_updates) for kind, profile in zip(kinds, [*profiles, target], strict=True)]
    least_rounded_last = sorted(range(len(profiles)), key=lambda index: -rounding[index])
    distinct = {keys[index]: index for index in least_rounded_last}
    if keys[-1] in distinct:
        return Fit(tuple(float(index == distinct[keys[-1]]) for index in range(len(profiles))), 0.0, 1.0)
    indices = sorted(distinct.values())
    products = inner_products([*(profiles[index] for index in indices), target])
    gram, shared, own = products[:-1, :-1], products[:-1, -1], float(products[-1, -1])
    scale = gram.diagonal().rsqrt()
    gram.mul_(scale).mul_(scale[:, None])
    ridge = torch.tensor(
        [max(_LEAST_RIDGE, rounding[index] ** 2) for index in indices], dtype=torch.float64, device="cpu"
    )
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    gram.diagonal().fill_(1.0)
    solved = torch.cholesky_solve((scale * shared)[:, None], factor)[:, 0]
    total = float((scale * solved).sum())
    if not total > 0.0:
        raise ConfigError(
            f"none of {len(indices)} profiles has anything of {target.schedule!r} after {target.num_updates} updates: "
            "the averages must hold observations that the wanted one holds"
        )
    solved /= total
    squared = float(solved @ (gram @ solved) - 2.0 * (solved @ (scale * shared))) + own
    weights = [0.0] * len(profiles)
    for index, weight in zip(indices, (scale * solved).tolist(), strict=True):
        weights[index] = weight
    error = (max(squared, 0.0) / own) ** 0.5  # below 1e-8 it is the rounding of this difference
    return Fit(tuple(weights), error, sum(abs(weight) for weight in weights))


def inner_products(profiles: Sequence[Profile]) -> torch.Tensor:
    """All `<p_i, p_j> = sum_k p_i(k) p_j(k)`: float64, symmetric.

    This goes through the run once, as training did. An update shrinks all that is in a schedule's average by one
    factor, so it is enough to carry the products with the profile that a schedule has *now*. The time is that of
    computing the momenta; memory does not grow with the run.
    """
    known, kinds = _kinds(profiles)
    products = torch.zeros(len(profiles), len(profiles), dtype=torch.float64, device="cpu")
    # The products of every schedule's present profile: with those of the other schedules, and with the ended profiles.
    present = torch.zeros(len(known), len(known), dtype=torch.float64, device="cpu")
    ended = torch.zeros(len(known), len(profiles), dtype=torch.float64, device="cpu")
    for _, stop, weights, kept in _stretches(known, (profile.num_updates for profile in profiles)):
        present = kept[:, None] * present * kept + weights @ weights.T
        ended *= kept[:, None]
        ending = [index for index, profile in enumerate(profiles) if profile.num_updates == stop]
        for index in ending:
            ended[:, index] = present[:, kinds[index]]
        for index in ending:
            products[index] = products[:, index] = ended[kinds[index]]
    return products


def masses(profiles: Sequence[Profile], edges: Sequence[int]) -> torch.Tensor:
    """The sums of a profile's weights between two edges (update numbers, half-open): a row for every profile.

    Args:
        profiles: the profiles, of any length.
        edges: strictly ascending, from 0 to the end of the longest profile or beyond.
    """
    known, kinds = _kinds(profiles)
    sums = torch.zeros(len(profiles), len(edges) - 1, dtype=torch.float64, device="cpu")
    present = torch.zeros(len(known), len(edges) - 1, dtype=torch.float64, device="cpu")
    between = 0  # edges[between] and edges[between + 1]
    for start, stop, weights, kept in _stretches(known, [*edges, *(profile.num_updates for profile in profiles)]):
        between += start >= edges[between + 1]
        present *= kept[:, None]
        present[:, between] += weights.sum(dim=1)
        for index, profile in enumerate(profiles):
            if profile.num_updates == stop:
                sums[index] = present[kinds[index]]
    return sums


def _kinds(profiles: Sequence[Profile]) -> tuple[list[Profile], list[int]]:
    """One profile for every schedule; and for every profile the index of its schedule. Schedules may be unhashable."""
    known: list[Profile] = []
    numbers = []
    for profile in profiles:
        kind = dataclasses.replace(profile, num_updates=0)
        if kind not in known:
            known.append(kind)
        numbers.append(known.index(kind))
    return known, numbers


def _stretches(kinds: Sequence[Profile], ends: Iterable[int]) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """The run in stretches of bounded length, none across one of the `ends`, until the last of them.

    Yields for a stretch: its first update; the one after its last; a row for every kind, with the weights of the
    updates in the profile at the end of the stretch; and for every kind the share of earlier observations that is kept
    then.
    """
    for begin, end in itertools.pairwise(sorted({0, *ends})):
        for start in range(begin, end, _STRETCH):
            stop = min(start + _STRETCH, end)
            momenta = torch.stack([kind.momenta(start, stop) for kind in kinds])
            # Products of 1 - m over an update and all later ones; a momentum of 1 makes all earlier weights 0.
            kept = (1.0 - momenta).flip(1).cumprod(1).flip(1)
            after = torch.cat([kept[:, 1:], torch.ones(len(kinds), 1, dtype=torch.float64, device="cpu")], dim=1)
            yield start, stop, momenta * after, kept[:, 0]
