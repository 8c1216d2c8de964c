"""The records that the files of this package exchange."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dist_ema.boxes.shards import Box, Form, Place

__all__ = ["Holders", "Named", "Piece"]


@dataclasses.dataclass
class Named:
    """A parameter or persistent buffer of the model.

    Attributes:
        fqns: all its canonical names; several if it is tied, the first met first.
        shape: its whole shape.
        source: the tensor itself (plain or DTensor), or the slice of a flat parameter that it lies in.
        is_buffer: whether it is a buffer.
        owner: the module in which it was met first.
        attribute: its name there.
    """

    fqns: list[str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Any
    is_buffer: bool
    owner: nn.Module
    attribute: str


@dataclasses.dataclass(frozen=True)
class Holders:
    """The ranks that hold boxes alike, this rank's index among them, and how owners reach the others.

    Attributes:
        ranks: global ranks, in the order of ownership.
        position: index of this rank in `ranks`.
        groups: process groups through which a broadcast reaches all of `ranks`, one per mesh axis; None is the
            default group.
    """

    ranks: tuple[int, ...]
    position: int
    groups: Sequence[Any] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """A box that this rank holds, the way to its live values, its form and its place: see `Held` in boxes/shards.py."""

    box: Box
    view: Callable[[], torch.Tensor]
    form: Form | None = None
    place: Place | None = None
