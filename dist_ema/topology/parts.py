"""A model in several parts, such as the stages of a pipeline that one rank has, as one module. No communication."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dist_ema.errors import UnsupportedModelError

__all__ = ["Parts", "whole_model"]

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
    if not isinstance(model, list | tuple):
        return _module(model, "model")
    if not model:
        raise UnsupportedModelError("model is an empty list, expected the modules that this rank has of the model")
    return Parts([_module(part, f"model[{number}]") for number, part in enumerate(model)])


def _module(part: object, name: str) -> nn.Module:
    module = part if isinstance(part, nn.Module) else getattr(part, _OF_A_STAGE, None)
    if not isinstance(module, nn.Module):
        raise UnsupportedModelError(
            f"{name} is {type(part).__name__}, expected a torch.nn.Module, or a list of its parts"
        )
    return module
