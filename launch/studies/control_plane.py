"""What the ranks say to one another, counted in a simulation of many ranks, and measured on real ones.

    python launch/studies/control_plane.py                # 8 to 16,384 simulated ranks, in one process: half an hour
    python launch/studies/control_plane.py --real         # worlds of 2 to 64 real ranks: some minutes
    torchrun --nproc-per-node 64 launch/studies/control_plane.py --real   # one world, under torchrun itself

The simulation runs the real code of every rank, over a store and connections that lie in memory. Told is, for each
call, the largest number of any rank; rank 0 apart; and what the server of the store sees of all ranks.

Of real ranks, descriptors and threads are those that a process has more than before the first construction: the most
of any rank that does not keep the store of the process group.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from real_ranks import HOSTS, LAYOUTS, Counted, Measured, forked, measure, store_kept_by
from simulated_calls import CALLS, simulate
from simulated_ranks import Counts, largest

# What the wrappers and the average load at their first use: loaded once here, not in every rank.
_SLOW_TO_LOAD = ("torch._dynamo", "torch.distributed.checkpoint")

_HEAD = (
    "| ranks | layout | store kept by | after construction | during saves | after them | rank 0 keeps | "
    "construction, ms | save, ms | its CPU time a rank, ms | load, ms |"
)


_SERVER_SECONDS = 10e-6  # of its one thread, for a request: measured

_SIMULATED_HEAD = (
    "| ranks | call | sent, received | KB of both | connections | rank 0: sent, received | KB of both | "
    "the server: requests | MB | seconds |"
)


def simulated_row(call: str, counts: Sequence[Counts]) -> str:
    """A row of the table of simulated ranks."""
    most, first = largest(counts), counts[0]
    requests = sum(each.sent for each in counts)
    megabytes = sum(each.num_bytes for each in counts) / 1e6
    cells = [f"{len(counts):,}", call, f"{most.sent}, {most.received}", f"{most.num_bytes / 1000:,.1f}"]
    cells += [str(most.wires), f"{first.sent}, {first.received}", f"{first.num_bytes / 1000:,.1f}"]
    cells += [f"{requests:,}", f"{megabytes:,.1f}", f"{requests * _SERVER_SECONDS:,.2f}"]
    return f"| {' | '.join(cells)} |"


def in_a_simulation(sizes: Sequence[int], calls: Sequence[str]) -> None:
    """Print a row for every number of ranks and call."""
    print(_SIMULATED_HEAD)
    print("|---" * (_SIMULATED_HEAD.count("|") - 1) + "|", flush=True)
    for size in sizes:
        for call, counts in simulate(size, tuple(calls)).items():
            print(simulated_row(call, counts), flush=True)


def row(layout: str, host: str, all_ranks: Sequence[Measured]) -> str:
    """A row of the table of real worlds."""
    others = all_ranks if host != "rank 0" else all_ranks[1:]

    def most(name: str) -> str:
        return _text(functools.reduce(Counted.__or__, (getattr(each, name) for each in others)))

    def ms(name: str) -> str:
        return f"{1000 * max(getattr(each, name) for each in all_ranks):,.0f}"

    cpu = 1000 * statistics.fmean(each.save_cpu_seconds for each in all_ranks)
    cells = [str(len(all_ranks)), layout, host, most("constructed"), most("saving"), most("saved")]
    cells += [_text(all_ranks[0].saving) if host == "rank 0" else "-"]
    cells += [ms("construction_seconds"), ms("save_seconds"), f"{cpu:.1f}", ms("load_seconds")]
    return f"| {' | '.join(cells)} |"


def _text(counted: Counted) -> str:
    return f"{counted.descriptors}; {counted.threads}"


def real(sizes: Sequence[int], layouts: Sequence[str], hosts: Sequence[str], spare: int) -> None:
    """Print a row for every world."""
    for module in _SLOW_TO_LOAD:
        importlib.import_module(module)
    print(_HEAD)
    print("|---" * (_HEAD.count("|") - 1) + "|", flush=True)
    for layout in layouts:
        for host in hosts:
            for size in sizes:
                with store_kept_by(host) as store:
                    ranks = forked(size, store, functools.partial(measure, layout, spare=spare))
                print(row(layout, host, ranks[0]), flush=True)


def launched(layouts: Sequence[str], spare: int) -> None:
    """Collective: every rank must call it. Print the rows of the world that torchrun has started."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    box = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(box)
    for layout in layouts:
        told = measure(layout, Path(box[0]), spare)
        if dist.get_rank() == 0:
            print(row(layout, "torchrun", told), flush=True)
    dist.barrier()
    os._exit(0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--real", action="store_true", help="start real ranks")
    parser.add_argument("--ranks", type=int, nargs="+", help="how many; several worlds, one after the other")
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=CALLS, help="of simulated ranks")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=HOSTS)
    parser.add_argument("--spare", type=int, default=0, help="limit of descriptors, above what a process has before")
    options = parser.parse_args(arguments)
    if "RANK" in os.environ:
        launched(options.layouts, options.spare)
    if not options.real:
        in_a_simulation(options.ranks or (8, 64, 512, 4096, 16384), options.calls)
        return
    real(options.ranks or (2, 4, 8, 16, 32, 64), options.layouts, options.hosts, options.spare)


if __name__ == "__main__":
    main()
