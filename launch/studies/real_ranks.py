"""Worlds of real ranks on loopback: what a rank holds open for the average, and what its calls take.

The process that starts them has loaded torch and runs no threads: it forks the ranks, which saves some seconds and most
of the memory of each. Linux only. The store of the process group is kept by a process of its own, as torchrun's agent
keeps it ("agent"), or by rank 0, as under `env://` without an agent ("rank 0").

torch's server looks up the name of each client. Where no resolver answers, that takes it five seconds now and then; so
the processes here look no names up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import pickle
import resource
import select
import shutil
import signal
import socket
import statistics
import tempfile
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ConstantSchedule, ShardedEMA

__all__ = ["HOSTS", "LAYOUTS", "Counted", "Measured", "Peak", "Store", "forked", "measure", "store_kept_by"]

HOSTS = ("agent", "rank 0")
LAYOUTS = ("ddp", "fsdp2")
WIDTH, DEPTH, SAVES = 256, 8, 5
_SAMPLE_SECONDS = 0.001
_REST_SECONDS = 0.05
_LIMIT_SECONDS = 300.0
_NO_LOOKUPS = {"RES_OPTIONS": "attempts:0"}  # of glibc


@dataclasses.dataclass(frozen=True)
class Counted:
    """What a process holds open.

    Attributes:
        descriptors: of files and sockets.
        threads: of Python and of C.
    """

    descriptors: int
    threads: int

    @classmethod
    def now(cls) -> Counted:
        """Of this process. Listing the descriptors takes one, which is not counted."""
        time.sleep(_REST_SECONDS)  # a thread that has ended is listed for another moment
        return cls(_num_descriptors(), len(_threads()))

    def __sub__(self, other: Counted) -> Counted:
        return Counted(self.descriptors - other.descriptors, self.threads - other.threads)

    def __or__(self, other: Counted) -> Counted:
        """The larger of each."""
        return Counted(max(self.descriptors, other.descriptors), max(self.threads, other.threads))


class Peak:
    """A context in which a thread counts again and again.

    Attributes:
        most: the largest numbers so far, without the thread itself. Only a thread that is seen three times in a row
            counts: one that has ended is listed for another moment.
    """

    def __init__(self) -> None:
        self.most = Counted(0, 0)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        seen: deque[set[str]] = deque(maxlen=3)
        while not self._ends.wait(_SAMPLE_SECONDS):
            seen.append(_threads())
            lasting = set.intersection(*seen)
            self.most |= Counted(_num_descriptors(), len(lasting) - 1)


def _num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) - 1


def _threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one rank has seen. Counts are those beyond what the process held before the first construction."""

    constructed: Counted
    saving: Counted
    saved: Counted
    construction_seconds: float
    save_seconds: float
    save_cpu_seconds: float
    load_seconds: float


def tiny(layout: str) -> nn.Module:
    """Matrices, and 1-D norms between them, which FSDP2 cuts into pieces of a few bytes."""
    torch.manual_seed(0)
    parts = [(nn.Linear(WIDTH, WIDTH, bias=False), nn.LayerNorm(WIDTH)) for _ in range(DEPTH)]
    model = nn.Sequential(*[module for pair in parts for module in pair])
    if layout == "ddp":
        return DistributedDataParallel(model)
    fully_shard(model)
    return model


def measure(layout: str, folder: Path, spare: int = 0) -> list[Measured]:
    """Collective: every rank must call it, in the default group. The figures of all ranks, in rank order.

    Args:
        layout: one of `LAYOUTS`.
        folder: one of all ranks.
        spare: how many descriptors the process may open beyond those that it has; 0 for as many as before.
    """
    model = tiny(layout)
    dist.all_reduce(torch.zeros(1))
    dist.barrier()
    before = Counted.now()
    if spare:
        limit = before.descriptors + spare
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    construction, ema = _timed(lambda: ShardedEMA(model, ConstantSchedule(momentum=0.25)))
    constructed = Counted.now()
    ema.update()
    dist.barrier()
    with Peak() as peak:
        for _ in range(3):
            ema.save(folder / "ema")
    saved = Counted.now()
    saves, cpu = [], []
    for _ in range(SAVES):
        used = time.process_time()
        saves.append(_timed(lambda: ema.save(folder / "ema"))[0])
        cpu.append(time.process_time() - used)
    loads = [_timed(lambda: ema.load(folder / "ema"))[0] for _ in range(SAVES)]
    own = Measured(
        *(constructed - before, (peak.most | saved) - before, saved - before, construction),
        *map(statistics.median, (saves, cpu, loads)),
    )
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, own)
    return everybody


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Collective: every rank must call it. The seconds of a call, from the moment that all ranks begin it."""
    dist.barrier()
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


@dataclasses.dataclass(frozen=True)
class Store:
    """Where the ranks find the store of their process group.

    Attributes:
        port: of the server.
        environment: variables of the ranks.
    """

    port: int
    environment: dict[str, str]


def forked(size: int, store: Store, work: Callable[[Path], Any], folder: Path | None = None) -> list[Any]:
    """Run `work` in a new world; it gets a folder that all ranks share. The results, in rank order.

    Args:
        size: the number of ranks.
        store: of the process group.
        work: collective; its result must survive a pickle.
        folder: the folder; None for a new one, which is removed.
    """
    shared = folder or Path(tempfile.mkdtemp())
    pids: list[int] = []
    try:
        pipes = []
        for rank in range(size):
            receiving, sending = os.pipe()
            pids.append(os.fork())
            if pids[-1] == 0:
                _live(rank, size, store, lambda: work(shared), sending)
            os.close(sending)
            pipes.append(receiving)
            time.sleep(0.005)
        return _results(pipes)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if folder is None:
            shutil.rmtree(shared, ignore_errors=True)


@contextlib.contextmanager
def store_kept_by(host: str) -> Iterator[Store]:
    """The store of process groups to come. Where rank 0 keeps it, of one.

    Args:
        host: one of `HOSTS`.
    """
    os.environ.update(_NO_LOOKUPS)
    if host == "rank 0":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        yield Store(port, {})
        return
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        _be_quiet()
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(sending, str(store.port).encode())
        while True:
            signal.pause()
    try:
        port = int(os.read(receiving, 20))
        yield Store(port, {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"})
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(receiving)
        os.close(sending)


def _live(rank: int, size: int, store: Store, work: Callable[[], Any], sending: int) -> None:
    """The life of a forked rank; does not return."""
    _be_quiet()
    try:
        os.environ.update(store.environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        os.environ.update(LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=_LIMIT_SECONDS))
        told = (True, work())
        dist.barrier()
    except BaseException:
        told = (False, traceback.format_exc())
    with os.fdopen(sending, "wb") as pipe:
        pickle.dump(told, pipe)
    os._exit(0)


def _be_quiet() -> None:
    """Torch's C++ has lines of its own about lost connections and unknown names."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _results(pipes: list[int]) -> list[Any]:
    """What the ranks return, in rank order. Raises the first failure, since the others may wait for that rank."""
    results: list[Any] = [None] * len(pipes)
    waiting = set(pipes)
    try:
        while waiting:
            ready = select.select(waiting, [], [], _LIMIT_SECONDS)[0]
            if not ready:
                raise RuntimeError(f"ranks {sorted(map(pipes.index, waiting))} hang")
            for pipe in ready:
                waiting.discard(pipe)
                with os.fdopen(pipe, "rb") as stream:
                    succeeded, value = pickle.load(stream)
                if not succeeded:
                    raise RuntimeError(f"rank {pipes.index(pipe)}:\n{value}")
                results[pipes.index(pipe)] = value
    finally:
        for pipe in waiting:
            os.close(pipe)
    return results
