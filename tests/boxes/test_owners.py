from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest
import scaling
import torch

from dist_ema.boxes.owners import boxes_of_run, cut_points, run_between
from dist_ema.boxes.shards import Box


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


def test_a_row_that_outweighs_its_share_is_cut_within() -> None:
    first, second = runs([whole(1, 640)], 2)
    assert first == [Box("w", (0, 0), (1, 320))] and second == [Box("w", (0, 320), (1, 320))]


def test_a_cut_within_a_row_leaves_a_partial_row_and_whole_rows() -> None:
    #  3 rows of 128, two ranks of 192: one row and a half each
    first, second = runs([whole(3, 128)], 2)
    assert first == [Box("w", (0, 0), (1, 128)), Box("w", (1, 0), (1, 64))]
    assert second == [Box("w", (1, 64), (1, 64)), Box("w", (2, 0), (1, 128))]


def test_more_ranks_than_rows_leaves_some_without() -> None:
    parts = runs([whole(2, 3)], 4)
    assert sum(len(part) for part in parts) == 2
    assert any(not part for part in parts)


def test_no_boxes_and_empty_boxes() -> None:
    assert runs([], 3) == [[], [], []]
    assert runs([whole(0, 4), whole(128, fqn="v")], 2) == [[Box("v", (0,), (64,))], [Box("v", (64,), (64,))]]


@pytest.mark.parametrize("seed", range(30))
def test_every_element_has_one_owner_and_shares_are_even(seed: int) -> None:
    draw = random.Random(seed)
    shapes = [
        tuple(draw.randint(0 if draw.random() < 0.1 else 1, 19) for _ in range(draw.randint(0, 3))) for _ in range(9)
    ]
    boxes = [whole(*shape, fqn=str(index)) for index, shape in enumerate(shapes)]
    parts = draw.randint(1, 12)
    counts = {box.fqn: torch.zeros(box.sizes) for box in boxes}
    divided = runs(boxes, parts)
    for part in divided:
        for box in part:
            counts[box.fqn][box.region] += 1
    assert all((count == 1).all() for count in counts.values())
    exact = sum(box.numel for box in boxes) / parts
    assert all(abs(sum(box.numel for box in part) - exact) <= 65 for part in divided)


def test_runs_follow_the_order_of_the_boxes() -> None:
    boxes = [whole(7, 3, fqn="a"), whole(5, fqn="b"), whole(2, 8, fqn="c")]
    flat = [box for part in runs(boxes, 3) for box in part]
    assert [box.fqn for box in flat] == sorted(box.fqn for box in flat)
    a_rows = [box.offsets[0] for box in flat if box.fqn == "a"]
    assert a_rows == sorted(a_rows)


@pytest.mark.parametrize("seed", range(20))
def test_a_run_of_elements_is_a_few_boxes_in_order(seed: int) -> None:
    draw = random.Random(seed)
    shape = tuple(draw.randint(1, 6) for _ in range(draw.randint(0, 4)))
    offsets = tuple(draw.randint(0, 3) for _ in shape)
    box = Box("w", offsets, shape)
    start = draw.randint(0, box.numel)
    numel = draw.randint(0, box.numel - start)
    elements = torch.arange(box.numel).view(shape)
    met = []
    pieces = list(boxes_of_run(box, start, numel))
    for skipped, piece in pieces:
        assert skipped == len(met)
        region = tuple(
            slice(at - base, at - base + size)
            for at, base, size in zip(piece.offsets, offsets, piece.sizes, strict=True)
        )
        met += elements[region].flatten().tolist()
    assert met == list(range(start, start + numel))
    assert len(pieces) <= max(1, 2 * len(shape) - 1)


def test_405_billion_parameters_are_divided_among_16384_ranks_evenly_and_quickly() -> None:
    began = time.process_time()
    boxes = scaling.whole_boxes(scaling.MODELS["Llama 3.1 405B"])
    points = cut_points(boxes, 16_384)
    run_between(boxes, points[9_999], points[10_000])
    assert time.process_time() - began < 2, "what one rank computes, ten times over the usual"
    shares = [sum(box.numel for _, box in run_between(boxes, *pair)) for pair in itertools.pairwise(points)]
    exact = sum(box.numel for box in boxes) / 16_384
    assert sum(shares) == 405_853_388_800
    assert max(shares) / exact - 1 < 0.001 and 1 - min(shares) / exact < 0.001


@pytest.mark.parametrize("position", [0, 1000, 1023, 1024, 2047])
def test_hsdp_shards_of_405_billion_parameters_are_divided_among_8_replicas_evenly(position) -> None:
    boxes = scaling.shard_boxes(scaling.MODELS["Llama 3.1 405B"], position, 2048)
    shares = [sum(box.numel for box in part) for part in runs(boxes, 8)]
    exact = sum(box.numel for box in boxes) / 8
    assert sum(shares) == sum(box.numel for box in boxes)
    assert max(shares) / exact - 1 < 0.001 and 1 - min(shares) / exact < 0.001


def test_the_scaling_page_has_what_its_command_prints() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    for case in scaling.CASES[:3]:
        measured = scaling.measure(*case)
        assert measured.row_without_time() in page
