"""The types of torch's sharded tensors and modules, where they are looked for without importing them. No communication.

There is no DTensor, and no module under FSDP, in a process that has not imported torch's module of them. Importing it
takes seconds, and loads the compiler. So every check looks in `sys.modules`, each time anew: a model may be wrapped, or
a DTensor met, long after this package was imported. What makes a DTensor or a placement imports the module.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor, Placement, Shard
    from typing_extensions import TypeIs

__all__ = ["dtensor_from_local", "is_class_of_fsdp2", "is_dtensor", "is_fsdp1", "is_fsdp2", "shard"]

_TENSOR = "torch.distributed.tensor"
_FSDP = "torch.distributed.fsdp"


class _NotLoaded:
    """Stands for a class of a module that is not loaded: nothing is an instance of it."""


def _class_in(module: str, name: str) -> type[Any]:
    return getattr(sys.modules.get(module), name, _NotLoaded)


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """Whether a value is a DTensor."""
    return isinstance(value, _class_in(_TENSOR, "DTensor"))


def is_fsdp1(module: object) -> TypeIs[FullyShardedDataParallel]:
    """Whether a module is a wrapper of FSDP1."""
    return isinstance(module, _class_in(_FSDP, "FullyShardedDataParallel"))


def is_fsdp2(module: object) -> TypeIs[FSDPModule]:
    """Whether `fully_shard` was called on a module."""
    return isinstance(module, _class_in(_FSDP, "FSDPModule"))


def is_class_of_fsdp2(kind: type) -> bool:
    """Whether a class is FSDP2's own, or one that `fully_shard` has put in the place of a module's class."""
    return issubclass(kind, _class_in(_FSDP, "FSDPModule"))


def shard(dim: int) -> Shard:
    """The placement `Shard(dim)`."""
    tensors: Any = importlib.import_module(_TENSOR)
    made: Shard = tensors.Shard(dim)
    return made


def dtensor_from_local(
    values: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int], stride: Sequence[int]
) -> torch.Tensor:
    """The DTensor of which this rank holds `values`.

    Args:
        values: the local tensor.
        mesh: the mesh that it lies on.
        placements: one placement for each axis of the mesh.
        shape: the shape of the whole tensor. Without it torch would invent local x world, wrong on uneven shards.
        stride: the stride of the whole tensor, for the same reason.
    """
    tensors: Any = importlib.import_module(_TENSOR)
    made: torch.Tensor = tensors.DTensor.from_local(
        values, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )
    return made
