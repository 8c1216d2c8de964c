"""Thousands of ranks in one process: the real code of each, over a store and wires that lie in the memory of all.

Each simulated rank is a thread. One thread runs at a time; a rank that waits for another gives its turn away. So a run
needs no more than one core, takes the same course each time, and a wait that nobody can end is seen at once. The ranks
begin in random order, but the last one comes last to everything: it has the most to combine.

What a message costs is counted as torch's TCPStore sends it: `get` is two requests (a wait and a get), all others are
one; `set` and `append` have no answer.
"""

from __future__ import annotations

import dataclasses
import datetime
import random
import threading
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dist_ema.ranks.store.board import Board
from dist_ema.ranks.wires.wires import Wires

__all__ = ["Counts", "FakeStore", "FakeWires", "Server", "Turns", "largest"]

_STACK_BYTES = 256 * 2**10
# What a rank posts so that others reach it: some addresses and two numbers.
_ADDRESS_BYTES = 150


@dataclasses.dataclass
class Counts:
    """What one rank has said and heard.

    Attributes:
        sent: messages to the store.
        received: answers of the store.
        sent_bytes: keys and values in those messages.
        received_bytes: values in those answers.
        wires: other ranks to which it had a connection, or which had one to it.
        wired_bytes: bytes that it sent and received over those.
    """

    sent: int = 0
    received: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    wires: int = 0
    wired_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """All that it said to the store, and heard from it."""
        return self.sent_bytes + self.received_bytes

    def __sub__(self, other: Counts) -> Counts:
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Counts(*(one - two for one, two in zip(mine, others, strict=True)))


def largest(counts: Iterable[Counts]) -> Counts:
    """The largest of each number."""
    return Counts(*map(max, zip(*map(dataclasses.astuple, counts), strict=True)))


class Turns:
    """Threads of which one runs at a time.

    Attributes:
        is_stuck: whether all threads wait for one another.
        last: a thread that gets its turn only where no other can go on; by its place among the works.
    """

    def __init__(self, last: int = 0) -> None:
        self.is_stuck = False
        self.last = last
        self._ready: deque[threading.Lock] = deque()
        self._hindmost: threading.Lock | None = None
        self._waiting: dict[Any, list[threading.Lock]] = {}
        self._own = threading.local()
        self._num_left = 0
        self._done = threading.Event()

    def run(self, works: Iterable[Callable[[], None]]) -> None:
        """Run every work in a thread of its own, and wait for all of them. No work may raise."""
        former = threading.stack_size(_STACK_BYTES)
        try:
            pairs = [(work, self._new()) for work in works]
            self._hindmost = pairs[self.last][1]
            threads = [threading.Thread(target=self._live, args=pair) for pair in pairs]
            self._num_left = len(threads)
            self._done.clear()
            for thread in threads:
                thread.start()
        finally:
            threading.stack_size(former)
        self._give_away()
        self._done.wait()
        for thread in threads:
            thread.join()

    def let_others_go_first(self) -> None:
        """Give the turn away until no other can go on, if this is the thread that is to be the last."""
        own: threading.Lock = self._own.lock
        if own is self._hindmost and self._ready:
            self._ready.append(own)
            self._give_away()
            own.acquire()

    def wait_for(self, key: Any) -> None:
        """Give the turn away until `wake` is called with this key. Raises a RuntimeError if no thread can go on."""
        own = self._own.lock
        self._waiting.setdefault(key, []).append(own)
        self._give_away()
        own.acquire()
        if self.is_stuck:
            raise RuntimeError(f"no rank can go on; this one waits for {key}")

    def wake(self, key: Any) -> None:
        """Let the threads that wait for this key go on, when it is their turn."""
        self._ready += self._waiting.pop(key, ())

    def _new(self) -> threading.Lock:
        lock = threading.Lock()
        lock.acquire()
        self._ready.append(lock)
        return lock

    def _live(self, work: Callable[[], None], own: threading.Lock) -> None:
        self._own.lock = own
        own.acquire()
        work()
        self._num_left -= 1
        if self._num_left:
            self._give_away()
        else:
            self._done.set()

    def _give_away(self) -> None:
        if not self._ready:
            self.is_stuck = True
            for key in list(self._waiting):
                self.wake(key)
        if self._ready[0] is self._hindmost:
            self._ready.rotate(-1)
        self._ready.popleft().release()


class Server:
    """What the store of all ranks holds.

    Attributes:
        values: the text of every key.
        wires: the messages from rank to rank that are on their way, by the number of the piece of work.
        posted: the ranks that can be reached, by that number.
        num_wires: how many pieces of work each rank has begun.
        counts: for every rank, what it has said and heard.
    """

    def __init__(self, size: int) -> None:
        self.turns = Turns()
        self.values: dict[str, bytes] = {}
        self.counts = [Counts() for _ in range(size)]
        self.wires: dict[tuple[int, int, int], deque[bytes]] = defaultdict(deque)
        self.posted: set[tuple[int, int]] = set()
        self.num_wires = [0] * size

    def run(self, rank_work: Callable[[int], Any], order: random.Random) -> list[Any]:
        """Run `rank_work(rank)` as every rank. The results in rank order.

        Args:
            rank_work: the work of a rank.
            order: shuffles the order in which the ranks begin.
        """
        results: list[Any] = [None] * len(self.counts)
        failures: list[str] = []

        def work(rank: int) -> Callable[[], None]:
            def run() -> None:
                try:
                    results[rank] = rank_work(rank)
                except BaseException:
                    failures.append(f"--- rank {rank}\n{traceback.format_exc()}")

            return run

        ranks = list(range(len(results)))
        order.shuffle(ranks)
        self.turns.last = ranks.index(len(ranks) - 1)
        self.turns.run(map(work, ranks))
        if failures:
            raise RuntimeError(f"{len(failures)} simulated ranks failed\n{failures[0]}")
        return results


class FakeStore:
    """A client of the store of one rank, with the methods of torch's.

    Args:
        server: of all clients.
        rank: whose messages they are.
    """

    def __init__(self, server: Server, rank: int) -> None:
        self._server = server
        self._rank = rank
        self.timeout = datetime.timedelta(seconds=1800)

    def clone(self) -> FakeStore:
        return FakeStore(self._server, self._rank)

    def set_timeout(self, timeout: datetime.timedelta, /) -> None:
        self.timeout = timeout

    def set(self, key: str, value: Any, /) -> None:
        self._put(key, _bytes(value))
        self._count(key, _bytes(value))

    def append(self, key: str, value: Any, /) -> None:
        self._server.turns.let_others_go_first()
        self._put(key, self._server.values.get(key, b"") + _bytes(value))
        self._count(key, _bytes(value))

    def get(self, key: str, /) -> bytes:
        self.wait([key])
        return self._count(key, answer=self._server.values[key])

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        self.wait(keys)
        values = [self._server.values[key] for key in keys]
        self._count("".join(keys), answer=b"".join(values))
        return values

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None, /) -> None:
        self._count("".join(keys), answer=b"")
        for key in keys:
            while key not in self._server.values:
                self._server.turns.wait_for(key)

    def check(self, keys: list[str], /) -> bool:
        self._count("".join(keys), answer=b".")
        return all(key in self._server.values for key in keys)

    def add(self, key: str, amount: int, /) -> int:
        total = int(self._server.values.get(key, b"0")) + amount
        self._put(key, str(total).encode())
        self._count(key, b"8 bytes.", answer=b"8 bytes.")
        return total

    def compare_set(self, key: str, expected: Any, desired: Any, /) -> bytes:
        present = self._server.values.get(key)
        if (present is None and not expected) or present == _bytes(expected):
            present = _bytes(desired)
            self._put(key, present)
        answer = _bytes(expected) if present is None else present
        return self._count(key, _bytes(expected) + _bytes(desired), answer=answer)

    def delete_key(self, key: str, /) -> bool:
        self._count(key, answer=b".")
        return self._server.values.pop(key, None) is not None

    def _put(self, key: str, value: bytes) -> None:
        self._server.values[key] = value
        self._server.turns.wake(key)

    def _count(self, key: str, value: bytes = b"", *, answer: bytes | None = None) -> bytes:
        counts = self._server.counts[self._rank]
        counts.sent += 1
        counts.sent_bytes += len(key) + len(value)
        if answer is None:
            return b""
        counts.received += 1
        counts.received_bytes += len(answer)
        return answer


class FakeWires(Wires):
    """The wires of one rank, without sockets.

    A rank that expects messages posts once where it is; who sends to it looks that up once.

    Args:
        server: of all ranks.
        rank: this rank.
        board: the texts of this piece of work.
        options: what only sockets use.
    """

    def __init__(self, server: Server, rank: int, board: Board, **options: Any) -> None:
        super().__init__(rank, board)
        self._server = server
        self._here = rank
        self._texts = board
        self._number = server.num_wires[rank] = server.num_wires[rank] + 1  # the same on all ranks
        self._has_posted = False
        self._reached: set[int] = set()
        self._heard: set[int] = set()

    def listen(self) -> None:
        if not self._has_posted:
            self._has_posted = True
            self._texts.post(f"at/{self._here}", "x" * _ADDRESS_BYTES)
            self._server.posted.add((self._number, self._here))
            self._server.turns.wake(("at", self._number, self._here))

    def pass_all(self, sending: Iterable[tuple[int, Callable[[], Any]]], receiving: Mapping[int, Any]) -> None:
        if receiving:
            self.listen()
        for target, make in sending:
            if target not in self._reached:
                # The board alone would ask the store again and again, and keep the turn.
                while (self._number, target) not in self._server.posted:
                    self._server.turns.wait_for(("at", self._number, target))
                self._texts.look_up(f"at/{target}")
            content = bytes(make())
            self._count(self._reached, target, len(content))
            self._server.wires[self._number, self._here, target].append(content)
            self._server.turns.wake((self._number, self._here, target))
        for source, values in receiving.items():
            key = self._number, source, self._here
            while not self._server.wires[key]:
                self._server.turns.wait_for(key)
            content = self._server.wires[key].popleft()
            self._count(self._heard, source, len(content))
            if not isinstance(values, int):
                memoryview(values).cast("B")[:] = content

    def close(self) -> None:
        super().close()
        self._reached.clear()
        self._heard.clear()

    def _count(self, known: set[int], other: int, num_bytes: int) -> None:
        counts = self._server.counts[self._here]
        counts.wired_bytes += num_bytes
        counts.wires += other not in known
        known.add(other)


def _bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
