"""What an update costs with each option, and whether the host waits for the device in it.

    python launch/bench/variants.py --device cuda

"host waits" comes from a further update, in which torch raises at what it knows to wait for the device
(`torch.cuda.set_sync_debug_mode`); a CPU leaves it empty. Torch does not know the wait for an event, which fetches
values into host memory. "host, us" is the time until `update` returns; the other times go on until its work is done.

A second table has steps of a fused optimizer under a `GradScaler`, of which two overflow. The flag is on the device.
The update of such a step must move nothing and must not be counted, and the host must not wait to know.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from measuring import Cell, Report, benchmark_parser, extra_mib, host_microseconds, measure, milliseconds, ratio
from models import Case, add_cases, cases
from torch import nn

from dist_ema import ConstantSchedule, ShardedEMA

SCHEDULE = ConstantSchedule(momentum=0.001)
PLAIN = "plain"


class Variant(NamedTuple):
    """Options of a `ShardedEMA`, and whether its updates are given an overflow flag, which is not set."""

    options: Mapping[str, Any] = {}
    num_tracks: int = 1
    is_flagged: bool = False


VARIANTS = {
    PLAIN: Variant(),
    "overlap": Variant({"overlap": True}),
    "two tracks": Variant(num_tracks=2),
    "found_inf": Variant(is_flagged=True),
    "found_inf, overlap": Variant({"overlap": True}, is_flagged=True),
    "skip_nonfinite": Variant({"skip_nonfinite": True}),
    "skip_nonfinite, overlap": Variant({"skip_nonfinite": True, "overlap": True}),
    "compensated": Variant({"compensated": True}),
    "averages in host memory": Variant({"device": "cpu"}),
    "averages in host memory, overlap": Variant({"device": "cpu", "overlap": True}),
}


def host_waits(call: Callable[[], object], device: str) -> str:
    """Call it. "no" if the host did not wait for the device, as far as torch can tell; else the error."""
    if device != "cuda":
        call()
        return ""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        call()
    except RuntimeError as error:
        return f"{error}".splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return "no"


class Updates:
    """The updates of one variant."""

    def __init__(self, model: nn.Module, variant: Variant, device: str) -> None:
        schedules = {f"track{index}": SCHEDULE for index in range(variant.num_tracks)}
        self.ema = ShardedEMA(model, schedules, **variant.options)
        self._flag = torch.zeros(1, device=device) if variant.is_flagged else None
        for _ in range(3):
            self.whole()

    def begin(self) -> None:
        self.ema.update(found_inf=self._flag)

    def whole(self) -> None:
        self.begin()
        self.ema.wait()


def rows(case: Case) -> list[Mapping[str, Cell]]:
    model = case.build()
    updates = {name: Updates(model, variant, case.device) for name, variant in VARIANTS.items()}
    extra = {name: extra_mib(each.whole, case.device) for name, each in updates.items()}
    seconds = measure({name: each.whole for name, each in updates.items()}, case.rounds, case.device)
    host = {name: host_microseconds(each.begin, case.rounds, case.device) for name, each in updates.items()}
    return [
        {
            "variant": name,
            "ms": milliseconds(own),
            "to plain": ratio(own, seconds[PLAIN]),
            "host, us": host[name],
            "extra MiB": extra[name],
            "host waits": host_waits(updates[name].begin, case.device),
        }
        for name, own in seconds.items()
    ]


def overflows(device: str, *, overlap: bool) -> Mapping[str, Cell]:
    """Steps of which two overflow. Raises if the averages or the counter are wrong."""
    num_steps, overflown = 6, (2, 4)
    model = nn.Linear(64, 64).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    ema = ShardedEMA(model, SCHEDULE, overlap=overlap)
    told: list[str] = []
    naive: dict[str, torch.Tensor] = {}

    def update(stepped: torch.optim.Optimizer, *_: object) -> None:
        flag = getattr(stepped, "found_inf", None)
        if len(told) < 2:  # the first updates copy, look for infinities and prepare
            ema.update(found_inf=flag)
            told.append("")
        else:
            told.append(host_waits(lambda: ema.update(found_inf=flag), device))

    hook = optimizer.register_step_post_hook(update)
    for step in range(num_steps):
        loss = model(torch.ones(1, 64, device=device)).sum() * (float("inf") if step in overflown else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step not in overflown:
            for name, parameter in model.named_parameters():
                live = parameter.detach()
                naive[name] = naive.get(name, live).lerp(live, SCHEDULE.momentum(0))
    hook.remove()
    if ema.num_updates != num_steps - len(overflown):
        raise RuntimeError(
            f"{ema.num_updates} updates were counted in {num_steps} steps, of which {overflown} overflew"
        )
    for name, value in ema.full_state_dict().items():
        torch.testing.assert_close(value, naive[name].cpu(), rtol=1e-5, atol=1e-6)
    return {
        "optimizer": f"AdamW(fused=True), {device}{', overlap' if overlap else ''}",
        "steps": str(num_steps),
        "updates": str(ema.num_updates),
        "host waits": next((text for text in told if text not in ("", "no")), told[-1]),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Ratios of an update with each option to a plain one.", rounds=None)
    add_cases(parser)
    options = parser.parse_args(arguments)
    report = Report("variants", options)
    for case in cases(options):
        report.add(str(case), rows(case))
    steps = [overflows(options.device, overlap=overlap) for overlap in (False, True)]
    report.add("steps that overflow", steps)


if __name__ == "__main__":
    main()
