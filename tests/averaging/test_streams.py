"""Updates beside training: whatever comes next joins them, however slow they are."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerated import accelerator_of
from layouts_zoo import build_layout, set_whole
from oracle import NaiveAverage
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dist_ema.averaging.state
import dist_ema.ema
from dist_ema import (
    ConfigError,
    ConstantSchedule,
    DistEMAError,
    ShardedEMA,
    attach,
)
from dist_ema.averaging import streams
from dist_ema.averaging.streams import HostThread, SideStream, Stream, stream_beside

SCHEDULE = ConstantSchedule(momentum=0.25)
CPU = torch.device("cpu")


class Late(Stream):
    """The slowest stream there could be: work is done when somebody joins it, and sees the weights of then."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def run(self, work: Callable[[], None]) -> None:
        self.waiting.append(work)

    def join(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()

    def flag_of_now(self, flag: torch.Tensor) -> torch.Tensor:
        return flag.clone()

    def __deepcopy__(self, memo: object) -> Stream:
        return Stream()


class Slow(HostThread):
    """A host thread that takes its time."""

    def run(self, work: Callable[[], None]) -> None:
        super().run(lambda: (time.sleep(0.02), work())[1])


@pytest.fixture(params=[Late, lambda: Slow(CPU), lambda: SideStream(CPU)], ids=["late", "thread", "cpu"])
def beside(request, monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(dist_ema.averaging.state, "stream_beside", lambda live, averaged: request.param())
    yield


def trained(ema: ShardedEMA, model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        model(torch.randn(3, 4, generator=generator)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update()


def made(**options: Any) -> tuple[nn.Sequential, ShardedEMA, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.AdamW(model[1].parameters(), lr=0.1)]
    return model, ShardedEMA(model, SCHEDULE, **options), optimizers


def randomize(model: nn.Module) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter)


def assert_alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float64}, {"skip_nonfinite": True}, {"compensated": True}])
def test_every_optimizer_waits_for_an_update_beside_training(beside, options) -> None:
    model, ema, optimizers = made(overlap=True, **options)
    trained(ema, model, optimizers)
    twin, serial, its_optimizers = made(**options)
    trained(serial, twin, its_optimizers)
    assert_alike(ema.full_state_dict(), serial.full_state_dict())


def test_without_its_hook_a_late_update_would_see_the_next_weights(monkeypatch) -> None:
    """That the test before this one can fail."""
    monkeypatch.setattr(dist_ema.averaging.state, "stream_beside", lambda live, averaged: Late())
    monkeypatch.setattr(dist_ema.ema, "join_before_steps", lambda state: lambda: None)
    model, ema, optimizers = made(overlap=True)
    trained(ema, model, optimizers)
    twin, serial, its_optimizers = made()
    trained(serial, twin, its_optimizers)
    assert not torch.equal(ema.full_state_dict()["0.weight"], serial.full_state_dict()["0.weight"])


def swapped(ema: ShardedEMA, model: nn.Module, folder: Path) -> Any:
    with ema.average_parameters():
        return {name: value.clone() for name, value in model.state_dict().items()}


def copied(ema: ShardedEMA, model: nn.Module, folder: Path) -> Any:
    ema.copy_to_model()
    return model.state_dict()


def loaded(ema: ShardedEMA, model: nn.Module, folder: Path) -> Any:
    """A load that fails, and one over an average in use: the former must not have been lost, nor come late."""
    before = copy.deepcopy(ema).full_state_dict()
    ema.save(folder / "first")
    ema.update()
    nn.init.zeros_(model[0].weight)
    ema.load(folder / "first")
    return {"before." + name: value for name, value in before.items()} | ema.full_state_dict()


def started(ema: ShardedEMA, model: nn.Module, folder: Path) -> Any:
    ema.consolidate(folder / "export")
    ema.update()
    ema.start_from(folder / "export", num_updates=7)
    return ema.full_state_dict()


def taken(ema: ShardedEMA, model: nn.Module, folder: Path) -> Any:
    state = ema.sharded_state_dict()
    ema.update()
    ema.load_sharded_state_dict(state)
    return ema.full_state_dict()


def restarted(ema: ShardedEMA, model: nn.Module, folder: Path) -> Any:
    ema.restart()
    return ema.full_state_dict()


def loaded_after_restart(ema: ShardedEMA, model: nn.Module, folder: Path) -> Any:
    """Into the averages themselves, which nothing under way may write to any more."""
    ema.save(folder / "first")
    ema.update()
    ema.restart()
    ema.load(folder / "first")
    return ema.full_state_dict()


def saved(ema: ShardedEMA, model: nn.Module, folder: Path) -> Any:
    ema.save(folder / "saved", background=True)
    ema.update()
    nn.init.zeros_(model[0].weight)
    ema.wait()
    _, other, _ = made()
    other.load(folder / "saved")
    return other.full_state_dict()


def written_to_after_wait(ema: ShardedEMA, model: nn.Module, folder: Path) -> Any:
    ema.wait()
    nn.init.zeros_(model[0].weight)
    return ema.full_state_dict()


def detached(ema: ShardedEMA, model: nn.Module, folder: Path) -> Any:
    ema.detach()
    nn.init.zeros_(model[0].weight)
    ema.update()
    nn.init.ones_(model[0].weight)  # nobody joins any more: updates are in line again
    return ema.full_state_dict()


def deep_copied(ema: ShardedEMA, model: nn.Module, folder: Path) -> Any:
    _, other = copy.deepcopy((model, ema))
    nn.init.zeros_(model[0].weight)
    other.update()
    return other.full_state_dict()


CALLS = {
    "full_state_dict": lambda ema, model, folder: ema.full_state_dict(),
    "sharded_state_dict": lambda ema, model, folder: ema.sharded_state_dict(),
    "distance": lambda ema, model, folder: ema.distance(),
    "metrics": lambda ema, model, folder: ema.metrics(),
    "num_refused": lambda ema, model, folder: ema.num_refused(),
    **{
        each.__name__: each
        for each in (
            swapped,
            copied,
            loaded,
            loaded_after_restart,
            started,
            taken,
            restarted,
            saved,
            written_to_after_wait,
            detached,
            deep_copied,
        )
    },
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_that_uses_the_averages_joins_the_update(beside, call, tmp_path) -> None:
    found = []
    for overlap in (True, False):
        model, ema, optimizers = made(overlap=overlap, skip_nonfinite=call == "num_refused")
        trained(ema, model, optimizers)
        if call == "num_refused":
            ema.wait()
            model[0].weight.data[0, 0] = float("nan")
            ema.update()
        found.append(CALLS[call](ema, model, tmp_path / str(overlap)))
    if isinstance(found[0], dict) and all(isinstance(value, torch.Tensor) for value in found[0].values()):
        assert_alike(*found)
    else:
        assert found[0] == found[1]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_second_average_that_swaps_waits_for_an_update_of_the_first(beside, overlap) -> None:
    """It writes to the live weights that the first one has yet to read."""
    model, first, _ = made(overlap=True)
    second = ShardedEMA(model, {"a": SCHEDULE}, overlap=overlap)
    naive = NaiveAverage(SCHEDULE.momentum)
    for _ in range(4):
        first.wait()
        second.wait()
        randomize(model)
        naive.update(dict(model.named_parameters()))
        first.update()
        second.update()
        with second.average_parameters():
            pass
    second.copy_to_model()
    assert_alike(first.full_state_dict(), naive.values)


def test_a_teacher_that_is_averaged_itself_is_written_to_after_that_average_has_read_it() -> None:
    model, _, _ = made()
    teacher = copy.deepcopy(model).requires_grad_(False)
    ema, of_teacher = ShardedEMA(model, SCHEDULE, into=teacher), ShardedEMA(teacher, SCHEDULE, overlap=True)
    of_teacher._state._updater.stream = Late()
    naive = NaiveAverage(SCHEDULE.momentum)
    for _ in range(4):
        randomize(model)
        ema.update()
        of_teacher.update()
        naive.update(dict(teacher.named_parameters()))
    assert_alike(of_teacher.full_state_dict(), naive.values)


def test_an_update_made_within_the_swap_of_another_average_sees_the_swapped_weights() -> None:
    model, first, _ = made(overlap=True)
    second = ShardedEMA(model, ConstantSchedule(momentum=0.5))
    first._state._updater.stream = Late()
    naive = NaiveAverage(SCHEDULE.momentum)
    for _ in range(4):
        randomize(model)
        second.update()
        with second.average_parameters():
            first.update()
            naive.update(dict(model.named_parameters()))
    assert_alike(first.full_state_dict(), naive.values)


def test_a_copy_of_the_live_values_comes_after_what_was_to_move_them() -> None:
    model, ema, _ = made()
    updater = ema._state._updater
    averaged = ema._state.averages["ema"].values[0]
    updater.stream = Late()
    updater.stream.run(lambda: averaged.fill_(7.0))  # type: ignore[arg-type,return-value]
    updater.copy_live()
    updater.stream.join()
    assert torch.equal(averaged, model[0].weight)


def test_an_update_does_not_wait_for_that_of_another_average() -> None:
    """Two attached to one optimizer: the second would have the next forward wait for the first."""
    model, first, _ = made(overlap=True)
    second = ShardedEMA(model, SCHEDULE, overlap=True)
    for ema in (first, second):
        ema._state._updater.stream = Late()
        ema.update()
        ema.update()
    assert [len(ema._state._updater.stream.waiting) for ema in (first, second)] == [1, 1]
    first.wait()
    assert [len(ema._state._updater.stream.waiting) for ema in (first, second)] == [0, 0]


def test_the_flag_of_a_skipped_step_may_be_used_again_before_the_update_reads_it(beside) -> None:
    """A GradScaler adds the flags of several optimizers up in place."""
    model, ema, _ = made(overlap=True)
    ema.update()
    expected = model[0].weight.detach().clone()
    flag = torch.ones(1)
    nn.init.zeros_(model[0].weight)
    ema.update(found_inf=flag)
    flag.zero_()
    assert torch.equal(ema.full_state_dict()["0.weight"], expected)
    assert ema.num_updates == 1


def test_attach_with_overlap_gives_the_bits_of_one_without(beside) -> None:
    found = []
    for overlap in (True, False):
        with accelerator_of("plain") as accelerator:
            model, _, _ = made()
            model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
            ema = attach(accelerator, model, optimizer, SCHEDULE, overlap=overlap)
            for _ in range(4):
                accelerator.backward(model(torch.ones(1, 4)).square().sum())
                optimizer.step()
                optimizer.zero_grad()
            found.append(ema.full_state_dict())
    assert_alike(*found)


def test_load_state_of_accelerate_waits_before_it_loads_the_model(beside, tmp_path) -> None:
    """Our hook may come too late for that; and a load that fails must leave the average as it was."""
    with accelerator_of("plain") as accelerator:
        model, _, _ = made()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        other = attach(accelerator, model, optimizer, SCHEDULE, name="other", overlap=True)
        ema = attach(accelerator, model, optimizer, SCHEDULE, overlap=True)
        other.detach()  # the first to wrap is the first to go
        naive = NaiveAverage(SCHEDULE.momentum)
        for _ in range(3):
            accelerator.backward(model(torch.ones(1, 4)).square().sum())
            optimizer.step()
            naive.update(dict(model.named_parameters()))
        accelerator.register_load_state_pre_hook(lambda models, folder: nn.init.zeros_(models[0][0].weight))
        with pytest.raises(DistEMAError):
            accelerator.load_state(str(tmp_path))
        assert_alike(ema.full_state_dict(), naive.values)


def in_every_layout(layout: str) -> bool:
    """Whether averages of a slow thread are those of the naive twin, bit for bit."""
    dist_ema.averaging.state.stream_beside = lambda live, averaged: Slow(CPU)  # type: ignore[assignment]
    try:
        model = build_layout(layout)
        ema = ShardedEMA(model, {"one": SCHEDULE, "two": ConstantSchedule(momentum=0.5)}, overlap=True)
        naive = NaiveAverage(SCHEDULE.momentum)
        for step in range(4):
            ema.wait()
            naive.update(set_whole(model, step))
            ema.update()
            with torch.no_grad():
                model(torch.zeros(2, 3, dtype=torch.long))  # gathers and drops copies meanwhile
        found = ema.full_state_dict("one")
        return all(torch.equal(found[name], value) for name, value in naive.values.items() if name in found)
    finally:
        dist_ema.averaging.state.stream_beside = stream_beside


@pytest.mark.parametrize("layout", ["ddp", "fsdp1_orig", "fsdp1_flat", "fsdp2", "hsdp"])
def test_an_update_beside_a_forward_has_the_same_bits_in_every_layout(world, layout) -> None:
    assert world(2).run(in_every_layout, layout) == [True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("overlap", [False, True])
def test_what_is_fetched_from_a_device_has_the_same_bits(monkeypatch, dtype, overlap) -> None:
    """A CPU stands for the device: blocks are fetched one ahead, into two pieces of memory in turn."""
    monkeypatch.setattr("dist_ema.averaging.tensor_blocks._is_afar", lambda live, averaged: True)
    monkeypatch.setattr("dist_ema.averaging.tensor_blocks.SCRATCH_NUMEL", 5000)
    monkeypatch.setattr(dist_ema.averaging.state, "stream_beside", lambda live, averaged: Slow(CPU))
    model = nn.Module()
    for index, shape in enumerate([(70, 90), (3,), (1000, 12), (60, 50), (2500,), (0, 4), (2, 2)]):
        model.register_parameter(f"p{index}", nn.Parameter(torch.randn(shape).to(dtype)))
    model.turned = nn.Parameter(torch.randn(40, 130).to(dtype).t())
    ema = ShardedEMA(model, {"one": SCHEDULE, "two": ConstantSchedule(momentum=0.5)}, overlap=overlap)
    naive = NaiveAverage(SCHEDULE.momentum)
    for _ in range(5):
        ema.wait()
        randomize(model)
        naive.update(dict(model.named_parameters()))
        ema.update()
    found = ema.full_state_dict("one")
    prepared = ema._state._updater._prepared
    assert len(prepared.blocks) > 4 and len(prepared._landings) == 2
    assert_alike(found, naive.values)


def test_a_copy_of_fetched_averages_prepares_its_own_lists(monkeypatch) -> None:
    """Those of the first hold events, which cannot be copied."""
    monkeypatch.setattr("dist_ema.averaging.tensor_blocks._is_afar", lambda live, averaged: True)
    model, ema, _ = made()
    ema.update()
    ema.update()
    twin, other = copy.deepcopy((model, ema))
    before = other.full_state_dict()
    nn.init.zeros_(twin[0].weight)
    other.update()
    assert torch.equal(other.full_state_dict()["0.weight"], before["0.weight"] * 0.75)
    assert torch.equal(ema.full_state_dict()["0.weight"], before["0.weight"])


def test_fetched_averages_prepared_in_inference_mode_are_updated_outside_it(monkeypatch) -> None:
    monkeypatch.setattr("dist_ema.averaging.tensor_blocks._is_afar", lambda live, averaged: True)
    _, ema, _ = made()
    with torch.inference_mode():
        ema.update()
        ema.update()
    ema.update()


class Recorded:
    """A device module of which every stream writes down what it waits for."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.current = "main"
        self.made = 0

    def Stream(self, device: object = None) -> Any:
        self.made += 1
        return self.named(f"side{self.made}")

    def named(self, name: str) -> Any:
        def wait(other: Any) -> None:
            self.log.append((name, other.name))

        return types.SimpleNamespace(name=name, wait_stream=wait, wait_event=wait)

    def Event(self) -> Any:
        event = types.SimpleNamespace(name="never recorded")
        event.record = lambda stream: setattr(event, "name", f"end of {stream.name}")
        return event

    def current_stream(self, device: object) -> Any:
        return self.named(self.current)

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()


def test_every_stream_that_joins_waits_and_not_the_first_alone(monkeypatch) -> None:
    device = Recorded()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    stream = SideStream(CPU)
    stream.join()
    assert device.log == []
    stream.run(lambda: device.log.append(("work", "")))
    for current in ("other", "main"):
        device.current = current
        stream.join()
    assert device.log == [("side1", "main"), ("work", ""), ("other", "end of side1"), ("main", "end of side1")]


def test_a_forked_process_does_not_wait_for_the_thread_of_its_parent() -> None:
    stream, gate = HostThread(CPU), threading.Event()
    stream.run(lambda: gate.wait(10))  # type: ignore[arg-type,return-value]
    child = os.fork()
    if child == 0:
        stream.join()
        os._exit(7)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    gate.set()
    stream.join()
    assert ended == 7


def test_an_error_on_the_host_thread_is_raised_by_whoever_joins_it() -> None:
    stream = HostThread(CPU)

    def fails() -> None:
        raise ValueError("on the thread")

    stream.run(fails)
    with pytest.raises(ValueError, match="on the thread"):
        stream.join()
    done = threading.Event()
    stream.run(done.set)
    stream.join()
    assert done.is_set()


def test_threads_that_join_at_once_do_not_trip_over_each_other() -> None:
    stream = HostThread(CPU)
    failures: list[BaseException] = []

    def join() -> None:
        try:
            stream.join()
        except BaseException as error:
            failures.append(error)

    for _ in range(100):
        stream.run(lambda: time.sleep(0.0005))
        threads = [threading.Thread(target=join) for _ in range(3)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert not failures


def test_detach_after_a_failed_update_ends_the_overlap_all_the_same(monkeypatch) -> None:
    monkeypatch.setattr(dist_ema.averaging.state, "stream_beside", lambda live, averaged: Slow(CPU))
    model, ema, _ = made(overlap=True)
    ema.update()
    with monkeypatch.context() as patched:
        patched.setattr("dist_ema.uninterrupted.jobs._one_by_one", lambda lanes: 1 / 0)
        ema.update()
        with pytest.raises(ZeroDivisionError):
            ema.detach()
    before = ema.full_state_dict()["0.weight"]
    nn.init.zeros_(model[0].weight)
    ema.update()
    nn.init.ones_(model[0].weight)
    assert torch.equal(ema.full_state_dict()["0.weight"], before * 0.75)


def test_a_copy_leaves_the_hooks_to_the_first() -> None:
    """Those of others may be bound to what cannot be copied."""

    class Locked:
        def __init__(self) -> None:
            self.own = threading.Lock()

        def hook(self, *_: object) -> None:
            pass

    handle = register_optimizer_step_pre_hook(Locked().hook)
    try:
        model, ema, optimizers = made(overlap=True)
        copy.deepcopy((model, ema))[1].detach()
        trained(ema, model, optimizers)
        assert len(ema._on_detach) == 2
    finally:
        handle.remove()


def test_streams_are_chosen_by_where_weights_and_averages_lie() -> None:
    meta = torch.device("meta")
    assert type(stream_beside([CPU], [CPU])) is SideStream
    assert type(stream_beside([CPU, meta], [CPU])) is Stream
    assert type(stream_beside([], [])) is Stream
    assert type(stream_beside([CPU], [meta])) is Stream


def test_the_hook_of_an_average_goes_with_it() -> None:
    from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks

    gc.collect()
    before = len(hooks) - (streams._hook is not None)
    _, first, _ = made(overlap=True)
    _, second, _ = made(overlap=True)
    assert len(hooks) == before + 1
    first.detach()
    assert len(hooks) == before + 1
    second.detach()
    assert len(hooks) == before


def test_an_average_that_ends_during_a_step_does_not_break_it() -> None:
    """Torch walks through the hooks themselves: none may be removed meanwhile."""
    model, ema, optimizers = made(overlap=True)
    others = [made(overlap=True)[1] for _ in range(3)]
    handle = register_optimizer_step_pre_hook(lambda *_: (others.clear(), gc.collect())[0])
    try:
        trained(ema, model, optimizers)
    finally:
        handle.remove()
    assert not others


def test_overlap_is_refused_where_the_next_forward_would_meet_the_update() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ConfigError, match=r"2 buffers are averaged \(1.running_mean"):
        ShardedEMA(model, SCHEDULE, overlap=True, update_buffers=True)
    ShardedEMA(model, SCHEDULE, overlap=True, update_buffers=True, exclude="*running*").detach()
    with pytest.raises(ConfigError, match="overlap=True and into are given"):
        ShardedEMA(model, SCHEDULE, overlap=True, into=copy.deepcopy(model).requires_grad_(False))
    with pytest.raises(ConfigError, match="overlap is 1, expected True or False"):
        ShardedEMA(model, SCHEDULE, overlap=1)  # type: ignore[arg-type]
