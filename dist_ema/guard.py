"""Whether live tensors still stand for the memory that an update was prepared for. No communication.

Training wrappers and users replace memory: `load_state_dict(assign=True)`, `.to()`, `parameter.data = ...`. An update
must follow, so it asks at every step; for 500 tensors that must cost less than the update itself. Where a tensor's
place in its module is known, all places are looked up by a few calls for all tensors together.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from dist_ema.layout import Held

__all__ = ["Guard"]

_shape = operator.attrgetter("shape")


class Guard:
    """Remembers where the memory of these tensors is now."""

    def __init__(self, held: Sequence[Held]) -> None:
        self._others = [each for each in held if each.place is None]
        self._views = [each.view() for each in self._others]
        places = [each.place for each in held if each.place is not None]
        self._tables = [place.table for place in places]
        self._keys = [place.key for place in places]
        self._tensors: list[torch.Tensor] = list(map(operator.getitem, self._tables, self._keys))
        self._dense = [each for each in self._tensors if each.is_contiguous()]
        self._strided = [each for each in self._tensors if not each.is_contiguous()]
        self._told = self._tell()

    def holds(self) -> bool:
        """Whether all of it is still there: as many elements, in the same order."""
        try:
            now = map(operator.getitem, self._tables, self._keys)
            alike = all(map(operator.is_, now, self._tensors))
        except KeyError:  # moved or removed: for the view to tell
            return False
        return alike and self._tell() == self._told and self._views_hold()

    def _tell(self) -> tuple[Any, ...]:
        # A dense tensor is followed element by element whatever its shape is, so that need not be asked: shapes and
        # strides are made anew at each asking. That another shape is another model is told at the next save or swap.
        return (
            list(map(torch.Tensor.data_ptr, self._tensors)),
            list(map(torch.Tensor.numel, self._dense)),
            all(map(torch.Tensor.is_contiguous, self._dense)),
            list(map(_shape, self._strided)),
            list(map(torch.Tensor.stride, self._strided)),
        )

    def _views_hold(self) -> bool:
        return all(held.view() is view for held, view in zip(self._others, self._views, strict=True))
