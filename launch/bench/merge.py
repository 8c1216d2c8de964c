"""What an offline merge costs, against reading the sources and writing the result.

    python launch/bench/merge.py

Four model folders of 1.25 GiB in fp32 (1-sqrt), in turn with a plain loop that reads all of them and writes as many
bytes as the result has, fsynced. Both read what is in the page cache, or with `--cold` what was dropped from it. "extra
MiB": growth of resident memory over what the interpreter with torch has.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from checkpoint import Samples, rows
from measuring import Report, benchmark_parser, interleaved, peak_bytes
from safetensors.torch import save_file

from dist_ema import merge

_CHUNK_BYTES = 8 * 2**20
_FLOOR = "floor: read all, write one"


def drop(path: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def read_and_write(sources: list[Path], target: Path) -> None:
    """Read all files side by side and write as many bytes as one has, durably."""
    writing = os.open(target, os.O_WRONLY | os.O_CREAT)
    reading = [os.open(path, os.O_RDONLY) for path in sources]
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    for start in range(0, os.fstat(reading[0]).st_size, _CHUNK_BYTES):
        for descriptor in reading:
            count = os.preadv(descriptor, [buffer], start)
        os.pwrite(writing, buffer[:count], start)
    os.fsync(writing)
    for descriptor in (writing, *reading):
        os.close(descriptor)


def measured(rounds: int, elements: int, num_sources: int, dtype: torch.dtype, cold: bool) -> Samples:
    folder = Path(tempfile.mkdtemp())
    for index in range(num_sources):
        (folder / str(index)).mkdir()
        torch.manual_seed(index)
        tensors = {f"layer.{at}": torch.randn(elements // 80).to(dtype) for at in range(80)}
        save_file(tensors, folder / str(index) / "model.safetensors", metadata={"format": "pt"})
        del tensors
    sources = [folder / str(index) for index in range(num_sources)]
    files = [source / "model.safetensors" for source in sources]
    merge(folder / "first", sources[:1], max_shard_size="1GB")  # what is imported late is no memory of a merge
    shutil.rmtree(folder / "first")

    def timed(call: Callable[[Path], object]) -> tuple[float, float]:
        target = folder / "out"
        shutil.rmtree(target, ignore_errors=True)
        target.unlink(missing_ok=True)
        os.sync()
        for file in files if cold else ():
            drop(file)
        before = peak_bytes(reset=True)
        began = time.perf_counter()
        call(target)
        seconds = time.perf_counter() - began
        extra = (peak_bytes() - before) / 2**20
        shutil.rmtree(target, ignore_errors=True)
        target.unlink(missing_ok=True)
        return seconds, extra

    found = interleaved(
        {
            _FLOOR: lambda: timed(lambda target: read_and_write(files, target)),
            "merge": lambda: timed(lambda target: merge(target, sources, decay="1-sqrt")),
        },
        rounds,
    )
    shutil.rmtree(folder)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Ratio of an offline merge to reading and writing the bytes.", rounds=5)
    parser.add_argument("--elements", type=int, default=80 * 2048**2, help="of each source")
    parser.add_argument("--sources", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cold", action="store_true", help="drop the sources from the page cache before each run")
    options = parser.parse_args(arguments)
    report = Report("merge", options)
    dtype: torch.dtype = getattr(torch, options.dtype)
    found = measured(options.rounds, options.elements, options.sources, dtype, options.cold)
    size = dtype.itemsize * options.elements / 2**20
    title = f"{options.sources} folders of {size:.0f} MiB, {options.dtype}{', not in the page cache' * options.cold}"
    report.add(title, rows(found, {"to reading and writing": lambda name: _FLOOR}))


if __name__ == "__main__":
    main()
