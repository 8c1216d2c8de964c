"""A rank that is late, dies, makes another call, or is interrupted: how soon the others know, and what comes after.

    python launch/crash/rank_losses.py               # each case ten times: some minutes
    python launch/crash/rank_losses.py --times 3 --cases killed_while_awaited

Four ranks, forked from a process that has loaded torch. Told is, for each case, the slowest end of any rank, counted
from the moment that the cause was there. Exit status 1 if a rank ended too late, or otherwise than the others.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib
import logging
import os
import pickle
import random
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from ports import free_port
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ConstantSchedule, DistEMAError, ShardedEMA
from dist_ema.checkpoint import parcels
from dist_ema.ranks.store import presence

SIZE = 4
NOTICE_SECONDS = 0.5
HANG_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class End:
    """How a rank ended.

    Attributes:
        at: when its call ended, by the clock that all processes of a machine share.
        kind: the class of the error, "" for none.
        text: of the error.
        lines: what it has logged.
        cause: when the cause was there, on the rank that is one.
        failure: the traceback of what went wrong otherwise.
    """

    at: float = 0.0
    kind: str = ""
    text: str = ""
    lines: tuple[str, ...] = ()
    cause: float = 0.0
    failure: str = ""


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Rank:
    """One rank of a trial.

    Attributes:
        rank: which.
        odd: which rank is the odd one.
        folder: a folder of all ranks.
    """

    def __init__(self, rank: int, odd: int, folder: Path) -> None:
        self.rank, self.odd, self.folder = rank, odd, folder
        self._lines = Lines()
        logging.getLogger("dist_ema").addHandler(self._lines)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
        self.ema = ShardedEMA(DistributedDataParallel(net), ConstantSchedule(momentum=0.5))
        self.ema.update()
        self.ema.save(folder / "ema")
        dist.barrier()

    @property
    def is_odd(self) -> bool:
        return self.rank == self.odd

    def save(self) -> None:
        self.ema.save(self.folder / "ema")

    def end_of(self, call: Callable[[], object], cause: float = 0.0) -> End:
        """Make a call, and see how it ends."""
        kind = text = ""
        try:
            call()
        except (DistEMAError, KeyboardInterrupt) as error:
            kind, text = type(error).__name__, str(error)
        return End(time.monotonic(), kind, text, tuple(self._lines.lines), cause)

    def die(self) -> NoReturn:
        """SIGKILL to this process, which leaves its time behind."""
        (self.folder / "cause").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def go_on(self) -> None:
        """Collective: every rank must call it. What works after an error that all ranks have outlived."""
        self.save()
        self.ema.load(self.folder / "ema")
        assert self.ema.num_updates == 1


def late(rank: Rank) -> End:
    """Three times as late as the others wait before rank 0 logs it."""
    cause = 0.0
    if rank.is_odd:
        time.sleep(3 * NOTICE_SECONDS)
        cause = time.monotonic()
    end = rank.end_of(rank.save, cause)
    rank.go_on()
    return end


def killed_while_awaited(rank: Rank) -> End:
    """It dies on its way to the call in which the others wait for it."""
    if rank.is_odd:
        time.sleep(1.0)
        rank.die()
    return rank.end_of(rank.save)


def killed_in_a_save(rank: Rank) -> End:
    """It dies with bytes in its hands that others wait for."""
    if rank.is_odd:
        setattr(parcels.Part, "copy_to", lambda *arguments: rank.die())  # noqa: B010
    return rank.end_of(rank.save)


def elsewhere(rank: Rank) -> End:
    """It makes another call than the others."""
    end = rank.end_of(rank.ema.metrics if rank.is_odd else rank.save, time.monotonic())
    rank.go_on()
    return end


def interrupted(rank: Rank) -> End:
    """Ctrl-C on one rank that waits for a late one: it ends the call for all, also for the late one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cause = 0.0
    if rank.is_odd:
        time.sleep(2.0)
        cause = time.monotonic()
    elif rank.rank == (rank.odd + 1) % SIZE:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    end = rank.end_of(rank.save, cause or time.monotonic() + 1.0)
    rank.go_on()
    return end


@dataclasses.dataclass(frozen=True)
class Case:
    """What is tried.

    Attributes:
        live: what each rank does.
        limit_seconds: the longest time from the cause to the end of a rank.
        kinds: the errors that may end the call on a rank.
        is_told: whether rank 0 logs that it waits, if it is not the odd one.
        num_machines: over how many the ranks are spread, as far as they know.
        name: of the case, if it is not that of `live`.
    """

    live: Callable[[Rank], End]
    limit_seconds: float
    kinds: tuple[str, ...]
    is_told: bool = False
    num_machines: int = 1
    name: str = ""


CASES = {
    case.name or case.live.__name__: case
    for case in (
        Case(late, 10.0, ("",), is_told=True),
        Case(killed_while_awaited, 10.0, ("CommunicationError",)),
        Case(killed_while_awaited, 10.0, ("CommunicationError",), num_machines=2, name="killed_on_another_machine"),
        Case(killed_in_a_save, 10.0, ("CommunicationError",)),
        Case(elsewhere, 5.0, ("RankMismatchError", "CommunicationError")),
        Case(interrupted, 1.0, ("KeyboardInterrupt", "CommunicationError")),
    )
}


def tried(case: Case, odd: int, host: str) -> tuple[float, list[str]]:
    """Run a case once. The slowest end in seconds, and what was wrong.

    Args:
        case: which.
        odd: the odd rank.
        host: who keeps the store of the process group: "agent", a process of its own, or "rank 0".
    """
    folder = Path(tempfile.mkdtemp())
    pids: list[int] = []
    try:
        port, environment = _port(host, pids)
        pipes = []
        for rank in range(SIZE):
            receiving, sending = os.pipe()
            pids.append(os.fork())
            if pids[-1] == 0:
                environment.update(RANK=str(rank), MASTER_PORT=str(port))
                _live(case, rank, odd, folder, environment, sending)
            os.close(sending)
            pipes.append(receiving)
        ends = [_end(pipe) for pipe in pipes]
        is_dead = (folder / "cause").exists()
        if is_dead:
            ends[odd] = End(cause=float((folder / "cause").read_text()))
        return _judged(case, odd, ends, is_dead=is_dead)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        shutil.rmtree(folder, ignore_errors=True)


def _judged(case: Case, odd: int, ends: Sequence[End | None], *, is_dead: bool) -> tuple[float, list[str]]:
    """What `tried` returns. Ranks that have lost their store, and so each other, say the same nevertheless."""
    wrong = [f"rank {rank} hangs" for rank, end in enumerate(ends) if end is None]
    wrong += [f"rank {rank}: {end.failure}" for rank, end in enumerate(ends) if end is not None and end.failure]
    if wrong:
        return HANG_SECONDS, wrong
    told = [end for end in ends if end is not None]
    living = [end for rank, end in enumerate(told) if rank != odd or not is_dead]
    wrong += [f"ended by {end.kind or 'nothing'}: {end.text}" for end in living if end.kind not in case.kinds]
    texts = {end.text for end in living if end.kind != "KeyboardInterrupt"}
    if len(texts) > 1:
        wrong.append(f"told differently: {sorted(texts)}")
    seconds = max(end.at - (end.cause or told[odd].cause) for end in living)
    if seconds > case.limit_seconds:
        wrong.append(f"took {seconds:.1f} s")
    lines = [line for rank, end in enumerate(told) for line in end.lines if (rank, odd) != (0, 0)]
    if case.is_told and len(lines) != (odd != 0):
        wrong.append(f"logged: {lines}")
    return seconds, wrong


def _port(host: str, pids: list[int]) -> tuple[int, dict[str, str]]:
    """The port of the store, and the variables of the ranks."""
    environment = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(SIZE), "DIST_EMA_NOTICE_SECONDS": str(NOTICE_SECONDS)}
    if host == "rank 0":
        return free_port(), environment
    receiving, sending = os.pipe()
    pids.append(os.fork())
    if pids[-1] == 0:
        _be_quiet()
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(sending, str(store.port).encode())
        while True:
            signal.pause()
    with os.fdopen(receiving, "rb") as pipe:
        os.close(sending)
        port = int(pipe.read1())
    return port, environment | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


def _live(case: Case, rank: int, odd: int, folder: Path, environment: dict[str, str], sending: int) -> None:
    """The life of a forked rank; does not return."""
    _be_quiet()
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        if case.num_machines > 1:
            setattr(presence, "host_identity", lambda: f"machine {rank % case.num_machines}")  # noqa: B010
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2 * HANG_SECONDS))
        end = case.live(Rank(rank, odd, folder))
    except BaseException:
        end = End(failure=traceback.format_exc())
    with os.fdopen(sending, "wb") as pipe:
        pickle.dump(end, pipe)
    signal.pause()  # until all have ended: a process that ends would close connections
    os._exit(0)


def _be_quiet() -> None:
    """Torch's C++ has lines of its own about lost connections and unknown names."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _end(pipe: int) -> End | None:
    """How a rank ended; None if it did not."""
    with os.fdopen(pipe, "rb") as stream, contextlib.suppress(EOFError):
        if select.select([stream], [], [], HANG_SECONDS)[0]:
            told: Any = pickle.load(stream)
            return told if isinstance(told, End) else None
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--times", type=int, default=10, help="how often each case is tried")
    parser.add_argument("--seed", type=int, default=0, help="of the odd rank, and of who keeps the store")
    options = parser.parse_args(arguments)
    for module in ("torch._dynamo", "torch.distributed.checkpoint"):
        importlib.import_module(module)
    randoms, num_bad = random.Random(options.seed), 0
    for name in options.cases:
        slowest, bad = 0.0, []
        for _ in range(options.times):
            odd, host = randoms.randrange(SIZE), randoms.choice(("agent", "rank 0"))
            seconds, wrong = tried(CASES[name], odd, host)
            slowest = max(slowest, seconds)
            bad += [f"rank {odd} is the odd one, {host} keeps the store: {each}" for each in wrong]
        print(f"{name:25} {options.times} times, slowest {slowest:.2f} s, {len(bad)} bad", flush=True)
        for each in bad[:10]:
            print(f"    {each[-600:]}", flush=True)
        num_bad += len(bad)
    print(f"{len(options.cases) * options.times} trials, {num_bad} bad")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
