"""What the benchmarks share: samples taken in turn, ratios within a round, and a report in Markdown and JSON.

Every round runs all candidates in shuffled order, so the noise of a shared machine hits all alike. A ratio is taken
within a round; told are its median over the rounds and, in brackets, its 10th and 90th percentile.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import functools
import json
import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from cells import Cell as Cell
from cells import Spread as Spread
from cells import markdown
from cells import shown as shown

T = TypeVar("T")


def benchmark_parser(description: str, *, rounds: int | None) -> argparse.ArgumentParser:
    """With the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    told = "each of which runs all candidates once"
    left_out = "" if rounds else "; as many as the case wants, if left out"
    parser.add_argument("--rounds", type=int, default=rounds, help=told + left_out)
    parser.add_argument("--threads", type=int, default=1, help="of torch; one is timed by its CPU time")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    def device(name: str) -> str:
        if name == "cuda" and not torch.cuda.is_available():
            raise argparse.ArgumentTypeError("there is no GPU")
        return name

    parser.add_argument("--device", type=device, choices=("cpu", "cuda"), default="cpu")


def interleaved(candidates: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each candidate returns in each round. A first one, in the given order, warms up and is not counted."""
    found: dict[str, list[T]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate()
    shuffle = random.Random(0)  # the same order on every rank
    for _ in range(rounds):
        for name in shuffle.sample(list(candidates), len(candidates)):
            found[name].append(candidates[name]())
    return found


def stopwatch(device: str = "cpu") -> Callable[[Callable[[], object]], float]:
    """Seconds of a call: of this thread's CPU where torch has one thread, of the device's own clock on CUDA."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def on_cpu(call: Callable[[], object]) -> float:
        began = clock()
        call()
        return clock() - began

    def on_cuda(call: Callable[[], object]) -> float:
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        began.record()
        call()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1000

    return on_cuda if device == "cuda" else on_cpu


def measure(calls: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each call in each round."""
    timed = stopwatch(device)
    return interleaved({name: functools.partial(timed, call) for name, call in calls.items()}, rounds)


def ratio(own: Sequence[float], base: Sequence[float]) -> Spread:
    """How much longer one takes than the other, round by round."""
    return Spread.of(a / b for a, b in zip(own, base, strict=True))


def milliseconds(seconds: Sequence[float]) -> float:
    return 1000 * statistics.median(seconds)


def host_microseconds(call: Callable[[], object], rounds: int, device: str = "cpu") -> float:
    """The median time until a call returns, when the device has nothing else to do."""
    found = []
    for _ in range(rounds):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        found.append(1e6 * (time.perf_counter() - began))
    return statistics.median(found)


def peak_bytes(reset: bool = False) -> int:
    """Largest resident memory of this process since the last reset."""
    if reset:
        with contextlib.suppress(AttributeError):  # what was freed before must not hide what is taken now
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):  # some sandboxes do not have it: there a peak stays what it was
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    if "VmHWM:" in status:
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def extra_mib(call: Callable[[], object], device: str = "cpu") -> float:
    """By how much resident memory, or memory in use on the device, grows during a call, at most."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        used = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - used) / 2**20
    before = peak_bytes(reset=True)
    call()
    return (peak_bytes() - before) / 2**20


class Report:
    """Tables on the screen, and all of them with the machine's facts in one JSON file. Sets torch's threads."""

    def __init__(self, benchmark: str, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        self._path: Path | None = options.json
        self._tables: list[dict[str, object]] = []
        chosen = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
        self._told = {"benchmark": benchmark, "options": chosen, "machine": machine(), "tables": self._tables}

    def add(self, title: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        print(f"\n{title}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)\n")
        print(*markdown(rows), sep="\n", flush=True)
        self._tables.append({"title": title, "rows": rows})
        if self._path is not None:
            self._path.write_text(json.dumps(self._told, indent=2, default=asdict) + "\n")


def machine() -> dict[str, object]:
    """Facts without which a number means little."""
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":", 1)[1].strip() for line in described.splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load at the start": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
