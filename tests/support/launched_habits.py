"""A training script as users of accelerate launch it, with one of the habits that change how the model is prepared.

Not a test: `test_accelerate_habits.py` launches it, on two processes each. It raises if the average is not the naive
one, under the names of the plain model, or does not come back. On a CPU accelerate takes no FSDP plugin and no
parallelism configuration: what its command line says of them is read here from the environment, and forced.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from cpu_fsdp import force_fsdp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.tensor import DTensor
from torch.nn import functional

from dist_ema import ConstantSchedule, attach

MOMENTUM = 0.25


class Block(nn.Module):
    """Attention with one head. Not torch's, whose context-parallel form is for GPUs only: each rank attends alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixed, self.back = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = self.mixed(self.norm(hidden)).chunk(3, dim=-1)
        return hidden + self.back((query @ key.mT).softmax(-1) @ value)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(11, 8), nn.Sequential(Block(), Block()), nn.Linear(8, 11)
        # Not a persistent one: accelerate 1.15 cannot send those to the other ranks (fsdp_cpu_ram_efficient_loading).
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(tokens))) + self.scratch.sum()


def opened(habit: str) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if habit == "dynamo":
        return Accelerator(cpu=True)
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    os.environ.pop("ACCELERATE_USE_PARALLELISM_CONFIG", None)
    plugin = FullyShardedDataParallelPlugin()
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    force_fsdp(accelerator, plugin, ParallelismConfig() if habit == "context-parallel" else None)
    return accelerator


def prepared(habit: str, accelerator: Accelerator) -> tuple[nn.Module, torch.optim.Optimizer]:
    # With fsdp_cpu_ram_efficient_loading rank 0 alone has the weights that count.
    torch.manual_seed(accelerator.process_index if habit == "fsdp" else 0)
    model = Model()
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    parameters = list(wrapped.parameters())
    if habit == "dynamo":
        assert hasattr(wrapped, "_orig_mod"), "accelerate did not compile the model"
        return wrapped, optimizer
    assert all(isinstance(each, DTensor) for each in parameters), "accelerate did not shard the model"
    if habit == "fsdp":
        assert accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
        assert any(isinstance(each, CheckpointWrapper) for each in wrapped.modules()), "no activation checkpointing"
    else:
        assert parameters[0].device_mesh.mesh_dim_names == ("dp_shard_cp",)
    return wrapped, optimizer


def context(habit: str, accelerator: Accelerator, tokens: torch.Tensor) -> AbstractContextManager[None]:
    if habit != "context-parallel":
        return nullcontext()
    return accelerator.maybe_context_parallel(buffers=[tokens], buffer_seq_dims=[1], no_restore_buffers={tokens})


def train(habit: str, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step if habit == "context-parallel" else 10 * step + dist.get_rank())
    tokens = torch.randint(0, 11, (2, 8), generator=generator)
    with context(habit, accelerator, tokens):
        logits = model(tokens)
        accelerator.backward(functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
    optimizer.step()
    optimizer.zero_grad()


def whole(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """What users save; accelerate leaves the prefix of a compiled model there."""
    return {name.removeprefix("_orig_mod."): value for name, value in accelerator.get_state_dict(model).items()}


def main(habit: str) -> None:
    accelerator = opened(habit)
    assert accelerator.num_processes == 2
    model, optimizer = prepared(habit, accelerator)
    ema = attach(accelerator, model, optimizer, ConstantSchedule(momentum=MOMENTUM))
    naive: dict[str, torch.Tensor] = {}
    for step in range(3):
        train(habit, accelerator, model, optimizer, step)
        for name, value in whole(accelerator, model).items():
            naive[name] = naive[name].lerp(value, MOMENTUM) if step else value.clone()
    folder = [tempfile.mkdtemp() if accelerator.is_main_process else ""]
    dist.broadcast_object_list(folder)
    accelerator.save_state(folder[0])
    ema.consolidate(os.path.join(folder[0], "export"))
    if accelerator.is_main_process:
        exported = load_file(os.path.join(folder[0], "export", "model.safetensors"))
        Model().load_state_dict(exported)  # strict: these names and no others
        assert naive.keys() == exported.keys()
        for name, value in exported.items():
            assert torch.equal(value, naive[name]), name

    expected = {}
    for run in ("never stopped", "resumed"):
        if run == "resumed":
            accelerator = opened(habit)
            model, optimizer = prepared(habit, accelerator)
            ema = attach(accelerator, model, optimizer, ConstantSchedule(momentum=MOMENTUM))
            accelerator.load_state(folder[0])
        assert ema.num_updates == 3
        train(habit, accelerator, model, optimizer, 3)
        expected[run] = ema.full_state_dict()
    for name, value in expected["never stopped"].items():
        assert torch.equal(value, expected["resumed"][name]), name
    with ema.average_parameters():  # under DDP a state dict shares the model's memory: it is copied inside
        shown = {name: value.clone() for name, value in whole(accelerator, model).items()}
    for name, value in expected["resumed"].items():
        assert torch.equal(value, shown[name]), name
    if accelerator.is_main_process:
        print("the average is right:", habit, ema.num_updates, flush=True)
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
    os._exit(0)  # destroy_process_group() aborts now and then in gloo's teardown
