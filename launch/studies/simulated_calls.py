"""The calls of an average as thousands of simulated ranks make them: what each of them says and hears."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from scaling import llama, shard_boxes
from simulated_ranks import Counts, FakeStore, FakeWires, Server
from torch import nn

from dist_ema import ConstantSchedule, ShardedEMA
from dist_ema.checkpoint.writing import write_tensors
from dist_ema.disk.formats.model_files import lay_out_files
from dist_ema.ranks.exchange import Exchange
from dist_ema.ranks.worlds import World, simulated

__all__ = ["CALLS", "simulate"]

WIDTH, DEPTH = 64, 2
SHAPES = llama(hidden=512, feed=1408, layers=4, key_value=128, vocabulary=8192)
FILES = lay_out_files(
    [(str(index), torch.float32, shape) for index, shape in enumerate(SHAPES)], max_shard_size="5GB", metadata={}
)
CALLS = ("construction", "agreement", "save", "snapshot", "load", "fsdp2 write")


def model() -> nn.Module:
    """All ranks hold all of it, as under DDP."""
    torch.manual_seed(0)
    return nn.Sequential(*[part for _ in range(DEPTH) for part in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))])


def write_rows(rank: int, size: int, folder: Path) -> None:
    """Collective: every rank must call it. Write the rows that FSDP2 leaves a rank; most are shorter than a page."""
    pieces = [(box, torch.zeros(box.sizes)) for box in shard_boxes(SHAPES, rank, size) if box.numel]
    exchange = Exchange()
    exchange.raise_together("writing", write_tensors(exchange, folder, FILES, pieces, range(size), None))


def simulate(size: int, calls: tuple[str, ...] = CALLS, seed: int = 0) -> dict[str, list[Counts]]:
    """Make the calls. For each, the counts of all ranks, in rank order.

    Args:
        size: the number of ranks.
        calls: those of `CALLS` that are made.
        seed: of the order in which the ranks come.
    """
    server, shared = Server(size), model()
    folder = Path(tempfile.mkdtemp())
    (folder / "rows").mkdir()
    for file in FILES.files:
        with (folder / "rows" / file.name).open("wb") as stream:
            stream.truncate(file.size_bytes)

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
            "fsdp2 write": lambda: write_rows(rank, size, folder / "rows"),
        }
        world = World(None, rank, size, FakeStore(server, rank))
        world.make_wires = functools.partial(FakeWires, server)
        with simulated(world):
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
