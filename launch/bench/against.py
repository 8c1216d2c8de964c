"""Whether the working tree is slower than a former commit: updates, saves, loads and exports, paired within rounds.

    python launch/bench/against.py --base v0.1.0
    python launch/bench/against.py --base v0.1.0 --calls update --layouts plain fsdp2 --models small tiny gpt2

Both sides run as processes of their own, side by side: one imports dist_ema from the working tree, the other from
what git has of the base. In each round both do the same work, in random order, and the ratio new / base is taken. Told
is its median over the rounds with the 95% interval of that median (order statistics; no distribution is assumed). An
interval that contains 1.00, or lies below it, is no sign of a loss. Both are started anew several times: where memory
happens to lie changes the speed of a whole process by some percent.

Updates are timed by the CPU time of one thread, as many in a row as take 20 ms; of 2 gloo ranks that of the slower one
is told. Saves and loads are those of 2 gloo ranks, by the wall clock of the slower one; a save replaces a folder,
everything fsynced. Host time is all there is of an update of "small" (28 tensors, 27,000 elements), and most of it of
"tiny" (500 tensors of 64 elements).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from launched import laid_out
from measuring import Cell, Report, benchmark_parser, milliseconds, shown
from models import MODELS, build

# Of one sample of updates.
SAMPLE_SECONDS = 0.02
ROOT = Path(__file__).resolve().parents[2]


class Work(NamedTuple):
    """What both sides do in a round.

    Attributes:
        call: "update", or one of `FILE_CALLS`.
        layout: of the model on `ranks` ranks.
    """

    call: str
    layout: str = "plain"
    dtype: str = "float32"
    ranks: int = 1

    def __str__(self) -> str:
        where = "" if self.ranks == 1 else f" under {self.layout} on {self.ranks} ranks"
        return f"{self.call}{where}, {self.dtype}" if self.call == "update" else f"{self.call}{where}"


# A load is of an average in use; a resume is of a new one, which is filled in place.
FILE_CALLS = ("save", "load", "resume", "export")
DTYPES = ("float32", "bfloat16")
LAYOUTS = {"plain": 1, "ddp": 2, "fsdp2": 2}  # of updates: layout -> ranks
FILES = tuple(Work(call, layout, ranks=2) for layout in ("ddp", "fsdp2") for call in FILE_CALLS)


def serve(work: Work, model_name: str, folder: Path, rank: int) -> None:
    """Be one rank of a side: do the work once for each line on standard input, and print its seconds."""
    from dist_ema import ConstantSchedule, ShardedEMA  # of the side's own PYTHONPATH

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if work.ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=work.ranks)
    model = build(model_name, getattr(torch, work.dtype))
    if work.ranks > 1:
        model = laid_out(model, work.layout)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.001))
    ema.update()

    def resume() -> None:
        ema.restart()
        ema.load(folder / "ema")

    calls: dict[str, Callable[[], object]] = {
        "update": ema.update,
        "save": functools.partial(ema.save, folder / "ema"),
        "load": functools.partial(ema.load, folder / "ema"),
        "resume": resume,
        "export": functools.partial(ema.consolidate, folder / "export"),
    }
    if work.call in ("load", "resume"):
        ema.save(folder / "ema")
    clock = time.thread_time if work.call == "update" else time.perf_counter

    def timed(repeats: int) -> float:
        began = clock()
        for _ in range(repeats):
            calls[work.call]()
        return (clock() - began) / repeats

    repeats = 1 + int(SAMPLE_SECONDS / timed(3)) if work.call == "update" else 1
    first = rank == 0
    if first:
        print("ready", flush=True)
    while True:
        going = torch.tensor(float(bool(sys.stdin.readline())) if first else 0.0, dtype=torch.float64)
        if work.ranks > 1:
            dist.broadcast(going, 0)
        if not going:
            os._exit(0)  # gloo's teardown aborts now and then
        seconds = torch.tensor(timed(repeats), dtype=torch.float64)
        if work.ranks > 1:
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        if first:
            print(seconds.item(), flush=True)


class Side:
    """The processes that work with one version of the package."""

    def __init__(self, root: Path, work: Work, model_name: str, folder: Path) -> None:
        folder.mkdir()
        own = [str(Path(__file__)), "--serve", *map(str, work), model_name, str(folder)]
        own_environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self._processes = [
            subprocess.Popen(
                [sys.executable, *own, str(rank)],
                env=own_environment,
                stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else None,
                text=True,
            )
            for rank in range(work.ranks)
        ]
        self._answer()

    def _answer(self) -> str:
        assert self._processes[0].stdout is not None
        line = self._processes[0].stdout.readline()
        if not line:
            self.stop()
            raise RuntimeError("a side ended early; its error stands above")
        return line

    def seconds(self) -> float:
        """Have the work done once."""
        assert self._processes[0].stdin is not None
        self._processes[0].stdin.write("go\n")
        self._processes[0].stdin.flush()
        return float(self._answer())

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.communicate()


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """What git has of a revision, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", revision, "dist_ema"], cwd=ROOT, check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def samples(base: Path, work: Work, model_name: str, rounds: int, launch: int) -> tuple[list[float], list[float]]:
    """Seconds of the new and of the base side, round by round; a first round warms up and is not counted.

    Which side starts first changes with each launch, and so does the order within rounds: the side that started first
    was measured 3 to 5% slower against itself.
    """
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        started: dict[str, Side] = {}
        for name, root in sorted({"new": ROOT, "base": base}.items(), reverse=launch % 2 == 0):
            started[name] = Side(root, work, model_name, Path(temporary) / name)
            stack.callback(started[name].stop)
        sides = (started["new"], started["base"])
        found: list[list[float]] = [[], []]
        shuffle = random.Random(launch)
        for number in range(rounds + 1):
            for index in shuffle.sample((0, 1), 2):
                seconds = sides[index].seconds()
                if number:
                    found[index].append(seconds)
        for folder in (Path(temporary) / "new", Path(temporary) / "base"):
            shutil.rmtree(folder, ignore_errors=True)
    return found[0], found[1]


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the median: the order statistics between which it lies, by the binomial of 1/2.

    Source: H. A. David and H. N. Nagaraja, Order Statistics, 3rd edition, section 7.1.
    """
    ordered, size = sorted(values), len(values)
    tail, first = 0.0, 0
    for index in range(size // 2):
        tail += math.comb(size, index) / 2**size
        if tail > 0.025:
            break
        first = index
    return ordered[first], ordered[size - 1 - first]


def row(name: str, new: Sequence[float], base: Sequence[float]) -> Mapping[str, Cell]:
    ratios = [a / b for a, b in zip(new, base, strict=True)]
    low, high = interval_of_median(ratios)
    return {
        "work": name,
        "new, ms": milliseconds(new),
        "base, ms": milliseconds(base),
        "new / base": statistics.median(ratios),
        "95% interval from": low,
        "to": high,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__ or "", rounds=10)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--base", required=True, help="a commit, branch or tag")
    parser.add_argument("--launches", type=int, default=4, help="of both sides, each for so many rounds")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["gpt2", "resnet50", "tiny", "small"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="live, of updates")
    parser.add_argument("--layouts", nargs="+", choices=tuple(LAYOUTS), default=["plain"], help="of updates")
    parser.add_argument("--calls", nargs="+", choices=("update", *FILE_CALLS), default=["update", *FILE_CALLS])
    parser.add_argument("--file-model", choices=tuple(MODELS), default="gpt2", help="that is saved and loaded")
    options = parser.parse_args(arguments)
    report = Report("against", options)
    updates = itertools.product(options.models, options.layouts, options.dtypes) if "update" in options.calls else ()
    chosen = [(name, Work("update", layout, dtype, LAYOUTS[layout])) for name, layout, dtype in updates]
    chosen += [(options.file_model, work) for work in FILES if work.call in options.calls]
    rows: list[Mapping[str, Cell]] = []
    with checked_out(options.base) as base:
        for model_name, work in chosen:
            found: tuple[list[float], list[float]] = ([], [])
            for launch in range(options.launches):
                for kept, more in zip(found, samples(base, work, model_name, options.rounds, launch), strict=True):
                    kept += more
            rows.append(row(f"{model_name}: {work}", *found))
            print("  ".join(shown(cell) for cell in rows[-1].values()), file=sys.stderr, flush=True)
    told = f"{options.launches} x {options.rounds} rounds"
    report.add(f"working tree against {options.base}, {told}", rows)


if __name__ == "__main__":
    if "--serve" in sys.argv:
        call, layout, dtype, ranks, model_name, folder, rank = sys.argv[2:]
        serve(Work(call, layout, dtype, int(ranks)), model_name, Path(folder), int(rank))
    else:
        main()
