"""The hooks of an attached average notice updates that are counted twice, and updates that are never used.

They also notice, among their callers, steps that are none, and the Trainer that owns an accelerator. The hooks of all
trainers update through here, so the blends of `blend_every` follow here too. Else no communication: rank 0 alone warns.
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
from collections.abc import Iterator
from typing import Any

import torch

from dist_ema.averaging.usage import Use
from dist_ema.ema import ShardedEMA
from dist_ema.live.blending import Blending
from dist_ema.messages import tell

__all__ = ["Watch", "callers", "is_of_a_trainer", "is_state_initialisation"]


# The time from the return of a `main()` to the end of its process is shorter.
_ENDING_SECONDS = 10.0


@dataclasses.dataclass(eq=False)
class _Record:
    """The facts about an average that the end of the process needs; the average itself may be gone by then."""

    name: str
    use: Use
    process: int
    save_it: str
    num_hook_updates: int = 0
    gone_at: float | None = None

    @property
    def is_unused(self) -> bool:
        """Whether the hooks have made updates in this process, and no call has given the average to the user."""
        return self.process == os.getpid() and self.num_hook_updates > 0 and not self.use.is_given

    @property
    def is_past(self) -> bool:
        """Whether the process has gone on to other work since the average was freed."""
        return self.gone_at is not None and time.monotonic() - self.gone_at > _ENDING_SECONDS


# The records of rank 0 that the end of the process reads.
_records: list[_Record] = []


class Watch:
    """The hooks of one attached average, as rank 0 sees them; on other ranks it watches nothing.

    Args:
        ema: the average.
        name: the name that `attach` got.
        rank: this rank.
        ends: whether only `ema` gives the averages to the user; the user has a teacher module without it.
        hook: who calls `update`, for the message.
        save_it: how the averages come into a checkpoint, for the message.
        blending: when the average is blended back into the live weights; None for never.
    """

    def __init__(
        self,
        ema: ShardedEMA,
        name: str,
        *,
        rank: int,
        ends: bool,
        hook: str = "attach",
        save_it: str = "accelerator.save_state(dir) writes them too",
        blending: Blending | None = None,
    ) -> None:
        self._record = record = _Record(name, ema.use, os.getpid(), save_it)
        self._hook = hook
        self._seen_calls = ema.use.num_calls
        self._tells = rank == 0
        self._blending = blending
        if self._tells and ends:
            # A process that attaches another average (a sweep, a test) needs no warning of those that are gone.
            _records[:] = [other for other in _records if other.gone_at is None]
            _watch_exit()
            _records.append(record)
            weakref.finalize(ema, lambda: setattr(record, "gone_at", time.monotonic())).atexit = False
            ema.on_detach(self.forget)

    def update(self, ema: ShardedEMA, found_inf: torch.Tensor | None) -> None:
        """The update of the hook, and the blend that is due after it. It notices updates of the user before it.

        No communication but for a blend, which is collective where `average_parameters` is.

        Args:
            ema: the average, which is not kept here: its end is noticed.
            found_inf: as for `ShardedEMA.update`.
        """
        self._notice_others()
        following = ema.num_updates + 1
        ema.update(found_inf=found_inf)
        self._record.num_hook_updates += 1
        self._seen_calls = self._record.use.num_calls
        # Of a step that may have been skipped only a second look at the count, which waits for the device, knows more.
        blending, start = self._blending, ema.use.first_start
        if blending is not None and blending.is_due(following, start) and ema.num_updates == following:
            ema.copy_to_model(ema.tracks[0], weight=blending.weight)

    def _notice_others(self) -> None:
        """Notice updates of the user since the last one of the hook."""
        record = self._record
        if record.num_hook_updates == 0:
            record.use.is_given = False
        elif record.use.num_calls > self._seen_calls and self._tells:
            self._tells = False
            tell(
                f"update() of the average {record.name!r} was called between two steps of its optimizer, after each of "
                f"which {self._hook} calls it already: every such step counts twice, and the average is shorter than "
                "its schedule says. Leave ema.update() out of the loop"
            )

    def start_over(self) -> None:
        """Forget the updates so far, which a load has replaced."""
        self._record.num_hook_updates = 0

    def end(self) -> None:
        """End the training: warn if the updates were never used, unless an exception is being raised."""
        if self._record in _records and sys.exc_info()[0] is None:
            self.forget()
            _tell_unused([self._record])

    def forget(self) -> None:
        """Make the end of the process say nothing of this average."""
        if self._record in _records:
            _records.remove(self._record)


def _at_exit() -> None:
    if getattr(sys, "last_type", None) is None:  # it is set if the process ends with a traceback
        _tell_unused([record for record in _records if not record.is_past])


@functools.cache
def _watch_exit() -> None:
    """Register `_at_exit` once in a process, and not at import."""
    atexit.register(_at_exit)


def _tell_unused(records: list[_Record]) -> None:
    unused = [record for record in records if record.is_unused]
    if unused:
        names = ", ".join(f"{record.name!r} ({record.num_hook_updates})" for record in unused)
        tell(
            f"averages were updated and never used: {names}. No checkpoint, export or evaluation of this process had "
            f"them, and they are lost now. Save them: {unused[0].save_it}, "
            "ema.consolidate(path) writes a model folder; evaluate them inside ema.average_parameters(). Call "
            "ema.detach() where an average is not wanted any more"
        )


def is_of_a_trainer(accelerator: object) -> bool:
    """Whether a `Trainer` of transformers owns the accelerator: it writes its checkpoints without `save_state`."""
    trainer: Any = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if not isinstance(trainer, type):  # transformers.trainer was not imported, so there is no Trainer
        return False
    for frame in callers():  # usually the call comes from within train()
        if frame.f_globals.get("__name__") == "transformers.trainer":
            owner = frame.f_locals.get("self")
            if isinstance(owner, trainer) and getattr(owner, "accelerator", None) is accelerator:
                return True
    owners = (living for living in gc.get_objects() if issubclass(type(living), trainer))
    return any(getattr(owner, "accelerator", None) is accelerator for owner in owners)


def is_state_initialisation() -> bool:
    """Whether the running `optimizer.step()` is the one by which torch's DCP creates an empty optimizer's state.

    `get_optimizer_state_dict` and `set_optimizer_state_dict` call `step()` once with zero gradients and lr 0 on an
    optimizer without state (accelerate's FSDP2 save and load reach them). That is no training step, so it is no update.
    An lr of 0 is no proof, because a warm-up may begin there, but the calling function is.
    `test_a_phantom_step_of_dcp_is_not_counted` guards this.
    """
    return any(
        frame.f_code.co_name == "_init_optim_state"
        and frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict"
        for frame in callers()
    )


def callers() -> Iterator[types.FrameType]:
    """The frames of the callers, the nearest first."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
