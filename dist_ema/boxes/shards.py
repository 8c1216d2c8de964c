"""Shards are boxes: named pieces of named tensors.

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


# The end of the names, in a state dict of torch, of what `module.get_extra_state()` returns.
EXTRA_STATE = "_extra_state"


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both tensors now show the same elements at the same address.

    Compare with a tensor that was kept, not with a kept address: other memory may have that address by now.
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
        averaged: whether the average keeps values for the tensor; else the averaged side shows the live ones.
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
        """The slices of the whole tensor that are this box."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.sizes, strict=True))


class Form(Protocol):
    """How the model's own state dict shows what a rank holds of a tensor: as it is, or as a DTensor.

    A rank holds one box, or several, which lie end to end along each dim: see `end_to_end` in boxes/local.py.
    """

    def wrap(self, values: torch.Tensor) -> torch.Tensor:
        """The entry of a state dict that shares memory with `values`, the boxes end to end. No communication."""
        ...

    def unwrap(self, fqn: str, entry: torch.Tensor) -> torch.Tensor:
        """The boxes end to end, of an entry that `wrap` could have made, sharing memory. No communication.

        Raises:
            CheckpointMismatchError: the entry is laid out otherwise.
        """
        ...


@dataclasses.dataclass(frozen=True)
class NoForm:
    """Why a tensor cannot stand in a state dict: how a sentence goes on that begins with the tensor's name."""

    reason: str


class Slot(NamedTuple):
    """Where the model keeps a tensor: `table[key]`, or the attribute `inner` of that, which wraps it then."""

    table: MutableMapping[str, Any]
    key: str
    inner: str | None = None


@dataclasses.dataclass(frozen=True)
class Held:
    """The piece of a named tensor that the live model of this rank holds, and the view of its values.

    Attributes:
        spec: the whole tensor.
        box: the piece.
        view: returns the live values of `box`, of shape `box.sizes`, sharing memory with the model. It is called anew
            at each use: training wrappers may replace the memory behind it. It may return the same tensor object again
            only while that has the same memory, dtype and strides.
        form: how a state dict shows what this rank holds of the tensor, or why it cannot.
        slot: where the model keeps the tensor that `view` shows whole, or a part of if it is wrapped; None where only
            `view` shows whether its memory was replaced. The name of a wrapper may have another tensor for a while.
        source: returns the values that are averaged, of a box within `box` that this rank owns, if these are not the
            live ones (fp32 masters). What holds for the tensors of `view` holds for these.
    """

    spec: TensorSpec
    box: Box
    view: Callable[[], torch.Tensor]
    form: Form | NoForm
    slot: Slot | None = dataclasses.field(default=None, compare=False)
    source: Callable[[Box], torch.Tensor] | None = None

    @property
    def takes_gradient(self) -> bool:
        """Whether the live tensor requires a gradient, if `view` has an answer; else True."""
        answer = getattr(self.view, "takes_gradient", None)
        return True if answer is None else bool(answer())

    def values(self) -> torch.Tensor:
        """The live values of the box, sharing memory with the model, their shape checked.

        Raises:
            ModelChangedError: the live tensor has another shape than planned.
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

        A buffer that was made anew since in another shape, or removed, is put back into its slot.
        """
        if self.spec.is_buffer and self.slot is not None and self.slot.inner is None:
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
        """The live values of the box, sharing memory with the model. No communication.

        Raises:
            ModelChangedError: the live tensor has another shape than it was planned with.
        """
        return self.within(self.held.values())

    def observed(self) -> torch.Tensor:
        """The values of the box that are averaged: the live ones, unless the tensor has a source. No communication.

        Raises:
            ModelChangedError: the live tensor, or the source, is not as planned.
        """
        return self.live() if self.held.source is None else self.held.source(self.box)

    def within(self, values: torch.Tensor) -> torch.Tensor:
        """The part of `values`, the values of the held piece, that is in the box. Shares memory."""
        for dim, start, length in self._narrowing:
            values = values.narrow(dim, start, length)
        return values

    @functools.cached_property
    def _narrowing(self) -> list[tuple[int, int, int]]:
        """(dim, start, length) of the cuts that make the box from the held piece."""
        inner, outer = self.box, self.held.box
        return [
            (dim, inner.offsets[dim] - outer.offsets[dim], inner.sizes[dim])
            for dim in range(len(inner.sizes))
            if inner.sizes[dim] != outer.sizes[dim]
        ]
