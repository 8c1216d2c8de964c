"""Work that is done whole or not at all, whatever a signal handler raises meanwhile. No communication.

[Note: interrupts]
Python runs signal handlers between two of its own instructions, in the main thread. Ctrl-C raises there, and so may
any handler. So what must not be cut in two is given as steps, and these are run by one call of C, which nothing comes
between; each result is kept, so that it is known how many steps were done. Where an exception comes nevertheless (a
step in Python, a torch function mode, an error), the steps that are left are done by a thread, which no signal handler
interrupts, and then the exception goes on its way. Nothing that counts moves before the first step.

A step is either done again without harm (a copy into scratch), or it moves a tensor, and must be done once: the version
that torch counts for each tensor tells whether one that was cut off has moved it.
"""

from __future__ import annotations

import _thread
import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

__all__ = ["Job", "Lane", "Once", "Steps", "insist", "version_of"]

# Both are C, and so are `partial`, `map` and `list.extend`: no handler runs between the steps.
_call = operator.methodcaller("__call__")
version_of: Callable[[torch.Tensor], Any] = operator.attrgetter("_version")

_POLL_SECONDS = 1e-4
_COUNTS_NOTHING = partial(bool)


class Steps:
    """What is done in turn, none of it yet."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], Any]] = []
        self._moved: dict[int, torch.Tensor] = {}

    def again(self, step: Callable[[], Any]) -> None:
        """Add a step that may be done again after it was cut off."""
        self.calls.append(step)

    def once(self, step: Callable[[], Any], moved: torch.Tensor) -> None:
        """Add a step that is a call of C and must be done once; `moved` is among the tensors that it writes to."""
        if not moved.is_inference():  # such a tensor has no version
            self.calls.append(partial(version_of, moved))
            self._moved[len(self.calls)] = moved
        self.calls.append(step)

    def run(self, done: list[Any]) -> None:
        """Do what is left, `done` being the results so far; each further one is added to them."""
        cut_off = self._moved.get(len(done))
        if cut_off is not None and version_of(cut_off) != done[-1]:
            done.append(None)
        done.extend(map(_call, self.calls[len(done) :]))


class Once:
    """An attribute that is set by one call of C, when called first; further calls do nothing."""

    def __init__(self, owner: object, name: str, value: object) -> None:
        self.call: Callable[[], Any] = partial(deque, map(partial(setattr, owner, name), (value,)), 0)


class Lane:
    """Steps that one thread does.

    Args:
        make: makes them for the worker of that number, and moves nothing.
    """

    def __init__(self, make: Callable[[int], Steps]) -> None:
        self._make = make
        self._steps: Steps | None = None
        self._done: list[Any] = []
        self._owner: dict[str, int] = {}
        self._has_failed = False

    @classmethod
    def of(cls, step: Callable[[], Any]) -> Lane:
        """The lane of one step that may be done again."""

        def make(worker: int) -> Steps:
            steps = Steps()
            steps.again(step)
            return steps

        return cls(make)

    def run(self, worker: int) -> None:
        """Do the steps, unless another thread has taken them."""
        mine = threading.get_ident()
        if self._owner.setdefault("thread", mine) == mine:
            self._go_on(worker)

    def finish(self, interrupted: int) -> None:
        """Do what is left; of what the thread `interrupted` has taken too, which does no more of it."""
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


def _one_by_one(lanes: Sequence[Lane]) -> None:
    for lane in lanes:
        lane.run(0)


class Job:
    """Lanes that are done whole, and then counted; or none of it.

    It may be called where and when a stream likes. Whoever handed it over calls `count` if that went well, else
    `withdraw`.

    Args:
        lanes: done in any order.
        count: tells that the job is done, or will be; None for one that is not counted.
        share: has `Lane.run` done for all lanes; None for one after the other.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        count: Once | None = None,
        share: Callable[[Sequence[Lane]], None] | None = None,
    ) -> None:
        self._lanes = lanes
        self._count = _COUNTS_NOTHING if count is None else count.call
        self._share = _one_by_one if share is None else share
        self._owner: dict[str, int] = {}
        self._finishing = threading.Lock()
        self._is_finished = False
        self._has_failed = False

    def __call__(self) -> None:
        """Do it, unless it was withdrawn. An exception leaves it done, or was raised by the work itself."""
        try:
            try:
                if self._claim():
                    self._run()
            except BaseException:
                self.finish()
                raise
        except BaseException:  # a second one, before the first was dealt with
            self.finish()
            raise

    def _claim(self) -> bool:
        mine = threading.get_ident()
        return self._owner.setdefault("thread", mine) == mine

    def _run(self) -> None:
        self._share(self._lanes)
        self._count()
        self._is_finished = True

    def count(self) -> None:
        """Count it as done: somebody has taken it over."""
        self._count()

    def withdraw(self) -> None:
        """After an exception of whoever it was handed to: see that it is done and counted, or neither."""
        owner = self._owner.setdefault("thread", 0)  # from now on nobody begins it
        if owner == threading.get_ident():
            self.finish()
        elif owner:
            self.count()

    @property
    def is_left(self) -> bool:
        """Whether it was begun by this thread, and its work failed."""
        return not self._is_finished and self._owner.get("thread") == threading.get_ident()

    def finish(self, *, again: bool = False) -> None:
        """Have what is left done by a thread; what raises now is an error of the work, or a further interrupt.

        Args:
            again: try once more what has failed.
        """
        if (again or not self._has_failed) and not self._is_finished and self._claim():
            insist(partial(self._finish, threading.get_ident()))

    def _finish(self, interrupted: int) -> None:
        with self._finishing:  # the thread of an earlier try may be at it
            self._has_failed = True
            for lane in self._lanes:
                lane.finish(interrupted)
            self._count()
            self._is_finished, self._has_failed = True, False


def insist(work: Callable[[], None]) -> None:
    """Have `work` done by a thread that no signal handler interrupts, and wait for it whatever is raised meanwhile.

    Raises what the work raised, else the latest of what was raised while it was waited for.
    """
    ended = _thread.allocate_lock()
    ended.acquire()
    finished: list[BaseException | None] = []
    carried = _carried()

    def run() -> None:
        failure = None
        try:
            with carried():
                work()
        except BaseException as error:
            failure = error
        finished.append(failure)
        ended.release()

    try:
        _thread.start_new_thread(run, ())
    except RuntimeError:  # no more threads, or the interpreter is ending
        run()
    latest: BaseException | None = None
    while not finished:
        try:
            ended.acquire(timeout=1.0)
        except BaseException as error:
            latest = error
    failure = finished[0] or latest
    if failure is not None:
        raise failure


def _carried() -> Callable[[], Any]:
    """What torch keeps for each thread, as a context for another one: without gradients, on the same stream."""
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
