"""How the averages of large models divide, by the arithmetic each rank does alone: no process, no tensor.

    python launch/studies/scaling.py          # the table of docs/scaling.md

DDP: all ranks hold everything. HSDP R x S: FSDP2 cuts every tensor by rows over S ranks (unevenly where the rows do
not divide), and the R ranks that hold the same rows divide them again.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

from dist_ema.boxes.owners import cut_points, run_between
from dist_ema.boxes.shards import Box

Shape = tuple[int, ...]


def llama(hidden: int, feed: int, layers: int, key_value: int, vocabulary: int) -> list[Shape]:
    """Parameters of a Llama 3 model: grouped-query attention, gated feed-forward, untied head."""
    square, narrow = (hidden, hidden), (key_value, hidden)
    layer = [square, narrow, narrow, square, (feed, hidden), (feed, hidden), (hidden, feed), (hidden,), (hidden,)]
    return [(vocabulary, hidden), *layer * layers, (hidden,), (vocabulary, hidden)]


def gpt2() -> list[Shape]:
    """GPT-2 small."""
    layer = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,), (768, 3072), (3072,)]
    return [(50257, 768), (1024, 768), *[*layer, (3072, 768), (768,)] * 12, (768,), (768,)]


MODELS = {
    "GPT-2 124M": gpt2(),
    "Llama 3.1 8B": llama(4096, 14336, 32, 1024, 128256),
    "Llama 3.1 70B": llama(8192, 28672, 80, 1024, 128256),
    "Llama 3.1 405B": llama(16384, 53248, 126, 1024, 128256),
}
# (model, replicas, shards): shards 1 is DDP.
CASES = [
    ("GPT-2 124M", 8, 1),
    ("Llama 3.1 8B", 64, 1),
    ("Llama 3.1 8B", 8, 8),
    ("Llama 3.1 70B", 16, 64),
    ("Llama 3.1 405B", 16384, 1),
    ("Llama 3.1 405B", 8, 2048),
]


def whole_boxes(shapes: list[Shape]) -> list[Box]:
    return [Box(str(index), (0,) * len(shape), shape) for index, shape in enumerate(shapes)]


def shard_boxes(shapes: list[Shape], position: int, shards: int) -> list[Box]:
    """What FSDP2 leaves rank `position` of `shards`: rows, `ceil(rows / shards)` each while they last."""
    boxes = []
    for index, (rows, *rest) in enumerate(shapes):
        chunk = -(-rows // shards)
        first = min(position * chunk, rows)
        count = min(chunk, rows - first)
        boxes.append(Box(str(index), (first, *(0 for _ in rest)), (count, *rest)))
    return boxes


@dataclass(frozen=True)
class Measured:
    """One row of the table. Imbalance is how far the largest share lies above the mean, in percent."""

    model: str
    layout: str
    ranks: int
    largest_bytes: int
    imbalance_of_replicas: float
    imbalance_of_all: float
    most_boxes: int
    planning_us: float

    def row_without_time(self) -> str:
        return (
            f"| {self.model} | {self.layout} | {self.ranks:,} | {self.largest_bytes:,} | "
            f"{self.imbalance_of_replicas:.3f} | {self.imbalance_of_all:.3f} | {self.most_boxes:,} |"
        )


def measure(model: str, replicas: int, shards: int) -> Measured:
    """Plan for every rank; the time is that of one rank: its boxes, the cuts, its run."""
    shapes = MODELS[model]
    shares: list[int] = []
    most_boxes, worst = 0, 0.0
    began = time.perf_counter()
    boxes = shard_boxes(shapes, 0, shards)
    points = cut_points(boxes, replicas)
    run_between(boxes, points[0], points[1])
    planning_us = 1e6 * (time.perf_counter() - began)
    for position in range(shards):
        boxes = shard_boxes(shapes, position, shards)
        runs = [run_between(boxes, *pair) for pair in itertools.pairwise(cut_points(boxes, replicas))]
        own = [sum(box.numel for _, box in run) for run in runs]
        most_boxes = max(most_boxes, *(len(run) for run in runs))
        worst = max(worst, max(own) * replicas / sum(own) - 1)
        shares += own
    return Measured(
        model=model,
        layout="DDP" if shards == 1 else f"HSDP {replicas} x {shards}",
        ranks=replicas * shards,
        largest_bytes=4 * max(shares),
        imbalance_of_replicas=100 * worst,
        imbalance_of_all=100 * (max(shares) * len(shares) / sum(shares) - 1),
        most_boxes=most_boxes,
        planning_us=planning_us,
    )


def main() -> None:
    print("| model | layout | ranks | bytes on the fullest rank | replicas % | all % | boxes, at most | planning, us |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        measured = measure(*case)
        print(f"{measured.row_without_time()} {measured.planning_us:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
