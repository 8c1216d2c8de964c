"""Two jobs in one folder: one wins whole, the other is told, nothing is lost.

The command with more pairs is launch/crash/job_pairs.py.
"""

from __future__ import annotations

import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import job_pairs
import pytest
from job_pairs import TURNING_POINTS, Outcome, Pairs

from dist_ema.disk.folders import commit

SHORT = TURNING_POINTS[2:6]
OF_WHAT_IS_NOT_WHOLE = TURNING_POINTS[7]


@pytest.fixture(scope="module")
def forking():
    """A process that has loaded torch and nothing else: it forks the jobs."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield lambda function, *arguments: executor.submit(function, *arguments).result(timeout=300)


def bad(outcomes: list[tuple[str, Outcome]]) -> list[str]:
    return [f"{place}: {outcome}" for place, outcome in outcomes if outcome.bad]


def one_inside(folder: Path, state: str) -> list[tuple[str, Outcome]]:
    points = [point for point in SHORT if "old" not in point or state == "whole"]
    if state == "file_in_the_way":
        points = [OF_WHAT_IS_NOT_WHOLE]
    return list(job_pairs.one_inside_the_other(Pairs(folder), getattr(job_pairs, state), points=points))


@pytest.mark.parametrize("state", ["whole", "between_renames", "file_in_the_way"])
def test_a_save_inside_another_is_told_or_replaces_what_it_has_seen(forking, tmp_path, state) -> None:
    outcomes = forking(one_inside, tmp_path, state)
    assert not bad(outcomes)
    ends = [{outcome.first, outcome.second} for _, outcome in outcomes]
    assert {"told", "returned"} in ends and {"killed", "returned"} in ends


def both_stop(folder: Path) -> list[tuple[str, Outcome]]:
    pairs = Pairs(folder)
    events = pairs.events(job_pairs.whole, loads=False)
    at = [1 + events.index(point) for point in SHORT]
    nested = [(at[0], at[1]), (at[1], at[1]), (at[1], at[2]), (at[2], at[0]), (at[2], at[2]), (at[3], at[3])]
    return [(str(each), pairs.nested(job_pairs.whole, *each)) for each in nested]


def test_two_saves_that_stop_at_their_turning_points(forking, tmp_path) -> None:
    assert not bad(forking(both_stop, tmp_path))


def inside_a_load(folder: Path) -> list[tuple[str, Outcome]]:
    return list(job_pairs.inside_a_load(Pairs(folder), job_pairs.whole, step=2))


def test_a_load_in_which_the_folder_is_replaced_returns_one_whole_average(forking, tmp_path) -> None:
    outcomes = forking(inside_a_load, tmp_path)
    assert len(outcomes) > 5 and not bad(outcomes)


def at_random(folder: Path) -> list[tuple[str, Outcome]]:
    return list(job_pairs.at_random(Pairs(folder), 10, random.Random(0), seconds=0.05))


def test_two_jobs_at_random_moments(forking, tmp_path) -> None:
    assert not bad(forking(at_random, tmp_path))


def without_looking_again(folder: Path) -> list[tuple[str, Outcome]]:
    """The jobs inherit the patches of this process."""
    real = commit.Staged.is_current, commit.Staged.was
    commit.Staged.is_current = lambda self: True
    commit.Staged.was = lambda self, folder: True
    try:
        return list(job_pairs.one_inside_the_other(Pairs(folder), job_pairs.whole, points=SHORT[1:2]))
    finally:
        commit.Staged.is_current, commit.Staged.was = real


def test_a_commit_that_replaces_what_it_has_not_seen_is_caught(forking, tmp_path) -> None:
    assert "both saves returned" in str(bad(forking(without_looking_again, tmp_path)))
