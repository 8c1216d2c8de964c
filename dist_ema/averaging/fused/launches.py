"""Launches of the kernel, for tensors that lie on one GPU. No communication.

Where Triton is missing, or cannot compile (it wants a C compiler), an update goes on with torch's own kernels, which
give the same bits and move more bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch

from dist_ema.uninterrupted import Steps

__all__ = ["Launch", "can_move", "is_aligned", "launch_for"]

_log = logging.getLogger(__name__)

# Blocks of the kernel that make a chunk (measured on an H100: 1, 4, 8 and 16).
_BLOCKS_OF_A_CHUNK = 4
# Vectors of that many bytes are loaded where all addresses allow it.
_ALIGNED_BYTES = 16
_LIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_has_warned = False


def can_move(live: torch.Tensor, rows: Sequence[torch.Tensor]) -> bool:
    """Whether the kernel is written for these tensors: live values, their averages, and the residuals of these."""
    return (
        live.device.type == "cuda"
        and live.dtype in _LIVE_DTYPES
        and all(row.device == live.device and row.is_contiguous() for row in (live, *rows))
        and all(row.dtype in (torch.float32, torch.bfloat16) for row in rows)
        and rows[0].dtype == torch.float32
    )


def is_aligned(*tensors: torch.Tensor) -> bool:
    """Whether vectors can be loaded from these tensors."""
    return all(tensor.data_ptr() % _ALIGNED_BYTES == 0 for tensor in tensors)


def launch_for(
    live: Sequence[torch.Tensor], rows: Sequence[Sequence[torch.Tensor]], *, num_tracks: int, skips: bool
) -> Launch | None:
    """A launch that is ready to go; None where the kernel does not serve. Arguments as those of `Launch`."""
    global _has_warned
    try:
        from dist_ema.averaging.fused import kernel

        launch = Launch(kernel, live, rows, num_tracks=num_tracks, skips=skips)
        launch.make_ready()
        return launch
    except Exception as error:  # whatever Triton, its compilers and the driver raise
        if not _has_warned:
            _log.warning("updates take torch's own kernels, which move more bytes: Triton says %r", error)
        _has_warned = True
        return None


class Launch:
    """Moves the averages of some tensors. It is called with the momenta of an update.

    Attributes:
        device: the device of the tensors.

    Args:
        kernel: the module of the kernel.
        live: the live tensors; at least one, none of them empty, all of one dtype, on one device, as `can_move` says.
        rows: for every track its averaged tensors, and then, if averages are compensated, for every track its
            residuals.
        num_tracks: how many averages there are.
        skips: whether live values that are infinite or not a number are left out.
    """

    def __init__(
        self,
        kernel: ModuleType,
        live: Sequence[torch.Tensor],
        rows: Sequence[Sequence[torch.Tensor]],
        *,
        num_tracks: int,
        skips: bool,
    ) -> None:
        self._kernel = kernel
        self._num_tracks = num_tracks
        self._skips = skips
        self.device = live[0].device
        chunk_numel = kernel.BLOCK * _BLOCKS_OF_A_CHUNK
        self._constants = {
            "LIVE": getattr(kernel.tl, str(live[0].dtype).removeprefix("torch.")),
            "NUM_TRACKS": num_tracks,
            "COMPENSATED": len(rows) > num_tracks,
            "SKIPS": skips,
            "ALIGNED": all(map(is_aligned, live, *rows)),
            "CHUNK": chunk_numel,
            "BLOCK": kernel.BLOCK,
            "num_warps": kernel.NUM_WARPS,
            "enable_fp_fusion": False,
        }
        with torch.inference_mode(False):
            numels = torch.tensor([value.numel() for value in live])
            addresses = [torch.tensor([value.data_ptr() for value in row]) for row in (live, *rows)]
            self._rows = self._on_device(torch.stack([addresses[0], numels, *addresses[1:]], dim=1))
            chunks = -(-numels // chunk_numel)
            tensors = torch.repeat_interleave(torch.arange(len(live)), chunks)
            before = torch.arange(len(tensors)) - (chunks.cumsum(0) - chunks)[tensors]
            self._chunks = self._on_device(torch.stack([tensors, before], dim=1).int())
            self._done = torch.zeros(len(tensors), dtype=torch.int32, device=self.device)
            self._number = torch.zeros((), dtype=torch.int64, device="cpu")

    def _on_device(self, table: torch.Tensor) -> torch.Tensor:
        return table.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else table

    def used(self) -> Iterator[torch.Tensor]:
        """The tensors on the device that the kernel reads or writes, beside those that it moves."""
        yield from (self._rows, self._chunks, self._done)

    def make_ready(self) -> None:
        """Compile the kernel, and load it on the device."""
        self._run(0, (0.0,) * self._num_tracks, None, None)

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
            counter: an int64 of the device, to which the number of live values that are left out is added.
        """
        flag = None if unless is None else unless.detach().reshape(1).to(self.device)
        steps.once(partial(self._number.add_, 1), self._number)
        steps.again(partial(self, momenta, flag, counter))

    def __call__(
        self, momenta: tuple[float, ...], flag: torch.Tensor | None = None, counter: torch.Tensor | None = None
    ) -> None:
        """Launch the kernel; a launch that is repeated before the number goes up moves nothing twice."""
        self._run(len(self._done), momenta, flag, counter)

    def _run(
        self, num_chunks: int, momenta: tuple[float, ...], flag: torch.Tensor | None, counter: torch.Tensor | None
    ) -> None:
        move: Any = self._kernel.move
        on_gpu = self.device.type == "cuda"
        # A graph that is captured has the number of now: each replay would find its own, and move nothing.
        once = not (on_gpu and torch.cuda.is_current_stream_capturing())
        with torch.cuda.device(self.device if on_gpu else -1):
            move[(max(num_chunks, 1),)](
                self._rows,
                self._chunks,
                self._done,
                num_chunks,
                int(self._number) % 2**31,
                self._done if flag is None else flag,
                self._rows if counter is None else counter,
                momenta,
                tuple(1.0 - momentum for momentum in momenta),
                COUNTS=counter is not None,
                FLAGGED=flag is not None,
                ONCE=once,
                **self._constants,
            )
