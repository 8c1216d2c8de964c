"""Every collective of the package.

[Note: agreement]
A rank that fails before a collective leaves the others waiting for the process group's timeout (30 minutes
by default). So work that can fail is done locally first, inside `Exchange.agree`: the ranks then compare one
integer, and if any of them failed every rank raises the same error, with the reasons of all failed ranks in it.
It costs one all-reduce of 8 bytes; the reasons are sent only after a failure.

If a call ends in any other way (by an interrupt, or a defect), its rank leaves the group of the calls, which ends the
call for the others at once: see [Note: leaving] in groups.py, and calls.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

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
from dist_ema.ranks.arrival import arrival_seconds, present_world, wait_for_all
from dist_ema.ranks.groups import Farewell, Link, this_world
from dist_ema.ranks.wires import WireError, Wires

__all__ = ["Exchange"]

T = TypeVar("T")

# The limit for making a group for a thread; all ranks are in the call already.
_BESIDE_SECONDS = 30.0
# Modules whose exceptions count as failures; an exception of the program's own (of a signal handler, say) goes on.
_COMMON_ERRORS = ("builtins", "torch", "numpy", "json", "struct", "zlib", "pickle", "_pickle")


class Exchange:
    """Control traffic among all ranks of the default process group; trivial when there is none.

    Making one sends nothing to other ranks: it may connect to the store that they share.

    Args:
        link: the link of a thread that communicates beside the calls; None for the link of the calls.

    Attributes:
        world_size: the number of ranks.
        rank: the rank of this process.
        is_beside: whether this is the exchange of a thread.
    """

    def __init__(self, link: Link | None = None) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if distributed else 1
        self.rank = dist.get_rank() if distributed else 0
        self.is_beside = link is not None
        self._link = link
        self._world = this_world()

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which makes calls of its own."""
        return self.__dict__ | {"_link": None, "_world": None}

    def arrive(self, call: str, *, hurried: bool = True) -> None:
        """Collective: every rank must call it. Waits until all ranks have come to the same call.

        Rank 0 logs for which ranks it waits, after `DIST_EMA_NOTICE_SECONDS`.

        Args:
            call: the name of the call that begins.
            hurried: whether the wait ends after `DIST_EMA_ARRIVAL_SECONDS`, if that is set. Else it ends after the
                default group's timeout.

        Raises:
            CommunicationError: some rank did not come in time, or has left the call; the same on all ranks, also on
                those that come later. The next call works.
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
            return
        world = self._world = present_world(call, self.rank, self.world_size)
        world.num_calls += 1
        self._link = world.link
        if isinstance(limits, DistEMAError):
            raise self._left(call, limits)
        notice_seconds, seconds = limits
        wait_for_all(world, call, notice_seconds, seconds if seconds and hurried else world.timeout_seconds)
        self._link = world.link

    def _leave(self, link: Link, kind: str, message: str, *, lives: bool) -> DistEMAError:
        """Leave a link. Returns the error that all ranks raise."""
        num_calls = 0 if self._world is None else self._world.num_calls
        first = link.leave(Farewell(num_calls, kind, message, lives))
        if self._world is not None and link is self._world.link:
            self._world.renew()
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

        Raises:
            CommunicationError: the group of the thread could not be made; other ranks are gone.
        """
        if self.world_size == 1 or self._world is None:
            return self
        action = "preparing to save in the background"
        link = self._world.beside(lambda number: self._combine(action, [number], dist.ReduceOp.MAX)[0])

        def make() -> None:
            try:
                link.make(min(arrival_seconds()[1] or _BESIDE_SECONDS, _BESIDE_SECONDS))
            except RuntimeError as error:
                raise CommunicationError(f"rank {self.rank} lost the other ranks: {_first_line(error)}") from error

        self.agree(action, make)
        return Exchange(link)

    @contextmanager
    def _together(self, action: str) -> Iterator[Link]:
        """The link, where there are several ranks. A broken connection or a timeout leaves it."""
        if not self.is_beside and (self._link is None or not self._link.is_made):
            self.arrive(action)
        link = self._link
        if link is None:
            raise CommunicationError(f"{action}: this copy of an average has no thread to communicate in")
        try:
            if self._world is not None and self._world.group is not dist.group.WORLD:
                raise RuntimeError("the process group was destroyed")
            yield link
        except (RuntimeError, ValueError) as error:
            raise self._lost(link, action, error) from error

    def _lost(self, link: Link, action: str, error: Exception) -> DistEMAError:
        """Leave a link that does not lead to the other ranks any more. Returns the error that all ranks raise."""
        message = (
            f"{action}: rank {self.rank} waited for the other ranks and lost them. Every rank must make the same "
            f"call; perhaps one died, or did something else, or the process group was destroyed before wait() "
            f"({_first_line(error)})"
        )
        return self._leave(link, CommunicationError.__name__, message, lives=False)

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
        result: T | None = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        self.raise_together(action, failure)
        return result  # type: ignore[return-value]

    def on_rank_0(self, action: str, work: Callable[[], T]) -> T:
        """Collective: every rank must call it. Runs `work` on rank 0 and gives its result, or its error, to all ranks.

        `work` must not communicate, and its result must survive a pickle.

        Raises:
            CommunicationError: other ranks are gone.
            DistEMAError: the error of `work`, the same on every rank.
        """
        message: tuple[Any, tuple[str, str] | None] = (None, None)
        cause: Exception | None = None
        if self.rank == 0:
            try:
                message = (work(), None)
            except Exception as error:
                kind, text = described(error)
                known = isinstance(error, DistEMAError)
                message = (None, (kind, text if known else f"{action}: rank 0 failed: {text}"))
                cause = None if known else error
        result, failure = self.broadcast_object(message)
        if failure is not None:
            raise agreed(error_class(failure[0])(failure[1])) from cause
        return result  # type: ignore[no-any-return]

    def warn(self, message: str) -> None:
        """Collective: every rank must call it. Warns on rank 0; where warnings are errors, all ranks raise."""

        def tell() -> None:
            if self.rank == 0:
                warnings.warn(message, UserWarning, stacklevel=level_of_caller())

        self.agree("warning", tell)

    def raise_together(self, action: str, failure: Exception | None) -> None:
        """Collective: every rank must call it. Raises the same error on all ranks if any brings a failure.

        Raises:
            DistEMAError: as `agree` does.
        """
        if self.world_size == 1:
            reports = [] if failure is None else [(0, *described(failure))]
        else:
            if not self._combine(action, [0 if failure is None else 1], dist.ReduceOp.MAX)[0]:
                return
            gathered = self.gather_objects(None if failure is None else described(failure))
            reports = [(rank, *report) for rank, report in enumerate(gathered) if report is not None]
        if not reports:
            return
        kind, message = reports[0][1:]
        if any(other[1:] != (kind, message) for other in reports) or len(reports) < self.world_size:
            reasons = "; ".join(f"rank {rank}: {reason}" for rank, _, reason in reports)
            message = f"{action} failed on {len(reports)} of {self.world_size} ranks: {reasons}"
        # The cause is worth a second traceback only if the message does not have all of it.
        raise agreed(error_class(kind)(message)) from (None if isinstance(failure, DistEMAError) else failure)

    def gather_objects(self, value: Any) -> list[Any]:
        """Collective: every rank must call it. The values of all ranks, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        with self._together("exchanging a message") as link:
            return link.gather(value)

    def broadcast_object(self, value: Any) -> Any:
        """Collective: every rank must call it. The value of rank 0, on every rank."""
        if self.world_size == 1:
            return value
        with self._together("exchanging a message") as link:
            return link.broadcast(value)

    def reduce(self, action: str, value: Any, merge: Callable[[Any, Any], Any]) -> Any:
        """Collective: every rank must call it. Combine a value over the ranks; the result is the same on every rank.

        Args:
            action: a name of the work, for the message.
            value: what this rank brings; it must survive JSON, and so must what `merge` returns.
            merge: combines the value of some ranks with that of the ranks after them; it must be associative.
        """
        if self.world_size == 1:
            return json.loads(json.dumps(value))
        with self._together(action) as link:
            return functools.reduce(merge, link.gather(value))

    def compare(self, record: Mapping[str, Any], working_folder: str | None = None) -> None:
        """Collective: every rank must call it. Refuses a record that differs over the ranks.

        It costs one gather of a digest; the records themselves are sent only where the digests differ.

        Args:
            record: what must be alike; it must survive JSON.
            working_folder: the folder to which a path in `record` is relative; the error has it where paths differ.

        Raises:
            RankMismatchError: it has the first difference; the same on all ranks.
        """
        text = json.dumps(record)
        digests = self.gather_objects(hashlib.sha256(text.encode()).hexdigest())
        if len(set(digests)) == 1:
            return
        texts = self.gather_objects((text, working_folder))
        raise agreed(RankMismatchError(difference_text(digests, texts)))

    def sum_integers(self, values: Sequence[int]) -> list[int]:
        """Collective: every rank must call it. The sums over the ranks, on every rank."""
        return self._combine("adding up over the ranks", values, dist.ReduceOp.SUM)

    def sum_floats(self, values: Sequence[float]) -> list[float]:
        """Collective: every rank must call it. The sums over the ranks in float64, the same on every rank."""
        return self._combine("adding up over the ranks", values, dist.ReduceOp.SUM, torch.float64)

    def xor_integers(self, values: Sequence[int]) -> list[int]:
        """Collective: every rank must call it. The exclusive-or over the ranks, on every rank."""
        return self._combine("combining the checksums", values, dist.ReduceOp.BXOR)

    def _combine(
        self,
        action: str,
        values: Sequence[Any],
        operation: dist.ReduceOp.RedOpType,
        dtype: torch.dtype = torch.int64,
    ) -> list[Any]:
        combined = torch.tensor(values, dtype=dtype, device="cpu")
        if self.world_size > 1 and len(values):
            with self._together(action) as link:
                link.reduce(combined, operation)
        numbers: list[Any] = combined.tolist()
        return numbers

    def meeting(self, action: str) -> tuple[Callable[[], None], Callable[[], None]]:
        """Collective: every rank must do both steps. No rank passes the second before all have done the first.

        It comes before work that must not begin on some ranks only: a rank that ends the call before its first step
        ends it for all.

        Returns:
            Two steps that may be cut off and done again (see `dist_ema.uninterrupted`): the beginning and the wait.
        """
        if self.world_size == 1:
            return (lambda: None), (lambda: None)
        with self._together(action) as link:
            passing = link.meeting()
        failures: list[DistEMAError] = []

        def wait() -> None:
            if failures:
                raise failures[0]
            try:
                with self._together(action):
                    passing.wait()
            except DistEMAError as error:
                failures.append(error)
                raise

        return passing.begin, wait

    @contextmanager
    def wires(self, action: str) -> Iterator[Wires]:
        """Collective: every rank must enter it, in the same order; the ranks then send to each other what they like.

        Entering and leaving send nothing. All connections are closed at the end.

        Args:
            action: a name of the work, for the message.

        Raises:
            CommunicationError: a message did not get through; the same on all ranks.
        """
        with self._together(action) as link:
            board = link.board()
        wires = Wires(self.rank, board)
        try:
            yield wires
        except WireError as error:
            raise self._lost(link, action, error) from error
        finally:
            wires.close()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
