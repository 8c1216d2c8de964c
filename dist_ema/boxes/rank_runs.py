"""Some of the ranks, as runs of consecutive ones: a few numbers, however many ranks there are. No communication."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, overload

__all__ = ["RankRuns", "merged_runs"]

# The first and the last rank of each run, in order; as JSON.
Runs = Sequence[Sequence[int]]


class RankRuns(Sequence[int]):
    """The ranks of the runs, in order: a sequence that does not list its entries.

    Args:
        runs: the first and the last rank of each run, in order, apart from one another.
    """

    def __init__(self, runs: Runs) -> None:
        self.runs = [(first, last) for first, last in runs]
        self._firsts = [first for first, _ in self.runs]
        self._starts = [0, *itertools.accumulate(last + 1 - first for first, last in self.runs)]

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(index)
        run = bisect.bisect_right(self._starts, at) - 1
        return self._firsts[run] + at - self._starts[run]

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(range(first, last + 1) for first, last in self.runs)

    def __contains__(self, rank: object) -> bool:
        return isinstance(rank, int) and self._run_of(rank) is not None

    def index(self, rank: int, start: int = 0, stop: int | None = None) -> int:
        """The place of a rank among these."""
        run = self._run_of(rank)
        at = -1 if run is None else self._starts[run] + rank - self._firsts[run]
        if at not in range(*slice(start, stop).indices(len(self))):
            raise ValueError(f"{rank} is not among the ranks {self}")
        return at

    def __str__(self) -> str:
        """The first runs, for a message: "1, 3 to 5"."""
        shown = [f"{first}" if first == last else f"{first} to {last}" for first, last in self.runs[:_MOST_SHOWN]]
        return ", ".join(shown) + (", ..." if len(self.runs) > _MOST_SHOWN else "")

    def others(self, world_size: int) -> RankRuns:
        """The ranks below `world_size` that are not among these."""
        edges = [-1, *(edge for run in self.runs for edge in run), world_size]
        gaps = zip(edges[::2], edges[1::2], strict=True)
        return RankRuns([(before + 1, after - 1) for before, after in gaps if before + 1 < after])

    def _run_of(self, rank: int) -> int | None:
        run = bisect.bisect_right(self._firsts, rank) - 1
        return run if run >= 0 and rank <= self.runs[run][1] else None


_MOST_SHOWN = 8


def merged_runs(lower: Runs, higher: Runs) -> list[Sequence[int]]:
    """The runs of some ranks and of ranks after them, for `Exchange.reduce`. Adjacent runs become one."""
    merged = list(lower)
    for first, last in itertools.islice(higher, 1):
        if merged and merged[-1][1] + 1 == first:
            merged[-1] = [merged[-1][0], last]
        else:
            merged.append([first, last])
    return merged + list(higher[1:])
