"""Every collective of the package, but the broadcasts of values in training's own groups.

[Note: agreement]
A rank that fails before a collective leaves the others waiting for the process group's timeout (30 minutes
by default). So work that can fail is done locally first, inside `Exchange.agree`: the ranks then agree on whether any
of them failed, and if so every rank raises the same error, with the reasons of the first failed ranks in it.

What travels is JSON, and short: a digest instead of a record, a count and the first few ranks instead of a list of all.
"""

from __future__ import annotations

import json
import operator
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from dist_ema.errors import DistEMAError, RankMismatchError, agreed, described, error_class
from dist_ema.messages import difference_text, level_of_caller
from dist_ema.ranks.channel import Channel
from dist_ema.ranks.reports import failure_text, merge_reports, report_of
from dist_ema.ranks.store.link import Merge
from dist_ema.ranks.wires.wires import Wires

__all__ = ["Exchange"]

T = TypeVar("T")


class Exchange:
    """Control traffic among all ranks of the default process group; trivial when there is none.

    Making one sends nothing to other ranks: it may connect to the store that they share.

    Args:
        channel: the channel of a thread that communicates beside the calls; None for that of the calls.

    Attributes:
        channel: the way into calls and out of them.
        world_size: the number of ranks.
        rank: the rank of this process.
    """

    def __init__(self, channel: Channel | None = None) -> None:
        self.channel = Channel() if channel is None else channel
        self.world_size, self.rank = self.channel.world_size, self.channel.rank

    def arrive(self, call: str, *, hurried: bool = True) -> None:
        """Collective: every rank must call it. See `Channel.arrive`."""
        self.channel.arrive(call, hurried=hurried)

    @property
    def epoch(self) -> int:
        """See `Channel.epoch`. No communication."""
        return self.channel.epoch

    def beside(self) -> Exchange:
        """Collective: every rank must call it, within a call. See `Channel.beside`."""
        return Exchange(self.channel.beside())

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
        return self.channel.agreement(
            action, lambda link, store: link.combine(store, value, merge, on_rank_0=on_rank_0)
        )

    def broadcast_object(self, value: Any) -> Any:
        """Collective: every rank must call it. The value of rank 0, which must survive JSON, on every rank."""
        if self.world_size == 1:
            return json.loads(json.dumps(value))
        return self.channel.agreement("exchanging a message", lambda link, store: link.broadcast(store, value))

    def wires(self, action: str) -> AbstractContextManager[Wires]:
        """Collective: every rank must enter it. Messages from rank to rank; see `Channel.wires`."""
        return self.channel.wires(action)

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
        raise agreed(RankMismatchError(self.on_rank_0(action, lambda: message)))

    def on_rank_0(self, action: str, work: Callable[[], T]) -> T:
        """Collective: every rank must call it. Runs `work` on rank 0 and gives its result, or its error, to all ranks.

        `work` must not communicate, and its result must survive JSON. Rank 0 waits for the others: this may be the end
        of the last call of a run, and where rank 0 keeps the store, it must not end before they have come.

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
        message = self.reduce(action, message, lambda first, _: first)
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
        return self._sums(values)

    def sum_floats(self, values: Sequence[float]) -> list[float]:
        """Collective: every rank must call it. The sums over the ranks in float64, the same on every rank."""
        return self._sums(values)

    def _sums(self, values: Sequence[Any]) -> list[Any]:
        def merge(left: list[Any], right: list[Any]) -> list[Any]:
            return list(map(operator.add, left, right))

        sums: list[Any] = self.reduce("adding up over the ranks", list(values), merge) if values else []
        return sums

    def xor_on_rank_0(self, values: Sequence[int]) -> list[int] | None:
        """Collective: every rank must call it. The exclusive-or over the ranks, on rank 0; None elsewhere.

        A rank sends the values that are not 0, with their places.
        """
        own = {str(place): int(value) for place, value in enumerate(values) if value}

        def merge(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
            return left | {place: left.get(place, 0) ^ value for place, value in right.items()}

        combined = self.reduce("combining the checksums", own, merge, on_rank_0=True)
        return [combined.get(str(place), 0) for place in range(len(values))] if self.rank == 0 else None
