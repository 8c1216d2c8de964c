"""What the ranks say to one another, counted in a simulation. At 16,384 ranks: `launch/studies/control_plane.py`."""

from __future__ import annotations

import pytest
from simulated_calls import CALLS, simulate
from simulated_ranks import largest

MESSAGES, BYTES = 64, 10**6


@pytest.mark.parametrize("size", [8, 256])
def test_no_rank_says_or_hears_more_than_some_dozens_of_messages(size) -> None:
    calls = CALLS if size == 8 else ("construction", "agreement", "save", "load")
    for call, counts in simulate(size, calls).items():
        most = largest(counts)
        assert max(most.sent, most.received) <= MESSAGES * (1 if call in ("construction", "agreement") else 4), call
        assert most.num_bytes <= BYTES, call


def test_rank_0_says_and_hears_as_much_in_a_hundred_ranks_as_in_eight() -> None:
    few, many = (simulate(size, ("construction", "agreement", "save")) for size in (8, 100))
    for call in few:
        assert many[call][0].sent <= 2 * few[call][0].sent, call
