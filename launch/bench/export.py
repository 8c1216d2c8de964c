"""What an export costs, collective and offline, as ratios from one interleaved run.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 launch/bench/export.py
    OMP_NUM_THREADS=1 python launch/bench/export.py

Under torchrun: `ShardedEMA.consolidate` of GPT-2 small in fp32 (498 MB) under FSDP2, against torch's way for the same
model, `get_model_state_dict(full_state_dict=True, cpu_offload=True)` and safetensors' `save_file` on rank 0, fsynced.

In one process: `consolidate_checkpoint` of an average of 1.25 GiB, with and without a change of dtype, against reading
the checkpoint and writing as many bytes as the export has, fsynced. "extra MiB": growth of resident memory.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoint import Save, laid_out, measure, peak_bytes, shapes
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from update import module_of

from dist_ema import ConstantSchedule, ShardedEMA, consolidate_checkpoint

_CHUNK_BYTES = 8 * 2**20


def fsynced(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def collective(rounds: int) -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    torch.set_num_threads(1)
    model = laid_out(module_of(shapes(1), torch.float32), "fsdp2")
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.01))
    ema.update()
    box = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(box)
    folder = Path(box[0])

    def gather(path: Path) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        if dist.get_rank() == 0:
            path.mkdir()
            save_file(state, path / "model.safetensors", metadata={"format": "pt"})
            fsynced(path / "model.safetensors")

    found = measure(
        {
            "get_model_state_dict + save_file": Save(folder / "gathered", gather, None),
            "ShardedEMA.consolidate": Save(folder / "ours", ema.consolidate, None),
            "ShardedEMA.consolidate, to bfloat16": Save(
                folder / "half", lambda path: ema.consolidate(path, dtype=torch.bfloat16), None
            ),
        },
        rounds,
    )
    if dist.get_rank() == 0:
        tell(f"collective export on {dist.get_world_size()} ranks, FSDP2, torch {torch.__version__}", found)
        shutil.rmtree(folder)
    dist.barrier()
    os._exit(0)  # gloo's teardown aborts now and then, after all work is done


def copy(source: Path, target: Path, num_bytes: int) -> None:
    """Read all of a file and write as many bytes as told, durably."""
    reading = os.open(source, os.O_RDONLY)
    writing = os.open(target, os.O_WRONLY | os.O_CREAT)
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    total, written = os.fstat(reading).st_size, 0
    for start in range(0, total, _CHUNK_BYTES):
        count = os.preadv(reading, [buffer], start)
        share = min(num_bytes * (start + count) // total, num_bytes) - written
        os.pwrite(writing, buffer[:share], written)
        written += share
    os.fsync(writing)
    os.close(reading)
    os.close(writing)


def offline(rounds: int, elements: int) -> None:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    ema = ShardedEMA(module_of([(2048, 2048)] * (elements // 2048**2), torch.float32), ConstantSchedule(momentum=0.01))
    ema.update()
    ema.save(folder / "ema")
    del ema
    source = folder / "ema" / "model.safetensors"
    whole = source.stat().st_size

    def remove(name: str) -> None:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)
        os.sync()

    candidates: dict[str, tuple[str, Callable[[Path], object]]] = {
        "floor: copy, half the bytes": ("copied-half", lambda path: copy(source, path, whole // 2)),
        "floor: copy": ("copied", lambda path: copy(source, path, whole)),
        "consolidate_checkpoint, to bfloat16": (
            "half",
            lambda path: consolidate_checkpoint(folder / "ema", path, dtype=torch.bfloat16),
        ),
        "consolidate_checkpoint, as it is": ("same", lambda path: consolidate_checkpoint(folder / "ema", path)),
        "consolidate_checkpoint, as it is, in several files": (
            "several",
            lambda path: consolidate_checkpoint(folder / "ema", path, max_shard_size="300MB"),
        ),
    }
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name in random.sample(list(candidates), len(candidates)):
            place, call = candidates[name]
            remove(place)
            before = peak_bytes(reset=True)
            began = time.perf_counter()
            call(folder / place)
            seconds = time.perf_counter() - began
            if number:
                found[name].append((seconds, peak_bytes() - before))
            remove(place)
    tell(f"offline export of {whole / 2**30:.2f} GiB, torch {torch.__version__}", found)
    shutil.rmtree(folder)


def tell(title: str, found: dict[str, list[tuple[float, int]]]) -> None:
    floors = [
        [seconds for seconds, _ in results]
        for name, results in found.items()
        if not name.startswith(("consolidate", "ShardedEMA"))
    ]
    print(title)
    print("| way | ms | " + " | ".join(f"to row {row + 1}" for row in range(len(floors))) + " | extra MiB |")
    print("|---|---|" + "---|" * (len(floors) + 1))
    for name, results in found.items():
        own = [seconds for seconds, _ in results]
        ratios = [statistics.median(a / b for a, b in zip(own, floor, strict=True)) for floor in floors]
        extra = max(extra_bytes for _, extra_bytes in results) / 2**20
        told = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} | {1000 * statistics.median(own):.0f} | {told} | {extra:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Ratios of exports to torch's way and to plain copies.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--elements", type=int, default=80 * 2048**2, help="of the average that is exported offline")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if "RANK" in os.environ:
        collective(options.rounds)
    else:
        offline(options.rounds, options.elements)


if __name__ == "__main__":
    main()
