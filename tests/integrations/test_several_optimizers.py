"""Several optimizers of one model under accelerate: one update for a round of their steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerated import SCHEDULE, accelerator_of
from layouts_zoo import read_whole
from oracle import NaiveAverage
from torch import nn
from twins import assert_same_bits

from dist_ema import AttachError, ShardedEMA, attach
from dist_ema.integrations.accelerate_steps import _Rounds


def pair(accelerator: Accelerator, *, second: type = torch.optim.AdamW, **options: Any) -> tuple[nn.Module, list[Any]]:
    """A model whose matrices one optimizer steps, and whose norms another one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    rest = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=0.01)
    model, *optimizers = accelerator.prepare(model, muon, second(rest, lr=0.01, **options))
    return model, optimizers


def learn(accelerator: Accelerator, model: nn.Module, optimizers: list[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    accelerator.backward(model(torch.randn(3, 4, generator=generator)).square().mean())
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def muon_and_adamw(layout: str, folder: str) -> None:
    naive = NaiveAverage(SCHEDULE.momentum)
    with accelerator_of(layout) as accelerator:
        model, optimizers = pair(accelerator)
        ema = attach(accelerator, model, optimizers, SCHEDULE)
        for step in range(4):
            learn(accelerator, model, optimizers, step)
            naive.update(read_whole(model))
        assert ema.num_updates == 4
        if layout == "ddp":
            accelerator.save_state(folder)
            assert ema.num_updates == 4
        else:  # accelerate's save_state looks for one model per optimizer under FSDP, and raises an IndexError
            ema.save(f"{folder}/ema")
            live = {name: value.detach().clone() for name, value in model.state_dict().items()}
            kept = [optimizer.state_dict() for optimizer in optimizers]
    with accelerator_of(layout) as accelerator:
        model, optimizers = pair(accelerator)
        ema = attach(accelerator, model, optimizers, SCHEDULE)
        if layout == "ddp":
            accelerator.load_state(folder)
        else:
            model.load_state_dict(live)
            ema.load(f"{folder}/ema")
            for optimizer, state in zip(optimizers, kept, strict=True):
                optimizer.load_state_dict(state)
        for step in range(4, 6):
            learn(accelerator, model, optimizers, step)
            naive.update(read_whole(model))
        assert ema.num_updates == 6
        whole = ema.full_state_dict()
        if dist.get_rank() == 0:
            assert_same_bits(whole, naive.values)
        ema.detach()
        learn(accelerator, model, optimizers, 6)
        assert ema.num_updates == 6
        assert not any("step" in vars(optimizer) for optimizer in optimizers)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_muon_and_adamw_have_one_update_for_both_and_a_resume_goes_on(world, tmp_path, layout) -> None:
    world(2).run(muon_and_adamw, layout, str(tmp_path / "ckpt"))


@pytest.mark.parametrize(
    ("turns", "num_updates"),
    [("AB" * 3, 3), ("BA" * 3, 3), ("AAAAAB" * 2, 2), ("A" * 5, 0), ("ABBABB", 2), ("AABB", 1), ("", 0)],
)
def test_an_update_follows_when_each_optimizer_has_stepped_since_the_last(turns, num_updates) -> None:
    ended = []
    rounds = _Rounds(2, ended.append)
    for turn in turns:
        rounds.step("AB".index(turn), None)
    assert ended == [None] * num_updates


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_step_that_the_scaler_skips_for_one_optimizer_does_not_shift_the_later_updates(world, fused) -> None:
    world(1).run(skipped_for_one, fused)


def skipped_for_one(fused: bool) -> None:
    with accelerator_of("plain") as accelerator:
        torch.manual_seed(0)
        model = nn.ModuleDict({"first": nn.Linear(1, 1), "second": nn.Linear(1, 1)})
        made = [torch.optim.SGD(model[name].parameters(), lr=0.1, fused=fused) for name in model]
        model, *optimizers = accelerator.prepare(model, *made)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        for optimizer in optimizers:
            # As accelerate makes them on a GPU.
            type(optimizer).__init__(optimizer, optimizer.optimizer, device_placement=False, scaler=scaler)
        ema = attach(accelerator, model, optimizers, SCHEDULE)
        model = accelerator.unwrap_model(model)
        seen = []
        for poisoned in ("", "first", "", "second", "", "first second", ""):
            for name in ("first", "second"):
                factor = float("inf") if name in poisoned else 1.0
                scaler.scale(sum(value.sum() for value in model[name].parameters()) * factor).backward()
            before = {name: model[name].bias.item() for name in model}
            for name, optimizer in zip(("first", "second"), optimizers, strict=True):
                num_before = ema.num_updates
                optimizer.step()
                optimizer.zero_grad()
                if ema.num_updates > num_before:
                    seen.append((name, poisoned))
            assert all((model[name].bias.item() == before[name]) == (name in poisoned) for name in model)
        assert seen == [("second", "")] * 4, seen
        assert ema.num_updates == 4


def scheduled_later() -> None:
    """A scheduler that is built on the prepared optimizer binds the `step` that it meets."""
    with accelerator_of("plain") as accelerator:
        model, optimizers = pair(accelerator)
        ema = attach(accelerator, model, optimizers, SCHEDULE)
        schedulers = [torch.optim.lr_scheduler.ConstantLR(optimizer) for optimizer in optimizers]
        for step in range(2):
            learn(accelerator, model, optimizers, step)
            for scheduler in schedulers:
                scheduler.step()
        assert ema.num_updates == 2


def test_a_scheduler_that_is_built_after_attach_does_not_break_the_steps(world) -> None:
    world(1).run(scheduled_later)


def micro_batches() -> None:
    with accelerator_of("ddp", gradient_accumulation_steps=3) as accelerator:
        model, optimizers = pair(accelerator)
        ema = attach(accelerator, model, optimizers, SCHEDULE)
        for step in range(7):
            with accelerator.accumulate(model):
                learn(accelerator, model, optimizers, step)
        assert ema.num_updates == 2


def test_micro_batches_are_no_turns_of_the_optimizers(world) -> None:
    world(2).run(micro_batches)


def refusals() -> list[str]:
    with accelerator_of("ddp") as accelerator:
        model, (muon, adamw) = pair(accelerator)
        other = accelerator.prepare(torch.optim.SGD([torch.zeros(1)], lr=0.1))
        bad = [[], [muon, muon], [muon, other], [muon, adamw.optimizer], (muon, None)]
        messages = []
        for optimizers in bad:
            with pytest.raises(AttachError) as caught:
                attach(accelerator, model, optimizers, SCHEDULE)
            messages.append(str(caught.value))
        # Nothing of the refused calls is left behind.
        assert isinstance(attach(accelerator, model, (muon, adamw), SCHEDULE), ShardedEMA)
    return messages


def test_lists_of_optimizers_that_cannot_be_followed_are_refused_alike_on_every_rank(world) -> None:
    first, second = world(2).run(refusals)
    assert first == second
    for message, said in zip(first, ("empty", "twice", "none of the model's", "AdamW", "NoneType"), strict=True):
        assert said in message
