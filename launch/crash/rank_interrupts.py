"""Interrupts on one rank of two, at every line of the package and by signals: nobody waits, nothing stays half done.

    python launch/crash/rank_interrupts.py                             # every line of each call: some minutes
    python launch/crash/rank_interrupts.py --every 5 --signals 200

Rank 0 is interrupted. It ends its call by the interrupt, or has done with it; rank 1 ends its own within seconds, by a
`CommunicationError` that tells of rank 0, or has done with it. Live weights, buffers and counters are those of before
the call, or of after it, on both, the saved folder is whole, and the next call that both make works. Exit status 1 if
anything else was seen.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import multiprocessing
import random
import signal
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ports import free_port
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist_ema
from dist_ema import CommunicationError, ConstantSchedule, ShardedEMA

PACKAGE = str(Path(dist_ema.__file__).parent)
HANG_SECONDS = 8.0

Interrupt = contextlib.AbstractContextManager[Any]


def swap(ema: ShardedEMA, folder: Path) -> None:
    with ema.average_parameters():
        pass


CALLS: dict[str, Callable[[ShardedEMA, Path], object]] = {
    "average_parameters": swap,
    "copy_to_model": lambda ema, folder: ema.copy_to_model(),
    "sharded_state_dict": lambda ema, folder: ema.sharded_state_dict(),
    "save": lambda ema, folder: ema.save(folder / "ema"),
    "load": lambda ema, folder: ema.load(folder / "good"),
    "consolidate": lambda ema, folder: ema.consolidate(folder / "export"),
    "metrics": lambda ema, folder: ema.metrics(),
}


class At:
    """Raises KeyboardInterrupt before the line of that number that this thread comes to in the package."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.count = 0

    def __enter__(self) -> At:
        sys.settrace(self._called)
        return self

    def __exit__(self, *raised: object) -> None:
        sys.settrace(None)

    def _called(self, frame: types.FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: types.FrameType, event: str, argument: object) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self._number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


class Signals:
    """SIGINT to this process after some seconds, and once more a little later; afterwards it is deaf to them."""

    def __init__(self, seconds: float, again: float) -> None:
        self._timers = [threading.Timer(each, signal.raise_signal, [signal.SIGINT]) for each in (seconds, again)]

    def __enter__(self) -> None:
        for each in self._timers:
            each.start()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *raised: object) -> None:
        deafen()
        for each in self._timers:
            each.cancel()


def deafen() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def built() -> tuple[nn.Sequential, ShardedEMA]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    ema = ShardedEMA(DistributedDataParallel(net), ConstantSchedule(momentum=0.5))
    for _ in range(3):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(1.0)
        ema.update()
    net.get_buffer("1.running_mean").fill_(float(dist.get_rank()))
    return net, ema


def values(net: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().reshape(-1).float() for value in net.state_dict().values()])


def put(net: nn.Module, flat: torch.Tensor) -> None:
    tensors = net.state_dict()
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    pairs = zip(tensors.items(), parts, strict=True)
    net.load_state_dict({name: part.view(tensor.shape).to(tensor.dtype) for (name, tensor), part in pairs})


class Subject:
    """Collective. A run of two ranks, of which rank 0 is interrupted again and again.

    Attributes:
        bad: what was seen that must not be.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._folder = name, folder
        self._net, self._ema = built()
        self._ema.save(folder / "good")
        self._ema.save(folder / "ema")
        self._live = self._averaged = values(self._net)
        if name == "copy_to_model":
            self.call()
            self._averaged = values(self._net)
            put(self._net, self._live)
        self.bad: list[str] = []

    def call(self) -> None:
        """Collective. The call that is interrupted."""
        CALLS[self._name](self._ema, self._folder)

    def num_lines(self) -> int:
        """Collective. How many lines of the package the call takes."""
        with At(0) as counter:
            self.call()
        put(self._net, self._live)
        return counter.count

    def interrupt(self, point: object, made: Interrupt) -> None:
        """Collective. One call, interrupted on rank 0."""
        began, told, before = time.monotonic(), "nothing", self._ema._exchange.channel.num_calls
        try:
            try:
                try:
                    with made if dist.get_rank() == 0 else contextlib.nullcontext():
                        self.call()
                finally:  # a second signal may come while the first is dealt with
                    deafen()
            finally:
                deafen()
        except KeyboardInterrupt:
            told = "interrupt"
            if self._ema._exchange.channel.num_calls == before:  # it had not arrived: the other rank waits for it
                self.call()
        except CommunicationError:
            told = "communication"
        wrong = []
        if told not in (("interrupt", "nothing") if dist.get_rank() == 0 else ("communication", "nothing")):
            wrong.append("another end")
        if self._ema._state.swapped is not None:
            wrong.append("the swap has no end")
        now = values(self._net)
        if not torch.equal(now, self._live) and not torch.equal(now, self._averaged):
            wrong.append("the weights are neither")
        put(self._net, self._live)
        if time.monotonic() - began > HANG_SECONDS:
            wrong.append(f"{time.monotonic() - began:.0f} s")
        try:
            self._ema.load(self._folder / "ema")
        except Exception as error:
            wrong.append(f"the next call raised {error!r}"[:300])
        if self._ema.num_updates != 3:
            wrong.append(f"{self._ema.num_updates} updates")
        self.bad += [f"{self._name}, {point}, rank {dist.get_rank()} ended by {told}: {each}" for each in wrong]


def sweep_lines(folder: str, name: str, every: int, start: int = 1, stop: int | None = None) -> tuple[int, list[str]]:
    """Collective. The number of points, and what was bad on this rank."""
    subject = Subject(name, Path(folder))
    told = torch.tensor(subject.num_lines())
    dist.broadcast(told, 0)  # the lines of rank 0
    points = range(start, int(told) if stop is None else stop, every)
    for number in points:
        subject.interrupt(f"line {number}", At(number))
    return len(points), subject.bad


def sweep_signals(folder: str, name: str, count: int, seed: int) -> tuple[int, list[str]]:
    """Collective. As `sweep_lines`; by SIGINT at random times of a call, half of them followed by a second one."""
    deafen()
    subject, chance = Subject(name, Path(folder)), random.Random(seed)
    began = time.perf_counter()
    subject.call()
    lasts = time.perf_counter() - began
    put(subject._net, subject._live)
    for number in range(count):
        seconds = chance.uniform(0.0, 1.2 * lasts)
        again = seconds + (10 ** chance.uniform(-5.0, -2.5) if number % 2 else 1000.0)
        try:
            subject.interrupt(f"after {seconds:.6f} and {again:.6f} s", Signals(seconds, again))
        except Exception:  # the ranks are no longer in step, because of what was bad before
            print(*subject.bad, sep="\n", flush=True)
            raise
    return count, subject.bad


def live(rank: int, port: int, folder: str, options: argparse.Namespace, rows: Any) -> None:
    """The life of a rank."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timeout)
    for name in options.calls:
        if options.signals:
            result = sweep_signals(folder, name, options.signals, options.seed)
        else:
            result = sweep_lines(folder, name, options.every)
        rows.put((name, *result))
    dist.barrier()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Interrupt one rank of two.")
    parser.add_argument("--calls", nargs="+", choices=tuple(CALLS), default=tuple(CALLS))
    parser.add_argument("--every", type=int, default=1, help="only every n-th line")
    parser.add_argument("--signals", type=int, default=0, help="real signals for each call, instead of lines")
    parser.add_argument("--seed", type=int, default=0, help="of the times of signals")
    options = parser.parse_args(arguments)
    context = multiprocessing.get_context("spawn")
    rows = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [
            context.Process(target=live, args=(rank, port, folder, options, rows), daemon=True) for rank in range(2)
        ]
        for each in ranks:
            each.start()
        counts = list(told(rows, len(options.calls), ranks))
    for each in ranks:
        each.kill()
    num_points, num_bad = (sum(column) for column in zip(*counts, strict=True))
    print(f"{num_points} points, {num_bad} bad")
    return 1 if num_bad else 0


def told(rows: Any, num_calls: int, ranks: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Print what the ranks have counted, a row for each call; gives the number of points of each, and of bad ones."""
    results: dict[str, list[tuple[int, list[str]]]] = {}
    while sum(map(len, results.values())) < 2 * num_calls:
        if rows.empty():
            if any(each.exitcode for each in ranks):
                print(f"FAILED: the ranks ended with {[each.exitcode for each in ranks]}")
                yield 0, 1
                return
            time.sleep(0.05)
            continue
        name, points, bad = rows.get()
        results.setdefault(name, []).append((points, bad))
        if len(results[name]) == 2:
            everything = list(itertools.chain(*(each for _, each in results[name])))
            print(f"{name:20} {points:6} points, {len(everything)} bad", flush=True)
            for each in everything[:10]:
                print(f"    {each}", flush=True)
            yield points, len(everything)


if __name__ == "__main__":
    sys.exit(main())
