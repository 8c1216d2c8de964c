"""What only a GPU can show: no host sync, no allocation, and an order of streams that no slow update can upset.

The same code paths run on a CPU in averaging/test_streams.py and averaging/test_update.py.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import NaiveAverage
from torch import nn

from dist_ema import ConstantSchedule, ShardedEMA
from dist_ema.averaging.fused.launches import Launch
from dist_ema.averaging.streams import HostThread
from dist_ema.uninterrupted.jobs import Job

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

SCHEDULE = ConstantSchedule(momentum=0.25)
FP32_AND_BF16 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
OVERLAP = pytest.mark.parametrize("overlap", [False, True], ids=["in_line", "overlap"])

# About 50 ms on a GPU of 1 to 2 GHz.
SLOW_CYCLES = 80_000_000


def model_on_gpu(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    for index, shape in enumerate([(300, 700), (7,), (64, 3, 3, 3), (0, 4), *[(33,)] * 8, (5000, 1000)]):
        model.register_parameter(f"p{index}", nn.Parameter(torch.randn(shape, device="cuda").to(dtype)))
    return model


def step_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.fixture
def slow_updates(monkeypatch) -> Iterator[None]:
    """The device sleeps before it moves the averages, or fetches for them, on whatever stream that is."""
    do = Job.__call__

    def late(self: Job) -> None:
        torch.cuda._sleep(SLOW_CYCLES)
        do(self)

    monkeypatch.setattr(Job, "__call__", late)
    yield


def warmed_up(ema: ShardedEMA) -> ShardedEMA:
    """After updates whose kernels were loaded, which may wait for the whole device."""
    for _ in range(3):
        ema.update()
    ema.restart()
    torch.cuda.synchronize()
    return ema


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Within some rounding units of 1: one kernel may fuse what another does not, and differences cancel."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.cpu(), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@FP32_AND_BF16
@OVERLAP
@pytest.mark.parametrize("flagged", [False, True], ids=["", "found_inf"])
@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}, {"compensated": True}], ids=["", "skip", "comp"])
def test_an_update_does_not_wait_for_the_device(dtype, overlap, options, flagged) -> None:
    """As far as torch sees it: copies to pageable memory, `item`, waiting for a stream; not waiting for an event."""
    model = model_on_gpu(dtype)
    ema = ShardedEMA(model, {"one": SCHEDULE, "two": SCHEDULE}, overlap=overlap, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flag = torch.zeros(1, device="cuda") if flagged else None
    for _ in range(3):
        step_by_hand(model, optimizer)
        ema.update(found_inf=flag)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            step_by_hand(model, optimizer)
            ema.update(found_inf=flag)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@FP32_AND_BF16
@OVERLAP
def test_an_update_takes_no_memory(dtype, overlap) -> None:
    model = model_on_gpu(dtype)
    ema = ShardedEMA(model, SCHEDULE, overlap=overlap)
    for _ in range(3):
        ema.update()
    torch.cuda.synchronize()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    ema.update()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations


@FP32_AND_BF16
@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_slow_update_does_not_see_the_weights_of_the_next_step(slow_updates, dtype, device) -> None:
    model = model_on_gpu(dtype)
    ema = warmed_up(ShardedEMA(model, SCHEDULE, device=device, overlap=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    naive = NaiveAverage(SCHEDULE.momentum)
    for _ in range(4):
        step_by_hand(model, optimizer)
        ema.update()
        naive.update(dict(model.named_parameters()))
    close(ema.full_state_dict(), naive.values)


def test_a_slow_update_runs_beside_what_comes_next(slow_updates) -> None:
    """That there is an overlap at all: the training stream is free while the side stream sleeps."""
    model = model_on_gpu()
    ema = warmed_up(ShardedEMA(model, SCHEDULE, overlap=True))
    ema.update()
    ema.update()
    training = torch.cuda.Event()
    training.record()
    training.synchronize()
    side = ema._state._updater.stream._stream  # type: ignore[attr-defined]
    assert not side.query()
    ema.wait()
    torch.cuda.current_stream().synchronize()
    assert side.query()


def test_a_slow_update_is_waited_for_on_every_stream_that_joins_it(slow_updates) -> None:
    model = model_on_gpu()
    ema = warmed_up(ShardedEMA(model, SCHEDULE, overlap=True))
    naive = NaiveAverage(SCHEDULE.momentum)
    for _ in range(3):
        ema.update()
        naive.update(dict(model.named_parameters()))
        with torch.cuda.stream(torch.cuda.Stream()):
            ema.wait()  # the first to join, and not the one that writes
        step_by_hand(model, torch.optim.SGD(model.parameters(), lr=0.1))
    close(ema.full_state_dict(), naive.values)


def test_every_reader_waits_for_a_slow_update(slow_updates, tmp_path: Path) -> None:
    model = model_on_gpu()
    ema = ShardedEMA(model, SCHEDULE, overlap=True)
    naive = NaiveAverage(SCHEDULE.momentum)

    def train() -> None:
        ema.wait()
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        ema.update()
        naive.update(dict(model.named_parameters()))

    train()
    train()
    with ema.average_parameters():
        close({name: value.detach().cpu() for name, value in model.named_parameters()}, naive.values)
    train()
    ema.save(tmp_path / "saved")
    other = ShardedEMA(model, SCHEDULE)
    other.load(tmp_path / "saved")
    close(other.full_state_dict(), naive.values)
    train()
    ema.save(tmp_path / "saved", background=True)
    expected = {name: value.clone() for name, value in naive.values.items()}
    train()
    ema.wait()
    other.load(tmp_path / "saved")
    close(other.full_state_dict(), expected)


@FP32_AND_BF16
@OVERLAP
def test_averages_in_host_memory_are_those_of_a_cpu_bit_for_bit(dtype, overlap) -> None:
    model = model_on_gpu(dtype)
    ema = ShardedEMA(model, SCHEDULE, device="cpu", overlap=overlap)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    naive = NaiveAverage(SCHEDULE.momentum)
    for _ in range(5):
        step_by_hand(model, optimizer)
        ema.update()
        naive.update({name: value.detach().cpu() for name, value in model.named_parameters()})
    landings = ema._state._updater._prepared._landings
    assert len(landings) == 2 and all(landing.is_pinned() for landing in landings)
    copy.deepcopy((model, ema))[1].update()
    for name, value in ema.full_state_dict().items():
        assert torch.equal(value, naive.values[name]), name


@OVERLAP
@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_step_that_a_fused_optimizer_skipped_is_not_averaged(overlap, device) -> None:
    model = nn.Linear(8, 8).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    ema = ShardedEMA(model, SCHEDULE, device=device, overlap=overlap)
    naive = NaiveAverage(SCHEDULE.momentum)
    hook = optimizer.register_step_post_hook(lambda own, *_: ema.update(found_inf=getattr(own, "found_inf", None)))
    for step in range(6):
        loss = model(torch.ones(1, 8, device="cuda")).sum() * (float("inf") if step in (2, 4) else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step not in (2, 4):
            naive.update(dict(model.named_parameters()))
    hook.remove()
    copy.deepcopy((model, ema))
    assert ema.num_updates == 4
    close(ema.full_state_dict(), naive.values)


def test_memory_that_a_slow_update_reads_is_not_given_to_others(slow_updates) -> None:
    """The weights are replaced, and their memory taken for something else, while the update has yet to begin."""
    model = nn.Linear(1000, 1000, bias=False).cuda()
    ema = warmed_up(ShardedEMA(model, SCHEDULE, overlap=True))
    ema.update()
    nn.init.ones_(model.weight)
    expected = ema.full_state_dict()["weight"].lerp(torch.ones(1000, 1000), 0.25)
    ema.update()
    model.weight.data = torch.zeros(1000, 1000, device="cuda")
    # As the next update would have it: nobody refers to the first weights any more.
    ema._state._updater._prepared = None
    ema._state.shards[0].live()
    others = [torch.full((1000, 1000), 7.0, device="cuda") for _ in range(20)]
    close(ema.full_state_dict(), {"weight": expected})
    assert all(bool((each == 7.0).all()) for each in others)


def test_the_thread_of_averages_in_host_memory_is_on_the_device_of_the_weights() -> None:
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    stream = HostThread(last)
    found: list[int] = []
    stream.run(lambda: found.append(torch.cuda.current_device()))
    stream.join()
    stream.run(lambda: found.append(torch.cuda.current_stream(last) == stream._stream))
    stream.join()
    assert found == [last.index, True]


def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on updates take torch's own kernels."""
    monkeypatch.setattr("dist_ema.averaging.prepared_update.launch_for", lambda *_, **__: None)


def launches(ema: ShardedEMA) -> list[Any]:
    blocks = ema._state._updater._prepared.blocks  # type: ignore[attr-defined]
    return [block.launch for block in blocks]


TRACKS = {
    "one": SCHEDULE,
    "two": ConstantSchedule(momentum=0.001),
    "hard": ConstantSchedule(momentum=1.0),
    "held": ConstantSchedule(momentum=0.7),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@OVERLAP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("flagged", [False, True], ids=["", "found_inf"])
@pytest.mark.parametrize("names", [["one"], ["one", "two", "hard", "held"]], ids=len)
@pytest.mark.parametrize(
    "options",
    [{}, {"skip_nonfinite": True}, {"compensated": True}, {"skip_nonfinite": True, "compensated": True}],
    ids=["", "skip", "comp", "skip_comp"],
)
def test_one_kernel_gives_the_bits_of_torchs_own(dtype, overlap, options, names, flagged) -> None:
    fused, stepwise = model_on_gpu(dtype), model_on_gpu(dtype)
    schedules = {name: TRACKS[name] for name in names}
    ours = ShardedEMA(fused, schedules, overlap=overlap, **options)
    flag = torch.zeros(1, device="cuda") if flagged else None
    with pytest.MonkeyPatch.context() as patched:
        theirs = ShardedEMA(stepwise, schedules, overlap=overlap, **options)
        for step in range(6):
            torch.manual_seed(step)
            for one, other in zip(fused.parameters(), stepwise.parameters(), strict=True):
                value = torch.randn(one.shape, device="cuda") * 10.0 ** torch.randint(-3, 4, one.shape, device="cuda")
                if step == 3 and value.numel() and "skip_nonfinite" in options:
                    value.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])[: value.numel()]
                ours.wait()
                theirs.wait()
                with torch.no_grad():
                    one.copy_(value.clamp(-6e4, 6e4) if step != 3 else value)
                    other.copy_(one)
            if flag is not None:
                flag.fill_(float(step == 4))
            ours.update(found_inf=flag)
            by_torch(patched)
            theirs.update(found_inf=flag)
            patched.undo()
    ours.wait()
    theirs.wait()
    assert all(launches(ours)) and not any(launches(theirs))
    for name in names:
        ours_now, theirs_now = ours._state.averages[name], theirs._state.averages[name]
        for one, other in zip(ours_now.values, theirs_now.values, strict=True):
            assert torch.equal(one.view(torch.int32), other.view(torch.int32)), name
        assert all(map(torch.equal, ours_now.residuals, theirs_now.residuals)), name
    if "skip_nonfinite" in options:
        assert ours.num_refused() == theirs.num_refused() > 0


def test_a_launch_that_an_interrupt_cut_off_is_repeated_and_moves_nothing_twice(monkeypatch) -> None:
    """Ctrl-C comes after the kernel was given to the device, and before the call returns."""
    model = model_on_gpu()
    ema = warmed_up(ShardedEMA(model, SCHEDULE))
    naive = NaiveAverage(SCHEDULE.momentum)
    run, interrupts = Launch.__call__, [1]

    def interrupted(self: Launch, *arguments: Any) -> None:
        run(self, *arguments)
        if not interrupts:
            interrupts.append(1)
            raise KeyboardInterrupt

    for step in range(4):
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        interrupts[:] = [] if step == 2 else [1]
        monkeypatch.setattr(Launch, "__call__", interrupted)
        if step == 2:
            with pytest.raises(KeyboardInterrupt):
                ema.update()
        else:
            ema.update()
        naive.update(dict(model.named_parameters()))
    assert ema.num_updates == 4
    close(ema.full_state_dict(), naive.values)


def captured(model: nn.Module) -> tuple[ShardedEMA, torch.cuda.CUDAGraph]:
    """An average of the model, and a graph of one of its updates."""
    ema = warmed_up(ShardedEMA(model, SCHEDULE))
    ema.update()
    ema.update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema.update()
    return ema, graph


def test_updates_in_a_captured_graph_move_at_every_replay() -> None:
    model = model_on_gpu()
    ema, graph = captured(model)
    naive = {name: value.cuda() for name, value in ema.full_state_dict().items()}
    for step in range(3):
        torch.manual_seed(step)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        graph.replay()
        naive = {name: naive[name].lerp(value, 0.25) for name, value in model.named_parameters()}
    close(ema.full_state_dict(), naive)


def test_updates_go_on_where_triton_cannot_compile(monkeypatch, caplog) -> None:
    """A container without a C compiler, say: the same bits, and one line in the log that tells of it."""
    model = model_on_gpu(torch.bfloat16)
    monkeypatch.setattr("dist_ema.averaging.fused.launches._has_warned", False)
    monkeypatch.setattr(
        "dist_ema.averaging.fused.launches.Launch.make_ready", lambda self, **_: 1 / 0 if self.device else None
    )
    ema, naive = ShardedEMA(model, SCHEDULE), NaiveAverage(SCHEDULE.momentum)
    for _ in range(3):
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        ema.update()
        naive.update(dict(model.named_parameters()))
    assert not any(launches(ema))
    assert [record.levelname for record in caplog.records if "Triton" in record.message] == ["WARNING"]
    close(ema.full_state_dict(), naive.values)


def test_tensors_at_odd_addresses_move_too() -> None:
    """As the views of a flat parameter, whose live tensors begin at any element."""
    flat = torch.randn(1_000_003, device="cuda").bfloat16()
    model = nn.Module()
    model.odd = nn.Parameter(flat[1:500_000])
    model.even = nn.Parameter(flat[512_000:])
    ema, naive = ShardedEMA(model, SCHEDULE), NaiveAverage(SCHEDULE.momentum)
    for _ in range(3):
        nn.init.normal_(model.odd)
        ema.update()
        naive.update(dict(model.named_parameters()))
    assert len(launches(ema)) == 2 and all(launches(ema))
    close(ema.full_state_dict(), naive.values)


def test_a_storage_that_was_freed_and_came_back_elsewhere_is_followed() -> None:
    """As engines offload weights between two rounds. The tables have addresses, and the storage is the same object."""
    model = nn.Linear(1000, 1000, bias=False).cuda()
    ema, naive = warmed_up(ShardedEMA(model, SCHEDULE)), NaiveAverage(SCHEDULE.momentum)
    address, storage, others = model.weight.data_ptr(), model.weight.untyped_storage(), []
    for _ in range(3):
        ema.update()
        naive.update(dict(model.named_parameters()))
        nbytes = storage.nbytes()
        storage.resize_(0)
        others.append(torch.full((1000, 1000), 7.0, device="cuda"))
        storage.resize_(nbytes)
        assert model.weight.data_ptr() != address
        address = model.weight.data_ptr()
        nn.init.normal_(model.weight)
    assert all(launches(ema)) and all(bool((other == 7.0).all()) for other in others)
    close(ema.full_state_dict(), naive.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.int32], ids=str)
def test_the_first_flag_of_a_run_may_come_at_any_step(dtype) -> None:
    model = model_on_gpu()
    ema, naive = warmed_up(ShardedEMA(model, SCHEDULE)), NaiveAverage(SCHEDULE.momentum)
    for step in range(6):
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        flag = torch.tensor([False, step == 4], device="cuda")[1].to(dtype) if step >= 3 else None
        ema.update(found_inf=flag)
        if step != 4:
            naive.update(dict(model.named_parameters()))
    assert ema.num_updates == 5 and all(launches(ema))
    close(ema.full_state_dict(), naive.values)


def test_another_default_device_of_the_user_does_not_reach_the_tables() -> None:
    model = model_on_gpu()
    ema = ShardedEMA(model, SCHEDULE)
    with torch.device("cuda"):
        for _ in range(3):
            ema.update()
    assert all(launches(ema))


def test_autograd_sees_that_an_update_moved_what_the_forward_of_a_teacher_needs() -> None:
    model = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50)).cuda()
    teacher = copy.deepcopy(model).requires_grad_(False)
    ema = ShardedEMA(model, SCHEDULE, into=teacher)
    ema.update()
    loss = teacher(torch.randn(3, 50, device="cuda", requires_grad=True)).sum()
    ema.update()
    assert all(launches(ema))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_outlives_the_tables_of_the_update_that_it_captured() -> None:
    """An update after the capture makes tables anew, where memory of the model was replaced."""
    model = model_on_gpu()
    ema, graph = captured(model)
    former = model.p0.data
    model.p0.data = former.clone()
    ema.update()
    others = [torch.full((1 << n,), -1, dtype=torch.int64, device="cuda") for n in range(5, 20) for _ in range(20)]
    naive = {name: value.cuda() for name, value in ema.full_state_dict().items()}
    graph.replay()
    live = dict(model.named_parameters()) | {"p0": former}
    close(ema.full_state_dict(), {name: value.lerp(live[name], 0.25) for name, value in naive.items()})
    assert all(bool((other == -1).all()) for other in others)


def test_with_triton_as_an_interpreter_updates_go_on() -> None:
    """TRITON_INTERPRET=1, with which users look for errors in kernels of their own: it reads no address of a GPU."""
    program = (
        "import torch; from dist_ema import ConstantSchedule, ShardedEMA\n"
        "model = torch.nn.Linear(50, 50).cuda(); ema = ShardedEMA(model, ConstantSchedule(momentum=0.25))\n"
        "for _ in range(3): ema.update()\n"
        "assert torch.equal(ema.full_state_dict()['weight'], model.weight.detach().cpu())\n"
    )
    subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True, timeout=120
    )
