from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from ranks import World

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """`world(2)` is a running world of 2 gloo ranks, shared by all tests of this pytest worker."""
    worlds: dict[int, World] = {}
    yield lambda size: worlds.setdefault(size, World(size))
    for each in worlds.values():
        each.stop()


def pytest_sessionfinish() -> None:
    """What tests average is not meant to be used."""
    watch = sys.modules.get("dist_ema.integrations.watch")
    if watch is not None:
        watch._records.clear()
