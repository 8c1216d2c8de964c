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
from pathlib import Path
from typing import Any

import torch
from accelerate import (
    Accelerator,
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from accelerate.parallelism_config import ParallelismConfig
from byte_lm import next_byte_loss
from cpu_deepspeed import deepspeed_on_cpu
from cpu_fsdp import force_fsdp
from pipelined import FOLDER, Pipelined, prepare_pipeline
from tensor_parallel import cut_feed_layers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor

MAX_GRADIENT_NORM = 1.0


def backward_by_accelerate(accelerator: Accelerator, model: nn.Module, windows: Tensor) -> Tensor:
    loss = next_byte_loss(model, windows)
    accelerator.backward(loss)
    return loss.detach()


def clip_by_accelerate(accelerator: Accelerator, model: nn.Module) -> None:
    accelerator.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)


@dataclass(frozen=True)
class Layout:
    """What differs between the choices of ``--sharding``.

    Attributes:
        open: makes the accelerator.
        check: looks at the prepared model, and raises if it is another.
        files: the name of the files that accelerate writes. Layouts of one name load one another's checkpoints.
        before_load: called before a checkpoint is loaded into freshly prepared model and optimizer.
        cut: what accelerate does not do to a model itself, before the optimizer is made.
        prepare: as ``accelerator.prepare``, of model, optimizer, loader and scheduler.
        parts: what the average is given.
        backward: the mean loss of a batch, its gradients added.
        clip: clips the gradients by their norm.
        num_alike: how many processes train on the same batches.
    """

    open: Callable[[Namespace], Accelerator]
    check: Callable[[Accelerator, nn.Module, Namespace], None]
    files: str
    before_load: Callable[[nn.Module, torch.optim.Optimizer], None] = lambda model, optimizer: None
    cut: Callable[[nn.Module, Accelerator, Namespace], nn.Module] = lambda model, accelerator, options: model
    prepare: Callable[..., tuple[Any, ...]] = lambda accelerator, *prepared: accelerator.prepare(*prepared)
    parts: Callable[[nn.Module], Any] = lambda model: model
    backward: Callable[[Accelerator, nn.Module, Tensor], Tensor] = backward_by_accelerate
    clip: Callable[[Accelerator, nn.Module], None] = clip_by_accelerate
    num_alike: Callable[[Namespace], int] = lambda options: 1


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


def open_fsdp2_tp(options: Namespace) -> Accelerator:
    """FSDP2 on one axis of a mesh, tensor parallelism on the other."""
    launched, shares = num_launched(), options.tp_size
    if shares < 2 or launched % shares or launched == shares:
        raise ValueError(
            f"--sharding fsdp2_tp --tp-size {shares} cannot divide {launched} processes: expected at least 2 shares of "
            "the wide layers, over at least 2 shards each, so 4 processes or more. One share is --sharding fsdp2"
        )
    mesh = ParallelismConfig(dp_shard_size=launched // shares, tp_size=shares)
    return open_fsdp(options, mesh, fsdp_version=2, reshard_after_forward=True)


def check_fsdp2_tp(accelerator: Accelerator, model: nn.Module, options: Namespace) -> None:
    wide = {"Shard": 0, "Replicate": 0}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor) or parameter.device_mesh.size() != num_launched():
            raise RuntimeError(f"asked for fsdp2_tp over {num_launched()} processes, but {name} is not cut so")
        wide["Replicate" if parameter.placements[-1].is_replicate() else "Shard"] += 1
    if not all(wide.values()):
        raise RuntimeError(f"asked for fsdp2_tp, but accelerate made {accelerator.distributed_type} with {wide}")


def cut_columns(model: nn.Module, accelerator: Accelerator, options: Namespace) -> nn.Module:
    cut_feed_layers(model, accelerator.torch_device_mesh["tp"])
    return model


def open_pp(options: Namespace) -> Accelerator:
    if num_launched() < 2:
        raise ValueError("--sharding pp needs a process for each of at least 2 stages: start it by torchrun")
    if num_launched() > max(2, options.depth):
        raise ValueError(
            f"--sharding pp cannot cut --depth {options.depth} blocks into {num_launched()} stages, one for each "
            "process: take fewer processes, or a deeper model"
        )
    return Accelerator(**common_options(options))


def cut_stage(model: nn.Module, accelerator: Accelerator, options: Namespace) -> nn.Module:
    return Pipelined(model, accelerator.device, options.accumulation)  # type: ignore[arg-type]


def pipelined(model: nn.Module) -> Pipelined:
    if not isinstance(model, Pipelined):
        raise RuntimeError(f"asked for pp, but the model is a {type(model).__name__}")
    return model


def check_pp(accelerator: Accelerator, model: nn.Module, options: Namespace) -> None:
    if pipelined(model).num_stages != num_launched():
        raise RuntimeError(f"asked for pp on {num_launched()} processes, but there are {pipelined(model).num_stages}")


def zero(stage: int) -> Layout:
    """DeepSpeed with the optimizer, the gradients (from stage 2 on) and the parameters (3) sharded."""

    def open_zero(options: Namespace) -> Accelerator:
        common = common_options(options)
        on_cpu = common.pop("cpu")
        configuration = {
            "train_micro_batch_size_per_gpu": options.batch_size // options.accumulation // num_launched(),
            "gradient_accumulation_steps": options.accumulation,
            "gradient_clipping": MAX_GRADIENT_NORM,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        # accelerate refuses a configuration of a script beside that of its own file, of which the stage was read.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        if on_cpu:
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
            pretend_launched()
            return deepspeed_on_cpu(configuration, **common)
        return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=configuration), **common)

    def check_zero(accelerator: Accelerator, model: nn.Module, options: Namespace) -> None:
        made = getattr(model, "zero_optimization_stage", lambda: None)()
        if accelerator.distributed_type != DistributedType.DEEPSPEED or made != stage:
            raise RuntimeError(
                f"asked for zero{stage}, but accelerate made {accelerator.distributed_type}, and the model is a "
                f"{type(model).__name__} of stage {made}"
            )

    # DeepSpeed's own files go on under the same stage and number of processes only. The average does under any.
    return Layout(open_zero, check_zero, files=f"zero{stage}")


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
    "ddp": Layout(open_ddp, check_ddp, files="ddp"),
    "fsdp1": Layout(open_fsdp1, check_fsdp1, files="fsdp", before_load=create_optimizer_state),
    "fsdp2": Layout(open_fsdp2, check_fsdp2, files="fsdp"),
    "hsdp": Layout(open_hsdp, check_hsdp, files="fsdp"),
    "fsdp2_tp": Layout(
        open_fsdp2_tp, check_fsdp2_tp, files="fsdp", cut=cut_columns, num_alike=lambda options: options.tp_size
    ),
    "pp": Layout(
        open_pp,
        check_pp,
        files="pp",
        cut=cut_stage,
        prepare=prepare_pipeline,
        parts=lambda model: pipelined(model).stage,
        backward=lambda accelerator, model, windows: pipelined(model).forward_backward(windows),
        clip=lambda accelerator, model: pipelined(model).clip_gradients(MAX_GRADIENT_NORM),
        num_alike=lambda options: num_launched(),
    ),
    "zero2": zero(2),
    "zero3": zero(3),
}


def files_in(checkpoint: Path) -> str:
    """The ``Layout.files`` of what accelerate wrote into a folder; ``ddp`` if nothing tells."""
    if (checkpoint / FOLDER).is_dir():
        return "pp"
    if any(checkpoint.glob("pytorch_model_fsdp*")):
        return "fsdp"
    if any(checkpoint.glob("pytorch_model/zero_pp_rank_*_model_states.pt")):
        return "zero3"
    return "zero2" if (checkpoint / "pytorch_model").is_dir() else "ddp"


def default_layout() -> str:
    """What an accelerate config file asks for; ``ddp`` where there is none."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return "ddp"
    if os.environ.get("FSDP_VERSION", "1") == "1":
        return "fsdp1"
    if configured("TP") > 1:
        return "fsdp2_tp"
    return "hsdp" if configured("DP_REPLICATE") > 1 else "fsdp2"


def default_replicas() -> int:
    """What an accelerate config file asks for, else 2."""
    return max(2, configured("DP_REPLICATE"))


def default_tp_size() -> int:
    """What an accelerate config file asks for, else 2."""
    return max(2, configured("TP"))


def configured(axis: str) -> int:
    """The size of an axis of the mesh in an accelerate config file; 1 where there is none."""
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() != "true":
        return 1
    return int(os.environ.get(f"PARALLELISM_CONFIG_{axis}_SIZE", "1"))
