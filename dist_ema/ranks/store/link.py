"""Agreements of all ranks through the store that they share.

[Note: verdicts]
The agreements of a link are numbered, alike on all ranks. Each has one outcome, its verdict: one text that is written
once, by whoever completes the agreement or gives it up first. Every rank waits for that text and for nothing else. So
all ranks have the same outcome, also a rank that comes late, and one rank can end the wait of all.

How an agreement is completed: each rank adds its value to the list of its group of ranks, and counts itself. Whoever is
the last of the group combines the list, in the order of the ranks, and does the same one level up, for the group:

    ranks      0 ... 127   128 ... 255   ...   16,256 ... 16,383
                   |            |                     |             the last of each group adds its list up
    groups         0            1        ...         127
                                |                                   the last of these writes the verdict
                             verdict                                which all ranks wait for

So nobody waits for one that has not come but by the verdict, and no rank makes more than a dozen requests.

[Note: leaving]
A rank that cannot go on writes its farewell, with the reason, as the verdict of its next agreement, and leaves the
link. That verdict is still open: an agreement needs all ranks. (A broadcast does not; then the farewell is the verdict
after it.) A rank that waits, or comes later, reads the farewell, raises the error in it, and leaves too. The next call
makes the link of the next number, on every rank.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import reduce
from typing import Any

from dist_ema.errors import CommunicationError
from dist_ema.ranks.store.shared_store import SharedStore, StoreError

__all__ = ["Farewell", "LeftError", "Link", "Merge"]

# Ranks, or groups of them, whose values one rank combines. Two levels serve 16,384 ranks.
FAN_IN = 128
# A longer value lies under a name of its own: a list of so many stays within what one request may hold.
_LONGEST_IN_LIST = 2**15

# Combines the value of some ranks with that of the ranks after them.
Merge = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Farewell:
    """The reason why a rank left a link.

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


class LeftError(Exception):
    """A rank has left the link: the farewell of the first one that did."""

    def __init__(self, farewell: Farewell) -> None:
        super().__init__(farewell.message)
        self.farewell = farewell


class Link:
    """A row of agreements of all ranks, from its making until some rank leaves it.

    Agreements are made one after the other; any thread may call `leave` and `missing` meanwhile. A StoreError says
    that the store is gone.

    Args:
        name: the beginning of its names in the store; the same on all ranks.
        rank: the rank of this process.
        size: the number of ranks.
        former: the link before this one, which all ranks have left when they come to this one; its texts go then.

    Attributes:
        name: as given.
        number: how many agreements this rank has come through.
        num_boards: how many pieces of work have had a board; the same on all ranks.
    """

    def __init__(self, name: str, rank: int, size: int, former: Link | None = None) -> None:
        self.name = name
        self.number = 0
        self.num_boards = 0
        self._rank = rank
        self._size = size
        self._former = former
        self._left: Farewell | None = None
        self._farewell: Farewell | None = None  # the one in the store
        self._verdicts: list[str] = []  # those that may still be in the store
        self._num_combined = 0  # agreements that all ranks have come through

    @property
    def is_left(self) -> bool:
        """Whether a rank has left the link, as far as this rank knows."""
        return self._left is not None

    def combine(self, store: SharedStore, value: Any, merge: Merge, *, on_rank_0: bool = False) -> Any:
        """Collective: every rank must call it. Combine a value over the ranks.

        Args:
            store: the client to use.
            value: what this rank brings; it survives JSON, and so does what `merge` returns.
            merge: associative.
            on_rank_0: whether only rank 0 needs the result; the others get None.

        Raises:
            LeftError: a rank has left.
        """
        self._check()
        verdict = self._verdict(self.number)
        written = self._climb(store, value, merge, verdict, on_rank_0=on_rank_0)
        result = self._outcome(store.take(verdict) if written is None else written)
        if on_rank_0:
            result = None
            if self._rank == 0:
                result = json.loads(store.take(f"{verdict}/result"))
                store.delete(f"{verdict}/result")
        verdicts, self._verdicts = self._verdicts, [verdict]
        former, self._former = self._former, None
        self.number += 1
        self._num_combined += 1
        # All ranks have come here, so all have read the verdicts before, and have left the former link.
        with suppress(StoreError):  # whoever keeps the store may have read this verdict, the last one, and ended
            if written is not None:
                for key in verdicts:
                    store.delete(key)
            if former is not None:
                former.clear(store)
        return result

    def broadcast(self, store: SharedStore, value: Any) -> Any:
        """Collective: every rank must call it. The value of rank 0, which does not wait for the others.

        Args:
            store: the client to use.
            value: on rank 0, what all get; it survives JSON.

        Raises:
            LeftError: a rank has left.
        """
        self._check()
        verdict = self._verdict(self.number)
        text = store.claim(verdict, json.dumps({"value": value})) if self._rank == 0 else store.take(verdict)
        result = self._outcome(text)
        self._verdicts = [*self._verdicts, verdict]
        self.number += 1
        return result

    def leave(self, store: SharedStore, own: Farewell) -> Farewell:
        """Leave the link, and end its agreements on all ranks. No communication but with the store.

        Returns:
            The farewell of the first rank that left.
        """
        number = self.number
        # Not until `_left` is set: `forget` sets it where this takes long, and the others must learn of it still.
        while self._farewell is None:
            with suppress(LeftError):
                self._outcome(store.claim(self._verdict(number), json.dumps({"left": dataclasses.asdict(own)})))
            number += 1  # that verdict was there already
        return self._farewell

    def check(self, store: SharedStore) -> None:
        """Raise a LeftError if a rank has left, as far as the store shows. For waits that are no agreements."""
        self._check()
        text = store.look(self._verdict(self.number))
        if text is not None:
            self._outcome(text)

    def forget(self, own: Farewell) -> Farewell:
        """Leave the link without waiting for the store, which may be gone."""
        if self._left is None:
            self._left = own
        return self._left

    def missing(self, store: SharedStore, most: int) -> tuple[list[int], int]:
        """The ranks that have not come to the present agreement, as far as the store shows.

        Args:
            store: the client to use.
            most: how many are named.

        Returns:
            The first of them, and the number of all.
        """
        levels = self._levels()
        if not levels:
            return [], 0
        number = self.number
        named: list[int] = []
        count = 0

        def visit(level: int, group: int) -> None:
            nonlocal count
            present = {member for member, _ in _entries(store.look(self._list(number, level, group)) or "")}
            first = group * FAN_IN
            for member in range(min(FAN_IN, levels[level] - first)):
                if member in present:
                    continue
                if level:
                    visit(level - 1, first + member)
                else:
                    count += 1
                    if len(named) < most:
                        named.append(first + member)

        visit(len(levels) - 1, 0)
        return named, count

    def clear(self, store: SharedStore) -> None:
        """Remove what the link has left in the store. All ranks have left it, and each calls this."""
        place = self._rank
        for level, _ in enumerate(self._levels()):
            group, member = divmod(place, FAN_IN)
            if member:
                return
            # A rank that left may have come to one agreement less than the others.
            for number in (self.number, self.number + 1):
                store.delete(self._list(number, level, group))
            store.delete(self._count(level, group))
            place = group
        for key in (*self._verdicts, self._verdict(self.number), self._verdict(self.number + 1)):
            store.delete(key)

    def _check(self) -> None:
        if self._left is not None:
            raise LeftError(self._left)

    def _outcome(self, text: str) -> Any:
        """The value in a verdict. Raises a LeftError for a farewell."""
        content = json.loads(text)
        if "left" in content:
            self._left = self._farewell = Farewell(**content["left"])
            raise LeftError(self._farewell)
        return content["value"]

    def _levels(self) -> list[int]:
        """How many values are combined on each level: those of ranks, those of groups of ranks, and so on."""
        counts = []
        count = self._size
        while count > 1:
            counts.append(count)
            count = -(-count // FAN_IN)
        return counts

    def _climb(self, store: SharedStore, value: Any, merge: Merge, verdict: str, *, on_rank_0: bool) -> str | None:
        """Bring a value, and combine the values of every group of which this rank is the last.

        Returns:
            The verdict, if this rank was the last of all.
        """
        place = self._rank
        for level, count in enumerate(self._levels()):
            group, member = divmod(place, FAN_IN)
            key = self._list(self.number, level, group)
            text = json.dumps(value)
            if len(text) > _LONGEST_IN_LIST:
                store.put(f"{key}/{member}", text)
                text = ""
            store.append(key, f"{member} {text}\n")
            members = min(FAN_IN, count - group * FAN_IN)
            if store.count(self._count(level, group)) < members * (self._num_combined + 1):
                return None
            try:
                value = reduce(merge, self._values(store, key))
            except StoreError:
                raise
            except Exception as error:  # else all ranks would wait for the verdict
                self.leave(store, _broken(error))
                self._check()
            store.delete(key)
            place = group
        if on_rank_0:
            store.put(f"{verdict}/result", json.dumps(value))
            value = None
        return store.claim(verdict, json.dumps({"value": value}))

    def _values(self, store: SharedStore, key: str) -> Iterator[Any]:
        """The values in a list, in the order of the ranks."""
        for member, text in sorted(_entries(store.take(key))):
            if text:
                yield json.loads(text)
            else:
                yield json.loads(store.take(f"{key}/{member}"))
                store.delete(f"{key}/{member}")

    def _verdict(self, number: int) -> str:
        return f"{self.name}/{number}"

    def _list(self, number: int, level: int, group: int) -> str:
        return f"{self.name}/{number}/{level}.{group}"

    def _count(self, level: int, group: int) -> str:
        return f"{self.name}/{level}.{group}/count"


def _entries(text: str) -> Iterator[tuple[int, str]]:
    """Member and value of every entry of a list."""
    for line in text.splitlines():
        member, _, value = line.partition(" ")
        yield int(member), value


def _broken(error: Exception) -> Farewell:
    reason = f"{type(error).__name__}: {error}"
    return Farewell(
        0, CommunicationError.__name__, f"the values of the ranks cannot be combined ({reason})", lives=False
    )
