"""Calls that all ranks make together: their first steps, and their end on all ranks.

    1 all    come to the call (`Exchange.arrive`)
    2 all    wait for the save in the background, if the call reads or writes folders
    3 alone  refuse the call while the averaged weights are in the model, check the model, do local work
    4 all    raise the same error if any rank failed (`Exchange.agree`)
    5 all    raise an error if they did not ask for the same (`Exchange.compare`)

A rank that leaves the call later, and alone, ends it for the others too: see [Note: leaving] in groups.py. A call that
fails restores torch's grad mode: `torch.no_grad()` is Python, so an interrupt at its end would leave autograd off for
the rest of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from dist_ema.ranks.exchange import Exchange

__all__ = ["Call", "Calls", "ended_for_all"]

T = TypeVar("T")


class _Average(Protocol):
    """The part of an average that calls use. No communication."""

    def begin(self, call: str) -> None:
        """Wait for updates beside training. It raises a SwapError while the averaged weights are in the model."""
        ...

    def check_model(self) -> None:
        """Raise a ModelChangedError unless the model is the planned one."""
        ...


class Calls:
    """The calls of one average.

    Args:
        exchange: the control traffic of all ranks.
        average: this rank's part of the average.
        wait: waits for the save in the background, and raises its error.
    """

    def __init__(self, exchange: Exchange, average: _Average, wait: Callable[[], None]) -> None:
        self.exchange = exchange
        self.average = average
        self.wait = wait

    def __call__(self, name: str, act: Callable[[Call], T]) -> T:
        """Make a call: an error of `act` ends it for all ranks.

        Args:
            name: the name of the method that users call.
            act: does the work of the method.
        """
        call, mode = Call(self, name), torch.is_grad_enabled()
        try:
            return act(call)
        except BaseException as error:
            torch.set_grad_enabled(mode)
            call.end_for_all(error)
            raise


class Call:
    """One call.

    Attributes:
        name: the name of the method that users call.
        exchange: the control traffic of all ranks.
    """

    def __init__(self, calls: Calls, name: str) -> None:
        self.name = name
        self.exchange = calls.exchange
        self._calls = calls
        self._num_calls_before = calls.exchange.num_calls

    def together(
        self,
        work: Callable[[], T],
        same: Callable[[T], Mapping[str, Any]],
        *,
        after_saves: bool = False,
        within_swap: bool = False,
        of_changed: bool = False,
        working_folder: str | None = None,
    ) -> T:
        """Collective: every rank must call it. Do the steps above, in that order.

        Args:
            work: prepares this rank; it must not communicate.
            same: gives, of the result of `work`, what must be alike on all ranks; it must survive JSON.
            after_saves: whether a save in the background must have ended.
            within_swap: whether the call is allowed while the averaged weights are in the model.
            of_changed: whether the model may have changed since it was planned.
            working_folder: the folder that a path in `same` is relative to; the message has it if paths differ.

        Returns:
            The result of `work`.

        Raises:
            DistEMAError: some rank failed, or the ranks differ; the error is the same on all ranks.
        """
        self.exchange.arrive(self.name)
        if after_saves:
            self._calls.wait()
        prepared = self.exchange.agree(
            self.name, lambda: self.alone(work, within_swap=within_swap, of_changed=of_changed)
        )
        self.exchange.compare({"call": self.name, **same(prepared)}, working_folder)
        return prepared

    def alone(self, work: Callable[[], T], *, within_swap: bool = False, of_changed: bool = False) -> T:
        """Do step 3. No communication.

        Args:
            work: as in `together`.
            within_swap: as in `together`.
            of_changed: as in `together`.
        """
        if not within_swap:
            self._calls.average.begin(self.name)
        if not of_changed:
            self._calls.average.check_model()
        return work()

    def end_for_all(self, error: BaseException) -> None:
        """End the call for the other ranks too, unless they have the same error.

        Raises:
            DistEMAError: the error that the other ranks raise, in place of an error of Python, torch or numpy.
        """
        _end_for_all(self.exchange, self.name, self._num_calls_before, error)


@contextmanager
def ended_for_all(exchange: Exchange, call: str) -> Iterator[None]:
    """End the call for the other ranks too, if the block raises an error that they may not have.

    No communication, but with the store after such an error.

    Args:
        exchange: the control traffic of the call.
        call: the name of the call, for the message.
    """
    before = exchange.num_calls
    try:
        yield
    except BaseException as error:
        _end_for_all(exchange, call, before, error)
        raise


def _end_for_all(exchange: Exchange, call: str, num_calls_before: int, error: BaseException) -> None:
    # Before the arrival of this rank no other rank has met it, and none waits for it.
    if exchange.is_beside or exchange.num_calls > num_calls_before:
        exchange.abandon(call, error)
