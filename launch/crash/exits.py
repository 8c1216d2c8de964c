"""Whether a run that has done its work ends with status 0: two ranks attach, step, save and leave at once.

    python launch/crash/exits.py               # 100 times with the average, 100 times without it, interleaved
    python launch/crash/exits.py --fresh       # the same in new interpreters: a quarter of an hour

The ranks end as scripts end: by the end of the program, with all that Python and C do then. gloo aborts there now and
then ("terminate called without an active exception"), with or without an average; a cluster calls such a run failed.
Unless they are fresh, the ranks are forked from a process that has loaded torch and runs no threads. Exit status 1 if
the runs with the average ended well less often than those without it.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from ports import free_port
from torch import nn

from dist_ema import ConstantSchedule, attach

RANKS = 2
WAYS = ("with the average", "without it")
HANG_SECONDS = 60.0


def script(folder: Path, *, averages: bool) -> None:
    """What a user's script does; one rank of it."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    ema = attach(accelerator, model, optimizer, ConstantSchedule(momentum=0.5)) if averages else None
    for _ in range(3):
        accelerator.backward(model(torch.ones(2, 64)).sum())
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(folder / "checkpoint"))
    assert ema is None or ema.num_updates == 3
    dist.destroy_process_group()


class Rank(SystemExit):
    """A forked rank is at its end: it ends by the end of its program."""


def run(averages: bool, randoms: random.Random, *, fresh: bool) -> tuple[list[int], str]:
    """The exit statuses of the ranks of one run, and what they wrote to standard error."""
    # No context, and nothing at exit: a rank would leave them too, at its own end.
    folder = Path(tempfile.mkdtemp())
    port = free_port()
    pids = []
    for rank in range(RANKS):
        pids.append(os.fork())
        if pids[-1] == 0:
            become(rank, port, folder)
            if fresh:
                os.execv(sys.executable, [sys.executable, __file__, "--be", WAYS[not averages], str(folder)])
            live(folder, averages=averages)
        time.sleep(randoms.uniform(0.0, 0.02))
    statuses, log = ended(pids), (folder / "log").read_text(errors="replace")
    shutil.rmtree(folder)
    return statuses, log


def become(rank: int, port: int, folder: Path) -> None:
    """Have this process be a rank."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 2)
    os.dup2(log, 1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")


def live(folder: Path, *, averages: bool) -> NoReturn:
    """The life of a rank. Raises a `Rank` at its end."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        script(folder, averages=averages)
    except BaseException:
        traceback.print_exc()
        raise Rank(1) from None
    raise Rank(0)


def ended(pids: Sequence[int]) -> list[int]:
    """The exit statuses; negative for a signal, -9 also for a rank that did not end: its log has where it was."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + HANG_SECONDS
    while len(statuses) < len(pids):
        for pid in set(pids) - set(statuses):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGUSR1)
                time.sleep(1.0)
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return [statuses[pid] for pid in pids]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=100, help="runs of each way")
    parser.add_argument("--seed", type=int, default=0, help="of the order, and of the moments at which ranks start")
    parser.add_argument("--fresh", action="store_true", help="start new interpreters")
    parser.add_argument("--be", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.be is not None:
        live(Path(options.be[1]), averages=options.be[0] == WAYS[0])
    torch.set_num_threads(1)
    for module in ("torch._dynamo", "torch.distributed.checkpoint"):  # else every forked rank takes seconds for them
        importlib.import_module(module)
    randoms = random.Random(options.seed)
    good: dict[str, int] = collections.Counter()
    for number in range(options.times):
        for way in randoms.sample(WAYS, len(WAYS)):
            statuses, log = run(way == WAYS[0], randoms, fresh=options.fresh)
            if statuses == [0] * RANKS:
                good[way] += 1
                continue
            hung = {-signal.SIGKILL, -signal.SIGUSR1} & {*statuses}
            words = (log if hung else log.strip().rpartition("\n")[2]) or "nothing"
            print(f"run {number} {way}: statuses {statuses}, last words: {words}", flush=True)
    for way in WAYS:
        print(f"{way}: {good[way]} of {options.times} runs ended with status 0", flush=True)
    return 1 if good[WAYS[0]] < good[WAYS[1]] else 0


if __name__ == "__main__":
    sys.exit(main())
