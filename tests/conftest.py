from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

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


EVERYTHING = Path(__file__).parent / "everything"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What only `launch/everything.sh` runs needs programs that the suite does without: its folder must be named."""
    is_named = any(EVERYTHING.name in argument for argument in config.args)
    return True if collection_path == EVERYTHING and not is_named else None


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that takes a world runs on ranks; one that starts processes by other means has the marker itself."""
    for item in items:
        if "world" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ranks)


def pytest_sessionfinish() -> None:
    """What tests average is not meant to be used."""
    watch = sys.modules.get("dist_ema.integrations.watch")
    if watch is not None:
        watch._records.clear()
