"""The calls of an average as thousands of simulated ranks make them: what each of them says and hears."""

from __future__ import annotations

import copy
import itertools
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from simulated_ranks import Counts, FakeStore, Server
from torch import nn

from dist_ema import ConstantSchedule, ShardedEMA
from dist_ema.ranks.exchange import Exchange
from dist_ema.ranks.worlds import World, simulated

__all__ = ["CALLS", "simulate"]

WIDTH, DEPTH = 64, 2
CALLS = ("construction", "agreement", "save", "snapshot", "load")


def model() -> nn.Module:
    """All ranks hold all of it, as under DDP."""
    torch.manual_seed(0)
    return nn.Sequential(*[part for _ in range(DEPTH) for part in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))])


def simulate(size: int, calls: tuple[str, ...] = CALLS, seed: int = 0) -> dict[str, list[Counts]]:
    """Make the calls. For each, the counts of all ranks, in rank order.

    Args:
        size: the number of ranks.
        calls: those of `CALLS` that are made.
        seed: of the order in which the ranks come.
    """
    server, shared = Server(size), model()
    folder = Path(tempfile.mkdtemp())

    def life(rank: int) -> list[Counts]:
        seen = [Counts()]
        averages: list[ShardedEMA] = []

        def construct() -> None:
            averages.append(ShardedEMA(shared, ConstantSchedule(momentum=0.5)))
            averages[0].update()

        made: dict[str, Callable[[], object]] = {
            "construction": construct,
            "agreement": lambda: Exchange().agree("agreeing", lambda: None),
            "save": lambda: averages[0].save(folder / "ema"),
            "snapshot": lambda: averages[0].snapshot(folder / "all"),
            "load": lambda: averages[0].load(folder / "ema"),
        }
        with simulated(World(None, rank, size, FakeStore(server, rank), 1)):
            for call in calls:
                made[call]()
                seen.append(copy.copy(server.counts[rank]))
        return [after - before for before, after in itertools.pairwise(seen)]

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            of_ranks = server.run(life, random.Random(seed))
    finally:
        shutil.rmtree(folder)
    return {call: [counts[index] for counts in of_ranks] for index, call in enumerate(calls)}
