"""The nasty model in every layout that can be launched, and ways to set and read its live values in each.

Setting and reading go through torch's own means (summon_full_params, full_tensor), not through dist_ema.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from zoo import Nasty

# Layout -> the world sizes in which it is tried.
WORLDS = {
    "plain": (1, 2, 3, 4),
    "ddp": (1, 2, 3, 4),
    "fsdp1_orig": (1, 2, 3, 4),
    "fsdp1_flat": (1, 2, 3, 4),
    "fsdp1_grad_op": (2, 3),
    "fsdp1_no_shard": (2, 3),
    "fsdp1_hybrid": (4,),
    "fsdp2": (1, 2, 3, 4),
    "fsdp2_offload": (2,),
    "hsdp": (2, 4),
    "fsdp_tp": (4,),
    "hsdp_tp": (4,),
    "tp": (1, 2, 3, 4),
    # Torch's own forward refuses these, so they are averaged and saved only.
    "tp_uneven": (2, 3),
    "fsdp_tp_uneven": (4,),
}


def bare(layout: str) -> Nasty:
    """The model before it is laid out. FSDP refuses 0-dim parameters; tensor parallelism runs even widths only."""
    even = layout in ("fsdp_tp", "hsdp_tp", "tp")
    return Nasty(scalar=layout in ("plain", "ddp"), hidden=12 if even else 7)


def runs_forward(layout: str) -> bool:
    return not layout.endswith("_uneven")


def build_layout(layout: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, frozen: bool = False) -> nn.Module:
    """The nasty model, alike on every rank before it is laid out. A frozen one needs no DDP, which refuses it."""
    torch.manual_seed(seed)
    model = bare(layout).to(dtype)
    if frozen:
        model.requires_grad_(False)
        layout = "plain" if layout == "ddp" else layout
    layout = layout.removesuffix("_uneven")
    size = dist.get_world_size()
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout.startswith("fsdp1"):
        return fsdp1(model, layout)
    if layout in ("fsdp2", "fsdp2_offload"):
        policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if layout == "fsdp2_offload" else {}
        return fsdp2(model, **policy)
    if layout == "hsdp":
        return fsdp2(model, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))
    if layout == "fsdp_tp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
        return fsdp2(tensor_parallel(model, mesh["tp"]), mesh=mesh["dp"])
    if layout == "hsdp_tp":
        # Two Replicate axes for the parameters that tensor parallelism leaves whole.
        mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "tp"))
        return fsdp2(tensor_parallel(model, mesh["tp"]), mesh=mesh["replicate", "shard"])
    if layout == "tp":
        return tensor_parallel(model, init_device_mesh("cpu", (size,), mesh_dim_names=("tp",)))
    return model


def fsdp1(model: nn.Module, layout: str) -> nn.Module:
    strategies = {
        "fsdp1_grad_op": ShardingStrategy.SHARD_GRAD_OP,
        "fsdp1_no_shard": ShardingStrategy.NO_SHARD,
        "fsdp1_hybrid": ShardingStrategy.HYBRID_SHARD,
    }
    mesh = None
    if layout == "fsdp1_hybrid":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(
            model,
            device_id=torch.device("cpu"),
            device_mesh=mesh,
            sharding_strategy=strategies.get(layout, ShardingStrategy.FULL_SHARD),
            # Flat parameters of mixed requires_grad need the original ones; the frozen layer then has its own unit.
            use_orig_params=layout != "fsdp1_flat",
            auto_wrap_policy=ModuleWrapPolicy({nn.LayerNorm}),
            ignored_modules=[model.frozen] if layout == "fsdp1_flat" else None,
            backward_prefetch=BackwardPrefetch.BACKWARD_PRE,
        )


def fsdp2(model: nn.Module, **options: object) -> nn.Module:
    fully_shard([model.hidden, model.norm], **options)
    fully_shard(model, **options)
    return model


def tensor_parallel(model: nn.Module, mesh: object) -> nn.Module:
    """Columns, rows, and every other parameter replicated, as sequence parallelism has its norms."""
    parallelize_module(model, mesh, {"hidden": ColwiseParallel(), "narrow": RowwiseParallel()})
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                replicated = nn.Parameter(distribute_tensor(parameter.data, mesh), parameter.requires_grad)
                module.register_parameter(name, replicated)
    model.head.weight = model.embed.weight
    return model


def is_fsdp1(model: nn.Module) -> bool:
    return isinstance(model, FullyShardedDataParallel)


def settle(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The live parameters, whole, by their names without wrappers; what is written to them reaches the model."""
    if is_fsdp1(model):
        with warnings.catch_warnings(), FullyShardedDataParallel.summon_full_params(model, writeback=True):
            warnings.simplefilter("ignore")
            yield {clean(name): value.data for name, value in model.named_parameters()}
        return
    settle(model)
    whole = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.data
            whole[clean(name)] = full.clone()
        yield whole
        for name, parameter in model.named_parameters():
            value = whole[clean(name)]
            if isinstance(parameter, DTensor):
                spread = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.to_local().copy_(spread.to_local())
            else:
                parameter.copy_(value)


def clean(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def set_whole(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Give the live parameters new values, the same in every layout; returns them whole, by name."""
    with whole_parameters(model) as whole:
        for name, value in whole.items():
            generator = torch.Generator().manual_seed(seed * 1000 + sum(name.encode()))
            value.copy_(torch.randn(value.shape, generator=generator))
        return {name: value.clone() for name, value in whole.items()}


def read_whole(model: nn.Module) -> dict[str, torch.Tensor]:
    with whole_parameters(model) as whole:
        return {name: value.clone() for name, value in whole.items()}
