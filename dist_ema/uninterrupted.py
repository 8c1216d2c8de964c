"""Work that is done whole or not at all, whatever a signal handler raises meanwhile. No communication.

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

import _thread
import operator
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch

__all__ = [
    "End",
    "Job",
    "Lane",
    "Once",
    "Steps",
    "insist",
    "keeping_autograd",
    "made_for_any_mode",
    "outlast",
    "version_of",
]

# These two are C, and so are `partial`, `map`, `next` and `list.extend`: no handler runs between the steps.
_call = getattr(operator, "call", None) or operator.methodcaller("__call__")  # the first from Python 3.11 on
version_of: Callable[[torch.Tensor], Any] = operator.attrgetter("_version")

_POLL_SECONDS = 1e-4
_COUNTS_NOTHING = partial(bool)


def keeping_autograd(work: Callable[[], None]) -> None:
    """Do `work`. After an exception autograd is as before: an interrupt at the end of `no_grad()` leaves it off."""
    mode = torch.is_grad_enabled()
    try:
        try:
            work()
        except BaseException:
            torch.set_grad_enabled(mode)
            raise
    except BaseException:  # a second one, before the first was dealt with
        torch.set_grad_enabled(mode)
        raise


def made_for_any_mode() -> AbstractContextManager[object]:
    """A context whose tensors can be written to in and outside of `torch.inference_mode()`. No communication.

    It does nothing outside of that mode. An interrupt at the end of `torch.inference_mode(False)` would leave open what
    ends it: whenever Python frees that, autograd is set as it was at the beginning.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


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


class End:
    """The end of work that another thread does.

    The wait for it is one lock. A signal handler that raises makes a condition variable of Python, as in a `Future`,
    raise an error of its own, or leave a lock locked.

    Attributes:
        has_come: whether the work is done, or has failed.
        failure: what the work raised.
    """

    def __init__(self) -> None:
        self.has_come = False
        self.failure: BaseException | None = None
        self._lock = _thread.allocate_lock()  # locked until the end has come
        self._lock.acquire()

    def come_of(self, work: Callable[[], None]) -> None:
        """Do `work`, on the other thread, and let the end come."""
        try:
            work()
        except BaseException as error:
            self.failure = error
        finally:
            self.has_come = True
            self._lock.release()

    def wait(self) -> None:
        """Wait until the end has come. It raises what a signal handler raises meanwhile."""
        while not self.has_come:
            self.comes_within(1.0)

    def comes_within(self, seconds: float) -> bool:
        """Wait for so long at most. It raises what a signal handler raises meanwhile.

        Returns:
            Whether the end has come.
        """
        if not self.has_come and self._lock.acquire(timeout=seconds):
            self._lock.release()  # for whoever else waits
        return self.has_come


def outlast(ends: Iterable[End]) -> BaseException | None:
    """Wait for all ends, whatever a signal handler raises meanwhile. Returns the latest of it."""
    latest: BaseException | None = None
    for end in ends:
        while not end.has_come:
            try:
                end.wait()
            except BaseException as error:
                latest = error
    return latest


def insist(work: Callable[[], None]) -> None:
    """Have a thread, which no signal handler interrupts, do `work`; wait for it, whatever is raised meanwhile.

    It raises the exception of the work, else the latest exception that came while it waited.
    """
    end = End()
    carried = _carried()
    taken: dict[str, int] = {}

    def within() -> None:
        with carried():
            work()

    def run() -> None:
        mine = threading.get_ident()
        if taken.setdefault("by", mine) == mine:
            end.come_of(within)

    is_given = False
    latest: BaseException | None = None
    while not end.has_come:
        try:
            if not is_given:
                # After an interrupt at the end of this call a second thread is started, which finds the work taken.
                _start(run)
                is_given = True
            end.wait()
        except BaseException as error:
            latest = error
    failure = end.failure or latest
    if failure is not None:
        raise failure


def _start(run: Callable[[], None]) -> None:
    try:
        _thread.start_new_thread(run, ())
    except RuntimeError:  # no more threads, or the interpreter is ending
        run()


def _carried() -> Callable[[], Any]:
    """The state of torch in this thread, as a context for another one: without gradients, on the same stream."""
    inference = torch.is_inference_mode_enabled()
    stream: Any = None
    kind = torch.accelerator.current_accelerator()
    of: Any = None if kind is None else torch.get_device_module(kind)
    if of is not None and getattr(of, "is_initialized", bool)():
        with suppress(RuntimeError):  # a device without streams
            stream = torch.accelerator.current_stream()

    @contextmanager
    def carried() -> Iterator[None]:
        with torch.inference_mode() if inference else torch.no_grad():
            if stream is not None:
                torch.accelerator.set_stream(stream)
            yield

    return carried
