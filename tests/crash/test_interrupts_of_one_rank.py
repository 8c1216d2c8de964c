"""An interrupt on one rank of two within a call of all: nobody waits, nothing half done stays.

`launch/crash/rank_interrupts.py` tries every line of every call; here a sample.
"""

from __future__ import annotations

import pytest
from rank_interrupts import CALLS, sweep_lines, sweep_signals

# One in how many lines is tried.
EVERY = {"average_parameters": 61, "copy_to_model": 61, "sharded_state_dict": 61, "metrics": 37}
DEFAULT = 131


@pytest.mark.parametrize("call", CALLS)
def test_a_rank_that_is_interrupted_while_averages_are_shared_leaves_nobody_waiting(world, tmp_path, call) -> None:
    every = EVERY.get(call, DEFAULT)
    (points, bad), (_, other) = world(2).run(sweep_lines, str(tmp_path), call, every, 1 + len(call) % every)
    assert points > 5 and bad == other == []


@pytest.mark.parametrize("call", ["average_parameters", "save"])
def test_a_signal_at_any_time_of_a_call_of_several_ranks_leaves_nobody_waiting(world, tmp_path, call) -> None:
    (_, bad), (_, other) = world(2).run(sweep_signals, str(tmp_path), call, 30, 0)
    assert bad == other == []
