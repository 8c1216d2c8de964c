"""How the cost of an average grows: with the number of tensors, with bytes, with tracks, with ranks.

    python launch/bench/growth.py                      # all of them, with pictures: a quarter of an hour
    python launch/bench/growth.py update --tensors 10000 100000
    python launch/bench/growth.py --pictures docs/pictures

Every size is measured in every round, in shuffled order. "to linear" is the cost of one tensor (MiB, track, rank) to
the same at the size before: 1.00 is linear growth, below 1 is better. One thread; CPU time of the process. Ranks are
processes on loopback, which share the cores, so theirs is the CPU time of all ranks together.

update   the host time of an update: tensors of 8 elements
files    construction, save, load and export of such tensors
bytes    an update of 16 tensors, with live weights in fp32 and in bfloat16
tracks   an update of 32 MiB of fp32
ranks    construction, save and load of a small model under DDP, real ranks on loopback. Linux only
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import Cell, Report, Spread, benchmark_parser, interleaved, ratio
from torch import nn

from dist_ema import ConstantSchedule, ShardedEMA
from dist_ema.offline.pictures import dress, new_figure, save_figure

_ELEMENTS = 8
_MOST_IN_A_MODULE = 64
_SCHEDULE = ConstantSchedule(momentum=0.001)
# A sample of an update is of so many tensors in all, so that short updates are not lost in the clock's steps.
_TENSORS_A_SAMPLE = 20_000

# Curve -> size -> seconds in each round.
Samples = dict[str, dict[int, list[float]]]


class Growth(NamedTuple):
    """Something that grows.

    Attributes:
        title: of the table and the picture.
        unit: what there is more and more of.
        samples: options -> curve -> size -> seconds in each round.
        rounds: as many as tell its cost.
    """

    title: str
    unit: str
    samples: Callable[[argparse.Namespace], Samples]
    rounds: int


def many(num_tensors: int) -> nn.Module:
    """Tiny tensors, some dozens to a module."""
    model = nn.Module()
    for first in range(0, num_tensors, _MOST_IN_A_MODULE):
        module = nn.Module()
        for number in range(min(_MOST_IN_A_MODULE, num_tensors - first)):
            module.register_parameter(f"w{number}", nn.Parameter(torch.zeros(_ELEMENTS)))
        model.add_module(f"layer{first // _MOST_IN_A_MODULE}", module)
    return model


def in_use(model: nn.Module, *, num_tracks: int = 1) -> ShardedEMA:
    """An average after its first updates, which copy and prepare."""
    ema = ShardedEMA(model, {f"track{number}": _SCHEDULE for number in range(num_tracks)})
    for _ in range(3):
        ema.update()
    return ema


def cpu_seconds(call: Callable[[], object], repeats: int = 1) -> float:
    gc.collect()  # the garbage of the candidate before is not this one's
    began = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - began) / repeats


def of_updates(
    averages: Mapping[int, ShardedEMA], rounds: int, repeats: Callable[[int], int]
) -> dict[int, list[float]]:
    calls = {
        str(size): functools.partial(cpu_seconds, ema.update, max(1, repeats(size))) for size, ema in averages.items()
    }
    return {int(size): seconds for size, seconds in interleaved(calls, rounds).items()}


def updates(options: argparse.Namespace) -> Samples:
    averages = {size: in_use(many(size)) for size in options.tensors}
    return {"update": of_updates(averages, options.rounds, lambda size: _TENSORS_A_SAMPLE // size)}


def files(options: argparse.Namespace) -> Samples:
    """Construction, save, load and export, in turn, of one size after the other."""
    found: Samples = {
        name: {size: [] for size in options.tensors} for name in ("construction", "save", "load", "export")
    }
    models = {size: many(size) for size in options.tensors}

    def sample(size: int) -> None:
        made: list[ShardedEMA] = []
        with tempfile.TemporaryDirectory() as folder:
            calls = {
                "construction": lambda: made.append(ShardedEMA(models[size], _SCHEDULE)),
                "save": lambda: made[0].save(f"{folder}/saved"),
                "load": lambda: made[0].load(f"{folder}/saved"),
                "export": lambda: made[0].consolidate(f"{folder}/export"),
            }
            for name, call in calls.items():
                found[name][size].append(cpu_seconds(call))

    interleaved({str(size): functools.partial(sample, size) for size in options.tensors}, options.rounds)
    return {name: {size: seconds[1:] for size, seconds in by_size.items()} for name, by_size in found.items()}


def bytes_moved(options: argparse.Namespace) -> Samples:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        averages = {}
        for mib in options.mib:
            numel = mib * 2**20 // 16 // dtype.itemsize
            averages[mib] = in_use(nn.ParameterList([torch.randn(numel).to(dtype) for _ in range(16)]))
        name = str(dtype).removeprefix("torch.")
        found[f"live {name}"] = of_updates(averages, options.rounds, lambda mib: max(options.mib) // mib // 4)
        del averages
        gc.collect()
    return found


def tracks(options: argparse.Namespace) -> Samples:
    model = nn.ParameterList([torch.randn(2**19) for _ in range(16)])
    averages = {number: in_use(model, num_tracks=number) for number in options.tracks}
    return {"update": of_updates(averages, options.rounds, lambda number: 1)}


def ranks(options: argparse.Namespace) -> Samples:
    """CPU time of all ranks together, from a process without threads, which forks them."""
    shuffle = random.Random(0)
    sizes = [size for _ in range(options.rounds) for size in shuffle.sample(options.ranks, len(options.ranks))]
    study = Path(__file__).parents[1] / "studies" / "rank_costs.py"
    ran = subprocess.run([sys.executable, study, *map(str, sizes)], stdout=subprocess.PIPE, text=True, check=True)
    found: Samples = {}
    for size, line in zip(sizes, ran.stdout.splitlines(), strict=True):
        for name, seconds in json.loads(line).items():
            found.setdefault(name, {of: [] for of in options.ranks})[size].append(seconds)
    return found


GROWTHS = {
    "update": Growth("host time of an update of tiny tensors", "tensors", updates, rounds=15),
    "files": Growth("construction, save, load and export of tiny tensors", "tensors", files, rounds=3),
    "bytes": Growth("an update of 16 tensors", "MiB of live weights", bytes_moved, rounds=9),
    "tracks": Growth("an update of 32 MiB of live weights", "tracks", tracks, rounds=9),
    "ranks": Growth("calls of a small model under DDP, all ranks together", "ranks", ranks, rounds=3),
}


def rows(growth: Growth, samples: Samples) -> list[Mapping[str, Cell]]:
    made: list[Mapping[str, Cell]] = []
    for name, by_size in samples.items():
        before: list[float] | None = None
        for size, seconds in sorted(by_size.items()):
            of_one = [each / size for each in seconds]
            made.append(
                {
                    "call": name,
                    growth.unit: f"{size:,}",
                    "CPU ms": Spread.of(1000 * each for each in seconds),
                    "us for one": 1e6 * statistics.median(of_one),
                    "to linear": None if before is None else ratio(of_one, before),
                }
            )
            before = of_one
    return made


def draw(growth: Growth, samples: Samples, path: Path) -> None:
    figure = new_figure()
    axes = figure.subplots()
    for number, (name, by_size) in enumerate(samples.items()):
        sizes = sorted(by_size)
        times = [1000 * statistics.median(by_size[size]) for size in sizes]
        axes.plot(sizes, times, marker="o", markersize=4, label=name)
        linear = [times[-1] * size / sizes[-1] for size in sizes]
        axes.plot(sizes, linear, color="#bbbbbb", linewidth=0.8, linestyle="--", label=None if number else "linear")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(growth.unit)
    axes.set_ylabel("CPU time (ms)")
    axes.set_title(growth.title, fontsize="medium")
    dress(axes)
    axes.legend(frameon=False)
    save_figure(figure, path, replace=True)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("How the cost of an average grows.", rounds=None)
    parser.add_argument("growths", nargs="*", metavar="GROWTH", help=f"of {', '.join(GROWTHS)}; all, if left out")
    parser.add_argument("--tensors", type=int, nargs="+", default=[10, 100, 1_000, 10_000, 100_000])
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--tracks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--pictures", type=Path, help="a folder, into which the pictures growth_*.svg go")
    options = parser.parse_args(arguments)
    if strange := set(options.growths) - set(GROWTHS):
        parser.error(f"there is no {', '.join(sorted(strange))}, only {', '.join(GROWTHS)}")
    report = Report("growth", options)
    given = options.rounds
    for name in options.growths or GROWTHS:
        growth = GROWTHS[name]
        options.rounds = given or growth.rounds
        samples = growth.samples(options)
        report.add(f"{growth.title}, {options.rounds} rounds", rows(growth, samples))
        if options.pictures is not None:
            draw(growth, samples, options.pictures / f"growth_{name}.svg")


if __name__ == "__main__":
    main()
