"""What saving and loading cost, as ratios to a plain parallel write and to DCP.

    torchrun --nproc-per-node 2 launch/bench/checkpoint.py --layout fsdp2

Every rank holds its share of GPT-2 small in fp32 (498 MB together). Each writes into a folder of its own that
is removed before (not timed). A time is that of the slowest rank, all fsynced:

    floor          each rank writes as many plain bytes as it owns into a file of its own, and fsyncs it
    save           ShardedEMA.save
    save, bg       ShardedEMA.save(background=True), until it returns; the writing is not timed
    consolidate    ShardedEMA.consolidate: the same files without manifest and checksums
    dcp.save       torch.distributed.checkpoint.save of the same tensors
    load           ShardedEMA.load, checksums compared: into an average that has had no update (a resume), and into
                   one that has (which must survive a failure, and so takes a second copy until the end)
    dcp.load       the same tensors, in place, without checksums

With `--device cuda` weights and averages lie on the GPU, the floor writes from host memory, and the ranks talk over
gloo all the same. Loads read from the page cache. "extra MiB" is the largest growth of resident memory of any rank
during the call.
"""

from __future__ import annotations

import functools
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from launched import joined, laid_out, leave, shared_folder
from measuring import Cell, Report, add_device, benchmark_parser, interleaved, milliseconds, peak_bytes, ratio
from models import MODELS, build
from torch.distributed import checkpoint as dcp

from dist_ema import ConstantSchedule, ShardedEMA

_CHUNK_BYTES = 8 * 2**20
_FLOOR, _DCP_SAVE, _DCP_LOAD, _SAVE = "floor: plain parallel write", "dcp.save", "dcp.load", "ShardedEMA.save"


def write_plain(folder: Path, values: torch.Tensor) -> None:
    """The floor: this rank's bytes into a file of its own, durably."""
    folder.mkdir(exist_ok=True)
    content = memoryview(values.numpy()).cast("B")  # type: ignore[arg-type]
    descriptor = os.open(folder / str(dist.get_rank()), os.O_WRONLY | os.O_CREAT)
    for start in range(0, len(content), _CHUNK_BYTES):
        os.pwrite(descriptor, content[start : start + _CHUNK_BYTES], start)
    os.fsync(descriptor)
    os.close(descriptor)


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Collective. Seconds of the slowest rank, and the largest growth of memory of any, in MiB."""
    dist.barrier()
    before = peak_bytes(reset=True)
    began = time.perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    told = torch.tensor([time.perf_counter() - began, (peak_bytes() - before) / 2**20], dtype=torch.float64)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return float(told[0]), float(told[1])


class Save:
    """One candidate: what is timed, the folder that is removed before, and what must be done before and after."""

    def __init__(
        self,
        folder: Path | None,
        call: Callable[[Path], object],
        after: Callable[[], object] | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        self.folder = folder
        self.call = call
        self.after = after
        self.before = before

    def run(self) -> tuple[float, float]:
        """Collective. Seconds and extra MiB."""
        if self.folder is not None and dist.get_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.sync()
        if self.before is not None:
            self.before()
        result = timed(lambda: self.call(self.folder or Path()))
        if self.after is not None:
            self.after()
        return result


Samples = Mapping[str, Sequence[tuple[float, float]]]


def rows(found: Samples, bases: Mapping[str, Callable[[str], str]]) -> list[Mapping[str, Cell]]:
    """A row for each candidate. Bases: a column -> which candidate a candidate of this name is divided by there."""
    seconds = {name: [sample[0] for sample in samples] for name, samples in found.items()}
    return [
        {
            "candidate": name,
            "ms": milliseconds(own),
            **{column: ratio(own, seconds[base(name)]) for column, base in bases.items()},
            "extra MiB": max(extra for _, extra in found[name]),
        }
        for name, own in seconds.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Ratios of saving and loading to plain writing and to DCP.", rounds=7)
    parser.add_argument("--layout", choices=("ddp", "fsdp2", "columns"), default="fsdp2")
    parser.add_argument("--model", choices=tuple(MODELS), default="gpt2")
    add_device(parser)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one otherwise")
    options = parser.parse_args(arguments)
    if not joined():
        parser.error("start it with torchrun")
    report = Report("checkpoint", options)
    torch.manual_seed(0)
    model = laid_out(build(options.model, device=options.device), options.layout)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.01))
    ema.update()
    folder = shared_folder(options.folder)
    plain = torch.randn(ema.nbytes // 4)
    state = {name: value.detach() for name, value in model.named_parameters()}
    candidates = {
        _FLOOR: Save(folder / "plain", lambda path: write_plain(path, plain)),
        _SAVE: Save(folder / "ours", ema.save),
        "ShardedEMA.save(background=True)": Save(
            folder / "behind", functools.partial(ema.save, background=True), after=ema.wait
        ),
        "ShardedEMA.consolidate": Save(folder / "export", ema.consolidate),
        _DCP_SAVE: Save(folder / "dcp", lambda path: dcp.save(state, checkpoint_id=path)),  # type: ignore[attr-defined]
        _DCP_LOAD: Save(None, lambda _: dcp.load(state, checkpoint_id=folder / "dcp")),  # type: ignore[attr-defined]
        "ShardedEMA.load": Save(None, lambda _: ema.load(folder / "ours"), before=ema.restart),
        "ShardedEMA.load, over an average in use": Save(None, lambda _: ema.load(folder / "ours")),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = interleaved({name: each.run for name, each in candidates.items()}, options.rounds)
    if dist.get_rank() == 0:
        mib = sum(value.numel() for value in state.values()) * 4 / 2**20
        bases: dict[str, Callable[[str], str]] = {
            "to floor": lambda name: _FLOOR,
            "to dcp": lambda name: _DCP_LOAD if ".load" in name else _DCP_SAVE,
            "to save": lambda name: _SAVE,
        }
        report.add(
            f"{options.model}, {options.layout}, {dist.get_world_size()} ranks, {options.device}, {mib:.0f} MiB",
            rows(found, bases),
        )
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
    leave()
