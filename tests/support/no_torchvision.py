"""timm without torchvision, which does not import beside a CPU build of torch: names that nothing here calls."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

from torch import nn

NAMES = ["", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".models"]


class _Kind(type):
    """A class, or an enumeration whose members are their names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Nothing(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kind(name, (nn.Module,), {"__module__": self.__name__})


def import_timm() -> types.ModuleType:
    """timm, of which models and averages work; it must not be imported before."""
    stubs = {f"torchvision{name}": _Nothing(f"torchvision{name}") for name in NAMES}
    for name, stub in stubs.items():
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        stub.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stubs[parent], child, stub)
    sys.modules.update(stubs)
    try:
        import timm
        import timm.utils
    finally:
        for name in stubs:
            del sys.modules[name]
    return timm
