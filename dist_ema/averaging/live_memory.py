"""Whether live tensors still stand for the memory that an update was prepared for. No communication.

Training wrappers and users replace memory: `load_state_dict(assign=True)`, `.to()`, `parameter.data = ...`. An update
must follow, so it compares at every step; for 500 tensors that must cost less than the update itself. Where the module
that keeps a tensor is known, a few calls look all these tensors up together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch

from dist_ema.boxes.shards import Held, same_memory

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
        self._others = [*(piece.view for piece in held if piece.slot is None), *others]
        self._views = [view() for view in self._others]
        slots = [piece.slot for piece in held if piece.slot is not None]
        self._tables = [slot.table for slot in slots]
        self._keys = [slot.key for slot in slots]
        self._tensors: list[torch.Tensor] = list(map(operator.getitem, self._tables, self._keys))
        # Addresses would not do: memory that was freed since may be in use again at the same address.
        self._kept = [tensor.detach() for tensor in self._tensors]
        by_torch = all(tensor.device.type in _COMPARED_BY_TORCH for tensor in self._tensors)
        self._compare = torch.Tensor.is_set_to if by_torch else same_memory

    def is_current(self) -> bool:
        """Whether all tensors still have that memory, in the same shape and strides."""
        try:
            now = map(operator.getitem, self._tables, self._keys)
            alike = all(map(operator.is_, now, self._tensors))
        except KeyError:  # the tensor was moved or removed: the view raises, or returns it
            return False
        return alike and all(map(self._compare, self._tensors, self._kept)) and self._are_views_kept()

    def _are_views_kept(self) -> bool:
        return all(view() is kept for view, kept in zip(self._others, self._views, strict=True))
