"""What one update costs next to the averages of other libraries; launch/bench/setup.sh installs them.

    .venv-bench/bin/python launch/bench/peers.py --models gpt2 --dtypes float32

All keep their average in float32. Those who cannot beside bfloat16 weights are listed with what they raised, those who
are not installed with a note. On resnet50 the defaults differ about the running statistics of the batch norms: torch
and mmengine copy them at each update, timm, ema-pytorch and Lightning average them, diffusers does not know them;
ShardedEMA shows the live ones when the average is used, or averages them with update_buffers=True.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping

import torch
from libraries import LIBRARIES, Average, sharded_ema
from measuring import Cell, Report, benchmark_parser, extra_mib, host_microseconds, measure, milliseconds, ratio
from models import Case, add_cases, cases
from torch import nn
from update import FLOOR, MOMENTUM, OURS, RAW
from update import candidates as plain_candidates

BUFFERS_TOO = "ShardedEMA.update, update_buffers=True"


def made(model: nn.Module) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Name -> one update; and for what cannot be measured, why."""
    plain = plain_candidates(model)
    calls, why = {name: plain[name] for name in (FLOOR, RAW, OURS)}, {}
    if next(model.buffers(), None) is not None:
        calls[BUFFERS_TOO] = sharded_ema(update_buffers=True)(model, 1 - MOMENTUM, torch.float32).update
    for library in LIBRARIES:
        if not library.is_installed():
            why[f"{library.distribution} {library.title}"] = "not installed"
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                average: Average = library.make(model, 1 - MOMENTUM, torch.float32)
                for _ in range(3):  # some copy at first
                    average.update()
        except Exception as error:
            why[str(library)] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            calls[str(library)] = average.update
    return calls, why


def rows(case: Case) -> list[Mapping[str, Cell]]:
    calls, why = made(case.build())
    extra = {name: extra_mib(call, case.device) for name, call in calls.items()}
    seconds = measure(calls, case.rounds, case.device)
    on_gpu = case.device == "cuda"
    measured: list[Mapping[str, Cell]] = [
        {
            "average": name,
            "ms": milliseconds(own),
            "to floor": ratio(own, seconds[FLOOR]),
            "ShardedEMA to it": ratio(seconds[OURS], own),
            "extra MiB": extra[name],
            **({"host, us": host_microseconds(calls[name], case.rounds, case.device)} if on_gpu else {}),
        }
        for name, own in seconds.items()
    ]
    return [*measured, *({"average": name, "ms": reason} for name, reason in why.items())]


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Ratios of one update to those of other libraries.", rounds=None)
    add_cases(parser)
    options = parser.parse_args(arguments)
    report = Report("peers", options)
    for case in cases(options):
        report.add(str(case), rows(case))


if __name__ == "__main__":
    main()
