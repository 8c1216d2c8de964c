"""Where an update runs: in line, or beside training until a call joins it. No communication.

    training stream   | step t |  forward, backward of t + 1    | step t + 1 |
                               v fork                           ^ join
    side stream                [ update of t ]

The update reads what step t wrote, so it waits for the training stream when it begins. The next call that writes the
live weights or touches the averages joins the update: the training stream then waits on the device, the host does not.
A host thread updates averages that are kept in host memory; a call that joins the thread blocks the host.

On a CPU the same calls run one after the other: torch's CPU streams do nothing.
"""

from __future__ import annotations

import atexit
import functools
import os
import weakref
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dist_ema.averaging.cpu_threads import KeptThreads
from dist_ema.uninterrupted.threads import End

__all__ = ["HostThread", "SideStream", "Stream", "has_streams", "join_all", "join_before_steps", "stream_beside"]


class Stream:
    """Runs work in the order in which it is given. This class runs it at once: nothing overlaps.

    Attributes:
        is_in_line: whether work is done, or launched on the current stream, when `run` returns.
    """

    is_in_line = True

    def run(self, work: Callable[[], None]) -> None:
        """Do `work` after all work that the current stream has been given so far.

        `work` must touch tensors only: the modules that have the tensors may change meanwhile.
        """
        work()

    def join(self) -> None:
        """Have the current stream do its further work after all work given here. Raises what the work raised."""

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Keep the memory of these tensors from further use until the work is done, even if no reference is left."""

    def flag_of_now(self, flag: torch.Tensor) -> torch.Tensor:
        """The flag with its value of now; the caller may change its tensor before the work reads the flag."""
        return flag


class SideStream(Stream):
    """Work on a stream of its own, on the device of the live weights.

    Args:
        device: the device of the live weights and of the averages; a CPU runs the work in line.
    """

    is_in_line = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of: Any = torch.get_device_module(device)
        self._stream: Any = self._of.Stream() if device.type == "cpu" else self._of.Stream(device=device)
        self._done: Any = None
        self._process = os.getpid()

    def __deepcopy__(self, memo: object) -> Stream:
        """A stream in line: a copy of an average has no hook that would join it."""
        return Stream()

    def run(self, work: Callable[[], None]) -> None:
        """Have the device do `work` beside the further work of the current stream; the host only launches it."""
        self._stream.wait_stream(self._of.current_stream(self._device))
        self._done = self._done or self._of.Event()
        try:
            with self._of.stream(self._stream):
                work()
            self._done.record(self._stream)
        except BaseException:  # join waits for what the device was given, even if a second interrupt comes
            try:
                self._done.record(self._stream)
            finally:
                self._done.record(self._stream)
            raise

    def join(self) -> None:
        """Have the current stream wait for the work; the host does not."""
        if self._done is None or os.getpid() != self._process:  # a forked process has no device
            return
        is_capturing = getattr(self._of, "is_current_stream_capturing", None)
        if is_capturing is None or not is_capturing():  # a graph that is captured cannot wait for earlier work
            # Every call waits: the current stream may be another one than that which joined first.
            self._of.current_stream(self._device).wait_event(self._done)

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Record this stream with the allocator, which knows only the stream that the memory was allocated on."""
        for tensor in tensors:
            if tensor.device.type != "cpu":
                tensor.record_stream(self._stream)

    def flag_of_now(self, flag: torch.Tensor) -> torch.Tensor:
        """A copy, made on the current stream."""
        copy = flag.clone()
        self.keep([copy])
        return copy


class HostThread(SideStream):
    """Work on a host thread, whose copies from the device run on a side stream: for averages in host memory.

    Args:
        device: the device of the live weights.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._running: _Promise | None = None
        _watch_process()
        _host_threads.add(self)

    def run(self, work: Callable[[], None]) -> None:
        """Have the thread do `work`, after the device has done what it was given so far."""
        self.join()
        fork = self._of.Event()
        fork.record(self._of.current_stream(self._device))

        @torch.no_grad()
        def on_thread() -> None:
            # A new thread is on device 0. Without this, leaving the stream brings it back there and takes memory there.
            self._of.set_device(self._device)
            with self._of.stream(self._stream):
                self._stream.wait_event(fork)
                work()

        # An interrupt may come between: the promise is kept before the thread can have it.
        promise = _Promise(on_thread)
        try:
            self._running = promise
            _host_calls().put(promise)
            promise.is_given = True
        except BaseException:
            if promise.take_back():
                self._running = None
            raise

    def join(self) -> None:
        """Wait for the thread."""
        promise = self._running
        if promise is None:
            return
        try:
            promise.wait()
        finally:
            if promise.is_over and self._running is promise:  # else the wait was interrupted
                self._running = None


class _Promise:
    """Work for the host thread: the thread begins it, or it is taken back, whichever comes first.

    Attributes:
        is_given: whether the thread surely gets it. Interrupts may have come between.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._owner: dict[str, str] = {}
        self._end = End()
        self.is_given = False

    def __call__(self) -> None:
        """Do the work, on the thread."""
        if self._owner.setdefault("by", "thread") == "thread":
            self._end.come_of(self._work)

    def take_back(self) -> bool:
        """See that the thread does not begin the work; False if it has begun."""
        return self._owner.setdefault("by", "caller") == "caller"

    @property
    def is_over(self) -> bool:
        """Whether the work is done, or was taken back."""
        return self._end.has_come or self._owner.get("by") == "caller"

    def wait(self) -> None:
        """Wait until it is over, and raise what the work raised."""
        if not self.is_given:
            self.take_back()  # unless the thread has begun it
        if not self.is_over:
            self._end.wait()
        if self._end.failure is not None:
            raise self._end.failure


def has_streams(device: torch.device) -> bool:
    """Whether torch offers streams for that kind of device; for Apple's it does not."""
    of = torch.get_device_module(device)
    return all(hasattr(of, name) for name in ("Stream", "Event", "current_stream", "stream"))


def stream_beside(live: Collection[torch.device], averaged: Collection[torch.device]) -> Stream:
    """A stream beside training, for live weights and averages on these devices; in line where these are several."""
    if len(set(live)) != 1 or len(set(averaged)) != 1:
        return Stream()
    (of_live,), (of_averages,) = set(live), set(averaged)
    if not has_streams(of_live):
        return Stream()
    if of_live == of_averages:
        return SideStream(of_live)
    return HostThread(of_live) if of_averages.type == "cpu" else Stream()


class Joinable(Protocol):
    """What a step must wait for."""

    def join(self) -> None:
        """As `Stream.join`."""
        ...


def join_before_steps(averages: Joinable) -> Callable[[], None]:
    """Have every torch optimizer of this process join the averages before its steps. No communication.

    Returns a function that undoes this. The end of `averages`, to which no reference is kept, undoes it too.
    """
    global _hook
    _beside.add(averages)
    if _hook is None:
        # There is one hook for all averages: a step breaks if one of its hooks is removed while it calls them, as a
        # finalizer might. A compiled step traces its hooks too.
        _hook = register_optimizer_step_pre_hook(torch.compiler.disable(lambda *_: join_all()))
    alive = weakref.ref(averages)

    def undo() -> None:
        global _hook
        joined = alive()
        if joined is not None:
            _beside.discard(joined)
        if not _beside and _hook is not None:
            _hook.remove()
            _hook = None

    return undo


def join_all() -> None:
    """Join all averages that `join_before_steps` was given, before live weights are written."""
    for averages in list(_beside):
        averages.join()


_beside: weakref.WeakSet[Joinable] = weakref.WeakSet()
_host_threads: weakref.WeakSet[HostThread] = weakref.WeakSet()
_hook: RemovableHandle | None = None
_host: KeptThreads | None = None


def _host_calls() -> KeptThreads:
    """The one thread for all averages: several would wait for the same memory."""
    global _host
    if _host is None:
        _host = KeptThreads()
    _host.grow(1)
    return _host


def _forget() -> None:
    """A forked process has the records of the thread and of its work, but not the thread."""
    global _host
    _host = None
    for host_thread in _host_threads:
        host_thread._running = None


def _join_at_exit() -> None:
    for host_thread in list(_host_threads):
        with suppress(Exception):
            host_thread.join()


@functools.cache
def _watch_process() -> None:
    """Once for each process, and not at import."""
    os.register_at_fork(after_in_child=_forget)
    atexit.register(_join_at_exit)
