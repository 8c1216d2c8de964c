"""Launches of the kernel, for tensors that lie on one GPU. No communication.

Where Triton is missing, or cannot compile (it wants a C compiler), an update goes on with torch's own kernels, which
give the same bits and move more bytes. An update that has begun cannot: so each variant of the kernel is compiled and
loaded before the first job that launches it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch

from dist_ema.uninterrupted.jobs import Steps
from dist_ema.uninterrupted.modes import made_for_any_mode
from dist_ema.uninterrupted.threads import insist

__all__ = ["Launch", "can_move", "is_aligned", "is_ready", "launch_for"]

_log = logging.getLogger(__name__)

# Blocks of the kernel that make a chunk (measured on an H100: 1, 4, 8 and 16).
_BLOCKS_OF_A_CHUNK = 4
# Vectors of that many bytes are loaded where all addresses allow it.
_ALIGNED_BYTES = 16
_DEVICE_TYPES = ("cuda",)
_LIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The compiler unrolls the tracks: with all options it takes 5 s for 8 of them, and two minutes for 32.
_MOST_TRACKS = 8

_address = torch.Tensor.data_ptr
_has_warned = False
# What did not compile is not tried again: a compiler may take seconds to fail.
_failed: set[object] = set()
# The tables of captured launches: a graph that is replayed reads them, whatever became of the average.
_captured: list[torch.Tensor] = []


def can_move(live: torch.Tensor, rows: Sequence[torch.Tensor]) -> bool:
    """Whether the kernel is written for these tensors: live values, their averages, and the residuals of these."""
    return (
        live.device.type in _DEVICE_TYPES
        and live.dtype in _LIVE_DTYPES
        and all(_is_plain(row) and row.device == live.device for row in (live, *rows))
        and all(row.dtype in (torch.float32, torch.bfloat16) for row in rows)
        and rows[0].dtype == torch.float32
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor are what lies at its address, one after the other."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_contiguous() and not tensor.is_neg()


def is_aligned(*tensors: torch.Tensor) -> bool:
    """Whether vectors can be loaded from these tensors."""
    return all(tensor.data_ptr() % _ALIGNED_BYTES == 0 for tensor in tensors)


def launch_for(
    live: Sequence[torch.Tensor], rows: Sequence[Sequence[torch.Tensor]], *, flagged: bool, **options: Any
) -> Launch | None:
    """A launch that is ready to go; None where the kernel does not serve.

    Args:
        live: as of `Launch`.
        rows: as of `Launch`.
        flagged: whether the launch is to have a flag.
        options: as of `Launch`.
    """
    made: list[Launch] = []

    def make() -> None:
        from dist_ema.averaging.fused import kernel

        launch = Launch(kernel, live, rows, **options)
        launch.make_ready(flagged=flagged)
        made.append(launch)

    return made[0] if options["num_tracks"] <= _MOST_TRACKS and _succeeds(make, live[0].device) else None


def is_ready(launch: Launch, *, flagged: bool) -> bool:
    """Whether a launch with a flag, or without one, can go; if need be it is made ready."""
    make = partial(launch.make_ready, flagged=flagged)
    return launch.is_ready(flagged=flagged) or _succeeds(make, launch.device)


def _succeeds(make: Callable[[], None], device: torch.device) -> bool:
    """Whether it did not raise, on the current stream of the device. The log has one warning of the first error."""
    global _has_warned
    if _is_capturing():  # a graph would have the copies of the tables, from memory that is soon used otherwise
        return False
    failures: list[Exception] = []
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def attempt() -> None:
        try:
            with torch.cuda.stream(stream):
                make()
        except Exception as error:  # whatever Triton, its compilers and the driver raise
            failures.append(error)

    # A compiler takes seconds, and what a signal handler raises meanwhile must not pass for its error.
    insist(attempt)
    if failures and not _has_warned:
        _has_warned = True
        _log.warning(
            "updates take torch's own kernels, which give the same bits and move more bytes: the kernel of dist_ema, "
            "which Triton compiles, could not be made ready: %r",
            failures[0],
        )
    return not failures


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Launch:
    """Moves the averages of some tensors. It is called with the momenta of an update.

    Attributes:
        device: the device of the tensors.
        counts: whether launches want a counter.

    Args:
        kernel: the module of the kernel.
        live: the live tensors; at least one, none of them empty, all of one dtype, on one device, as `can_move` says.
        rows: for every track its averaged tensors, and then, if averages are compensated, for every track its
            residuals.
        num_tracks: how many averages there are.
        skips: whether live values that are infinite or not a number are left out.
        counts: whether these are counted.
        shared: whether the averaged tensors are those of a module of the user.
    """

    def __init__(
        self,
        kernel: ModuleType,
        live: Sequence[torch.Tensor],
        rows: Sequence[Sequence[torch.Tensor]],
        *,
        num_tracks: int,
        skips: bool,
        counts: bool = False,
        shared: bool = False,
    ) -> None:
        self._kernel = kernel
        self._num_tracks = num_tracks
        self.counts = counts
        self.device = live[0].device
        if self._is_on_gpu and not kernel.IS_COMPILED:
            raise RuntimeError("TRITON_INTERPRET is set, and the interpreter of Triton cannot read the memory of a GPU")
        # The tables have addresses, which keep no memory: the tensors do.
        self._averaged = [value for row in rows for value in row]
        self._movable = [*live, *self._averaged] if shared else list(live)
        self._known = list(map(_address, self._movable))
        # Autograd looks at the version of a tensor that a forward needs; the kernel does not count it.
        self._versioned = [value for value in self._averaged if shared and not value.is_inference()]
        self._ready: set[bool] = set()
        self._is_captured = False
        chunk_numel = kernel.BLOCK * _BLOCKS_OF_A_CHUNK
        self._constants = {
            "LIVE": getattr(kernel.tl, str(live[0].dtype).removeprefix("torch.")),
            "NUM_TRACKS": num_tracks,
            "COMPENSATED": len(rows) > num_tracks,
            "SKIPS": skips,
            "COUNTS": counts,
            "ALIGNED": all(map(is_aligned, live, *rows)),
            "CHUNK": chunk_numel,
            "BLOCK": kernel.BLOCK,
            "num_warps": kernel.NUM_WARPS,
            "enable_fp_fusion": False,
        }
        with made_for_any_mode():
            # Users may set another default device.
            cpu = torch.device("cpu")
            numels = torch.tensor([value.numel() for value in live], device=cpu)
            addresses = [torch.tensor(list(map(_address, row)), device=cpu) for row in (live, *rows)]
            self._rows = self._on_device(torch.stack([addresses[0], numels, *addresses[1:]], dim=1))
            chunks = -(-numels // chunk_numel)
            tensors = torch.repeat_interleave(torch.arange(len(live), device=cpu), chunks)
            before = torch.arange(len(tensors), device=cpu) - (chunks.cumsum(0) - chunks)[tensors]
            self._chunks = self._on_device(torch.stack([tensors, before], dim=1).int())
            self._done = torch.zeros(len(tensors), dtype=torch.int32, device=self.device)
            self._number = torch.zeros((), dtype=torch.int64, device=cpu)

    @property
    def _is_on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _on_device(self, table: torch.Tensor) -> torch.Tensor:
        return table.pin_memory().to(self.device, non_blocking=True) if self._is_on_gpu else table

    def used(self) -> Iterator[torch.Tensor]:
        """The tensors on the device that the kernel reads or writes, beside those that it moves."""
        yield from (self._rows, self._chunks, self._done)

    def is_current(self) -> bool:
        """Whether the tensors have the addresses of the tables: a storage may be freed, and come back elsewhere."""
        return list(map(_address, self._movable)) == self._known

    def is_ready(self, *, flagged: bool) -> bool:
        """Whether the kernel was compiled and loaded for launches with a flag, or for those without one."""
        return flagged in self._ready

    def make_ready(self, *, flagged: bool) -> None:
        """Compile the kernel, and load it on the device, for launches with a flag, or for those without one."""
        variant = (flagged, self.device, *self._constants.values())
        if variant in _failed:
            raise RuntimeError("this variant of the kernel did not compile before")
        try:
            self._run(0, (0.0,) * self._num_tracks, self._done.view(torch.float32)[:1] if flagged else None, None)
        except Exception as error:
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                _failed.add(variant)
            raise
        self._ready.add(flagged)

    def add_to(
        self,
        steps: Steps,
        momenta: tuple[float, ...],
        unless: torch.Tensor | None,
        counter: torch.Tensor | None,
    ) -> None:
        """Add the steps of an update.

        Args:
            steps: further steps are added to these.
            momenta: for every track the weight of the live values; 0 moves nothing.
            unless: a flag of one element; if it is not 0 nothing moves. Only the device reads it.
            counter: an int64 of the device, to which the number of live values that are left out is added; None where
                they are not counted.
        """
        flag = None if unless is None else unless.detach().reshape(1)
        if flag is not None and flag.dtype != torch.float32:  # each dtype would be another variant to compile
            flag = (flag != 0).float()
        flag = None if flag is None else flag.to(self.device)
        steps.once(partial(self._number.add_, 1), self._number)
        steps.again(partial(self, momenta, flag, counter))
        if self._versioned:
            steps.again(partial(torch.autograd.graph.increment_version, self._versioned))

    def __call__(
        self, momenta: tuple[float, ...], flag: torch.Tensor | None = None, counter: torch.Tensor | None = None
    ) -> None:
        """Launch the kernel; a launch that is repeated before the number goes up moves nothing twice."""
        self._run(len(self._done), momenta, flag, counter)

    def _run(
        self, num_chunks: int, momenta: tuple[float, ...], flag: torch.Tensor | None, counter: torch.Tensor | None
    ) -> None:
        move: Any = self._kernel.move
        with torch.cuda.device(self.device if self._is_on_gpu else -1):
            number = int(self._number) % 2**31
            if self._is_on_gpu and torch.cuda.is_current_stream_capturing():
                number = -1  # each replay would find the number of now, and move nothing
                if not self._is_captured:
                    _captured.extend(self.used())
                self._is_captured = True
            move[(max(num_chunks, 1),)](
                self._rows,
                self._chunks,
                self._done,
                num_chunks,
                number,
                self._done if flag is None else flag,
                self._rows if counter is None else counter,
                momenta,
                tuple(1.0 - momentum for momentum in momenta),
                FLAGGED=flag is not None,
                **self._constants,
            )
