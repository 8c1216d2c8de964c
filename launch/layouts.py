"""How the live model lies over the processes: one entry of ``LAYOUTS`` for each choice of ``--sharding``.

A layout makes the accelerator, and afterwards checks what ``prepare`` made of the model: accelerate falls
back to another layout without an error in several cases, and a run that shards nothing looks healthy.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin
from cpu_fsdp import force_fsdp
from torch import nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Layout:
    """``open`` makes the accelerator, ``check`` looks at the prepared model and raises if it is another."""

    open: Callable[[str | None, int], Accelerator]
    check: Callable[[Accelerator, nn.Module], None]


def common_options(mixed_precision: str | None, accumulation: int) -> dict[str, Any]:
    on_cpu = not torch.cuda.is_available()
    if on_cpu and mixed_precision == "fp16":
        raise ValueError("fp16 needs a GPU: accelerate ignores it on CPU. Use bf16 or no")
    return {
        # Without cpu=True accelerate takes every process of a CPU run for the only one.
        "cpu": on_cpu,
        "mixed_precision": mixed_precision,
        "gradient_accumulation_steps": accumulation,
        # A batch of the loader is cut over the processes, so the world size does not change it.
        "dataloader_config": DataLoaderConfiguration(split_batches=True),
    }


def open_ddp(mixed_precision: str | None, accumulation: int) -> Accelerator:
    return Accelerator(**common_options(mixed_precision, accumulation))


def check_ddp(accelerator: Accelerator, model: nn.Module) -> None:
    """With one process there is nothing to wrap; with more the model must be in DDP."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    is_wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    if accelerator.num_processes != launched or is_wrapped != (launched > 1):
        raise RuntimeError(
            f"asked for ddp on {launched} processes, but accelerate made {accelerator.distributed_type} on "
            f"{accelerator.num_processes}: does the accelerate config ask for another --sharding?"
        )


def open_fsdp2(mixed_precision: str | None, accumulation: int) -> Accelerator:
    pretend_launched()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        state_dict_type="SHARDED_STATE_DICT",
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(fsdp_plugin=plugin, **common_options(mixed_precision, accumulation))
    if accelerator.device.type == "cpu":
        force_fsdp(accelerator, plugin)
    return accelerator


def check_fsdp2(accelerator: Accelerator, model: nn.Module) -> None:
    if accelerator.distributed_type != DistributedType.FSDP or not accelerator.is_fsdp2:
        raise RuntimeError(f"asked for fsdp2, but accelerate made {accelerator.distributed_type}")
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if whole:
        raise RuntimeError(f"asked for fsdp2, but these parameters are not sharded: {whole}")


def pretend_launched() -> None:
    """Set torchrun's variables for a script started by plain ``python``: FSDP needs a group even of one."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


LAYOUTS = {"ddp": Layout(open_ddp, check_ddp), "fsdp2": Layout(open_fsdp2, check_fsdp2)}


def default_layout() -> str:
    """What an accelerate config file asks for; ``ddp`` where there is none."""
    return "fsdp2" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else "ddp"
