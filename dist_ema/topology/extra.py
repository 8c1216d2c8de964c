"""Extra state, which `module.get_extra_state()` returns, and `state_dict()` has as `..._extra_state`. No communication.

A file has it under that key, if it is a tensor, with the values of rank 0 when the file is written. It is never
averaged, and a swap leaves it alone. A safetensors file cannot have an extra state of another type.
"""

from __future__ import annotations

import torch
from torch import nn

from dist_ema.boxes.shards import EXTRA_STATE, Box
from dist_ema.errors import ModelChangedError, UnsupportedModelError
from dist_ema.options import Options
from dist_ema.topology.names import canonical_prefix
from dist_ema.topology.plain import PlainForm, holders_of_plain
from dist_ema.topology.seam.layout import HeldBox, Layout, Locator, Named
from dist_ema.topology.seam.loaded import is_dtensor
from dist_ema.topology.values import foreign_kind

__all__ = ["ExtraStates", "extra_states", "whole_state"]


def extra_states(model: nn.Module, options: Options) -> tuple[list[Named], list[str]]:
    """The extra state of every module that has one, and the names of those that the user leaves out of the files.

    Raises:
        UnsupportedModelError: an extra state is no plain tensor, and files are to have it.
    """
    states: dict[int, Named] = {}
    left_out = []
    for raw_name, module in model.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is nn.Module.get_extra_state:
            continue
        fqn = canonical_prefix(model, raw_name) + EXTRA_STATE
        if options.excludes([fqn]):
            left_out.append(fqn)
            continue
        if id(module) in states:
            states[id(module)].fqns.append(fqn)
            continue
        state = module.get_extra_state()
        if not _is_plain(state):
            if options.averaged_only:
                left_out.append(fqn)
                continue
            raise UnsupportedModelError(
                f"{fqn}, the extra state of a {type(module).__name__}, is a {type(state).__name__}, expected a plain "
                "tensor: a safetensors file cannot hold it, and a model loaded from the files would lack it. Leave it "
                f"out of them by choice with exclude={f'*{EXTRA_STATE}'!r} and keep it yourself, or have "
                "get_extra_state() return a tensor"
            )
        states[id(module)] = Named(
            [fqn], tuple(state.shape), state.dtype, state, True, module, EXTRA_STATE, is_extra_state=True
        )
    return list(states.values()), left_out


class ExtraStates(Layout):
    """Extra state: every rank has a whole tensor of its own, which the module returns anew at every use."""

    def claims(self, named: Named) -> bool:
        """Whether the tensor is the extra state of a module."""
        return named.is_extra_state

    def locator(self, model: nn.Module, rank: int, world_size: int) -> Locator:
        """The locator gives a whole tensor as one box."""
        holders_of = holders_of_plain(model, rank, world_size)
        return lambda named: ([whole_state(named)], holders_of(named))


def whole_state(named: Named) -> HeldBox:
    """What the module returns, as one box."""
    return HeldBox(Box(named.fqns[0], (0,) * len(named.shape), named.shape), _ExtraValues(named), PlainForm())


def _is_plain(state: object) -> bool:
    if not isinstance(state, torch.Tensor) or is_dtensor(state):
        return False
    return foreign_kind(state) is None and state.layout is torch.strided and not state.is_meta


class _ExtraValues:
    """The extra state that the module returns now."""

    def __init__(self, named: Named) -> None:
        self._module, self._fqn, self._shape = named.owner, named.fqns[0], named.shape

    def __call__(self) -> torch.Tensor:
        state = self._module.get_extra_state()
        if not _is_plain(state) or tuple(state.shape) != self._shape:
            present = list(state.shape) if isinstance(state, torch.Tensor) else type(state).__name__
            raise ModelChangedError(
                f"{self._fqn} is {present} now, a plain tensor of {list(self._shape)} when the average was built: "
                f"build a new ShardedEMA, or leave it out of the files with exclude={f'*{EXTRA_STATE}'!r}"
            )
        values: torch.Tensor = state.detach()
        return values
