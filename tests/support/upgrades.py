"""The runs whose folders an earlier version wrote (tests/fixtures/): models, schedules, options; nothing is random.

The same code builds a run for the version that wrote and for the one that reads.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_ema import ConstantSchedule, CosineSchedule, EqualSchedule, PowerSchedule, ShardedEMA, after, every

FOLDER = Path(__file__).parents[1] / "fixtures" / "329fcfc"  # the commit that wrote them
NUM_UPDATES = 6


class Mixed(nn.Module):
    """Tied weights, buffers of several dtypes, a scalar, a frozen parameter, a bfloat16 one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.narrow = nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=7, n_positions=4, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


class Own:
    """A schedule that only its author can rebuild."""

    def __repr__(self) -> str:
        return "Own(0.25)"

    def momentum(self, step: int) -> float:
        return 0.25


def move(model: nn.Module, step: int) -> None:
    """Live values that are a function of the names' order, the step and the place, in few digits."""
    with torch.no_grad():
        for index, value in enumerate([*model.parameters(), *model.buffers()]):
            place = torch.arange(value.numel(), dtype=torch.float64).reshape(value.shape)
            if value.is_floating_point():
                value.copy_(1.0 + (place * 7 + index * 3 + step * 5) % 11 / 16 + step / 8)
            else:
                value.fill_(step)


@dataclass(frozen=True)
class Run:
    """One run: how it is built, and what is done before each update."""

    model: Callable[[], nn.Module]
    schedule: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    save: Mapping[str, Any] = field(default_factory=dict)
    nonfinite: bool = False
    has_teacher: bool = False

    def start(self) -> tuple[nn.Module, ShardedEMA]:
        model = self.model()
        move(model, 0)
        options = dict(self.options)
        if self.has_teacher:
            options["into"] = self.model().requires_grad_(False)
            move(options["into"], 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of schedules that only their author can rebuild, and of large momenta
            return model, ShardedEMA(model, self.schedule, **options)

    def advance(self, model: nn.Module, ema: ShardedEMA, first: int, last: int) -> None:
        """Updates number `first` to `last - 1`."""
        for step in range(first, last):
            move(model, step)
            if self.nonfinite and step == 3:
                with torch.no_grad():
                    next(model.parameters()).view(-1)[:2] = math.nan
            ema.update()


COSINE = CosineSchedule(0.5, 0.01, total_steps=10)
TRACKS = {"short": PowerSchedule(sigma_rel=0.1), "long": after(2, every(2, ConstantSchedule(decay=0.75)))}
RUNS: dict[str, Run] = {
    "one_track": Run(Mixed, COSINE),
    "several_tracks": Run(Mixed, TRACKS),
    "own_schedule": Run(net, {"own": Own(), "equal": EqualSchedule()}),
    "sharded_files": Run(net, COSINE, save={"max_shard_size": 80}),
    "sharded_tracks": Run(net, TRACKS, save={"max_shard_size": 80}),
    "teacher": Run(net, COSINE, has_teacher=True),
    "options": Run(
        Mixed,
        COSINE,
        {"interval": 2, "interval_correction": True, "update_buffers": True, "exclude": "frozen"},
    ),
    "skip_nonfinite": Run(net, COSINE, {"skip_nonfinite": True}, nonfinite=True),
    "compensated": Run(net, COSINE, {"compensated": True}),
    "bfloat16": Run(net, COSINE, {"dtype": torch.bfloat16}),
    "transformers": Run(gpt2, COSINE),
}
