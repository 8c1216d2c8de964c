"""Messages from one rank to another, over connections that are made when needed and closed again.

A rank that expects a message listens, and posts where it can be reached. A rank that has a message connects, shows who
it is, and says how long the message is. It sends the bytes when the receiver takes them:

    sender                                           receiver
    token, rank  ------------------------------->    drops the connection unless this is its token
                 <-------------------------------    its answer, which only the right process knows
    size         ------------------------------->    waits until it expects a message of this rank
                 <-------------------------------    go
    bytes        ------------------------------->

A connection stays open for the next message. At most `MOST_ACCEPTED` connections of other ranks, one to another rank
and one listening socket are open at a time, whatever the number of ranks. Where all other ranks have a place at once, a
rank keeps its connections to all of them: to connect costs more than a short message.

[Note: wires never block each other]
`pass_all` receives from every rank from which it expects a message while its own message waits: a go never depends on
what this rank sends. A message that has its go ends, since its sender does the same. A connection without a go takes
one of the few places, but it may be closed: nothing of its message was sent, and its sender comes again. So every rank
that is expected gets a place, and its message comes through. Where all ranks make their calls of `pass_all` in one
order, those in the earliest call wait only for ranks that are in it or have not come to it. The messages of a rank
arrive in order, because each begins after the go of the former, and a rank gets one go at a time.
"""

from __future__ import annotations

import hmac
import json
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from dist_ema.ranks.wires.addresses import Address, addresses_of_host, host_identity, open_listener
from dist_ema.ranks.wires.outgoing import GO, NUMBER_BYTES, TOKEN_BYTES, Outgoing
from dist_ema.ranks.wires.tasks import Sockets, Task, Tasks, Wait, WireError, read, write
from dist_ema.uninterrupted.threads import insist

__all__ = ["MOST_ACCEPTED", "Board", "Content", "WireError", "Wires"]

# Connections of other ranks that are open at a time.
MOST_ACCEPTED = 3
# A connection that has not shown the token by then is dropped: a rank shows it as soon as it is connected.
_HELLO_SECONDS = 1.0
# What is received at a time of a message that nobody wants.
_SCRATCH_BYTES = 2**20

Content: TypeAlias = "bytes | bytearray | memoryview | np.ndarray[tuple[int, ...], np.dtype[np.uint8]] | torch.Tensor"


class Board(Protocol):
    """Where the ranks of one piece of work leave texts for each other; a store in a run, a dict in a simulation."""

    def post(self, key: str, text: str) -> None:
        """Publish a text."""
        ...

    def look_up(self, key: str) -> str:
        """The text under a key; it waits until some rank has posted it, or raises if the work has ended."""
        ...

    def announce(self, texts: Mapping[str, str]) -> None:
        """Add each text to what is under its key; they must be there before this rank's next agreement."""
        ...

    def announced(self, key: str) -> str:
        """All that was added under a key; "" if nothing was."""
        ...

    def forget(self, key: str) -> None:
        """Remove a key."""
        ...

    def check(self) -> None:
        """Raises if the work has ended on other ranks."""
        ...


class _Accepted:
    """A connection that another rank has made."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.source: int | None = None  # the rank, once it has shown the token
        self.is_going = False  # the bytes of a message are on their way


class Wires:
    """The messages of one rank within one piece of work of all ranks.

    Args:
        rank: this rank.
        board: where the ranks post their addresses; it is asked twice a second whether the work goes on.
        patience_seconds: the longest time in which no message comes or goes.
        num_ranks: the ranks of the work, so that few of them may stay connected; None for many.
        opened_by: has short work done whole, whatever a signal handler raises meanwhile; None for a thread of its own,
            where there may be signals.
    """

    def __init__(
        self,
        rank: int,
        board: Board,
        patience_seconds: float = 1800.0,
        num_ranks: int | None = None,
        opened_by: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self._rank = rank
        self._board = board
        self._patience_seconds = patience_seconds
        self._token, self._answer = secrets.token_bytes(TOKEN_BYTES), secrets.token_bytes(TOKEN_BYTES)
        self._tasks = Tasks(board.check)
        self._sockets = Sockets(opened_by or _insist)
        self._listener: socket.socket | None = None
        self._listening: Task | None = None
        self._accepted: dict[_Accepted, Task] = {}  # the least recently used first
        self._expected: dict[int, memoryview | int] = {}
        self._num_announcements = 0  # the same on all ranks between two agreements
        self._progress_at = 0.0  # when a message last came or went
        most_open = 1 if num_ranks is None or num_ranks - 1 > MOST_ACCEPTED else MOST_ACCEPTED
        self._outgoing = Outgoing(rank, self._address_of, self._sockets, self._note_progress, most_open)

    def announce(self, values: Mapping[int, Any]) -> None:
        """No communication but with the board. Tell ranks something, which they read after the next agreement.

        Args:
            values: target -> what it is told; it survives JSON.
        """
        self._board.announce(
            {self._announcements(target): json.dumps([self._rank, value]) + "\n" for target, value in values.items()}
        )

    def announced(self) -> list[tuple[int, Any]]:
        """No communication but with the board. What ranks have announced to this one before the last agreement."""
        key = self._announcements(self._rank)
        text = self._board.announced(key)
        if text:
            self._board.forget(key)
        self._num_announcements += 1
        return [(source, value) for source, value in map(json.loads, text.splitlines())]

    def listen(self) -> None:
        """No communication but with the board. Post where this rank is, unless that was done.

        A rank that does so before an agreement, after which others send to it, spares them many looks.

        Raises:
            WireError: this rank cannot listen.
        """
        if self._listener is None:
            self._listen()

    def send(self, values: Content, target: int) -> None:
        """Point to point: `target` must call `receive`, or expect the message in `pass_all`.

        Args:
            values: the bytes, contiguous, on the CPU.
            target: the rank that receives.

        Raises:
            WireError: the message did not get through.
        """
        self.pass_all([(target, lambda: values)], {})

    def receive(self, values: Content, source: int) -> None:
        """Point to point: `source` must call `send`, or send the message in `pass_all`.

        Args:
            values: where the bytes go; it has the size of the message.
            source: the rank that sends.

        Raises:
            WireError: the message did not get through, or has another size.
        """
        self.pass_all((), {source: values})

    def pass_all(
        self, sending: Iterable[tuple[int, Callable[[], Content]]], receiving: Mapping[int, Content | int]
    ) -> None:
        """Point to point: send messages, one after the other, while others come in, in any order.

        No pattern of messages hangs: see [Note: wires never block each other].

        Args:
            sending: targets, each with a function that makes its message when the former one is on its way.
            receiving: source -> where the bytes of its next message go, or its size if nobody wants the bytes.

        Raises:
            WireError: a message did not get through, or has another size.
        """
        self._expected = {
            source: values if isinstance(values, int) else _bytes_of(values) for source, values in receiving.items()
        }
        if self._expected:
            self.listen()
        self._note_progress()
        own = self._outgoing.send_all((target, partial(_made, make)) for target, make in sending)
        try:
            for task in [own, *self._accepted.values()]:
                self._tasks.advance(task)
            while self._expected or own in self._tasks:
                self._tasks.step(paused=None if self._may_accept() else self._listening)
                if time.monotonic() - self._progress_at > self._patience_seconds:
                    raise WireError(self._what_is_missing())
        finally:
            self._tasks.end(own)

    def close(self) -> None:
        """Close every connection. No communication; doing it twice does no harm."""
        try:
            self._tasks.end_all()
        finally:
            self._sockets.close_all()
        if self._listener is not None:
            self._listener = None
            with suppress(RuntimeError):  # the board may be gone with the rank that kept it
                self._board.forget(_address_key(self._rank))

    def _announcements(self, rank: int) -> str:
        return f"to/{rank}/{self._num_announcements}"

    def _address_of(self, rank: int) -> Address:
        return Address.of(self._board.look_up(_address_key(rank)))

    def _note_progress(self) -> None:
        self._progress_at = time.monotonic()

    def _what_is_missing(self) -> str:
        sources = sorted(self._expected)
        waits = f", and waits for the messages of {len(sources)} ranks (the first: {sources[:8]})" if sources else ""
        return f"rank {self._rank} has neither sent nor received a message for {self._patience_seconds:g} s{waits}"

    # Receiving

    def _listen(self) -> None:
        try:
            self._listener = self._sockets.open(open_listener)
        except OSError as error:
            raise WireError(f"rank {self._rank} cannot listen for other ranks: {error}") from error
        self._listening = self._accept_all(self._listener)
        self._tasks.advance(self._listening)
        port = self._listener.getsockname()[1]
        address = Address(host_identity(), addresses_of_host(), port, self._token, self._answer)
        self._board.post(_address_key(self._rank), address.to_text())

    def _may_accept(self) -> bool:
        return bool(self._expected) and (len(self._accepted) < MOST_ACCEPTED or self._least_needed() is not None)

    def _least_needed(self) -> Task | None:
        """A connection that may be closed: it is of another rank, and has no go."""
        idle = (task for one, task in self._accepted.items() if one.source is not None and not one.is_going)
        return next(idle, None)

    def _accept_all(self, listener: socket.socket) -> Task:
        while True:
            yield Wait(listener, select.POLLIN, None)
            if len(self._accepted) >= MOST_ACCEPTED:
                least_needed = self._least_needed()
                if least_needed is None:
                    continue
                self._tasks.end(least_needed)
            try:
                accepted = _Accepted(self._sockets.open(lambda: listener.accept()[0]))
            except (BlockingIOError, ConnectionError):  # it has gone again
                continue
            except OSError as error:
                raise WireError(f"rank {self._rank} cannot accept a connection: {error}") from error
            task = self._accepted[accepted] = self._serve(accepted)
            self._tasks.advance(task)

    def _serve(self, accepted: _Accepted) -> Task:
        """Receive message after message over one connection, until the other side closes it."""
        connection = accepted.connection
        try:
            hello = bytearray(TOKEN_BYTES + NUMBER_BYTES)
            yield from read(connection, memoryview(hello), time.monotonic() + _HELLO_SECONDS)
            if not hmac.compare_digest(hello[:TOKEN_BYTES], self._token):
                return
            accepted.source = _number(hello[TOKEN_BYTES:])
            yield from write(connection, memoryview(self._answer))
            while True:
                header = bytearray(NUMBER_BYTES)
                yield from read(connection, memoryview(header))
                while not self._is_next(accepted.source):
                    yield Wait(connection, 0, None)
                    if _is_closed(connection):
                        return
                connection.send(GO)
                accepted.is_going = True
                yield from self._take(accepted.source, _number(header), connection)
                accepted.is_going = False
                self._accepted[accepted] = self._accepted.pop(accepted)
        except OSError as error:
            if accepted.is_going:
                raise WireError(f"rank {accepted.source} was lost in the middle of a message: {error}") from error
        finally:
            self._sockets.close(connection)
            self._accepted.pop(accepted, None)

    def _is_next(self, source: int) -> bool:
        is_going = any(other.is_going and other.source == source for other in self._accepted)
        return source in self._expected and not is_going

    def _take(self, source: int, size: int, connection: socket.socket) -> Task:
        """Receive the bytes of one message."""
        values = self._expected[source]
        expected_bytes = values if isinstance(values, int) else len(values)
        if size != expected_bytes:
            raise WireError(f"rank {source} sends {size} bytes, and rank {self._rank} expects {expected_bytes}")
        if isinstance(values, int):
            scratch = memoryview(bytearray(min(size, _SCRATCH_BYTES)))
            for start in range(0, size, _SCRATCH_BYTES):
                yield from read(connection, scratch[: size - start])
        else:
            yield from read(connection, values)
        del self._expected[source]
        self._note_progress()


def _insist(work: Callable[[], None]) -> None:
    """Have a thread do the work, if this is the main thread, to which signals come."""
    if threading.current_thread() is threading.main_thread():
        insist(work)
    else:
        work()


def _is_closed(connection: socket.socket) -> bool:
    """Whether the other side, which has nothing to say now, has closed the connection."""
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False


def _address_key(rank: int) -> str:
    return f"address/{rank}"


def _made(make: Callable[[], Content]) -> memoryview:
    return _bytes_of(make())


def _bytes_of(values: Content) -> memoryview:
    if isinstance(values, torch.Tensor):
        values = values.numpy()
    view = memoryview(values)  # type: ignore[arg-type]  # numpy has the buffer protocol
    return view.cast("B") if view.nbytes else memoryview(b"")


def _number(content: bytearray) -> int:
    return int.from_bytes(content, "little")
