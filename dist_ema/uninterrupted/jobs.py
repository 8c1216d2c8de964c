"""Jobs: steps that are done whole or not at all. No communication.

[Note: interrupts]
Python runs signal handlers between two of its own instructions, in the main thread. Ctrl-C raises there, and so may
any handler. So work that must not be cut in two is given as steps. One call of C runs the steps, and no handler runs
between them; the results are kept, so that their number shows how many steps were done. If an exception comes
nevertheless (in a step in Python, in a torch function mode, an error), a thread, which no signal handler interrupts,
does the steps that are left; then the exception goes on. No value that counts moves before the first step.

Some steps may be done again without harm (a copy into scratch). A step that moves a tensor must be done once: torch
counts versions of a tensor, and these show whether a step that was cut off has moved it.
"""

from __future__ import annotations

import inspect
import operator
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from dist_ema.uninterrupted.threads import insist

__all__ = ["InLine", "Job", "Lane", "Once", "Steps", "is_within", "version_of"]

# These two are C, and so are `partial`, `map`, `next` and `list.extend`: no handler runs between the steps.
_call = getattr(operator, "call", None) or operator.methodcaller("__call__")  # the first from Python 3.11 on
version_of: Callable[[torch.Tensor], Any] = operator.attrgetter("_version")

_thread_now = threading.get_ident

_POLL_SECONDS = 1e-4
_COUNTS_NOTHING = partial(bool)


class Steps:
    """Calls to be made in turn; none of them is made yet."""

    __slots__ = ("_moved", "calls")

    def __init__(self) -> None:
        self.calls: list[Callable[[], Any]] = []
        self._moved: dict[int, torch.Tensor] = {}

    def again(self, step: Callable[[], Any]) -> None:
        """Add a step that may be done again after an interrupt cut it off."""
        self.calls.append(step)

    def once(self, step: Callable[[], Any], moved: torch.Tensor) -> None:
        """Add a step that is a call of C and must be done once; `moved` is among the tensors that it writes to."""
        if not moved.is_inference():  # such a tensor has no version
            self.calls.append(partial(version_of, moved))
            self._moved[len(self.calls)] = moved
        self.calls.append(step)

    def with_calls(self, calls: list[Callable[[], Any]]) -> Steps:
        """Other calls, of which each moves what the call in its place does."""
        other = Steps()
        other.calls, other._moved = calls, self._moved
        return other

    def run(self, done: list[Any]) -> None:
        """Do the steps that are left. `done` has the results so far; the further results are added to it."""
        if not done:
            done.extend(map(_call, self.calls))
            return
        cut_off = self._moved.get(len(done))
        if cut_off is not None and version_of(cut_off) != done[-1]:
            done.append(None)
        done.extend(map(_call, self.calls[len(done) :]))


class Once:
    """An attribute that the first `call` sets, by one call of C; further calls do nothing."""

    __slots__ = ("_name", "_owner", "_value", "call")

    def __init__(self, owner: object, name: str, value: object) -> None:
        self.call: Callable[[], Any] = partial(next, map(setattr, (owner,), (name,), (value,)), None)
        self._owner, self._name, self._value = owner, name, value

    @property
    def was_called(self) -> bool:
        """Whether the attribute has the value. To be asked before others set it."""
        return getattr(self._owner, self._name) is self._value


class Lane:
    """Steps that one thread does.

    Args:
        make: returns the steps for the worker of that number, and moves nothing.
        steps: the steps, if they are known.
    """

    __slots__ = ("_done", "_has_failed", "_make", "_owner", "_steps")

    def __init__(self, make: Callable[[int], Steps], steps: Steps | None = None) -> None:
        self._make = make
        self._steps = steps
        self._done: list[Any] = []
        self._owner: dict[str, int] = {}
        self._has_failed = False

    @classmethod
    def of(cls, step: Callable[[], Any]) -> Lane:
        """A lane of one step, which may be done again."""
        steps = Steps()
        steps.again(step)
        return cls.ready(steps)

    @classmethod
    def ready(cls, steps: Steps) -> Lane:
        """A lane of steps that any worker does alike."""
        return cls(_knows_its_steps, steps)

    def run(self, worker: int) -> None:
        """Do the steps, unless another thread has taken them."""
        mine = threading.get_ident()
        if self._owner.setdefault("thread", mine) == mine:
            self._go_on(worker)

    def finish(self, interrupted: int) -> None:
        """Do the steps that are left, also those that the thread `interrupted` has taken and does no more."""
        mine = threading.get_ident()
        owner = self._owner.setdefault("thread", mine)
        while owner not in (mine, interrupted) and not (self._is_done() or self._has_failed):
            time.sleep(_POLL_SECONDS)
        if not self._is_done():
            self._go_on(0)

    def _go_on(self, worker: int) -> None:
        try:
            if self._steps is None:
                self._steps = self._make(worker)
            self._steps.run(self._done)
        except BaseException:
            self._has_failed = True
            raise

    def _is_done(self) -> bool:
        return self._steps is not None and len(self._done) == len(self._steps.calls)


def _knows_its_steps(worker: int) -> Steps:
    raise AssertionError("a lane whose steps are known makes none")


def _one_by_one(lanes: Sequence[Lane]) -> None:
    for lane in lanes:
        lane.run(0)


class Job:
    """Lanes that are done whole, and then counted; or none of it.

    A stream calls the job where and when it likes. The caller that gave it to a stream then calls `count`; if the
    stream raised, it calls `withdraw`.

    Args:
        lanes: the lanes, which may be done in any order.
        count: records that the job is done, or will be; None for a job that is not counted.
        share: does `Lane.run` for all lanes; None does one lane after the other.
    """

    __slots__ = ("_count", "_counted", "_finishing", "_has_failed", "_is_finished", "_lanes", "_owner", "_share")

    def __init__(
        self,
        lanes: Sequence[Lane],
        count: Once | None = None,
        share: Callable[[Sequence[Lane]], None] | None = None,
    ) -> None:
        self._lanes = lanes
        self._count = _COUNTS_NOTHING if count is None else count.call
        self._counted = count
        self._share = _one_by_one if share is None else share
        self._owner: dict[str, int] = {}
        self._finishing = threading.Lock()
        self._is_finished = False
        self._has_failed = False

    def __call__(self) -> None:
        """Do the job, unless it was withdrawn. An exception leaves it done, unless the work itself raised."""
        try:
            try:
                if self._claim():
                    self._share(self._lanes)
                    self._count()
                    self._is_finished = True
            except BaseException:
                self.finish()
                raise
        except BaseException:  # a second exception, before the first was dealt with
            self.finish()
            raise

    def _claim(self) -> bool:
        mine = threading.get_ident()
        return self._owner.setdefault("thread", mine) == mine

    def count(self) -> None:
        """Count the job as done: a stream has taken it over."""
        self._count()

    def withdraw(self) -> None:
        """After an exception of the stream that was given the job: have it done and counted, or neither."""
        if self._counted is not None and self._counted.was_called:
            return  # the exception came after the end of `count`: a thread has the job, or it is done
        owner = self._owner.setdefault("thread", 0)  # from now on no thread begins it
        if owner == threading.get_ident():
            self.finish()
        elif owner:
            self.count()

    @property
    def is_left(self) -> bool:
        """Whether this thread began the job, and its work failed."""
        return not self._is_finished and self._owner.get("thread") == threading.get_ident()

    def finish(self, *, again: bool = False) -> None:
        """Have a thread do what is left. It raises an error of the work, or a further interrupt.

        Args:
            again: try again after a failure.
        """
        if (again or not self._has_failed) and not self._is_finished and self._claim():
            insist(partial(self._finish, threading.get_ident()))

    def _finish(self, interrupted: int) -> None:
        with self._finishing:  # the thread of an earlier try may still be at work
            self._has_failed = True
            for lane in self._lanes:
                lane.finish(interrupted)
            self._count()
            self._is_finished, self._has_failed = True, False


class InLine:
    """Steps that this thread does at once, and their count: all of it, or nothing. One call of C does it.

    It is what `Job` is, for one lane of known steps, in less time.

    Args:
        steps: the steps; the first of them moves nothing that counts, unless `Steps.once` has added it.
        count: a call of C that records that they are done, and may be made again.
    """

    __slots__ = ("_count", "_done", "_has_failed", "_owner", "_steps")

    _finishing = threading.Lock()  # one for all jobs: only what an exception has cut off needs it

    def __init__(self, steps: Steps, count: Callable[[], Any]) -> None:
        self._owner = _thread_now()
        self._steps = steps
        self._count = count
        self._done: list[Any] = []
        self._has_failed = False

    def __call__(self) -> None:
        """Do it. An exception leaves it done, unless a step raised: then nothing is done, or something is left."""
        try:
            try:
                self._done.extend(map(_call, [*self._steps.calls, self._count]))
            except BaseException:
                self.finish()
                raise
        except BaseException:  # a second exception, before the first was dealt with
            self.finish()
            raise

    @property
    def is_left(self) -> bool:
        """Whether a part of it is done and a part is not, as this thread sees it; another one may see it at work."""
        return self._owner == _thread_now() and self._is_in_part

    @property
    def _is_in_part(self) -> bool:
        return 0 < len(self._done) <= len(self._steps.calls)

    def finish(self, *, again: bool = False) -> None:
        """As `Job.finish`."""
        if self.is_left and (again or not self._has_failed):
            insist(self._finish)

    def _finish(self) -> None:
        with self._finishing:  # the thread of an earlier try may still be at work
            if self._is_in_part:
                self._has_failed = True
                self._steps.run(self._done)
                self._done.append(self._count())
                self._has_failed = False


def is_within(job: Job | InLine) -> bool:
    """Whether this thread is in the middle of the steps of a job, as a signal handler is that came between them.

    Steps that Python code runs in (a mode of torch's functions) let handlers in, and so does the garbage collector.
    """
    is_among_steps = False
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code in _OF_JOBS and frame.f_locals.get("self") is job:
            return is_among_steps or isinstance(job, InLine)
        if frame.f_code is insist.__code__:  # a thread does what is left of the job, and this one waits
            return False
        is_among_steps = is_among_steps or frame.f_code is Steps.run.__code__
        frame = frame.f_back
    return False


_OF_JOBS = (Job.__call__.__code__, InLine.__call__.__code__)
