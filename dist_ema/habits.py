"""The names of other libraries that users try out of habit, and the names here. No communication."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

__all__ = ["NO_PICKLE", "no_such_name", "twin"]

A = TypeVar("A")

# Name -> what to call instead. The names stay missing (`hasattr` is False): no library shall take an average for a
# module.
_INSTEAD = {
    "state_dict": "save(path) for a checkpoint; full_state_dict() for whole tensors on rank 0, sharded_state_dict() "
    "for torch.distributed.checkpoint",
    "load_state_dict": "load(path); load_sharded_state_dict(...) for what torch.distributed.checkpoint has loaded, "
    "start_from(path) for the weights of another tool",
    "to": "device= and dtype= when it is built; the averages follow no later move",
    "module": "`with average_parameters():`, inside which the model itself shows the average",
    "ema_model": "`with average_parameters():`, inside which the model itself shows the average",
    "step": "update(), after each optimizer step",
    "store": "`with average_parameters():`, which keeps the live weights aside",
    "copy_to": "copy_to_model(), or `with average_parameters():`",
    "restore": "`with average_parameters():`, which puts the live weights back at its end",
    "apply_shadow": "`with average_parameters():`",
}


NO_PICKLE = (
    "an average cannot be pickled (torch.save): each rank has a slice of it, beside the live model. Use "
    "save(path), which all ranks call and which writes safetensors, or full_state_dict() for a small model"
)


def no_such_name(average: object, name: str) -> AttributeError:
    """The error for an attribute that an average has not; it has the name here of what other libraries call so."""
    instead = f"; use {_INSTEAD[name]}" if name in _INSTEAD else ""
    return AttributeError(f"a {type(average).__name__} has no {name!r}{instead}", name=name, obj=average)


def twin(average: A, attributes: Mapping[str, Any], memo: dict[int, Any] | None = None) -> A:
    """A copy of an average with these attributes; with a `memo` of `copy.deepcopy`, a deep copy."""
    made = object.__new__(type(average))
    if memo is not None:
        memo[id(average)] = made
        attributes = copy.deepcopy(dict(attributes), memo)
    vars(made).update(attributes)
    return made
