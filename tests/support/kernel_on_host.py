"""A stand-in for the kernel of `dist_ema.averaging.fused`: it moves what lies at the addresses of the tables, on a CPU.

Its arithmetic is that of the steps in `dist_ema.averaging.moves`, so averages have the bits that they have without it.
What a GPU does otherwise is not shown here: see test_gpu.py and everything/test_fused_kernel.py.
"""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import dist_ema.averaging.fused
from dist_ema.averaging import tensor_blocks
from dist_ema.averaging.fused import launches


class KernelOnHost:
    """The module of the kernel.

    Attributes:
        launched: for each launch that may move something, how many chunks it had.
        before: is called before each launch, with the number of chunks; it may raise.
        after: the same, after the launch.
        compiled: the variants that were made ready, in turn, by their constants.
    """

    BLOCK = 8
    NUM_WARPS = 1
    IS_COMPILED = True
    tl = types.SimpleNamespace(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)

    def __init__(self) -> None:
        self.move = self
        self.launched: list[int] = []
        self.compiled: list[dict[str, Any]] = []
        self.before: Callable[..., None] = lambda num_chunks, constants: None
        self.after: Callable[..., None] = lambda num_chunks, constants: None

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(
            rows: torch.Tensor,
            chunks: torch.Tensor,
            done: torch.Tensor,
            num_chunks: int,
            number: int,
            flag: torch.Tensor,
            counter: torch.Tensor,
            weights: Sequence[float],
            rests: Sequence[float],
            **constants: Any,
        ) -> None:
            assert grid == (max(num_chunks, 1),) and -(2**31) <= number < 2**31 and len(weights) == len(rests)
            assert all(type(weight) is float for weight in (*weights, *rests)), "another variant, or none"
            self.before(num_chunks, constants)
            if num_chunks == 0:
                self.compiled.append(constants)
            else:
                self.launched.append(num_chunks)
                known = {(made["FLAGGED"], made["LIVE"], made["ALIGNED"]) for made in self.compiled}
                assert (constants["FLAGGED"], constants["LIVE"], constants["ALIGNED"]) in known, "compiled in a job"
            if constants["FLAGGED"]:
                assert flag.dtype == torch.float32 and flag.numel() == 1
            if not (constants["FLAGGED"] and flag.item() != 0.0):
                for at in range(num_chunks):
                    latest = int(done[at])
                    done[at] = number
                    if latest != number:
                        refused = _move_chunk(rows, chunks[at].tolist(), weights, rests, constants)
                        if constants["COUNTS"]:
                            assert counter.dtype == torch.int64 and counter.ndim == 0
                            counter += refused
            self.after(num_chunks, constants)

        return launch


def _at(address: int, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    nbytes = (stop - start) * dtype.itemsize
    memory = (ctypes.c_char * nbytes).from_address(address + start * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype)


def _move_chunk(
    rows: torch.Tensor, chunk: list[int], weights: Sequence[float], rests: Sequence[float], constants: dict[str, Any]
) -> int:
    index, before = chunk
    live_at, numel, *addresses = rows[index].tolist()
    start, num_tracks = before * constants["CHUNK"], constants["NUM_TRACKS"]
    stop = min(start + constants["CHUNK"], numel)
    new = _at(live_at, start, stop, constants["LIVE"]).float()
    finite = new.isfinite()
    for track, (weight, rest) in enumerate(zip(weights, rests, strict=True)):
        averaged = _at(addresses[track], start, stop, torch.float32)
        taken = torch.where(finite, new, averaged) if constants["SKIPS"] else new
        if weight == 0.0:
            continue
        if constants["COMPENSATED"]:
            residual = _at(addresses[num_tracks + track], start, stop, torch.bfloat16)
            if weight != 1.0:
                step = (taken - averaged).mul_(weight).add_(residual.float().mul_(rest))
                moved = averaged + step
                residual.copy_(step.add_(averaged - moved))
                averaged.copy_(moved)
                continue
            residual.mul_(0.0)
        averaged.lerp_(taken, weight)
    return int((~finite).sum()) if constants["SKIPS"] else 0


def move_on_host(patch: pytest.MonkeyPatch) -> KernelOnHost:
    """From now on updates of a CPU are launches of the stand-in that is returned."""
    kernel = KernelOnHost()
    patch.setattr(dist_ema.averaging.fused, "kernel", kernel, raising=False)
    patch.setattr(launches, "_DEVICE_TYPES", ("cpu",))
    patch.setattr(launches, "_has_warned", False)
    patch.setattr(launches, "_failed", set())
    patch.setattr(tensor_blocks, "_FEWEST_PACKED", 10**9)  # what is tiny is packed on a CPU, and not on a GPU
    return kernel
