"""What would lose, spoil or waste an average without a word is told: once, on rank 0, with what to do."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerated import accelerator_of, prepared, take_step
from torch import nn
from zoo import Nasty

from dist_ema import (
    ConstantSchedule,
    CosineSchedule,
    EqualSchedule,
    PowerSchedule,
    RankMismatchError,
    ShardedEMA,
    after,
    attach,
    every,
    scaled_batch,
)
from dist_ema.integrations import watch

SCHEDULE = ConstantSchedule(momentum=0.25)


@contextmanager
def within(folder: str) -> Iterator[None]:
    """In that folder; `contextlib.chdir` came with Python 3.11."""
    former = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(former)


@contextmanager
def warned() -> Iterator[list[str]]:
    """The messages of our warnings inside, whatever the filters say."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    messages = [str(each.message) for each in caught]
    told += [each for each in messages if "average" in each and "existing checkpoint" not in each]  # torch's DCP


def on_rank_0(told: list[str], number: int = 1) -> None:
    """Warned that often, by rank 0 alone."""
    assert len(told) == (number if dist.get_rank() == 0 else 0), told


# A save that replaces a better average


def attached_after_the_load(layout: str, folder: str) -> list[str]:
    with accelerator_of(layout) as accelerator:
        model, optimizer = prepared(accelerator, layout)
        attach(accelerator, model, optimizer, SCHEDULE)
        for step in range(5):
            take_step(model, optimizer, step)
        accelerator.save_state(folder)
    with accelerator_of(layout) as accelerator:
        model, optimizer = prepared(accelerator, layout)
        accelerator.load_state(folder)
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        take_step(model, optimizer, 5)
        take_step(model, optimizer, 6)
        with warned() as told:
            accelerator.save_state(folder)
            ema.save(os.path.join(folder, "ema"))
        on_rank_0(told)
        take_step(model, optimizer, 7)
        with warned() as again:
            accelerator.save_state(folder)
        assert not again
    return told


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_better_average_is_not_overwritten_without_a_word(world, tmp_path, layout) -> None:
    """ace#349, Samudra#282: attached after load_state, the average began anew, and the checkpoint lost its own."""
    (told,), _ = world(2).run(attached_after_the_load, layout, str(tmp_path / "ckpt"))
    assert "of 5 updates" in told and "by one of 2" in told and "attach before load_state" in told


def attached_after_the_load_and_caught_up(folder: str) -> list[str]:
    for run in range(2):
        with accelerator_of("plain") as accelerator:
            model, optimizer = prepared(accelerator, "plain")
            if run:
                accelerator.load_state(folder)
            attach(accelerator, model, optimizer, SCHEDULE)
            for step in range(5):
                take_step(model, optimizer, step)
            with warned() as told:
                accelerator.save_state(folder)
            with warned() as again:
                accelerator.save_state(folder)
            assert not again and (run or not told)
    return told


def test_an_average_that_was_not_loaded_is_told_of_though_the_new_one_has_as_many_updates(world, tmp_path) -> None:
    """A folder for the latest checkpoint, and as many steps between two saves: 5 updates over 5, where 10 are right."""
    ((told,),) = world(1).run(attached_after_the_load_and_caught_up, str(tmp_path / "latest"))
    assert "of 5 updates" in told and "by one of 5" in told and "attach before load_state" in told


def saved_beside(folder: str) -> None:
    with (
        accelerator_of("plain") as accelerator,
        within(folder),
    ):
        model, optimizer = prepared(accelerator, "plain")
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        take_step(model, optimizer, 0)
        accelerator.save_state("~/ckpt")
        beside = os.listdir(os.path.join("~", "ckpt"))
        assert "ema" in beside and len(beside) > 1, beside
        take_step(model, optimizer, 1)
        accelerator.load_state("./~/ckpt")  # accelerate looks for ~ in the home directory here
        assert ema.num_updates == 1


def test_the_average_lies_beside_what_accelerate_writes_whatever_the_folder_is_called(world, tmp_path) -> None:
    """accelerate takes ~ for a name like any other; the average went to the home directory."""
    world(1).run(saved_beside, str(tmp_path))


def saved(folder: Path, num_updates: int) -> ShardedEMA:
    ema = ShardedEMA(nn.Linear(2, 2), SCHEDULE)
    for _ in range(num_updates):
        ema.update()
    ema.save(folder)
    return ema


@pytest.mark.parametrize("background", [False, True])
def test_without_accelerate_too_a_save_over_more_updates_is_told_once(tmp_path, background) -> None:
    saved(tmp_path / "ema", 4)
    ema = ShardedEMA(nn.Linear(2, 2), SCHEDULE)
    ema.update()
    with pytest.warns(UserWarning, match="of 4 updates.*by one of 1") as caught:
        ema.save(tmp_path / "ema", background=background)
    assert [each.filename for each in caught] == [__file__]
    ema.wait()
    saved(tmp_path / "other", 9)
    ema.save(tmp_path / "other", background=background)
    ema.wait()


def test_what_the_user_chose_to_begin_earlier_or_writes_elsewhere_is_not_doubted(tmp_path) -> None:
    """Warnings are errors here."""
    older, newer = tmp_path / "older", tmp_path / "newer"
    for begin in (
        lambda ema: ema.load(older),
        lambda ema: ema.restart(),
        lambda ema: ema.start_from(older / "model.safetensors"),
        lambda ema: ema.load_sharded_state_dict(ema.sharded_state_dict()),
    ):
        saved(older, 2), saved(newer, 6)
        ema = ShardedEMA(nn.Linear(2, 2), SCHEDULE)
        begin(ema)
        ema.update()
        ema.save(newer)
    former = saved(tmp_path / "same", 3)
    former.save(tmp_path / "same")
    former.snapshot(tmp_path / "snapshots")
    former.update()
    former.save(tmp_path / "same")
    saved(tmp_path / "smoke", 2)
    ShardedEMA(nn.Linear(2, 2), SCHEDULE).save(tmp_path / "smoke")
    ShardedEMA(nn.Linear(2, 2), SCHEDULE).save(tmp_path / "fresh")
    (tmp_path / "fresh" / "manifest.json").write_text("damaged")
    saved(tmp_path / "fresh", 1)


# A save without updates


class TwoCalls(torch.optim.Optimizer):
    """The usual shape of SAM: two calls, neither of them step()."""

    def __init__(self, params: Any, rho: float = 0.05, lr: float = 0.1) -> None:
        super().__init__(params, {"rho": rho, "lr": lr})

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for parameter in (each for each in group["params"] if each.grad is not None):
                self.state[parameter]["old"] = parameter.clone()
                parameter.add_(parameter.grad, alpha=group["rho"])

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for parameter in (each for each in group["params"] if each.grad is not None):
                parameter.copy_(self.state[parameter]["old"]).sub_(parameter.grad, alpha=group["lr"])

    def step(self, closure: Any = None) -> None:
        if closure is not None:  # torch's DCP makes the state by a step without one
            self.first_step()
            closure()
            self.second_step()


def sharpness_aware(layout: str, folder: str) -> str:
    with accelerator_of(layout) as accelerator:
        torch.manual_seed(0)
        model = Nasty(scalar=False)
        model, optimizer = accelerator.prepare(model, TwoCalls(model.parameters()))
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        accelerator.save_state(folder)  # nothing was trained yet: nothing to tell

        def backward() -> None:
            optimizer.zero_grad()
            accelerator.backward(model(torch.tensor([[1, 2], [3, 4]])).square().mean())

        backward()
        optimizer.optimizer.first_step()
        backward()
        optimizer.optimizer.second_step()
        with warned() as told:
            accelerator.save_state(folder)
            ema.consolidate(f"{folder}-export")
            ema.save(f"{folder}-again")
        on_rank_0(told)
        accelerator.wait_for_everyone()
        backward()
        optimizer.step(backward)
        assert ema.num_updates == 1
    with accelerator_of(layout) as accelerator:
        torch.manual_seed(1)
        model = Nasty(scalar=False)
        model, optimizer = accelerator.prepare(model, TwoCalls(model.parameters()))
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        accelerator.load_state(folder)  # which changes the weights, and is no training
        accelerator.save_state(folder)
        backward()
        optimizer.optimizer.first_step()
        backward()
        optimizer.optimizer.second_step()
        with warned() as resumed:
            ema.consolidate(f"{folder}-export")
        on_rank_0(resumed)
    return told[0] if told else ""


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_an_optimizer_whose_step_is_never_called_is_told_at_the_save(world, tmp_path, layout) -> None:
    """sam#31, skorch#785: 0 updates, and the live weights saved as if they were the average."""
    told, _ = world(2).run(sharpness_aware, layout, str(tmp_path / "ckpt"))
    assert "0 updates" in told and "ema.update()" in told and "SAM" in told


def resumed_without_steps(folder: str) -> list[str]:
    with accelerator_of("plain") as accelerator:
        model, optimizer = prepared(accelerator, "plain")
        attach(accelerator, model, optimizer, SCHEDULE)
        for step in range(5):
            take_step(model, optimizer, step)
        accelerator.save_state(folder)
    with accelerator_of("plain") as accelerator:
        model, optimizer = prepared(accelerator, "plain")
        attach(accelerator, model, optimizer, SCHEDULE)
        accelerator.load_state(folder)
        other = torch.optim.SGD(model.parameters(), lr=0.1)
        with warned() as unchanged:
            accelerator.save_state(f"{folder}-0")
        assert not unchanged
        take_step(model, other, 6)
        with warned() as told:
            accelerator.save_state(f"{folder}-1")
        take_step(model, optimizer, 7)
        with warned() as stepped:
            accelerator.save_state(f"{folder}-2")
        assert not stepped
    return told


def test_an_optimizer_whose_step_is_not_called_after_a_resume_is_told_at_the_save(world, tmp_path) -> None:
    """The counter was not 0 there, and so nobody looked."""
    ((told,),) = world(1).run(resumed_without_steps, str(tmp_path / "ckpt"))
    assert "0 updates since its checkpoint was loaded, at 5" in told and "another optimizer has stepped" in told


def exported_apart(folder: str) -> str:
    ema = ShardedEMA(nn.Linear(2, 2), SCHEDULE)
    for _ in range(1 + dist.get_rank()):
        ema.update()
    with pytest.raises(RankMismatchError, match="num_updates: 1 against 2") as caught:
        ema.consolidate(folder)
    return str(caught.value)


def test_an_export_of_ranks_that_made_different_numbers_of_updates_is_refused(world, tmp_path) -> None:
    first, second = world(2).run(exported_apart, str(tmp_path / "export"))
    assert first == second and not list(tmp_path.iterdir())


# attach in a Trainer

IN_A_TRAINER = """
import sys, torch, warnings
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from dist_ema import ConstantSchedule, attach

class Callback(TrainerCallback):
    def on_train_begin(self, args, state, control, **ignored):
        t = self.trainer
        self.ema = attach(t.accelerator, t.model_wrapped, t.optimizer, ConstantSchedule(decay=0.9))

    def on_train_end(self, args, state, control, **ignored):
        self.ema.consolidate("export")

def trainer(callbacks):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=8, n_embd=8, n_layer=1, n_head=2,
                                       bos_token_id=0, eos_token_id=0))
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(8)]
    arguments = TrainingArguments("out", max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)

def told(caught):
    return sum("callbacks=[EMACallback(schedule, name='ema')]" in str(each.message) for each in caught)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    callback = Callback()
    callback.trainer = trainer([callback])
    callback.trainer.train()
print("inside train:", told(caught), "updates:", callback.ema.num_updates)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    owner = trainer([])
    model, optimizer = owner.accelerator.prepare(owner.model, torch.optim.SGD(owner.model.parameters(), lr=0.1))
    attach(owner.accelerator, model, optimizer, ConstantSchedule(decay=0.9)).detach()
print("before train:", told(caught))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from accelerate import Accelerator
    own = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    model, optimizer = own.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    attach(own, model, optimizer, ConstantSchedule(decay=0.9)).detach()
print("of an accelerator beside it:", told(caught))
"""


def python(code: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a program of its own: what happens at the end of a process cannot be seen from within."""
    package = Path(watch.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *flags, "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_in_a_trainer_the_average_is_in_no_checkpoint_and_attach_says_so(tmp_path) -> None:
    """ms-swift#2685, trl#7043, lerobot#4259."""
    ran = python(IN_A_TRAINER, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "inside train: 1 updates: 1" in ran.stdout
    assert "before train: 1" in ran.stdout
    assert "of an accelerator beside it: 0" in ran.stdout


# attach and update() in one loop


def counted_twice() -> list[str]:
    with accelerator_of("ddp") as accelerator:
        model, optimizer = prepared(accelerator, "ddp")
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        with warned() as told:
            for step in range(4):
                take_step(model, optimizer, step)
                ema.update()
        assert ema.num_updates == 8
        on_rank_0(told)
        return told


def test_updates_by_hand_between_those_of_attach_are_told(world) -> None:
    (told,), _ = world(2).run(counted_twice)
    assert "counts twice" in told and "Leave ema.update() out" in told


class Inherited(torch.optim.SGD):
    """A step around that of the parent, as optimizers of one's own often are."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class InheritedTwice(Inherited):
    """Two steps in one."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step(closure)


def counted_in_a_step_within_a_step() -> None:
    for kind in (Inherited, InheritedTwice):
        with accelerator_of("plain") as accelerator:
            torch.manual_seed(0)
            model = Nasty()
            torch.optim.SGD(model.parameters())  # from now on torch has its hooks around the parent's step
            Inherited(model.parameters())
            model, optimizer = accelerator.prepare(model, kind(model.parameters(), lr=0.0))
            ema = attach(accelerator, model, optimizer, SCHEDULE)
            for step in range(4):
                take_step(model, optimizer, step)
            assert ema.num_updates == 4, kind
            with pytest.raises(ZeroDivisionError):
                optimizer.step(lambda: 1 / 0)
            take_step(model, optimizer, 4)
            assert ema.num_updates == 5, kind


def test_a_step_that_calls_the_step_of_its_parent_is_one_step(world) -> None:
    """Torch runs the hooks around both, and every step counted twice."""
    world(1).run(counted_in_a_step_within_a_step)


def by_hand() -> None:
    """Warnings of the package are errors here."""
    with accelerator_of("plain") as accelerator:
        model, optimizer = prepared(accelerator, "plain")
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        ema.update()
        ema.update()  # an optimizer whose step is never called
        take_step(model, optimizer, 0)
        take_step(model, optimizer, 1)
        ema.update()  # a last one by hand
        ema.detach()
        for step in range(3):
            take_step(model, optimizer, step)
            ema.update()
        assert ema.num_updates == 8


def test_updates_by_hand_before_after_or_instead_of_those_of_attach_are_not_doubted(world) -> None:
    world(1).run(by_hand)


# A schedule that is over


def last_update(schedule: Any, most: int, **options: Any) -> int | None:
    """Number of the update that warns; None if none does."""
    ema = ShardedEMA(nn.Linear(2, 2), schedule, **options)
    numbers = []
    for number in range(most):
        with warned() as told:
            ema.update()
        numbers += [number] * len(told)
        assert all("total_steps" in each and "stands still" in each for each in told)
    assert len(numbers) <= 1
    return numbers[0] if numbers else None


class Linear:
    """A schedule of somebody's own, which knows no step beyond its end if `strict`."""

    def __init__(self, total_steps: int, end: float = 0.0, *, strict: bool = False) -> None:
        self.total_steps, self.end, self.strict = total_steps, end, strict

    def momentum(self, step: int) -> float:
        if self.strict and step > self.total_steps + 1:
            raise IndexError(step)
        return max(self.end, 0.5 * (1.0 - step / self.total_steps))


@pytest.mark.parametrize(
    ("schedule", "number"),
    [
        (CosineSchedule(total_steps=5), 6),
        (CosineSchedule(0.01, 0.001, total_steps=5), None),
        (after(3, CosineSchedule(total_steps=5)), 9),
        (scaled_batch(2.0, CosineSchedule(total_steps=5)), 6),
        (every(4, CosineSchedule(total_steps=6)), 10),  # update 8 takes in number 5
        (after(2, every(2, CosineSchedule(total_steps=4))), 8),
        (SCHEDULE, None),
        (EqualSchedule(every_steps=7), None),
        (PowerSchedule(gamma=3.0), None),
    ],
    ids=repr,
)
def test_an_average_that_stands_still_for_want_of_steps_is_told(schedule, number) -> None:
    assert last_update(schedule, 20) == number


@pytest.mark.filterwarnings("ignore:only your code can rebuild")
def test_schedules_of_ones_own_and_several_tracks_are_told_when_they_are_over() -> None:
    assert last_update(Linear(4), 12) == 5
    assert last_update(Linear(4, end=0.1), 12) is None
    assert last_update(Linear(4, strict=True), 6) is None
    tracks = {"one": CosineSchedule(total_steps=3), "two": SCHEDULE, "three": CosineSchedule(total_steps=3)}
    assert last_update(tracks, 9) == 4
    assert last_update(CosineSchedule(total_steps=4), 9, interval=2) == 5


def test_a_run_of_total_steps_and_its_resume_beyond_them(tmp_path) -> None:
    """Warnings are errors here but inside `warned`."""
    ema = ShardedEMA(nn.Linear(2, 2), CosineSchedule(total_steps=5))
    for _ in range(5):
        ema.update()
    ema.save(tmp_path / "ema")
    again = ShardedEMA(nn.Linear(2, 2), CosineSchedule(total_steps=5))
    again.load(tmp_path / "ema")
    again.update()
    with pytest.warns(UserWarning, match="update number 6 .*total_steps=5") as caught:
        again.update()
    assert caught[0].filename == __file__
    again.update()


def stands_still() -> None:
    ema = ShardedEMA(nn.Linear(2, 2), CosineSchedule(total_steps=2))
    with warned() as told:
        for _ in range(6):
            ema.update()
    on_rank_0(told)


def test_rank_0_alone_tells_that_a_schedule_is_over(world) -> None:
    world(2).run(stands_still)


# Updates that nobody uses

ENDING = """
import os, sys
import torch
import torch._dynamo  # an optimizer imports it: each process below would take seconds for that
from accelerate import Accelerator
from torch import nn
from dist_ema import ConstantSchedule, ShardedEMA, attach

def main(num_steps=3, use=lambda ema: None):
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ema = attach(accelerator, model, optimizer, ConstantSchedule(decay=0.9))
    for step in range(num_steps):
        accelerator.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        optimizer.zero_grad()
    use(ema)
    return accelerator, ema

for number, code in enumerate(CODES):  # each in a process of its own, which ends by itself
    if not os.fork():
        os.mkdir(str(number))
        os.chdir(str(number))
        os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT), 2)
        exec(code)
        sys.exit()
    os.wait()
"""
UNUSED = "updated and never used: 'ema' (3)"

ENDS: dict[str, tuple[str, int]] = {
    "in a function": ("main()", 1),
    "at the top, by end_training": ("accelerator, ema = main(); accelerator.end_training(); os.write(2, b'ended')", 1),
    "another after it": ("main(); import gc; gc.collect(); main(use=lambda ema: ema.consolidate('x'))", 0),
    "detach": ("main(use=lambda ema: ema.detach())", 0),
    "exception": ("main(); raise ValueError('of the user')", 0),
    "interrupt": ("main(); raise KeyboardInterrupt", 0),
    "fork": ("kept = main()\nif os.fork():\n    os.wait(); kept[1].detach()", 0),
}


def test_updates_that_nobody_ever_used_are_told_at_the_end_and_nothing_else_is(tmp_path) -> None:
    """A run that averages for a week, never saves it, and ends well."""
    codes = [code for code, _ in ENDS.values()]
    ran = python(f"CODES = {codes!r}\n{ENDING}", tmp_path)
    assert ran.returncode == 0, ran.stderr
    told = {what: (tmp_path / str(number) / "stderr").read_text() for number, what in enumerate(ENDS)}
    for what, (_, expected) in ENDS.items():
        assert told[what].count("UserWarning") == told[what].count(UNUSED) == expected, f"{what}: {told[what]}"
    by_end_training = told["at the top, by end_training"]
    assert by_end_training.index(UNUSED) < by_end_training.index("ended")
    assert "ema.detach()" in told["in a function"] and "accelerator.save_state" in told["in a function"]
    assert "ValueError: of the user" in told["exception"]


def unused_on_two_ranks() -> list[str]:
    with accelerator_of("ddp") as accelerator:
        model, optimizer = prepared(accelerator, "ddp")
        attach(accelerator, model, optimizer, SCHEDULE)
        take_step(model, optimizer, 0)
        with mock.patch.object(PartialState, "destroy_process_group"), warned() as told:
            accelerator.end_training()
            accelerator.end_training()
        on_rank_0(told)
        return told


def test_rank_0_alone_tells_of_updates_that_nobody_used(world) -> None:
    (told,), _ = world(2).run(unused_on_two_ranks)
    assert "never used: 'ema' (1)" in told


def swap(ema: ShardedEMA, folder: str) -> None:
    with ema.average_parameters():
        pass


USES: dict[str, Callable[[ShardedEMA, str], Any]] = {
    "save": lambda ema, folder: ema.save(folder),
    "snapshot": lambda ema, folder: ema.snapshot(f"{folder}-s"),
    "consolidate": lambda ema, folder: ema.consolidate(f"{folder}-c"),
    "copy": lambda ema, folder: ema.copy_to_model(),
    "whole": lambda ema, folder: ema.full_state_dict(),
    "sharded": lambda ema, folder: ema.sharded_state_dict(),
    "swap": swap,
}


def uses(folder: str) -> dict[str, int]:
    """How often the end of training tells, of an average that was used in each way."""
    told = {}
    with mock.patch.object(PartialState, "destroy_process_group"):
        for when in ("after", "before"):
            for name, use in USES.items():
                with accelerator_of("plain") as accelerator:
                    model, optimizer = prepared(accelerator, "plain")
                    ema = attach(accelerator, model, optimizer, SCHEDULE)
                    if when == "before":
                        use(ema, f"{folder}/{name}-before")
                    take_step(model, optimizer, 0)
                    if when == "after":
                        use(ema, f"{folder}/{name}")
                    with warned() as here:
                        accelerator.end_training()
                    told[f"{name} {when}"] = len(here)
        with accelerator_of("plain") as accelerator, pytest.raises(ValueError, match="of the user"):
            model, optimizer = prepared(accelerator, "plain")
            attach(accelerator, model, optimizer, SCHEDULE)
            take_step(model, optimizer, 0)
            try:
                raise ValueError("of the user")
            finally:
                with warned() as here:
                    accelerator.end_training()
                told["exception after"] = len(here)
    return told


def test_every_way_to_get_at_the_average_counts_but_one_before_the_first_update(world, tmp_path) -> None:
    (told,) = world(1).run(uses, str(tmp_path))
    assert told == {name: int(name.endswith("before")) for name in told}


def records_of_a_process_that_goes_on() -> int:
    for _ in range(5):
        with accelerator_of("plain") as accelerator:
            model, optimizer = prepared(accelerator, "plain")
            attach(accelerator, model, optimizer, SCHEDULE)
            take_step(model, optimizer, 0)
        del accelerator, model, optimizer
        gc.collect()
    return len(watch._records)


def test_a_sweep_or_a_test_suite_does_not_collect_what_it_never_used(world) -> None:
    assert world(1).run(records_of_a_process_that_goes_on) == [1]


def a_teacher_is_used() -> None:
    with accelerator_of("plain") as accelerator, mock.patch.object(PartialState, "destroy_process_group"):
        model = nn.Linear(2, 2)
        teacher = copy.deepcopy(model).requires_grad_(False)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        attach(accelerator, model, optimizer, SCHEDULE, into=teacher)
        accelerator.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        accelerator.end_training()


def test_a_teacher_counts_as_used(world) -> None:
    world(1).run(a_teacher_is_used_and_the_group_stays)


def a_teacher_is_used_and_the_group_stays() -> None:
    from accelerate.state import PartialState

    with mock.patch.object(PartialState, "destroy_process_group"):
        a_teacher_is_used()


def test_detach_gives_the_accelerator_its_methods_back(world) -> None:
    world(1).run(methods_are_given_back)


def methods_are_given_back() -> None:
    with accelerator_of("plain") as accelerator:
        model, optimizer = prepared(accelerator, "plain")
        names = ("end_training", "load_state")
        former: list[Callable[..., Any]] = [getattr(accelerator, name) for name in names]
        attach(accelerator, model, optimizer, SCHEDULE).detach()
        assert [getattr(accelerator, name) for name in names] == former
