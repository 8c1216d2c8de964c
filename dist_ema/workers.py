"""Work on the CPU that is shared out to threads, without a fork and join for each tensor.

torch divides every tensor of a list among its threads on its own, and joins them before the next. Where another process
is busy on the same cores, each join waits for a thread that is not running: an update of 161 tensors was seen to take
12 times its time. Here threads take batches from a queue and meet once, at the end. A batch should hold pieces of less
than 32768 elements, which torch does in the calling thread. No communication.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import torch

__all__ = ["SERIAL_NUMEL", "num_workers", "share_out"]

T = TypeVar("T")

# Elements that torch does not divide among threads (its grain is 32768), less a cache line's worth.
SERIAL_NUMEL = 32768 - 64

# More do not make memory faster, and each needs a scratch.
_MOST_WORKERS = 16

_pool: ThreadPoolExecutor | None = None


def num_workers() -> int:
    """Threads that `share_out` uses: as many as torch does, up to 16."""
    return min(torch.get_num_threads(), _MOST_WORKERS)


def share_out(work: Callable[[T, int], None], batches: Sequence[T], workers: int) -> None:
    """Have `work(batch, worker)` done for every batch, by the calling thread (worker 0) and others, all without grad.

    Raises whatever `work` raised first in the calling thread, else in another; the others finish their batch.
    """
    if workers == 1:
        with torch.no_grad():
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

    helping: list[Future[None]] = []
    try:
        with suppress(RuntimeError):  # no more threads, or the interpreter is ending: those that there are do the work
            for worker in range(1, min(workers, len(batches))):
                helping.append(_threads().submit(serve, worker))
        serve(0)
    finally:
        queue.clear()
        failures = [each.exception() for each in helping]  # waits for all of them
    for failure in failures:
        if failure is not None:
            raise failure


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(_MOST_WORKERS - 1, thread_name_prefix="dist_ema-update")
    return _pool


def _forget() -> None:
    """A forked process has the pool's records but not its threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget)
