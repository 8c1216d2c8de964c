"""Tensor parallelism of the byte-level model: the feed-forward layers are cut, everything else is replicated."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.integrations import tensor_parallel


def cut_feed_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Turn every parameter into a DTensor on ``mesh``, before the optimizer is made and ``prepare`` shards them."""
    plan = {"feed_in": ColwiseParallel(), "feed_out": RowwiseParallel()}
    for block in model.get_submodule("blocks").children():
        parallelize_module(block, mesh, plan)
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and not isinstance(own[0], DTensor):
            distribute_module(module, mesh, input_fn=_replicated, output_fn=_local)
    # accelerate 1.15 looks up a class that transformers 5 has no more, for parameters that are no DTensors: none here.
    if not hasattr(tensor_parallel, "ReplicateParallel"):
        vars(tensor_parallel)["ReplicateParallel"] = None


def _replicated(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
    return tuple(DTensor.from_local(value, mesh, [Replicate()], run_check=False) for value in inputs)


def _local(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
    return output.to_local()
