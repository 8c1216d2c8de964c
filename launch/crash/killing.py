"""Ranks that save generation after generation over one folder, and are killed on the way.

The process of `Trials` has loaded torch and uses no process group, so it can fork the ranks of each trial: that takes a
fraction of a second, a new interpreter takes several. Not for a process that runs threads. Linux only.

SIGKILL leaves what the kernel has taken. What a power cut would take from it is not tried here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import importlib
import mmap
import os
import shutil
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from generations import ADDED, ADDED_TEXT, COPYING, MAX_SHARD_SIZE, TOKEN, beside, build, fill, outcome_of

from dist_ema import CommunicationError, ShardedEMA

# A survivor that has not ended by then hangs: ranks wait for minutes for the others, unless a connection closes. The
# slowest is told in the table.
HANG_SECONDS = 40.0
# For all else that a trial waits for.
PATIENCE_SECONDS = 60.0

_TOLD, _FAILED = 3, 4  # exit codes: a CommunicationError, any other error

# What the wrappers and the average load at their first use: loaded once here, not in every rank of every trial.
_SLOW_TO_LOAD = ("torch._dynamo", "torch.distributed.checkpoint")

# Audit events of what changes names, contents or sizes in the file system; an open counts if it is for writing.
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate")


@dataclasses.dataclass(frozen=True)
class Kill:
    """Who is killed, and when.

    Attributes:
        victims: ranks.
        save: in which save of the trial: 1, which finds what the kill before left behind, or 2, which finds nothing.
        seconds: how long after the save began.
        event: instead of `seconds`: just before which change in the file system, counted from 1, that the first
            victim makes in that save. 0 kills nobody and lists them.
        layout: "ddp" or "fsdp2".
        background: whether the ranks save in the background. They have done so before, elsewhere: the first such save
            makes a process group, and a rank that dies then lets the others wait for 30 s, which has a test of its own.
    """

    victims: tuple[int, ...]
    save: int = 2
    seconds: float = 0.0
    event: int | None = None
    layout: str = "fsdp2"
    background: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a kill.

    Attributes:
        kill: which.
        inside: some victim died before its save had returned.
        outcome: "old", "new" or "neither".
        reason: what is wrong where it is neither.
        beside: what lay beside the folder afterwards.
        survivors: how many ranks were not killed.
        told: how many of these ended with a `CommunicationError`.
        hung: how many of these did not end.
        seconds: from the kill to the end of the last rank.
        log: what the ranks said, where not all survivors were told.
    """

    kill: Kill
    inside: bool
    outcome: str
    reason: str
    beside: tuple[str, ...]
    survivors: int
    told: int
    hung: int
    seconds: float
    log: str

    @property
    def good(self) -> bool:
        """The folder is whole, and every survivor was told."""
        return self.outcome != "neither" and self.told == self.survivors


class Trials:
    """Kills over one folder: each goes on from what the one before left.

    Args:
        folder: an empty one; the checkpoint is `saves/ema` in it.
        size: how many ranks.
    """

    def __init__(self, folder: Path, size: int) -> None:
        torch.set_num_threads(1)
        for module in _SLOW_TO_LOAD:
            importlib.import_module(module)
        self.target = folder / "saves" / "ema"
        self.target.parent.mkdir()
        self.size = size
        self.generation = 0
        self._folder = folder
        self._seconds: dict[tuple[str, bool], list[float]] = {}

    def undisturbed(self, like: Kill, saves: int = 1) -> None:
        """Save and kill nobody. Everything that earlier kills left must be gone after it."""
        with self._forked(dataclasses.replace(like, victims=(), event=None)) as ranks:
            for _ in range(saves):
                self._whole_save(ranks)
        if not (self.target / ADDED).exists():
            (self.target / ADDED).write_text(ADDED_TEXT)

    def save_seconds(self, layout: str, background: bool) -> float:
        """The median time of such saves so far, of those that nobody disturbed."""
        return statistics.median(self._seconds[layout, background])

    def events(self, like: Kill) -> list[str]:
        """The changes in the file system that the first victim makes in the save of `like`, in order."""
        with self._forked(dataclasses.replace(like, event=0)) as ranks:
            for _ in range(like.save):
                self._whole_save(ranks)
            return ranks.events.read_text().splitlines()

    def kill(self, kill: Kill) -> Result:
        """Save, kill, and look what is there."""
        with self._forked(kill) as ranks:
            if kill.save == 2:
                self._whole_save(ranks)
            armed = self.generation + 1
            ranks.allow(armed + 1_000_000)
            if kill.event is None:
                ranks.wait(lambda: max(ranks.begun) >= armed)
                time.sleep(kill.seconds)
            else:  # a save that has fewer changes is followed by the next one
                ranks.wait(lambda: kill.victims[0] in ranks.exits or ranks.begun[kill.victims[0]] > armed)
            ranks.kill(kill.victims)
            killed = time.monotonic()
            survivors = set(range(self.size)) - set(kill.victims)
            ended = ranks.end(HANG_SECONDS)
            seconds = time.monotonic() - killed
            ranks.ask_where(survivors - ended.keys())
            told = [rank for rank in survivors if ended.get(rank) == _TOLD]
            new = max(ranks.begun)
            outcome, reason = outcome_of(self.target, new, returned=max(ranks.ended) == new)
            self.generation = new - 1 if outcome == "old" else new
            return Result(
                kill=kill,
                inside=any(ranks.ended[victim] < armed for victim in kill.victims),
                outcome=outcome,
                reason=reason,
                beside=tuple(beside(self.target)),
                survivors=len(survivors),
                told=len(told),
                hung=len(survivors - ended.keys()),
                seconds=seconds,
                log=ranks.log.read_text() if len(told) < len(survivors) else "",
            )

    def _whole_save(self, ranks: _Ranks) -> None:
        generation = self.generation + 1
        ranks.allow(generation)
        ranks.wait(lambda: min(ranks.ended) >= generation)
        if (self.target / ADDED).exists():
            outcome, reason = outcome_of(self.target, generation, returned=True)
            if outcome != "new" or beside(self.target):
                raise RuntimeError(f"nobody disturbed the save: {reason or 'whole'}; beside it: {beside(self.target)}")
        self.generation = generation
        key = ranks.plan.layout, ranks.plan.background
        self._seconds.setdefault(key, []).append(max(ranks.took_ns) / 1e9)

    @contextlib.contextmanager
    def _forked(self, plan: Kill) -> Iterator[_Ranks]:
        scratch = self._folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        ranks = _Ranks(scratch, self.size, self.target, plan, self.generation + plan.save)
        try:
            yield ranks
        finally:
            ranks.kill(range(self.size))
            ranks.end(PATIENCE_SECONDS)


class _Ranks:
    """Forked ranks. What they tell lies in memory that they share with the parent, so it outlives a kill."""

    def __init__(self, scratch: Path, size: int, target: Path, plan: Kill, armed: int) -> None:
        self.plan = plan
        self.log = scratch / "log"
        self.events = scratch / "events"
        self.exits: dict[int, int] = {}
        self._store = scratch / "store"
        self._size = size
        self._target = target
        self._armed = armed
        cells = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
        # The generations of the latest save that each rank has begun and has returned from, and the time between.
        self.begun, self.ended, self.took_ns, self._pids, self._allowed = (
            cells[at : at + size] for at in range(0, 5 * size, size)
        )
        self.log.touch()
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                self._live(rank)
            self._pids[rank] = pid

    def allow(self, generation: int) -> None:
        """Let the ranks save up to this generation."""
        self._allowed[0] = generation

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for the ranks to come somewhere."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            self._reap()
            failed = [rank for rank, code in self.exits.items() if code == _FAILED]
            if failed or time.monotonic() > deadline:
                raise RuntimeError(f"ranks {failed} failed, of {self.plan}\n{self.log.read_text()}")
            time.sleep(0.0002)

    def kill(self, victims: Sequence[int]) -> None:
        """SIGKILL."""
        for rank in victims:
            if rank not in self.exits:
                os.kill(self._pids[rank], signal.SIGKILL)

    def ask_where(self, hung: Iterable[int]) -> None:
        """Have ranks write the stacks of their threads to the log."""
        for rank in hung:
            os.kill(self._pids[rank], signal.SIGUSR1)
            time.sleep(0.5)

    def end(self, seconds: float) -> dict[int, int]:
        """Wait for all ranks to end, for so long. The exit codes of those that did; negative for a signal."""
        deadline = time.monotonic() + seconds
        while len(self.exits) < self._size and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.001)
        return dict(self.exits)

    def _reap(self) -> None:
        for rank in range(self._size):
            if rank not in self.exits:
                pid, status = os.waitpid(self._pids[rank], os.WNOHANG)
                if pid:
                    self.exits[rank] = os.waitstatus_to_exitcode(status)

    def _live(self, rank: int) -> None:
        """The life of a forked rank; does not return."""
        code = _FAILED
        try:
            os.dup2(os.open(self.log, os.O_WRONLY | os.O_APPEND), 2)
            faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
            self._save_on(rank)
        except CommunicationError:
            code = _TOLD
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)

    def _save_on(self, rank: int) -> None:
        """Save generation after generation, as far as allowed."""
        if self._size > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{self._store}",
                rank=rank,
                world_size=self._size,
                timeout=datetime.timedelta(seconds=PATIENCE_SECONDS),
            )
        torch.set_num_threads(1)
        model = build(self.plan.layout if self._size > 1 else "plain", self._size)
        ema = ShardedEMA(model, COPYING)
        if self._armed > self.plan.save:  # there is one
            ema.load(self._target)
        if self.plan.background:
            ema.save(self._store.with_name("elsewhere"), background=True)
        watch = Watch(self._reached) if self.plan.event is not None and rank == self.plan.victims[0] else None
        while True:
            generation = ema.num_updates + 1
            fill(model, generation)
            ema.update()
            while self._allowed[0] < generation:
                time.sleep(0.0002)
            began_ns = time.monotonic_ns()
            self.begun[rank] = generation
            if watch is not None:
                watch.counts = generation == self._armed
            ema.save(self._target, max_shard_size=MAX_SHARD_SIZE, background=self.plan.background)
            ema.wait()
            if self.plan.event == 0 and watch is not None and watch.counts:
                watch.counts = False
                self.events.write_text("\n".join(watch.seen))
            self.took_ns[rank] = time.monotonic_ns() - began_ns
            self.ended[rank] = generation

    def _reached(self, number: int) -> None:
        """The first victim is about to make a change: the one before which all victims die?"""
        if number == self.plan.event:
            for rank in reversed(self.plan.victims):
                os.kill(self._pids[rank], signal.SIGKILL)


class Watch:
    """Counts the changes that this process makes in the file system, and tells each before it is made.

    Args:
        tell: called with the number of the change, from 1.
        reads: whether files that are opened for reading count too.
        under: only what lies in this folder counts; None for everything.
    """

    def __init__(self, tell: Callable[[int], None], *, reads: bool = False, under: Path | None = None) -> None:
        self.counts = False
        self.seen: list[str] = []
        self._tell = tell
        self._reads = reads
        self._under = under
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.counts:
            return
        if event in _CHANGES or (event == "open" and (self._reads or arguments[2] & (os.O_WRONLY | os.O_RDWR))):
            paths = [Path(os.fsdecode(name)) for name in arguments[:2] if isinstance(name, str | bytes | Path)]
            if self._under is None or any(path.is_relative_to(self._under) for path in paths):
                names = [TOKEN.sub("-TOKEN", path.name) for path in paths]
                self.seen.append(" ".join([event.removeprefix("os."), *names]))
                self._tell(len(self.seen))
