"""The average blended back into the live weights: the right mixture, once, in a rhythm that a resume keeps."""

from __future__ import annotations

import copy
import signal
import sys

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from zoo import build, local_values, set_live

from dist_ema import ConfigError, ConstantSchedule, ShardedEMA, attach
from dist_ema.integrations.watch import Watch
from dist_ema.live.blending import Blending

HALF = ConstantSchedule(momentum=0.5)


def blended_on(layout: str, dtype: torch.dtype) -> None:
    model = build(layout, dtype=dtype)
    set_live(model, 1)
    ema = ShardedEMA(model, HALF)
    ema.update()
    former = local_values(model)
    set_live(model, 2)
    live = local_values(model)
    ema.copy_to_model(weight=0.25)
    for name, value in local_values(model).items():
        expected = torch.lerp(live[name].float(), former[name].float(), 0.25).to(dtype)
        assert torch.equal(value, expected), name
    if layout == "ddp":
        for name, value in local_values(model).items():
            other = value.clone()
            dist.broadcast(other, 0)
            assert torch.equal(value, other), f"the ranks differ in {name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blend_is_the_mixture_of_both_rounded_once(dtype) -> None:
    blended_on("plain", dtype)


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_two_ranks_blend_to_equal_bits(world, layout) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        world(2).run(blended_on, layout, dtype)


def test_a_weight_out_of_range_is_refused_and_changes_nothing() -> None:
    net = nn.Linear(2, 2)
    ema = ShardedEMA(net, HALF)
    ema.update()
    live = copy.deepcopy(net.state_dict())
    for weight in (0.0, -0.5, 1.5, float("nan"), "much"):
        with pytest.raises(ConfigError, match="weight"):
            ema.copy_to_model(weight=weight)
    assert all(torch.equal(value, live[name]) for name, value in net.state_dict().items())


def test_a_mask_of_infinities_stays_a_mask() -> None:
    net = nn.Module()
    net.mask = nn.Parameter(torch.tensor([1.0, -torch.inf]), requires_grad=False)
    ema = ShardedEMA(net, HALF)
    ema.update()
    net.mask.data[0] = 3.0
    ema.copy_to_model(weight=0.5)
    assert net.mask.tolist() == [2.0, -torch.inf]


def test_an_interrupt_within_a_blend_leaves_it_done_once_or_not_at_all(monkeypatch) -> None:
    """Ctrl-C at every call of Python in turn; a blend that was done twice would lie nearer to the average."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    ema = ShardedEMA(net, HALF)
    ema.update()
    averaged = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    live = copy.deepcopy(net.state_dict())
    once = {name: torch.lerp(value, averaged[name], 0.5) for name, value in live.items()}
    outcomes = set()

    def interrupted_at(number: int) -> bool:
        count = 0

        def count_calls(frame, event, argument) -> None:
            nonlocal count
            if event == "call":
                count += 1
                if count == number:
                    signal.raise_signal(signal.SIGINT)

        net.load_state_dict(live)
        sys.setprofile(count_calls)
        try:
            ema.copy_to_model(weight=0.5)
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(None)
        return False

    number = 1
    while interrupted_at(number):
        state = net.state_dict()
        is_live = all(torch.equal(value, live[name]) for name, value in state.items())
        is_once = all(torch.equal(value, once[name]) for name, value in state.items())
        assert is_live or is_once, f"an interrupt at call {number} left something else"
        outcomes.add(is_once)
        number += 1
    assert outcomes == {True, False} and number > 20


def naive_lookahead(net: nn.Module, k: int, alpha: float, num_steps: int, optimizer, train) -> None:
    """Lookahead (arXiv 1907.08610): slow <- slow + alpha (fast - slow); fast <- slow, after every k fast steps."""
    slow = {name: value.clone() for name, value in net.state_dict().items()}
    for step in range(1, num_steps + 1):
        train(net, optimizer, step)
        if step % k == 0:
            for name, value in net.state_dict().items():
                slow[name].lerp_(value, alpha)
                value.copy_(slow[name])


def train(net: nn.Module, optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    net(torch.randn(4, 3, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("k", [1, 3])
def test_lookahead_is_an_average_that_becomes_live_and_leaves_the_optimizer_alone(k) -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    twin = copy.deepcopy(net)
    accelerator = Accelerator(cpu=True)
    net, optimizer = accelerator.prepare(net, torch.optim.Adam(net.parameters(), lr=0.1))
    other = torch.optim.Adam(twin.parameters(), lr=0.1)
    ema = attach(
        accelerator, net, optimizer, ConstantSchedule(momentum=0.4), interval=k, blend_every=k, blend_weight=1.0
    )
    ema.update()  # the slow weights begin where the fast ones do
    for step in range(1, 15):
        train(net, optimizer, step)
    naive_lookahead(twin, k, 0.4, 14, other, train)
    for name, value in net.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        for entry, value in other.state[theirs].items():
            assert torch.equal(optimizer.optimizer.state[mine][entry], value), entry
    ema.detach()


def test_a_resume_in_the_middle_of_a_period_keeps_the_rhythm(tmp_path) -> None:
    def run(first: int, last: int, *, resume: bool = False, save_at: int = 0) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        accelerator = Accelerator(cpu=True)
        net, optimizer = accelerator.prepare(net, torch.optim.Adam(net.parameters(), lr=0.1))
        ema = attach(accelerator, net, optimizer, HALF, blend_every=5)
        if resume:
            accelerator.load_state(tmp_path / "ckpt")
        for step in range(first, last + 1):
            train(net, optimizer, step)
            if step == save_at:
                accelerator.save_state(tmp_path / "ckpt")
        ema.consolidate(tmp_path / "unused")
        ema.detach()
        return {name: value.clone() for name, value in net.state_dict().items()}

    whole = run(1, 14, save_at=8)
    resumed = run(9, 14, resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_skipped_step_brings_no_second_blend() -> None:
    net = nn.Linear(2, 2)
    ema = ShardedEMA(net, HALF)
    watch = Watch(ema, "ema", rank=0, ends=False, blending=Blending.of(2, 0.5, 1))
    live = []
    for skipped in (False, False, True, True, False, False):
        with torch.no_grad():
            net.weight.add_(0.0 if skipped else 1.0)
        before = net.weight.detach().clone()
        watch.update(ema, torch.tensor([float(skipped)]))
        live.append(not torch.equal(net.weight, before))
    assert live == [False, True, False, False, False, True]


def test_the_blends_follow_the_number_of_updates_and_wait_for_one_that_averages() -> None:
    def due(every: int, interval: int) -> list[int]:
        blending = Blending(every=every, weight=0.5, interval=interval)
        return [count for count in range(20) if blending.is_due(count)]

    assert due(5, 1) == [5, 10, 15]
    assert due(5, 5) == [6, 11, 16], "updates number 5, 10, 15, which are those that average"
    assert due(6, 2) == [7, 13, 19]
    assert due(2, 6) == [7, 13, 19]
    assert due(1, 1) == list(range(2, 20)), "update number 0 is a copy"
    assert Blending.of(None, 0.5, 1) is None
    for every, weight in ((0, 0.5), (1.5, 0.5), (2, 0.0), (2, 2.0)):
        with pytest.raises(ConfigError, match="blend_"):
            Blending.of(every, weight, 1)


def test_a_blend_waits_for_the_first_track_to_move_also_where_it_began_later() -> None:
    net = nn.Linear(1, 1, bias=False)
    ema = ShardedEMA(net, {"old": HALF}, interval=3)
    watch = Watch(ema, "ema", rank=0, ends=False, blending=Blending.of(3, 1.0, 3))
    ema.update()
    ema.update()
    ema.add_track("slow", ConstantSchedule(momentum=0.5))  # it averages updates number 2, 5, 8
    ema.drop_track("old")
    blended = []
    for step in range(2, 10):
        nn.init.constant_(net.weight, float(step))
        watch.update(ema, None)
        if net.weight.item() != step:
            blended.append((step, net.weight.item()))
    assert blended == [(5, 3.5), (8, 5.75)], "slow weights that have not moved were put back"
