"""Whether ranks that should hold the same weights do.

A plain module in an initialised process group counts as a replica on every rank. So do the ranks along a Replicate
axis. If nothing keeps them alike (no DDP, experts or stages of each rank under equal names), each owner
averages its share of another model: the files are a mosaic, and a swap gives every rank the values of others.

    1 all    a checksum of each tensor that several ranks hold, where it lies; one sum of digests shows a difference
    2 all    after a difference: which tensors differ, and on which ranks (differing.py)
    3 all    one such tensor after the other: its lowest holder sends it in bounded chunks to those that differ from it

Buffers are not compared: every rank has statistics of its own. The files have those of rank 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from dist_ema.boxes.owners import Division
from dist_ema.boxes.plan import Plan
from dist_ema.boxes.rank_runs import RankRuns
from dist_ema.disk.formats.tensor_checksums import CHUNK_NUMEL, chunks, tensor_checksums
from dist_ema.errors import UnsupportedModelError
from dist_ema.live.holders.differing import Table, differing_tensors, key_of
from dist_ema.messages import MOST_NAMED
from dist_ema.ranks.exchange import Exchange
from dist_ema.ranks.wires.wires import Wires

__all__ = ["DRIFT_ALLOWED", "Replicas"]

# Relative L2 difference from the lowest holder up to which replicas count as drifted apart: reductions that round
# otherwise on each rank come to about 1e-6, two models of their own to about 1.
DRIFT_ALLOWED = 1e-3

T = TypeVar("T")


class _Difference(NamedTuple):
    """A tensor that ranks hold otherwise than the lowest of them, as JSON.

    A relative L2 difference is in float64, and nan if either rank has a nan there.

    Attributes:
        fqn: the name of the tensor.
        lowest: the lowest rank that holds it.
        refused: the first ranks that differ by more than is allowed, with their relative differences.
        num_refused: how many ranks do.
        worst: the rank that differs most of those that have drifted, with its relative difference; else empty.
    """

    fqn: str
    lowest: int
    refused: list[tuple[int, float]]
    num_refused: int
    worst: list[tuple[int, float]]


class Replicas:
    """The tensors of a plan that several ranks hold alike, compared over these ranks by content.

    Args:
        exchange: the control traffic of all ranks.
        plan: the model as boxes.
    """

    def __init__(self, exchange: Exchange, plan: Plan) -> None:
        self._exchange = exchange
        self._plan = plan
        self._compared_in: int | None = None  # an epoch of the exchange
        self._warned_in: int | None = None  # likewise

    def check_once(self, call: str, num_updates: int) -> None:
        """Collective: every rank must call it. As `check`, but only in the first call that uses this method.

        A call before training has moved the weights does not count: experts of several ranks may start alike.

        Args:
            call: as for `check`.
            num_updates: the number of updates so far, on this rank.
        """
        if self._compared_in == self._exchange.epoch:
            return
        self.check(call)
        (num_trained,) = self._exchange.sum_integers([num_updates > 1])
        if num_trained == self._exchange.world_size:
            self._compared_in = self._exchange.epoch

    def check(self, call: str, plan: Plan | None = None) -> None:
        """Collective: every rank must call it. Refuses replicas that are none, and warns once of drifted ones.

        Args:
            call: the name of the call, for the message.
            plan: the part of the plan that is compared; None for the whole plan.

        Raises:
            UnsupportedModelError: a tensor that several ranks should hold alike differs by more than `DRIFT_ALLOWED`;
                the same on all ranks.
        """
        if self._exchange.world_size == 1:
            return
        divisions = {
            key_of(division): division
            for division in (self._plan if plan is None else plan).divisions
            if len(division.ranks) > 1 and not division.single_owner
        }
        sums = self._exchange.agree(call, lambda: {key: _checksums(division) for key, division in divisions.items()})
        differences: list[_Difference] = []
        for table in differing_tensors(self._exchange, call, divisions, sums):
            differences += _Comparison(self._exchange, call, divisions, table).run()
            for difference in differences:
                if difference.num_refused:  # the same on every rank
                    raise UnsupportedModelError(_refusal(call, difference))
        if differences and self._warned_in != self._exchange.epoch:
            self._warned_in = self._exchange.epoch
            self._exchange.warn(_warning(differences))


def _refusal(call: str, difference: _Difference) -> str:
    others = ", ".join(str(rank) for rank, _ in difference.refused)
    if difference.num_refused > len(difference.refused):
        others += f" and {difference.num_refused - len(difference.refused)} further ranks"
    return (
        f"{call}: {difference.fqn} is not the same on rank {difference.lowest} and rank {others}, which should hold it "
        f"alike: relative L2 difference {difference.refused[0][1]:.3g}, allowed {DRIFT_ALLOWED:g}. An average over "
        "these ranks would be a mosaic of different models. Either each rank has experts of its own under equal names: "
        "declare them by experts=[Experts(names, dim, group)], the group being all ranks of different experts. Or each "
        "has a stage of a pipeline: give its tensors their names in the whole model, and all-reduce the gradients of "
        "an embedding that stages share. Or nothing keeps the ranks alike: wrap the model in "
        "DistributedDataParallel, or broadcast the initial weights and reduce the gradients yourself"
    )


def _warning(differences: Sequence[_Difference]) -> str:
    worst = max(differences, key=lambda difference: difference.worst[0][1])
    ((other, relative),) = worst.worst
    num_tensors = len({difference.fqn for difference in differences})
    return (
        f"replicas of {num_tensors} tensors have drifted apart: the worst is {worst.fqn}, relative L2 difference "
        f"{relative:.2g} between rank {worst.lowest} and rank {other}. The average is of each owner's "
        "values. Something other than the gradients moves the weights, or rounds otherwise on each rank: broadcast "
        "them from rank 0 now and then"
    )


class _Comparison:
    """The values of tensors whose checksums differ, compared with those of the lowest rank that holds them.

    Args:
        exchange: the control traffic of all ranks.
        call: the name of the call, for the message.
        divisions: the divisions of this rank, by key.
        table: the tensors that differ; the same on every rank.
    """

    def __init__(
        self,
        exchange: Exchange,
        call: str,
        divisions: dict[str, Division],
        table: Table,
    ) -> None:
        self._exchange = exchange
        self._call = call
        self._divisions = divisions
        self._rounds: list[list[tuple[str, int, int, RankRuns]]] = []
        for key, (lowest, others) in table.items():
            for number, (index, ranks) in enumerate(others.items()):
                if number == len(self._rounds):
                    self._rounds.append([])
                self._rounds[number].append((key, index, lowest, ranks))
        self._failure: Exception | None = None
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")

    def run(self) -> list[_Difference]:
        """Collective. The differences, up to the first tensor that differs by more than is allowed."""
        differences: list[_Difference] = []
        widest_bytes = max(
            (held.spec.dtype.itemsize for division in self._divisions.values() for held in division.held), default=0
        )
        self._buffer = self._exchange.agree(
            self._call, lambda: torch.empty(CHUNK_NUMEL * widest_bytes, dtype=torch.uint8, device="cpu")
        )
        for tensors in self._rounds:  # one tensor of a division in a round: several divisions are compared side by side
            own = {}
            with self._exchange.wires(self._call) as wires:
                for key, index, lowest, others in tensors:
                    for difference in self._compare(wires, key, index, lowest, others):
                        own[key] = difference
            self._exchange.raise_together(self._call, self._failure)
            of_round = self._exchange.reduce(self._call, own, _with_further_ranks)
            differences += [_Difference(*of_key) for of_key in of_round.values()]
            if any(difference.num_refused for difference in differences):
                break
        return differences

    def _compare(self, wires: Wires, key: str, index: int, lowest: int, others: RankRuns) -> list[_Difference]:
        """Send or receive one tensor in chunks; a failure is kept, as the other ranks wait for this rank's messages."""
        rank = self._exchange.rank
        if rank != lowest and rank not in others:
            return []
        held = self._divisions[key].held[index]
        dtype = held.spec.dtype
        values = self._guarded(held.values)
        own_chunks = iter(()) if values is None else chunks(values)
        squares = [0.0, 0.0]
        for size in _sizes(held.box.sizes):
            message = self._buffer[: size * dtype.itemsize]
            chunk = self._guarded(lambda: _host_bytes(next(own_chunks), dtype))
            if rank == lowest:
                sent = message if chunk is None else chunk
                for other in others:
                    wires.send(sent, other)
                continue
            wires.receive(message, lowest)
            if chunk is not None:
                self._guarded(functools.partial(_add_squares, squares, message, chunk, dtype))
        if rank == lowest:
            return []
        relative = _relative(*squares)
        if relative == 0.0:
            return []
        if relative <= DRIFT_ALLOWED:
            return [_Difference(held.spec.fqn, lowest, [], 0, [(rank, relative)])]
        return [_Difference(held.spec.fqn, lowest, [(rank, relative)], 1, [])]

    def _guarded(self, work: Callable[[], T]) -> T | None:
        try:
            return work() if self._failure is None else None
        except Exception as error:
            self._failure = error
            return None


def _with_further_ranks(lower: dict[str, Any], higher: dict[str, Any]) -> dict[str, Any]:
    """Key of a division -> its difference, as JSON; associative."""
    merged = dict(lower)
    for key, of_key in higher.items():
        first, second = (_Difference(*of_some) for of_some in (lower.get(key, of_key), of_key))
        if key in lower:
            merged[key] = _Difference(
                first.fqn,
                first.lowest,
                [*first.refused, *second.refused][:MOST_NAMED],
                first.num_refused + second.num_refused,
                sorted([*first.worst, *second.worst], key=lambda of_rank: -of_rank[1])[:1],
            )
        else:
            merged[key] = of_key
    return merged


def _checksums(division: Division) -> list[int]:
    return tensor_checksums([held.values() for held in division.held])


def _sizes(shape: Sequence[int]) -> list[int]:
    """Elements of the chunks into which `chunks` cuts a tensor of this shape."""
    numel = math.prod(shape)
    if numel <= CHUNK_NUMEL or not shape:
        return [numel]
    row_numel = numel // shape[0]
    if row_numel > CHUNK_NUMEL:
        return _sizes(shape[1:]) * shape[0]
    rows = CHUNK_NUMEL // row_numel
    return [min(rows, shape[0] - at) * row_numel for at in range(0, shape[0], rows)]


def _host_bytes(chunk: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of a chunk on the host, in the dtype that all ranks planned for its tensor."""
    flat = chunk.detach().to(device="cpu", dtype=dtype).contiguous()
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    return flat.view(torch.uint8)


def _add_squares(squares: list[float], lowest_bytes: torch.Tensor, own_bytes: torch.Tensor, dtype: torch.dtype) -> None:
    """Add to two sums of squares: that of the difference, and that of the lowest holder's values.

    Equal bits count as equal, also those of infinities and NaNs. The norm is that of the finite values.
    """
    lowest, own = (_numbers(content, dtype) for content in (lowest_bytes, own_bytes))
    same = (lowest_bytes.view(-1, dtype.itemsize) == own_bytes.view(-1, dtype.itemsize)).all(dim=1)
    same = same.repeat_interleave(lowest.numel() // max(same.numel(), 1))  # a complex value is two numbers
    squares[0] += (own - lowest).masked_fill_(same, 0.0).square_().sum().item()
    squares[1] += lowest.masked_fill_(~lowest.isfinite(), 0.0).square_().sum().item()


def _numbers(content: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    values = content.view(dtype)
    return (torch.view_as_real(values).reshape(-1) if dtype.is_complex else values).to(torch.float64)


def _relative(difference: float, norm: float) -> float:
    if difference == 0.0:
        return 0.0
    return math.sqrt(difference) / math.sqrt(norm) if norm else (difference if math.isnan(difference) else math.inf)
