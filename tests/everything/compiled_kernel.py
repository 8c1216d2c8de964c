"""Compiles the kernel of `dist_ema.averaging.fused` for a GPU that need not be there, and looks at what came of it."""

from __future__ import annotations

import collections
import re
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from dist_ema.averaging.fused import kernel

OPTIONS = {"num_warps": kernel.NUM_WARPS, "enable_fp_fusion": False}


def instructions(capability: int, live: Any, num_tracks: int, **chosen: bool) -> collections.Counter[str]:
    """How often each instruction that loads, stores, or multiplies and adds is in the compiled kernel."""
    flags = ("COMPENSATED", "SKIPS", "COUNTS", "FLAGGED", "ALIGNED")
    constants = {name: chosen.get(name, name == "ALIGNED") for name in flags}
    constants |= {"LIVE": live, "NUM_TRACKS": num_tracks, "CHUNK": 4 * kernel.BLOCK, "BLOCK": kernel.BLOCK}
    floats = ("fp32",) * num_tracks
    signature = {
        "rows": "*i64",
        "chunks": "*i32",
        "done": "*i32",
        "num_chunks": "i32",
        "number": "i32",
        "flag": "*fp32",
    }
    signature |= {"counter": "*i64", "weights": floats, "rests": floats, **dict.fromkeys(constants, "constexpr")}
    names = kernel.move.arg_names
    source = triton.compiler.ASTSource(
        kernel.move,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in range(3)},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)
    return collections.Counter(re.findall(r"(?:ld|st)\.global[.\w]*|fma[.\w]*", compiled.asm["ptx"]))


def fused(found: collections.Counter[str]) -> int:
    """How many elements are multiplied and added with one rounding; a newer GPU takes two at a time."""
    return found["fma.rn.f32"] + 2 * found["fma.rn.f32x2"]


def main() -> None:
    capability = int(sys.argv[1])
    for live in (tl.float32, tl.bfloat16, tl.float16):
        plain = instructions(capability, live, 1)
        assert plain["ld.global.v4.b32"] and plain["st.global.v4.b32"], f"vectors at aligned addresses: {plain}"
        assert fused(plain), f"one rounding, as torch's lerp: {plain}"
        odd = instructions(capability, live, 1, ALIGNED=False, FLAGGED=True)
        assert not odd["ld.global.v4.b32"], f"no vectors at odd addresses: {odd}"
    several = instructions(capability, tl.bfloat16, 3, COMPENSATED=True, SKIPS=True, COUNTS=True, FLAGGED=True)
    # Of each element of a thread, in full and in cut blocks: two for the lerp of a momentum of 1, and no other.
    elements = kernel.BLOCK // (32 * kernel.NUM_WARPS)
    assert fused(several) <= 2 * 2 * 3 * elements, f"residuals are not fused: {several}"


if __name__ == "__main__":
    main()
