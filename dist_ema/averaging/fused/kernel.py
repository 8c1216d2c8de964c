"""The kernel of an update on a GPU, in Triton. Importing this module imports Triton, which torch has with its CUDA.

The arithmetic is that of the steps in `dist_ema.averaging.moves`, bit for bit. Torch's `lerp` on CUDA multiplies and
adds with one rounding where it can (`fma`), and so does this; the launch forbids the compiler to fuse anything else.

[Note: done once]
A launch is given a number. A chunk keeps the number of the last launch that moved it, and a launch that finds its own
number leaves the chunk alone. So a launch may be repeated with its number after an interrupt, whether or not the first
try reached the device. In a graph that is captured, each replay would find the number of the capture, so there is none.
"""

# What Triton compiles is not typed as Python is.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["BLOCK", "IS_COMPILED", "NUM_WARPS", "move"]

# Elements that a program moves at a time, and its warps (measured on an H100: the fastest of twelve pairs).
BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def _lerp(old, new, weight):
    """As torch's `lerp` on CUDA: the difference is taken from the nearer end."""
    near_old = tl.fma(new - old, weight, old)
    near_new = tl.fma(old - new, 1.0 - weight, new)
    return tl.where(tl.abs(weight) < 0.5, near_old, near_new)


@triton.jit
def _move_block(
    row,
    offsets,
    mask,
    stop,
    weights,
    rests,
    LIVE: tl.constexpr,
    NUM_TRACKS: tl.constexpr,
    COMPENSATED: tl.constexpr,
    SKIPS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Move some elements of one tensor; without a mask all of them. Returns how many live values were left out."""
    live = tl.load(row).to(tl.pointer_type(LIVE))
    if ALIGNED:
        live = tl.multiple_of(live, 16)
    new = tl.load(live + offsets, mask=mask).to(tl.float32)
    finite = tl.abs(new) < float("inf")  # false for what is not a number too
    for track in tl.static_range(NUM_TRACKS):
        averaged = tl.load(row + 2 + track).to(tl.pointer_type(tl.float32))
        if ALIGNED:
            averaged = tl.multiple_of(averaged, 16)
        old = tl.load(averaged + offsets, mask=mask)
        weight = weights[track]
        taken = new
        if SKIPS:
            taken = tl.where(finite, new, old)
        if COMPENSATED:
            residual = tl.load(row + 2 + NUM_TRACKS + track).to(tl.pointer_type(tl.bfloat16))
            if ALIGNED:
                residual = tl.multiple_of(residual, 16)
            lost = tl.load(residual + offsets, mask=mask)
            step = (taken - old) * weight + lost.to(tl.float32) * rests[track]
            moved = old + step
            left = step + (old - moved)
            # The average is the live values themselves then.
            moved = tl.where(weight == 1.0, _lerp(old, taken, weight), moved)
            left = tl.where(weight == 1.0, lost.to(tl.float32) * 0.0, left).to(tl.bfloat16)
            tl.store(residual + offsets, tl.where(weight == 0.0, lost, left), mask=mask)
        else:
            moved = _lerp(old, taken, weight)
        # 0 * (live - averaged) is not 0 where a live value is not finite.
        tl.store(averaged + offsets, tl.where(weight == 0.0, old, moved), mask=mask)
    refused = 0
    if SKIPS:
        refused = tl.sum(((finite == 0) & (offsets < stop)).to(tl.int32))
    return refused


@triton.jit(do_not_specialize=["num_chunks", "number", "flag"])
def move(
    rows,
    chunks,
    done,
    num_chunks,
    number,
    flag,
    counter,
    weights,
    rests,
    LIVE: tl.constexpr,
    NUM_TRACKS: tl.constexpr,
    COMPENSATED: tl.constexpr,
    SKIPS: tl.constexpr,
    COUNTS: tl.constexpr,
    FLAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move the averages of some tensors.

    Args:
        rows: for each tensor the addresses of its live values, its number of elements, the addresses of its averages,
            one for each track, and those of their residuals, if there are any; int64.
        chunks: for each chunk the index of its tensor, and how many chunks of that tensor come before; int32.
        done: for each chunk the number of the launch that moved it last; int32.
        num_chunks: how many chunks there are; programs share them.
        number: the number of this launch; a chunk that has it is left alone. If it is negative none is.
        flag: one float32; if it is not 0, nothing moves.
        counter: one int64, to which the number of live values that are left out is added.
        weights: for each track the weight of the live values.
        rests: for each track 1 - weight, as double precision has it.
        LIVE: the dtype of the live values.
        NUM_TRACKS: how many averages there are.
        COMPENSATED: whether they have residuals.
        SKIPS: whether live values that are infinite or not a number are left out.
        COUNTS: whether these are counted.
        FLAGGED: whether there is a flag.
        ALIGNED: whether all addresses are multiples of 16 bytes.
        CHUNK: elements of a chunk, a multiple of `BLOCK`.
        BLOCK: elements that are moved at a time.
    """
    moves = True
    if FLAGGED:
        moves = tl.load(flag) == 0
    if moves:
        for at in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
            # An exchange and not a load: all threads of the program get the former number.
            latest = number - 1
            if number >= 0:
                latest = tl.atomic_xchg(done + at, number)
            if latest != number:
                row = rows + tl.load(chunks + 2 * at) * (2 + NUM_TRACKS + NUM_TRACKS * COMPENSATED)
                numel = tl.load(row + 1)
                start = tl.load(chunks + 2 * at + 1).to(tl.int64) * CHUNK
                stop = tl.minimum(start + CHUNK, numel)
                full = start + (stop - start) // BLOCK * BLOCK
                within = tl.arange(0, BLOCK)
                refused = 0
                for first in range(start, full, BLOCK):
                    offsets = tl.multiple_of(first, BLOCK) + within
                    refused += _move_block(
                        row, offsets, None, stop, weights, rests, LIVE, NUM_TRACKS, COMPENSATED, SKIPS, ALIGNED
                    )
                if full < stop:
                    offsets = full + within
                    refused += _move_block(
                        row,
                        offsets,
                        offsets < stop,
                        stop,
                        weights,
                        rests,
                        LIVE,
                        NUM_TRACKS,
                        COMPENSATED,
                        SKIPS,
                        ALIGNED,
                    )
                if COUNTS:
                    if refused > 0:
                        tl.atomic_add(counter, refused.to(tl.int64))


# With TRITON_INTERPRET set, the kernel runs on the host, which can read no address of a GPU.
IS_COMPILED = isinstance(move, triton.JITFunction)
