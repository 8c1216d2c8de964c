"""The sum that shows a difference between replicas, and the lists after it, for many ranks in one process."""

from __future__ import annotations

import functools
import itertools
import json
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dist_ema.boxes.owners import Division
from dist_ema.live.holders import differing
from dist_ema.live.holders.differing import Table, differing_tensors, key_of


class Ranks:
    """Ranks that are threads. The longest message is noted."""

    def __init__(self, world_size: int, fan_in: int) -> None:
        self.world_size, self.fan_in = world_size, fan_in
        self.longest = 0
        self.num_reductions = 0
        self._values: list[Any] = [None] * world_size
        self._barrier = threading.Barrier(world_size, timeout=30)

    def combine(self, rank: int, value: Any, merge: Callable[[Any, Any], Any]) -> Any:
        self._values[rank] = json.dumps(value)
        if self._barrier.wait() == 0:
            self.num_reductions += 1
            level = list(self._values)
            while len(level) > 1:
                groups = [level[at : at + self.fan_in] for at in range(0, len(level), self.fan_in)]
                level = [json.dumps(functools.reduce(merge, map(json.loads, group))) for group in groups]
                self.longest = max(self.longest, *map(len, level))
            self._answer = level[0]
        self._barrier.wait()
        return json.loads(self._answer)

    def run(self, case: Callable[[OneRank], Any]) -> list[Any]:
        results: list[Any] = [None] * self.world_size

        def serve(rank: int) -> None:
            try:
                results[rank] = case(OneRank(self, rank))
            except BaseException as error:
                results[rank] = error
                self._barrier.abort()

        threads = [threading.Thread(target=serve, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


class OneRank:
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.rank, self.world_size, self._ranks = rank, ranks.world_size, ranks

    def reduce(self, action: str, value: Any, merge: Callable[[Any, Any], Any]) -> Any:
        return self._ranks.combine(self.rank, value, merge)

    def sum_integers(self, values: Sequence[int]) -> list[int]:
        def add(first: list[int], second: list[int]) -> list[int]:
            return [one + other for one, other in zip(first, second, strict=True)]

        return self._ranks.combine(self.rank, list(values), add)


def divisions_of(rank: int, layout: Sequence[Sequence[int]]) -> dict[str, Division]:
    divisions = [
        Division(held=(), ranks=tuple(ranks), position=list(ranks).index(rank)) for ranks in layout if rank in ranks
    ]
    return {key_of(division): division for division in divisions}


def tables(ranks: Ranks, layout: Sequence[Sequence[int]], sums: Callable[[int, str], list[int]]) -> list[Table]:
    def case(exchange: Any) -> list[Table]:
        divisions = divisions_of(exchange.rank, layout)
        own = {key: sums(exchange.rank, key) for key in divisions}
        tables = list(differing_tensors(exchange, "comparing", divisions, own))
        return [
            {key: (low, {at: list(r) for at, r in by.items()}) for key, (low, by) in table.items()} for table in tables
        ]

    results = ranks.run(case)
    assert all(result == results[0] for result in results)
    return results[0]


HSDP = [[shard, shard + 4, shard + 8] for shard in range(4)]  # 12 ranks: 4 shards, each on 3 ranks
ALL = [list(range(12))]


@pytest.mark.parametrize("layout", [HSDP, ALL, HSDP + ALL, [[0, 1]], []])
def test_replicas_that_are_alike_cost_one_number_and_no_list(layout) -> None:
    ranks = Ranks(12, 4)
    assert tables(ranks, layout, lambda rank, key: [int(key[:8]), 5, 7]) == []
    assert ranks.num_reductions == 1 and ranks.longest < 60


def expected(layout: Sequence[Sequence[int]], sums: Callable[[int, str], list[int]]) -> dict[str, Any]:
    table = {}
    for ranks in layout:
        key = key_of(Division(held=(), ranks=tuple(ranks), position=0))
        first = sums(ranks[0], key)
        others = {at: [rank for rank in ranks if sums(rank, key)[at] != value] for at, value in enumerate(first)}
        if any(others.values()):
            table[key] = (ranks[0], {at: differing for at, differing in others.items() if differing})
    return table


@pytest.mark.parametrize("layout", [HSDP, ALL, HSDP + ALL])
def test_every_tensor_that_differs_is_listed_with_its_ranks_wherever_the_tree_cuts_them(layout, monkeypatch) -> None:
    draw = random.Random(0)
    for number, fan_in in itertools.product(range(12), (2, 3, 5, 12)):
        moved = {(draw.randrange(12), draw.randrange(3)): draw.randrange(2) + 1 for _ in range(number)}

        def sums(rank: int, key: str, moved: dict[tuple[int, int], int] = moved) -> list[int]:
            return [100 + moved.get((rank, at), 0) for at in range(3)]

        wanted = expected(layout, sums)
        for most in (1, 4, 10_000):
            monkeypatch.setattr(differing, "_MOST_TENSORS", most)
            several = tables(Ranks(12, fan_in), layout, sums)
            merged = {key: value for table in several for key, value in table.items()}
            assert merged == wanted and len(merged) == sum(map(len, several))
            assert most != 1 or len(several) == len(wanted)


@pytest.mark.parametrize("swapped", [{1: 2, 2: 1}, {1: 2, 6: 1}, {8: 1, 9: 0}])
def test_two_ranks_that_hold_the_shards_of_each_other_do_not_cancel(swapped) -> None:
    def sums(rank: int, key: str) -> list[int]:
        return [swapped.get(rank, rank) % 4]

    wanted = expected(HSDP, sums)
    assert len(wanted) == 2 and tables(Ranks(12, 4), HSDP, sums) == [wanted]
