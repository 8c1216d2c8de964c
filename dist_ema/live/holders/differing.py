"""Which tensors the ranks of a division do not hold alike: one number first, and lists only after a difference.

See `dist_ema.boxes.alike` for the number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dist_ema.boxes.alike import are_alike, digest, term
from dist_ema.boxes.owners import Division
from dist_ema.boxes.rank_runs import RankRuns, merged_runs
from dist_ema.disk.formats.checksums import checksum
from dist_ema.ranks.exchange import Exchange

__all__ = ["Table", "differing_tensors", "key_of"]

# Key of a division -> its lowest rank, and index of a tensor -> the ranks that hold it otherwise than that rank.
Table = Mapping[str, tuple[int, Mapping[int, RankRuns]]]

# What one table has at most, so that a message stays below a few hundred kilobytes.
_MOST_TENSORS = 16_384
_MOST_DIVISIONS = 1024


def key_of(division: Division) -> str:
    """A key that the ranks of a division compute alike, and that no other division has."""
    ranks = checksum(repr(division.ranks).encode())
    return f"{division.ranks[0]:08d}-{len(division.ranks)}-{ranks:08x}-{division.averaged:d}"


def differing_tensors(
    exchange: Exchange, action: str, divisions: Mapping[str, Division], sums: Mapping[str, Sequence[int]]
) -> Iterator[Table]:
    """Collective, as is every step of the iteration: every rank must call it. The tensors that are not held alike.

    Args:
        exchange: the control traffic of all ranks.
        action: a name of the work, for a message.
        divisions: the divisions of this rank, by `key_of`.
        sums: the checksums of their tensors on this rank, by the same keys.

    Yields:
        One table after the other, the same on every rank; none where all tensors are held alike.
    """
    digests = {key: digest(of_division) for key, of_division in sums.items()}
    if _are_alike(exchange, divisions, digests):
        return
    own = {key: [of_set[:16], len(sums[key]), False] for key, of_set in digests.items()}
    of_all = exchange.reduce(action, own, _with_differences)
    num_tensors = {key: number for key, (_, number, differs) in sorted(of_all.items()) if differs}
    for keys in _batches(num_tensors):
        yield _table(exchange, action, {key: list(sums[key]) for key in keys if key in sums})


def _are_alike(exchange: Exchange, divisions: Mapping[str, Division], digests: Mapping[str, str]) -> bool:
    own = sum(term(key, divisions[key].position, len(divisions[key].ranks), of_set) for key, of_set in digests.items())
    return are_alike(*exchange.sum_integers([own]))


def _with_differences(lower: dict[str, Any], higher: dict[str, Any]) -> dict[str, Any]:
    """The digests of the lowest ranks, and whether a rank has another one; associative."""
    merged = dict(lower)
    for key, (of_set, number, differs) in higher.items():
        first, _, differs_below = lower.get(key, (of_set, number, False))
        merged[key] = [first, number, differs or differs_below or of_set != first]
    return merged


def _batches(num_tensors: Mapping[str, int]) -> Iterator[list[str]]:
    """The keys in groups that have few tensors together."""
    keys: list[str] = []
    total = 0
    for key, number in num_tensors.items():
        if keys and (total + number > _MOST_TENSORS or len(keys) == _MOST_DIVISIONS):
            yield keys
            keys, total = [], 0
        keys.append(key)
        total += number
    if keys:
        yield keys


def _table(exchange: Exchange, action: str, sums: Mapping[str, Sequence[int]]) -> Table:
    rank = exchange.rank
    own = {key: [rank, of_division] for key, of_division in sums.items()}
    lowest = exchange.reduce(action, own, lambda lower, higher: {**higher, **lower})
    others = {
        key: {
            str(index): [[rank, rank]]
            for index, (value, of_lowest) in enumerate(zip(of_division, lowest[key][1], strict=True))
            if value != of_lowest
        }
        for key, of_division in sums.items()
    }
    of_all = exchange.reduce(action, others, _with_further_ranks)
    return {
        key: (lowest[key][0], {int(index): RankRuns(runs) for index, runs in sorted(of_key.items(), key=_index)})
        for key, of_key in sorted(of_all.items())
    }


def _index(item: tuple[str, Any]) -> int:
    return int(item[0])


def _with_further_ranks(lower: dict[str, Any], higher: dict[str, Any]) -> dict[str, Any]:
    """Key -> index -> runs of ranks; associative."""
    merged = {key: dict(by_index) for key, by_index in lower.items()}
    for key, by_index in higher.items():
        of_key = merged.setdefault(key, {})
        for index, runs in by_index.items():
            of_key[index] = merged_runs(of_key.get(index, []), runs)
    return merged
