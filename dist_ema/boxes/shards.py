"""Shards are boxes, which are rectangular pieces of named tensors.

This module knows no parallelism, no process group and no file. No communication.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple, Protocol

import torch

from dist_ema.errors import ModelChangedError

__all__ = [
    "EXTRA_STATE",
    "Box",
    "Form",
    "Held",
    "NoForm",
    "Shard",
    "Slot",
    "TensorSpec",
    "same_memory",
]


# The end of the name of an extra state in a state dict of torch: `module.get_extra_state()` returns it.
EXTRA_STATE = "_extra_state"


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both tensors show the same elements at the same address now.

    Compare with a tensor that was kept, not with an address that was kept: that may belong to other memory by now.
    """
    if one.data_ptr() != other.data_ptr() or one.dtype != other.dtype:
        return False
    return (one.shape, one.stride()) == (other.shape, other.stride())


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A whole named tensor of the model, the same on every rank.

    Attributes:
        fqn: the canonical name, free of wrapper prefixes.
        shape: the whole (global) shape.
        dtype: the dtype of the live tensor.
        averaged: whether the average keeps values for it; otherwise the averaged side shows the live values.
        is_buffer: whether it is a buffer, not a parameter.
    """

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    averaged: bool
    is_buffer: bool

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangular piece of a named tensor: `[offsets[d], offsets[d] + sizes[d])` along each dim d."""

    fqn: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.sizes)

    @property
    def region(self) -> tuple[slice, ...]:
        """The slices that cut this box out of the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.sizes, strict=True))


class Form(Protocol):
    """The form of a held piece in the model's own state dict: a plain tensor, or a DTensor."""

    def wrap(self, values: torch.Tensor) -> torch.Tensor:
        """The entry of a state dict that shares memory with `values`, of the box's sizes. No communication."""
        ...

    def unwrap(self, fqn: str, entry: torch.Tensor) -> torch.Tensor:
        """The values of the box in an entry that `wrap` could have made, sharing memory. No communication.

        Raises:
            CheckpointMismatchError: the entry is laid out otherwise.
        """
        ...


@dataclasses.dataclass(frozen=True)
class NoForm:
    """The form of a held piece that a state dict cannot show; `reason` continues a sentence after the tensor's name."""

    reason: str


class Slot(NamedTuple):
    """The slot in which the model keeps a tensor: `table[key]`."""

    table: MutableMapping[str, Any]
    key: str


@dataclasses.dataclass(frozen=True)
class Held:
    """The piece of a named tensor that the live model of this rank holds, and the way to its values.

    Attributes:
        spec: the whole tensor.
        box: the box of the piece.
        view: returns the live values of `box`, of shape `box.sizes`, sharing memory with the model. It is called anew
            at every use, because training wrappers may replace the memory. It may return the same tensor object again
            only while that still has the same memory, dtype and strides.
        form: the form of the piece in a state dict, or the reason why it has none.
        slot: the slot of the tensor that `view` shows whole; None where only `view` knows if its memory was replaced.
    """

    spec: TensorSpec
    box: Box
    view: Callable[[], torch.Tensor]
    form: Form | NoForm
    slot: Slot | None = dataclasses.field(default=None, compare=False)

    @property
    def takes_gradient(self) -> bool:
        """Whether the live tensor requires a gradient; true where `view` has no `takes_gradient`."""
        takes_gradient = getattr(self.view, "takes_gradient", None)
        return True if takes_gradient is None else bool(takes_gradient())

    def values(self) -> torch.Tensor:
        """The live values of the box, sharing memory with the model; their shape is checked.

        Raises:
            ModelChangedError: the live tensor has another shape than it was planned with.
        """
        view = self.view()
        if view.shape != self.box.sizes:
            raise ModelChangedError(
                f"{self.spec.fqn} now has {list(view.shape)} on this rank, {list(self.box.sizes)} when the average was "
                "built: build a new ShardedEMA after changing a model"
            )
        return view

    def restore(self, values: torch.Tensor) -> None:
        """Give the live tensor these values again, which are a copy of what `view` showed.

        A buffer that has another shape or dtype by now, or is gone, is put back into its slot.
        """
        if self.spec.is_buffer and self.slot is not None:
            current = self.slot.table.get(self.slot.key)
            if not isinstance(current, torch.Tensor) or (current.shape, current.dtype) != (values.shape, values.dtype):
                self.slot.table[self.slot.key] = values
                return
        self.view().copy_(values)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A box with one owner among the ranks: the owner alone averages it, and alone writes it.

    Attributes:
        held: the piece of the live model that the box lies in.
        box: the box, within `held.box`.
    """

    held: Held
    box: Box

    def __repr__(self) -> str:
        return f"Shard(fqn={self.fqn!r}, offsets={self.offsets}, sizes={self.sizes}, global_shape={self.global_shape})"

    @property
    def fqn(self) -> str:
        """The canonical name of the tensor."""
        return self.box.fqn

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self.held.spec.shape

    @property
    def offsets(self) -> tuple[int, ...]:
        """The first index of the box in the whole tensor, per dim."""
        return self.box.offsets

    @property
    def sizes(self) -> tuple[int, ...]:
        """The extent of the box, per dim."""
        return self.box.sizes

    def live(self) -> torch.Tensor:
        """The live values of the box, sharing memory with the model. No communication.

        Raises:
            ModelChangedError: the live tensor has another shape than it was planned with.
        """
        return self.within(self.held.values())

    def within(self, values: torch.Tensor) -> torch.Tensor:
        """The values of the box, cut out of `values`, which are those of the held piece. They share memory."""
        for dim, start, length in self._narrowing:
            values = values.narrow(dim, start, length)
        return values

    @functools.cached_property
    def _narrowing(self) -> list[tuple[int, int, int]]:
        """The cuts (dim, start, length) that lead from the held piece to the box."""
        inner, outer = self.box, self.held.box
        return [
            (dim, inner.offsets[dim] - outer.offsets[dim], inner.sizes[dim])
            for dim in range(len(inner.sizes))
            if inner.sizes[dim] != outer.sizes[dim]
        ]
