"""Every collective of the package, but the broadcasts of values in training's own groups.

[Note: agreement]
A rank that fails before a collective leaves the others waiting for the process group's timeout (30 minutes
by default). So work that can fail is done locally first, inside `Exchange.agree`: the ranks then agree on whether any
of them failed, and if so every rank raises the same error, with the reasons of the first failed ranks in it.

If a call ends in any other way (by an interrupt, or a defect), its rank leaves the link of the calls, which ends the
call for the others at once: see [Note: leaving] in link.py, and calls.py.

What travels is JSON, and short: a digest instead of a record, a count and the first few ranks instead of a list of all.
"""

from __future__ import annotations

import json
import operator
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
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
from dist_ema.messages import difference_text, level_of_caller
from dist_ema.ranks.arrival import (
    Wait,
    arrival_seconds,
    differing_calls,
    merge_calls,
    present_world,
)
from dist_ema.ranks.link import Farewell, LeftError, Link, Merge
from dist_ema.ranks.reports import failure_text, merge_reports, report_of
from dist_ema.ranks.store import SharedStore
from dist_ema.ranks.worlds import World, this_world

__all__ = ["Exchange"]

T = TypeVar("T")

# Modules whose exceptions count as failures; an exception of the program's own (of a signal handler, say) goes on.
_COMMON_ERRORS = ("builtins", "torch", "numpy", "json", "struct", "zlib", "pickle", "_pickle")


class Exchange:
    """Control traffic among all ranks of the default process group; trivial when there is none.

    Making one sends nothing to other ranks: it may connect to the store that they share.

    Args:
        link: the link and the client of a thread that communicates beside the calls; None for the calls.

    Attributes:
        world_size: the number of ranks.
        rank: the rank of this process.
        is_beside: whether this is the exchange of a thread.
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
        if isinstance(limits, DistEMAError):
            raise self._left(call, limits)
        notice_seconds, seconds = limits
        wait = Wait.for_all(world, call, notice_seconds, seconds if seconds and hurried else world.timeout_seconds)
        calls, self.drawn = self._come(wait, call)
        self._link = world.link
        world.clear()
        different = differing_calls(calls)
        if different is not None:
            raise agreed(RankMismatchError(different))

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
                return calls, drawn
            except LeftError as error:
                world.renew()
                first = error.farewell
                # The farewell may be of the former call: a rank left its very end, when the others were through.
                if not first.lives or first.call >= world.num_calls:
                    raise agreed(error_class(first.kind)(first.message)) from None
            except RuntimeError as error:
                raise self._lost(call, link, error) from error

    def end(self) -> None:
        """Leave the present call, at its end. No communication."""
        if self._world is not None and not self.is_beside:
            self._world.at = ""

    def shows(self, average: Any) -> None:
        """Have other ranks that wait for this one learn `average.num_updates`. No communication."""
        if self._world is not None:
            self._world.shows(average)

    def _leave(self, link: Link, kind: str, message: str, *, lives: bool) -> DistEMAError:
        """Leave a link. Returns the error that all ranks raise."""
        world = self._world
        first = Farewell(0 if world is None else world.num_calls, kind, message, lives)
        if world is not None:
            first = world.leave(link, first)
            if link is world.link:
                world.renew()
        return agreed(error_class(first.kind)(first.message))

    def _left(self, call: str, error: BaseException) -> DistEMAError:
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
        if self._link is None:
            return error_class(kind)(message)
        return self._leave(self._link, kind, message, lives=True)

    def _lost(self, action: str, link: Link, error: Exception) -> DistEMAError:
        """The error for a store that is gone, or a wait that took too long."""
        message = (
            f"{action}: the store of the process group does not answer ({_first_line(error)}). Every rank must make "
            "the same call. Perhaps the process that keeps the store (rank 0, or torchrun) has died, or the process "
            "group was destroyed before wait()"
        )
        return self._leave(link, CommunicationError.__name__, message, lives=False)

    def abandon(self, call: str, error: BaseException) -> None:
        """End a call for the other ranks, because this one ends it by an error that they may not have.

        Raises:
            DistEMAError: the error that the other ranks raise, in place of an error of Python, torch or numpy.
        """
        if self.world_size == 1 or is_agreed(error):
            return
        of_all = self._left(call, error)
        if isinstance(error, Exception) and type(error).__module__.partition(".")[0] in _COMMON_ERRORS:
            raise of_all from error
        if isinstance(error, DistEMAError):
            raise of_all from error

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

    def beside(self) -> Exchange:
        """Collective: every rank must call it, within a call. An exchange for a thread beside the calls.

        No communication, but a connection to the store.

        Raises:
            CommunicationError: the store is gone.
        """
        if self.world_size == 1 or self._world is None:
            return self
        try:
            return Exchange(self._world.beside())
        except RuntimeError as error:
            raise CommunicationError(
                f"preparing to save in the background: the store of the process group does not answer "
                f"({_first_line(error)})"
            ) from error

    def _agreement(self, action: str, work: Callable[[Link, SharedStore], T]) -> T:
        """Come to an agreement of all ranks. An error of it ends the link of this rank."""
        world, link = self._present(action)
        try:
            if not world.is_present:
                raise RuntimeError("the process group was destroyed")
            if self._client is not None:
                return work(link, self._client)
            return world.do(partial(work, link), self._wait(action, link))
        except LeftError as error:
            raise self._after(link, error) from None
        except RuntimeError as error:
            raise self._lost(action, link, error) from error

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
        return agreed(error_class(error.farewell.kind)(error.farewell.message))

    def reduce(self, action: str, value: Any, merge: Merge, *, on_rank_0: bool = False) -> Any:
        """Collective: every rank must call it. Combine a value over the ranks; the result is the same on every rank.

        Args:
            action: a name of the work, for the message.
            value: what this rank brings; it must survive JSON, and so must what `merge` returns.
            merge: combines the value of some ranks with that of the ranks after them; it must be associative.
            on_rank_0: whether only rank 0 needs the result. The others get None; large results are cheaper so.

        Raises:
            CommunicationError: other ranks are gone, or did not call in time.
        """
        if self.world_size == 1:
            return json.loads(json.dumps(value))
        return self._agreement(action, lambda link, store: link.combine(store, value, merge, on_rank_0=on_rank_0))

    def broadcast_object(self, value: Any) -> Any:
        """Collective: every rank must call it. The value of rank 0, which must survive JSON, on every rank."""
        if self.world_size == 1:
            return json.loads(json.dumps(value))
        return self._agreement("exchanging a message", lambda link, store: link.broadcast(store, value))

    def agree(self, action: str, work: Callable[[], T]) -> T:
        """Collective: every rank must call it. Runs `work` locally and raises on all ranks if any failed.

        Args:
            action: a name of the work, for the message.
            work: the work, which must not communicate. See [Note: agreement].

        Raises:
            CommunicationError: other ranks are gone, or did not call in time.
            DistEMAError: of the class that the first failed rank raised; the same on every rank. An OSError becomes
                a `CheckpointError`, any other exception the root class.
        """
        return self.agree_alike(action, work, lambda _: None)

    def agree_alike(
        self,
        action: str,
        work: Callable[[], T],
        same: Callable[[T], Any],
        working_folder: str | None = None,
    ) -> T:
        """Collective: every rank must call it. As `agree`, and refuses a record that differs over the ranks.

        It costs one agreement on a digest. The records themselves are sent only where the digests differ.

        Args:
            action: as in `agree`.
            work: as in `agree`.
            same: returns, from the result of `work`, what must be alike; it must survive JSON.
            working_folder: the folder to which a path in the record is relative; the error has it where paths differ.

        Raises:
            RankMismatchError: it has the first difference; the same on all ranks.
            DistEMAError: as `agree` does.
        """
        return self._agreed(action, work, same, lambda _: (), working_folder)[0]

    def agree_and_sum(
        self,
        action: str,
        work: Callable[[], T],
        terms: Callable[[T], Sequence[int]],
        same: Callable[[T], Any] = lambda _: None,
    ) -> tuple[T, list[int]]:
        """Collective: every rank must call it. As `agree_alike`, and adds up integers over the ranks.

        Args:
            action: as in `agree`.
            work: as in `agree`.
            terms: returns this rank's terms, from the result of `work`; as many as on the other ranks.
            same: as in `agree_alike`.

        Returns:
            The result of `work`, and the sums.

        Raises:
            RankMismatchError: as `agree_alike` does.
            DistEMAError: as `agree` does.
        """
        return self._agreed(action, work, same, terms, None)

    def _agreed(
        self,
        action: str,
        work: Callable[[], T],
        same: Callable[[T], Any],
        terms: Callable[[T], Sequence[int]],
        working_folder: str | None,
    ) -> tuple[T, list[int]]:
        result: T | None = None
        failure: Exception | None = None
        record, own = "", list[int]()
        try:
            result = work()
            record, own = json.dumps(same(result)), list(terms(result))
        except Exception as error:
            failure = error
        sums = self._report(action, failure, record, working_folder, own)
        return result, sums  # type: ignore[return-value]

    def raise_together(self, action: str, failure: Exception | None) -> None:
        """Collective: every rank must call it. Raises the same error on all ranks if any brings a failure.

        Raises:
            DistEMAError: as `agree` does.
        """
        self._report(action, failure, "", None)

    def compare(self, record: Mapping[str, Any], working_folder: str | None = None) -> None:
        """Collective: every rank must call it. Refuses a record that differs over the ranks. See `agree_alike`.

        Raises:
            RankMismatchError: it has the first difference; the same on all ranks.
        """
        self._report("comparing the ranks", None, json.dumps(record), working_folder)

    def _report(
        self,
        action: str,
        failure: Exception | None,
        record: str,
        working_folder: str | None,
        terms: Sequence[int] = (),
    ) -> list[int]:
        """Collective: every rank must call it. Raises if any rank failed, or has another record. Returns the sums."""
        report = report_of(self.rank, failure, record, terms)
        if self.world_size > 1:
            report = self.reduce(action, report, merge_reports)
        if report["failed"]:
            error = error_class(report["first"][0][1])(failure_text(action, report, self.world_size))
            # The cause is worth a second traceback only if the message does not have all of it.
            raise agreed(error) from (None if isinstance(failure, DistEMAError) else failure)
        other = report["alike"][2]
        if other is None:
            sums: list[int] = report["sums"]
            return sums
        # Only the first rank that differs sends its record, and only to rank 0, which has the other one.
        own = [record, working_folder] if self.rank == other else None
        theirs = self.reduce(action, own, lambda left, right: right if left is None else left, on_rank_0=True)
        message = difference_text(other, (record, working_folder), theirs) if self.rank == 0 else None
        raise agreed(RankMismatchError(self.broadcast_object(message)))

    def on_rank_0(self, action: str, work: Callable[[], T]) -> T:
        """Collective: every rank must call it. Runs `work` on rank 0 and gives its result, or its error, to all ranks.

        `work` must not communicate, and its result must survive JSON.

        Raises:
            CommunicationError: other ranks are gone.
            DistEMAError: the error of `work`, the same on every rank.
        """
        message: dict[str, Any] = {}
        cause: Exception | None = None
        if self.rank == 0:
            try:
                message = {"result": work()}
                json.dumps(message)
            except Exception as error:
                kind, text = described(error)
                known = isinstance(error, DistEMAError)
                message = {"kind": kind, "text": text if known else f"{action}: rank 0 failed: {text}"}
                cause = None if known else error
        message = self.broadcast_object(message)
        if "kind" in message:
            raise agreed(error_class(message["kind"])(message["text"])) from cause
        return message["result"]  # type: ignore[no-any-return]

    def warn(self, message: str) -> None:
        """Collective: every rank must call it. Warns on rank 0; where warnings are errors, all ranks raise."""

        def tell() -> None:
            if self.rank == 0:
                warnings.warn(message, UserWarning, stacklevel=level_of_caller())

        self.agree("warning", tell)

    def sum_integers(self, values: Sequence[int]) -> list[int]:
        """Collective: every rank must call it. The sums over the ranks, on every rank."""
        return self._combined(values, operator.add)

    def sum_floats(self, values: Sequence[float]) -> list[float]:
        """Collective: every rank must call it. The sums over the ranks in float64, the same on every rank."""
        return self._combined(values, operator.add)

    def _combined(self, values: Sequence[Any], combine: Callable[[Any, Any], Any]) -> list[Any]:
        def merge(left: list[Any], right: list[Any]) -> list[Any]:
            return list(map(combine, left, right))

        combined: list[Any] = self.reduce("adding up over the ranks", list(values), merge) if values else []
        return combined

    def xor_integers(self, values: Sequence[int]) -> list[int]:
        """Collective: every rank must call it. The exclusive-or over the ranks; on rank 0 only, [] elsewhere.

        A rank sends the values that are not 0, with their places.
        """
        own = {str(place): int(value) for place, value in enumerate(values) if value}

        def merge(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
            return left | {place: left.get(place, 0) ^ value for place, value in right.items()}

        combined = self.reduce("combining the checksums", own, merge, on_rank_0=True)
        return [combined.get(str(place), 0) for place in range(len(values))] if self.rank == 0 else []

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
            except RuntimeError as error:
                failures.append(self._lost(action, link, error))
                raise failures[0] from error

        return begin, wait_for_all


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
