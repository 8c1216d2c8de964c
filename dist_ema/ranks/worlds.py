"""What the ranks of one default process group share: their store, the calls they have made, and who is there.

A wait here can be ended at any time, on all ranks: by a signal on this one, and by a rank that leaves, or is gone, on
the others. See [Note: verdicts] in link.py.
"""

from __future__ import annotations

import _thread
import contextvars
import dataclasses
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from dist_ema.errors import CommunicationError
from dist_ema.ranks.store.courier import Courier
from dist_ema.ranks.store.link import Farewell, Link
from dist_ema.ranks.store.presence import Presence
from dist_ema.ranks.store.shared_store import SharedStore, StoreError
from dist_ema.ranks.wires.wires import Wires
from dist_ema.uninterrupted import End, insist

__all__ = ["STORE_IS_GONE", "Patience", "World", "simulated", "this_world"]

T = TypeVar("T")

# The least time that a rank waits for the others within a call that all have made: a slow disk is no error.
_STAGE_SECONDS = 1800.0
# The store itself gives up later than any wait: it would print lines of its own.
_STORE_SECONDS = 60.0
# How long a request may take that nobody else needs to answer.
_REQUEST_SECONDS = 10.0
# How long a rank that leaves waits for the store to take its farewell.
_FAREWELL_SECONDS = 5.0
_TICK_SECONDS = 0.5
_PROBE_SECONDS = 1.0

# Without their store the ranks cannot tell one another anything. So that all raise the same error, it has nothing that
# a rank alone knows: neither its number, nor where it was, nor what the system said (that is the cause of the error).
STORE_IS_GONE = (
    "the store of the process group does not answer, so the ranks cannot agree any more: the process that keeps it "
    "(rank 0, or torchrun) has died or ended, or the process group was destroyed before wait(). Every rank must make "
    "the same calls while all are there: start the run again from its last checkpoint"
)


class Patience(Protocol):
    """How long a wait may take, and what is done meanwhile.

    Attributes:
        seconds: the longest wait.
    """

    seconds: float

    def end_of(self, waited: float) -> Farewell | None:
        """Called about twice a second, and at the end of the time. A farewell ends the wait on all ranks.

        Args:
            waited: the seconds since the beginning of the wait.
        """
        ...


class _Doing(Protocol):
    @property
    def num_updates(self) -> int: ...


class World:
    """What all ranks of one default process group share.

    Args:
        group: the default group; None in a simulation.
        rank: the rank of this process in the group.
        size: the number of ranks.
        store: the store of the group.

    Attributes:
        timeout_seconds: the timeout of the default group, which `init_process_group` gives to its store too.
        num_calls: the number of calls that this rank has come to; the same on all ranks at the same call.
        num_links: the number of links of the calls so far; the same on all ranks within a call.
        link: the link of the calls.
        at: the call that this rank is in; "" outside.
        store: the client for the agreements of the calls, and for nothing else.
        side: a client that no wait blocks.
        make_wires: makes the wires of a piece of work, from the rank and a board; a simulation has its own.
    """

    make_wires: Callable[..., Any] = Wires

    def __init__(self, group: Any, rank: int, size: int, store: Any) -> None:
        self.group = group
        self.rank, self.size = rank, size
        self.timeout_seconds: float = store.timeout.total_seconds()
        self.num_calls = 0
        self.at = ""
        self._of_group = store
        self._is_lost = False
        self.side = SharedStore(store, "dist_ema", _REQUEST_SECONDS)
        # A store may serve one group after the other, and a process may be in more or fewer groups than another one.
        # What all ranks of a group have alike is how often a rank of that number, of so many, has joined.
        number = self.side.count(f"joined/{size}/{rank}")
        prefix = self.side.enter(f"{size}.{number}")
        self._clone = partial(SharedStore, store, prefix, self.stage_seconds + _STORE_SECONDS)
        self.store = self._clone()
        self._beside: SharedStore | None = None
        self._link_beside: Link | None = None
        self.num_links = 1
        self.link = Link("calls/1", rank, size)
        self._links: list[weakref.ref[Link]] = [weakref.ref(self.link)]
        self._averages: weakref.WeakSet[Any] = weakref.WeakSet()
        self._presence = Presence(self.side, rank, self._doing)

    @property
    def stage_seconds(self) -> float:
        """The longest wait within a call that all have made."""
        return max(_STAGE_SECONDS, self.timeout_seconds)

    @property
    def is_present(self) -> bool:
        """Whether the process group is there still."""
        return self.group is None or (dist.is_initialized() and self.group is dist.group.WORLD)

    def do(self, work: Callable[[SharedStore], T], patience: Patience) -> T:
        """Have the courier do `work` with the store, which may wait for other ranks. A signal ends the wait.

        Raises:
            LeftError: a rank has left.
                StoreError: the store is gone.
        """
        if self.group is None:
            return work(self.store)
        self._is_lost = False
        result = _courier.fetch(partial(work, self.store), partial(self._wait, patience))
        if not self._presence.knows_all:  # who is on this machine is learnt while all are there
            _courier.put(partial(End().come_of, self.tend))
        return result

    def begin(self, work: Callable[[SharedStore], None]) -> tuple[Callable[[], None], Callable[[Patience], None]]:
        """Two steps that may be cut off and done again: the beginning of `work`, and the wait for its end."""
        end = End()
        call = partial(end.come_of, partial(work, self.store))
        if self.group is None:
            return (lambda: None), (lambda patience: work(self.store))
        _courier.begin()
        # The map ends with its first use: a second call of this step, which is C, gives the courier nothing.
        put: Callable[[], None] = partial(list[None]().extend, map(_courier.put, (call,)))

        def wait(patience: Patience) -> None:
            self._wait(patience, end)
            if end.failure is not None:
                raise end.failure

        return put, wait

    def _wait(self, patience: Patience, end: End) -> None:
        began = time.monotonic()
        while not end.comes_within(min(_TICK_SECONDS, max(began + patience.seconds - time.monotonic(), 0.01))):
            link = self.link
            farewell = patience.end_of(time.monotonic() - began)
            if farewell is not None and not end.has_come:
                self.leave(link, farewell)
            self.tend()

    def leave(self, link: Link, own: Farewell) -> Farewell:
        """Leave a link. No communication but with the store.

        Returns:
            The farewell of the first rank that left.
        """
        end = End()

        def run() -> None:
            try:
                link.leave(self.side, own)
            except Exception:  # the store is gone with the process that kept it
                link.forget(dataclasses.replace(own, message=STORE_IS_GONE, kind=CommunicationError.__name__))

        # No second interrupt can end a thread halfway.
        _thread.start_new_thread(end.come_of, (run,))
        try:
            end.comes_within(_FAREWELL_SECONDS)
        except BaseException:
            end.comes_within(_FAREWELL_SECONDS)
            raise
        return link.forget(own)

    def renew(self) -> None:
        """Have the next call take a new link; all ranks leave the same links. No communication."""
        self.num_links += 1
        self.link = self._watched(Link(f"calls/{self.num_links}", self.rank, self.size, self.link))

    def beside(self) -> tuple[Link, SharedStore]:
        """A link for a thread beside the calls, and its client; the same link on all ranks within a call."""
        if self._beside is None:
            self._beside = self._clone()
        # The threads work one after the other: when all have come to this link, they are through with the one before.
        name = f"beside/{self.num_links}.{self.link.number}"
        self._link_beside = self._watched(Link(name, self.rank, self.size, self._link_beside))
        return self._link_beside, self._beside

    def shows(self, average: _Doing) -> None:
        """Have the other ranks learn the number of updates of an average, where they wait for this rank."""
        self._averages.add(average)

    def missing(self, link: Link, most: int) -> tuple[str, str]:
        """The ranks that have not come to the present agreement, and a sentence about what they last did."""
        try:
            ranks, count = link.missing(self.side, most)
            seen = self._presence.last_seen(ranks)
        except StoreError:
            return "ranks that cannot be named", "The store of the process group is gone"
        if not ranks:
            return "ranks that came and are gone", "Nothing more is known of them"
        names = ", ".join(f"rank {rank}" for rank in ranks) + (f" and {count - len(ranks)} more" * (count > len(ranks)))
        doing = "; ".join(f"rank {rank} was {text}" for rank, text in zip(ranks, seen, strict=True))
        return names, doing[0].upper() + doing[1:]

    def tend(self) -> None:
        """Give a sign of life, and end the agreements of all ranks if the next rank is gone.

        A store that is gone is asked no more before the next call: torch writes a line about each try, and that rank 0
        ends before others is no fault.
        """
        if not self.is_present or self._is_lost:
            return
        try:
            if not self.link.is_left and self._presence.has_ended(0) and not _answers(self._of_group):
                self._is_lost = True
                return
            self._presence.show()
            self._end_without(self._presence.gone(have_met=self.num_calls > 0 and self.link.number > 0))
        except StoreError:
            self._is_lost = True

    def look_for_silence(self, link: Link, most: int) -> None:
        """End the agreements of all ranks if a missing rank is gone with its machine.

        Rank 0 looks after the missing ranks, and the first rank of each machine after rank 0.
        """
        with suppress(StoreError):
            if self.rank == 0:
                self._end_without(self._presence.silent(link.missing(self.side, most)[0]))
            elif self._presence.is_first:
                self._end_without(self._presence.silent([0]))

    def _end_without(self, how: str | None) -> None:
        for reference in list(self._links) if how is not None else []:
            link = reference()
            if link is not None and not link.is_left:
                message = (
                    f"{how}. Every rank must make the same calls, so they end on all ranks: start the run again from "
                    "its last checkpoint"
                )
                self.leave(link, Farewell(self.num_calls, CommunicationError.__name__, message, lives=False))

    def _watched(self, link: Link) -> Link:
        self._links = [*(reference for reference in self._links if reference() is not None), weakref.ref(link)]
        return link

    def _doing(self) -> tuple[int, str]:
        return max((average.num_updates for average in list(self._averages)), default=0), self.at


def _answers(store: Any) -> bool:
    """Whether a server of torch still listens; True for stores without one. Unlike a request, it writes no lines."""
    while isinstance(store, dist.PrefixStore):  # type: ignore[attr-defined]
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):  # type: ignore[attr-defined]
        return True
    try:
        socket.create_connection((store.host, store.port), timeout=_PROBE_SECONDS).close()
    except OSError:
        return False
    return True


_worlds: list[World] = []
_joining = threading.Lock()
_simulated: contextvars.ContextVar[World | None] = contextvars.ContextVar("_simulated", default=None)


def _tend() -> None:
    for world in list(_worlds):
        world.tend()


_courier = Courier(_tend)


def this_world() -> World | None:
    """The world of the default process group; None without a group, or if it has one rank.

    No communication, but two connections to the store.
    """
    if _simulated.get() is not None:
        return _simulated.get()
    group = dist.group.WORLD if dist.is_available() else None
    if _worlds and _worlds[0].group is group:
        return _worlds[0]
    if group is None or dist.get_world_size() == 1:
        _worlds.clear()
        return None

    def join() -> None:
        with _joining:
            if not _worlds or _worlds[0].group is not group:
                _worlds[:] = [World(group, dist.get_rank(), dist.get_world_size(), group.get_group_store())]

    insist(join)  # whoever joined twice would not meet the others
    return _worlds[0]


@contextmanager
def simulated(world: World) -> Iterator[World]:
    """A context: this thread is a rank of a world without processes, whose store is given. For studies and tests."""
    token = _simulated.set(world)
    try:
        yield world
    finally:
        _simulated.reset(token)
