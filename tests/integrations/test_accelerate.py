"""The average wired into accelerate: its hooks, its checkpoints, and what they refuse."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerated import SCHEDULE, accelerator_of, prepared, take_step
from layouts_zoo import read_whole
from oracle import NaiveAverage
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from twins import assert_same_bits
from zoo import Nasty, set_live

from dist_ema import (
    AttachError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    ConstantSchedule,
    DistEMAError,
    ShardedEMA,
    SwapError,
    UnsupportedModelError,
    attach,
)


def naive_after(num_steps: int, layout: str) -> NaiveAverage:
    naive = NaiveAverage(SCHEDULE.momentum)
    for step in range(num_steps):
        naive.update(set_live(Nasty(scalar=layout != "fsdp2"), step))
    return naive


def save_run(layout: str, folder: str, optimizer_kind: str) -> None:
    with accelerator_of(layout) as accelerator:
        model, optimizer = prepared(accelerator, layout, optimizer_kind)
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        for step in range(4):
            take_step(model, optimizer, step)
        assert ema.num_updates == 4
        accelerator.save_state(folder)
        assert ema.num_updates == 4
        state = ema.full_state_dict()
        if dist.get_rank() == 0:
            assert_same_bits(state, naive_after(4, layout).values)
            assert_same_bits(state, load_file(os.path.join(folder, "ema", "model.safetensors")))


def resume_run(layout: str, folder: str, optimizer_kind: str) -> None:
    with accelerator_of(layout) as accelerator:
        model, optimizer = prepared(accelerator, layout, optimizer_kind)
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        accelerator.load_state(folder)
        assert ema.num_updates == 4
        for step in range(4, 9):
            take_step(model, optimizer, step)
        state = ema.full_state_dict()
        if dist.get_rank() == 0:
            assert_same_bits(state, naive_after(9, layout).values)


@pytest.mark.parametrize(("layout", "optimizer"), [("ddp", "adamw"), ("fsdp2", "adamw"), ("fsdp2", "sgd")])
def test_resume_on_1_and_3_ranks_equals_the_uninterrupted_run(world, tmp_path, layout, optimizer) -> None:
    world(2).run(save_run, layout, str(tmp_path / "ckpt"), optimizer)
    for size in (1, 3):
        world(size).run(resume_run, layout, str(tmp_path / "ckpt"), optimizer)


def phantom_steps(folder: str, optimizer_kind: str) -> None:
    with accelerator_of("fsdp2") as accelerator:
        model, optimizer = prepared(accelerator, "fsdp2", optimizer_kind)
        fired = []
        optimizer.optimizer.register_step_post_hook(lambda *ignored: fired.append(1))
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        accelerator.save_state(folder)
        assert fired, "torch no longer initialises the optimizer by a step: the guard can go"
        assert ema.num_updates == 0
        for step in range(3):
            take_step(model, optimizer, step)
        assert ema.num_updates == 3
        accelerator.save_state(folder)
        assert ema.num_updates == 3
    with accelerator_of("fsdp2") as accelerator:
        model, optimizer = prepared(accelerator, "fsdp2", optimizer_kind)
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        accelerator.load_state(folder)
        assert ema.num_updates == 3
        take_step(model, optimizer, 3)
        state = ema.full_state_dict()
        if dist.get_rank() == 0:
            assert_same_bits(state, naive_after(4, "fsdp2").values)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_phantom_step_of_dcp_is_not_counted(world, tmp_path, optimizer) -> None:
    """DCP calls `optimizer.step()` to create an empty state; a stateless SGD sees it at every save."""
    world(2).run(phantom_steps, str(tmp_path / "ckpt"), optimizer)


def accumulated(layout: str) -> None:
    with accelerator_of(layout, gradient_accumulation_steps=3) as accelerator:
        model, optimizer = prepared(accelerator, layout)
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        tokens = torch.randint(0, 11, (2, 3))
        for _ in range(7):
            with accelerator.accumulate(model):
                accelerator.backward(model(tokens).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        assert ema.num_updates == 2


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_update_follows_optimizer_steps_and_not_micro_batches(world, layout) -> None:
    world(2).run(accumulated, layout)


def scaler_skips() -> None:
    """An unfused optimizer's step that the GradScaler skips does not fire the hook."""
    with accelerator_of("plain") as accelerator:
        model, optimizer = prepared(accelerator, "plain")
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        scaler = torch.amp.GradScaler("cpu")
        for poison in (False, True, False, True, False):
            loss = sum(parameter.square().sum() for parameter in model.parameters() if parameter.requires_grad)
            scaler.scale(loss * (float("inf") if poison else 1.0)).backward()
            scaler.step(optimizer.optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert ema.num_updates == 3


def test_steps_skipped_by_the_grad_scaler_are_not_counted(world) -> None:
    world(1).run(scaler_skips)


def two_averages(folder: str) -> None:
    with accelerator_of("ddp") as accelerator:
        model, optimizer = prepared(accelerator, "ddp")
        short = attach(accelerator, model, optimizer, ConstantSchedule(momentum=0.5), name="short")
        attach(accelerator, model, optimizer, ConstantSchedule(momentum=0.01), name="long")
        with pytest.raises(AttachError, match="attached already"):
            attach(accelerator, model, optimizer, SCHEDULE, name="long")
        take_step(model, optimizer, 0)
        short.detach()
        take_step(model, optimizer, 1)
        assert short.num_updates == 1
        accelerator.save_state(folder)
        attach(accelerator, model, optimizer, SCHEDULE, name="short")


def test_detach_removes_the_hooks_and_frees_the_name(world, tmp_path) -> None:
    world(2).run(two_averages, str(tmp_path / "ckpt"))
    assert (tmp_path / "ckpt" / "long" / "manifest.json").exists()
    assert not (tmp_path / "ckpt" / "short").exists()


def automatic_naming(folder: str) -> None:
    from accelerate.utils import ProjectConfiguration

    configuration = ProjectConfiguration(project_dir=folder, automatic_checkpoint_naming=True, total_limit=2)
    with accelerator_of("ddp", project_config=configuration) as accelerator:
        model, optimizer = prepared(accelerator, "ddp")
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        for step in range(4):
            take_step(model, optimizer, step)
            accelerator.save_state()
            accelerator.wait_for_everyone()
        take_step(model, optimizer, 9)
        accelerator.load_state()
        assert ema.num_updates == 4


def test_automatic_checkpoint_naming_and_its_limit_work(world, tmp_path) -> None:
    world(2).run(automatic_naming, str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint_2", "checkpoint_3"]


def refusals() -> list[str]:
    messages = []

    def refused(error: type[DistEMAError], *arguments: Any, **options: Any) -> None:
        with pytest.raises(error) as caught:
            attach(*arguments, **options)
        messages.append(str(caught.value))

    with accelerator_of("ddp") as accelerator:
        raw_model = nn.Linear(3, 2)
        raw_optimizer = torch.optim.SGD(raw_model.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(raw_model, raw_optimizer)
        other, other_optimizer = accelerator.prepare(nn.Linear(3, 2), torch.optim.SGD([torch.zeros(1)], lr=0.1))
        refused(AttachError, accelerator, nn.Linear(3, 2), optimizer, SCHEDULE)
        refused(AttachError, accelerator, model, raw_optimizer, SCHEDULE)
        refused(AttachError, accelerator, model, other_optimizer, SCHEDULE)
        refused(AttachError, accelerator, other, optimizer, SCHEDULE)
        refused(AttachError, "accelerator", model, optimizer, SCHEDULE)
        refused(ConfigError, accelerator, model, optimizer, SCHEDULE, name="../ema")
        refused(ConfigError, accelerator, model, optimizer, 0.999)
        refused(ConfigError, accelerator, model, optimizer, SCHEDULE, interval=0)
        refused(ConfigError, accelerator, model, optimizer, SCHEDULE, exclude="lm_head.*")
        refused(UnsupportedModelError, accelerator, model, optimizer, SCHEDULE, exclude="*")
        refused(ConfigError, accelerator, model, optimizer, SCHEDULE, decay=0.9)
        # Nothing of the refused calls is left behind.
        ema = attach(accelerator, accelerator.unwrap_model(model), optimizer, SCHEDULE)
        assert isinstance(ema, ShardedEMA)
    return messages


def test_what_cannot_be_attached_is_refused_alike_on_every_rank(world) -> None:
    first, second = world(2).run(refusals)
    assert first == second
    assert "accelerator.prepare" in first[0] and "accelerator.prepare" in first[1]
    assert "trained parameters" in first[2]


def checkpoint_without_average(folder: str) -> tuple[str, str]:
    with accelerator_of("ddp") as accelerator:
        model, optimizer = prepared(accelerator, "ddp")
        accelerator.save_state(folder)
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        take_step(model, optimizer, 0)
        with pytest.raises(CheckpointNotFoundError) as caught:
            accelerator.load_state(folder)
        assert ema.num_updates == 1
        accelerator.wait_for_everyone()
        os.makedirs(os.path.join(folder, "ema"), exist_ok=True)
        with open(os.path.join(folder, "ema", f"foreign-{dist.get_rank()}"), "w") as file:
            file.write("somebody's")
        accelerator.wait_for_everyone()
        with pytest.raises(CheckpointError) as in_the_way:
            accelerator.save_state(folder)
    return str(caught.value), str(in_the_way.value)


def test_a_checkpoint_without_the_average_and_a_folder_in_the_way_are_told_on_every_rank(world, tmp_path) -> None:
    first, second = world(2).run(checkpoint_without_average, str(tmp_path / "ckpt"))
    assert first == second and "written by save_state once the average is attached" in first[0]
    assert "no saved average" in first[1]


def dynamo() -> None:
    with accelerator_of("ddp", dynamo_backend="eager") as accelerator:
        model, optimizer = prepared(accelerator, "ddp")
        inner = model._orig_mod
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        assert model._orig_mod is inner, "attach must not unwrap the user's model"
        take_step(inner, optimizer, 0)
        assert ema.num_updates == 1


def test_a_model_compiled_by_accelerate_is_accepted_and_left_alone(world) -> None:
    world(2).run(dynamo)


def ranks_that_train_apart() -> str:
    """Without cpu=True accelerate takes every process of a CPU run for the only one."""
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        accelerator = Accelerator()
        assert accelerator.num_processes == 1
        model, optimizer = prepared(accelerator, "plain")
        with pytest.raises(AttachError) as caught:
            attach(accelerator, model, optimizer, SCHEDULE)
        return str(caught.value)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_processes_that_accelerate_takes_for_single_ones_are_refused(world) -> None:
    messages = world(2).run(ranks_that_train_apart)
    assert "Accelerator(cpu=True)" in messages[0]


def released(folder: str) -> None:
    with accelerator_of("ddp") as accelerator:
        model, optimizer = prepared(accelerator, "ddp")
        attach(accelerator, model, optimizer, SCHEDULE)
        accelerator.free_memory()
        model, optimizer = prepared(accelerator, "ddp")
        ema = attach(accelerator, model, optimizer, SCHEDULE, name="second")
        take_step(model, optimizer, 0)
        accelerator.save_state(folder)
        assert ema.num_updates == 1


def test_an_average_of_a_model_that_was_released_is_no_longer_saved(world, tmp_path) -> None:
    world(2).run(released, str(tmp_path / "ckpt"))
    assert (tmp_path / "ckpt" / "second").exists() and not (tmp_path / "ckpt" / "ema").exists()


def two_models(folder: str) -> None:
    with accelerator_of("ddp") as accelerator:
        pairs = [prepared(accelerator, "ddp") for _ in range(2)]
        emas = [attach(accelerator, *pair, SCHEDULE, name=name) for pair, name in zip(pairs, "ab", strict=True)]
        take_step(*pairs[0], 0)
        take_step(*pairs[1], 0)
        take_step(*pairs[1], 1)
        assert [ema.num_updates for ema in emas] == [1, 2]
        accelerator.save_state(folder)
        take_step(*pairs[0], 1)
        accelerator.load_state(folder)
        assert [ema.num_updates for ema in emas] == [1, 2]


def test_several_models_have_an_average_each(world, tmp_path) -> None:
    world(2).run(two_models, str(tmp_path / "ckpt"))


def closures() -> None:
    with accelerator_of("plain") as accelerator:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
        model, optimizer = accelerator.prepare(model, optimizer)
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        calls = []

        def closure() -> torch.Tensor:
            calls.append(1)
            optimizer.zero_grad()
            loss = model(torch.ones(2, 3)).square().mean()
            accelerator.backward(loss)
            return loss

        for _ in range(3):
            optimizer.step(closure)
        assert len(calls) > 3 and ema.num_updates == 3


def test_a_closure_evaluated_several_times_is_one_step(world) -> None:
    world(1).run(closures)


def adapters(layout: str, folder: str) -> None:
    with accelerator_of(layout) as accelerator:
        torch.manual_seed(0)
        model = Nasty(scalar=False)
        model.requires_grad_(False)
        model.hidden.requires_grad_(True)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.hidden.parameters(), lr=0.1))
        ema = attach(accelerator, model, optimizer, SCHEDULE, include="hidden.*")
        assert {shard.fqn for shard in ema.shards} <= {"hidden.weight", "hidden.bias"}
        for _ in range(2):
            accelerator.backward(model(torch.tensor([[1, 2]])).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        total = accelerator.reduce(torch.tensor(ema.nbytes))
        assert total.item() == 4 * (7 * 5 + 7)
        ema.save(folder)
        if dist.get_rank() == 0:
            assert set(load_file(os.path.join(folder, "model.safetensors"))) >= {"embed.weight", "hidden.weight"}


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_only_the_adapters_of_a_frozen_backbone_are_averaged(world, tmp_path, layout) -> None:
    world(2).run(adapters, layout, str(tmp_path / "ema"))


def fused_overflow() -> None:
    with accelerator_of("plain") as accelerator:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        scaler = torch.amp.GradScaler("cpu")
        for overflow in (False, True, False, True, False):
            scaler.scale(model(torch.ones(1, 3)).sum() * (float("inf") if overflow else 1.0)).backward()
            scaler.step(optimizer.optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert ema.num_updates == 3


def test_steps_that_a_fused_optimizer_skips_are_not_counted(world) -> None:
    """accelerate#4242: 6 hooks for 4 updates."""
    world(1).run(fused_overflow)


def save_while_swapped(layout: str, folder: str) -> None:
    with accelerator_of(layout) as accelerator:
        model, optimizer = prepared(accelerator, layout)
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        take_step(model, optimizer, 0)
        with ema.average_parameters(), pytest.raises(SwapError, match="average_parameters"):
            accelerator.save_state(folder)
        accelerator.save_state(folder)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_save_state_while_swapped_is_refused(world, tmp_path, layout) -> None:
    """A run must not resume from averaged weights as if they were live (schnetpack#785, nequip#590)."""
    world(2).run(save_while_swapped, layout, str(tmp_path / "ckpt"))


def compiled_step() -> None:
    with accelerator_of("plain") as accelerator:
        model, optimizer = prepared(accelerator, "plain")
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        step = torch.compile(optimizer.optimizer.step, backend="eager")
        for seed in range(3):
            set_live(model, seed)
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            step()
        assert ema.num_updates == 3


def test_a_compiled_optimizer_step_is_counted(world) -> None:
    world(1).run(compiled_step)


def taught(accelerator: Accelerator, layout: str, seed: int) -> tuple[nn.Module, Any, nn.Module, ShardedEMA]:
    """A student that accelerate has prepared, and its teacher, which it need not know."""

    def build() -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4))

    student = build()
    student, optimizer = accelerator.prepare(student, torch.optim.SGD(student.parameters(), lr=0.1))
    teacher = build().requires_grad_(False)
    if layout == "fsdp2":
        fully_shard(teacher, mesh=next(student.parameters()).device_mesh)
    return student, optimizer, teacher, attach(accelerator, student, optimizer, SCHEDULE, into=teacher)


def take_taught_step(student: nn.Module, optimizer: Any, teacher: nn.Module, *, stepping: bool = True) -> None:
    batch = torch.arange(24.0).view(8, 3).cos()  # the same on every rank, so that any number of them trains alike
    with torch.no_grad():
        target = teacher(batch)
    (student(batch) + target.roll(1, 1)).square().mean().backward()
    if stepping:
        optimizer.step()
    optimizer.zero_grad()


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    names = {name.removeprefix("module."): value.clone() for name, value in model.named_buffers()}
    return {**read_whole(model), **names}


def save_taught(layout: str, folder: str, num_steps: int) -> list[dict[str, torch.Tensor]]:
    """What the teacher shows at the save, and one step later."""
    with accelerator_of(layout) as accelerator:
        student, optimizer, teacher, ema = taught(accelerator, layout, seed=0)
        for _ in range(2):
            take_taught_step(student, optimizer, teacher, stepping=False)  # moves the buffers of BatchNorm alone
        for _ in range(num_steps):
            take_taught_step(student, optimizer, teacher)
        accelerator.save_state(folder)
        shown = [everything(teacher if num_steps else student)]
        take_taught_step(student, optimizer, teacher)
        assert ema.num_updates == num_steps + 1
        return [*shown, everything(teacher)]


def resume_taught(layout: str, folder: str, num_steps: int) -> list[dict[str, torch.Tensor]]:
    with accelerator_of(layout) as accelerator:
        student, optimizer, teacher, ema = taught(accelerator, layout, seed=1)
        accelerator.load_state(folder)
        assert ema.num_updates == num_steps
        shown = [everything(teacher)]
        take_taught_step(student, optimizer, teacher)
        return [*shown, everything(teacher)]


@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize(("layout", "size", "resumed_size"), [("ddp", 1, 2), ("ddp", 2, 2), ("fsdp2", 2, 1)])
def test_a_teacher_travels_with_the_checkpoints_of_accelerate(
    world, tmp_path, layout, size, resumed_size, num_steps
) -> None:
    folder = str(tmp_path / "ckpt")
    saved = world(size).run(save_taught, layout, folder, num_steps)[0]
    for resumed in world(resumed_size).run(resume_taught, layout, folder, num_steps):
        assert_same_bits(resumed[0], saved[0])
        torch.testing.assert_close(resumed[1], saved[1])


def a_teacher_without_its_average(folder: str) -> str:
    with accelerator_of("ddp") as accelerator:
        student, optimizer, _, ema = taught(accelerator, "ddp", seed=0)
        ema.detach()
        accelerator.save_state(folder)
        teacher = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4)).requires_grad_(False)
        with pytest.raises(ConfigError) as caught:
            attach(accelerator, student, optimizer, SCHEDULE, into=teacher, on_missing="live")
        set_live(student, 1)
        accelerator.load_state(folder)
        attach(accelerator, student, optimizer, SCHEDULE, into=teacher)
        assert_same_bits(everything(teacher), everything(student))
    return str(caught.value)


def test_a_teacher_begins_with_the_loaded_weights_where_the_checkpoint_has_no_average(world, tmp_path) -> None:
    """accelerate loads the model after our hook, so that on_missing="live" would leave the teacher a step behind."""
    told = world(2).run(a_teacher_without_its_average, str(tmp_path / "ckpt"))
    assert told[0] == told[1] and "attach after load_state" in told[0]


def registered(folder: str) -> list[str]:
    with accelerator_of("ddp") as accelerator:
        model, optimizer = prepared(accelerator, "ddp")
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        with pytest.raises(ConfigError) as caught:
            accelerator.register_for_checkpointing(ema)
        with pytest.raises(ConfigError):
            accelerator.register_for_checkpointing(ema.stateful())
        take_step(model, optimizer, 0)
        accelerator.save_state(folder)  # nothing of it was registered
        assert not [name for name in os.listdir(folder) if name.startswith("custom_checkpoint")]
    return [str(caught.value)]


@pytest.mark.parametrize("size", [1, 2])
def test_registering_an_average_for_checkpoints_of_the_main_process_is_refused(world, tmp_path, size) -> None:
    """One process too: its checkpoint would not go on on several ranks."""
    answers = world(size).run(registered, str(tmp_path / "ckpt"))
    assert all("attach(" in text for (text,) in answers)
