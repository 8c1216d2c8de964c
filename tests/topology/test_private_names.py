"""What the package takes private names of torch for, tried on real models: these fail when torch changes one.

tests/test_architecture.py lists every such name, the module that may use it, and the test here (or elsewhere) that
guards it.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from layouts_zoo import build_layout
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

TOKENS = torch.arange(8).view(2, 4)


def fsdp2_names() -> None:
    model = build_layout("fsdp2")
    assert isinstance(model, FSDPModule)
    state = model._get_fsdp_state()
    # One name before torch 2.13, the other one since.
    plural = hasattr(state, "_fsdp_param_groups")
    groups = list(state._fsdp_param_groups) if plural else [state._fsdp_param_group]
    assert len(groups) == 1, "hidden and norm have a group of their own, at their own module"
    (group,) = groups
    assert group._all_gather_result is None
    arriving = model.unshard(async_op=True)
    assert group._all_gather_result is not None, "a gather under way is told"
    group.wait_for_unshard()
    assert group._all_gather_result is None, "and waited for"
    assert arriving is not None
    assert not isinstance(model.frozen.weight, DTensor)
    model.reshard()
    assert isinstance(model.frozen.weight, DTensor)
    assert group._training_state is type(group._training_state).IDLE

    def stop(*_: object) -> None:
        raise KeyError("cut off")

    handle = model.head.register_forward_pre_hook(stop)
    with pytest.raises(KeyError):
        model(TOKENS)
    handle.remove()
    assert group._training_state is not type(group._training_state).IDLE, "a forward that was cut off still runs"
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()
    else:
        group._training_state = type(group._training_state).IDLE
    model.reshard()
    assert group._training_state is type(group._training_state).IDLE
    assert isinstance(model.frozen.weight, DTensor)


def test_the_private_names_of_fsdp2_are_what_a_reshard_takes_them_for(world) -> None:
    world(2).run(fsdp2_names)


def two_layers() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def fsdp1_names() -> None:
    rank, size, device = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    inputs = torch.ones(1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = FullyShardedDataParallel(nn.Tanh(), device_id=device)
        flat_model = FullyShardedDataParallel(two_layers(), device_id=device)
        original = FullyShardedDataParallel(two_layers(), device_id=device, use_orig_params=True)
        mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("replicate", "shard"))
        hybrid = FullyShardedDataParallel(
            two_layers(), device_id=device, device_mesh=mesh, sharding_strategy=ShardingStrategy.HYBRID_SHARD
        )
    assert empty._handle is None, "a module without parameters has no handle"
    handle, flat = flat_model._handle, flat_model._handle.flat_param

    assert not hasattr(flat, "_local_shard"), "made by the first use"
    # Where each parameter lies in the flat one.
    assert list(flat._fqns) == ["0.weight", "0.bias", "1.bias"], flat._fqns
    assert all(flat._contiguities) and len(flat._contiguities) == 3
    assert [tuple(shape) for shape in flat._shapes] == [(3, 3), (3,), (3,)]
    owners = [(info.module, info.param_name) for info in flat._param_infos]
    assert owners == [(flat_model[0], "weight"), (flat_model[0], "bias"), (flat_model[1], "bias")]
    (shared,) = flat._shared_param_infos
    assert (shared.param_name, shared.prim_param_name) == ("weight", "weight")
    assert shared.module is flat_model[1] and shared.prim_module is flat_model[0]
    whole = torch.cat([parameter.reshape(-1) for parameter in whole_parameters(flat_model)])
    for index, local in enumerate(flat._shard_param_infos):
        if not local.in_shard:
            continue
        start = sum(shape.numel() for shape in flat._shapes[:index]) + local.intra_param_start_idx
        run = flat.data[local.offset_in_shard : local.offset_in_shard + local.numel_in_shard]
        assert torch.equal(run, whole[start : start + local.numel_in_shard]), (rank, index)
    assert sum(local.numel_in_shard or 0 for local in flat._shard_param_infos) > 0
    # What it says of a DTensor whose local tensor was flattened.
    assert list(flat._param_extensions) == [None, None, None]
    slices = init_device_mesh("cpu", (size, 1), mesh_dim_names=("dp", "tp"))
    of_dtensor = nn.Linear(4, 6)
    of_dtensor.weight = nn.Parameter(distribute_tensor(of_dtensor.weight.data, slices["tp"], [Shard(1)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        over_tp = FullyShardedDataParallel(of_dtensor, device_id=device, device_mesh=slices["dp"])
    placed, plain = over_tp._handle.flat_param._param_extensions
    assert (placed.mesh, placed.placements, placed.shape) == (slices["tp"], (Shard(1),), (6, 4)) and plain is None

    # What a forward without gradients leaves, and what drops it.
    assert handle.uses_sharded_strategy
    assert handle.process_group.size() == size
    assert handle._training_state.name == "IDLE"
    with torch.no_grad():
        former = flat_model(inputs)
    assert flat._local_shard.numel() * size >= whole.numel()
    with FullyShardedDataParallel.summon_full_params(flat_model):
        assert handle._training_state.name == "SUMMON_FULL_PARAMS"
    with torch.no_grad():
        flat_model(inputs)
        flat._local_shard.zero_()
        assert torch.equal(flat_model(inputs), former), "the gathered copy is what the next forward takes"
    handle.reshard(handle.uses_sharded_strategy)
    handle.post_reshard()
    handle._prefetched = False
    assert flat.data.data_ptr() == flat._local_shard.data_ptr()
    with torch.no_grad():
        assert not flat_model(inputs).any(), "what was written to the shard is seen after a reshard"
    assert not handle._use_orig_params

    # A parameter whose data was assigned is taken over.
    handle = original._handle
    assert handle._use_orig_params
    with torch.no_grad():
        original(inputs)
    handle.reshard(handle.uses_sharded_strategy)
    handle.post_reshard()
    for parameter in original.parameters():
        if parameter.numel():
            parameter.data = torch.full_like(parameter, 7.0)
    handle._writeback_orig_params()
    assert (handle.flat_param._local_shard == 7.0).sum() == sum(
        parameter.numel() for parameter in original.parameters()
    )

    # Whole shards are replicated across this group; a model that is not hybrid has none, or none that counts.
    assert dist.get_process_group_ranks(hybrid._inter_node_pg) == list(range(size))


def whole_parameters(model: nn.Module) -> list[torch.Tensor]:
    """The parameters of the layers, whole, in the order of the flat parameter."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return [tensor.detach().clone() for tensor in (model[0].weight, model[0].bias, model[1].bias)]


def test_the_private_names_of_fsdp1_are_what_a_flat_slice_takes_them_for(world) -> None:
    world(2).run(fsdp1_names)


def wrapper_names() -> None:
    assert {name for name, _ in torch.compile(nn.Linear(2, 2)).named_children()} == {"_orig_mod"}
    assert {name for name, _ in checkpoint_wrapper(nn.Linear(2, 2)).named_children()} == {"_checkpoint_wrapped_module"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
    assert {name for name, _ in model.named_children()} == {"_fsdp_wrapped_module"}
    assert {name.rpartition(".")[2] for name, _ in model.named_parameters()} == {"_flat_param"}


def test_the_child_names_that_wrappers_reserve_are_these(world) -> None:
    world(1).run(wrapper_names)


def test_the_private_names_of_modules_are_these() -> None:
    """The tables of a module are what its attributes and its state dict are made from."""
    module = nn.BatchNorm1d(2)
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    assert vars(module)["_parameters"]["weight"] is module.weight
    assert vars(module)["_buffers"]["running_mean"] is module.running_mean
    module.weight = nn.Parameter(torch.zeros(2))
    assert vars(module)["_parameters"]["weight"] is module.weight, "the table itself is kept"
    assert module._non_persistent_buffers_set == {"scratch"}
    assert vars(module)["_buffers"].keys() - module.state_dict().keys() == {"scratch"}


def test_the_private_functions_of_tensors_do_this() -> None:
    averaged, live = [torch.zeros(3), torch.ones(2)], [torch.ones(3), torch.zeros(2)]
    versions = [tensor._version for tensor in averaged]
    torch._foreach_lerp_(averaged, live, 0.25)
    assert [tensor.tolist() for tensor in averaged] == [[0.25] * 3, [0.75] * 2]
    assert all(tensor._version > version for tensor, version in zip(averaged, versions, strict=True))
    torch._foreach_copy_(averaged, live)
    assert all(map(torch.equal, averaged, live))
    half = [torch.zeros(3, dtype=torch.bfloat16)]
    torch._foreach_copy_(half, [torch.full((3,), 0.5)])
    assert half[0].tolist() == [0.5] * 3, "it converts"
