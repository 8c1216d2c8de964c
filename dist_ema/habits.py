"""What people reach for out of habit, and where to find it here. No communication."""

from __future__ import annotations

import copy
from typing import Any, NoReturn, SupportsIndex

from dist_ema.errors import ConfigError

__all__ = ["Habits"]

# Name -> what to call instead. They stay missing (`hasattr` is False): no library shall take an average for a module.
_INSTEAD = {
    "state_dict": "save(path) for a checkpoint; full_state_dict() for whole tensors on rank 0, sharded_state_dict() "
    "for torch.distributed.checkpoint",
    "load_state_dict": "load(path); load_sharded_state_dict(...) for what torch.distributed.checkpoint has loaded, "
    "start_from(path) for somebody else's weights",
    "to": "device= and dtype= when it is built; the averages follow no later move",
    "module": "`with average_parameters():`, inside which the model itself shows the average",
    "ema_model": "`with average_parameters():`, inside which the model itself shows the average",
    "step": "update(), after each optimizer step",
    "store": "`with average_parameters():`, which keeps the live weights aside",
    "copy_to": "copy_to_model(), or `with average_parameters():`",
    "restore": "`with average_parameters():`, which puts the live weights back at its end",
    "apply_shadow": "`with average_parameters():`",
}


class Habits:
    """The answers of an average to calls that other libraries have."""

    def __getattr__(self, name: str) -> NoReturn:
        told = f"; use {_INSTEAD[name]}" if name in _INSTEAD else ""
        raise AttributeError(f"a {type(self).__name__} has no {name!r}{told}", name=name, obj=self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Habits:
        """A copy in this process, which averages by itself."""
        twin = self._bare()
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(self._copied(), memo))
        return twin

    def __copy__(self) -> Habits:
        twin = self._bare()
        vars(twin).update(self._copied())
        return twin

    def _bare(self) -> Habits:
        return object.__new__(type(self))

    def _copied(self) -> dict[str, Any]:
        """What a copy has of this one."""
        return dict(vars(self))

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse a pickle, which would hold one rank's slice and the model.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "an average cannot be pickled (torch.save): each rank has a slice of it, beside the live model. Use "
            "save(path), which all ranks call and which writes safetensors, or full_state_dict() for a small model"
        )
