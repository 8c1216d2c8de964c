"""An interrupt on one rank of two while all put averages into their models: nobody waits, nothing half done stays."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist_ema
from dist_ema import CommunicationError, ConstantSchedule, ShardedEMA

PACKAGE = str(Path(dist_ema.__file__).parent)
CALLS = ("average_parameters", "copy_to_model", "sharded_state_dict")


class InterruptAt:
    """Raises KeyboardInterrupt at the k-th line of the package that this thread comes to."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.count = 0

    def __enter__(self) -> None:
        sys.settrace(lambda frame, event, arg: self._line if frame.f_code.co_filename.startswith(PACKAGE) else None)

    def __exit__(self, *raised: object) -> None:
        sys.settrace(None)

    def _line(self, frame: object, event: str, arg: object) -> object:
        if event == "line":
            self.count += 1
            if self.count == self.number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


class InterruptAfter:
    """Sends SIGINT to this process after some seconds, and once more a little later."""

    def __init__(self, seconds: float, again: float) -> None:
        self._threads = [threading.Timer(each, signal.raise_signal, [signal.SIGINT]) for each in (seconds, again)]

    def __enter__(self) -> None:
        for each in self._threads:
            each.start()

    def __exit__(self, *raised: object) -> None:
        for each in self._threads:
            each.cancel()


def built() -> tuple[nn.Module, ShardedEMA]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model = DistributedDataParallel(net)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.5))
    for _ in range(3):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(1.0)
        ema.update()
    net[1].running_mean.fill_(float(dist.get_rank()))
    return net, ema


def values(net: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().reshape(-1).float() for value in net.state_dict().values()])


def call_once(ema: ShardedEMA, call: str) -> None:
    if call == "average_parameters":
        with ema.average_parameters():
            pass
    else:
        getattr(ema, call)()


def interrupted_everywhere(call: str, interrupts: list[Callable[[], object]]) -> list[str]:
    """On rank 0 one interrupt in each call; what went wrong. Rank 1 is told soon, or has made the whole call."""
    net, ema = built()
    live, bad = values(net), []
    averaged = values(net) if call == "copy_to_model" else None
    if averaged is not None:
        ema.copy_to_model()
        averaged = values(net)
        net.load_state_dict(dict(zip(net.state_dict(), split_like(net, live), strict=True)))
    for number, make in enumerate(interrupts):
        began, told, calls = time.monotonic(), "nothing", ema._exchange.num_calls
        try:
            if dist.get_rank() == 0:
                with make():  # type: ignore[attr-defined]
                    call_once(ema, call)
            else:
                call_once(ema, call)
        except KeyboardInterrupt:
            told = "interrupt"
            if ema._exchange.num_calls == calls:  # before its arrival: the others wait for it
                call_once(ema, call)
        except CommunicationError:
            told = "communication"
        now = values(net)
        if averaged is not None and torch.equal(now, averaged):
            net.load_state_dict(dict(zip(net.state_dict(), split_like(net, live), strict=True)))
        elif not torch.equal(now, live):
            bad.append(f"{number}: the weights are neither ({told})")
        if ema._state.swapped is not None:
            bad.append(f"{number}: the swap has no end ({told})")
        if time.monotonic() - began > 8:
            bad.append(f"{number}: {time.monotonic() - began:.0f} s ({told})")
        expected = ("interrupt", "nothing") if dist.get_rank() == 0 else ("communication", "nothing")
        if told not in expected:
            bad.append(f"{number}: {told}")
        try:
            count = ema.metrics()["ema/num_updates"]  # a call that all ranks make works
        except Exception as error:
            bad.append(f"{number}: the next call raised {error!r}"[:300])
            continue
        if count != 3:
            bad.append(f"{number}: {count} updates")
    return bad


def split_like(net: nn.Module, flat: torch.Tensor) -> list[torch.Tensor]:
    tensors = list(net.state_dict().values())
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def lines_of(call: str) -> int:
    """How many lines of the package a call takes, on rank 0."""
    _, ema = built()
    counter = InterruptAt(0)
    with counter:
        call_once(ema, call)
    return counter.count


def at_lines(call: str, start: int, stop: int, step: int) -> list[str]:
    return interrupted_everywhere(call, [lambda k=k: InterruptAt(k) for k in range(start, stop, step)])


def at_times(call: str, seconds: list[tuple[float, float]]) -> list[str]:
    # Not the default handler of a test world: a handler that raises, as Python's own for Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return interrupted_everywhere(call, [lambda each=each: InterruptAfter(*each) for each in seconds])


@pytest.mark.parametrize("call", CALLS)
def test_a_rank_that_is_interrupted_while_averages_are_shared_leaves_nobody_waiting(world, call) -> None:
    count = world(2).run(lines_of, call)[0]
    assert count > 100
    assert world(2).run(at_lines, call, 1, count, max(1, count // 60)) == [[], []]


def test_a_signal_at_any_time_of_a_swap_of_several_ranks_leaves_nobody_waiting(world) -> None:
    times = [(0.0002 * number, 0.0002 * number + 0.0003 * (number % 3)) for number in range(1, 40)]
    assert world(2).run(at_times, "average_parameters", times) == [[], []]
