"""Whether live tensors still stand for the memory that an update was prepared for. No communication.

Training wrappers and users replace memory: `load_state_dict(assign=True)`, `.to()`, `parameter.data = ...`. An update
must follow, so it asks at every step; for 500 tensors that must cost less than the update itself. Where a tensor's
place in its module is known, all places are looked up by a few calls for all tensors together.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from dist_ema.boxes.shards import Held, same_memory

__all__ = ["Guard"]

# Kinds of devices for which torch has `Tensor.is_set_to` itself.
_COMPARED_BY_TORCH = ("cpu", "cuda", "mps")


class Guard:
    """Remembers where the memory of these tensors is now."""

    def __init__(self, held: Sequence[Held]) -> None:
        self._others = [each for each in held if each.place is None]
        self._views = [each.view() for each in self._others]
        places = [each.place for each in held if each.place is not None]
        self._tables = [place.table for place in places]
        self._keys = [place.key for place in places]
        self._tensors: list[torch.Tensor] = list(map(operator.getitem, self._tables, self._keys))
        # Not addresses: memory that was freed since may have been taken again at the same one.
        self._kept = [each.detach() for each in self._tensors]
        by_torch = all(each.device.type in _COMPARED_BY_TORCH for each in self._tensors)
        self._compare = torch.Tensor.is_set_to if by_torch else same_memory

    def holds(self) -> bool:
        """Whether all of it is still there, in the same shape and strides."""
        try:
            now = map(operator.getitem, self._tables, self._keys)
            alike = all(map(operator.is_, now, self._tensors))
        except KeyError:  # moved or removed: for the view to tell
            return False
        return alike and all(map(self._compare, self._tensors, self._kept)) and self._views_hold()

    def _views_hold(self) -> bool:
        return all(held.view() is view for held, view in zip(self._others, self._views, strict=True))
