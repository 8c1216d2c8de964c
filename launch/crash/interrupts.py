"""Interrupts at every line of the package, and real signals at random times: is everything whole or not at all?

    python launch/crash/interrupts.py                  # every line of every row: some minutes (saves: `--rows save`)
    python launch/crash/interrupts.py --rows swap --every 7
    python launch/crash/interrupts.py --signals 200    # real signals at random times, half of them followed by a second

An exception is raised before the k-th line of the package that a call comes to, for every k; or by the handler of a
timer's signal. After it, live weights, averages, residuals, counters and the teacher must be those of before the call,
or those of after it; and so must they be after the call is made again, and after a further update. Prints the points of
each row and those that were bad; exit 1 if any was.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import random
import shutil
import signal
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import dist_ema
from dist_ema import ConstantSchedule, DistEMAError, ShardedEMA
from dist_ema.averaging.streams import HostThread, SideStream

PACKAGE = str(Path(dist_ema.__file__).parent)
CPU = torch.device("cpu")
ONE = ConstantSchedule(momentum=0.25)
TWO = {"a": ConstantSchedule(momentum=0.5), "b": ConstantSchedule(momentum=0.25)}
MASK = torch.tensor([0.0, float("-inf"), 1.0])


class Preempted(Exception):
    """What the handler of a preemption might raise."""


RAISED: tuple[type[BaseException], ...] = (KeyboardInterrupt, Preempted, SystemExit)
# What is raised on all ranks in place of an ordinary exception on one.
SEEN: tuple[type[BaseException], ...] = (*RAISED, DistEMAError)


@dataclasses.dataclass
class Subject:
    """A run, the same each time it is made."""

    model: nn.Module
    ema: ShardedEMA
    teacher: nn.Module | None
    folder: Path
    given: Any = None

    def step(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.5).add_(1.0)

    def update(self) -> None:
        self.ema.update()

    def seen(self) -> dict[str, Any]:
        """All that must be of one moment."""
        state = self.ema._state
        state.join()
        found: dict[str, Any] = {
            "num_updates": self.ema.num_updates,
            "refused": state.num_refused,
            "swapped": state.swapped,
            "autograd": torch.is_grad_enabled(),
            "not started": sorted(state._now.not_started),
            "kept": sorted(state._now.kept),
        }
        tensors = {f"live {name}": value for name, value in self.model.state_dict().items()}
        if self.teacher is not None:
            tensors |= {f"teacher {name}": value for name, value in self.teacher.state_dict().items()}
        for name, track in state.averages.items() if self.ema.num_updates else ():
            for index, shard in enumerate(state.shards):
                if shard.fqn not in state._now.not_started:  # else it shows the live values
                    tensors[f"average {name} {shard.fqn} {shard.offsets}"] = track.values[index]
                    if track.residuals:
                        tensors[f"residual {name} {shard.fqn} {shard.offsets}"] = track.residuals[index]
        return found | {name: value.clone() for name, value in tensors.items()}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name in one.keys() | other.keys()
        if name not in one
        or name not in other
        or not (
            torch.equal(one[name].nan_to_num(9.0), other[name].nan_to_num(9.0))
            if isinstance(one[name], torch.Tensor)
            else one[name] == other[name]
        )
    ]


class Net(nn.Module):
    """Tiny tensors that are packed, larger ones, a frozen mask and one in a buffer."""

    def __init__(self, head: int = 3, masked: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
        self.wide = nn.Linear(40, 60)
        self.head = nn.Linear(3, head)
        if masked:
            self.mask = nn.Parameter(MASK.clone(), requires_grad=False)
            self.register_buffer("shown", MASK.clone())


def subject(
    schedule: Any = TWO,
    *,
    dtype: torch.dtype = torch.float32,
    updates: int = 2,
    teacher: bool = False,
    masked: bool = True,
    **options: Any,
) -> Callable[[Path], Subject]:
    def make(folder: Path) -> Subject:
        torch.manual_seed(0)
        model = Net(masked=masked).to(dtype)
        into = copy.deepcopy(model).float().requires_grad_(False) if teacher else None
        chosen = ONE if teacher else schedule
        made = Subject(model, ShardedEMA(model, chosen, into=into, **options), into, folder)
        for _ in range(updates):
            made.step()
            made.update()
        made.ema.wait()
        made.step()
        return made

    return make


@dataclasses.dataclass
class Row:
    """A call that is to be whole.

    Attributes:
        make: what it is called on.
        act: the call.
        within: what holds meanwhile.
        left: what is wrong with the folder of the subject after an interrupt, if it is looked at; None if all is well.
    """

    name: str
    make: Callable[[Path], Subject]
    act: Callable[[Subject], None] = Subject.update
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    left: Callable[[Subject], str | None] = lambda given: None


@contextlib.contextmanager
def threads() -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(3)
    with (
        mock.patch("dist_ema.averaging.prepared_update._FEWEST_SHARED_NUMEL", 1),
        mock.patch("dist_ema.averaging.prepared_update.SERIAL_NUMEL", 500),
    ):
        yield
    torch.set_num_threads(former)


@contextlib.contextmanager
def both(*contexts: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for each in contexts:
            stack.enter_context(each)
        yield


def fetched() -> contextlib.AbstractContextManager[Any]:
    return mock.patch("dist_ema.averaging.tensor_blocks._is_afar", lambda live, averaged: True)


def beside(kind: Callable[[torch.device], Any]) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    return lambda: mock.patch("dist_ema.averaging.state.stream_beside", lambda live, averaged: kind(CPU))


def flagged(given: Subject, *, skipped: float = 0.0) -> None:
    given.ema.update(found_inf=torch.tensor([skipped]))


def spoilt(make: Callable[[Path], Subject]) -> Callable[[Path], Subject]:
    def made(folder: Path) -> Subject:
        given = make(folder)
        with torch.no_grad():
            given.model.get_parameter("wide.weight")[3, 4] = float("nan")
        return given

    return made


def new_head(folder: Path) -> Subject:
    """A run that loaded an average of a model with another head."""
    source = folder / "other-head"
    if not source.exists():
        torch.manual_seed(0)
        other = ShardedEMA(Net(head=2), TWO)
        other.update()
        other.save(source)
    given = subject()(folder)
    given.ema.load(source, new="head.*")
    return given


def with_saved(make: Callable[[Path], Subject], updates: int = 4) -> Callable[[Path], Subject]:
    """A run that may load what a longer one of its kind has saved."""

    def made(folder: Path) -> Subject:
        given = make(folder)
        if not (folder / "saved").exists():
            longer = make(folder)
            for _ in range(updates):
                longer.step()
                longer.update()
            longer.ema.save(folder / "saved")
            longer.ema.consolidate(folder / "export", track=longer.ema.tracks[0])
        return given

    return made


def with_state_dict(folder: Path) -> Subject:
    given = subject()(folder)
    given.given = {name: value + 1.0 for name, value in given.ema.sharded_state_dict("a").items()}
    return given


def swap(given: Subject) -> None:
    with given.ema.average_parameters(given.ema.tracks[0]):
        pass


def swap_that_keeps(given: Subject) -> None:
    with given.ema.average_parameters(given.ema.tracks[0], keep_buffers=True):
        for buffer in given.model.buffers():
            buffer.zero_()


def swap_with_an_error(given: Subject) -> None:
    with contextlib.suppress(ValueError), given.ema.average_parameters(given.ema.tracks[0]):
        raise ValueError


def swap_by_decorator(given: Subject) -> None:
    @given.ema.average_parameters(given.ema.tracks[0])
    def evaluate() -> None:
        pass

    evaluate()


def load(given: Subject) -> None:
    given.ema.load(given.folder / "saved")


def saving(folder: Path) -> Subject:
    """A run whose folder of saves holds one of 1 update."""
    shutil.rmtree(folder / "saves", ignore_errors=True)
    subject(updates=1)(folder).ema.save(folder / "saves" / "ema")
    return subject()(folder)


def save(given: Subject) -> None:
    given.ema.save(given.folder / "saves" / "ema")


def save_behind(given: Subject) -> None:
    given.ema.save(given.folder / "saves" / "ema", background=True)
    given.ema.wait()


def half_saved(given: Subject) -> str | None:
    """The folder is the whole old or new one, and a save that nobody disturbs leaves nothing beside it."""
    with contextlib.suppress(*SEEN):
        given.ema.wait()
    again = subject(updates=0)(given.folder).ema
    again.load(given.folder / "saves" / "ema")
    if again.num_updates not in (1, given.ema.num_updates):
        return f"an average of {again.num_updates} updates is in the folder"
    save(given)
    beside = sorted(path.name for path in (given.folder / "saves").iterdir())
    return None if beside == ["ema"] else f"the next save leaves {beside}"


HOST_THREAD, SIDE_STREAM = beside(HostThread), beside(SideStream)
ROWS = [
    Row("update, one track", subject(ONE)),
    Row("update, two tracks", subject()),
    Row("update, counted only", subject(interval=3)),
    Row("update, bfloat16 weights", subject(dtype=torch.bfloat16)),
    Row("update, compensated", subject(compensated=True)),
    Row("update, compensated, bfloat16, flag", subject(dtype=torch.bfloat16, compensated=True), flagged),
    Row("update, skip_nonfinite", spoilt(subject(skip_nonfinite=True))),
    Row("update, skip_nonfinite, compensated, buffers", spoilt(subject(skip_nonfinite=True, compensated=True))),
    Row("update, buffers", subject(update_buffers=True)),
    Row("update, flag", subject(), flagged),
    Row("update, flag of a skipped step", subject(), lambda given: flagged(given, skipped=1.0)),
    Row("update, float64 averages", subject(dtype=torch.float64)),
    Row("update, by the steps of the latest", subject(masked=False, updates=3)),
    Row("update, by the steps of the latest, bfloat16", subject(ONE, dtype=torch.bfloat16, masked=False, updates=3)),
    Row("update, by the steps of the latest, default device", subject(masked=False, updates=3), within=lambda: CPU),
    Row("update, averages afar", subject(dtype=torch.bfloat16), within=fetched),
    Row("update, threads", subject(), within=threads),
    Row("update, threads, compensated", subject(compensated=True), within=threads),
    Row("update, default device", subject(), within=lambda: torch.device("cpu")),
    Row("update, threads, default device", subject(), within=lambda: both(threads(), torch.device("cpu"))),
    Row("update, inference mode", subject(), within=torch.inference_mode),
    Row("update, host thread", subject(overlap=True), within=HOST_THREAD),
    Row("update, side stream", subject(overlap=True), within=SIDE_STREAM),
    Row("update, teacher", subject(teacher=True)),
    Row("update, first", subject(updates=0)),
    Row("update, first, skip_nonfinite", spoilt(subject(updates=0, skip_nonfinite=True))),
    Row("update, first, teacher", subject(updates=0, teacher=True)),
    Row("update, second", subject(updates=1)),
    Row("update, after load(new=)", new_head),
    Row("swap", subject(), swap),
    Row("swap, bfloat16 weights", subject(dtype=torch.bfloat16), swap),
    Row("swap, buffers kept", subject(update_buffers=True), swap_that_keeps),
    Row("swap, error within", subject(), swap_with_an_error),
    Row("swap, decorator", subject(), swap_by_decorator),
    Row("swap, before the first update", subject(updates=0), swap),
    Row("swap, teacher", subject(teacher=True), swap),
    Row("swap, overlap", subject(overlap=True), swap, HOST_THREAD),
    Row("copy_to_model", subject(), lambda given: given.ema.copy_to_model("a")),
    Row("load", with_saved(subject()), load),
    Row("load, compensated, skip_nonfinite", with_saved(spoilt(subject(compensated=True, skip_nonfinite=True))), load),
    Row("load, before the first update", with_saved(subject(updates=0)), load),
    Row("load, teacher", with_saved(subject(teacher=True)), load),
    Row("start_from", with_saved(subject()), lambda given: given.ema.start_from(given.folder / "export")),
    Row(
        "load_sharded_state_dict",
        with_state_dict,
        lambda given: given.ema.load_sharded_state_dict(given.given, track="b", num_updates=7),
    ),
    Row("save", saving, save, left=half_saved),
    Row("save, background", saving, save_behind, left=half_saved),
    Row("restart", subject(), lambda given: given.ema.restart()),
    Row("restart, teacher", subject(teacher=True), lambda given: given.ema.restart()),
]


class At:
    """Raises before the line of that number, if the package comes to so many."""

    def __init__(self, number: int, kind: type[BaseException]) -> None:
        self._left = number
        self._kind = kind
        self.place = ""

    def _called(self, frame: types.FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: types.FrameType, event: str, argument: object) -> Any:
        if event == "line":
            self._left -= 1
            if self._left == 0:
                name = Path(frame.f_code.co_filename).relative_to(PACKAGE)
                self.place = f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
                sys.settrace(None)
                raise self._kind
        return self._line

    def __enter__(self) -> At:
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


class Alarm:
    """A signal after some seconds, and perhaps a second one a little later; the handler raises."""

    def __init__(self, seconds: float, later: float, kind: type[BaseException]) -> None:
        self._seconds = seconds
        self._later = later
        self._kind = kind
        self.place = ""
        self.num_raised = 0
        self._is_over = False

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self._is_over:
            return
        later, self._later = self._later, 0.0
        signal.setitimer(signal.ITIMER_REAL, later)
        self.num_raised += 1
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        here = "outside" if frame is None else f"{frame.f_code.co_name}:{frame.f_lineno}"
        self.place = f"{self.place} {here}"
        raise self._kind

    def start(self) -> None:
        self._former = signal.signal(signal.SIGALRM, self._handle)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def stop(self) -> None:
        self._is_over = True
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, self._former)


def expected(row: Row, folder: Path) -> list[dict[str, Any]]:
    """What is seen before the call, after it, and after a further update."""
    given = row.make(folder)
    seen = [given.seen()]
    row.act(given)
    seen.append(given.seen())
    given.step()
    given.update()
    return [*seen, given.seen()]


def harm(row: Row, given: Subject, seen: Sequence[Mapping[str, Any]]) -> str | None:
    """What is not as it should be, after an interrupt."""
    before, after, further = seen
    try:
        wrong = row.left(given)
    except DistEMAError as error:
        wrong = f"a save after it fails: {error}"
    if wrong is not None:
        return wrong
    now = given.seen()
    is_before, is_after = not differences(now, before), not differences(now, after)
    if not is_before and not is_after:
        return f"neither as before nor as after: {sorted(differences(now, before))[:2]}, {differences(now, after)[:2]}"
    if not is_after:
        row.act(given)
        if differences(given.seen(), after):
            return f"the same call again gives something else: {differences(given.seen(), after)[:3]}"
    given.step()
    given.update()
    left = differences(given.seen(), further)
    return f"the next update gives something else: {left[:3]}" if left else None


def sweep_lines(row: Row, folder: Path, every: int, start: int = 1) -> tuple[int, dict[str, str]]:
    """The number of points, and place -> harm."""
    bad: dict[str, str] = {}
    with row.within():
        mode, seen = torch.is_grad_enabled(), expected(row, folder)
        for count, number in enumerate(range(start, sys.maxsize, every)):
            torch.set_grad_enabled(mode)  # what one case left is no harm of the next
            given = row.make(folder)
            at = At(number, RAISED[number % len(RAISED)])
            try:
                with at:
                    row.act(given)
            except SEEN:
                pass
            if not at.place:
                return count, bad
            found = harm(row, given, seen)
            if found is not None:
                bad.setdefault(at.place, found)
    raise AssertionError


@contextlib.contextmanager
def swallowed_signals_ignored() -> Iterator[None]:
    """Python cannot raise what a handler raises while a generator or an object is torn down: it reports it instead.

    The call then goes on as if no signal had come, so such a report is no harm. Any other report goes its way.
    """
    former = sys.unraisablehook

    def report(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, SEEN):
            former(unraisable)

    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = former


def sweep_signals(row: Row, folder: Path, count: int, seed: int) -> tuple[int, dict[str, str]]:
    """The number of signals that came in time, and place -> harm."""
    bad: dict[str, str] = {}
    chance = random.Random(seed)
    num_raised = 0
    with row.within(), swallowed_signals_ignored():
        mode, seen = torch.is_grad_enabled(), expected(row, folder)
        given = row.make(folder)
        began = time.perf_counter()
        row.act(given)
        lasts = time.perf_counter() - began
        for index in range(count):
            torch.set_grad_enabled(mode)  # what one case left is no harm of the next
            given = row.make(folder)
            later = 10.0 ** chance.uniform(-5.5, -2.5) if index % 2 else 0.0
            alarm = Alarm(chance.uniform(1e-6, 1.1 * lasts), later, RAISED[index % len(RAISED)])
            with contextlib.suppress(*SEEN):
                try:
                    try:
                        alarm.start()
                        row.act(given)
                    finally:
                        alarm.stop()
                finally:  # the signal may come as the other begins
                    alarm.stop()
            num_raised += alarm.num_raised
            found = harm(row, given, seen)
            if found is not None:
                bad.setdefault(alarm.place, found)
    return num_raised, bad


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Interrupts at every line, and real signals at random times.")
    parser.add_argument("--rows", default="", help="only rows whose name begins so")
    parser.add_argument("--every", type=int, default=1, help="only every n-th line")
    parser.add_argument("--signals", type=int, default=0, help="real signals for each row, instead of lines")
    parser.add_argument("--seed", type=int, default=0, help="of the times of signals")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    num_points = num_bad = 0
    for row in ROWS:
        if not row.name.startswith(options.rows):
            continue
        folder = Path(tempfile.mkdtemp())
        if options.signals:
            points, bad = sweep_signals(row, folder, options.signals, options.seed)
        else:
            points, bad = sweep_lines(row, folder, options.every)
        shutil.rmtree(folder)
        print(f"{row.name:45} {points:6} points, {len(bad)} bad", flush=True)
        for place, told in bad.items():
            print(f"    {place}: {told}", flush=True)
        num_points, num_bad = num_points + points, num_bad + len(bad)
    print(f"{num_points} points, {num_bad} bad")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
