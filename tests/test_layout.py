from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from dist_ema.layout import Box, cut_points, run_between


def whole(*shape: int, fqn: str = "w") -> Box:
    return Box(fqn, (0,) * len(shape), shape)


def runs(boxes: list[Box], parts: int) -> list[list[Box]]:
    points = cut_points(boxes, parts)
    return [[box for _, box in run_between(boxes, *pair)] for pair in itertools.pairwise(points)]


def test_one_part_gets_everything() -> None:
    boxes = [whole(3, 4, fqn="a"), whole(fqn="b"), whole(5, fqn="c")]
    assert runs(boxes, 1) == [boxes]


def test_cuts_fall_on_rows() -> None:
    #  rows of 4:  0 1 2 3 4   two ranks: 10 elements each, nearest row boundary is 3 (12) or 2 (8)
    (first, second) = runs([whole(5, 4)], 2)
    assert [box.sizes for box in first + second] in ([(3, 4), (2, 4)], [(2, 4), (3, 4)])


def test_a_single_row_is_cut_along_the_next_dim() -> None:
    first, second = runs([whole(1, 6)], 2)
    assert first == [Box("w", (0, 0), (1, 3))] and second == [Box("w", (0, 3), (1, 3))]


def test_more_ranks_than_rows_leaves_some_without() -> None:
    parts = runs([whole(2, 3)], 4)
    assert sum(len(part) for part in parts) == 2
    assert any(not part for part in parts)


def test_no_boxes_and_empty_boxes() -> None:
    assert runs([], 3) == [[], [], []]
    assert runs([whole(0, 4), whole(2, fqn="v")], 2) == [[Box("v", (0,), (1,))], [Box("v", (1,), (1,))]]


@pytest.mark.parametrize("seed", range(30))
def test_every_element_has_one_owner_and_shares_are_even(seed: int) -> None:
    draw = random.Random(seed)
    shapes = [
        tuple(draw.randint(0 if draw.random() < 0.1 else 1, 9) for _ in range(draw.randint(0, 3))) for _ in range(9)
    ]
    boxes = [whole(*shape, fqn=str(index)) for index, shape in enumerate(shapes)]
    parts = draw.randint(1, 12)
    counts = {box.fqn: torch.zeros(box.sizes) for box in boxes}
    divided = runs(boxes, parts)
    for part in divided:
        for box in part:
            counts[box.fqn][box.region] += 1
    assert all((count == 1).all() for count in counts.values())
    largest_row = max((math.prod(shape) // max(next((s for s in shape if s > 1), 1), 1) for shape in shapes), default=0)
    exact = sum(box.numel for box in boxes) / parts
    assert all(abs(sum(box.numel for box in part) - exact) <= largest_row + 1 for part in divided)


def test_runs_follow_the_order_of_the_boxes() -> None:
    boxes = [whole(7, 3, fqn="a"), whole(5, fqn="b"), whole(2, 8, fqn="c")]
    flat = [box for part in runs(boxes, 3) for box in part]
    assert [box.fqn for box in flat] == sorted(box.fqn for box in flat)
    a_rows = [box.offsets[0] for box in flat if box.fqn == "a"]
    assert a_rows == sorted(a_rows)
