"""Whether live tensors still stand for the memory that an update was prepared for. No communication.

Training wrappers and users replace memory: `load_state_dict(assign=True)`, `.to()`, `parameter.data = ...`. An update
must follow, so it compares at every step; for 500 tensors that must cost less than the update itself. Where the module
that keeps a tensor is known, a few calls look all these tensors up together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dist_ema.boxes.shards import Held, Slot, same_memory

__all__ = ["Guard"]

# The kinds of devices for which torch has `Tensor.is_set_to`.
_COMPARED_BY_TORCH = ("cpu", "cuda", "mps")


class Guard:
    """The memory of some tensors, as it was when the guard was made.

    Args:
        held: pieces of live tensors.
        others: further views, which return the same object while its memory is the same.
    """

    def __init__(self, held: Sequence[Held], others: Sequence[Callable[[], torch.Tensor]] = ()) -> None:
        slotted = [(piece.slot, piece.view) for piece in held if piece.slot is not None]
        self._plain = _Entries([slot for slot, _ in slotted if slot.inner is None])
        views = [*(piece.view for piece in held if piece.slot is None), *others]
        self._others = _Views(views) if views else None
        self._slots = [slot for slot, _ in slotted if slot.inner is not None]
        self._shown = _Views([view for slot, view in slotted if slot.inner is not None])
        self._wrapped = _wrapped(self._slots, self._shown)

    def is_current(self) -> bool:
        """Whether all tensors still have that memory, in the same shape and strides."""
        if not self._plain.are_kept() or (self._others is not None and not self._others.are_kept()):
            return False
        if not self._slots or (self._wrapped is not None and self._wrapped.are_kept()):
            return True
        # FSDP lets a name have a gathered copy for a while, and a wrapper may be made anew around the same memory.
        if not self._shown.are_kept():
            return False
        self._wrapped = _wrapped(self._slots, self._shown)
        return True


class _Views:
    """Views, and what they returned: they return the same object while its memory is the same."""

    def __init__(self, views: Sequence[Callable[[], torch.Tensor]]) -> None:
        self._views = views
        self.kept = [view() for view in views]

    def are_kept(self) -> bool:
        """Whether they would return the same again."""
        return not self._views or all(view() is kept for view, kept in zip(self._views, self.kept, strict=True))


class _Entries:
    """What the tables of modules have, and the memory of these tensors, or of those that they wrap.

    Raises:
        KeyError: a table has no such entry.
        AttributeError: an entry wraps nothing.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._tables = [slot.table for slot in slots]
        self._keys = [slot.key for slot in slots]
        self._entries: list[Any] = list(map(operator.getitem, self._tables, self._keys))
        self._names = [slot.inner for slot in slots if slot.inner is not None]
        self.tensors: list[torch.Tensor] = list(map(getattr, self._entries, self._names)) or self._entries
        # Addresses would not do: memory that was freed since may be in use again at the same address.
        self._kept = [tensor.detach() for tensor in self.tensors]
        by_torch = all(tensor.device.type in _COMPARED_BY_TORCH for tensor in self.tensors)
        self._compare = torch.Tensor.is_set_to if by_torch else same_memory

    def are_kept(self) -> bool:
        """Whether the tables have the same entries, and these the same memory."""
        try:
            now = map(operator.getitem, self._tables, self._keys)
            alike = all(map(operator.is_, now, self._entries))
            if alike and self._names:
                inner = map(getattr, self._entries, self._names)
                alike = all(map(operator.is_, inner, self.tensors))
        except (KeyError, AttributeError):  # the tensor was moved or removed: the view raises, or returns it
            return False
        return alike and all(map(self._compare, self.tensors, self._kept))


def _wrapped(slots: Sequence[Slot], shown: _Views) -> _Entries | None:
    """The entries with the tensors that the views show; None if a name has another tensor now, of other memory."""
    try:
        entries = _Entries(slots)
    except (KeyError, AttributeError):
        return None
    same = all(map(_share_storage, entries.tensors, shown.kept))
    return entries if same else None


def _share_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
