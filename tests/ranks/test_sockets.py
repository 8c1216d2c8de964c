"""What a process holds open for the average does not grow with the number of ranks.

More ranks, and torchrun itself: `launch/studies/control_plane.py --real`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
from forking import forking_process
from real_ranks import HOSTS, Counted, Measured, forked, measure, store_kept_by

MOST = Counted(descriptors=16, threads=2)


@pytest.fixture(scope="module")
def forking():
    with forking_process() as forking:
        yield forking


def world_of(size: int, host: str, layout: str, spare: int = 0) -> list[Measured]:
    with store_kept_by(host) as store:
        ranks: list[Measured] = forked(size, store, partial(measure, layout, spare=spare))[0]
        return ranks[1:] if host == "rank 0" else ranks


def most(ranks: Sequence[Measured], name: str) -> Counted:
    counts = [getattr(rank, name) for rank in ranks]
    return Counted(max(each.descriptors for each in counts), max(each.threads for each in counts))


@pytest.mark.ranks
@pytest.mark.parametrize("host", HOSTS)
def test_sixteen_ranks_hold_no_more_open_than_four(forking, host) -> None:
    few, many = (forking(world_of, size, host, "fsdp2") for size in (4, 16))
    for name in ("constructed", "saved"):
        assert most(few, name) == most(many, name), name
    for name in ("constructed", "saving", "saved"):
        assert most(many, name) | MOST == MOST, name


@pytest.mark.ranks
def test_a_process_that_may_open_twenty_more_descriptors_builds_saves_and_loads(forking) -> None:
    assert len(forking(world_of, 16, "agent", "fsdp2", 20)) == 16
