"""Boxes that overlap or leave holes are seen, also where their elements add up."""

from __future__ import annotations

import random

import pytest
import torch

from dist_ema import UnsupportedModelError
from dist_ema.boxes.coverage import Coverage
from dist_ema.boxes.shards import Box, TensorSpec


def spec(*shape: int, fqn: str = "w") -> TensorSpec:
    return TensorSpec(fqn, shape, torch.float32, True, False)


def check(specs: list[TensorSpec], by_rank: list[list[Box]], seed: int = 7) -> None:
    coverage = Coverage(specs, seed)
    names = [spec.fqn for spec in specs]
    told = [coverage.contribution(boxes, names) for boxes in by_rank]
    by_class = [coverage.by_class(boxes) for boxes in by_rank]
    seen = coverage.not_covered([sum(each) for each in zip(*by_class, strict=True)])
    try:
        coverage.check([sum(each) for each in zip(*told, strict=True)], names)
    except UnsupportedModelError as error:
        assert str(error).split()[0] in seen  # its class shows it too
        raise
    assert seen == []


def cut(box: Box, draw: random.Random, depth: int) -> list[Box]:
    """A random partition into boxes."""
    dims = [dim for dim, size in enumerate(box.sizes) if size > 1]
    if not depth or not dims:
        return [box]
    dim = draw.choice(dims)
    at = draw.randint(1, box.sizes[dim] - 1)
    first, second = list(box.sizes), list(box.sizes)
    first[dim], second[dim] = at, box.sizes[dim] - at
    offsets = list(box.offsets)
    offsets[dim] += at
    halves = Box(box.fqn, box.offsets, tuple(first)), Box(box.fqn, tuple(offsets), tuple(second))
    return [piece for half in halves for piece in cut(half, draw, depth - 1)]


WRONG = {
    "rows twice, others never": [[Box("w", (0, 0), (2, 3))], [Box("w", (0, 0), (2, 3))]],
    "shifted by a row": [[Box("w", (0, 0), (2, 3))], [Box("w", (1, 0), (2, 3))]],
    "rows and columns mixed up": [[Box("w", (0, 0), (4, 1)), Box("w", (0, 0), (1, 2))], [Box("w", (2, 0), (2, 3))]],
    "one element for another": [
        [Box("w", (0, 0), (3, 3)), Box("w", (3, 0), (1, 1)), Box("w", (3, 1), (1, 1))],
        [Box("w", (3, 1), (1, 1))],
    ],
    "three overlap in a ring": [
        [Box("w", (0, 0), (2, 2))],
        [Box("w", (1, 1), (2, 2))],
        [Box("w", (2, 0), (2, 2))],
    ],
}


@pytest.mark.parametrize("boxes", WRONG.values(), ids=WRONG)
def test_boxes_of_the_right_count_that_overlap_and_leave_holes_are_refused(boxes) -> None:
    assert sum(box.numel for of_rank in boxes for box in of_rank) == 12
    with pytest.raises(UnsupportedModelError, match=r"w has 12 elements, of which the ranks own some twice"):
        check([spec(5, fqn="v"), spec(4, 3)], [[Box("v", (0,), (5,))], *boxes])


def test_elements_that_are_missing_or_too_many_are_counted() -> None:
    for boxes in ([Box("w", (0,), (3,))], [Box("w", (0,), (4,)), Box("w", (1,), (1,))]):
        with pytest.raises(UnsupportedModelError, match=r"has 4 elements, but the ranks own [35] of them"):
            check([spec(4)], [boxes])


def test_every_partition_is_accepted_and_every_moved_box_refused() -> None:
    draw = random.Random(0)
    for seed in range(400):
        shape = tuple(draw.randint(1, 9) for _ in range(draw.randint(1, 4)))
        pieces = cut(Box("w", (0,) * len(shape), shape), draw, 3)
        draw.shuffle(pieces)
        check([spec(*shape)], [pieces[::2], pieces[1::2]], seed)
        moved = draw.randrange(len(pieces))
        dim = draw.randrange(len(shape))
        offsets = list(pieces[moved].offsets)
        offsets[dim] += draw.choice([-1, 1])
        wrong = [*pieces[:moved], Box("w", tuple(offsets), pieces[moved].sizes), *pieces[moved + 1 :]]
        if min(offsets) >= 0:
            with pytest.raises(UnsupportedModelError):
                check([spec(*shape)], [wrong], seed)


def test_scalars_and_empty_tensors_are_covered_once() -> None:
    specs = [spec(fqn="scalar"), spec(0, 4, fqn="empty")]
    scalar = Box("scalar", (), ())
    check(specs, [[scalar], [Box("empty", (0, 0), (0, 4))]])
    check(specs, [[scalar], []])
    with pytest.raises(UnsupportedModelError, match="scalar has 1 elements, but the ranks own 2"):
        check(specs, [[scalar], [scalar]])


def test_a_tensor_that_is_covered_twice_is_seen_among_those_of_its_class_and_however_many_classes_there_are() -> None:
    specs = [spec(4, fqn=f"norm{number}") for number in range(3)]
    specs += [spec(2, number, fqn=f"wide{number}") for number in range(1, 200)]
    coverage = Coverage(specs, 1)
    boxes = [Box(each.fqn, (0,) * len(each.shape), each.shape) for each in specs]
    assert coverage.not_covered(coverage.by_class(boxes)) == []
    assert coverage.not_covered(coverage.by_class([*boxes, boxes[1]]))[:3] == ["norm0", "norm1", "norm2"]
    assert len(coverage.by_class(boxes)) == 64
    assert "wide199" in coverage.not_covered(coverage.by_class(boxes[:-1]))
