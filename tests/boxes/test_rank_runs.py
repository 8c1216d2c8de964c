"""Ranks as runs: the sequence they stand for, and no list of it."""

from __future__ import annotations

import functools
import itertools
import json

import pytest

from dist_ema.boxes.rank_runs import RankRuns, merged_runs


def combined(ranks: list[int], fan_in: int) -> RankRuns:
    """As a tree of reductions combines them: groups first, then the groups."""
    own = [[[rank, rank]] if rank in ranks else [] for rank in range(9)]
    groups = [functools.reduce(merged_runs, own[at : at + fan_in]) for at in range(0, len(own), fan_in)]
    return RankRuns(json.loads(json.dumps(functools.reduce(merged_runs, groups))))


def test_runs_are_the_ranks_they_stand_for_whatever_was_combined_first() -> None:
    for number in range(10):
        for ranks in map(list, itertools.combinations(range(9), number)):
            runs = combined(ranks, 9)
            assert all(combined(ranks, fan_in).runs == runs.runs for fan_in in (1, 2, 4))
            assert list(runs) == ranks and len(runs) == len(ranks) and bool(runs) == bool(ranks)
            assert [rank for rank in range(-2, 12) if rank in runs] == ranks
            assert [runs[at] for at in range(-len(ranks), len(ranks))] == ranks + ranks
            assert [runs.index(rank) for rank in ranks] == list(range(len(ranks)))
            assert runs[1:] == ranks[1:] and list(reversed(runs)) == ranks[::-1]
            assert list(runs.others(9)) == [rank for rank in range(9) if rank not in ranks]
            with pytest.raises(IndexError):
                runs[len(ranks)]
            with pytest.raises(ValueError):
                runs.index(9)


def test_a_hole_in_sixteen_thousand_ranks_is_two_runs() -> None:
    writers = RankRuns([[7, 9]]).others(16_384)
    assert writers.runs == [(0, 6), (10, 16_383)] and str(writers) == "0 to 6, 10 to 16383"
    assert len(writers) == 16_381 and writers[7] == 10 and writers.index(16_383) == 16_380 and 8 not in writers
