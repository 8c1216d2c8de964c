"""A store that outlives the ranks which wrote into it: the next ranks do not take these words for their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from dist_ema.ranks.store.generation import Generation
from dist_ema.ranks.store.shared_store import SharedStore


@pytest.fixture
def store() -> Iterator[Any]:
    yield dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def of(store: Any, rank: int) -> Generation:
    return Generation(SharedStore(store, "test", 10.0), rank, 2)


def sign(store: Any, generation: Generation) -> None:
    generation.sign(SharedStore(store, f"test/{generation.name()}", 10.0))


def named(generation: Generation, seconds: float) -> str | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        name = generation.name()
        if name is not None:
            return name
    return None


def test_a_dead_generation_is_not_joined(store) -> None:
    dead = of(store, 0)
    sign(store, dead)  # it had lived
    assert named(of(store, 1), 1.0) is None


def test_a_rank_that_looks_before_rank_0_has_come_back_waits_for_the_new_name(store) -> None:
    former = of(store, 0).name()
    early = of(store, 1)
    assert named(early, 0.3) is None
    new = of(store, 0).name()
    assert new != former and named(early, 5.0) == new


def test_a_rank_that_looks_after_rank_0_has_come_back_learns_it_from_a_sign_of_life(store) -> None:
    sign(store, of(store, 0))
    living = of(store, 0)
    late = of(store, 1)
    assert named(late, 0.3) is None
    signs = threading.Thread(target=lambda: [(time.sleep(0.05), sign(store, living)) for _ in range(20)])
    signs.start()
    assert named(late, 5.0) == living.name()
    signs.join()


def test_in_a_new_store_nobody_waits_for_a_sign(store) -> None:
    early = of(store, 1)
    assert named(early, 0.1) is None
    name = of(store, 0).name()
    assert named(early, 5.0) == name
