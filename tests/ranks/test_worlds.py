"""The worlds of ranks that the tests themselves run in (tests/support/ranks.py)."""

from __future__ import annotations

import os
import subprocess
import sys


def loses_its_size() -> str:
    os.environ["LEFT_BEHIND"] = "1"
    return os.environ.pop("WORLD_SIZE")


def size_and_rest() -> tuple[str | None, str | None]:
    return os.environ.get("WORLD_SIZE"), os.environ.get("LEFT_BEHIND")


def test_a_case_that_takes_away_the_world_size_leaves_it_to_the_next(world) -> None:
    """After a case with Lightning, which does so, transformers sharded nothing in the cases of another file."""
    assert world(2).run(loses_its_size) == ["2", "2"]
    assert world(2).run(size_and_rest) == [("2", None)] * 2


ALONE = """
import warnings
import torch
from dist_ema import ConstantSchedule, ShardedEMA
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    ShardedEMA(torch.nn.Linear(2, 1), ConstantSchedule(decay=0.9))
print(*[str(one.message) for one in told], sep="\\n")
"""


def told_alone(**environment: str) -> str:
    """What a process of these variables is told that builds an average and is in no process group."""
    result = subprocess.run(
        [sys.executable, "-c", ALONE], env={**os.environ, **environment}, check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


def test_a_launched_process_without_a_process_group_is_told_that_it_averages_alone() -> None:
    """Two of them once wrote two averages into one folder, without a word."""
    told = told_alone(WORLD_SIZE="2", RANK="0")
    assert "started 2 processes" in told and "init_process_group" in told
    assert not told_alone(WORLD_SIZE="2", RANK="1")  # the first tells it for all
    assert not told_alone(WORLD_SIZE="1", RANK="0")
    assert not told_alone(WORLD_SIZE="two", RANK="0")
