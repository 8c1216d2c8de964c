"""What the ranks of one default process group share: their store, the calls they have made, and who is there.

A wait here can be ended at any time, on all ranks: by a signal on this one, and by a rank that leaves, or is gone, on
the others. See [Note: verdicts] in link.py.
"""

from __future__ import annotations

import _thread
import contextvars
import dataclasses
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from dist_ema.errors import CommunicationError
from dist_ema.messages import first_of
from dist_ema.ranks.store.clients import Clients
from dist_ema.ranks.store.courier import Courier
from dist_ema.ranks.store.generation import Generation, outlives_ranks
from dist_ema.ranks.store.link import Farewell, LeftError, Link
from dist_ema.ranks.store.presence import Presence
from dist_ema.ranks.store.shared_store import SharedStore, StoreError
from dist_ema.ranks.wires.wires import Wires
from dist_ema.uninterrupted.threads import End, insist

__all__ = ["STORE_IS_GONE", "Patience", "World", "simulated", "this_world"]

T = TypeVar("T")

# The least time that a rank waits for the others within a call that all have made: a slow disk is no error.
_STAGE_SECONDS = 1800.0
# The store itself gives up later than any wait: it would print lines of its own.
_STORE_SECONDS = 60.0
# How long a rank that leaves waits for the store to take its farewell.
_FAREWELL_SECONDS = 2.0
_TICK_SECONDS = 0.5
# How long the thread of a farewell tries to reach the store.
_REQUEST_SECONDS = 60.0
_SIGN_SECONDS = 0.005

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
        have_met: whether all ranks have come to a call together.
        clients: the connections to the store.
        make_wires: makes the wires of a piece of work, from the rank and a board; a simulation has its own.
    """

    make_wires: Callable[..., Any] = Wires

    def __init__(self, group: Any, rank: int, size: int, store: Any) -> None:
        self.group = group
        self.rank, self.size = rank, size
        self.timeout_seconds: float = store.timeout.total_seconds()
        self.num_calls = 0
        self.at = ""
        self.have_met = False
        self._is_lost = False
        self.clients = Clients(store, "dist_ema", self.stage_seconds + _STORE_SECONDS)
        self._link_beside: Link | None = None
        self.num_links = 1
        self.link = Link("calls/1", rank, size)
        self._links: list[weakref.ref[Link]] = [weakref.ref(self.link)]
        self._averages: weakref.WeakSet[Any] = weakref.WeakSet()
        self._groups: dict[tuple[int, ...], Any] = {}
        self._presence: Presence | None = None
        self._generation: Generation | None = None
        if group is not None and outlives_ranks():
            self._generation = Generation(self.clients.store, rank, size)
        else:
            # A store may serve one group after the other, and a process may be in more or fewer groups than another
            # one. What all ranks of a group have alike is how often a rank of that number, of so many, has joined.
            self._join(f"{size}.{self.clients.store.count(f'joined/{size}/{rank}')}")

    def _join(self, name: str) -> None:
        self.clients.begin_with(f"dist_ema/{name}")
        self._presence = Presence(self.clients.store, self.rank, self.size, self._doing)

    def enter(self, patience: Patience) -> None:
        """Learn where the ranks of this generation write: see generation.py. It may wait for rank 0.

        Raises:
            LeftError: rank 0 did not come in time.
            StoreError: the store is gone.
        """
        began = time.monotonic()
        while self._presence is None:
            assert self._generation is not None, "a world without one has joined"
            name = self._generation.name()
            if name is not None:
                self._join(name)
                return
            farewell = patience.end_of(time.monotonic() - began)
            if farewell is not None:
                raise LeftError(farewell)

    @property
    def stage_seconds(self) -> float:
        """The longest wait within a call that all have made."""
        return max(_STAGE_SECONDS, self.timeout_seconds)

    @property
    def has_entered(self) -> bool:
        """Whether this rank knows where the ranks of its generation write."""
        return self._presence is not None

    def meet(self) -> None:
        """All ranks have come to a call together. No communication."""
        self.have_met, self._generation = True, None

    @property
    def _must_sign(self) -> bool:
        return self._generation is not None and self.rank == 0

    @property
    def is_present(self) -> bool:
        """Whether the process group is there still."""
        return self.group is None or (dist.is_initialized() and self.group is dist.group.WORLD)

    def do(self, work: Callable[[SharedStore], T], patience: Patience) -> T:
        """Have the courier do `work` with the store, which may wait for other ranks. A signal ends the wait.

        After a signal the courier still waits for the verdict. `leave` writes that verdict, by another client, which
        frees the courier: so the rank leaves before it asks for anything else.

        Raises:
            LeftError: a rank has left.
            StoreError: the store is gone.
        """
        if self.group is None:
            return work(self.clients.store)
        self._is_lost = False
        result = _courier.fetch(partial(work, self.clients.store), partial(self._wait, patience))
        # Who is on this machine is learnt while all are there.
        if self._presence is not None and not self._presence.knows_all:
            _courier.put(partial(End().come_of, partial(self.tend, waits=False)))
        return result

    def begin(self, work: Callable[[SharedStore], None]) -> tuple[Callable[[], None], Callable[[Patience], None]]:
        """Two steps that may be cut off and done again: the beginning of `work`, and the wait for its end."""
        end = End()
        call = partial(end.come_of, partial(work, self.clients.store))
        if self.group is None:
            return (lambda: None), (lambda patience: work(self.clients.store))
        _courier.begin()
        # The map ends with its first use: a second call of this step, which is C, gives the courier nothing.
        put: Callable[[], None] = partial(list[None]().extend, map(_courier.put, (call,)))

        def wait(patience: Patience) -> None:
            self._wait(patience, end)
            if end.failure is not None:
                raise end.failure

        return put, wait

    def insist(self, work: Callable[[], None]) -> None:
        """Have short work done whole, whatever a signal handler raises meanwhile. No communication."""
        if self.group is None:
            work()
        else:
            _courier.insist(work)

    def _wait(self, patience: Patience, end: End) -> None:
        began = time.monotonic()
        # Ranks that have to learn the name of this generation wait for the signs of rank 0.
        tick_seconds = _SIGN_SECONDS if self._must_sign else _TICK_SECONDS
        while not end.comes_within(min(tick_seconds, max(began + patience.seconds - time.monotonic(), 0.01))):
            link = self.link
            farewell = patience.end_of(time.monotonic() - began)
            if farewell is not None and not end.has_come:
                self.leave(link, farewell)
            self.tend(waits=True)

    def leave(self, link: Link, own: Farewell) -> Farewell:
        """Leave a link. No communication but with the store.

        Returns:
            The farewell of the first rank that left.
        """
        if not self.has_entered:  # nobody waits for it in this link
            return own
        if link.is_left:
            return link.forget(own)  # which has the farewell
        end = End()

        def run() -> None:
            try:
                link.leave(self.clients.side_within(_REQUEST_SECONDS), own)
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
        number = self.num_links + 1
        link = self._watched(Link(f"calls/{number}", self.rank, self.size, self.link))
        self.num_links, self.link = number, link  # together: an interrupt finds the former link or the new one

    def group_of(self, ranks: Sequence[int]) -> Any:
        """Collective: every rank must call it, with the same ranks. A process group of them, which is made once.

        It lasts as long as the default group.
        """
        key = tuple(ranks)
        if key not in self._groups:
            # Without `use_local_synchronization`, which hangs unless all ranks have made as many groups before.
            self._groups[key] = None if self.group is None else dist.new_group(list(key))
        return self._groups[key]

    def beside(self) -> tuple[Link, SharedStore]:
        """A link for a thread beside the calls, and its client; the same link on all ranks within a call."""
        # The threads work one after the other: when all have come to this link, they are through with the one before.
        name = f"beside/{self.num_links}.{self.link.number}"
        self._link_beside = self._watched(Link(name, self.rank, self.size, self._link_beside))
        return self._link_beside, self.clients.another()

    def shows(self, average: _Doing) -> None:
        """Have the other ranks learn the number of updates of an average, where they wait for this rank."""
        self._averages.add(average)

    def missing(self, link: Link, most: int) -> tuple[str, str]:
        """The ranks that have not come to the present agreement, and a sentence about what they last did."""
        if self._presence is None:
            return "rank 0", "Rank 0 was not seen yet"
        try:
            ranks, count = link.missing(self.clients.side, most)
            seen = self._presence.last_seen(self.clients.side, ranks)
        except StoreError:
            return "ranks that cannot be named", "The store of the process group is gone"
        if not ranks:
            return "ranks that came and are gone", "Nothing more is known of them"
        names = first_of([f"rank {rank}" for rank in ranks], count)
        doing = "; ".join(f"rank {rank} was {text}" for rank, text in zip(ranks, seen, strict=True))
        return names, doing[0].upper() + doing[1:]

    def tend(self, *, waits: bool) -> None:
        """Give a sign of life, and end the agreements of all ranks if the next rank is gone.

        A store that is gone is asked no more before the next call: torch writes a line about each try, and that rank 0
        ends before others is no fault.

        Args:
            waits: whether the client of the calls waits meanwhile.
        """
        if self._presence is None or not self.is_present or self._is_lost:
            return

        def client() -> SharedStore:
            return self.clients.side if waits else self.clients.store

        try:
            if not self.link.is_left and self._presence.has_ended(0) and not self.clients.has_server:
                self._is_lost = True
                return
            if self._generation is not None:
                self._generation.sign(client())
            self._presence.show(client, waits=waits)
            self._end_without(self._presence.gone(client, have_met=self.have_met))
        except StoreError:  # a busy server may be slow: then the next look tries again
            self._is_lost = not self.clients.has_server

    def look_for_silence(self, link: Link, most: int) -> None:
        """End the agreements of all ranks if a missing rank is gone with its machine.

        Rank 0 looks after the missing ranks, and the first rank of each machine after rank 0.
        """
        if self._presence is None:
            return
        with suppress(StoreError):
            if self.rank == 0:
                self._end_without(self._presence.silent(self.clients.side, link.missing(self.clients.side, most)[0]))
            elif self._presence.is_first:
                self._end_without(self._presence.silent(self.clients.side, [0]))

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


_worlds: list[World] = []
_joining = threading.Lock()
_simulated: contextvars.ContextVar[World | None] = contextvars.ContextVar("_simulated", default=None)


def _tend() -> None:
    for world in list(_worlds):
        world.tend(waits=False)


_courier = Courier(_tend)


def this_world() -> World | None:
    """The world of the default process group; None without a group, or if it has one rank.

    No communication, but a connection to the store.
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
