"""What the average costs each of several ranks.

    torchrun --nproc-per-node 2 launch/bench/ranks.py
    torchrun --nproc-per-node 4 launch/bench/ranks.py --layouts ddp

Under DDP against what everybody else does: each rank averages the whole model, by `_foreach_lerp_` over lists that were
made before. Under FSDP2 against the way without a sharded average: `full_tensor()` of each parameter, then a lerp of a
full copy; "raw" is what an update cannot do without, one `_foreach_lerp_` over lists of the local tensors. Told is
the slowest rank of each round: its CPU time (that of gloo's threads too; on fewer cores than ranks the fair one), and
its wall time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from launched import joined, laid_out, leave
from measuring import Cell, Report, benchmark_parser, interleaved, milliseconds, ratio
from models import MODELS, build
from torch import nn
from torch.distributed.tensor import DTensor
from update import MOMENTUM, RAW, raw

from dist_ema import ConstantSchedule, ShardedEMA


def slowest(call: Callable[[], object]) -> tuple[float, float]:
    """Collective. CPU and wall seconds, each of the rank that needed most."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    told = torch.tensor([time.process_time() - cpu, time.perf_counter() - wall], dtype=torch.float64)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return float(told[0]), float(told[1])


def whole_model(model: nn.Module) -> Callable[[], object]:
    """Every rank averages everything that it holds."""
    live = [parameter.detach() for parameter in model.parameters()]
    return raw([value.float().clone() for value in live], live)


def gathered(model: nn.Module) -> Callable[[], object]:
    """Every rank gathers each parameter, and averages a full copy."""
    live = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    averaged = [value.full_tensor().clone() for value in live]

    def update() -> None:
        for full, value in zip(averaged, live, strict=True):
            full.lerp_(value.full_tensor(), MOMENTUM)

    return update


def held_raw(model: nn.Module) -> Callable[[], object]:
    """Every rank averages what it holds, over lists that were made before."""
    live = [parameter.to_local().detach() for parameter in model.parameters() if isinstance(parameter, DTensor)]
    return raw([value.float().clone() for value in live], live)


OTHERS = {"ddp": ("the whole model on each rank", whole_model), "fsdp2": ("full_tensor() + lerp_", gathered)}


def rows(model_name: str, layout: str, rounds: int) -> list[Mapping[str, Cell]]:
    """Collective."""
    model = laid_out(build(model_name), layout)
    whole_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    ema = ShardedEMA(model, ConstantSchedule(momentum=MOMENTUM))
    ema.update()
    largest = torch.tensor(ema.nbytes)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    title, other = OTHERS[layout]
    calls = {title: other(model), "ShardedEMA.update": ema.update}
    if layout == "fsdp2":
        calls[RAW] = held_raw(model)
    found = interleaved({name: functools.partial(slowest, call) for name, call in calls.items()}, rounds)
    held = {title: 1.0, "ShardedEMA.update": largest.item() / whole_bytes}
    held[RAW] = held["ShardedEMA.update"]
    return [
        {
            "average": name,
            "CPU, ms": milliseconds(first(samples)),
            "wall, ms": milliseconds(second(samples)),
            "CPU to row 1": ratio(first(samples), first(found[title])),
            "wall to row 1": ratio(second(samples), second(found[title])),
            "bytes on the fullest rank, to the model": f"{held[name]:.4f}",
        }
        for name, samples in found.items()
    ]


def first(samples: Sequence[tuple[float, float]]) -> list[float]:
    return [sample[0] for sample in samples]


def second(samples: Sequence[tuple[float, float]]) -> list[float]:
    return [sample[1] for sample in samples]


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Ratios of an update to those of ranks that average the whole model.", rounds=15)
    parser.add_argument("--model", choices=tuple(MODELS), default="gpt2")
    parser.add_argument("--layouts", nargs="+", choices=tuple(OTHERS), default=list(OTHERS))
    options = parser.parse_args(arguments)
    if not joined():
        parser.error("start it with torchrun")
    report = Report("ranks", options)
    for layout in options.layouts:
        told = rows(options.model, layout, options.rounds)
        if dist.get_rank() == 0:
            report.add(
                f"{options.model} under {layout} on {dist.get_world_size()} ranks, {options.rounds} rounds", told
            )


if __name__ == "__main__":
    main()
    leave()
