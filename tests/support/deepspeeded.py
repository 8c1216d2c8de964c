"""The nasty model in DeepSpeed's engine on gloo, its training, and its live values by DeepSpeed's own means."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from cpu_deepspeed import deepspeed_for_cpu
from torch import nn
from zoo import Nasty

_PLAIN_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
# The sections of DeepSpeed's configuration.
KINDS: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": _PLAIN_3},
    "zero3_init": {"zero_optimization": _PLAIN_3},
    # Biases and norms stay gathered.
    "zero3_persistent": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 11}},
    "zero3_offload": {
        "zero_optimization": {**_PLAIN_3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    },
    "zero3_nodes": {"zero_optimization": {**_PLAIN_3, "zero_hpz_partition_size": 2}},
    "none": {"zero_optimization": {"stage": 0}},
    "none_bf16": {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
    "zero1_bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "zero2_bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "zero3_bf16": {"zero_optimization": _PLAIN_3, "bf16": {"enabled": True}},
    "zero2_round_robin": {
        "zero_optimization": {"stage": 2, "round_robin_gradients": True},
        "bf16": {"enabled": True},
    },
    "bf16": {  # its optimizer of its own for bf16
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "none_fp16": {"zero_optimization": {"stage": 0}, "fp16": {"enabled": True, "initial_scale_power": 4}},
    "zero2_fp16": {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True, "initial_scale_power": 4}},
    "zero3_fp16": {"zero_optimization": _PLAIN_3, "fp16": {"enabled": True, "initial_scale_power": 4}},
}


@functools.cache
def imported() -> ModuleType:
    """DeepSpeed, on the process group of this world."""
    os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp()
    deepspeed: ModuleType = deepspeed_for_cpu()
    deepspeed.utils.set_log_level_from_string("error")
    # DeepSpeed will not run fp16 on a CPU. Torch computes it all the same.
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed


def configuration(kind: str, *, accumulate: int = 1) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulate,
        "train_batch_size": 2 * accumulate * dist.get_world_size(),
        "zero_allow_untested_optimizer": True,
        **KINDS[kind],
    }


def engine_of(kind: str, *, accumulate: int = 1) -> Any:
    """The engine of a nasty model; its `module` is the model. DeepSpeed refuses 0-dim parameters."""
    deepspeed, config = imported(), configuration(kind, accumulate=accumulate)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "zero3_init":
            with deepspeed.zero.Init(config_dict_or_path=config):
                model: nn.Module = Nasty(scalar=False)
        else:
            model = Nasty(scalar=False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, lr=0.01), config=config)
    return engine


def batch(step: int) -> torch.Tensor:
    """Another one on each rank."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randint(0, 11, (2, 3), generator=generator)


def train(engine: Any, step: int, *, factor: float = 1.0) -> None:
    """Forward, backward and step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.backward(engine(batch(step)).float().square().mean() * factor)
        engine.step()


def read_whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """The live parameters, whole, on every rank."""
    parameters = dict(model.named_parameters())
    with imported().zero.GatheredParameters(list(parameters.values())):
        return {name.removeprefix("module."): value.detach().clone() for name, value in parameters.items()}


def masters(engine: Any) -> dict[str, torch.Tensor]:
    """The fp32 masters of the trained parameters, whole, on every rank; of the frozen ones the live values."""
    whole = {name: value.float() for name, value in read_whole(engine.module).items()}
    trained = {name: each for name, each in engine.module.named_parameters() if each.requires_grad}
    of_fp16 = dict(zip(trained, *getattr(engine.optimizer, "fp32_groups", [trained]), strict=True))
    for name, parameter in trained.items():
        master = imported().utils.safe_get_full_fp32_param(parameter)
        whole[name] = (of_fp16[name] if master is None else master).detach().clone()
    return whole
