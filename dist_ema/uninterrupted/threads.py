"""Work that another thread does, which no signal handler interrupts, and the wait for it. No communication."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

__all__ = ["End", "insist", "outlast"]


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
