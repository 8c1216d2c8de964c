"""Work on the CPU that is shared out to threads, without a fork and join for each tensor.

torch divides every tensor of a list among its threads on its own, and joins them before the next. Where another process
is busy on the same cores, each join waits for a thread that is not running: an update of 161 tensors was seen to take
12 times its time. Here threads take batches from a queue and meet once, at the end. The tensors of a batch should have
less than 32768 elements, which torch does in the calling thread. No communication.
"""

from __future__ import annotations

import _thread
import functools
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import TypeVar

import torch

from dist_ema.uninterrupted.threads import End, outlast

__all__ = ["SERIAL_NUMEL", "KeptThreads", "num_workers", "share_out"]

T = TypeVar("T")

# Elements that torch does not divide among threads (its grain is 32768), less a cache line's worth.
SERIAL_NUMEL = 32768 - 64

# More threads do not make memory faster, and every thread needs a scratch.
_MOST_WORKERS = 16

_pool: KeptThreads | None = None


def num_workers() -> int:
    """Threads that `share_out` uses: as many as torch does, up to 16."""
    return min(torch.get_num_threads(), _MOST_WORKERS)


def share_out(work: Callable[[T, int], None], batches: Sequence[T], workers: int) -> None:
    """Do `work(batch, worker)` for every batch, in the calling thread (worker 0) and others, all without grad.

    Raises whatever `work` raised first in the calling thread, else in another; the others finish their batch.
    """
    if workers == 1 and not torch.is_grad_enabled():
        for batch in batches:
            work(batch, 0)
        return
    queue = deque(batches)

    @torch.no_grad()
    def serve(worker: int) -> None:
        while True:
            try:
                batch = queue.popleft()
            except IndexError:
                return
            work(batch, worker)

    helping: list[End] = []
    try:
        with suppress(RuntimeError):  # no more threads, or the interpreter is ending: the existing threads do the work
            for worker in range(1, min(workers, len(batches))):
                end = End()
                _threads(worker).put(functools.partial(end.come_of, functools.partial(serve, worker)))
                helping.append(end)
        serve(0)
    finally:
        queue.clear()
        latest = outlast(helping)
        if latest is not None:
            raise latest
    for end in helping:
        if end.failure is not None:
            raise end.failure


class KeptThreads:
    """Threads that are kept between updates, and do the calls that `put` gives them. They end with the process.

    A handler that raises within `ThreadPoolExecutor.submit` may leave a lock of the pool locked: every later update
    would wait for it forever. The queue here is C, and no handler runs while it is used.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._num_threads = 0
        self.put = self._calls.put

    def grow(self, num_threads: int) -> None:
        """Have so many threads at least. Raises a RuntimeError if there can be no more."""
        while self._num_threads < num_threads:
            _thread.start_new_thread(self._serve, ())
            self._num_threads += 1

    def _serve(self) -> None:
        while True:
            self._calls.get()()


def _threads(num_threads: int) -> KeptThreads:
    global _pool
    if _pool is None:
        _watch_forks()
        _pool = KeptThreads()
    _pool.grow(num_threads)
    return _pool


def _forget() -> None:
    """A forked process has the pool's records but not its threads."""
    global _pool
    _pool = None


@functools.cache
def _watch_forks() -> None:
    """Once for each process, and not at import."""
    os.register_at_fork(after_in_child=_forget)
