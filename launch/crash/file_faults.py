"""Fails each file operation and each allocation of a save or load once, on each rank, and looks what comes of it.

    OMP_NUM_THREADS=1 python launch/crash/file_faults.py                # every point; minutes
    OMP_NUM_THREADS=1 python launch/crash/file_faults.py --every 10

Two ranks, DDP and FSDP2. For each action the calls are counted first; then the first call of the first operation fails
on rank 0, then the second, and so on; then the same on rank 1. Each time all ranks must end alike within seconds: with
the same error of the package, or none where the failure does no harm. The folder must be the whole old or the whole new
one, the average in memory as it was, and the same call must succeed when nothing fails.
Exit status 1 if any point was bad.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from faults import Faults
from generations import ADDED, ADDED_TEXT, beside, fill
from ports import free_port
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dist_ema
from dist_ema import CosineSchedule, DistEMAError, ShardedEMA
from dist_ema.disk.formats.headers import read_model_folder
from dist_ema.disk.formats.model_files import dtype_of
from dist_ema.disk.saved_average import damaged_tensors, read_saved, stored_bytes

# Update 0 copies the live values, every later one has momentum 1: the average is the live values, exactly.
COPYING = CosineSchedule(momentum=0.5, end_momentum=1.0, total_steps=1)
LAYOUTS = ("ddp", "fsdp2")
# A rank that has not ended by then let the others wait.
SLOW_SECONDS = 10.0
# A sweep that makes no step for so long hangs.
HANG_SECONDS = 90.0
HEAD = ("layout", "action", "points", "same error", "no harm", "raised, yet new", "left beside", "bad", "slowest s")


class Model(nn.Module):
    """2.4 MB: under DDP long stretches, written in place; else short ones that are exchanged; buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(700, 700)
        self.uneven = nn.Linear(301, 301)
        self.narrow = nn.Linear(5, 3)
        self.register_buffer("running", torch.zeros(1001))
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))


@dataclasses.dataclass
class Row:
    """What came of the points of one action."""

    layout: str
    action: str
    points: int = 0
    same_error: int = 0
    no_harm: int = 0
    raised_yet_new: int = 0
    left_beside: int = 0
    bad: list[str] = dataclasses.field(default_factory=list)
    slowest_seconds: float = 0.0

    def told(self) -> str:
        """The row of the table."""
        numbers = (self.points, self.same_error, self.no_harm, self.raised_yet_new, self.left_beside, len(self.bad))
        return f"| {self.layout} | {self.action} | {' | '.join(map(str, numbers))} | {self.slowest_seconds:.1f} |"


class Trial:
    """The average of one layout on this rank, and the folders that it is saved to and loaded from."""

    def __init__(self, layout: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.layout = layout
        self.model: nn.Module = Model()
        if layout == "ddp":
            self.model = DistributedDataParallel(self.model)
        else:
            fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.folder = folder / layout
        self.ema = ShardedEMA(self.model, COPYING)
        self.value = 0
        self.step()
        self.ema.save(self.folder / "good")
        self.good = self.value
        self.step()

    def step(self) -> None:
        """Make another value that of every live and averaged element."""
        self.value += 1
        fill(self.model, self.value)
        self.ema.update()

    def in_memory(self) -> str:
        """What is wrong with the average in memory; collective, and itself a call after a failure."""
        state = self.ema.full_state_dict()
        parameters = (values for name, values in state.items() if name not in ("running", "count"))
        found = {float(value) for values in parameters for value in values.unique()}
        return "" if found <= {self.value} else f"the average holds {sorted(found)[:4]}, expected {self.value}"


@dataclasses.dataclass(frozen=True)
class Action:
    """Something that all ranks do.

    Attributes:
        run: it.
        writes: folder that it writes, in that of the trial; None if it writes none.
        anew: whether the folder is another one each time.
        loaded: whether the average in memory becomes that of the good folder.
    """

    run: Callable[[Trial, Path], object]
    writes: str | None = None
    anew: bool = False
    loaded: bool = False


def in_background(trial: Trial, folder: Path) -> None:
    try:
        trial.ema.save(folder, background=True)
    finally:
        trial.ema.wait()


ACTIONS = {
    "save": Action(lambda trial, folder: trial.ema.save(folder), "ema"),
    "save to a new folder": Action(lambda trial, folder: trial.ema.save(folder), "new", anew=True),
    "background save": Action(in_background, "behind"),
    "snapshot": Action(lambda trial, folder: trial.ema.snapshot(folder.parent), "snapshots", anew=True),
    "consolidate": Action(lambda trial, folder: trial.ema.consolidate(folder), "export"),
    "load": Action(lambda trial, folder: trial.ema.load(trial.folder / "good"), loaded=True),
    "start_from": Action(lambda trial, folder: trial.ema.start_from(trial.folder / "good"), loaded=True),
    "full_state_dict": Action(lambda trial, folder: trial.ema.full_state_dict()),
    "construction": Action(lambda trial, folder: ShardedEMA(trial.model, COPYING)),
}


class Sweep:
    """All points of all actions, on this rank. Collective: every rank must make it and call its methods."""

    def __init__(self, folder: Path, tick: Callable[[], None] = lambda: None, faults: Faults | None = None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.folder = folder
        self._tick = tick
        self.faults = faults or Faults()
        self._trials: dict[str, Trial] = {}
        self._number = 0

    def run(self, layout: str, name: str, every: int = 1, first: int = 0, call: str = "") -> Row:
        """Each point of an action, or one in `every`, from number `first`; the same row on every rank."""
        if layout not in self._trials:
            self._trials[layout] = Trial(layout, self.folder)
        trial, action, row = self._trials[layout], ACTIONS[name], Row(layout, name)
        target = self._target(trial, action)
        self._undisturbed(trial, action, target)
        if not action.anew and action.writes is not None and self.rank == 0:
            (target / ADDED).write_text(ADDED_TEXT)
        self._undisturbed(trial, action, self._target(trial, action))
        counts = self._everywhere(dict(self.faults.counts))
        points = [
            (rank, name, number)
            for rank in range(self.size)
            for name in sorted(counts[rank])
            for number in range(1, 1 + counts[rank][name])
            if call in ("", name)
        ]
        for point in points[first::every]:
            self._tick()
            self._point(trial, action, row, point)
        return row

    def _target(self, trial: Trial, action: Action) -> Path:
        """The folder to write next."""
        if action.writes == "snapshots":
            return trial.folder / "snapshots" / f"updates-{trial.ema.num_updates + 1:09d}"
        self._number += action.anew
        return trial.folder / f"{action.writes}{self._number if action.anew else ''}"

    def _everywhere(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def _undisturbed(self, trial: Trial, action: Action, target: Path) -> str:
        """Do it, and nothing fails. Returns what is wrong then, the same on every rank."""
        trial.step()
        with self.faults.counting():
            kind, text, _ = caught(lambda: action.run(trial, target))
        return self._judged(trial, action, target, [(kind, text)], returned=True)

    def _point(self, trial: Trial, action: Action, row: Row, point: tuple[int, str, int]) -> None:
        rank, call, number = point
        target, former = self._target(trial, action), trial.value
        trial.step()
        with self.faults.counting((call, number) if rank == self.rank else None):
            ended = caught(lambda: action.run(trial, target))
        results = self._everywhere((*ended, bool(self.faults.failed)))
        told = {(kind, text) for kind, text, _, _ in results}
        seconds = max(result[2] for result in results)
        row.points += 1
        row.slowest_seconds = max(row.slowest_seconds, seconds)
        wrong = ""
        if not results[rank][3]:
            wrong = "the call was not made"
        elif len(told) > 1:
            wrong = "the ranks ended differently"
        elif seconds > SLOW_SECONDS:
            wrong = f"the last rank ended after {seconds:.0f} s"
        returned = ("", "") in told
        row.no_harm += returned and len(told) == 1
        row.same_error += not returned and len(told) == 1
        wrong = wrong or self._judged(trial, action, target, sorted(told), returned=returned, former=former, row=row)
        again = self._undisturbed(trial, action, self._target(trial, action) if action.anew else target)
        wrong = wrong or (f"afterwards: {again}" if again else "")
        if wrong:
            row.bad.append(f"{trial.layout}, {row.action}, call {number} of {call} on rank {rank}: {wrong}; {results}")

    def _judged(
        self,
        trial: Trial,
        action: Action,
        target: Path,
        told: Sequence[tuple[str, str]],
        *,
        returned: bool,
        former: int | None = None,
        row: Row | None = None,
    ) -> str:
        """What is wrong, the same on every rank."""
        for kind, text in told:
            if kind and not issubclass(getattr(dist_ema, kind, Exception), DistEMAError):
                return f"{kind} is no error of the package: {text}"
            if kind and row is None:
                return f"{kind}: {text}"
        if action.loaded and returned:
            expected, trial.value = trial.value, trial.good
            wrong = trial.in_memory()
            trial.value = expected
        else:
            wrong = trial.in_memory()
        if self.rank == 0 and action.writes is not None:
            wrong = wrong or self._wrong_folder(trial, action, target, returned, former, row)
        return next((each for each in self._everywhere(wrong) if each), "")

    def _wrong_folder(
        self, trial: Trial, action: Action, target: Path, returned: bool, former: int | None, row: Row | None
    ) -> str:
        try:
            value: int | None = value_of(target)
        except (DistEMAError, OSError, ValueError) as error:
            if returned or (not action.anew and former is not None):
                return f"{type(error).__name__}: {error}"
            value = None
        if returned and value != trial.value:
            return f"the folder holds {value}, expected {trial.value}"
        if not returned and value not in ((None, trial.value) if action.anew else (former, trial.value)):
            return f"the folder holds {value}, expected {former} or {trial.value}"
        if not action.anew and (target / ADDED).exists() and (target / ADDED).read_text() != ADDED_TEXT:
            return "the file that somebody added is another"
        if row is not None:
            row.raised_yet_new += not returned and value == trial.value
            row.left_beside += any(name.startswith(".") for name in beside(target))
        return ""


def caught(call: Callable[[], object]) -> tuple[str, str, float]:
    """Class and text of the error, empty if there is none, and the seconds it took."""
    began = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "", "", time.monotonic() - began


def value_of(target: Path) -> int:
    """The value that all elements of the floating-point tensors in a folder have.

    Raises:
        DistEMAError: something is missing or damaged.
        ValueError: checksums differ, or there are several values.
    """
    if (target / "manifest.json").exists():
        saved = read_saved(target)
        damaged = [name for name, _, is_damaged in damaged_tensors(saved) if is_damaged]
        if damaged:
            raise ValueError(f"checksums differ: {damaged[:3]}")
        folder, model = saved.folder, next(iter(saved.models.values()))
    else:
        folder, model = target, read_model_folder(target)
    found = set()
    for stored in model.tensors.values():
        for piece in stored_bytes(folder, stored):
            found |= set(torch.frombuffer(piece, dtype=dtype_of(stored)).unique().tolist())
    if len(found) != 1:
        raise ValueError(f"the folder holds the values {sorted(found)[:5]}")
    return int(found.pop())


_sweeps: list[Sweep] = []


def sweep_here(folder: str, layout: str, every: Mapping[str, int], call: str = "") -> list[Row]:
    """Collective: every rank must call it. Rows of some actions, for ranks that somebody else has started.

    Args:
        folder: an empty one, the same on every rank.
        layout: of the model.
        every: action -> one in how many points.
        call: only those of this operation.
    """
    if not _sweeps or _sweeps[0].folder != Path(folder):
        _sweeps[:] = [Sweep(Path(folder), faults=_sweeps[0].faults if _sweeps else None)]
    sweep = _sweeps[0]
    return [sweep.run(layout, action, number, call=call) for action, number in every.items()]


def live(rank: int, size: int, port: int, folder: str, options: argparse.Namespace, ticks: Any, rows: Any) -> None:
    """The life of a rank."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=HANG_SECONDS),
    )

    def tick() -> None:
        ticks[rank] += 1

    sweep = Sweep(Path(folder), tick)
    for layout in options.layouts:
        for action in options.actions:
            row = sweep.run(layout, action, options.every, options.first)
            if rank == 0:
                rows.put(row)
    os._exit(0)  # gloo's teardown aborts now and then


def main() -> None:
    parser = argparse.ArgumentParser(description="Fail each file operation and each allocation once, on each rank.")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--actions", nargs="+", default=tuple(ACTIONS), choices=tuple(ACTIONS))
    parser.add_argument("--every", type=int, default=1, help="try one point in so many")
    parser.add_argument("--first", type=int, default=0, help="from this one")
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ticks, queue = context.Array("q", options.ranks), context.SimpleQueue()
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|", flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [
            context.Process(target=live, args=(rank, options.ranks, port, folder, options, ticks, queue), daemon=True)
            for rank in range(options.ranks)
        ]
        for each in ranks:
            each.start()
        latest, since = [0] * options.ranks, time.monotonic()
        while any(each.is_alive() for each in ranks) or not queue.empty():
            while not queue.empty():
                rows.append(queue.get())
                print(rows[-1].told(), flush=True)
            now = [ticks[rank] for rank in range(options.ranks)]
            if now != latest:
                latest, since = now, time.monotonic()
            if time.monotonic() - since > HANG_SECONDS:
                for each in ranks:
                    if each.pid is not None and each.is_alive():
                        os.kill(each.pid, signal.SIGUSR1)
                        time.sleep(1.0)
                        each.kill()
                sys.exit(f"FAILED: the ranks hang at their points number {latest}")
            time.sleep(0.05)
    bad = [each for row in rows for each in row.bad]
    total = Counter({field: sum(getattr(row, field) for row in rows) for field in ("points", "same_error", "no_harm")})
    print(
        f"{total['points']} points: {total['same_error']} times the same error on all ranks, {total['no_harm']} times "
        f"no harm, {len(bad)} bad"
    )
    if bad or len(rows) < len(options.layouts) * len(options.actions) or any(each.exitcode for each in ranks):
        sys.exit("FAILED: " + ("\n".join(bad) or f"the ranks ended with {[each.exitcode for each in ranks]}"))


if __name__ == "__main__":
    main()
