"""A small transformer in stages, as torch.distributed.pipelining runs them, and its whole values by plain means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor

WIDTH, DEPTH, SYMBOLS, TIME = 8, 4, 11, 5
BATCH, MICRO_BATCHES = 4, 4


class Transformer(nn.Module):
    """A stage drops what it has not: modules that are None are skipped, and no name changes.

    Args:
        tied: whether the embedding is the head too. A stage that has the head alone has the embedding for it.
    """

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tied = tied
        self.embed: nn.Embedding | None = nn.Embedding(SYMBOLS, WIDTH)
        self.layers = nn.ModuleDict(
            {str(number): nn.TransformerEncoderLayer(WIDTH, 2, 12, 0.0, batch_first=True) for number in range(DEPTH)}
        )
        self.norm: nn.Module | None = nn.LayerNorm(WIDTH)
        self.head: nn.Module | None = None if tied else nn.Linear(WIDTH, SYMBOLS)
        self.register_buffer("temperature", torch.full((), 0.5))  # every part has it

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not hidden.is_floating_point():
            hidden = self.embed(hidden)
        for layer in self.layers.values():
            hidden = layer(hidden)
        if self.norm is not None:
            hidden = self.norm(hidden)
            hidden = F.linear(hidden, self.embed.weight) if self.tied else self.head(hidden)
            hidden = hidden * self.temperature
        return hidden


def whole_model(tied: bool = False) -> Transformer:
    torch.manual_seed(1)
    return Transformer(tied)


def part(number: int, of: int, tied: bool = False) -> Transformer:
    """Stage `number` of `of`."""
    model = whole_model(tied)
    is_last = number == of - 1
    for layer in list(model.layers):
        if int(layer) * of // DEPTH != number:
            del model.layers[layer]
    if number and not (tied and is_last):
        model.embed = None
    if not is_last:
        model.norm = model.head = None
    return model


class Pipeline:
    """The stages of this rank, what runs them, and an optimizer.

    Args:
        split: "2" stages, "4" as two parts on each of two ranks, or either with "x fsdp2": over two ranks each.
        tied: whether first and last stage have the embedding.
        schedule: the schedule of one stage a rank.
    """

    def __init__(self, split: str, tied: bool = False, schedule: type[Any] = ScheduleGPipe) -> None:
        num_stages, _, sharding = split.partition(" x ")
        size, of = dist.get_world_size(), int(num_stages)
        shards = 2 if sharding else 1
        mesh = init_device_mesh("cpu", (size // shards, shards), mesh_dim_names=("pp", "dp"))
        self.place, pipes = mesh.get_local_rank("pp"), size // shards
        numbers = range(self.place, of, pipes)
        self.parts = [part(number, of, tied) for number in numbers]
        for module in self.parts:
            module.temperature = self.parts[0].temperature
            if sharding:
                shard(module, mesh["dp"])
        group = mesh.get_group("pp")
        self.stages = [
            PipelineStage(module, number, of, torch.device("cpu"), group=group)
            for number, module in zip(numbers, self.parts, strict=True)
        ]
        stages = self.stages[0] if len(self.stages) == 1 else self.stages
        made = schedule if len(self.stages) == 1 else ScheduleInterleaved1F1B
        self.schedule = made(stages, MICRO_BATCHES, loss_fn=loss)
        parameters = [parameter for module in self.parts for parameter in module.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=0.1)
        self.is_first, self.is_last = self.place == 0, self.place == pipes - 1
        self.embeddings = None
        for column in mesh.mesh.T.tolist() if tied else ():
            ends = dist.new_group([column[0], column[-1]])
            self.embeddings = ends if dist.get_rank() in column else self.embeddings

    def step(self, number: int, *, ties: bool = True) -> None:
        """One step of training; tied embeddings add up their gradients, unless `ties` is False."""
        inputs, told = self.batch(number)
        self.schedule.step(*inputs, **told)
        if self.embeddings is not None and ties:
            for module in self.parts:
                if module.embed is not None:
                    dist.all_reduce(local(module.embed.weight.grad), group=self.embeddings)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self) -> None:
        """A forward of all stages."""
        inputs, told = self.batch(0)
        self.schedule.eval(*inputs, **told)

    def batch(self, number: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """What the first stage reads, and what the last one compares with."""
        tokens = torch.randint(0, SYMBOLS, (2, BATCH, TIME), generator=torch.Generator().manual_seed(number))
        return [tokens[0]] if self.is_first else [], {"target": tokens[1]} if self.is_last else {}


def shard(module: Transformer, mesh: DeviceMesh) -> None:
    """FSDP2, every layer a unit of its own."""
    for layer in module.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensors(parts: Sequence[nn.Module], *, buffers: bool = False) -> dict[str, torch.Tensor]:
    """Collective: every rank must call it. The live tensors of all stages, whole, gathered without dist_ema."""
    own = {}
    for module in parts:
        for name, value in [*module.named_parameters(), *(module.named_buffers() if buffers else ())]:
            own[name] = (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    whole: dict[str, torch.Tensor] = {}
    for of_rank in of_ranks:
        for name, value in of_rank.items():
            assert torch.equal(whole.setdefault(name, value), value), f"{name} is two tensors"
    return whole


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(actual[name], value)] == []


def num_elements(model: nn.Module) -> int:
    return sum(math.prod(parameter.shape) for parameter in model.parameters())
