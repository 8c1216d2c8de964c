"""Worlds of real ranks on loopback: what a rank holds open for the average, and what its calls take.

The process that starts them has loaded torch and runs no threads: it forks the ranks, which saves some seconds and most
of the memory of each. Linux only. The store of the process group is kept by a process of its own, as torchrun's agent
keeps it ("agent"), or by rank 0, as under `env://` without an agent ("rank 0").
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import pickle
import shutil
import signal
import socket
import statistics
import tempfile
import threading
import time
import traceback
import warnings
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

__all__ = ["HOSTS", "LAYOUTS", "Counted", "Measured", "Peak", "forked", "measure"]

HOSTS = ("agent", "rank 0")
LAYOUTS = ("ddp", "fsdp2")
WIDTH, DEPTH, SAVES = 256, 8, 5
_SAMPLE_SECONDS = 0.001
_LIMIT_SECONDS = 300.0


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
        return cls(len(os.listdir("/proc/self/fd")) - 1, len(os.listdir("/proc/self/task")))

    def __sub__(self, other: Counted) -> Counted:
        return Counted(self.descriptors - other.descriptors, self.threads - other.threads)

    def __or__(self, other: Counted) -> Counted:
        """The larger of each."""
        return Counted(max(self.descriptors, other.descriptors), max(self.threads, other.threads))


class Peak:
    """A context in which a thread counts again and again.

    Attributes:
        most: the largest numbers so far, without the thread itself.
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
        while not self._ends.wait(_SAMPLE_SECONDS):
            self.most |= Counted.now() - Counted(0, 1)


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


def measure(layout: str, folder: Path) -> list[Measured]:
    """Collective: every rank must call it, in the default group. The figures of all ranks, in rank order."""
    model = tiny(layout)
    dist.all_reduce(torch.zeros(1))
    dist.barrier()
    before = Counted.now()
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


def forked(size: int, host: str, work: Callable[[Path], Any]) -> list[Any]:
    """Run `work` in a new world; it gets a folder that all ranks share. The results, in rank order.

    Args:
        size: the number of ranks.
        host: one of `HOSTS`.
        work: collective; its result must survive a pickle.
    """
    folder = Path(tempfile.mkdtemp())
    pids: list[int] = []
    try:
        with _store(host) as (port, environment):
            pipes = []
            for rank in range(size):
                receiving, sending = os.pipe()
                pids.append(os.fork())
                if pids[-1] == 0:
                    _live(rank, size, port, environment, lambda: work(folder), sending)
                os.close(sending)
                pipes.append(receiving)
                time.sleep(0.005)
            return [_result(pipe, rank) for rank, pipe in enumerate(pipes)]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _store(host: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The port of the store, and the variables of the ranks."""
    if host == "rank 0":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        yield port, {}
        return
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(sending, str(store.port).encode())
        while True:
            signal.pause()
    try:
        yield int(os.read(receiving, 20)), {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(receiving)
        os.close(sending)


def _live(rank: int, size: int, port: int, environment: dict[str, str], work: Callable[[], Any], sending: int) -> None:
    """The life of a forked rank; does not return."""
    try:
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        os.environ.update(LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
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


def _result(pipe: int, rank: int) -> Any:
    with os.fdopen(pipe, "rb") as stream:
        succeeded, value = pickle.load(stream)
    if not succeeded:
        raise RuntimeError(f"rank {rank}:\n{value}")
    return value
