"""Small models with nasty shapes, and the ways to shard them."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist_ema.boxes.shards import Box


class Nasty(nn.Module):
    """Uneven rows, fewer rows than ranks, a frozen and a tied weight, float and integer buffers."""

    def __init__(self, *, scalar: bool = True, hidden: int = 7) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.norm = nn.LayerNorm(5)
        self.hidden = nn.Linear(5, hidden)
        self.narrow = nn.Linear(hidden, 1)
        self.frozen = nn.Linear(1, 5, bias=False).requires_grad_(False)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight
        if scalar:
            self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("running", torch.arange(3.0))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.hidden(self.norm(self.embed(tokens))))
        mixed = self.frozen(self.narrow(hidden))
        return self.head(mixed * self.scale if hasattr(self, "scale") else mixed)


LAYOUTS = ("plain", "ddp", "fsdp2")


def build(layout: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The nasty model, the same on every rank, laid out as `layout` says. FSDP2 refuses 0-dim parameters."""
    torch.manual_seed(seed)
    model = Nasty(scalar=layout != "fsdp2").to(dtype)
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "fsdp2":
        fully_shard([model.hidden, model.norm])
        fully_shard(model)
    return model


def set_live(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Give the live parameters new values, the same whole tensors in every layout; returns them whole, by name.

    The values depend on the name, the seed and the shape only.
    """
    whole = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        generator = torch.Generator().manual_seed(seed * 1000 + sum(name.encode()))
        value = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        whole[name] = value
        with torch.no_grad():
            if isinstance(parameter, DTensor):
                (chunk,) = parameter.__create_chunk_list__()
                region = Box(name, tuple(chunk.offsets), tuple(chunk.sizes)).region
                parameter.to_local().copy_(value[region])
            else:
                parameter.copy_(value)
    return whole


def local_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what this rank holds of each parameter."""
    with torch.no_grad():
        return {
            name: (parameter.to_local() if isinstance(parameter, DTensor) else parameter).clone()
            for name, parameter in model.named_parameters()
        }
