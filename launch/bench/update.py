"""What one update costs, as ratios to one pass at memory bandwidth and to torch's own call on prepared lists.

    python launch/bench/update.py --models gpt2 --dtypes float32

The floor is one in-place pass over a flat buffer of the model's size (12 bytes a parameter: two reads and a write; an
update from bfloat16 moves 10). "raw" is what an update cannot do without: `_foreach_lerp_` over lists that were made
before, after `_foreach_copy_` into a scratch as large as the model where live values are bfloat16. GB/s counts the
bytes that each must move at least; a plain copy of a flat buffer tells what bandwidth there is, and the next column
what share of it each has. "host, us", on a GPU alone: until the call returns.

On a GPU a sample is ten calls on end, as in training, where the host runs ahead of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from measuring import Cell, Report, benchmark_parser, extra_mib, host_microseconds, measure, milliseconds, ratio
from models import Case, add_cases, cases
from torch import nn

from dist_ema import ConstantSchedule, ShardedEMA

MOMENTUM = 0.001
IN_A_ROW = 10
FLOOR, OURS, RAW = "floor: one in-place pass, flat buffer", "ShardedEMA.update", "raw: lists made before"
RAW_FLAT, COPY = "raw, averages in one flat buffer", "copy of a flat buffer"


@torch.no_grad()
def candidates(model: nn.Module) -> dict[str, Callable[[], object]]:
    """Name -> one update."""
    live = [parameter.detach() for parameter in model.parameters()]
    averaged = [value.float().clone() for value in live]
    device, numel = live[0].device, sum(value.numel() for value in live)
    flat_averaged, flat_live = torch.randn(numel, device=device), torch.randn(numel, device=device)
    ema = ShardedEMA(model, ConstantSchedule(momentum=MOMENTUM))
    ema.update()
    return {
        FLOOR: lambda: flat_averaged.add_(flat_live, alpha=MOMENTUM),
        COPY: lambda: flat_live.copy_(flat_averaged),
        "lerp, flat buffer to flat buffer": lambda: flat_averaged.lerp_(flat_live, MOMENTUM),
        OURS: ema.update,
        RAW: raw(averaged, live),
        RAW_FLAT: raw(views(flat_averaged, live), live),
    }


def views(flat: torch.Tensor, live: list[torch.Tensor]) -> list[torch.Tensor]:
    parts = flat.split([value.numel() for value in live])
    return [part.view(value.shape) for part, value in zip(parts, live, strict=True)]


def raw(averaged: list[torch.Tensor], live: list[torch.Tensor]) -> Callable[[], object]:
    if live[0].dtype == averaged[0].dtype:
        return lambda: torch._foreach_lerp_(averaged, live, MOMENTUM)
    scratch = [torch.empty_like(value) for value in averaged]

    def through_scratch() -> None:
        torch._foreach_copy_(scratch, live)
        torch._foreach_lerp_(averaged, scratch, MOMENTUM)

    return through_scratch


def in_a_row(call: Callable[[], object], num_calls: int) -> None:
    for _ in range(num_calls):
        call()


def rows(case: Case) -> list[Mapping[str, Cell]]:
    model = case.build()
    calls = candidates(model)
    live = [parameter.detach() for parameter in model.parameters()]
    numel, live_bytes = sum(value.numel() for value in live), sum(value.nbytes for value in live)
    extra = {name: extra_mib(call, case.device) for name, call in calls.items()}
    on_gpu = case.device == "cuda"
    num_calls = IN_A_ROW if on_gpu else 1
    several = {name: partial(in_a_row, call, num_calls) for name, call in calls.items()}
    seconds = {
        name: [each / num_calls for each in own] for name, own in measure(several, case.rounds, case.device).items()
    }
    moved = {name: 8 * numel + (live_bytes if name in (OURS, RAW, RAW_FLAT) else 4 * numel) for name in calls}
    moved[COPY] = 8 * numel
    per_byte = {name: [each / moved[name] for each in own] for name, own in seconds.items()}
    return [
        {
            "candidate": name,
            "ms": milliseconds(own),
            "GB/s": moved[name] / milliseconds(own) / 1e6,
            "of the copy's GB/s": ratio(per_byte[COPY], per_byte[name]),
            "to floor": ratio(own, seconds[FLOOR]),
            "to raw": ratio(own, seconds[RAW]),
            "extra MiB": extra[name],
            **({"host, us": host_microseconds(calls[name], case.rounds, case.device)} if on_gpu else {}),
        }
        for name, own in seconds.items()
    ]


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Ratios of one update to one pass at memory bandwidth.", rounds=None)
    add_cases(parser)
    options = parser.parse_args(arguments)
    report = Report("update", options)
    for case in cases(options):
        report.add(str(case), rows(case))


if __name__ == "__main__":
    main()
