"""What the hooks of an attached average notice: updates counted twice, and updates that were never used.

No communication: what is said here, rank 0 says alone.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import os
import sys
import time
import types
import weakref
from typing import Any

from dist_ema.averaging.usage import Use
from dist_ema.ema import ShardedEMA
from dist_ema.messages import tell

__all__ = ["Watch", "is_of_a_trainer"]


# From the return of a `main()` to the end of its process it takes less.
_ENDING_SECONDS = 10.0


@dataclasses.dataclass(eq=False)
class _Record:
    """What is to be known of an average when the process ends; the average itself may be gone by then."""

    name: str
    use: Use
    process: int
    num_hook_updates: int = 0
    gone_at: float | None = None

    @property
    def is_unused(self) -> bool:
        """Whether the hooks have made updates, in this process, and the average was never given to the user."""
        return self.process == os.getpid() and self.num_hook_updates > 0 and not self.use.is_given

    @property
    def is_past(self) -> bool:
        """Whether the process has gone on to other things since the average went."""
        return self.gone_at is not None and time.monotonic() - self.gone_at > _ENDING_SECONDS


# Records of rank 0 that the end of the process asks.
_records: list[_Record] = []


class Watch:
    """The hooks of one attached average, as seen from rank 0; elsewhere it watches nothing.

    Args:
        ema: the average.
        name: the one given to `attach`.
        ends: whether the user has only `ema` to get at the averages; a teacher runs forward.
    """

    def __init__(self, ema: ShardedEMA, name: str, *, rank: int, ends: bool) -> None:
        self._record = record = _Record(name, ema.use, os.getpid())
        self._seen_calls = ema.use.num_calls
        self._tells = rank == 0
        if self._tells and ends:
            # A process that goes on to another average (a sweep, a test) has done with those that are gone.
            _records[:] = [record for record in _records if record.gone_at is None]
            _watch_exit()
            _records.append(record)
            weakref.finalize(ema, lambda: setattr(record, "gone_at", time.monotonic())).atexit = False
            ema.on_detach(self.forget)

    def before_update(self) -> None:
        """To be called by the step hook before each of its updates."""
        record = self._record
        if record.num_hook_updates == 0:
            record.use.is_given = False
        elif record.use.num_calls > self._seen_calls and self._tells:
            self._tells = False
            tell(
                f"update() of the average {record.name!r} was called between two steps of its optimizer, after each of "
                "which attach calls it already: every such step counts twice, and the average is shorter than its "
                "schedule says. Leave ema.update() out of the loop"
            )

    def after_update(self) -> None:
        """To be called by the step hook after each of its updates."""
        self._record.num_hook_updates += 1
        self._seen_calls = self._record.use.num_calls

    def start_over(self) -> None:
        """After a load: the updates so far are gone."""
        self._record.num_hook_updates = 0

    def end(self) -> None:
        """At the end of training: warn if the updates were never used. Not while an exception goes through."""
        if self._record in _records and sys.exc_info()[0] is None:
            self.forget()
            _tell_unused([self._record])

    def forget(self) -> None:
        """Have the end of the process say nothing of this average."""
        if self._record in _records:
            _records.remove(self._record)


def _at_exit() -> None:
    if getattr(sys, "last_type", None) is None:  # set where the process ends with a traceback
        _tell_unused([record for record in _records if not record.is_past])


@functools.cache
def _watch_exit() -> None:
    """Once for each process, and not at import."""
    atexit.register(_at_exit)


def _tell_unused(records: list[_Record]) -> None:
    unused = [record for record in records if record.is_unused]
    if unused:
        names = ", ".join(f"{record.name!r} ({record.num_hook_updates})" for record in unused)
        tell(
            f"averages were updated and never used: {names}. No checkpoint, export or evaluation of this process had "
            "them, and they are lost now. Save them: accelerator.save_state(dir) writes them too, "
            "ema.consolidate(path) writes a model folder; evaluate them inside ema.average_parameters(). Call "
            "ema.detach() where an average is not wanted any more"
        )


def is_of_a_trainer(accelerator: object) -> bool:
    """Whether a `Trainer` of transformers owns the accelerator: it writes its checkpoints without `save_state`."""
    trainer: Any = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if not isinstance(trainer, type):  # not imported, so there is none
        return False
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:  # within train(), the usual place
        if frame.f_globals.get("__name__") == "transformers.trainer":
            owner = frame.f_locals.get("self")
            if isinstance(owner, trainer) and getattr(owner, "accelerator", None) is accelerator:
                return True
        frame = frame.f_back
    owners = (owner for owner in gc.get_objects() if issubclass(type(owner), trainer))
    return any(getattr(owner, "accelerator", None) is accelerator for owner in owners)
