"""The interface of a layout, and the records that the files of `topology` exchange. No communication.

A layout is one way in which ranks hold the tensors of a live model. It is one file in `topology`, with one class that
implements `Layout`, and one line in `planning.LAYOUTS`. The rooms above this one know boxes only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from dist_ema.boxes.shards import Box, Form, NoForm, Slot

__all__ = ["FlatPlace", "HeldBox", "Holders", "Layout", "Locator", "Named", "Part", "View", "Where"]

# The identity of a module, and the attribute of a tensor in it.
Where = tuple[int, str]
# A view returns the live values of a box, anew at every use.
View = Callable[[], torch.Tensor]


@dataclasses.dataclass
class Named:
    """A parameter or persistent buffer of the model.

    Attributes:
        fqns: all canonical names, in the order of the model; several if the tensor is tied.
        shape: the whole shape.
        source: the tensor itself, or the object that `Layout.find` gave for it.
        is_buffer: whether it is a buffer.
        owner: the first module that has the tensor.
        attribute: the name of the tensor in that module.
        is_extra_state: whether `get_extra_state()` of that module returned it.
        part: what `experts=` declares of it; None for all other tensors.
    """

    fqns: list[str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Any
    is_buffer: bool
    owner: nn.Module
    attribute: str
    is_extra_state: bool = False
    part: Part | None = None

    @property
    def keys(self) -> list[str]:
        """Its names in the state dict of this rank's model."""
        return self.fqns if self.part is None else self.part.keys


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor of this rank that the user declares to be a part of what several ranks hold together.

    Attributes:
        keys: its names in the state dict of this rank's model.
        offsets: where it begins in the whole tensor, per dim.
        form: how a state dict shows it.
        group: the process group whose ranks hold the other parts; None for all ranks.
    """

    keys: list[str]
    offsets: tuple[int, ...]
    form: Form
    group: Any


@dataclasses.dataclass(frozen=True)
class FlatPlace:
    """Where a tensor lies in a flat buffer that is cut in equal runs, of which rank i of the holders has run i.

    Attributes:
        buffer: the identity of the buffer.
        start: the index of the first element of the tensor.
        run_numel: the number of elements of a run.
    """

    buffer: int
    start: int
    run_numel: int


@dataclasses.dataclass(frozen=True)
class Holders:
    """The ranks that hold boxes alike, this rank's index among them, and how owners reach the others.

    Attributes:
        ranks: the global ranks, in the order of ownership.
        position: the index of this rank in `ranks`.
        groups: the process groups through which a broadcast reaches all of `ranks`, one per mesh axis; None is the
            default group.
        flat: what decides who owns which elements; None to divide the tensor evenly.
        nearby: process groups of this rank that training has made, for holders that no layout names.
    """

    ranks: tuple[int, ...]
    position: int
    groups: Sequence[Any] = ()
    flat: FlatPlace | None = None
    nearby: Sequence[Any] = ()


@dataclasses.dataclass(frozen=True)
class HeldBox:
    """A box that this rank holds, and the ways to its values: see `Held` in boxes/shards.py."""

    box: Box
    view: View
    form: Form | NoForm
    slot: Slot | None = None
    source: Callable[[Box], torch.Tensor] | None = None


# A locator: a tensor -> the boxes of it that this rank holds, and the ranks that hold them alike.
Locator = Callable[[Named], tuple[Sequence[HeldBox], Holders]]


class Layout(Protocol):
    """One way in which ranks hold the tensors of a live model. No method of the four communicates."""

    def find(self, model: nn.Module) -> Mapping[Where, Any]:
        """The tensors that the modules do not show as they are: module and attribute -> `Named.source`.

        A source has the whole `shape` and the `dtype` of its tensor, and says whether it `requires_grad` if the
        parameter in the module cannot. The same source under two attributes is a tied tensor. None hides a tensor that
        stores others. A model with any such tensor is not asked for its `state_dict()`, which would gather them.

        Raises:
            UnsupportedModelError: a tensor cannot be served exactly.
        """
        return {}

    def claims(self, named: Named) -> bool:
        """Whether the tensor is laid out in this way. The first layout in the list that claims a tensor has it."""
        ...

    def locator(self, model: nn.Module, rank: int, world_size: int) -> Locator:
        """Read the model once, and return the locator of the tensors that this layout claims.

        Raises:
            UnsupportedModelError: ranks hold copies that the layout does not show; the locator may raise it as well.
        """
        ...

    def drop_gathered(self, model: nn.Module, views: Sequence[View] = ()) -> None:
        """Make the views show the values that the optimizer steps; called before every use of the views.

        Args:
            model: the wrapped model.
            views: the views of all planned tensors, of other layouts too; empty while a model is planned.

        Raises:
            ModelChangedError: these values cannot be reached now.
        """
        return
