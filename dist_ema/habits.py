"""The names of other libraries that users try out of habit, and the names here. No communication."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from dist_ema.errors import ConfigError

__all__ = ["NO_FORWARD", "NO_PICKLE", "no_such_name", "refuse_registration", "twin"]

A = TypeVar("A")

# Name -> what to call instead. The names stay missing (`hasattr` is False): no library shall take an average for a
# module.
_SHOWN = "`with average_parameters():`, inside which the model itself shows the average"
_MOVED = "device= and dtype= when it is built; the averages follow no later move"
_FOR_GOOD = "copy_to_model(), or `with average_parameters():`"
_INSTEAD = {
    **dict.fromkeys(("to", "cuda", "cpu", "half", "float", "bfloat16"), _MOVED),
    **dict.fromkeys(("module", "ema_model", "averaged_model", "shadow_model", "forward", "eval", "train"), _SHOWN),
    **dict.fromkeys(("parameters", "named_parameters", "buffers", "named_buffers", "modules"), _SHOWN),
    **dict.fromkeys(("shadow", "shadow_params"), "full_state_dict(), or sharded_state_dict()"),
    **dict.fromkeys(("step", "update_parameters", "update_moving_average"), "update(), after each optimizer step"),
    **dict.fromkeys(("copy_to", "copy_params_from_ema_to_model", "update_model_with_ema"), _FOR_GOOD),
    "store": "`with average_parameters():`, which keeps the live weights aside",
    "restore": "`with average_parameters():`, which puts the live weights back at its end",
    "apply_shadow": "`with average_parameters():`",
    **dict.fromkeys(("decay", "get_decay", "cur_decay_value"), "metrics(), which has the momentum, 1 - decay"),
    **dict.fromkeys(("optimization_step", "n_averaged", "num_steps"), "num_updates"),
    "save_pretrained": "consolidate(path), which writes a folder that from_pretrained reads",
    "from_pretrained": "start_from(path), which begins the average at the weights of a model folder",
}


_NO_REGISTRATION = (
    "register_for_checkpointing was given an average, which accelerate would write on the main process only, and "
    "load on every rank: attach(accelerator, model, optimizer, schedule) makes the average and registers it, so that "
    "accelerator.save_state(dir) writes dir/ema on every rank, and load_state reads it on any number of ranks. For an "
    "average of your own loop call save(path) and load(path)"
)


NO_PICKLE = (
    "an average cannot be pickled (torch.save): each rank has a slice of it, beside the live model. Use "
    "save(path), which all ranks call and which writes safetensors; in one process torch.save takes state_dict()"
)


NO_FORWARD = (
    "an average is no module, and has no forward: call the model within `with average_parameters():`. For a second "
    "module that runs forward at every step, build the average with into= (docs/teachers.md)"
)


def no_such_name(average: object, name: str) -> AttributeError:
    """The error for an attribute that an average has not; it has the name here of what other libraries call so."""
    instead = f"; use {_INSTEAD[name]}" if name in _INSTEAD else ""
    return AttributeError(f"a {type(average).__name__} has no {name!r}{instead}", name=name, obj=average)


def refuse_registration() -> None:
    """Refuse accelerate's `register_for_checkpointing`, which looks for the names of a state dict.

    Raises:
        ConfigError: it asks the attribute that calls this. It would swallow an `AttributeError`.
    """
    asking = sys._getframe(2)
    if asking.f_code.co_name == "register_for_checkpointing" and _library(asking.f_globals) == "accelerate":
        raise ConfigError(_NO_REGISTRATION)


def _library(names: Mapping[str, Any]) -> str:
    return str(names.get("__name__")).partition(".")[0]


def twin(average: A, attributes: Mapping[str, Any], memo: dict[int, Any] | None = None) -> A:
    """A copy of an average with these attributes; with a `memo` of `copy.deepcopy`, a deep copy."""
    made = object.__new__(type(average))
    if memo is not None:
        memo[id(average)] = made
        attributes = copy.deepcopy(dict(attributes), memo)
    vars(made).update(attributes)
    return made
