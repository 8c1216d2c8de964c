"""What the ranks say to one another, counted in a simulation. At 16,384 ranks: `launch/studies`."""

from __future__ import annotations

import time

import holders
import pytest
from simulated_calls import CALLS, simulate
from simulated_ranks import largest

from dist_ema.boxes.holding import Proof

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


@pytest.mark.parametrize("layout", holders.LAYOUTS)
def test_ranks_that_prove_or_find_who_holds_what_say_little_and_own_every_element_once(layout) -> None:
    done = holders.measure(layout, 128, layers=12)
    most = largest(done.counts)
    assert done.is_whole
    assert max(most.sent, most.received) <= 2 * MESSAGES
    assert most.num_bytes <= BYTES / 4


@pytest.mark.parametrize("layout", holders.LAYOUTS)
def test_a_rank_of_sixteen_thousand_proves_its_plan_of_the_largest_model_within_seconds(layout) -> None:
    began = time.thread_time()
    plan = holders.plan(layout, 8195, 16384, layers=126)
    Proof.of(plan, 8195, 16384, seed=1, names_of=lambda groups: ())
    assert time.thread_time() - began <= 2.0
