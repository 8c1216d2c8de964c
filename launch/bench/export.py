"""What an export costs, collective and offline.

    torchrun --nproc-per-node 2 launch/bench/export.py
    python launch/bench/export.py

Under torchrun: `ShardedEMA.consolidate` of GPT-2 small in fp32 (498 MB) under FSDP2, against torch's way for the same
model, `get_model_state_dict(full_state_dict=True, cpu_offload=True)` and safetensors' `save_file` on rank 0, fsynced.

In one process: `consolidate_checkpoint` of an average of 1.25 GiB, with and without a change of dtype, against reading
the checkpoint and writing as many bytes as the export has, fsynced. "extra MiB": growth of resident memory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoint import Samples, Save, rows
from launched import joined, laid_out, leave, shared_folder
from measuring import Report, add_device, benchmark_parser, interleaved, peak_bytes
from models import MODELS, build
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from dist_ema import ConstantSchedule, ShardedEMA, consolidate_checkpoint

_CHUNK_BYTES = 8 * 2**20
_GATHERED = "get_model_state_dict + save_file"
_HALF, _WHOLE = "floor: copy, half the bytes", "floor: copy"


def fsynced(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def collective(model_name: str, rounds: int, device: str) -> Samples:
    model = laid_out(build(model_name, device=device), "fsdp2")
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.01))
    ema.update()
    folder = shared_folder()

    def gather(path: Path) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        if dist.get_rank() == 0:
            path.mkdir()
            save_file(state, path / "model.safetensors", metadata={"format": "pt"})
            fsynced(path / "model.safetensors")

    candidates = {
        _GATHERED: Save(folder / "gathered", gather),
        "ShardedEMA.consolidate": Save(folder / "ours", ema.consolidate),
        "ShardedEMA.consolidate, to bfloat16": Save(
            folder / "half", lambda path: ema.consolidate(path, dtype=torch.bfloat16)
        ),
    }
    found = interleaved({name: each.run for name, each in candidates.items()}, rounds)
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    return found


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


def offline(rounds: int, elements: int) -> Samples:
    folder = Path(tempfile.mkdtemp())
    model = nn.ParameterList(torch.randn(elements // 80) for _ in range(80))
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.01))
    ema.update()
    ema.save(folder / "ema")
    del ema, model
    source = folder / "ema" / "model.safetensors"
    whole = source.stat().st_size

    def timed(name: str, call: Callable[[Path], object]) -> tuple[float, float]:
        remove(name)
        before = peak_bytes(reset=True)
        began = time.perf_counter()
        call(folder / name)
        seconds = time.perf_counter() - began
        extra = (peak_bytes() - before) / 2**20
        remove(name)
        return seconds, extra

    def remove(name: str) -> None:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)
        os.sync()

    found = interleaved(
        {
            _HALF: lambda: timed("half-copied", lambda path: copy(source, path, whole // 2)),
            _WHOLE: lambda: timed("copied", lambda path: copy(source, path, whole)),
            "consolidate_checkpoint, to bfloat16": lambda: timed(
                "half", lambda path: consolidate_checkpoint(folder / "ema", path, dtype=torch.bfloat16)
            ),
            "consolidate_checkpoint, as it is": lambda: timed(
                "same", lambda path: consolidate_checkpoint(folder / "ema", path)
            ),
            "consolidate_checkpoint, as it is, link=True": lambda: timed(
                "linked", lambda path: consolidate_checkpoint(folder / "ema", path, link=True)
            ),
            "consolidate_checkpoint, as it is, in several files": lambda: timed(
                "several", lambda path: consolidate_checkpoint(folder / "ema", path, max_shard_size="300MB")
            ),
        },
        rounds,
    )
    shutil.rmtree(folder)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Ratios of exports to torch's way and to plain copies.", rounds=5)
    parser.add_argument("--model", choices=tuple(MODELS), default="gpt2", help="that is exported by several ranks")
    parser.add_argument("--elements", type=int, default=80 * 2048**2, help="of the average that is exported offline")
    add_device(parser)
    options = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if joined():
            report = Report("export", options)
            found = collective(options.model, options.rounds, options.device)
            title = f"{options.model} on {dist.get_world_size()} ranks, FSDP2, {options.device}"
            if dist.get_rank() == 0:
                report.add(title, rows(found, {"to gathering": lambda name: _GATHERED}))
        else:
            report = Report("export", options)
            found = offline(options.rounds, options.elements)
            bases = {"to a copy": lambda name: _WHOLE, "to a copy of half": lambda name: _HALF}
            report.add(f"offline, {4 * options.elements / 2**20:.0f} MiB", rows(found, bases))


if __name__ == "__main__":
    main()
    leave()
