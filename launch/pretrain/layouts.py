"""How the live model lies over the processes: one entry of ``LAYOUTS`` for each choice of ``--sharding``.

A layout makes the accelerator, and afterwards checks what ``prepare`` made of the model: accelerate falls
back to another layout without an error in several cases, and a run that shards nothing looks healthy.
"""

from __future__ import annotations

import math
import os
import socket
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin
from accelerate.parallelism_config import ParallelismConfig
from cpu_fsdp import force_fsdp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Layout:
    """What differs between the choices of ``--sharding``.

    ``open`` makes the accelerator, ``check`` looks at the prepared model and raises if it is another, and
    ``before_load`` is called before a checkpoint is loaded into freshly prepared model and optimizer.
    """

    open: Callable[[Namespace], Accelerator]
    check: Callable[[Accelerator, nn.Module, Namespace], None]
    before_load: Callable[[nn.Module, torch.optim.Optimizer], None] = lambda model, optimizer: None


def num_launched() -> int:
    """How many processes the launcher has started, by its own account."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def common_options(options: Namespace) -> dict[str, Any]:
    on_cpu = not torch.cuda.is_available()
    if on_cpu and options.mixed_precision == "fp16":
        raise ValueError("fp16 needs a GPU: accelerate ignores it on CPU. Use bf16 or no")
    return {
        # Without cpu=True accelerate takes every process of a CPU run for the only one.
        "cpu": on_cpu,
        "mixed_precision": options.mixed_precision,
        "gradient_accumulation_steps": options.accumulation,
        # A batch of the loader is cut over the processes, so the world size does not change it.
        "dataloader_config": DataLoaderConfiguration(split_batches=True),
    }


def open_ddp(options: Namespace) -> Accelerator:
    return Accelerator(**common_options(options))


def check_ddp(accelerator: Accelerator, model: nn.Module, options: Namespace) -> None:
    """With several processes the model must be in DDP; one process may do without."""
    launched = num_launched()
    is_wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    is_alone = launched == 1 and accelerator.distributed_type == DistributedType.NO
    if accelerator.num_processes != launched or not (is_wrapped or is_alone):
        raise RuntimeError(
            f"asked for ddp on {launched} processes, but accelerate made {accelerator.distributed_type} on "
            f"{accelerator.num_processes}: does the accelerate config ask for another --sharding?"
        )


def open_fsdp1(options: Namespace) -> Accelerator:
    # Under an accelerate config its fsdp_sharding_strategy goes before reshard_after_forward.
    return open_fsdp(options, fsdp_version=1, reshard_after_forward="FULL_SHARD", use_orig_params=True)


def check_fsdp1(accelerator: Accelerator, model: nn.Module, options: Namespace) -> None:
    """Every block and the rest in an FSDP1 unit of its own, each sharded; one process has nothing to shard."""
    units = FullyShardedDataParallel.fsdp_modules(model)
    if not isinstance(model, FullyShardedDataParallel) or len(units) != 1 + options.depth:
        raise RuntimeError(
            f"asked for fsdp1, but accelerate made {accelerator.distributed_type}: the model is a "
            f"{type(model).__name__} with {len(units)} FSDP1 units, expected {1 + options.depth}"
        )
    # torch falls back to NO_SHARD in one process.
    whole = [unit for unit in units if unit.sharding_strategy == ShardingStrategy.NO_SHARD]
    if whole and num_launched() > 1:
        raise RuntimeError(f"asked for fsdp1, but {len(whole)} of {len(units)} units have strategy NO_SHARD")


def create_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Collective: give a fresh optimizer a state for accelerate to load into, by torch's step with lr 0.

    Under FSDP1 accelerate 1.15 loads no more of the optimizer's state than there already is: into a fresh
    optimizer nothing, without an error. Under FSDP2 it calls this function itself.
    """
    get_optimizer_state_dict(model, optimizer)


def open_fsdp2(options: Namespace) -> Accelerator:
    return open_fsdp(options, fsdp_version=2, reshard_after_forward=True)


def check_fsdp2(accelerator: Accelerator, model: nn.Module, options: Namespace) -> None:
    check_dtensors(accelerator, model, "fsdp2", replicas=1)


def open_hsdp(options: Namespace) -> Accelerator:
    """FSDP2 on a mesh of replicas times shards."""
    launched, replicas = num_launched(), options.replicas
    if replicas < 2 or launched % replicas or launched == replicas:
        raise ValueError(
            f"--sharding hsdp --replicas {replicas} cannot divide {launched} processes: expected at least 2 replicas "
            "of at least 2 shards each, so 4 processes or more. Replicas of one shard are --sharding ddp, and one "
            "replica is --sharding fsdp2; all of them read each other's averages"
        )
    mesh = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=launched // replicas)
    return open_fsdp(options, mesh, fsdp_version=2, reshard_after_forward=True)


def check_hsdp(accelerator: Accelerator, model: nn.Module, options: Namespace) -> None:
    check_dtensors(accelerator, model, "hsdp", replicas=options.replicas)


def check_dtensors(accelerator: Accelerator, model: nn.Module, asked: str, *, replicas: int) -> None:
    """Every parameter is a DTensor over all processes, of which ``replicas`` hold each piece."""
    if accelerator.distributed_type != DistributedType.FSDP or not accelerator.is_fsdp2:
        raise RuntimeError(f"asked for {asked}, but accelerate made {accelerator.distributed_type}")
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise RuntimeError(f"asked for {asked}, but {name} is not sharded")
        mesh, placements = parameter.device_mesh, parameter.placements
        alike = math.prod(mesh.size(axis) for axis, placement in enumerate(placements) if placement.is_replicate())
        if mesh.size() != num_launched() or alike != replicas:
            raise RuntimeError(
                f"asked for {asked} with {replicas} replicas over {num_launched()} processes, but {name} has "
                f"{placements} on {mesh}: does the accelerate config ask for another --sharding?"
            )


def open_fsdp(options: Namespace, mesh: ParallelismConfig | None = None, **of_version: Any) -> Accelerator:
    """Every ``Block`` a unit of its own, and every rank saving its own shards."""
    pretend_launched()
    plugin = FullyShardedDataParallelPlugin(
        state_dict_type="SHARDED_STATE_DICT",
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
        **of_version,
    )
    common = common_options(options)
    if not common["cpu"]:
        return Accelerator(fsdp_plugin=plugin, parallelism_config=mesh, **common)
    # accelerate refuses a mesh on CPU: it is forced too.
    os.environ.pop("ACCELERATE_USE_PARALLELISM_CONFIG", None)
    accelerator = Accelerator(fsdp_plugin=plugin, **common)
    force_fsdp(accelerator, plugin, mesh)
    return accelerator


def pretend_launched() -> None:
    """Set torchrun's variables for a script started by plain ``python``: FSDP needs a group even of one."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


LAYOUTS = {
    "ddp": Layout(open_ddp, check_ddp),
    "fsdp1": Layout(open_fsdp1, check_fsdp1, create_optimizer_state),
    "fsdp2": Layout(open_fsdp2, check_fsdp2),
    "hsdp": Layout(open_hsdp, check_hsdp),
}


def default_layout() -> str:
    """What an accelerate config file asks for; ``ddp`` where there is none."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return "ddp"
    if os.environ.get("FSDP_VERSION", "1") == "1":
        return "fsdp1"
    return "hsdp" if configured_replicas() > 1 else "fsdp2"


def default_replicas() -> int:
    """What an accelerate config file asks for, else 2."""
    return max(2, configured_replicas())


def configured_replicas() -> int:
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() != "true":
        return 1
    return int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1"))
