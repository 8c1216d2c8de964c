"""What one update costs, as ratios from one interleaved run: the machine's noise hits all candidates alike.

    OMP_NUM_THREADS=1 python launch/bench/update.py --model gpt2 --rounds 15

Candidates run in shuffled order in every round; each time is divided by that round's floor, one in-place pass over
a flat buffer of the model's size (12 bytes a parameter in fp32: two reads and a write). With one thread the clock
is the thread's CPU time. The table gives the median ratio and the 10th and 90th percentile.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from dist_ema import ConstantSchedule, ShardedEMA

MOMENTUM = 0.001


def gpt2_shapes() -> list[tuple[int, ...]]:
    """The 148 parameters of GPT-2 small, 124.4 million elements."""
    block: list[tuple[int, ...]] = [
        *((768,), (768,), (768, 2304), (2304,), (768, 768), (768,)),
        *((768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)),
    ]
    return [(50257, 768), (1024, 768), *block * 12, (768,), (768,)]


def tiny_shapes() -> list[tuple[int, ...]]:
    """500 tensors of 64 elements: the host's share."""
    return [(64,)] * 500


SHAPES = {"gpt2": gpt2_shapes, "tiny": tiny_shapes}


def module_of(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> nn.Module:
    model = nn.Module()
    for index, shape in enumerate(shapes):
        model.register_parameter(f"p{index}", nn.Parameter(torch.randn(shape).to(dtype)))
    return model


def candidates(model: nn.Module) -> dict[str, Callable[[], object]]:
    """Name -> one update. "floor" is the first."""
    live = [parameter.detach() for parameter in model.parameters()]
    numel = sum(value.numel() for value in live)
    averaged = [value.float().clone() for value in live]
    flat_averaged, flat_live = torch.randn(numel), torch.randn(numel)
    views = list(flat_averaged.split([value.numel() for value in live]))
    views = [view.view(value.shape) for view, value in zip(views, live, strict=True)]
    ema = ShardedEMA(model, ConstantSchedule(momentum=MOMENTUM))
    ema.update()
    found: dict[str, Callable[[], object]] = {
        "floor: one in-place pass over a flat buffer": lambda: flat_averaged.add_(flat_live, alpha=MOMENTUM),
        "lerp, flat buffer to flat buffer": lambda: flat_averaged.lerp_(flat_live, MOMENTUM),
        "ShardedEMA.update": ema.update,
    }
    if live[0].dtype == torch.float32:
        found["_foreach_lerp_, separate averages"] = lambda: torch._foreach_lerp_(averaged, live, MOMENTUM)
        found["_foreach_lerp_, averages in one flat buffer"] = lambda: torch._foreach_lerp_(views, live, MOMENTUM)
    else:
        scratch = [torch.empty_like(value) for value in averaged]

        def full_scratch() -> None:
            torch._foreach_copy_(scratch, live)
            torch._foreach_lerp_(averaged, scratch, MOMENTUM)

        found["_foreach_copy_ + _foreach_lerp_, full-size scratch"] = full_scratch
    return found


def measure(found: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for call in found.values():
        call()
    for _ in range(rounds):
        for name in random.sample(list(found), len(found)):
            began = clock()
            found[name]()
            seconds[name].append(clock() - began)
    return seconds


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Ratios of one update to one pass at memory bandwidth.")
    parser.add_argument("--model", choices=tuple(SHAPES), default="gpt2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the live weights")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    seconds = measure(candidates(module_of(SHAPES[options.model](), getattr(torch, options.dtype))), options.rounds)
    floor = next(iter(seconds.values()))
    print(f"{options.model}, live {options.dtype}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    print("| candidate | median ms | ratio to the floor, median | p10 | p90 |\n|---|---|---|---|---|")
    for name, times in seconds.items():
        ratios = sorted(own / base for own, base in zip(times, floor, strict=True))
        p10, p90 = ratios[len(ratios) // 10], ratios[(9 * len(ratios)) // 10]
        median_ms, ratio = 1000 * statistics.median(times), statistics.median(ratios)
        print(f"| {name} | {median_ms:.3f} | {ratio:.2f} | {p10:.2f} | {p90:.2f} |")


if __name__ == "__main__":
    main()
