"""Calls that all ranks make together: what a call does first, and how it ends on all ranks.

    1 all    come to the call (`Exchange.arrive`)
    2 all    wait for the save in the background, if the call reads or writes folders
    3 alone  refuse while the averaged weights are in the model, refuse a changed model, do local work
    4 all    raise the same error if any of them failed, or if they did not ask for the same (`Exchange.agree_alike`)

A rank that leaves the call later, and alone, ends it for the others too: see [Note: leaving] in link.py. A call that
raises sets torch's grad mode back: `torch.no_grad()` is Python, so an interrupt at its end would leave autograd
switched off for the rest of the run.
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
    """The averages of one rank, as a call uses them. No method communicates."""

    @property
    def num_updates(self) -> int:
        """The number of updates so far."""
        ...

    def begin(self, call: str) -> None:
        """Wait for updates beside training. Raises a SwapError while the averaged weights are in the model."""
        ...

    def check_model(self) -> None:
        """Raises a ModelChangedError unless the model is the planned one."""
        ...


class Calls:
    """The calls of one average.

    Args:
        exchange: the control traffic of all ranks.
        average: the averages of this rank.
        wait: waits for the save in the background, and raises its error.
    """

    def __init__(self, exchange: Exchange, average: _Average, wait: Callable[[], None]) -> None:
        self.exchange = exchange
        self.average = average
        self.wait = wait
        exchange.channel.shows(average)

    def __call__(self, name: str, act: Callable[[Call], T]) -> T:
        """Make a call. An exception of `act` ends it for all ranks.

        Args:
            name: the name of the method that users call.
            act: the work of the call.
        """
        call, mode = Call(self, name), torch.is_grad_enabled()
        try:
            try:
                return act(call)
            except BaseException as error:
                call.end_for_all(error)
                torch.set_grad_enabled(mode)
                raise
        except BaseException as error:  # a second one, before the first was dealt with
            torch.set_grad_enabled(mode)
            call.end_for_all(error)
            raise
        finally:
            self.exchange.channel.end()


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
        self._num_calls_before = calls.exchange.channel.num_calls
        self._leaving: list[Any] = []

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
        """Collective: every rank must call it. The steps above, in that order.

        Args:
            work: the local work, which must not communicate.
            same: returns, from the result of `work`, what must be alike on all ranks; it must survive JSON.
            after_saves: whether a save in the background must have ended.
            within_swap: whether the call is allowed while the averaged weights are in the model.
            of_changed: whether the model may differ from the planned one.
            working_folder: the folder to which a path in `same` is relative; the error has it where paths differ.

        Returns:
            The result of `work`.

        Raises:
            DistEMAError: the same on all ranks.
        """
        self.exchange.arrive(self.name)
        if after_saves:
            self._calls.wait()
        return self.exchange.agree_alike(
            self.name,
            lambda: self.alone(work, within_swap=within_swap, of_changed=of_changed),
            same,
            working_folder,
        )

    def alone(self, work: Callable[[], T], *, within_swap: bool = False, of_changed: bool = False) -> T:
        """Step 3. No communication.

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
        """End the call for the other ranks too, unless they have the same error. A second time it does nothing.

        Raises:
            DistEMAError: the error that the other ranks raise, in place of an error of Python, torch or numpy.
        """
        _end_for_all(self.exchange, self.name, self._num_calls_before, error, self._leaving)


@contextmanager
def ended_for_all(exchange: Exchange, call: str) -> Iterator[None]:
    """A context: an error that leaves it, and that the other ranks may not have, ends the call for them too.

    No communication, but with the store after such an error.

    Args:
        exchange: the exchange of the call.
        call: the name of the call, for the message.
    """
    before = exchange.channel.num_calls
    leaving: list[Any] = []
    try:
        try:
            yield
        except BaseException as error:
            _end_for_all(exchange, call, before, error, leaving)
            raise
    except BaseException as error:  # a second one, before the first was dealt with
        _end_for_all(exchange, call, before, error, leaving)
        raise
    finally:
        exchange.channel.end()


def _end_for_all(
    exchange: Exchange, call: str, num_calls_before: int, error: BaseException, leaving: list[Any]
) -> None:
    # Before the arrival no other rank waits for this one.
    if exchange.channel.is_beside or exchange.channel.num_calls > num_calls_before:
        exchange.channel.abandon(call, error, leaving)
