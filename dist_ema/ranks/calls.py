"""Calls that all ranks make and end together, also when only one of them raises. See [Note: leaving] in groups.py.

They also leave torch's grad mode as they found it: `torch.no_grad()` is Python, so an interrupt at its end would leave
autograd switched off for the rest of the run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from dist_ema.ranks.exchange import Exchange

__all__ = ["collective", "end_for_all", "together"]

P = ParamSpec("P")
R = TypeVar("R")


class _Communicates(Protocol):
    _exchange: Exchange


C = TypeVar("C", bound=_Communicates)


@contextmanager
def together(exchange: Exchange, call: str) -> Iterator[None]:
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
        end_for_all(exchange, call, before, error)
        raise


def collective(method: Callable[Concatenate[C, P], R]) -> Callable[Concatenate[C, P], R]:
    """Make a method one whose ranks end its call together."""

    @functools.wraps(method)
    def call(self: C, /, *args: P.args, **kwargs: P.kwargs) -> R:
        exchange = self._exchange
        before, mode = exchange.num_calls, torch.is_grad_enabled()
        try:
            return method(self, *args, **kwargs)
        except BaseException as error:
            torch.set_grad_enabled(mode)
            end_for_all(exchange, method.__name__, before, error)
            raise

    return call


def end_for_all(exchange: Exchange, call: str, before: int, error: BaseException) -> None:
    """End a call for the other ranks too, if one has begun since `before`, when there were so many.

    Raises:
        DistEMAError: in place of an error of Python, torch or numpy: what the other ranks raise.
    """
    # Before its arrival no other rank has been met, and none waits.
    if exchange.is_beside or exchange.num_calls > before:
        exchange.abandon(call, error)
