"""What a layout is, and the records that the files of this room exchange. No communication.

A layout is one way in which ranks hold the tensors of a live model. It is one file in this room, with one class that
implements `Layout`, and one line in `planning.LAYOUTS`. Above this room there are only boxes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from dist_ema.boxes.shards import Box, Form, NoForm, Slot

__all__ = ["HeldBox", "Holders", "Layout", "Locator", "Named", "View", "Where"]

# The identity of a module, and the name of a tensor in it.
Where = tuple[int, str]
# Returns the live values of a box, anew at each use.
View = Callable[[], torch.Tensor]


@dataclasses.dataclass
class Named:
    """A parameter or persistent buffer of the model.

    Attributes:
        fqns: all its canonical names; several if it is tied, the first met first.
        shape: its whole shape.
        source: the tensor itself, or what the layout that found it gave for it.
        is_buffer: whether it is a buffer.
        owner: the module in which it was met first.
        attribute: its name there.
        is_extra_state: whether it is what `get_extra_state()` of that module returned.
    """

    fqns: list[str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Any
    is_buffer: bool
    owner: nn.Module
    attribute: str
    is_extra_state: bool = False


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
class HeldBox:
    """A box that this rank holds, the way to its live values, its form and its slot: see `Held` in boxes/shards.py."""

    box: Box
    view: View
    form: Form | NoForm
    slot: Slot | None = None


# What `Layout.locator` gives: a tensor -> the boxes of it that this rank holds, and the ranks that hold boxes alike.
Locator = Callable[[Named], tuple[Sequence[HeldBox], Holders]]


class Layout(Protocol):
    """One way in which ranks hold the tensors of a live model. Four methods, none of which communicates."""

    def find(self, model: nn.Module) -> Mapping[Where, Any]:
        """The tensors that the modules do not show as they are: where each is looked for -> its `Named.source`.

        A source has the whole `shape` and the `dtype` of its tensor; the same source in two places is a tied tensor.
        None hides a tensor that is a store of others. A model that has any of them is not asked for its `state_dict()`,
        which would gather them.

        Raises:
            UnsupportedModelError: one cannot be served exactly.
        """
        return {}

    def claims(self, named: Named) -> bool:
        """Whether that tensor lies in this way. Of several layouts the first in the list has it."""
        ...

    def locator(self, model: nn.Module, rank: int, world_size: int) -> Locator:
        """Looks at the model once, and returns what locates each tensor that this layout claims.

        Raises:
            UnsupportedModelError: of this or of the locator: ranks hold copies that the layout does not tell of.
        """
        ...

    def drop_gathered(self, model: nn.Module, views: Sequence[View] = ()) -> None:
        """Have the live values be those that the optimizer steps: called before each use of them.

        Args:
            model: the wrapped model.
            views: of all planned tensors, those of other layouts too; none while a model is planned.

        Raises:
            ModelChangedError: they cannot be reached now.
        """
        return
