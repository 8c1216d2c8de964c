"""The messages that a rank sends: it connects when it has one, and holds few connections at a time.

The other half, and the protocol, are in wires.py.
"""

from __future__ import annotations

import errno
import hmac
import os
import select
import socket
import time
from collections.abc import Callable, Generator, Iterable
from functools import partial

from dist_ema.ranks.wires.addresses import INTERFACE_VARIABLE, Address
from dist_ema.ranks.wires.tasks import Sockets, Task, Wait, WireError, read, sleep, write

__all__ = ["GO", "NUMBER_BYTES", "TOKEN_BYTES", "Outgoing"]

TOKEN_BYTES = 16
NUMBER_BYTES = 8
GO = b"\1"

# How long an address is tried before the next one; doubled each time around, since the other rank may be busy.
_ATTEMPT_SECONDS, _LONGEST_ATTEMPT_SECONDS = 2.0, 64.0
# After so many turns in which every address refused, nobody listens there any more.
_MOST_REFUSALS = 3
# After so long without any connection, no address leads to the other rank.
_UNREACHED_SECONDS = 60.0
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.01, 1.0
# How an attempt to connect ends.
_REFUSED, _UNREACHED, _BUSY = "refused", "unreached", "busy"


class Outgoing:
    """The sending half of the wires of one rank.

    Args:
        rank: this rank.
        look_up: gives the address of a rank; it waits until that rank has posted one.
        sockets: keeps what is open.
        sent: called when a message is on its way.
        most_open: the connections that are open at a time. Others than one need a place for each at the other rank.
    """

    def __init__(
        self,
        rank: int,
        look_up: Callable[[int], Address],
        sockets: Sockets,
        sent: Callable[[], None],
        most_open: int,
    ) -> None:
        self._rank = rank
        self._look_up = look_up
        self._sockets = sockets
        self._sent = sent
        self._most_open = most_open
        self._connections: dict[int, socket.socket] = {}
        self._addresses: dict[int, Address] = {}

    def send_all(self, messages: Iterable[tuple[int, Callable[[], memoryview]]]) -> Task:
        """A task: send one message after the other. Each is made when the former one is on its way."""
        for target, make in messages:
            yield from self._send(make(), target)

    def _send(self, values: memoryview, target: int) -> Task:
        pause, go = _PAUSE_SECONDS, bytearray(len(GO))
        while True:
            if target not in self._connections:
                yield from self._connect(target)
            connection = self._connections[target]
            try:
                yield from write(connection, memoryview(len(values).to_bytes(NUMBER_BYTES, "little")))
                yield from read(connection, memoryview(go))
                break
            except OSError:  # the receiver needed the place for another rank
                self._hang_up(target)
            yield from sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        try:
            yield from write(connection, values)
        except OSError as error:
            raise WireError(f"rank {target} was lost in the middle of a message: {error}") from error
        self._sent()

    def _hang_up(self, target: int) -> None:
        self._sockets.close(self._connections.pop(target))

    def _connect(self, target: int) -> Task:
        while len(self._connections) >= self._most_open:
            self._hang_up(next(iter(self._connections)))
        if target not in self._addresses:
            self._addresses[target] = self._look_up(target)
        address = self._addresses[target]
        tried: dict[str, str] = {}
        seconds, num_refusals, unreached_until = _ATTEMPT_SECONDS, 0, time.monotonic() + _UNREACHED_SECONDS
        while num_refusals < _MOST_REFUSALS and time.monotonic() < unreached_until:
            outcomes = []
            for host in address.hosts:
                outcome = yield from self._knock(target, host, address, time.monotonic() + seconds)
                if outcome is None:
                    return
                outcomes.append(outcome)
                tried[host] = outcome[1]
            is_refused = all(kind is _REFUSED for kind, _ in outcomes)
            num_refusals = num_refusals + 1 if is_refused else 0
            if any(kind is _BUSY for kind, _ in outcomes):
                unreached_until = time.monotonic() + _UNREACHED_SECONDS
            yield from sleep(min(_PAUSE_SECONDS * 10**num_refusals, _LONGEST_PAUSE_SECONDS))
            seconds = min(2 * seconds, _LONGEST_ATTEMPT_SECONDS)
        where = ", ".join(f"{host} ({reason})" for host, reason in tried.items()) or "no address: that host has none"
        raise WireError(
            f"rank {self._rank} cannot connect to rank {target}, port {address.port}; it tried {where}. Either that "
            f"process has ended, or the address is the wrong one: then set {INTERFACE_VARIABLE} to the network "
            "interface that connects the hosts"
        )

    def _knock(
        self, target: int, host: str, address: Address, deadline: float
    ) -> Generator[Wait, None, tuple[str, str] | None]:
        """Try one address. Returns None if the connection is made, else the kind of the failure and its text."""
        connection, is_connected = None, False
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            connection = self._sockets.open(partial(socket.socket, family, socket.SOCK_STREAM))
            code = connection.connect_ex((host, address.port))
            if code == errno.EINPROGRESS:
                yield Wait(connection, select.POLLOUT, deadline)
                code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                return _REFUSED, os.strerror(code)
            is_connected = True
            yield from write(connection, memoryview(address.token + self._rank.to_bytes(NUMBER_BYTES, "little")))
            answer = bytearray(TOKEN_BYTES)
            yield from read(connection, memoryview(answer), deadline)
            if not hmac.compare_digest(answer, address.answer):
                return _REFUSED, "another process answers"
            self._connections[target] = connection
            return None
        except TimeoutError as error:
            return (_BUSY if is_connected else _UNREACHED), str(error)
        except OSError as error:
            if connection is None:
                raise WireError(f"rank {self._rank} cannot open a connection: {error}") from error
            return _UNREACHED, str(error)
        finally:
            if connection is not None and self._connections.get(target) is not connection:
                self._sockets.close(connection)
