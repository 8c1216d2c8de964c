"""Where an update runs: in line, or beside training until somebody joins it. No communication.

    training stream   | step t |  forward, backward of t + 1    | step t + 1 |
                               v fork                           ^ join
    side stream                [ update of t ]

The update reads what step t wrote, so it waits for the training stream when it begins; whoever writes the live weights
or touches the averages next joins it: the training stream then waits on the device, the host does not. Averages kept
in host memory are updated by a host thread; joining that one does block the host.

On a CPU the same calls run one after the other: torch's CPU streams do nothing.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

__all__ = ["HostThread", "SideStream", "Stream", "has_streams", "join_all", "join_before_steps", "stream_beside"]


class Stream:
    """Runs work in the order in which it is given. This one at once: nothing overlaps."""

    def run(self, work: Callable[[], None]) -> None:
        """Have `work` done after all that the current stream has been given so far.

        It must touch tensors only: the modules that they are in may change meanwhile.
        """
        work()

    def join(self) -> None:
        """See that what the current stream is given from now on comes after all work. Raises what the work raised."""

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """See that memory which work uses is not given to others before that is done, even if nobody refers to it."""

    def hold(self, flag: torch.Tensor) -> torch.Tensor:
        """The flag with its value of now, whatever becomes of the tensor before the work reads it."""
        return flag


class SideStream(Stream):
    """Work on a stream of its own, on the device of the live weights.

    Args:
        device: of the live weights and of the averages; a CPU runs the work in line.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of: Any = torch.get_device_module(device)
        self._stream: Any = self._of.Stream() if device.type == "cpu" else self._of.Stream(device=device)
        self._done: Any = None
        self._process = os.getpid()

    def __deepcopy__(self, memo: object) -> Stream:
        """In line: a copy of an average has no hook that would join it."""
        return Stream()

    def run(self, work: Callable[[], None]) -> None:
        """Have the device do `work` beside what the current stream is given next; the host only launches it."""
        self._stream.wait_stream(self._of.current_stream(self._device))
        self._done = self._done or self._of.Event()
        try:
            with self._of.stream(self._stream):
                work()
            self._done.record(self._stream)
        except BaseException:  # what the device was given must be waited for, even if an interrupt follows another
            try:
                self._done.record(self._stream)
            finally:
                self._done.record(self._stream)
            raise

    def join(self) -> None:
        """Have the current stream wait for the work; the host does not."""
        if self._done is None or os.getpid() != self._process:  # a forked one has no device
            return
        is_capturing = getattr(self._of, "is_current_stream_capturing", None)
        if is_capturing is None or not is_capturing():  # what lies before a graph cannot be waited for within it
            # Each time: the current stream may be another one than that which joined first.
            self._of.current_stream(self._device).wait_event(self._done)

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tell the allocator, which knows only the stream that memory was taken for."""
        for tensor in tensors:
            if tensor.device.type != "cpu":
                tensor.record_stream(self._stream)

    def hold(self, flag: torch.Tensor) -> torch.Tensor:
        """A copy, made on the current stream."""
        held = flag.clone()
        self.keep([held])
        return held


class HostThread(SideStream):
    """Work on a host thread, whose copies from the device run on a side stream: for averages in host memory.

    Args:
        device: of the live weights.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._running: Future[None] | None = None
        _watch_forks()
        _host_threads.add(self)

    def run(self, work: Callable[[], None]) -> None:
        """Have the thread do `work`, once the device has done what it was given so far."""
        self.join()
        fork = self._of.Event()
        fork.record(self._of.current_stream(self._device))

        @torch.no_grad()
        def on_thread() -> None:
            # A new thread is on device 0; entering the stream alone would bring it back there, and take memory there.
            self._of.set_device(self._device)
            with self._of.stream(self._stream):
                self._stream.wait_event(fork)
                work()

        # Known before the thread can have it: an interrupt may come between.
        running: Future[None] = Future()
        try:
            self._running = running
            _thread().submit(_fulfil, running, on_thread)
        except BaseException:
            if running.cancel():
                self._running = None
            raise

    def join(self) -> None:
        """Wait for the thread."""
        running = self._running
        if running is None:
            return
        try:
            running.result()
        finally:
            if running.done() and self._running is running:  # else the wait was interrupted
                self._running = None


def _fulfil(promise: Future[None], work: Callable[[], None]) -> None:
    """Do the work of a promise that was not taken back."""
    if not promise.set_running_or_notify_cancel():
        return
    try:
        work()
    except BaseException as error:
        promise.set_exception(error)
    else:
        promise.set_result(None)


def has_streams(device: torch.device) -> bool:
    """Whether torch offers streams for that kind of device; not for Apple's, say."""
    of = torch.get_device_module(device)
    return all(hasattr(of, name) for name in ("Stream", "Event", "current_stream", "stream"))


def stream_beside(live: Collection[torch.device], averaged: Collection[torch.device]) -> Stream:
    """A stream beside training, for live weights and averages on these devices; in line where they are on several."""
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
    """Have each torch optimizer of this process join the averages before each of its steps. No communication.

    Returns what undoes it; so does the end of `averages`, to which no reference is kept.
    """
    global _hook
    _beside.add(averages)
    if _hook is None:
        # One for all: removing one while a step walks through its hooks, as a finalizer might, would break that step. A
        # compiled step traces its hooks too.
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
    """Join all averages that `join_before_steps` was given: before live weights are written."""
    for averages in list(_beside):
        averages.join()


_beside: weakref.WeakSet[Joinable] = weakref.WeakSet()
_host_threads: weakref.WeakSet[HostThread] = weakref.WeakSet()
_hook: RemovableHandle | None = None
_executor: ThreadPoolExecutor | None = None


def _thread() -> ThreadPoolExecutor:
    """One for all averages: they would wait for the same memory."""
    global _executor
    if _executor is None:
        _executor = ThreadPoolExecutor(1, thread_name_prefix="dist_ema-host")
    return _executor


def _forget() -> None:
    """A forked process has the records of the executor and of its work, but not its thread."""
    global _executor
    _executor = None
    for each in _host_threads:
        each._running = None


@functools.cache
def _watch_forks() -> None:
    """Once for each process, and not at import."""
    os.register_at_fork(after_in_child=_forget)
