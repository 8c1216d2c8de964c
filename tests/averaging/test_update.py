"""How an update does its work: packed, in blocks, on several threads, prepared once. The bits are always the same."""

from __future__ import annotations

import copy
import functools
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts_zoo import build_layout, set_whole
from oracle import NaiveAverage
from torch import nn

from dist_ema import ConfigError, ConstantSchedule, CosineSchedule, ModelChangedError, ShardedEMA, after
from dist_ema.averaging.averages import Averages
from dist_ema.averaging.cpu_threads import share_out
from dist_ema.averaging.live_memory import Guard
from dist_ema.averaging.prepared_update import Prepared
from dist_ema.averaging.tensor_blocks import by_strides

SCHEDULES = {"fast": ConstantSchedule(momentum=0.5), "slow": ConstantSchedule(momentum=0.003)}


class Mixed(nn.Module):
    """Runs of tiny tensors between large ones, some of them not contiguous, empty, or of another dtype."""

    def __init__(self, dtype: torch.dtype, *, scale: int = 100) -> None:
        super().__init__()
        large = [(7 * scale, 9 * scale), (12 * scale, 11 * scale)]
        shapes = [*[(7,)] * 6, large[0], (3, 5), (2, 2), large[1], *[(64,)] * 9, (0, 4), *[(5, 3)] * 5]
        for index, shape in enumerate(shapes):
            self.register_parameter(f"p{index}", nn.Parameter(torch.randn(shape).to(dtype)))
        self.turned = nn.Parameter(torch.randn(40, 30).to(dtype).t())
        self.wide = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))


def expected_after(
    model: nn.Module, ema: ShardedEMA, schedule: ConstantSchedule, steps: int
) -> dict[str, torch.Tensor]:
    naive = NaiveAverage(schedule.momentum)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        naive.update(dict(model.named_parameters()))
        ema.update()
    return naive.values


@pytest.fixture
def threads() -> Iterator[None]:
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tracks", [1, 2])
def test_packed_and_blocked_updates_have_the_bits_of_the_naive_one(dtype, tracks) -> None:
    model = Mixed(dtype)
    schedules = dict(list(SCHEDULES.items())[:tracks])
    ema = ShardedEMA(model, schedules)
    values = expected_after(model, ema, SCHEDULES["fast"], 4)
    for name, value in ema.full_state_dict("fast").items():
        assert torch.equal(value, values[name]), name
    if tracks == 2:
        model = Mixed(dtype)
        ema = ShardedEMA(model, SCHEDULES)
        values = expected_after(model, ema, SCHEDULES["slow"], 4)
        assert all(torch.equal(value, values[name]) for name, value in ema.full_state_dict("slow").items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}, {"compensated": True}], ids=str)
def test_a_small_model_is_averaged_as_one_block_with_the_bits_of_the_naive_one(dtype, options) -> None:
    """What is packed, what is converted and what is neither share one lerp; each has its own part of the scratch."""
    model = Mixed(dtype, scale=8)
    ema = ShardedEMA(model, SCHEDULES, **options)
    values = expected_after(model, ema, SCHEDULES["fast"], 4)
    (block,) = ema._state._updater._prepared.blocks
    assert len(block.tracks[0]) < sum(parameter.numel() > 0 for parameter in model.parameters())
    for name, value in ema.full_state_dict("fast").items():
        if "compensated" in options:
            assert torch.allclose(value, values[name], rtol=1e-6, atol=1e-6), name
        else:
            assert torch.equal(value, values[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_several_threads_give_the_same_bits(threads, dtype) -> None:
    model = Mixed(dtype)
    ema = ShardedEMA(model, SCHEDULES)
    values = expected_after(model, ema, SCHEDULES["slow"], 4)
    assert ema._state._updater._prepared._workers == 3
    assert all(torch.equal(value, values[name]) for name, value in ema.full_state_dict("slow").items())


def test_threads_are_made_anew_in_a_forked_process(threads) -> None:
    done: list[int] = []
    share_out(lambda item, worker: done.append(item), list(range(20)), 3)
    child = os.fork()
    if child == 0:  # without threads of its own it would wait for ever
        found: list[int] = []
        share_out(lambda item, worker: found.append(item), list(range(20)), 3)
        os._exit(0 if sorted(found) == list(range(20)) else 1)
    assert sorted(done) == list(range(20))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_error_in_any_thread_is_raised_after_all_have_stopped() -> None:
    def work(item: int, worker: int) -> None:
        if item == 7:
            raise ValueError("seven")

    with pytest.raises(ValueError, match="seven"):
        share_out(work, list(range(20)), 3)
    share_out(work, list(range(7)), 3)


def _add(done: list[int], item: int, worker: int) -> None:
    done.append(item)


def test_an_exception_at_any_line_of_the_standard_library_leaves_the_threads_at_work() -> None:
    class Preempted(Exception):
        pass

    def moments(number: int) -> int:
        """Raise at that moment of Python's own modules, in the calling thread; returns the number of moments."""
        seen = 0

        def trace(frame: Any, event: str, arg: object) -> Any:
            nonlocal seen
            if "/dist_ema/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
                return trace
            if event in ("line", "return"):
                seen += 1
                if seen == number:
                    raise Preempted
            return trace

        sys.settrace(trace)
        try:
            share_out(lambda item, worker: None, list(range(20)), 3)
        except Preempted:
            pass
        finally:
            sys.settrace(None)
            torch.set_grad_enabled(True)  # an update does so itself
        return seen

    moments(0)
    number = 1
    while moments(number) >= number:  # a lock that stays locked would stop every later update
        done: list[int] = []
        add = functools.partial(_add, done)
        later = threading.Thread(target=share_out, args=(add, list(range(20)), 3), daemon=True)
        later.start()
        later.join(timeout=10)
        assert sorted(done) == list(range(20)), f"after an exception at moment {number}"
        number += 1


def test_a_signal_while_threads_are_waited_for_is_raised_after_them_as_it_is() -> None:
    class Preempted(Exception):
        pass

    def handle(*_: object) -> None:
        raise Preempted

    def work(item: int, worker: int) -> None:
        if worker == 0:  # the calling thread leaves one item to the other, and then waits for it
            assert begun.wait(60)
            return
        begun.set()
        time.sleep(0.1)
        signal.raise_signal(signal.SIGALRM)  # the handler runs in the calling thread
        time.sleep(0.2)
        done.append(item)

    begun = threading.Event()
    done: list[int] = []
    former = signal.signal(signal.SIGALRM, handle)
    try:
        with pytest.raises(Preempted):
            share_out(work, list(range(2)), 2)
    finally:
        signal.signal(signal.SIGALRM, former)
    assert len(done) == 1


def counted(calls: list[int]) -> Callable[..., None]:
    prepare = Prepared.__init__

    def init(self: Prepared, *arguments: Any, **options: Any) -> None:
        calls.append(1)
        prepare(self, *arguments, **options)

    return init


def prepared(layout: str) -> list[int]:
    """How often the lists of an update are made: in four updates, after a replaced memory, in another one."""
    calls: list[int] = []
    prepare = Prepared.__init__
    try:
        Prepared.__init__ = counted(calls)  # type: ignore[method-assign]
        model = build_layout(layout)
        ema = ShardedEMA(model, ConstantSchedule(momentum=0.5))
        counts = []
        for step in range(5):
            set_whole(model, step)
            ema.update()
        counts.append(len(calls))
        bare = model.module if layout == "ddp" else model
        bare.load_state_dict({name: value.clone() for name, value in bare.state_dict().items()}, assign=True)
        bare.head.weight = bare.embed.weight
        ema.update()
        ema.update()
        return [*counts, len(calls)]
    finally:
        Prepared.__init__ = prepare  # type: ignore[method-assign]


@pytest.mark.parametrize(("layout", "size"), [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("tp", 2)])
def test_an_update_is_prepared_once_and_again_only_when_memory_was_replaced(world, layout, size) -> None:
    assert world(size).run(prepared, layout) == [[1, 2]] * size


def prepared_under_fsdp1(layout: str) -> list[int]:
    """How often in all after each of five updates, with forwards, a swap and a step between them."""
    calls: list[int] = []
    counts = []
    prepare = Prepared.__init__
    try:
        Prepared.__init__ = counted(calls)  # type: ignore[method-assign]
        model = build_layout(layout)
        ema = ShardedEMA(model, ConstantSchedule(momentum=0.5))
        model(torch.zeros(2, 3, dtype=torch.long)).sum().backward()
        for _ in range(5):
            model(torch.zeros(2, 3, dtype=torch.long)).sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            ema.update()
            with ema.average_parameters(), torch.no_grad():
                model(torch.zeros(2, 3, dtype=torch.long))
            counts.append(len(calls))
        return counts
    finally:
        Prepared.__init__ = prepare  # type: ignore[method-assign]


@pytest.mark.parametrize("layout", ["fsdp1_orig", "fsdp1_flat", "fsdp1_grad_op"])
def test_under_fsdp1_an_update_is_prepared_once(world, layout) -> None:
    assert world(2).run(prepared_under_fsdp1, layout) == [[0, 1, 1, 1, 1]] * 2


def test_weights_that_were_replaced_are_not_kept_alive() -> None:
    model = nn.Linear(3, 2)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.5))
    ema.update()
    ema.update()
    first = weakref.ref(model.weight)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    ema.update()
    gc.collect()
    assert first() is None


@pytest.mark.parametrize("size", [1, 2])
def test_host_memory_is_host_memory_whatever_the_default_device_is(world, size, tmp_path) -> None:
    assert world(size).run(used_under_a_default_device, str(tmp_path)) == [True] * size


def used_under_a_default_device(folder: str) -> bool:
    """Every call with a default device whose tensors hold nothing; a GPU as default would be as wrong."""
    model = build_layout("ddp")
    with torch.device("meta"):
        ema = ShardedEMA(model, {"a": ConstantSchedule(momentum=0.5)}, skip_nonfinite=True)
        ema.update()
        ema.update(found_inf=torch.zeros(1, device="cpu"))
        ema.save(f"{folder}/one")
        ema.save(f"{folder}/two", background=True)
        ema.wait()
        ema.load(f"{folder}/two")
        ema.start_from(f"{folder}/one")
        ema.consolidate(f"{folder}/export", dtype=torch.bfloat16)
        ema.metrics()
        ema.num_refused()
        ema.load_sharded_state_dict(ema.sharded_state_dict())
        with ema.average_parameters():
            pass
        whole = ema.full_state_dict()
    return not any(value.is_meta for value in whole.values())


def random_walk(steps: int, decay: float, ema: ShardedEMA, model: nn.Module) -> torch.Tensor:
    """Walks the live weights about themselves; returns their average in float64."""
    generator = torch.Generator().manual_seed(0)
    center = torch.randn(model.weight.shape, generator=generator)
    exact = torch.zeros_like(center, dtype=torch.float64)
    for step in range(steps):
        model.weight.data.copy_(center + 0.02 * torch.randn(center.shape, generator=generator) + 1e-6 * step)
        exact = model.weight.data.double() if step == 0 else exact.lerp(model.weight.data.double(), 1.0 - decay)
        ema.update()
    return exact


def test_a_compensated_average_keeps_what_rounding_would_take() -> None:
    errors = {}
    for compensated in (False, True):
        model = nn.Linear(20, 10, bias=False)
        ema = ShardedEMA(model, ConstantSchedule(decay=0.99999), compensated=compensated)
        exact = random_walk(4000, 0.99999, ema, model)
        found = ema.full_state_dict()["weight"].double()
        errors[compensated] = float((found - exact).norm() / exact.norm())
    assert errors[True] < 1e-7 < 5e-7 < errors[False], errors
    assert ema.nbytes == 200 * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_compensated_average_has_the_same_bits_however_it_is_cut(threads, dtype) -> None:
    states = []
    for together in (True, False):
        torch.manual_seed(0)
        model = Mixed(dtype)
        ema = ShardedEMA(model, SCHEDULES if together else SCHEDULES["slow"], compensated=True)
        torch.set_num_threads(3 if together else 1)
        expected_after(model, ema, SCHEDULES["slow"], 5)
        states.append(ema.full_state_dict("slow" if together else None))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_compensated_average_survives_skipped_steps_and_starts_anew_after_a_load(tmp_path) -> None:
    model = nn.Linear(300, 200)
    ema = ShardedEMA(model, ConstantSchedule(decay=0.9), compensated=True, skip_nonfinite=True)
    for step in range(3):
        nn.init.normal_(model.weight, 1.0 + step / 3)
        ema.update(found_inf=torch.tensor(0.0))
    kept = [value.clone() for value in (*ema._state.averages["ema"].values, *ema._state.averages["ema"].residuals)]
    nn.init.constant_(model.weight, 7.0)
    ema.update(found_inf=torch.tensor(1.0))
    now = (*ema._state.averages["ema"].values, *ema._state.averages["ema"].residuals)
    assert all(torch.equal(*pair) for pair in zip(now, kept, strict=True)) and any(
        residual.any() for residual in now[2:]
    )
    ema.save(tmp_path / "average")
    ema.load(tmp_path / "average")
    assert not any(residual.any() for residual in ema._state.averages["ema"].residuals)


def test_compensation_is_for_float32_averages_kept_aside() -> None:
    with pytest.raises(ConfigError, match=r"expected torch\.float32"):
        ShardedEMA(nn.Linear(2, 2), SCHEDULES["fast"], compensated=True, dtype=torch.float64)
    with pytest.raises(ConfigError, match="no room"):
        ShardedEMA(nn.Linear(2, 2), SCHEDULES["fast"], compensated=True, into=nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own tracing
def test_a_compiled_function_may_call_update() -> None:
    model = nn.Linear(3, 2)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.5))

    @torch.compile(backend="eager")
    def train(value: torch.Tensor) -> torch.Tensor:
        out = model(value).sum()
        ema.update()
        return out

    for _ in range(3):
        train(torch.ones(3))
    assert ema.num_updates == 3


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}, {"compensated": True}], ids=str)
def test_updates_in_and_out_of_inference_mode_can_follow_each_other(threads, options) -> None:
    torch.manual_seed(0)
    model, naive = Mixed(torch.bfloat16), NaiveAverage(SCHEDULES["fast"].momentum)
    ema = ShardedEMA(model, SCHEDULES, **options)
    for step in range(6):
        for parameter in model.parameters():
            parameter.data.add_(0.25)
        with torch.inference_mode(step in (0, 1, 3)):
            ema.update()
        naive.update(dict(model.named_parameters()))
    for name, value in ema.full_state_dict("fast").items():
        torch.testing.assert_close(value, naive.values[name])


@pytest.mark.parametrize("into", [False, True])
def test_a_vocabulary_cut_in_place_is_told_at_the_next_update(into) -> None:
    """The memory begins at the same address then, in the same strides."""
    model, teacher = nn.Embedding(10, 4), nn.Embedding(10, 4).requires_grad_(False)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.5), into=teacher if into else None)
    ema.update()
    ema.update()
    cut = teacher if into else model
    cut.weight.data = cut.weight.data[:5]
    with pytest.raises(ModelChangedError, match=r"weight now has \[5, 4\]"):
        ema.update()


def test_new_memory_at_the_address_of_the_former_is_noticed() -> None:
    """A storage resized in place gives its memory back, and what is assigned next may get it."""
    memory = bytearray(64)
    one, other = (torch.frombuffer(memory, dtype=torch.float32) for _ in range(2))
    model = nn.ParameterDict({"weight": nn.Parameter(one)})
    guard = Guard(ShardedEMA(model, ConstantSchedule(momentum=0.5))._state.plan.divisions[0].held)
    assert guard.is_current()
    address = model["weight"].data_ptr()
    model["weight"].data = other
    assert model["weight"].data_ptr() == address and not guard.is_current()


def test_off_the_cpu_tensors_that_lie_otherwise_than_their_averages_have_calls_of_their_own() -> None:
    """Else torch would launch the whole list tensor by tensor."""
    live = [torch.empty(2, 3, 4, 5, device="meta") for _ in range(4)]
    live[2] = live[2].to(memory_format=torch.channels_last)
    averaged = [torch.empty(2, 3, 4, 5, device="meta") for _ in live]
    assert by_strides([0, 2, 3], live, averaged) == [[0, 3], [2]]
    assert by_strides([], live, averaged) == []
    on_cpu = [torch.empty_like(each, device="cpu") for each in live]
    assert by_strides([0, 2, 3], on_cpu, averaged) == [[0, 2, 3]]


def test_off_the_cpu_averages_begin_where_vector_loads_do() -> None:
    """After a parameter of one element all others would be read element by element."""
    model = nn.ParameterDict({name: nn.Parameter(torch.randn(size)) for name, size in {"a": 1, "b": 40}.items()})
    shards = ShardedEMA(model, ConstantSchedule(momentum=0.5)).shards
    for device, starts in (("meta", [0, 16]), ("cpu", [0, 1])):
        averages = Averages(shards, dtype=torch.float32, device=torch.device(device))
        assert [value.storage_offset() for value in averages.values] == starts
        assert averages.nbytes == 41 * 4


def test_an_interrupted_preparation_is_made_again(monkeypatch) -> None:
    model = nn.Linear(4, 4, bias=False)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.5))
    ema.update()
    before = model.weight.detach().clone()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("dist_ema.averaging.prepared_update.make_blocks", interrupted)
        ema.update()
    nn.init.zeros_(model.weight)
    ema.update()
    assert torch.equal(ema.full_state_dict()["weight"], before * 0.5)


def test_a_square_matrix_turned_in_place_is_followed() -> None:
    """The same memory, elements and shape, in another order."""
    model = nn.Linear(4, 4, bias=False)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.5))
    ema.update()
    ema.update()
    before = model.weight.detach().clone()
    model.weight.data = model.weight.data.t()
    ema.update()
    assert torch.equal(ema.full_state_dict()["weight"], before.lerp(before.t(), 0.5))


def test_memory_seen_in_another_shape_is_told_at_the_next_update() -> None:
    model = nn.Linear(4, 6, bias=False)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.5))
    ema.update()
    ema.update()
    model.weight.data = model.weight.data.view(8, 3)
    with pytest.raises(ModelChangedError, match=r"weight now has \[8, 3\]"):
        ema.update()


@pytest.mark.parametrize("by_torch", [True, False])
def test_a_device_whose_tensors_torch_cannot_compare_is_guarded_too(monkeypatch, by_torch) -> None:
    if not by_torch:
        monkeypatch.setattr("dist_ema.averaging.live_memory._COMPARED_BY_TORCH", ())
    weight = nn.Parameter(torch.randn(4, 4))
    model = nn.ParameterDict({"weight": weight})
    guard = Guard(ShardedEMA(model, ConstantSchedule(momentum=0.5))._state.plan.divisions[0].held)
    assert guard.is_current()
    for change in (weight.data.t(), weight.data.clone(), weight.data[:2], weight.data.view(2, 8)):
        former, weight.data = weight.data, change
        assert not guard.is_current()
        weight.data = former
        assert guard.is_current()
    model["weight"] = nn.Parameter(weight.data)
    assert not guard.is_current()


def test_tiny_tensors_of_a_teacher_that_lie_end_to_end_in_storages_of_their_own_are_averaged() -> None:
    model, teacher = (nn.ModuleList(nn.Linear(16, 16) for _ in range(4)) for _ in range(2))
    memory = bytearray(4 * sum(parameter.numel() for parameter in teacher.parameters()))
    state, offset = {}, 0
    for name, value in teacher.state_dict().items():
        flat = torch.frombuffer(memory, dtype=torch.float32, offset=offset, count=value.numel())
        state[name], offset = flat.view(value.shape), offset + value.nbytes
    teacher.load_state_dict(state, assign=True)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.5), into=teacher.requires_grad_(False))
    ema.update()
    before = model[3].weight.detach().clone()
    nn.init.ones_(model[3].weight)
    ema.update()
    assert torch.equal(teacher[3].weight, before.lerp(torch.ones(16, 16), 0.5))


def test_a_deep_copy_updates_itself_and_not_the_first() -> None:
    model = nn.Linear(3, 2)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.5))
    ema.update()
    _, other = copy.deepcopy((model, ema))
    other.update()
    assert (ema.num_updates, other.num_updates) == (1, 2)


MOMENTA = [1.0, 0.5, 0.5, 0.25, 0.0, 0.25, 1.0, 0.125, 0.5]


@pytest.mark.filterwarnings("ignore:only your code can rebuild")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_kept_from_the_last_update_take_the_momenta_of_this_one(dtype) -> None:
    """One that stays, changes, is 0 or 1, of two tracks in turn, with a skipped step and a mask between."""
    model = Mixed(dtype)
    schedules = {"a": lambda step: MOMENTA[step], "b": lambda step: MOMENTA[-step]}
    ema = ShardedEMA(model, schedules)
    naive = {name: {} for name in schedules}
    for step in range(len(MOMENTA)):
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape))
        if step == 5:
            ema.update(found_inf=torch.ones(1))
        ema.update(found_inf=torch.zeros(1) if step == 3 else None)
        for name, schedule in schedules.items():
            for fqn, value in model.named_parameters():
                live = value.detach().float()
                weight = schedule(step) if step else 1.0
                naive[name][fqn] = torch.lerp(naive[name].get(fqn, live), live, weight) if weight else naive[name][fqn]
    for name in schedules:
        found = ema.full_state_dict(name)
        assert [fqn for fqn, value in naive[name].items() if not torch.equal(found[fqn], value)] == []


def test_a_deep_copy_after_many_updates_makes_steps_of_its_own() -> None:
    model, ema = mixed_and_updated(3)
    other_model, other = copy.deepcopy((model, ema))
    before = ema.full_state_dict()
    for parameter in other_model.parameters():
        parameter.data.fill_(7.0)
    other.update()
    assert all(torch.equal(value, before[name]) for name, value in ema.full_state_dict().items())
    assert not torch.equal(other.full_state_dict()["p0"], before["p0"])


def mixed_and_updated(updates: int) -> tuple[Mixed, ShardedEMA]:
    model = Mixed(torch.float32)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.5))
    for _ in range(updates):
        ema.update()
    return model, ema


@pytest.mark.parametrize("enabled", [True, False])
def test_an_update_leaves_gradients_as_they_were(enabled: bool) -> None:
    model, ema = mixed_and_updated(2)
    with torch.set_grad_enabled(enabled):
        ema.update()
        assert torch.is_grad_enabled() == enabled
        model.p0.data = torch.randn(3)
        with pytest.raises(ModelChangedError):
            ema.update()
        assert torch.is_grad_enabled() == enabled


@pytest.mark.parametrize("skipped", [None, 0.0, 1.0])
def test_a_compensated_average_is_the_live_weights_while_it_copies_them(skipped) -> None:
    model = nn.Linear(20, 10)
    ema = ShardedEMA(model, after(10, ConstantSchedule(decay=0.999)), compensated=True)
    for scale in (1.0, 1e-4, 1e-7):
        nn.init.normal_(model.weight, std=scale)
        ema.update(found_inf=None if skipped is None else torch.tensor(skipped * (scale == 1e-7)))
    found = ema.full_state_dict()["weight"]
    assert torch.equal(found, model.weight) == (not skipped)
    assert not any(residual.any() for residual in ema._state.averages["ema"].residuals)


def test_a_training_thread_that_outlives_the_main_one_goes_on_updating() -> None:
    script = """
import threading, torch
from dist_ema.averaging.cpu_threads import share_out
share_out(lambda item, worker: None, range(9), 3)
done = []
def late():
    threading.main_thread().join()
    share_out(lambda item, worker: done.append(item), range(9), 3)
    print(sorted(done))
threading.Thread(target=late).start()
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == str(list(range(9))), ran.stderr


class Trained(nn.Module):
    """What may stand in a model that is trained: tied, empty, of several dtypes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4, dtype=dtype) for _ in range(4)))
        self.square = nn.Parameter(torch.randn(5, 5, dtype=dtype))
        self.other = nn.Parameter(torch.randn(5, 5, dtype=torch.float64))
        self.tied = self.layers[0].weight
        self.void = nn.Parameter(torch.empty(0, 3, dtype=dtype))


def acts(folder: Path) -> dict[str, Callable[[ShardedEMA, Trained], object]]:
    """What may come between two updates, and changes what the next one must do."""

    def turned(ema: ShardedEMA, model: Trained) -> None:
        model.square.data = model.square.data.t()

    def replaced(ema: ShardedEMA, model: Trained) -> None:
        model.layers[1].weight = nn.Parameter(model.layers[1].weight.detach() + 1.0)

    def moved(ema: ShardedEMA, model: Trained) -> None:
        model.layers[2].bias.data = model.layers[2].bias.data.clone()

    def of_another_dtype(ema: ShardedEMA, model: Trained) -> None:
        model.layers[3].bias.data = model.layers[3].bias.data.double()

    def frozen(ema: ShardedEMA, model: Trained) -> None:
        model.square.requires_grad_(False)
        ema.update()
        model.square.requires_grad_(True)

    def saved_and_loaded(ema: ShardedEMA, model: Trained) -> None:
        ema.save(folder / "saved")
        ema.update()
        ema.load(folder / "saved")

    def swapped(ema: ShardedEMA, model: Trained) -> None:
        with ema.average_parameters("a"):
            pass

    def track(ema: ShardedEMA, model: Trained) -> None:
        if "c" in ema.tracks:
            ema.drop_track("c")
        else:
            ema.add_track("c", ConstantSchedule(momentum=0.25))

    return {
        "turned": turned,
        "replaced": replaced,
        "moved": moved,
        "of another dtype": of_another_dtype,
        "frozen": frozen,
        "saved and loaded": saved_and_loaded,
        "swapped": swapped,
        "track": track,
        "restart": lambda ema, model: ema.restart(),
        "flag": lambda ema, model: ema.update(found_inf=torch.zeros(1)),
        "skipped": lambda ema, model: ema.update(found_inf=torch.ones(1)),
        "without gradients": lambda ema, model: torch.no_grad()(ema.update)(),
        "in inference mode": lambda ema, model: torch.inference_mode()(ema.update)(),
        "copied": lambda ema, model: copy.copy(ema).num_updates,
        "infinite": lambda ema, model: model.square.data.fill_(float("inf")),
    }


@pytest.mark.filterwarnings("ignore:update number")
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_updates_by_the_steps_of_the_latest_are_those_that_were_made_anew(tmp_path, dtype, interval, seed) -> None:
    runs = []
    repeated = []
    for repeats in (True, False):
        torch.manual_seed(seed)
        model = Trained(dtype)
        tracks = {"a": ConstantSchedule(momentum=0.3), "b": CosineSchedule(momentum=0.5, total_steps=40)}
        ema = ShardedEMA(model, tracks, interval=interval)
        ema._state.repeats = repeats
        chance = random.Random(seed)
        found = []
        between = acts(tmp_path / str(repeats))
        for step in range(60):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.9).add_(0.01 * step)
            repeated.append(repeats and step % interval == 0 and ema._state._updater.can_repeat())
            ema.update()
            if step % 3 == 2:
                between[chance.choice(list(between))](ema, model)
            states = {f"{name} {track}": value for track in "ab" for name, value in ema.full_state_dict(track).items()}
            found.append((ema.num_updates, {name: value.clone() for name, value in states.items()}))
            assert not any(value.requires_grad for row in ema._state.averages.values() for value in row.values)
        runs.append(found)
    assert any(repeated)
    for step, ((number, own), (number_anew, anew)) in enumerate(zip(*runs, strict=True)):
        assert number == number_anew, step
        different = [
            name for name, value in own.items() if not torch.equal(value.nan_to_num(7.0), anew[name].nan_to_num(7.0))
        ]
        assert not different, (step, different)


@pytest.mark.filterwarnings("ignore:only your code can rebuild")
def test_a_schedule_of_the_user_runs_without_gradients_and_may_change_the_model() -> None:
    """The steps of the latest update were taken before the schedule was asked, which had put other weights in."""
    model = nn.Linear(2, 2, bias=False)
    count = nn.Parameter(torch.zeros(()))

    def decay(step: int) -> float:
        count.add_(1.0)
        if step == 4:
            model.weight = nn.Parameter(torch.full((2, 2), 7.0))
        return 1.0

    ema = ShardedEMA(model, decay)
    for _ in range(5):
        ema.update()
    assert count.item() == 4.0 and torch.equal(ema.full_state_dict()["weight"], model.weight)


@pytest.mark.parametrize("width", [2, 64])
def test_whoever_asks_a_live_view_for_a_gradient_gets_none_into_the_averages(width: int) -> None:
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(5)))
    ema = ShardedEMA(model, {"a": ConstantSchedule(momentum=0.5), "b": ConstantSchedule(momentum=0.25)})
    for _ in range(4):
        ema.update()
    for shard in ema.shards:
        shard.live().requires_grad_(True)
    for _ in range(3):
        ema.update()
    assert not any(value.requires_grad for row in ema._state.averages.values() for value in row.values)


@pytest.mark.parametrize("repeats", [True, False])
def test_another_thread_that_reads_the_averages_moves_nothing_twice(repeats: bool) -> None:
    """Torch lets other threads run within a step. One of them took the update for one that was left undone."""
    model = nn.Linear(500, 500, bias=False)
    nn.init.zeros_(model.weight)
    ema = ShardedEMA(model, ConstantSchedule(momentum=0.5))
    ema._state.repeats = repeats
    expected = torch.zeros(())
    ema.update()
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            ema.full_state_dict()
            time.sleep(1e-4)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for step in range(200):
            nn.init.constant_(model.weight, float(step % 3))
            ema.update()
            expected = torch.lerp(expected, torch.tensor(float(step % 3)), 0.5)
            assert (ema._state.averages[ema.tracks[0]].values[0] == expected).all(), step
    finally:
        is_over.set()
        reader.join()
