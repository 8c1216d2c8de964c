"""The worlds of ranks that the tests themselves run in (tests/support/ranks.py)."""

from __future__ import annotations

import os


def loses_its_size() -> str:
    os.environ["LEFT_BEHIND"] = "1"
    return os.environ.pop("WORLD_SIZE")


def size_and_rest() -> tuple[str | None, str | None]:
    return os.environ.get("WORLD_SIZE"), os.environ.get("LEFT_BEHIND")


def test_a_case_that_takes_away_the_world_size_leaves_it_to_the_next(world) -> None:
    """After a case with Lightning, which does so, transformers sharded nothing in the cases of another file."""
    assert world(2).run(loses_its_size) == ["2", "2"]
    assert world(2).run(size_and_rest) == [("2", None)] * 2
