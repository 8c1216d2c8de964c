"""Each file operation and each allocation of a save or load fails once on one rank; the others must not wait for it.

The command with every point is launch/crash/file_faults.py.
"""

from __future__ import annotations

import file_faults
import pytest
from file_faults import ACTIONS, Row
from ranks import World

from dist_ema.checkpoint import writing

pytestmark = pytest.mark.ranks

# One in how many points is tried.
EVERY = {"save": 13, "full_state_dict": 7, "construction": 7}
DEFAULT = 19


@pytest.fixture(scope="module")
def replaced():
    """Ranks in which functions of the system are replaced for good."""
    world = World(2)
    yield world
    world.stop()


def bad(rows: list[Row]) -> str:
    return "\n".join(each for row in rows for each in row.bad)


@pytest.mark.parametrize("layout", file_faults.LAYOUTS)
def test_a_failure_at_any_call_of_one_rank_ends_alike_on_all_and_spoils_nothing(replaced, tmp_path, layout) -> None:
    rows = []
    for name in ACTIONS:
        (row,), (same,) = replaced.run(sweep, str(tmp_path), layout, {name: EVERY.get(name, DEFAULT)})
        assert bad([row]) == bad([same]) == ""
        assert row.same_error > 0 and row.same_error + row.no_harm == row.points
        rows.append(row)
    assert sum(row.points for row in rows) > 50


def sweep(folder: str, layout: str, every: dict[str, int]) -> list[Row]:
    return file_faults.sweep_here(folder, layout, every)


def careless_close(folder: str) -> list[Row]:
    """As it was: what `close` says comes out on one rank, between two agreements."""

    def close(self: writing._FileWriting) -> None:
        if self._descriptor >= 0:
            writing.os.close(self._descriptor)

    careful, writing._FileWriting._close = writing._FileWriting._close, close
    try:
        return file_faults.sweep_here(folder, "ddp", {"save": 1}, call="os.close")
    finally:
        writing._FileWriting._close = careful


def test_a_close_that_fails_where_nobody_looks_still_reaches_all_ranks(replaced, tmp_path) -> None:
    """By the second line of defence: a rank that leaves a call by an error of its own tells the others."""
    rows, _ = replaced.run(careless_close, str(tmp_path))
    assert bad(rows) == "" and rows[0].points > 5


def lost_average(folder: str) -> list[Row]:
    """A load that reads to where the average lies."""
    careful, file_faults.Trial.in_memory = file_faults.Trial.in_memory, lambda trial: "another average"
    try:
        return file_faults.sweep_here(folder, "ddp", {"load": 40})
    finally:
        file_faults.Trial.in_memory = careful


def test_a_sweep_can_fail(replaced, tmp_path) -> None:
    rows, _ = replaced.run(lost_average, str(tmp_path))
    assert rows[0].points == len(rows[0].bad) > 0 and "another average" in rows[0].bad[0]
