"""A rank that is late, dies, makes another call, or is interrupted: the others know soon, and alike.

The command that tries each case ten times is launch/crash/rank_losses.py.
"""

from __future__ import annotations

import pytest
from forking import forking_process
from rank_losses import CASES, tried


@pytest.fixture(scope="module")
def forking():
    with forking_process() as forking:
        yield forking


@pytest.mark.ranks
@pytest.mark.parametrize(("odd", "host"), [(2, "agent"), (0, "agent"), (0, "rank 0"), (3, "rank 0")])
@pytest.mark.parametrize("name", CASES)
def test_when_one_rank_is_lost_or_late_the_others_end_soon_and_alike(forking, name, odd, host) -> None:
    assert forking(tried, CASES[name], odd, host)[1] == []
