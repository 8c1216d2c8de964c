"""The average as a stream of whole tensors, against `full_tensor()` of each parameter of `sharded_state_dict()`.

    torchrun --nproc-per-node 2 launch/bench/whole_tensors.py

Both ways give every tensor once, in one dtype, to the same ranks, which drop it. With a dtype other than fp32 the
shards are converted before they are gathered ("shards converted"), or the tensors after that, as one would write it
down first ("tensors converted"). Where rank 0 alone is to receive, `full_tensor()` sends to all ranks all the same: it
has no other way. Told is the wall time of the slowest rank, and the memory of the fullest.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from launched import joined, laid_out, leave
from measuring import Cell, Report, benchmark_parser, extra_mib, interleaved, milliseconds, ratio
from models import MODELS, build
from torch.distributed.tensor import DTensor

from dist_ema import ConstantSchedule, ShardedEMA

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def slowest(call: Callable[[], object]) -> float:
    """Collective. The wall seconds of the rank that needed most."""
    dist.barrier()
    began = time.perf_counter()
    call()
    return most(time.perf_counter() - began)


def most(own: float) -> float:
    """Collective."""
    told = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return float(told)


def gathered(ema: ShardedEMA, dtype: torch.dtype | None, *, shards_converted: bool) -> None:
    for value in ema.sharded_state_dict().values():
        if dtype is not None and shards_converted:
            value = value.to(dtype)
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if dtype is not None and not shards_converted:
            whole = whole.to(dtype)
        del whole


def streamed(ema: ShardedEMA, dtype: torch.dtype | None, bucket_bytes: int, ranks: list[int] | None) -> None:
    for _, whole in ema.whole_tensors(dtype=dtype, bucket_bytes=bucket_bytes, ranks=ranks):
        del whole


def rows(ema: ShardedEMA, dtype: torch.dtype | None, bucket_bytes: int, rounds: int) -> list[Mapping[str, Cell]]:
    """Collective."""
    calls: dict[str, Callable[[], object]] = {
        "full_tensor(), shards converted": functools.partial(gathered, ema, dtype, shards_converted=True)
    }
    if dtype is not None:
        calls["full_tensor(), tensors converted"] = functools.partial(gathered, ema, dtype, shards_converted=False)
    calls["whole_tensors, all ranks receive"] = functools.partial(streamed, ema, dtype, bucket_bytes, None)
    calls["whole_tensors, rank 0 receives"] = functools.partial(streamed, ema, dtype, bucket_bytes, [0])
    extra = {name: most(extra_mib(call)) for name, call in calls.items()}
    found = interleaved({name: functools.partial(slowest, call) for name, call in calls.items()}, rounds)
    first, *_ = found.values()
    return [
        {
            "way": name,
            "ms": milliseconds(samples),
            "to row 1": ratio(samples, first),
            "extra MiB": extra[name],
        }
        for name, samples in found.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Whole tensors of an average, to full_tensor() of each parameter.", rounds=15)
    parser.add_argument("--model", choices=tuple(MODELS), default="gpt2")
    parser.add_argument("--bucket-mib", type=int, default=256, help="of whole_tensors")
    options = parser.parse_args(arguments)
    if not joined():
        parser.error("start it with torchrun")
    report = Report("whole_tensors", options)
    model = laid_out(build(options.model), "fsdp2")
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.01))
    ema.update()
    largest = max(parameter.numel() for parameter in model.parameters()) * 4 / 2**20
    for title, dtype in DTYPES.items():
        told = rows(ema, dtype, options.bucket_mib * 2**20, options.rounds)
        if dist.get_rank() == 0:
            report.add(
                f"{options.model}, {title}, FSDP2 on {dist.get_world_size()} ranks, {options.rounds} rounds, bucket "
                f"{options.bucket_mib} MiB, largest tensor {largest:.0f} MiB in fp32",
                told,
            )


if __name__ == "__main__":
    main()
    leave()
