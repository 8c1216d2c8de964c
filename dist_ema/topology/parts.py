"""A model in several parts, such as the stages of a pipeline that one rank has, as one module. No communication."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dist_ema.errors import UnsupportedModelError

__all__ = ["Parts", "module_of", "parts_of", "whole_model"]

# A stage of torch.distributed.pipelining is no module, and has its module under this name.
_OF_A_STAGE = "submod"


class Parts(nn.Module):
    """Modules that have their names in one model: no name gets a prefix of its part.

    Args:
        parts: the modules, in the order of the model.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        for number, part in enumerate(parts):
            self.add_module(f"part_{number}", part)


def whole_model(model: object) -> nn.Module:
    """What a user gives as the model, as one module: a module, a stage of a pipeline, or a list of these.

    Raises:
        UnsupportedModelError: it is something else, or an empty list.
    """
    parts = parts_of(model)
    modules = [module for module in map(module_of, parts) if module is not None]
    for number, part in enumerate(parts):
        if module_of(part) is None:
            name = f"model[{number}]" if isinstance(model, list | tuple) else "model"
            raise UnsupportedModelError(
                f"{name} is {type(part).__name__}, expected a torch.nn.Module, or a list of its parts"
            )
    if not modules:
        raise UnsupportedModelError("model is an empty list, expected the modules that this rank has of the model")
    return Parts(modules) if isinstance(model, list | tuple) else modules[0]


def parts_of(model: object) -> list[object]:
    """What a user gives as the model, as a list; a model in one part is a list of itself."""
    return list(model) if isinstance(model, list | tuple) else [model]


def module_of(part: object) -> nn.Module | None:
    """The module itself, or that of a stage; None for anything else."""
    module = part if isinstance(part, nn.Module) else getattr(part, _OF_A_STAGE, None)
    return module if isinstance(module, nn.Module) else None
