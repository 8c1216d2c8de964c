"""What saving and loading cost, as ratios from one interleaved run: the machine's noise hits all candidates alike.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 launch/bench/checkpoint.py --layout fsdp2 --rounds 7

Every rank holds its share of GPT-2 small in fp32 (498 MB together). Candidates run in shuffled order in each round,
each into a folder of its own that is removed before (not timed). A time is that of the slowest rank, all fsynced:

    floor          each rank writes as many plain bytes as it owns into a file of its own, and fsyncs it
    save           ShardedEMA.save
    save, bg       ShardedEMA.save(background=True), until it returns; the writing is not timed
    consolidate    ShardedEMA.consolidate: the same files without manifest and checksums
    dcp.save       torch.distributed.checkpoint.save of the same tensors
    load           ShardedEMA.load, checksums compared: into an average that has had no update (a resume), and into
                   one that has (which must survive a failure, and so takes a second copy until the end)
    dcp.load       the same tensors, in place, without checksums

Loads read from the page cache. "extra MiB" is the largest growth of resident memory of any rank during the call.
"""

from __future__ import annotations

import argparse
import datetime
import functools
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
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from update import module_of

from dist_ema import ConstantSchedule, ShardedEMA

_CHUNK_BYTES = 8 * 2**20
_SCALES = {"gpt2": 1, "quarter": 4}


def shapes(scale: int) -> list[tuple[int, ...]]:
    """The tensors of GPT-2 small; with a scale, fewer layers and a smaller vocabulary."""
    block: list[tuple[int, ...]] = [
        *((768,), (768,), (768, 2304), (2304,), (768, 768), (768,)),
        *((768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)),
    ]
    return [(50257 // scale, 768), (1024, 768), *block * (12 // scale), (768,), (768,)]


def laid_out(model: nn.Module, layout: str) -> nn.Module:
    """The model under DDP, FSDP2 (rows), or cut along the last dim of every matrix as tensor parallelism may."""
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "fsdp2":
        fully_shard(model)
        return model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    for name, parameter in list(model.named_parameters()):
        placed = distribute_tensor(parameter.data, mesh, [Shard(parameter.dim() - 1)])
        model.register_parameter(name, nn.Parameter(placed))
    return model


def write_plain(folder: Path, values: torch.Tensor) -> None:
    """The floor: this rank's bytes into a file of its own, durably."""
    folder.mkdir(exist_ok=True)
    content = memoryview(values.numpy()).cast("B")  # type: ignore[arg-type]
    descriptor = os.open(folder / str(dist.get_rank()), os.O_WRONLY | os.O_CREAT)
    for start in range(0, len(content), _CHUNK_BYTES):
        os.pwrite(descriptor, content[start : start + _CHUNK_BYTES], start)
    os.fsync(descriptor)
    os.close(descriptor)


def peak_bytes(reset: bool = False) -> int:
    """Largest resident memory of this process since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def timed(call: Callable[[], object]) -> tuple[float, int]:
    """Seconds of the slowest rank, and the largest growth of memory of any."""
    dist.barrier()
    before = peak_bytes(reset=True)
    began = time.perf_counter()
    call()
    told = torch.tensor([time.perf_counter() - began, float(peak_bytes() - before)], dtype=torch.float64)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return float(told[0]), int(told[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Ratios of saving and loading to plain writing and to DCP.")
    parser.add_argument("--layout", choices=("ddp", "fsdp2", "columns"), default="fsdp2")
    parser.add_argument("--model", choices=tuple(_SCALES), default="gpt2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", default=None, help="on the disk to measure; a temporary one otherwise")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = laid_out(module_of(shapes(_SCALES[options.model]), torch.float32), options.layout)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.01))
    ema.update()
    box = [tempfile.mkdtemp(dir=options.folder) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(box)
    folder = Path(box[0])
    plain = torch.randn(ema.nbytes // 4)
    state = {name: value.detach() for name, value in model.named_parameters()}

    def saves(name: str, call: Callable[[Path], object], after: Callable[[], object] | None = None) -> Save:
        return Save(folder / name, call, after)

    candidates = {
        "floor: plain parallel write": saves("plain", lambda path: write_plain(path, plain)),
        "ShardedEMA.save": saves("ours", ema.save),
        "ShardedEMA.save(background=True)": saves("behind", functools.partial(ema.save, background=True), ema.wait),
        "ShardedEMA.consolidate": saves("export", ema.consolidate),
        "dcp.save": saves("dcp", lambda path: dcp.save(state, checkpoint_id=path)),  # type: ignore[attr-defined]
        "dcp.load": Save(None, lambda _: dcp.load(state, checkpoint_id=folder / "dcp"), None),  # type: ignore[attr-defined]
        "ShardedEMA.load": Save(None, lambda _: ema.load(folder / "ours"), None, before=ema.restart),
        "ShardedEMA.load, over an average in use": Save(None, lambda _: ema.load(folder / "ours"), None),
    }
    times = measure(candidates, options.rounds)
    if dist.get_rank() == 0:
        tell(times, options, sum(value.numel() for value in state.values()) * 4)
        shutil.rmtree(folder)
    dist.barrier()
    os._exit(0)  # gloo's teardown aborts now and then, after all work is done


class Save:
    """One candidate: what is timed, the folder that is removed before, and what must be done before and after."""

    def __init__(
        self,
        folder: Path | None,
        call: Callable[[Path], object],
        after: Callable[[], object] | None,
        before: Callable[[], object] | None = None,
    ) -> None:
        self.folder = folder
        self.call = call
        self.after = after
        self.before = before

    def run(self) -> tuple[float, int]:
        """Collective. Seconds and extra bytes."""
        if self.folder is not None and dist.get_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.sync()
        if self.before is not None:
            self.before()
        result = timed(lambda: self.call(self.folder or Path()))
        if self.after is not None:
            self.after()
        return result


def measure(candidates: dict[str, Save], rounds: int) -> dict[str, list[tuple[float, int]]]:
    """Seconds and extra bytes of each candidate in each round; the first round, which warms up, is not counted."""
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in candidates}
    shuffle = random.Random(0)
    for number in range(rounds + 1):
        names = list(candidates) if number == 0 else shuffle.sample(list(candidates), len(candidates))
        for name in names:
            found[name].append(candidates[name].run())
    return {name: results[1:] for name, results in found.items()}


def tell(times: dict[str, list[tuple[float, int]]], options: argparse.Namespace, total_bytes: int) -> None:
    floor, dcp_save, save, dcp_load = (
        [seconds for seconds, _ in times[name]]
        for name in ("floor: plain parallel write", "dcp.save", "ShardedEMA.save", "dcp.load")
    )
    print(
        f"{options.model}, {options.layout}, {dist.get_world_size()} ranks, {total_bytes / 2**20:.0f} MiB, "
        f"torch {torch.__version__}; medians of {options.rounds} rounds"
    )
    print("| candidate | ms | to floor | to dcp | to save | extra MiB |\n|---|---|---|---|---|---|")
    for name, results in times.items():
        own = [seconds for seconds, _ in results]
        peers = dcp_load if ".load" in name else dcp_save
        ratios = [
            f"{statistics.median(each / base for each, base in zip(own, bases, strict=True)):.2f}"
            for bases in (floor, peers, save)
        ]
        extra = max(extra_bytes for _, extra_bytes in results) / 2**20
        print(f"| {name} | {1000 * statistics.median(own):.0f} | {' | '.join(ratios)} | {extra:.0f} |")


if __name__ == "__main__":
    main()
