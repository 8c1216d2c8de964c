"""Forked processes that save or load one folder and stop on the way, so that others act at that point.

The parent has loaded torch, uses no process group and runs no threads: it forks a job in milliseconds. Linux only.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from generations import COPYING, fill
from killing import Watch
from torch import nn

from dist_ema import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError, ShardedEMA

__all__ = ["PATIENCE_SECONDS", "Job", "build", "load", "save"]

PATIENCE_SECONDS = 60.0

# How a job ended: its exit status.
ENDS = {0: "returned", 3: "told", 4: "failed", 5: "nothing there", 6: "damaged", 7: "mixed", -signal.SIGKILL: "killed"}


class Job:
    """A process that does `work` in the folder of `target`.

    Args:
        work: what it does; its error tells how it ended.
        target: the folder that the jobs share.
        stop_at: before which change in that folder, or file opened there, the job waits; None for none, 0 to count.
        delay_seconds: before it begins.
    """

    def __init__(
        self, work: Callable[[], None], target: Path, *, stop_at: int | None = None, delay_seconds: float = 0.0
    ) -> None:
        self.log = target.parent.parent / "log"
        self._events = target.parent.parent / "events"
        self._stopped, here = os.pipe()
        there, self._go = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _live(work, target.parent, stop_at, delay_seconds, here, there, self.log, self._events)
        os.close(here)
        os.close(there)

    def wait_for_stop(self) -> bool:
        """Whether it has come to where it stops; False if it has ended."""
        ready, _, _ = select.select([self._stopped], [], [], PATIENCE_SECONDS)
        return bool(ready and os.read(self._stopped, 1))

    def go_on(self) -> None:
        """Let it go on from there."""
        os.write(self._go, b".")

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self._pid, signal.SIGKILL)

    def end(self) -> str:
        """How it ended."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        try:
            while time.monotonic() < deadline:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
                if pid:
                    return ENDS.get(os.waitstatus_to_exitcode(status), "failed")
                time.sleep(0.0005)
            self.kill()
            os.waitpid(self._pid, 0)
            return "hung"
        finally:
            os.close(self._stopped)
            os.close(self._go)

    def events(self) -> list[str]:
        """What it has done in the folder, in order; of a job that has ended and counted."""
        return self._events.read_text().splitlines()


def _live(
    work: Callable[[], None],
    folder: Path,
    stop_at: int | None,
    delay_seconds: float,
    stopped: int,
    go: int,
    log: Path,
    events: Path,
) -> None:
    """The life of a forked job; does not return."""

    def reached(number: int) -> None:
        if number == stop_at:
            os.write(stopped, b".")
            os.read(go, 1)

    codes = {end: code for code, end in ENDS.items()}
    code = codes["failed"]
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        logging.disable()
        watch = Watch(reached, reads=True, under=folder)
        time.sleep(delay_seconds)
        watch.counts = stop_at is not None
        work()
        watch.counts = False
        if stop_at == 0:
            events.write_text("\n".join(watch.seen))
        code = codes["returned"]
    except BaseException as error:
        kinds = {
            CheckpointNotFoundError: "nothing there",
            CheckpointCorruptError: "damaged",
            CheckpointError: "told",
            ArithmeticError: "mixed",
        }
        code = codes[next((end for kind, end in kinds.items() if isinstance(error, kind)), "failed")]
        with log.open("a") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(code)


def build() -> nn.Module:
    """Three files of 2 KB, an index, and a buffer."""
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    model.register_buffer("running", torch.zeros(7))
    return model


def save(target: Path, generation: int) -> Callable[[], None]:
    """The work of a job that saves one generation: all values are its number, and so is the number of updates."""
    model = build()
    fill(model, generation)
    ema = ShardedEMA(model, COPYING)
    for _ in range(generation):
        ema.update()
    return lambda: ema.save(target, max_shard_size=2100)


def load(target: Path, *, verify: bool) -> Callable[[], None]:
    """The work of a job that loads what is there, and looks whether it is of one generation."""
    ema = ShardedEMA(build(), COPYING)

    def work() -> None:
        ema.load(target, verify=verify)
        for name, values in ema.full_state_dict().items():
            if name != "running" and not bool((values == ema.num_updates).all()):
                raise ArithmeticError(f"{name} holds {values.unique().tolist()}, of {ema.num_updates} updates")

    return work
