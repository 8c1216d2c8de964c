"""The context in which the averaged weights are in the model: see [Note: interrupts] in uninterrupted/jobs.py."""

from __future__ import annotations

import functools
import io
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import torch

from dist_ema.averaging.state import AveragedState
from dist_ema.averaging.streams import join_all
from dist_ema.live.blending import checked_weight
from dist_ema.live.correction import Correction
from dist_ema.live.holders.replicas import Replicas
from dist_ema.live.kept_buffers import check_keeping, keep_buffers
from dist_ema.live.spreading import LiveBackup, put_average
from dist_ema.ranks.calls import Call, Calls
from dist_ema.uninterrupted.threads import insist

__all__ = ["Swap", "agreed_values", "meeting", "put_for_good"]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Swap(io.IOBase):
    """A context manager: the averaged weights are in the model inside, the live ones again after it.

    [Note: the exit is C]
    An exception in an `__exit__` in Python would leave the averaged weights in the model: a signal handler may run, and
    raise, where a function in Python begins, before its first line. The `__exit__` of files is written in C and calls
    `close`, which here resumes a generator, in the middle of its `try`. Nothing else of a file is in this class.

    Args:
        calls: the calls of the average.
        state: the averages of this rank.
        replicas: the tensors that several ranks hold alike.
        track: the name of the average; may be None if there is one.
        keep_buffers: whether the buffers that are in the model at the end of the block are kept with the average.
        correct: what corrects the averages; None for the averages as they are.
    """

    closed = True  # nothing to close for a swap that was never entered

    def __init__(
        self,
        calls: Calls,
        state: AveragedState,
        replicas: Replicas,
        track: str | None,
        *,
        keep_buffers: bool,
        correct: Correction | None = None,
    ) -> None:
        self._calls = calls
        self._state = state
        self._replicas = replicas
        self._track = track
        self._keep_buffers = keep_buffers
        self._correct = correct

    def __enter__(self) -> None:  # type: ignore[override]
        call, mode = Call(self._calls, "average_parameters"), torch.is_grad_enabled()
        swapping = self._swapping(call)
        try:
            self.close = functools.partial(next, swapping, None)  # type: ignore[method-assign]
            return next(swapping)  # nothing after it: the `try` would not cover a line of its own
        except BaseException as error:
            try:
                try:
                    try:
                        swapping.close()
                    finally:
                        swapping.close()
                finally:
                    call.end_for_all(error)
                    torch.set_grad_enabled(mode)
            except BaseException as further:  # a second one, before the first was dealt with
                torch.set_grad_enabled(mode)
                call.end_for_all(further)
                raise
            raise

    def __call__(self, function: F) -> F:
        """Decorate a function: every call of it is within a swap of its own."""

        @functools.wraps(function)
        def within(*args: Any, **kwargs: Any) -> Any:
            again = (self._calls, self._state, self._replicas, self._track)
            swap = Swap(*again, keep_buffers=self._keep_buffers, correct=self._correct)
            # One line: before a line of its own, an interrupt would come between the end of the block and the exit.
            with swap: return function(*args, **kwargs)  # noqa: E701  # fmt: skip

        return within  # type: ignore[return-value]

    def _swapping(self, call: Call) -> Generator[None, None, None]:
        state, keep = self._state, self._keep_buffers
        handled = sys.exc_info()[1]  # the `with` statement may itself stand in an `except` clause

        def set_aside() -> LiveBackup:
            check_keeping(state, keep, is_corrected=self._correct is not None)
            return LiveBackup(state.plan)

        values, backup = agreed_values(
            call, state, self._replicas, self._track, set_aside, correct=self._correct, keep_buffers=keep
        )
        track, leave = state.track(self._track), _Leave(state, backup)
        # A second and a third interrupt may come before the first was dealt with: so the same stands here three times.
        try:
            try:
                try:
                    buffers = state.shown_buffers(track)
                    state.swap_in(track)
                    put_average(state.plan, values, meeting(call, state), buffers)
                    yield
                    leave.note_mode()
                    if keep and sys.exc_info()[1] is handled:  # no exception has ended the block
                        keep_buffers(state, track)
                finally:
                    leave()
            finally:
                leave()
        finally:
            leave()


def put_for_good(call: Call, state: AveragedState, replicas: Replicas, track: str | None, weight: float = 1.0) -> None:
    """Collective along replicas only. Put averaged values into the model; after an interrupt the live ones are there.

    Where ranks hold the same tensors, the live values are kept aside until the end.
    Elsewhere an interrupt is raised when all is done.

    Args:
        call: the call in which the values are put there.
        state: the averages of this rank.
        replicas: the tensors that several ranks hold alike.
        track: the name of the average; may be None if there is one.
        weight: the weight of the averaged values; the live ones have the rest.
    """
    plan = state.plan

    def set_aside() -> LiveBackup | None:
        checked_weight("weight", weight)
        return LiveBackup(plan) if plan.has_replicas else None

    values, backup = agreed_values(call, state, replicas, track, set_aside, weight=weight)
    # Buffers that are kept with the average were computed for it alone.
    buffers = state.shown_buffers(track) if weight == 1.0 else {}
    if backup is None:
        # Not a step of a job of its own, which an interrupt would have done twice: that would blend twice.
        put_average(plan, values, (), buffers, weight)
        return
    leave = _Leave(state, backup)
    try:
        try:
            state.swap_in(state.track(track))
            put_average(plan, values, meeting(call, state), buffers, weight)
            state.swap_out()
        except BaseException:
            leave()
            raise
    except BaseException:  # a second one, before the first was dealt with
        leave()
        raise


def agreed_values(
    call: Call,
    state: AveragedState,
    replicas: Replicas,
    track: str | None,
    work: Callable[[], T],
    *,
    correct: Correction | None = None,
    **further: object,
) -> tuple[tuple[torch.Tensor, ...], T]:
    """The averaged values of one track, and what `work` returns.

    Collective only where ranks hold the same tensors: there all of these ranks must call it, with the same track.

    Args:
        call: the call in which the values are used.
        state: the averages of this rank.
        replicas: the tensors that several ranks hold alike.
        track: the name of the average; may be None if there is one.
        work: the further work, which must not communicate.
        correct: what corrects the averages; all ranks must call it if that reads from disk.
        further: further arguments of the call, which must be alike on these ranks.
    """

    def prepare() -> tuple[tuple[torch.Tensor, ...], T]:
        if correct is not None:
            correct.check()
        return state.values(track), work()

    if not state.plan.has_replicas and not (correct is not None and correct.reads):
        values, done = call.alone(prepare)
    else:
        same = {"correct": repr(correct), **further}
        values, done = call.together(prepare, lambda _: {"track": state.track(track), **state.progress, **same})
        if state.plan.has_replicas:
            replicas.check_once(call.name, state.num_updates)
    return values if correct is None else correct(call, track, values), done


def meeting(call: Call, state: AveragedState) -> Sequence[Callable[[], None]]:
    """Steps after which no rank can stay out of what follows; none where nothing is sent."""
    return call.exchange.channel.meeting(call.name) if state.plan.has_replicas else ()


# Taken by threads only: an interrupt would leave it locked in a thread that has a signal handler.
_RESTORING = threading.Lock()


class _Leave:
    """Puts the live weights back and ends the swap; further calls do nothing. No communication."""

    def __init__(self, state: AveragedState, backup: LiveBackup) -> None:
        self._state = state
        self._backup = backup
        self._is_carried_off = False
        self._has_failed = False
        self._mode: bool | None = None  # whether autograd was on when the leaving began

    def note_mode(self) -> None:
        """Have autograd at the end as it is now: an interrupt within `torch.no_grad()` may leave it off."""
        if self._mode is None:
            self._mode = torch.is_grad_enabled()

    def __call__(self, *, again: bool = False) -> None:
        """Put the live weights back; after an interrupt, in a thread that no signal handler interrupts.

        Args:
            again: try again after a failure.
        """
        state, backup = self._state, self._backup
        if backup.is_restored and not state.is_swap_ending:
            return
        self.note_mode()
        state.swap_ends_by(functools.partial(self, again=True))
        if self._is_carried_off:
            self._carry_off(again)
            return
        try:
            join_all()
            backup.restore()
        except BaseException:
            self._carry_off(again)
            raise
        self._restore_mode()
        state.swap_out()

    def _restore_mode(self) -> None:
        if self._mode is not None:
            torch.set_grad_enabled(self._mode)  # see calls.py

    def _carry_off(self, again: bool) -> None:
        """Have a thread put the weights back. An interrupt before that is raised here; the caller calls again."""
        self._is_carried_off = True
        try:
            insist(functools.partial(self._restore_anyway, again))
        finally:  # a further interrupt is raised when the thread is through
            self._restore_mode()
            if self._backup.is_restored and not self._has_failed:
                self._state.swap_out()

    def _restore_anyway(self, again: bool) -> None:
        with _RESTORING:  # the thread of an earlier try may still be at work
            if self._has_failed and not again:
                return
            self._has_failed = True
            try:
                join_all()
            finally:
                self._backup.restore(anyway=True)
            self._has_failed = False
