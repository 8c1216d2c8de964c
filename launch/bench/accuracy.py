"""How far averages kept in float32 are from the same average kept in float64, after many updates of a random walk.

    .venv-bench/bin/python launch/bench/accuracy.py

The live weights walk at random, and end about as far from their start as they are large. Told is the norm of the error,
relative to the average and to how far the average has moved: at a decay of 0.99999 it has hardly left its start after
20,000 updates, and what matters is the second.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from libraries import LIBRARIES, Average, Maker, sharded_ema
from measuring import Cell, Report, benchmark_parser
from torch import nn

from dist_ema import ShardedEMA


def by_hand(update: Callable[[torch.Tensor, torch.Tensor, float], object]) -> Maker:
    """The forms that an update may have, on one tensor."""

    def make(model: nn.Module, decay: float, dtype: torch.dtype) -> Average:
        live = next(model.parameters()).detach()
        averaged = live.clone()
        return Average(lambda: update(averaged, live, decay), lambda: [averaged])

    return make


def candidates() -> dict[str, Maker]:
    found: dict[str, Maker] = {"ShardedEMA": sharded_ema()}
    if "compensated" in inspect.signature(ShardedEMA).parameters:
        found["ShardedEMA, compensated=True"] = sharded_ema(compensated=True)
    found["a.lerp_(live, 1 - decay)"] = by_hand(lambda own, live, decay: own.lerp_(live, 1 - decay))
    found["a.mul_(decay).add_(live, alpha=1 - decay)"] = by_hand(
        lambda own, live, decay: own.mul_(decay).add_(live, alpha=1 - decay)
    )
    found["a.sub_((1 - decay) * (a - live))"] = by_hand(lambda own, live, decay: own.sub_((1 - decay) * (own - live)))
    return found | {str(library): library.make for library in LIBRARIES if library.is_installed()}


def walked(live: torch.Tensor, averages: Iterable[Average], updates: int, decay: float) -> torch.Tensor:
    """Walk, and update all averages at each step; the exact average at the end."""
    exact = live.double()
    generator = torch.Generator().manual_seed(1)
    updates_of_all = [average.update for average in averages]
    for number in range(updates + 1):
        if number:  # the first update is at the start: some only copy then
            live.add_(torch.randn(live.shape, generator=generator), alpha=updates**-0.5)
            exact.lerp_(live.double(), 1 - decay)
        for update in updates_of_all:
            update()
    return exact


def rows(decay: float, updates: int, elements: int) -> list[Mapping[str, Cell]]:
    torch.manual_seed(0)
    model: Any = nn.Module()
    model.weight = nn.Parameter(torch.randn(elements))
    start = model.weight.detach().double()
    averages, why = {}, {}
    for name, make in candidates().items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                averages[name] = make(model, decay, torch.float32)
        except Exception as error:
            why[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    exact = walked(model.weight.detach(), averages.values(), updates, decay)
    told: list[Mapping[str, Cell]] = []
    for name, average in averages.items():
        (value,) = average.values()
        off = (value.detach().double() - exact).norm()
        told.append(
            {
                "average": name,
                "error / average": f"{off / exact.norm():.1e}",
                "error / way of the average": f"{off / (exact - start).norm():.1e}",
            }
        )
    return [*told, *({"average": name, "error / average": reason} for name, reason in why.items())]


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Errors of float32 averages after many updates.", rounds=None)
    parser.add_argument("--decays", nargs="+", type=float, default=[0.9999, 0.99999])
    parser.add_argument("--updates", type=int, default=20000)
    parser.add_argument("--elements", type=int, default=4096)
    options = parser.parse_args(arguments)
    report = Report("accuracy", options)
    for decay in options.decays:
        report.add(f"{options.updates:,} updates at a decay of {decay}", rows(decay, options.updates, options.elements))


if __name__ == "__main__":
    main()
