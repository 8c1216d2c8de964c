"""The nasty model in every layout that can be launched, and ways to set and read its live values in each.

Setting and reading go through torch's own means (summon_full_params, full_tensor), not through dist_ema. Where these
are wrong or hang (several strided shards, ranks outside a mesh), a twin whose elements are their own indices shows what
each rank holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
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
    # A slice of a mesh: the ranks along its other axis hold the same, which the slice does not show.
    "ddp_sliced": (4,),
    "fsdp1_sliced": (4,),
    "fsdp1_tp": (4,),
    "fsdp2_sliced": (4,),
    "fsdp_tp_sliced": (4,),
    "fsdp_tp_sliced_uneven": (4,),
    "replicate": (2, 4),
    "replicate_sliced": (4,),
    "experts": (4,),
    # Several boxes of a tensor on a rank.
    "packed": (2, 3, 4),
    "packed_twice": (4,),
    "fsdp_packed": (4,),
    # Rank 0 holds nothing of some tensors.
    "offset": (3, 4),
}

# Torch's own forward refuses these too.
_WITHOUT_FORWARD = ("experts", "packed", "packed_twice", "fsdp_packed", "offset")


def bare(layout: str) -> Nasty:
    """The model before it is laid out. FSDP refuses 0-dim parameters; tensor parallelism runs even widths only."""
    even = layout in ("fsdp_tp", "hsdp_tp", "tp", "fsdp1_tp", "fsdp_tp_sliced")
    return Nasty(scalar=layout in ("plain", "ddp"), hidden=12 if even else 7)


def runs_forward(layout: str) -> bool:
    return not layout.endswith("_uneven") and layout not in _WITHOUT_FORWARD


def build_layout(layout: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, frozen: bool = False) -> nn.Module:
    """The nasty model, alike on every rank before it is laid out. A frozen one needs no DDP, which refuses it."""
    torch.manual_seed(seed)
    model = bare(layout).to(dtype)
    if frozen:
        model.requires_grad_(False)
        layout = "plain" if layout.startswith("ddp") else layout
    laid_out = lay_out(model, layout.removesuffix("_uneven"))
    if frozen:
        laid_out.requires_grad_(False)  # FSDP1 has local tensors of DTensors require a gradient
    if layout in _WITHOUT_FORWARD:
        laid_out.indices_held = indices_held(layout)
    return laid_out


def indices_held(layout: str) -> dict[str, torch.Tensor]:
    """The flat indices of the elements that this rank holds of each parameter, by name."""
    twin = bare(layout)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.arange(float(parameter.numel())).view(parameter.shape))
    return {clean(name): local(value).long() for name, value in lay_out(twin, layout).named_parameters()}


def local(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


def lay_out(model: Nasty, layout: str) -> nn.Module:
    size = dist.get_world_size()
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "ddp_sliced":
        return DistributedDataParallel(model, process_group=square_mesh()["dp"].get_group())
    if layout == "fsdp1_tp":
        mesh = square_mesh()
        return fsdp1(parallelize_module(model, mesh["tp"], _PARALLEL), layout, device_mesh=mesh["dp"])
    if layout == "fsdp1_sliced":
        return fsdp1(model, layout, process_group=square_mesh()["dp"].get_group())
    if layout.startswith("fsdp1"):
        return fsdp1(model, layout)
    if layout in ("fsdp2", "fsdp2_offload"):
        policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if layout == "fsdp2_offload" else {}
        return fsdp2(model, **policy)
    if layout == "fsdp2_sliced":
        return fsdp2(model, mesh=square_mesh()["dp"])
    if layout == "hsdp":
        return fsdp2(model, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))
    if layout == "fsdp_tp":
        mesh = square_mesh()
        return fsdp2(tensor_parallel(model, mesh["tp"]), mesh=mesh["dp"])
    if layout == "fsdp_tp_sliced":
        # As transformers does: what tensor parallelism leaves whole is on the slice of FSDP alone.
        mesh = square_mesh()
        return fsdp2(parallelize_module(model, mesh["tp"], _PARALLEL), mesh=mesh["dp"])
    if layout == "hsdp_tp":
        # Two Replicate axes for the parameters that tensor parallelism leaves whole.
        mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "tp"))
        return fsdp2(tensor_parallel(model, mesh["tp"]), mesh=mesh["replicate", "shard"])
    if layout == "tp":
        return tensor_parallel(model, init_device_mesh("cpu", (size,), mesh_dim_names=("tp",)))
    if layout == "replicate":
        return replicate(model, mesh=init_device_mesh("cpu", (size,), mesh_dim_names=("replicate",)))
    if layout == "replicate_sliced":
        return replicate(model, mesh=square_mesh()["dp"])
    if layout == "experts":
        # The experts on a slice, sharded further by FSDP along the other axis; all else on a mesh of one axis.
        mesh = square_mesh(("efsdp", "ep"))
        placed(model, mesh["ep"], {"hidden.weight": [Shard(0)], "hidden.bias": [Shard(0)], "narrow.weight": [Shard(1)]})
        fully_shard([model.hidden, model.narrow], mesh=mesh["efsdp"])
        return fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    if layout == "packed":
        return placed(model, init_device_mesh("cpu", (size,)), {name: [axis] for name, axis in _PACKED.items()})
    if layout == "packed_twice":
        both = {name: [_StridedShard(0, split_factor=2), axis] for name, axis in _PACKED.items()}
        return placed(model, square_mesh(), both | {"norm.weight": [Replicate(), _StridedShard(0, split_factor=2)]})
    if layout == "fsdp_packed":
        mesh = square_mesh()
        placed(model, mesh["tp"], {name: [axis] for name, axis in _PACKED.items()})
        return fsdp2(model, mesh=mesh["dp"])
    if layout == "offset":
        mesh = DeviceMesh("cpu", list(range(1, size)))
        return placed(
            model, mesh, {"hidden.weight": [Shard(0)], "norm.weight": [Replicate()], "embed.weight": [Shard(1)]}
        )
    return model


_PARALLEL = {"hidden": ColwiseParallel(), "narrow": RowwiseParallel()}
# What transformers' packed_colwise makes of fused weights.
_PACKED = {
    "embed.weight": _StridedShard(1, split_factor=2),
    "hidden.weight": _StridedShard(0, split_factor=2),
    "hidden.bias": _StridedShard(0, split_factor=2),
    "narrow.weight": _StridedShard(1, split_factor=3),
}


def square_mesh(names: tuple[str, str] = ("dp", "tp")) -> DeviceMesh:
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=names)


def placed(model: Nasty, mesh: DeviceMesh, placements: dict[str, list[Placement]]) -> Nasty:
    """The parameters of these names as DTensors; the others stay plain."""
    for name, places in placements.items():
        module, _, attribute = name.rpartition(".")
        owner = model.get_submodule(module)
        parameter = getattr(owner, attribute)
        spread = distribute_tensor(parameter.data, mesh, places, src_data_rank=None)
        setattr(owner, attribute, nn.Parameter(spread, parameter.requires_grad))
    model.head.weight = model.embed.weight
    return model


def fsdp1(model: nn.Module, layout: str, **where: object) -> nn.Module:
    strategies = {
        "fsdp1_grad_op": ShardingStrategy.SHARD_GRAD_OP,
        "fsdp1_no_shard": ShardingStrategy.NO_SHARD,
        "fsdp1_hybrid": ShardingStrategy.HYBRID_SHARD,
    }
    if layout == "fsdp1_hybrid":
        where = {"device_mesh": square_mesh(("replicate", "shard"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(
            model,
            device_id=torch.device("cpu"),
            **where,
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
    parallelize_module(model, mesh, _PARALLEL)
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
            yield from copied_there_and_back(model)
        return
    settle(model)
    yield from copied_there_and_back(model)


@torch.no_grad()
def copied_there_and_back(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    named = {clean(name): value for name, value in model.named_parameters()}
    if hasattr(model, "indices_held"):
        whole = joined(model)
    else:
        whole = {
            name: (value.full_tensor() if isinstance(value, DTensor) else value.data).clone()
            for name, value in named.items()
        }
    yield whole
    for name, parameter in named.items():
        if hasattr(model, "indices_held"):
            local(parameter).copy_(whole[name].flatten()[model.indices_held[name]])
        elif isinstance(parameter, DTensor):
            spread = distribute_tensor(whole[name], parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(spread.to_local())
        else:
            parameter.data.copy_(whole[name])


def joined(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters put together from what all ranks hold."""
    own = {name: (model.indices_held[name], local(value)) for name, value in model.named_parameters()}
    of_all: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_all, own)
    whole = {}
    for name, parameter in model.named_parameters():
        whole[name] = torch.full(parameter.shape, torch.nan, dtype=parameter.dtype)
        for of_rank in of_all:
            indices, values = of_rank[name]
            whole[name].view(-1)[indices] = values
    return whole


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
