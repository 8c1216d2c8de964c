"""What a process waits for before its first update: the time of fresh processes, with an average and without.

    python launch/bench/start_up.py
    python launch/bench/start_up.py --optimizer

A process imports torch and accelerate alone, or builds an average of a small model besides, and updates it once. The
difference is what this package adds. The last columns have the same measured within the process, without the noise of
torch's import. An optimizer of torch loads the compiler and the modules of sharding by itself: a run that trains has
them anyway. The commands that read no tensors load no torch at all.

CPU time of the whole process. Modules come from their bytecode, which a first round writes.
"""

from __future__ import annotations

import functools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import Cell, Report, Spread, benchmark_parser, interleaved

from dist_ema import ConstantSchedule, ShardedEMA

_IMPORTS = "import torch, accelerate\nmodel = torch.nn.Linear(2, 1)\n"
_OPTIMIZER = "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
_AVERAGE = """
import time
began = time.process_time()
from dist_ema import ConstantSchedule, ShardedEMA
ShardedEMA(model, ConstantSchedule(momentum=0.1)).update()
print(time.process_time() - began)
"""
# What a process does -> its source, and what it is compared with.
_PROCESSES = {
    "torch, accelerate": (_IMPORTS, "torch, accelerate"),
    "and an average": (_IMPORTS + _AVERAGE, "torch, accelerate"),
}
_WITH_OPTIMIZER = {
    "and an optimizer": (_IMPORTS + _OPTIMIZER, "torch, accelerate"),
    "and an optimizer, an average": (_IMPORTS + _OPTIMIZER + _AVERAGE, "and an optimizer"),
}
_NOTHING = "python -c pass"


class Taken(NamedTuple):
    """Seconds of a process: of the CPU, from its start to its end, and of the CPU for the average alone, if it has one.

    The last is measured within the process: it has none of the noise of torch's own import.
    """

    cpu: float
    wall: float
    average: float | None


def taken(*arguments: str) -> Taken:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ran = subprocess.run([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Taken(cpu, wall, float(ran.stdout) if arguments[-1].endswith(_AVERAGE) else None)


def rows(calls: Mapping[str, Sequence[str]], bases: Mapping[str, str], rounds: int) -> list[Mapping[str, Cell]]:
    found = interleaved({name: functools.partial(taken, *arguments) for name, arguments in calls.items()}, rounds)
    cpu = {name: [each.cpu for each in of_name] for name, of_name in found.items()}
    return [
        {
            "process": name,
            "wall s, least": min(each.wall for each in found[name]),
            "CPU s, least": min(cpu[name]),
            "CPU s": Spread.of(cpu[name]),
            "beyond": base,
            "more CPU s": Spread.of(own - other for own, other in zip(cpu[name], cpu[base], strict=True)),
            **_own(found[name]),
        }
        for name, base in bases.items()
    ]


def _own(processes: Sequence[Taken]) -> dict[str, Cell]:
    averages = [each.average for each in processes if each.average is not None]
    if not averages:
        return {}
    return {"the average's CPU s, least": min(averages), "the average's CPU s": Spread.of(averages)}


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("What an average adds to the start of a process.", rounds=9)
    parser.add_argument("--optimizer", action="store_true", help="measure processes with an optimizer of torch too")
    options = parser.parse_args(arguments)
    report = Report("start_up", options)
    measured = _PROCESSES | (_WITH_OPTIMIZER if options.optimizer else {})
    processes = {name: ("-c", code) for name, (code, _) in measured.items()}
    bases = {name: base for name, (_, base) in measured.items()}
    report.add(f"start of a run, {options.rounds} rounds", rows(processes, bases, options.rounds))
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "average"
        ShardedEMA(torch.nn.Linear(2, 1), ConstantSchedule(momentum=0.1)).save(saved)
        commands = {
            _NOTHING: ("-c", "pass"),
            "dist-ema --help": ("-m", "dist_ema.cli", "--help"),
            "dist-ema inspect": ("-m", "dist_ema.cli", "inspect", str(saved)),
        }
        found = rows(commands, dict.fromkeys(commands, _NOTHING), options.rounds)
    report.add(f"commands, {options.rounds} rounds", found)


if __name__ == "__main__":
    main()
