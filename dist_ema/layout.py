"""Shards are boxes: named pieces of named tensors, and the arithmetic that gives each piece one owner.

Nothing here knows a parallelism, a process group or a file. No communication.

Ownership of tensors that several ranks hold alike is settled by laying their rows end to end and cutting
the line in runs of nearly equal numbers of elements, at row boundaries; rank i of the holders owns run i:

    elements   0                                                        total
               |---- wte (rows) ----|-- w1 --|-b1-|------ w2 ------|-b2-|
    3 ranks    [      run 0      ][       run 1       ][     run 2      ]

A *row* is a slice of length one along the first dimension longer than one, so a run is contiguous in
row-major order, and so in the final file.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dist_ema.errors import UnsupportedModelError

__all__ = [
    "Box",
    "Division",
    "Held",
    "Plan",
    "Shard",
    "TensorSpec",
    "cut_points",
    "row_dim",
    "run_between",
]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A whole named tensor of the model, the same on every rank.

    Attributes:
        fqn: its canonical name, free of wrapper prefixes.
        shape: its whole (global) shape.
        dtype: the dtype of the live tensor.
        averaged: whether the average keeps values for it; otherwise the averaged side shows the live ones.
        is_buffer: whether it is a buffer, not a parameter.
    """

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    averaged: bool
    is_buffer: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangular piece of a named tensor: `[offsets[d], offsets[d] + sizes[d])` along each dim d."""

    fqn: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    @property
    def region(self) -> tuple[slice, ...]:
        """The slices that cut this box out of the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.sizes, strict=True))


@dataclasses.dataclass(frozen=True)
class Held:
    """The piece of a named tensor that the live model of this rank holds, and how to reach it.

    Attributes:
        spec: the whole tensor.
        box: which piece of it.
        view: returns the live values of `box`, of shape `box.sizes`, sharing memory with the model. Called
            anew at each use: training wrappers may replace the memory behind it.
    """

    spec: TensorSpec
    box: Box
    view: Callable[[], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A box with one owner among the ranks: the owner alone averages it, and alone writes it.

    Attributes:
        held: the piece of the live model that the box lies in.
        box: the box, within `held.box`.
    """

    held: Held
    box: Box

    @property
    def fqn(self) -> str:
        """Canonical name of the tensor."""
        return self.box.fqn

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.held.spec.shape

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the box begins in the whole tensor, per dim."""
        return self.box.offsets

    @property
    def sizes(self) -> tuple[int, ...]:
        """Extent of the box, per dim."""
        return self.box.sizes

    def live(self) -> torch.Tensor:
        """The live values of the box, sharing memory with the model. No communication."""
        return piece_of(self.held, self.box)


def piece_of(held: Held, box: Box) -> torch.Tensor:
    """The live values of `box`, which lies within `held.box`, sharing memory with the model."""
    view = held.view()
    for dim, (inner, outer) in enumerate(zip(box.sizes, held.box.sizes, strict=True)):
        if inner != outer:
            view = view.narrow(dim, box.offsets[dim] - held.box.offsets[dim], inner)
    return view


def row_dim(sizes: Sequence[int]) -> int:
    """The dim along which a piece of these sizes is cut in rows: the first longer than one, else 0."""
    return next((dim for dim, size in enumerate(sizes) if size > 1), 0)


def _num_rows(box: Box) -> int:
    return box.sizes[row_dim(box.sizes)] if box.sizes else 1


def cut_points(boxes: Sequence[Box], parts: int) -> list[tuple[int, int]]:
    """Where the boxes, laid end to end, are cut in `parts` runs of nearly equal numbers of elements.

    Returns `parts + 1` points (index of a box, row within it), in order; run i lies between points i and
    i + 1. Each cut falls on the row boundary nearest to its exact place, so a run differs from the exact
    share by at most one row. Pure arithmetic: linear in the number of boxes and parts.
    """
    ends = list(itertools.accumulate(box.numel for box in boxes))
    total = ends[-1] if ends else 0
    points = [(0, 0)]
    for part in range(1, parts):
        target = (total * part + parts // 2) // parts
        index = bisect.bisect_right(ends, target)
        if index >= len(boxes):
            points.append((len(boxes), 0))
            continue
        box = boxes[index]
        row_numel = box.numel // _num_rows(box)
        row = (target - (ends[index] - box.numel) + row_numel // 2) // row_numel
        points.append((index, row) if row < _num_rows(box) else (index + 1, 0))
    points.append((len(boxes), 0))
    return points


def run_between(boxes: Sequence[Box], start: tuple[int, int], stop: tuple[int, int]) -> list[tuple[int, Box]]:
    """The run of rows from point `start` to point `stop` (half-open): pairs of a box's index and a piece of it.

    Empty pieces are left out.
    """
    run = []
    for index in range(start[0], min(stop[0] + 1, len(boxes))):
        box = boxes[index]
        first_row = start[1] if index == start[0] else 0
        last_row = stop[1] if index == stop[0] else _num_rows(box)
        if first_row >= last_row or box.numel == 0:
            continue
        if last_row - first_row == _num_rows(box):
            run.append((index, box))
            continue
        dim = row_dim(box.sizes)
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[dim] += first_row
        sizes[dim] = last_row - first_row
        run.append((index, Box(box.fqn, tuple(offsets), tuple(sizes))))
    return run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Division:
    """Pieces of tensors that the same ranks hold alike, divided among these ranks: one owner per element.

    Attributes:
        held: the pieces, in the order of the model; equal boxes on each of the ranks.
        ranks: the global ranks that hold them.
        position: index of this rank in `ranks`.
        groups: process groups through which a broadcast reaches all of `ranks`, for `exchange`.
        averaged: whether the average keeps values for these tensors.
        single_owner: give everything to the first rank (buffers, as DDP does), instead of dividing it.
    """

    held: tuple[Held, ...]
    ranks: tuple[int, ...]
    position: int
    groups: tuple[Any, ...] = ()
    averaged: bool = True
    single_owner: bool = False

    def runs(self) -> list[list[Shard]]:
        """The shards of each of `ranks`, in their order."""
        boxes = [held.box for held in self.held]
        everything, nothing = (0, 0), (len(boxes), 0)
        if self.single_owner:
            points = [everything] + [nothing] * len(self.ranks)
        else:
            points = cut_points(boxes, len(self.ranks))
        return [
            [Shard(self.held[index], box) for index, box in run_between(boxes, start, stop)]
            for start, stop in itertools.pairwise(points)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A model as boxes: what exists, what this rank holds of it, and what it owns.

    Attributes:
        specs: every persistent tensor of the model, tied ones once; the same on every rank.
        aliases: further names of tied tensors -> the name in `specs`.
        divisions: what this rank holds of them.
        settle: makes the live views valid (drops gathered copies that a wrapper keeps). No communication.
    """

    specs: tuple[TensorSpec, ...]
    aliases: Mapping[str, str]
    divisions: tuple[Division, ...]
    settle: Callable[[], None]

    @property
    def names(self) -> list[str]:
        """Every name of every tensor."""
        return [*(spec.fqn for spec in self.specs), *self.aliases]

    def check_not_empty(self) -> None:
        """Refuse a plan that averages nothing.

        Raises:
            UnsupportedModelError: no tensor is averaged.
        """
        if not any(spec.averaged for spec in self.specs):
            raise UnsupportedModelError(
                f"the model has no floating-point parameter to average among its {len(self.specs)} tensors, expected "
                "at least one: check the model, and include= and exclude="
            )

    def owned(self, *, averaged: bool) -> tuple[Shard, ...]:
        """The shards this rank owns: of averaged tensors, or of those that are always shown live."""
        return tuple(
            shard
            for division in self.divisions
            if division.averaged == averaged
            for shard in division.runs()[division.position]
        )
