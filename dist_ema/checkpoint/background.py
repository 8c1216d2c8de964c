"""A save behind training: the values of the call are copied to the host, and a thread writes them.

The thread communicates on a process group of its own, so that it never meets the collectives of training or of other
calls. Saves go one at a time: the next call waits for the thread first, and raises its error.
"""

from __future__ import annotations

import atexit
import functools
import threading
import time
import traceback
from collections.abc import Callable, Mapping

import torch

from dist_ema.averaging.averages import aligned
from dist_ema.boxes.shards import Box
from dist_ema.checkpoint.writing import Pieces
from dist_ema.uninterrupted.threads import End, insist

__all__ = ["Background"]

_ALIGNMENT_BYTES = 64
# A thread that was started has begun within this time.
_BEGINS_SECONDS = 1.0


class Background:
    """The save that is under way, if there is one, and the host memory for the next; both are kept between saves."""

    def __init__(self) -> None:
        self._save: _Save | None = None
        self._host: torch.Tensor | None = None

    @torch.no_grad()
    def copied(self, tracks: Mapping[str, Pieces]) -> dict[str, Pieces]:
        """The pieces with the values that they have now, in host memory. No communication; waits for the device."""
        pieces = [piece for of_track in tracks.values() for piece in of_track]
        starts, total = [], 0
        for _, values in pieces:
            starts.append(total)
            total += aligned(values.nbytes, _ALIGNMENT_BYTES)
        devices = {values.device for _, values in pieces if values.device.type != "cpu"}
        if self._host is None or self._host.numel() != total:
            self._host = None  # the former memory is freed before the new memory is made
            pinned = any(device.type == "cuda" for device in devices)
            self._host = torch.empty(total, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        copies: list[tuple[Box, torch.Tensor]] = []
        for (box, values), start in zip(pieces, starts, strict=True):
            copy = self._host[start : start + values.nbytes].view(values.dtype).view(values.shape)
            copies.append((box, copy.copy_(values, non_blocking=True)))
        for device in devices:
            torch.accelerator.synchronize(device)
        rest = iter(copies)
        return {track: [next(rest) for _ in of_track] for track, of_track in tracks.items()}

    def start(self, work: Callable[[], None]) -> None:
        """Have the thread do `work`. No communication here; `wait` must have been called."""
        # All saves share one process group: they go one after the other, on every rank in the order of the calls.
        self._save = _Save(work, _under_way[-1]._save if _under_way else None)
        _watch_exit()
        _under_way.append(self)
        self._save.start()

    def wait(self) -> None:
        """Wait for the save that is under way, if there is one. No communication here.

        Raises:
            CheckpointError: the save failed; the same on all ranks.
        """
        save = self._save
        if save is None:
            return
        save.join()
        if self in _under_way:
            _under_way.remove(self)
        self._save = None
        if save.end.failure is not None:
            raise save.end.failure


class _Save:
    """One save, on a thread of its own.

    Nobody joins that thread: a join that a signal handler cuts off takes the thread for ended (Python 3.11).

    Attributes:
        end: the end of the work.

    Args:
        work: writes the save.
        before: the save that must be over first; None if there is none.
    """

    def __init__(self, work: Callable[[], None], before: _Save | None) -> None:
        self.end = End()
        self._work = work
        self._before = before
        self._owner: dict[str, str] = {}
        # It is not a daemon: the interpreter waits for it at exit.
        self._thread = threading.Thread(target=self._run, name="dist_ema-save", daemon=False)

    def start(self) -> None:
        """Begin. After an interrupt it may never do so."""
        insist(self._thread.start)  # an interrupt within it would come out as an error of Python's locks

    def _run(self) -> None:
        if self._owner.setdefault("by", "thread") == "thread":
            if self._before is not None:
                self._before.join()
                self._before = None
            self.end.come_of(self._work)

    def join(self) -> None:
        """Wait until it is over; one that has not begun by now never does. It raises what a signal handler raises."""
        deadline = time.monotonic() + _BEGINS_SECONDS
        while self._thread.ident is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._thread.ident is not None or self._owner.setdefault("by", "caller") == "thread":
            self.end.wait()


# The saves that no call has waited for yet, in the order of the calls. They are kept alive until then.
_under_way: list[Background] = []


def _wait_at_exit() -> None:
    while _under_way:
        first = _under_way[0]
        try:
            first.wait()
        except Exception:
            traceback.print_exc()
        if first in _under_way:  # an interrupt has left it there, though its save is over: the process would never end
            _under_way.remove(first)


@functools.cache
def _watch_exit() -> None:
    """Once for each process, and not at import."""
    atexit.register(_wait_at_exit)
