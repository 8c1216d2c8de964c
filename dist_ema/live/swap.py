"""The context in which the averaged weights are in the model. See [Note: interrupts] in `dist_ema.uninterrupted`."""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import torch

from dist_ema.averaging.state import AveragedState
from dist_ema.averaging.streams import join_all
from dist_ema.live.spreading import LiveBackup, put_average
from dist_ema.ranks.calls import end_for_all
from dist_ema.ranks.exchange import Exchange
from dist_ema.uninterrupted import insist

__all__ = ["Swap", "put_for_good"]

F = TypeVar("F", bound=Callable[..., Any])


_CALL = "average_parameters"


class Swap(io.IOBase):
    """A context manager: the averaged weights are in the model inside, the live ones again after it.

    [Note: the exit is C]
    A signal handler may run where a function in Python begins, before its first line; what it raises in an `__exit__`
    in Python would leave the averaged weights in the model. The `__exit__` of files is written in C and calls `close`,
    which here resumes a generator, in the middle of its `try`. That is all there is of a file in it.

    Args:
        exchange: the control traffic of all ranks.
        state: the averages of this rank.
        prepare: the averaged values, and the live ones kept aside. Collective along replicas.
        track: which average; may be None if there is one.
    """

    closed = True  # nothing to close for a swap that was never entered

    def __init__(
        self,
        exchange: Exchange,
        state: AveragedState,
        prepare: Callable[[], tuple[tuple[torch.Tensor, ...], LiveBackup]],
        track: str | None,
    ) -> None:
        self._exchange = exchange
        self._state = state
        self._prepare = prepare
        self._track = track

    def __enter__(self) -> None:  # type: ignore[override]
        swapping, before, mode = self._swapping(), self._exchange.num_calls, torch.is_grad_enabled()
        try:
            self.close = functools.partial(next, swapping, None)  # type: ignore[method-assign]
            return next(swapping)  # nothing after it: the `try` would not cover a line of its own
        except BaseException as error:
            try:
                try:
                    swapping.close()
                finally:
                    swapping.close()
            finally:
                torch.set_grad_enabled(mode)
                end_for_all(self._exchange, _CALL, before, error)
            raise

    def __call__(self, function: F) -> F:
        """As a decorator: each call of the function is within a swap of its own."""

        @functools.wraps(function)
        def within(*args: Any, **kwargs: Any) -> Any:
            with Swap(self._exchange, self._state, self._prepare, self._track):
                return function(*args, **kwargs)

        return within  # type: ignore[return-value]

    def _swapping(self) -> Generator[None, None, None]:
        state = self._state
        values, backup = self._prepare()
        leave = _Leave(state, backup)
        # The same thrice: a second interrupt, and a third, may come before the first was dealt with.
        try:
            try:
                try:
                    state.swapped = state.track(self._track)
                    put_average(state.plan, values, _meeting(self._exchange, state, _CALL))
                    yield
                finally:
                    leave()
            finally:
                leave()
        finally:
            leave()


def put_for_good(
    exchange: Exchange, state: AveragedState, values: tuple[torch.Tensor, ...], backup: LiveBackup, track: str | None
) -> None:
    """Collective along replicas only. Put averaged values into the model, or leave the live ones there.

    Args:
        exchange: the control traffic of all ranks.
        state: the averages of this rank.
        values: averaged values of all its shards.
        backup: the live values, which come back if this is cut off.
        track: which average they are; may be None if there is one.
    """
    leave = _Leave(state, backup)
    try:
        try:
            state.swapped = state.track(track)
            put_average(state.plan, values, _meeting(exchange, state, "copy_to_model"))
            state.swapped = None
        except BaseException:
            leave()
            raise
    except BaseException:  # a second one, before the first was dealt with
        leave()
        raise


def _meeting(exchange: Exchange, state: AveragedState, call: str) -> Sequence[Callable[[], None]]:
    return exchange.meeting(call) if state.plan.has_replicas else ()


class _Leave:
    """Puts the live weights back and ends the swap; further calls do nothing. No communication."""

    def __init__(self, state: AveragedState, backup: LiveBackup) -> None:
        self._state = state
        self._backup = backup
        self._restoring = threading.Lock()  # of threads only: one that is interrupted would keep it
        self._is_carried_off = False
        self._has_failed = False
        self._mode: bool | None = None  # of autograd, when this began

    def __call__(self, *, again: bool = False) -> None:
        """Do it, if need be by a thread that no signal handler interrupts.

        Args:
            again: try once more what has failed.
        """
        state, backup = self._state, self._backup
        if backup.is_restored and state.leave is None:
            return
        if self._mode is None:
            self._mode = torch.is_grad_enabled()
        state.leave = functools.partial(self, again=True)
        if self._is_carried_off:
            self._carry_off(again)
            return
        try:
            join_all()
            backup.restore()
        except BaseException:
            self._carry_off(again)
            raise
        self._end()

    def _carry_off(self, again: bool) -> None:
        """Have a thread do it. What is raised before that has begun comes out here: whoever calls calls again."""
        self._is_carried_off = True
        try:
            insist(functools.partial(self._restore_anyway, again))
        finally:  # a further interrupt is raised once that is through
            if self._mode is not None:
                torch.set_grad_enabled(self._mode)  # see calls.py
            if self._backup.is_restored and not self._has_failed:
                self._end()

    def _restore_anyway(self, again: bool) -> None:
        with self._restoring:  # the thread of an earlier try may be at it
            if self._has_failed and not again:
                return
            self._has_failed = True
            try:
                join_all()
            finally:
                self._backup.restore(anyway=True)
            self._has_failed = False

    def _end(self) -> None:
        self._state.swapped = None
        self._state.leave = None
