"""The gloo groups of the package's own messages: made by all ranks, left by all ranks, made anew.

They need no GPU, and never mix with the traffic of training. They are made on the store that all ranks share, beside
torch's own registry: `new_group` numbers its groups on every rank alone, so a rank that made one more than the others
would change the names of all later groups, those of the user too.

[Note: leaving]
No local variable may refer to a group or a work while it waits: the traceback of an error would keep connections open.
A rank that cannot go on with a call leaves its group: it writes its farewell, with the reason, to the store. Then it
drops the group, which closes its connections. A rank that waits for this one, now or at its next message, fails at
once, reads the farewell, raises the error in it, and leaves too. Only the farewell of the first rank counts. The next
call makes the group of the next number, on every rank.
"""

from __future__ import annotations

import _thread
import dataclasses
import datetime
import json
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from dist_ema.ranks.broadcasts import Passing
from dist_ema.ranks.tasks import WireError

__all__ = ["Farewell", "Link", "StoreBoard", "World", "this_world"]

# The least time that a rank waits for a message within a call that all have made: a slow disk is no error.
_STAGE_SECONDS = 1800.0
# How long a rank that leaves waits for the store to take its farewell.
_FAREWELL_SECONDS = 5.0

_COMING, _READY = 1, 2  # tags of the two messages of an arrival; all others have 0


@dataclasses.dataclass(frozen=True)
class Farewell:
    """The reason why a rank left a group.

    Attributes:
        call: the number of the call, counted alike on all ranks.
        kind: the name of the error that all ranks raise.
        message: the text of that error.
        lives: whether the rank left by itself; False if it left because another rank is gone.
    """

    call: int
    kind: str
    message: str
    lives: bool


class Link:
    """One gloo group of all ranks, from its making until some rank leaves it. See [Note: leaving]."""

    def __init__(self, store: Any, name: str, rank: int, size: int) -> None:
        self._store = store
        self._name = name
        self._key = f"left/{name}"
        self._rank = rank
        self._size = size
        self._group: Any = None
        self._left: Farewell | None = None
        self._num_boards = 0
        # The messages of an arrival: the other rank, and a byte that is sent or received.
        others = range(1, size) if rank == 0 else (0, 0)
        self._messages = [(other, torch.zeros(1, dtype=torch.uint8, device="cpu")) for other in others]

    @property
    def is_made(self) -> bool:
        """Whether the group can be used, as far as this rank knows."""
        return self._group is not None

    def make(self, seconds: float) -> None:
        """Collective: every rank must call it. Make the group, unless it is made.

        A thread makes it: neither a signal nor the farewell of a rank could end the wait for the other ranks.

        Raises:
            RuntimeError: some rank did not come in time, or has left.
        """
        if self._group is not None:
            return
        if self.farewell() is not None:
            raise RuntimeError("a rank has left the group that is to be made")
        made: list[Any] = []
        failures: list[Exception] = []
        done, unwanted = threading.Event(), threading.Event()
        timeout = datetime.timedelta(seconds=max(_STAGE_SECONDS, self._store.timeout.total_seconds()))

        def run() -> None:
            try:
                # The client is a new one: a client that waits would block the other calls.
                store = PrefixStore(self._name, self._store.clone())
                made.append(dist.ProcessGroupGloo(store, self._rank, self._size, timeout))
            except Exception as error:
                failures.append(error)
            done.set()
            if unwanted.is_set():
                made.clear()

        threading.Thread(target=run, name="dist_ema-group", daemon=True).start()
        try:
            deadline, pause = time.monotonic() + seconds, 0.1
            while not done.wait(max(0.0, min(pause, deadline - time.monotonic()))):
                if self.farewell() is not None:
                    raise RuntimeError("a rank has left the group that is being made")
                if time.monotonic() >= deadline:
                    raise RuntimeError(f"a process group was not made within {seconds:g} s")
                pause = min(2 * pause, 5.0)
            if failures:
                raise RuntimeError(str(failures[0]))
            self._group = made.pop()
        finally:
            unwanted.set()
            made.clear()

    def farewell(self) -> Farewell | None:
        """The farewell of the first rank that left; None if no rank has left."""
        if self._left is None and self._store.check([self._key]):
            self._left = Farewell(**json.loads(self._store.get(self._key)))
        return self._left

    def leave(self, own: Farewell) -> Farewell:
        """Leave the group. No communication but with the store.

        Returns:
            The farewell of the first rank that left.
        """
        done = threading.Event()

        def run() -> None:
            try:
                if self._left is None:
                    first = self._store.compare_set(self._key, "", json.dumps(dataclasses.asdict(own)))
                    self._left = Farewell(**json.loads(first))
            except Exception:  # the store is gone with the rank that kept it
                self._left = own
            finally:
                self._group = None
                done.set()

        # No second interrupt can end a thread halfway.
        _thread.start_new_thread(run, ())
        try:
            done.wait(_FAREWELL_SECONDS)
        except BaseException:
            done.wait(_FAREWELL_SECONDS)
            raise
        return self._left or own

    def board(self) -> StoreBoard:
        """A board for one piece of work; the ranks make equally many of them. No communication."""
        self._num_boards += 1
        return StoreBoard(PrefixStore(f"{self._name}/{self._num_boards}", self._store), self)

    def arrive(self, seconds: float) -> None:
        """Collective: every rank must call it. Wait for so long at most until all ranks are here.

        Raises:
            RuntimeError: some rank did not come in time, or is gone.
        """
        deadline = time.monotonic() + seconds
        if self._rank == 0:
            _wait([self._live().recv([message], other, _COMING) for other, message in self._messages], deadline)
            _wait([self._live().send([message], other, _READY) for other, message in self._messages], deadline)
        else:
            (_, message), (_, answer) = self._messages
            _wait([self._live().send([message], 0, _COMING), self._live().recv([answer], 0, _READY)], deadline)

    def reduce(self, values: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        """Collective: every rank must call it. Combine a CPU tensor over the ranks, in place."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(operation)
        self._live().allreduce([values], options).wait()

    def gather(self, value: Any) -> list[Any]:
        """Collective: every rank must call it. The values of all ranks, in rank order."""
        content = _pickled(value)
        sizes = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(self._size)]
        self._live().allgather([sizes], [torch.tensor([content.numel()], device="cpu")]).wait()
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device="cpu")
        padded[: content.numel()] = content
        gathered = [torch.empty_like(padded) for _ in range(self._size)]
        self._live().allgather([gathered], [padded]).wait()
        return [_unpickled(content[: int(size)]) for content, size in zip(gathered, sizes, strict=True)]

    def broadcast(self, value: Any) -> Any:
        """Collective: every rank must call it. The value of rank 0."""
        content = _pickled(value) if self._rank == 0 else torch.empty(0, dtype=torch.uint8, device="cpu")
        size = torch.tensor([content.numel()], device="cpu")
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._live().broadcast([size], options).wait()
        if self._rank != 0:
            content = torch.empty(int(size), dtype=torch.uint8, device="cpu")
        self._live().broadcast([content], options).wait()
        return value if self._rank == 0 else _unpickled(content)

    def meeting(self) -> Passing:
        """Collective: every rank must begin it. A message that is through when all ranks have begun it."""
        flag, options = torch.zeros(1, dtype=torch.uint8, device="cpu"), dist.AllreduceOptions()
        return Passing(partial(self._live().allreduce, [flag], options))

    def _live(self) -> Any:
        if self._group is None:
            raise RuntimeError("the group was left")
        return self._group


class StoreBoard:
    """Where the ranks leave texts for each other, in the store that they share; see `Board` in wires.py.

    Args:
        store: the part of the store for one piece of work.
        link: the link of the work.
    """

    def __init__(self, store: Any, link: Link) -> None:
        self._store = store
        self._link = link

    def post(self, key: str, text: str) -> None:
        """Publish a text."""
        self._store.set(key, text)

    def look_up(self, key: str) -> str:
        """The text under a key, as soon as it is there. A blocking wait could not be interrupted."""
        pause, checked_at = 0.001, time.monotonic()
        while not self._store.check([key]):
            if time.monotonic() - checked_at >= 0.5:
                self.check()
                checked_at = time.monotonic()
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return str(self._store.get(key).decode())

    def announce(self, key: str, text: str) -> None:
        """Add a text to what is under a key."""
        self._store.append(key, text)
        self._store.check([key])  # the answer shows that the text is there

    def announced(self, key: str) -> str:
        """All that was added under a key."""
        return str(self._store.get(key).decode()) if self._store.check([key]) else ""

    def forget(self, key: str) -> None:
        """Remove a key."""
        self._store.delete_key(key)

    def check(self) -> None:
        """Raises a WireError if some rank has left the link."""
        if self._link.farewell() is not None:
            raise WireError("another rank has left")


def _wait(works: list[Any], deadline: float) -> None:
    """Wait for all works, and forget them, also after an exception."""
    try:
        while works:
            works[0].wait(datetime.timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
            works.pop(0)
    finally:
        works.clear()


class World:
    """What all ranks of one default process group share.

    Attributes:
        group: the default group.
        rank: the rank of this process in the group.
        size: the number of ranks.
        timeout_seconds: the timeout of the default group, which `init_process_group` gives to its store too.
        num_calls: the number of calls that this rank has come to; the same on all ranks at the same call.
        num_links: the number of links of the calls so far; the same on all ranks within a call.
        link: the link of the calls; the first call makes it.
    """

    def __init__(self, group: dist.ProcessGroup, number: int) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        store: Any = group.get_group_store()
        self.timeout_seconds = store.timeout.total_seconds()
        self.num_calls = 0
        self._store = PrefixStore(f"dist_ema/{number}", store.clone())
        self._store.set_timeout(store.timeout)
        self.num_links = 1
        self._num_beside = 0
        self._beside: Link | None = None
        self.link = self._new_link("calls", 1)

    def renew(self) -> None:
        """Have the next call make a new group; all ranks leave the same groups. No communication."""
        self.num_links += 1
        self.link = self._new_link("calls", self.num_links)

    def come(self, call: str) -> None:
        """Write to the store that this rank has come to the call number `num_calls`."""
        self._store.set(f"at/{self.rank}", f"{self.num_calls} {call}")

    def missing(self) -> list[int]:
        """The other ranks that, as far as the store shows, have not come to the present call of this rank."""
        missing = []
        for rank in range(self.size):
            key = f"at/{rank}"
            number = self._store.get(key).split()[0] if self._store.check([key]) else 0
            if rank != self.rank and int(number) < self.num_calls:
                missing.append(rank)
        return missing

    def beside(self, newest: Callable[[int], int]) -> Link:
        """Collective: every rank must call it, within a call. A link for a thread beside the calls.

        Args:
            newest: returns the largest of an integer over the ranks. All take the link of this number, so that no rank
                keeps a link that another has left.
        """
        if self._beside is None or not self._beside.is_made:
            self._num_beside, self._beside = self._num_beside + 1, None
        number = newest(self._num_beside)
        if self._beside is None or number != self._num_beside:
            self._num_beside, self._beside = number, self._new_link("beside", number)
        return self._beside

    def _new_link(self, kind: str, number: int) -> Link:
        return Link(self._store, f"{kind}/{number}", self.rank, self.size)


_worlds: list[World] = []
_num_worlds = 0


def this_world() -> World | None:
    """The world of the default process group; None without a group, or if it has one rank.

    No communication, but a connection to the store.
    """
    global _num_worlds
    group = dist.group.WORLD if dist.is_available() else None
    if _worlds and _worlds[0].group is group:
        return _worlds[0]
    if group is None or dist.get_world_size() == 1:
        return None
    _num_worlds += 1  # keys may outlive a process group
    _worlds[:] = [World(group, _num_worlds)]
    return _worlds[0]


def _pickled(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _unpickled(content: torch.Tensor) -> Any:
    return json.loads(content.numpy().tobytes())
