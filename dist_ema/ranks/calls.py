"""Calls that all ranks make together: what each of them does first, and how it ends on all of them.

    1 all   come to the call (`Exchange.arrive`)
    2 all   wait for the save in the background, if the call reads or writes folders
    3 each  refuse while the averaged weights are in the model, see that the model is the planned one, do local work
    4 all   raise the same error if any of them failed (`Exchange.agree`)
    5 all   raise if they did not ask for the same (`Exchange.compare`)

A rank that leaves the call later, and alone, ends it for the others too: see [Note: leaving] in groups.py. A call
leaves torch's grad mode as it found it: `torch.no_grad()` is Python, so an interrupt at its end would leave autograd
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
    """What a call asks of the average that it is made on. Nothing of it communicates."""

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
        average: this rank's part of it.
        wait: waits for the save in the background, and raises its error.
    """

    def __init__(self, exchange: Exchange, average: _Average, wait: Callable[[], None]) -> None:
        self.exchange = exchange
        self.average = average
        self.wait = wait

    def __call__(self, name: str, act: Callable[[Call], T]) -> T:
        """Make a call: what `act` raises ends it for all ranks.

        Args:
            name: of the method that users call.
            act: what it does.
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
        name: of the method that users call.
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
        """Collective: every rank must call it. The steps above, in that order.

        Args:
            work: what this rank prepares; must not communicate.
            same: what must be alike on all ranks, of what `work` returned; must survive JSON.
            after_saves: whether a save in the background must have ended.
            within_swap: whether the call is allowed while the averaged weights are in the model.
            of_changed: whether the model may be another than the planned one.
            working_folder: from which a path in `same` was taken; named where paths differ.

        Returns:
            What `work` returned.

        Raises:
            DistEMAError: the same on all ranks.
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
        """End the call for the other ranks too, unless they have the same error.

        Raises:
            DistEMAError: in place of an error of Python, torch or numpy: what the other ranks raise.
        """
        _end_for_all(self.exchange, self.name, self._num_calls_before, error)


@contextmanager
def ended_for_all(exchange: Exchange, call: str) -> Iterator[None]:
    """What leaves the block by an error that the other ranks may not have ends the call for them too.

    No communication, but with the store when it happens.

    Args:
        exchange: of the call.
        call: its name, for the message.
    """
    before = exchange.num_calls
    try:
        yield
    except BaseException as error:
        _end_for_all(exchange, call, before, error)
        raise


def _end_for_all(exchange: Exchange, call: str, num_calls_before: int, error: BaseException) -> None:
    # Before its arrival no other rank has been met, and none waits.
    if exchange.is_beside or exchange.num_calls > num_calls_before:
        exchange.abandon(call, error)
