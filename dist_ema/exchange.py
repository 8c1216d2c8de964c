"""Every collective of the package.

[Note: agreement]
A rank that fails before a collective leaves the others waiting for the process group's timeout (30 minutes
by default). So work that can fail is done locally first, inside `Exchange.agree`: the ranks then compare one
integer, and if any of them failed every rank raises the same error, with each failed rank's reason in it.
It costs one all-reduce of 8 bytes; the reasons travel only after a failure.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_ema import groups
from dist_ema.errors import CheckpointError, CommunicationError, DistEMAError, RankMismatchError, error_class

__all__ = ["Exchange", "broadcast_from"]

T = TypeVar("T")


class Exchange:
    """Control traffic among all ranks of the default process group; trivial when there is none.

    Construction is collective: every rank must make it.

    Args:
        separate: use the group of background work, so that a thread may communicate beside the calls of the main
            one. All ranks must be here already (`arrive`).

    Raises:
        CommunicationError: the group of its own could not be made; other ranks are gone.
    """

    def __init__(self, *, separate: bool = False) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if distributed else 1
        self.rank = dist.get_rank() if distributed else 0
        made = groups.control_groups() if distributed else None
        self._arrival = None if made is None else made.arrival
        self._group = None if made is None else made.control
        if separate and made is not None:
            with self._together("preparing to save in the background"):
                self._group = made.background()

    def arrive(self, call: str) -> None:
        """Collective: every rank must call it. Waits until all ranks have come to the same place.

        A call that only some ranks make ends here, after `ARRIVAL_SECONDS`, instead of in the long timeout of a stage.

        Raises:
            CommunicationError: some rank did not come in time; these ranks cannot communicate through us any more.
        """
        if self._arrival is None:
            return
        begin = time.monotonic()
        try:
            timeout = datetime.timedelta(seconds=groups.ARRIVAL_SECONDS)
            dist.monitored_barrier(group=self._arrival, timeout=timeout, wait_all_ranks=True)
        except RuntimeError as error:
            waited_seconds = time.monotonic() - begin
            raise CommunicationError(
                f"{call}: rank {self.rank} waited {waited_seconds:.0f} s, and not all {self.world_size} ranks "
                "came; perhaps one died, or did something else. Every rank must make the same call, at the same place "
                "of the program: do not put it under `if is_main_process`. If ranks may be further apart in time, set "
                "DIST_EMA_ARRIVAL_SECONDS in the environment of all of them"
            ) from error

    @contextmanager
    def _together(self, action: str) -> Iterator[None]:
        """Tell what a broken connection or a timeout of the control group means here."""
        try:
            yield
        except (RuntimeError, ValueError) as error:  # ValueError: the process group was destroyed
            raise CommunicationError(
                f"{action}: rank {self.rank} waited for the other ranks and lost them. Every rank must make the same "
                f"call; perhaps one died, or did something else, or the process group was destroyed before wait() "
                f"({str(error).splitlines()[0]})"
            ) from error

    def agree(self, action: str, work: Callable[[], T]) -> T:
        """Collective: every rank must call it. Runs `work` locally and raises on all ranks if any failed.

        Args:
            action: what is being done, for the message.
            work: must not communicate. See [Note: agreement].

        Raises:
            CommunicationError: other ranks are gone, or did not call in time.
            DistEMAError: the class the first failed rank raised, the same on every rank. An OSError becomes
                `CheckpointError`, anything else the root class.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        self.settle(action, failure)
        return result  # type: ignore[return-value]

    def on_rank_0(self, action: str, work: Callable[[], T]) -> T:
        """Collective: every rank must call it. Runs `work` on rank 0 and gives its result, or its error, to all ranks.

        For what one rank decides for all; `work` must not communicate, and its result must survive a pickle.

        Raises:
            CommunicationError: other ranks are gone.
            DistEMAError: what `work` raised, the same on every rank.
        """
        told: tuple[Any, tuple[str, str] | None] = (None, None)
        cause: Exception | None = None
        if self.rank == 0:
            try:
                told = (work(), None)
            except Exception as error:
                kind, message = _describe(error)
                known = isinstance(error, DistEMAError)
                told = (None, (kind, message if known else f"{action}: rank 0 failed: {message}"))
                cause = None if known else error
        result, failure = self.broadcast_object(told)
        if failure is not None:
            raise error_class(failure[0])(failure[1]) from cause
        return result  # type: ignore[no-any-return]

    def warn(self, message: str) -> None:
        """Collective: every rank must call it. Warns on rank 0; where warnings are errors, all ranks raise."""

        def tell() -> None:
            if self.rank == 0:
                warnings.warn(message, UserWarning, stacklevel=_level_of_caller())

        self.agree("warning", tell)

    def settle(self, action: str, failure: Exception | None) -> None:
        """Collective: every rank must call it. Raises the same error on all ranks if any brings a failure.

        Raises:
            DistEMAError: as `agree` does.
        """
        if self._group is None:
            reports = [] if failure is None else [(0, *_describe(failure))]
        else:
            flag = torch.tensor([0 if failure is None else 1], device="cpu")
            with self._together(action):
                dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
            if not flag.item():
                return
            gathered = self.gather_objects(None if failure is None else _describe(failure))
            reports = [(rank, *report) for rank, report in enumerate(gathered) if report is not None]
        if not reports:
            return
        kind, message = reports[0][1:]
        if any(other[1:] != (kind, message) for other in reports) or len(reports) < self.world_size:
            told = "; ".join(f"rank {rank}: {reason}" for rank, _, reason in reports)
            message = f"{action} failed on {len(reports)} of {self.world_size} ranks: {told}"
        # The cause is worth a second traceback only if the message does not tell it all.
        raise error_class(kind)(message) from (None if isinstance(failure, DistEMAError) else failure)

    def gather_objects(self, value: Any) -> list[Any]:
        """Collective: every rank must call it. The values of all ranks, in rank order, on every rank."""
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        with self._together("exchanging a message"):
            dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def broadcast_object(self, value: Any) -> Any:
        """Collective: every rank must call it. The value of rank 0, on every rank."""
        if self._group is None:
            return value
        box = [value]
        with self._together("exchanging a message"):
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def compare(self, told: Mapping[str, Any]) -> None:
        """Collective: every rank must call it. Refuses if `told`, which must survive JSON, differs over the ranks.

        Costs one gather of a digest; the texts themselves travel only where the digests differ.

        Raises:
            RankMismatchError: names the first difference; the same on all ranks.
        """
        text = json.dumps(told)
        digests = self.gather_objects(hashlib.sha256(text.encode()).hexdigest())
        if len(set(digests)) == 1:
            return
        texts = self.gather_objects(text)
        other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        difference = _first_difference(json.loads(texts[0]), json.loads(texts[other]))
        raise RankMismatchError(
            f"rank 0 and rank {other} differ in {difference}. Build the same model, give the same schedule and "
            "options, and call the same methods on every rank"
        )

    def sum_integers(self, values: Sequence[int]) -> list[int]:
        """Collective: every rank must call it. The sums over the ranks, on every rank."""
        return [int(value) for value in self._sum(torch.tensor(values, dtype=torch.int64, device="cpu"))]

    def sum_floats(self, values: Sequence[float]) -> list[float]:
        """Collective: every rank must call it. The sums over the ranks in float64, the same on every rank."""
        return [float(value) for value in self._sum(torch.tensor(values, dtype=torch.float64, device="cpu"))]

    def _sum(self, values: torch.Tensor) -> list[Any]:
        if self._group is not None:
            with self._together("adding up over the ranks"):
                dist.all_reduce(values, group=self._group)
        summed: list[Any] = values.tolist()
        return summed

    def xor_integers(self, values: Sequence[int]) -> list[int]:
        """Collective: every rank must call it. The exclusive-or over the ranks, on every rank."""
        combined = torch.tensor(values, dtype=torch.int64, device="cpu")
        if self._group is not None and values:
            with self._together("combining the checksums"):
                dist.all_reduce(combined, op=dist.ReduceOp.BXOR, group=self._group)
        return [int(value) for value in combined.tolist()]

    def transpose_integers(self, rows: torch.Tensor) -> torch.Tensor:
        """Collective: every rank must call it. Row r goes to rank r; row r of the answer came from rank r."""
        if self._group is None:
            return rows
        received = torch.empty_like(rows)
        with self._together("planning an exchange"):
            dist.all_to_all_single(received, rows, group=self._group)
        return received

    def send_bytes(self, values: torch.Tensor, target: int) -> None:
        """Point to point: `target` must call `receive_bytes`. Sends a CPU uint8 tensor."""
        with self._together("sending tensors"):
            dist.send(values, dst=target, group=self._group)

    def receive_bytes(self, values: torch.Tensor, source: int) -> None:
        """Point to point: `source` must call `send_bytes`. Fills a CPU uint8 tensor of the sent size."""
        with self._together("receiving tensors"):
            dist.recv(values, src=source, group=self._group)

    def pass_on(self, sent: torch.Tensor | None, target: int, received: torch.Tensor | None, source: int) -> None:
        """Point to point, both ways at once: `target` must receive what is `sent`, `source` send what is `received`.

        CPU uint8 tensors; None where there is nothing to send or to receive.
        """
        with self._together("exchanging tensors"):
            work = [] if sent is None else [dist.isend(sent, dst=target, group=self._group)]
            if received is not None:
                dist.recv(received, src=source, group=self._group)
            for each in work:
                if each is not None:
                    each.wait()


def broadcast_from(
    owner: int, values: torch.Tensor, ranks: Sequence[int], groups: Sequence[dist.ProcessGroup | None]
) -> None:
    """Collective: each of `ranks` must call it. Sends the values of `owner` to all of them.

    With several groups (several Replicate axes of a mesh) the values travel along one axis after the other: first
    within the owner's own line of the first axis, then from every rank of that line along the second, and so on.

    Args:
        owner: global rank whose values are sent.
        values: contiguous tensor, read on the owner and overwritten elsewhere.
        ranks: global ranks of all holders, laid out row-major over the axes of `groups`.
        groups: this rank's process group along each axis; None is the default group.
    """
    grid = torch.tensor(ranks, device="cpu").view([dist.get_world_size(group) for group in groups])
    mine, owners = (_place_in(grid, rank) for rank in (dist.get_rank(), owner))
    for axis, group in enumerate(groups):
        # Lines in which nobody has the values yet sit this axis out; a later axis reaches them.
        if mine[axis + 1 :] == owners[axis + 1 :]:
            carrier = (*mine[:axis], owners[axis], *mine[axis + 1 :])
            _broadcast(values, int(grid[carrier]), group)


def _level_of_caller() -> int:
    """The stack level, seen from the caller of this function, of the code that called this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("dist_ema."):
        level, frame = level + 1, frame.f_back
    return level


def _place_in(grid: torch.Tensor, rank: int) -> tuple[int, ...]:
    return tuple((grid == rank).nonzero()[0].tolist())


def _broadcast(values: torch.Tensor, sender: int, group: dist.ProcessGroup | None) -> None:
    if values.device.type == "cpu" and dist.get_backend(group) == "nccl":
        # Parameters offloaded to the host, replicas reachable by NCCL only.
        on_device = values.cuda()
        dist.broadcast(on_device, src=sender, group=group)
        values.copy_(on_device)
    else:
        dist.broadcast(values, src=sender, group=group)


def _describe(failure: Exception) -> tuple[str, str]:
    if isinstance(failure, DistEMAError):
        return type(failure).__name__, str(failure)
    if isinstance(failure, OSError):
        return (
            CheckpointError.__name__,
            f"{type(failure).__name__}: {failure}. Check the path, its permissions and the space",
        )
    return DistEMAError.__name__, f"{type(failure).__name__}: {failure}"


def _first_difference(ours: Any, theirs: Any, place: str = "") -> str:
    """Where two JSON values first differ, and how."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            if key not in ours or key not in theirs:
                return f"{place}{key} (only on one of them)"
            if ours[key] != theirs[key]:
                return _first_difference(ours[key], theirs[key], f"{place}{key}: ")
        return f"{place}the order of {len(ours)} entries"
    return f"{place}{ours!r} against {theirs!r}"
