"""The way of one average into a call of all ranks, through its agreements, and out of it.

A world lasts as long as the process group; a link lasts from one failure to the next; a channel belongs to an average,
and takes the world's present link at each arrival. `num_calls` counts the calls of all averages; `epoch` is the number
of the link.

If a call ends in any other way than by an agreement (by an interrupt, or a defect), its rank leaves the link of the
calls, which ends the call for the others at once: see [Note: leaving] in link.py, and calls.py.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from dist_ema.errors import (
    CheckpointError,
    CommunicationError,
    DistEMAError,
    RankMismatchError,
    agreed,
    described,
    error_class,
    is_agreed,
)
from dist_ema.ranks.arrival import Wait, arrival_seconds, differing_calls, merge_calls, present_world
from dist_ema.ranks.store.board import Board
from dist_ema.ranks.store.link import Farewell, LeftError, Link
from dist_ema.ranks.store.shared_store import SharedStore, StoreError
from dist_ema.ranks.wires.wires import WireError, Wires
from dist_ema.ranks.worlds import STORE_IS_GONE, World, this_world

__all__ = ["Channel"]

T = TypeVar("T")

# Modules whose exceptions count as failures; an exception of the program's own (of a signal handler, say) goes on.
_COMMON_ERRORS = ("builtins", "torch", "numpy", "json", "struct", "zlib", "pickle", "_pickle")


class Channel:
    """The agreements of all ranks of the default process group; trivial when there is none.

    Making one sends nothing to other ranks: it may connect to the store that they share.

    Args:
        link: the link and the client of a thread that communicates beside the calls; None for the calls.

    Attributes:
        world_size: the number of ranks.
        rank: the rank of this process.
        is_beside: whether this is the channel of a thread.
        drawn: a number that the ranks have drawn at their latest arrival; the same on all ranks.
    """

    def __init__(self, link: tuple[Link, SharedStore] | None = None) -> None:
        self._world = world = this_world()
        self.world_size, self.rank = (1, 0) if world is None else (world.size, world.rank)
        self.is_beside = link is not None
        self._link: Link | None = None
        self._client: SharedStore | None = None
        if link is not None:
            self._link, self._client = link
        self.drawn = 0

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which makes calls of its own."""
        return self.__dict__ | {"_link": None, "_client": None, "_world": None}

    def arrive(self, call: str, *, hurried: bool = True) -> None:
        """Collective: every rank must call it. Waits until all ranks have come to the same call.

        Rank 0 logs for which ranks it waits, after `DIST_EMA_NOTICE_SECONDS`.

        Args:
            call: the name of the call that begins.
            hurried: whether the wait ends after `DIST_EMA_ARRIVAL_SECONDS`, if that is set. Else it ends after the
                default group's timeout.

        Raises:
            CommunicationError: some rank did not come in time, is gone, or has left the call; the same on all ranks,
                also on those that come later. The next call works.
            RankMismatchError: the ranks have come to different calls; the same on all ranks.
            ConfigError: one of the environment variables is not a number of seconds.
        """
        limits: tuple[float, float] | DistEMAError
        try:
            limits = arrival_seconds()
        except DistEMAError as error:
            limits = error
        if self.world_size == 1:
            if isinstance(limits, DistEMAError):
                raise limits
            self.drawn = secrets.randbits(64)
            return
        world = self._world = present_world(call, self.rank, self.world_size)
        world.num_calls += 1
        world.at = call
        self._link = world.link
        notice_seconds, seconds = (math.inf, 0.0) if isinstance(limits, DistEMAError) else limits
        wait = Wait.for_all(world, call, notice_seconds, seconds if seconds and hurried else world.timeout_seconds)
        self._enter(wait, call)
        if isinstance(limits, DistEMAError):
            raise self._left(call, limits, self._awaited_in)
        calls, self.drawn = self._come(wait, call)
        self._link = world.link
        different = differing_calls(calls)
        if different is not None:
            raise agreed(RankMismatchError(different))

    def _enter(self, wait: Wait, call: str) -> None:
        """Learn where the ranks write. A rank that fails here counts as one that has not come yet."""
        assert self._world is not None, "there are several ranks"
        try:
            self._world.enter(wait)
        except LeftError as error:
            raise agreed(CommunicationError(error.farewell.message)) from None
        except StoreError as error:
            raise self._lost(call, self._world.link, error) from error

    def _come(self, wait: Wait, call: str) -> tuple[dict[str, list[int]], int]:
        """The calls that the ranks have come to, and a number that they draw.

        A link that a rank left at the end of a former call is renewed.
        """
        world = self._world
        assert world is not None, "there are several ranks"
        own = [{call: [1, self.rank]}, secrets.randbits(64)]

        def merge(left: list[Any], right: list[Any]) -> list[Any]:
            return [merge_calls(left[0], right[0]), left[1] ^ right[1]]

        while True:
            wait.link = link = world.link
            try:
                calls, drawn = world.do(partial(link.combine, value=own, merge=merge), wait)
                world.meet()
                return calls, drawn
            except LeftError as error:
                failure, first = self._after(link, error), error.farewell
                # The farewell may be of the former call: a rank left its very end, when the others were through.
                if not first.lives or first.call >= world.num_calls:
                    raise failure from None
            except StoreError as error:
                raise self._lost(call, link, error) from error

    def end(self) -> None:
        """Leave the present call, at its end. No communication."""
        if self._world is not None and not self.is_beside:
            self._world.at = ""
            self._world.clients.release()

    def shows(self, average: Any) -> None:
        """Have other ranks that wait for this one learn `average.num_updates`. No communication."""
        if self._world is not None:
            self._world.shows(average)

    @property
    def num_calls(self) -> int:
        """The number of calls that this process has come to."""
        return 0 if self._world is None else self._world.num_calls

    @property
    def epoch(self) -> int:
        """A number that is the same on all ranks within a call, and another one after a call that was cut off.

        A call that was cut off may have set a variable on some ranks and not on others. So a variable that an earlier
        call set, and that decides whether a call communicates further, counts in its own epoch only.
        """
        return 0 if self._world is None else self._world.num_links

    @property
    def is_simulated(self) -> bool:
        """Whether the ranks are threads of a simulation, which have no process groups."""
        return self._world is not None and self._world.group is None

    def group_of(self, ranks: Sequence[int]) -> Any:
        """Collective: every rank must call it, with the same ranks. See `World.group_of`."""
        return None if self._world is None else self._world.group_of(ranks)

    def beside(self) -> Channel:
        """Collective: every rank must call it, within a call. A channel for a thread beside the calls.

        No communication, but a connection to the store.

        Raises:
            CommunicationError: the store is gone.
        """
        if self.world_size == 1 or self._world is None:
            return self
        try:
            return Channel(self._world.beside())
        except StoreError as error:
            raise CommunicationError(
                f"preparing to save in the background: the store of the process group does not answer "
                f"({_first_line(error)})"
            ) from error

    def agreement(self, action: str, work: Callable[[Link, SharedStore], T]) -> T:
        """Collective: every rank must call it. Do `work`, which comes to an agreement through the link.

        Args:
            action: a name of the work, for the message.
            work: what to do with the link and a client of the store.

        Raises:
            CommunicationError: other ranks are gone, or did not call in time; the same on all ranks.
            DistEMAError: a rank has left the call with this error; the same on all ranks.
        """
        world, link = self._present(action)
        try:
            if not world.is_present:
                raise StoreError("the process group was destroyed")
            if self._client is not None:
                return work(link, self._client)
            return world.do(partial(work, link), self._wait(action, link))
        except LeftError as error:
            raise self._after(link, error) from None
        except StoreError as error:
            raise self._lost(action, link, error) from error

    @contextmanager
    def wires(self, action: str) -> Iterator[Wires]:
        """Collective: every rank must enter it, in the same order; then ranks send to one another what they like.

        Entering and leaving send nothing. All connections are closed at the end.

        Args:
            action: a name of the work, for the message.

        Raises:
            CommunicationError: a message did not get through; the same on all ranks.
            DistEMAError: a rank has left the call with this error; the same on all ranks.
        """
        world, link = self._present(action)
        link.num_boards += 1
        board = Board(self._client or world.clients.store, link, f"{link.name}/board/{link.num_boards}")
        opened_by = world.insist if self._client is None else None
        wires: Wires = world.make_wires(world.rank, board, num_ranks=world.size, opened_by=opened_by)
        try:
            yield wires
        except LeftError as error:
            raise self._after(link, error) from None
        except (StoreError, WireError) as error:
            raise self._lost(action, link, error) from error
        finally:
            wires.close()

    def _present(self, action: str) -> tuple[World, Link]:
        """The world and the link of the present call, or of the thread beside the calls. It may have to arrive."""
        if not self.is_beside and (self._world is None or self._link is not self._world.link or self._link.is_left):
            self.arrive(action)
        if self._world is None or self._link is None:
            raise CommunicationError(f"{action}: this copy of an average has no thread to communicate in")
        return self._world, self._link

    def _wait(self, action: str, link: Link) -> Wait:
        assert self._world is not None, "there are several ranks"
        return Wait.within(self._world, link, action, arrival_seconds()[0])

    def _after(self, link: Link, error: LeftError) -> DistEMAError:
        """The error that all ranks raise after a farewell."""
        if self._world is not None and link is self._world.link:
            self._world.renew()
        return _error_of(error.farewell)

    def meeting(self, action: str) -> tuple[Callable[[], None], Callable[[], None]]:
        """Collective: every rank must do both steps. No rank passes the second before all have done the first.

        It comes before work that must not begin on some ranks only: a rank that ends the call before its first step
        ends it for all.

        Returns:
            Two steps that may be cut off and done again (see `dist_ema.uninterrupted`): the beginning and the wait.
        """
        if self.world_size == 1:
            return (lambda: None), (lambda: None)
        world, link = self._present(action)
        begin, wait = world.begin(lambda store: link.combine(store, 0, max))
        failures: list[DistEMAError] = []

        def wait_for_all() -> None:
            if failures:
                raise failures[0]
            try:
                wait(self._wait(action, link))
            except LeftError as error:
                failures.append(self._after(link, error))
                raise failures[0] from None
            except StoreError as error:
                failures.append(self._lost(action, link, error))
                raise failures[0] from error

        return begin, wait_for_all

    def _leave(self, link: Link, kind: str, message: str, *, lives: bool) -> DistEMAError:
        """Leave a link. Returns the error that all ranks raise."""
        world = self._world
        first = Farewell(0 if world is None else world.num_calls, kind, message, lives)
        if world is not None:
            first = world.leave(link, first)
            if link is world.link and world.has_entered:
                world.renew()
        return _error_of(first)

    @property
    def _awaited_in(self) -> Link | None:
        """The link in which the others wait: an interrupt may come before `_link` is that of this call."""
        return self._link if self.is_beside or self._world is None else self._world.link

    def _left(self, call: str, error: BaseException, link: Link | None) -> DistEMAError:
        """Leave the call because of an error that only this rank may have. Returns the error that all ranks raise."""
        if isinstance(error, DistEMAError):
            kind, message = described(error)
        else:
            kind = (CheckpointError if isinstance(error, OSError) else CommunicationError).__name__
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            message = (
                f"rank {self.rank} left {call} before its end ({reason}). The call has ended on all ranks, and may be "
                "made again on all of them"
            )
        if link is None:
            return error_class(kind)(message)
        return self._leave(link, kind, message, lives=True)

    def _lost(self, action: str, link: Link, error: Exception) -> DistEMAError:
        """Leave a link, because the store or a rank is gone. Returns the error that all ranks raise."""
        if isinstance(error, StoreError):
            return self._leave(link, CommunicationError.__name__, STORE_IS_GONE, lives=False)
        message = (
            f"{action}: rank {self.rank} has lost another rank ({_first_line(error)}). Every rank must make the same "
            "call. Perhaps a rank has died"
        )
        return self._leave(link, CommunicationError.__name__, message, lives=False)

    def abandon(self, call: str, error: BaseException, leaving: list[Link | None]) -> None:
        """End a call for the other ranks, because this one ends it by an error that they may not have.

        Args:
            call: the name of the call.
            error: the error by which this rank ends it.
            leaving: empty at the first try. A further one, after an interrupt, leaves the same link as the first.

        Raises:
            DistEMAError: the error that the other ranks raise, in place of an error of Python, torch or numpy.
        """
        if self.world_size == 1 or is_agreed(error):
            return
        if not leaving:
            leaving.append(self._awaited_in)
        of_all = self._left(call, error, leaving[0])
        if isinstance(error, Exception) and type(error).__module__.partition(".")[0] in _COMMON_ERRORS:
            raise of_all from error
        if isinstance(error, DistEMAError):
            raise of_all from error


def _error_of(farewell: Farewell) -> DistEMAError:
    """The error that all ranks raise."""
    return agreed(error_class(farewell.kind)(farewell.message))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
