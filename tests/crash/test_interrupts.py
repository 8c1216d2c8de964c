"""An interrupt (Ctrl-C, a handler that raises) leaves everything whole: as before the call, or as after it."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import interrupts
import pytest
import torch
from interrupts import ROWS, TWO, Alarm, Row, sweep_lines, sweep_signals
from torch import nn
from torch.overrides import TorchFunctionMode

from dist_ema import (
    ConstantSchedule,
    DistEMAError,
    ShardedEMA,
    SwapError,
)
from dist_ema.averaging import streams
from dist_ema.averaging.infinities import Watch
from dist_ema.averaging.streams import HostThread
from dist_ema.checkpoint import background, save_calls
from dist_ema.live import swap as swapping
from dist_ema.live.spreading import LiveBackup
from dist_ema.uninterrupted import threads
from dist_ema.uninterrupted.jobs import InLine, Job, Lane, Once, Steps
from dist_ema.uninterrupted.threads import insist

BY_NAME = {row.name: row for row in ROWS}
REPEATED = "update, by the steps of the latest"
ALL_LINES = ["update, two tracks", REPEATED, "update, threads", "update, host thread", "swap"]


@pytest.mark.parametrize("name", ALL_LINES)
def test_an_interrupt_at_any_line_leaves_nothing_half_done(tmp_path: Path, name: str) -> None:
    points, bad = sweep_lines(BY_NAME[name], tmp_path, 1 if name != "swap" else 3)
    assert points > 50 and not bad


@pytest.mark.parametrize("row", [row for row in ROWS if row.name not in ALL_LINES], ids=lambda row: row.name)
def test_an_interrupt_at_some_line_leaves_nothing_half_done(tmp_path: Path, row: Row) -> None:
    """Other lines for each row; `launch/crash/interrupts.py` tries them all."""
    every = 11 if row.name.startswith(("update", "restart")) else 67
    points, bad = sweep_lines(row, tmp_path, every, 1 + len(row.name) % every)
    assert points > 0 and not bad


@pytest.mark.parametrize(
    "name", ["update, two tracks", REPEATED, "update, default device", "update, threads", "swap", "load"]
)
def test_a_signal_at_any_time_and_a_second_one_leave_nothing_half_done(tmp_path: Path, name: str) -> None:
    points, bad = sweep_signals(BY_NAME[name], tmp_path, 40, seed=len(name))
    assert points > 0 and not bad, bad


def made(schedule: Any = None) -> tuple[nn.Linear, ShardedEMA]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    ema = ShardedEMA(model, schedule or ConstantSchedule(momentum=0.5))
    ema.update()
    nn.init.ones_(model.weight)
    ema.update()
    return model, ema


def moving(steps: Steps, value: torch.Tensor, *, interrupted: bool) -> None:
    """A step that moves `value` by 1; at first with an interrupt as it returns, as in a torch function mode."""
    raised = [KeyboardInterrupt] if interrupted else []

    def move() -> None:
        value.add_(1.0)
        if raised:
            raise raised.pop()

    steps.once(move, value)


def test_an_interrupt_as_a_decorated_function_returns_ends_its_swap() -> None:
    model, ema = made()
    live, returned = model.weight.detach().clone(), []

    def called(frame: FrameType, event: str, argument: object) -> Any:
        return stepped if frame.f_code.co_name == "within" else None

    def stepped(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line" and returned:
            raise KeyboardInterrupt
        return stepped

    evaluate = ema.average_parameters()(lambda: returned.append(not torch.equal(model.weight, live)))
    sys.settrace(called)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            evaluate()
    finally:
        sys.settrace(None)
    assert returned == [True] and torch.equal(model.weight, live)
    ema.update()  # refused within a swap


@pytest.mark.parametrize("interrupted", range(3))
def test_a_step_that_had_moved_its_tensor_when_the_interrupt_came_is_not_done_again(interrupted: int) -> None:
    values = [torch.zeros(2) for _ in range(3)]

    def make(worker: int) -> Steps:
        steps = Steps()
        for index, value in enumerate(values):
            moving(steps, value, interrupted=index == interrupted)
        return steps

    job = Job([Lane(make)])
    with pytest.raises(KeyboardInterrupt):
        job()
    assert all(torch.equal(value, torch.ones(2)) for value in values)


@pytest.mark.parametrize("interrupted", range(3))
def test_steps_in_line_and_their_count_are_done_once_though_a_step_raises(interrupted: int) -> None:
    values = [torch.zeros(2) for _ in range(3)]
    steps, counts = Steps(), torch.zeros(())
    for index, value in enumerate(values):
        moving(steps, value, interrupted=index == interrupted)
    job = InLine(steps, functools.partial(counts.add_, 1.0))
    with pytest.raises(KeyboardInterrupt):
        job()
    assert all(torch.equal(value, torch.ones(2)) for value in values) and counts.item() == 1.0
    assert not job.is_left


class Raising(TorchFunctionMode):
    """Raises once, after one of torch's functions has done its work."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self.was_raised = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is self._function and not self.was_raised:
            self.was_raised = True
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize(("function", "is_whole"), [(torch.cat, False), (torch._foreach_lerp_, True)])
def test_an_interrupt_within_a_repeated_update_leaves_all_of_it_or_nothing(function: Any, is_whole: bool) -> None:
    """Python code may run within a step where a mode of torch is on."""

    def run() -> tuple[nn.Module, ShardedEMA]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
        ema = ShardedEMA(model, TWO)
        for _ in range(3):
            ema.update()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.5)
        return model, ema

    (_, ema), (_, twin) = run(), run()
    assert ema._state._updater.can_repeat()
    with pytest.raises(KeyboardInterrupt), Raising(function):
        ema.update()
    if is_whole:
        twin.update()
    for _ in range(2):
        assert ema.num_updates == twin.num_updates
        for track in ema.tracks:
            own, expected = ema.full_state_dict(track), twin.full_state_dict(track)
            assert all(torch.equal(value, expected[name]) for name, value in own.items())
        ema.update()
        twin.update()


class Handled(TorchFunctionMode):
    """Has a signal handler run before one of torch's functions, or after it."""

    def __init__(self, function: Any, handler: Any, *, first: bool) -> None:
        self._function, self._handler, self._first = function, handler, first

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self._function and self._first:
            self._handler()
        result = func(*args, **(kwargs or {}))
        if func is self._function and not self._first:
            self._handler()
        return result


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("repeats", [True, False])
def test_a_handler_that_asks_for_the_average_in_the_middle_of_its_update_is_refused(repeats: bool, first: bool) -> None:
    """It was taken for an update that was left undone, and finished; then the update went on, and moved twice."""
    _, ema = made()
    ema.update()
    ema._state.repeats = repeats
    twin = copy.deepcopy(ema)
    refused: list[SwapError] = []

    def handler() -> None:
        try:
            ema.full_state_dict()
        except SwapError as error:
            refused.append(error)

    with Handled(torch._foreach_lerp_, handler, first=first):
        ema.update()
    twin.update()
    assert len(refused) == 1 and "set a flag" in str(refused[0])
    assert all(torch.equal(value, twin.full_state_dict()[name]) for name, value in ema.full_state_dict().items())


def test_work_that_fails_is_told_and_done_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out in the middle: what is left is not forgotten, and nothing is moved twice."""
    model = nn.ParameterDict({name: nn.Parameter(torch.randn(3, 4)) for name in "abc"})
    twin = copy.deepcopy(model)
    runs = []
    for each in (model, twin):
        ema = ShardedEMA(each, ConstantSchedule(momentum=0.5), compensated=True)
        ema.update()
        for parameter in each.parameters():
            parameter.data.add_(1.0)
        runs.append(ema)
    from dist_ema.averaging import moves

    calls, is_short = [], [True]

    def failing(*arguments: Any) -> None:
        calls.append(1)
        if is_short and len(calls) > 1:
            raise torch.OutOfMemoryError("no more")
        compensated(*arguments)

    compensated = moves._compensated
    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError, match="no more"):
        patched.setattr(moves, "_compensated", failing)
        runs[0].update()
    assert runs[0].num_updates == 1
    is_short.clear()
    found = runs[0].full_state_dict()  # completes it
    runs[1].update()
    assert runs[0].num_updates == 2
    assert all(torch.equal(value, found[name]) for name, value in runs[1].full_state_dict().items())


def test_insisting_survives_a_storm_of_signals() -> None:
    begun: list[int] = []
    done: list[int] = []
    chance = random.Random(0)

    def work() -> None:
        begun.append(threading.get_ident())
        time.sleep(0.02)
        done.append(threading.get_ident())

    def raising(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-4, 1e-3))
        while frame is not None and frame.f_code is not insist.__code__:  # the test itself is not interrupted
            frame = frame.f_back
        if frame is not None and begun:  # an interrupt before the work has begun is the caller's
            raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, raising)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 1e-4)
            insist(work)
        signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    deadline = time.monotonic() + 5
    while not done and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done and done[0] != threading.get_ident()


def test_a_restore_that_fails_leaves_the_swap_open_and_the_next_call_tries_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else averaged weights would be saved, and stepped, as live ones."""
    model, ema = made()
    live = model.weight.detach().clone()
    from dist_ema.live.spreading import LiveBackup

    with monkeypatch.context() as patched:
        patched.setattr(LiveBackup, "_put_back", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError) as caught, ema.average_parameters():
            raise ValueError("in the body")
        assert "in the body" in str(chain(caught.value))
        assert not torch.equal(model.weight, live)
        with pytest.raises(DistEMAError, match="ZeroDivisionError"):
            ema.save(tmp_path / "ema")
    ema.save(tmp_path / "ema")
    assert torch.equal(model.weight, live) and ema._state.swapped is None


def test_a_second_signal_before_the_restoring_thread_has_begun_does_not_leave_the_average_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ema = made()
    live = copy.deepcopy(model.state_dict())
    calls: list[str] = []

    def interrupted(self: LiveBackup, *, anyway: bool = False) -> None:
        if not calls:
            calls.append("restore")
            raise KeyboardInterrupt
        restore(self, anyway=anyway)

    def not_begun(work: Any) -> None:
        calls.append("thread")
        if len(calls) == 2:
            raise KeyboardInterrupt
        insist(work)

    restore = LiveBackup.restore
    monkeypatch.setattr(LiveBackup, "restore", interrupted)
    monkeypatch.setattr(swapping, "insist", not_begun)
    with pytest.raises(KeyboardInterrupt), ema.average_parameters():
        pass
    assert calls == ["restore", "thread", "thread"]
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())
    ema.update()


def chain(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None:
        found.append(error)
        error = error.__context__
    return found


def test_a_swap_is_a_context_manager_in_all_the_ways_it_was() -> None:
    model, ema = made()
    live = model.weight.detach().clone()
    averaged = ema.full_state_dict()["weight"]
    ema.average_parameters("no such track")  # nothing happens before it is entered
    with contextlib.ExitStack() as stack:
        stack.enter_context(ema.average_parameters())
        assert torch.equal(model.weight, averaged)
        with pytest.raises(SwapError), ema.average_parameters():
            pass
        assert torch.equal(model.weight, averaged)
    assert torch.equal(model.weight, live)

    @ema.average_parameters()
    def evaluate(scale: float) -> torch.Tensor:
        """Told."""
        return model.weight.detach() * scale

    assert torch.equal(evaluate(1.0), averaged) and torch.equal(evaluate(scale=2.0), averaged * 2.0)
    assert evaluate.__doc__ == "Told." and torch.equal(model.weight, live)
    again = ema.average_parameters()
    for _ in range(2):
        with again:
            assert torch.equal(model.weight, averaged)
        assert torch.equal(model.weight, live)
    left = ema.average_parameters()
    left.__enter__()
    del left, again
    gc.collect()
    assert torch.equal(model.weight, live)


def test_an_interrupt_at_the_entry_of_the_exit_restores_the_live_weights() -> None:
    """The first line of an `__exit__` in Python would be too late; here are all lines outside the package too."""
    number = 0
    while True:
        number += 1
        model, ema = made()
        live = model.weight.detach().clone()
        left = [number]

        def called(frame: Any, event: str, argument: object, left: list[int] = left) -> Any:
            if "test_interrupts" in frame.f_code.co_filename:
                return None
            # Where a generator is resumed, Python 3.10 leaves it without a `finally` if a trace function raises. The
            # handler of a signal runs later there, at its first instruction.
            if sys.version_info < (3, 11) and event == "call" and frame.f_lasti >= 0:
                return called
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return called

        try:
            with ema.average_parameters():
                sys.settrace(called)
            sys.settrace(None)
            break
        except KeyboardInterrupt:
            sys.settrace(None)
        assert torch.equal(model.weight, live) and ema._state.swapped is None
    assert number > 30


def test_an_update_that_a_host_thread_has_not_begun_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = HostThread(torch.device("cpu"))
    monkeypatch.setattr("dist_ema.averaging.state.stream_beside", lambda live, averaged: stream)
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.5), overlap=True)
    ema.update()
    before = ema.full_state_dict()["weight"]
    nn.init.zeros_(model.weight)

    class Interrupted:
        def put(self, *_: object) -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("dist_ema.averaging.streams._host_calls", Interrupted)
        ema.update()
    assert ema.num_updates == 1
    assert torch.equal(ema.full_state_dict()["weight"], before)
    ema.update()
    assert torch.equal(ema.full_state_dict()["weight"], before * 0.5)


class Counter:
    value = 0


def test_an_update_that_was_taken_back_is_not_waited_for() -> None:
    done: list[int] = []
    promise = streams._Promise(lambda: done.append(1))
    assert promise.take_back() and promise.is_over
    promise()
    promise.wait()
    assert done == []


def test_what_counts_is_set_once() -> None:
    counter = Counter()
    count = Once(counter, "value", 1)
    count.call()
    counter.value = 5
    count.call()
    assert counter.value == 5


PREEMPTED = """
import os, signal, sys, threading, time, torch
from dist_ema import ConstantSchedule, ShardedEMA
number = getattr(signal, sys.argv[1])
if number != signal.SIGINT:
    def handler(*_): raise {kind}("preempted")
    signal.signal(number, handler)
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
ema = ShardedEMA(model, {{"a": ConstantSchedule(momentum=0.5), "b": ConstantSchedule(momentum=0.5)}})
count, naive = 0, None
print("ready", flush=True)
try:
    while True:
        with torch.no_grad():
            for parameter in model.parameters(): parameter.fill_(float(count))
        ema.update()
        count += 1
        with ema.average_parameters("a"): pass
except BaseException as error:
    raised = type(error).__name__
expected, done = 0.0, ema.num_updates
for step in range(1, done): expected += 0.5 * (step - expected)
ok = done - count in (0, 1)
for track in ema.tracks:
    ok &= all(bool((value == expected).all()) for value in ema.full_state_dict(track).values())
ok &= all(bool((value == value.flatten()[0]).all()) and float(value.flatten()[0]) in (count, count - 1)
          for value in model.state_dict().values())
print(raised, bool(ok), flush=True)
"""


@pytest.mark.parametrize(
    ("name", "kind"), [("SIGINT", "KeyboardInterrupt"), ("SIGTERM", "RuntimeError"), ("SIGUSR1", "SystemExit")]
)
def test_a_process_that_is_signalled_twice_keeps_whole_averages_and_its_live_weights(name: str, kind: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PREEMPTED.format(kind=kind), name], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(random.Random(name).uniform(0.05, 0.2))
    process.send_signal(getattr(signal, name))
    told = process.communicate(timeout=60)[0]
    assert told == f"{kind} True\n"


@pytest.fixture(autouse=True)
def untraced() -> Iterator[None]:
    """A coverage tool, say, gets its trace back."""
    former = sys.gettrace()
    yield
    sys.settrace(former)


def test_the_sweep_sees_what_is_cut_in_two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """That it can fail: without the thread that finishes, tracks are at odds."""
    monkeypatch.setattr(Job, "finish", lambda self, again=False: None)
    assert sweep_lines(BY_NAME["update, compensated"], tmp_path, 3)[1]
    assert Alarm(1.0, 0.0, KeyboardInterrupt).num_raised == 0
    assert interrupts.main(["--rows", "update, counted only", "--every", "9"]) == 0


def test_what_a_handler_raises_while_a_copy_looks_for_infinities_is_raised_and_autograd_stays_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Preempted(Exception):
        pass

    def interrupted(self: Watch) -> None:
        torch.set_grad_enabled(False)  # as an interrupt at the end of a `torch.no_grad()` leaves it
        raise Preempted

    ema = ShardedEMA(nn.Linear(4, 3), ConstantSchedule(momentum=0.5))
    monkeypatch.setattr(Watch, "look", interrupted)
    with pytest.raises(Preempted):
        ema.update()  # the first one copies
    assert torch.is_grad_enabled() and ema.num_updates == 1


def test_a_save_that_was_interrupted_while_its_thread_started_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, ema = made()
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "start", start)
        late = threading.Timer(0.2, lambda: start(thread))  # it begins after the interrupt has come out
        late.start()
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ema.save(tmp_path / "ema", background=True)
    ema.save(tmp_path / "ema")
    ema.load(tmp_path / "ema")


def test_work_is_waited_for_when_an_interrupt_comes_as_its_thread_is_started(monkeypatch) -> None:
    """The update raised while its thread was still at work: made again, it was made twice."""
    real, started, done = threads._thread.start_new_thread, [], []

    def start(*arguments: Any) -> None:
        real(*arguments)
        started.append(1)
        if len(started) == 1:
            raise KeyboardInterrupt

    def work() -> None:
        time.sleep(0.3)
        done.append(1)

    monkeypatch.setattr(threads._thread, "start_new_thread", start)
    with pytest.raises(KeyboardInterrupt):
        insist(work)
    assert done == [1] and len(started) == 2


def test_autograd_is_on_after_two_interrupts_in_a_swap_that_keeps_buffers(monkeypatch) -> None:
    """The second one came in the end of torch.no_grad(), which then leaves autograd off."""
    ema = ShardedEMA(nn.BatchNorm1d(2), ConstantSchedule(momentum=0.5))
    ema.update()

    def interrupted(*_: object) -> None:
        torch.set_grad_enabled(False)
        raise KeyboardInterrupt

    monkeypatch.setattr(swapping, "keep_buffers", interrupted)
    with pytest.raises(KeyboardInterrupt), ema.average_parameters(keep_buffers=True):
        pass
    assert torch.is_grad_enabled()


def test_a_save_behind_training_is_waited_for_though_an_interrupt_cut_off_the_wait(tmp_path, monkeypatch) -> None:
    """A join of a thread that a signal cuts off takes the thread for ended, so the next save met this one."""
    ema = ShardedEMA(nn.Linear(2, 2), ConstantSchedule(momentum=0.5))
    ema.update()
    real, written = save_calls.write_average, []

    def slow(*arguments: Any) -> None:
        time.sleep(1.0)
        real(*arguments)
        written.append(1)

    monkeypatch.setattr(save_calls, "write_average", slow)
    ema.save(tmp_path / "ema", background=True)
    alarm = Alarm(0.2, 0.0, KeyboardInterrupt)
    alarm.start()
    with pytest.raises(KeyboardInterrupt):
        ema.wait()
    alarm.stop()
    assert not written
    ema.wait()
    assert written and (tmp_path / "ema" / "model.safetensors").exists()


def test_no_update_enters_a_mode_that_an_interrupt_would_leave_open(monkeypatch) -> None:
    """What ends torch.inference_mode(False) was freed after the error was dealt with, and turned autograd off."""

    def entered(*_: object) -> None:
        raise AssertionError("within training there is nothing to leave")

    monkeypatch.setattr(torch, "inference_mode", entered)
    ema = ShardedEMA(nn.Linear(2, 2), ConstantSchedule(momentum=0.5), skip_nonfinite=True)
    for _ in range(3):
        ema.update()
    assert ema.num_updates == 3


def test_two_interrupts_as_a_save_behind_training_begins_are_no_error_of_python(tmp_path, monkeypatch) -> None:
    """Within Thread.start the second one came out as "release unlocked lock"."""
    ema = ShardedEMA(nn.Linear(2, 2), ConstantSchedule(momentum=0.5))
    ema.update()
    starting: list[int] = []
    real = threading.Thread.start

    def start(self: threading.Thread) -> None:
        starting.append(threading.get_ident())
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    ema.save(tmp_path / "ema", background=True)
    ema.wait()
    assert starting and threading.get_ident() not in starting, "no signal handler runs in the thread that starts it"


def test_a_process_ends_though_an_interrupt_has_left_a_save_that_is_over_among_those_under_way(monkeypatch) -> None:
    """A sweep of interrupts was through with its work, and turned at its exit for an hour."""
    left = background.Background()
    monkeypatch.setattr(background, "_under_way", [left, left])
    watch = threading.Thread(target=background._wait_at_exit, daemon=True)
    watch.start()
    watch.join(5.0)
    ended = not watch.is_alive()
    background._under_way.clear()  # else that thread turns on
    assert ended
