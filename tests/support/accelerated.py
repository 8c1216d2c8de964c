"""The nasty model prepared by accelerate, in the layouts of the tests, and one step of its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from cpu_fsdp import force_fsdp
from torch import nn
from torch.distributed.tensor import DTensor
from zoo import Nasty, set_live

from dist_ema import CosineSchedule

SCHEDULE = CosineSchedule(0.3, 0.01, total_steps=12)


@contextmanager
def accelerator_of(layout: str, **options: Any) -> Iterator[Accelerator]:
    """A fresh accelerator; the state that accelerate keeps per process is dropped before and after."""
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if layout == "fsdp2":
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                state_dict_type="SHARDED_STATE_DICT",
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LayerNorm"],
                cpu_ram_efficient_loading=False,
            )
            accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, **options)
            force_fsdp(accelerator, plugin)
            assert accelerator.distributed_type == DistributedType.FSDP and accelerator.is_fsdp2
        else:
            accelerator = Accelerator(cpu=True, **options)
        yield accelerator
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def prepared(accelerator: Accelerator, layout: str, optimizer: str = "adamw") -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Nasty(scalar=layout != "fsdp2")
    # A learning rate of 0 keeps the live weights exactly what the test sets; its steps are real all the same.
    make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    model, wrapped = accelerator.prepare(model, make(model.parameters(), lr=0.0, weight_decay=0.0))
    if layout == "fsdp2":
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model, wrapped


def take_step(model: nn.Module, optimizer: Any, seed: int) -> dict[str, torch.Tensor]:
    """One optimizer step at whose end the live weights are exactly those of `seed`."""
    whole = set_live(model, seed)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return whole
