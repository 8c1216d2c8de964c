"""Whether ranks that should hold the same weights do.

A plain module in an initialised process group counts as a replica on every rank. So do the ranks along a Replicate
axis. If nothing keeps them alike (no DDP, experts or stages of each rank under equal names), each owner
averages its share of another model: the files are a mosaic, and a swap gives every rank the values of others.

    1 all    a checksum of each tensor that several ranks hold, where it lies; a digest of these is gathered
    2 all    where digests differ, the checksums are gathered: they show the tensors that differ
    3 all    one such tensor after the other: its lowest holder sends it in bounded chunks to those that differ from it

Buffers are not compared: every rank has statistics of its own. The files have those of rank 0.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from dist_ema.boxes.owners import Division
from dist_ema.boxes.plan import Plan
from dist_ema.disk.formats.checksums import checksum
from dist_ema.disk.formats.tensor_checksums import CHUNK_NUMEL, chunks, tensor_checksums
from dist_ema.errors import UnsupportedModelError
from dist_ema.ranks.exchange import Exchange
from dist_ema.ranks.wires import Wires

__all__ = ["DRIFT_ALLOWED", "Replicas"]

# Relative L2 difference from the lowest holder up to which replicas count as drifted apart: reductions that round
# otherwise on each rank come to about 1e-6, two models of their own to about 1.
DRIFT_ALLOWED = 1e-3


T = TypeVar("T")


class _Difference(NamedTuple):
    """A tensor that two ranks hold differently; relative L2 difference in float64, nan if either has a nan there."""

    fqn: str
    lowest: int
    other: int
    relative: float


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
            _key(division): division
            for division in (self._plan if plan is None else plan).divisions
            if len(division.ranks) > 1 and not division.single_owner
        }
        sums = self._exchange.agree(call, lambda: {key: _checksums(division) for key, division in divisions.items()})
        digests = {key: hashlib.sha256(repr(checksums).encode()).hexdigest() for key, checksums in sums.items()}
        differing = _differing(self._exchange.gather_objects(digests))
        if not differing:
            return
        sums_by_rank = self._exchange.gather_objects({key: sums[key] for key in differing if key in sums})
        tables = {
            key: {rank: of_rank[key] for rank, of_rank in enumerate(sums_by_rank) if key in of_rank}
            for key in sorted(differing)
        }
        self._judge(call, _Comparison(self._exchange, call, divisions, tables).run())

    def _judge(self, call: str, differences: Sequence[_Difference]) -> None:
        refused = [row for row in differences if not row.relative <= DRIFT_ALLOWED]
        if refused:
            raise UnsupportedModelError(_refusal(call, [row for row in refused if row.fqn == refused[0].fqn]))
        if differences and self._warned_in != self._exchange.epoch:
            self._warned_in = self._exchange.epoch
            self._exchange.warn(_warning(differences))


def _refusal(call: str, of_tensor: Sequence[_Difference]) -> str:
    first, others = of_tensor[0], ", ".join(str(difference.other) for difference in of_tensor)
    return (
        f"{call}: {first.fqn} is not the same on rank {first.lowest} and rank {others}, which should hold it alike: "
        f"relative L2 difference {first.relative:.3g}, allowed {DRIFT_ALLOWED:g}. An average over these ranks would be "
        "a mosaic of different models. Either each rank has experts of its own, or a stage of a pipeline, under equal "
        "names: this version does not serve that, a later one will. Or nothing keeps the ranks alike: wrap the model "
        "in DistributedDataParallel, or broadcast the initial weights and reduce the gradients yourself"
    )


def _warning(differences: Sequence[_Difference]) -> str:
    worst = max(differences, key=lambda difference: difference.relative)
    num_tensors = len({difference.fqn for difference in differences})
    return (
        f"replicas of {num_tensors} tensors have drifted apart: the worst is {worst.fqn}, relative L2 difference "
        f"{worst.relative:.2g} between rank {worst.lowest} and rank {worst.other}. The average is of each owner's "
        "values. Something other than the gradients moves the weights, or rounds otherwise on each rank: broadcast "
        "them from rank 0 now and then"
    )


class _Comparison:
    """The values of tensors whose checksums differ, compared with those of the lowest rank that holds them.

    Args:
        exchange: the control traffic of all ranks.
        call: the name of the call, for the message.
        divisions: the divisions of this rank, by key.
        tables: key of a division -> rank -> the checksums of its tensors on that rank; the same on every rank.
    """

    def __init__(
        self,
        exchange: Exchange,
        call: str,
        divisions: dict[str, Division],
        tables: dict[str, dict[int, list[int]]],
    ) -> None:
        self._exchange = exchange
        self._call = call
        self._divisions = divisions
        self._rounds: list[list[tuple[str, int, int, list[int]]]] = []
        for key, by_rank in tables.items():
            lowest = min(by_rank)
            others = [
                (index, [rank for rank, sums in by_rank.items() if sums[index] != by_rank[lowest][index]])
                for index in range(len(by_rank[lowest]))
            ]
            for number, (index, ranks) in enumerate((index, ranks) for index, ranks in others if ranks):
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
            own = []
            with self._exchange.wires(self._call) as wires:
                for key, index, lowest, others in tensors:
                    own += self._compare(wires, key, index, lowest, others)
            self._exchange.raise_together(self._call, self._failure)
            of_round = [row for of_rank in self._exchange.gather_objects(own) for row in of_rank]
            differences += [row for row in of_round if row.relative != 0.0]
            if any(not row.relative <= DRIFT_ALLOWED for row in of_round):
                break
        return differences

    def _compare(self, wires: Wires, key: str, index: int, lowest: int, others: Sequence[int]) -> list[_Difference]:
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
        return [_Difference(held.spec.fqn, lowest, rank, _relative(*squares))]

    def _guarded(self, work: Callable[[], T]) -> T | None:
        try:
            return work() if self._failure is None else None
        except Exception as error:
            self._failure = error
            return None


def _key(division: Division) -> str:
    """A key that the ranks of a division compute alike, and that no other division has."""
    ranks = checksum(repr(division.ranks).encode())
    return f"{division.ranks[0]:08d}-{len(division.ranks)}-{ranks:08x}-{division.averaged:d}"


def _checksums(division: Division) -> list[int]:
    return tensor_checksums([held.values() for held in division.held])


def _differing(digests: Sequence[dict[str, str]]) -> set[str]:
    """The keys for which the ranks have different digests."""
    first: dict[str, str] = {}
    for of_rank in digests:
        for key, digest in of_rank.items():
            first.setdefault(key, digest)
    return {key for of_rank in digests for key, digest in of_rank.items() if digest != first[key]}


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
