"""What an update on several threads costs while other processes want the same cores, against the same one alone.

    python launch/bench/busy.py --threads 2 --busy 2

The others spin; they are stopped and continued by signals, so both cases come from the same rounds. torch divides every
tensor of a list among its threads and waits for all of them before the next, also for one that is not running; that is
"raw". Wall time. With as many spinning processes as cores and fair shares, twice the time alone is what there is.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from measuring import Cell, Report, Spread, benchmark_parser, interleaved, milliseconds, ratio
from models import Case, add_cases, cases
from update import OURS, RAW, candidates

# After its work a thread of torch spins for a while: not into the next candidate's time.
_CALM_SECONDS = 0.02
_ALONE, _BUSY = "alone", "busy"


@contextlib.contextmanager
def spinning(count: int) -> Iterator[Callable[[bool], None]]:
    """Other processes that use all the CPU they get; gives the switch."""
    others = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]

    def switch(on: bool) -> None:
        for each in others:
            os.kill(each.pid, signal.SIGCONT if on else signal.SIGSTOP)
        time.sleep(_CALM_SECONDS)

    try:
        yield switch
    finally:
        for each in others:
            each.kill()
            each.wait()


def rows(case: Case, busy: int) -> list[Mapping[str, Cell]]:
    updates = {name: call for name, call in candidates(case.build()).items() if name in (OURS, RAW)}
    with spinning(busy) as switch:

        def seconds(update: Callable[[], object], beside: bool) -> float:
            switch(beside)
            began = time.perf_counter()
            update()
            return time.perf_counter() - began

        found = interleaved(
            {
                f"{name} {beside}": functools.partial(seconds, call, beside == _BUSY)
                for name, call in updates.items()
                for beside in (_ALONE, _BUSY)
            },
            case.rounds,
        )
    return [
        {
            "candidate": name,
            "alone, ms": milliseconds(found[f"{name} {_ALONE}"]),
            "busy, ms": str(Spread.of(1000 * each for each in found[f"{name} {_BUSY}"])),
            "busy to alone": ratio(found[f"{name} {_BUSY}"], found[f"{name} {_ALONE}"]),
            "busy, to raw": ratio(found[f"{name} {_BUSY}"], found[f"{RAW} {_BUSY}"]),
        }
        for name in updates
    ]


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Ratio of an update beside busy processes to one alone.", rounds=None)
    add_cases(parser)
    parser.add_argument("--busy", type=int, default=2, help="processes that spin")
    parser.set_defaults(threads=2, models=["gpt2", "resnet50"], dtypes=["float32"])
    options = parser.parse_args(arguments)
    report = Report("busy", options)
    for case in cases(options):
        report.add(f"{case}, {options.busy} busy processes", rows(case, options.busy))


if __name__ == "__main__":
    main()
