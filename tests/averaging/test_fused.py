"""What is around the kernel of a GPU: its tables, its variants, and its place in an update that is whole or not at all.

A stand-in takes the place of the kernel (support/kernel_on_host.py); it reads the addresses of the tables as the kernel
does. The kernel itself is tested in test_gpu.py and everything/test_fused_kernel.py.
"""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_on_host import KernelOnHost, move_on_host
from torch import nn

import dist_ema.averaging.fused
from dist_ema import ConstantSchedule, CosineSchedule, ShardedEMA
from dist_ema.averaging.fused import launches
from dist_ema.averaging.fused.launches import Launch
from dist_ema.averaging.prepared_update import Prepared

SCHEDULE = ConstantSchedule(momentum=0.25)
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.filterwarnings("ignore:only your code can rebuild the schedule")


@pytest.fixture
def kernel(monkeypatch) -> Iterator[KernelOnHost]:
    yield move_on_host(monkeypatch)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Tensors of no element, of one, of several chunks, at odd addresses; and some that the kernel does not serve."""
    torch.manual_seed(0)
    model = nn.Module()
    for index, shape in enumerate([(3, 5), (), (0, 4), (33,), (32,), (70, 3), (1,)]):
        model.register_parameter(f"p{index}", nn.Parameter(torch.randn(shape).to(dtype)))
    model.odd = nn.Parameter(torch.randn(51).to(dtype)[1:])
    model.last = nn.Parameter(torch.randn(2, 3, 4, 4).to(dtype, memory_format=torch.channels_last))
    model.wide = nn.Parameter(torch.randn(7).double())
    model.frozen = nn.Parameter(torch.randn(6).to(dtype), requires_grad=False)
    model.register_buffer("mean", torch.randn(9))
    return model


def trained(model: nn.Module, step: int, bad: Sequence[float] = ()) -> None:
    """Other weights in the same memory; some of them are no finite number."""
    torch.manual_seed(100 + step)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.copy_(torch.randn(value.shape))
        for index, number in enumerate(bad):
            model.p5[index, 1] = number
        model.mean.add_(1.0)


def averages(ema: ShardedEMA) -> list[torch.Tensor]:
    return [value for track in ema._state.averages.values() for value in (*track.values, *track.residuals)]


def assert_alike(ours: ShardedEMA, theirs: ShardedEMA) -> None:
    assert ours.num_updates == theirs.num_updates
    for one, other in zip(averages(ours), averages(theirs), strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), (one, other)


def is_prepared(ema: ShardedEMA) -> bool:
    """Whether the next update would take the tables that there are."""
    prepared = ema._state._updater._prepared
    return prepared is not None and prepared.is_current(flagged=False)


def made_launches(ema: ShardedEMA) -> list[Launch]:
    return [block.launch for block in ema._state._updater._prepared.blocks if block.launch is not None]


Change = Callable[[nn.Module, ShardedEMA, int], None]


def followed(made: Callable[[], nn.Module], update: Change, steps: int = 6, **options: Any) -> ShardedEMA:
    """An average after some updates; `update` does each of them."""
    model = made()
    ema = ShardedEMA(model, options.pop("schedule", SCHEDULE), update_buffers=True, **options)
    for step in range(steps):
        update(model, ema, step)
    ema.wait()
    return ema


def both(update: Change, made: Callable[[], nn.Module] = net, **options: Any) -> tuple[ShardedEMA, ShardedEMA]:
    """The same updates with the kernel and without it: averages must be alike, bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        kernel = move_on_host(patch)
        ours = followed(made, update, **options)
        assert kernel.launched
    theirs = followed(made, update, **options)
    assert_alike(ours, theirs)
    return ours, theirs


class Halting:
    """A schedule that stands still at every second update."""

    def momentum(self, step: int) -> float:
        return step % 2 * 0.7


TRACKS = {
    "slow": CosineSchedule(0.3, 0.001, total_steps=10),
    "hard": ConstantSchedule(momentum=1.0),
    "held": Halting(),
}
OPTIONS = [{}, {"skip_nonfinite": True}, {"compensated": True}, {"skip_nonfinite": True, "compensated": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "_".join(options))
@pytest.mark.parametrize("schedule", [TRACKS["slow"], TRACKS], ids=["one", "three"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_launch_moves_what_the_steps_move(dtype, schedule, options) -> None:
    """Momenta that change, and tracks that stand still, or that are the live weights."""

    def update(model: nn.Module, ema: ShardedEMA, step: int) -> None:
        trained(model, step, [NAN, INF, -INF] if step == 3 and "skip_nonfinite" in options else [])
        flag = [None, torch.tensor(0.0), torch.tensor([1.0])][step % 3] if step > 2 else None
        ema.update(found_inf=flag)

    ours, theirs = both(update, lambda: net(dtype), schedule=schedule, **options)
    assert ours.num_updates == 5  # of 6, one was skipped
    if "skip_nonfinite" in options:
        assert ours.num_refused() == theirs.num_refused() == 3


def test_a_launch_that_is_kept_for_the_next_update_takes_its_momenta() -> None:
    """Where nothing but momenta changes, the steps of an update are made once."""

    def update(model: nn.Module, ema: ShardedEMA, step: int) -> None:
        for value in model.parameters():
            nn.init.constant_(value, step)
        ema.update()
        assert step < 2 or ema._state._updater._moves.kept is not None

    two = {"slow": TRACKS["slow"], "fast": CosineSchedule(0.4, 0.1, total_steps=10)}
    for schedule in (TRACKS["slow"], two):
        both(update, lambda: nn.Linear(5, 40), schedule=schedule)


def test_tracks_that_come_and_go_move_from_when_they_begin() -> None:
    def update(model: nn.Module, ema: ShardedEMA, step: int) -> None:
        trained(model, step, [NAN] if step in (3, 5) else [])
        if step == 3:
            ema.add_track("late", ConstantSchedule(momentum=0.5))
            ema.add_track("branch", SCHEDULE, start="ema")
        if step == 7:
            ema.drop_track("late")
        ema.update()

    ours, theirs = both(update, schedule={"ema": TRACKS["slow"]}, skip_nonfinite=True, steps=9, interval=2)
    assert ours.num_refused() == theirs.num_refused() > 0


def test_a_load_or_a_restart_leaves_no_residual_and_no_former_value(tmp_path: Path) -> None:
    def update(model: nn.Module, ema: ShardedEMA, step: int) -> None:
        trained(model, step)
        if step == 3:
            ema.save(tmp_path / "saved")
        if step == 5:
            ema.load(tmp_path / "saved")
        if step == 7:
            ema.restart()
        ema.update()

    both(update, compensated=True, steps=9)


@pytest.mark.parametrize(
    "flag",
    [
        torch.tensor([True, False]),
        torch.tensor([1e-300, 0.0], dtype=torch.float64),
        torch.tensor([3, 0]),
        torch.tensor([NAN, 0.0], dtype=torch.bfloat16),
    ],
    ids=lambda flag: str(flag.dtype),
)
def test_a_flag_of_any_dtype_and_shape_is_not_0_or_it_is(kernel, flag) -> None:
    """Each dtype would be a variant to compile, and a small number a 0 in another dtype."""
    model = net()
    ema = ShardedEMA(model, SCHEDULE)
    ema.update()
    trained(model, 1)
    former = [value.clone() for value in averages(ema)]
    for shape in ((), (1,), (1, 1)):
        ema.update(found_inf=flag[0].reshape(shape))
        assert all(map(torch.equal, averages(ema), former))
    for shape in ((), (1,), (1, 1)):
        ema.update(found_inf=flag[1].reshape(shape))
    assert not torch.equal(averages(ema)[0], former[0]) and ema.num_updates == 4
    assert len([made for made in kernel.compiled if made["FLAGGED"]]) == len(made_launches(ema))


def test_a_storage_that_was_freed_and_came_back_elsewhere_is_followed(kernel) -> None:
    """As engines offload weights between two rounds: it is the same storage object, at another address."""
    model = net()
    ema = ShardedEMA(model, SCHEDULE)
    ema.update()
    ema.update()
    storage, address = model.p5.untyped_storage(), model.p5.data_ptr()
    storage.resize_(0)
    in_the_way = [torch.full((70, 3), 9.0) for _ in range(50)]
    storage.resize_(70 * 3 * 4)
    assert model.p5.data_ptr() != address and in_the_way
    assert not is_prepared(ema)
    trained(model, 1)
    expected = ema.full_state_dict()["p5"].lerp(model.p5.detach(), 0.25)
    ema.update()
    assert torch.equal(ema.full_state_dict()["p5"], expected)


@pytest.mark.parametrize("whose", ["model", "teacher"])
def test_a_teacher_and_its_model_may_get_other_memory(kernel, whose) -> None:
    model, teacher = nn.Linear(5, 40), nn.Linear(5, 40).requires_grad_(False)
    ema = ShardedEMA(model, SCHEDULE, into=teacher)
    expected = {name: value.clone() for name, value in model.state_dict().items()}

    def update() -> None:
        for name, value in model.named_parameters():
            nn.init.normal_(value)
            expected[name] = expected[name].lerp(value.detach(), 0.25)
        ema.update()
        for name, value in teacher.state_dict().items():
            assert torch.equal(value, expected[name])

    ema.update()
    for change in (
        lambda module: setattr(module.weight, "data", module.weight.data.clone()),
        lambda module: module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True),
        lambda module: moved_storage(module.weight),
    ):
        change({"model": model, "teacher": teacher}[whose])
        assert not is_prepared(ema)  # else the kernel would write to freed memory
        update()
    update()
    assert kernel.launched


def moved_storage(value: torch.Tensor) -> None:
    kept, storage, address = value.detach().clone(), value.untyped_storage(), value.data_ptr()
    storage.resize_(0)
    others = [torch.empty_like(kept) for _ in range(50)]
    storage.resize_(kept.nbytes)
    value.data.copy_(kept)
    assert value.data_ptr() != address and others


def test_autograd_sees_that_an_update_moved_what_the_forward_of_a_teacher_needs(kernel) -> None:
    """A kernel that torch does not know counts no version: the gradient would be of other weights, without a word.

    A loss may go through a teacher to what the model made.
    """
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    teacher = copy.deepcopy(model).requires_grad_(False)
    ema = ShardedEMA(model, SCHEDULE, into=teacher)
    ema.update()
    loss = teacher(torch.randn(3, 5, requires_grad=True)).sum()
    ema.update()
    assert kernel.launched
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def fails_for(kernel: KernelOnHost, is_bad: Callable[[dict[str, Any]], bool]) -> None:
    def compile_(num_chunks: int, constants: dict[str, Any]) -> None:
        if is_bad(constants):
            raise RuntimeError("the compiler is gone")

    kernel.before = compile_


@pytest.mark.parametrize("variant", ["FLAGGED", "COUNTS", "SKIPS", "any"])
def test_a_variant_that_does_not_compile_leaves_updates_to_torch(variant, caplog) -> None:
    """In the midst of a run, at the first step that has a flag: an update that began could not go on."""
    made: list[KernelOnHost] = []

    def update(model: nn.Module, ema: ShardedEMA, step: int) -> None:
        trained(model, step, [NAN] if step == 2 else [])
        ema.update(found_inf=torch.tensor([float(step == 4)]) if step in (3, 4) else None)

    with pytest.MonkeyPatch.context() as patch:
        made.append(move_on_host(patch))
        fails_for(made[0], lambda constants: variant == "any" or constants[variant])
        ours = followed(net, update, steps=8, skip_nonfinite=True)
        launched = made_launches(ours)
    theirs = followed(net, update, steps=8, skip_nonfinite=True)
    assert_alike(ours, theirs)
    assert ours.num_refused() == theirs.num_refused() == 1
    assert not launched and bool(made[0].launched) == (variant == "FLAGGED")
    (record,) = [record for record in caplog.records if "Triton" in record.getMessage()]
    assert record.levelname == "WARNING" and "the compiler is gone" in record.getMessage()


def test_what_did_not_compile_is_not_compiled_again_whenever_memory_is_replaced(kernel) -> None:
    """A compiler may take seconds to fail, and a model may give its tensors other memory at each step."""
    tried: list[int] = []

    def compile_(num_chunks: int, constants: dict[str, Any]) -> None:
        tried.append(num_chunks)
        raise RuntimeError("the compiler is gone")

    kernel.before = compile_
    model = nn.Linear(5, 40)
    ema = ShardedEMA(model, SCHEDULE)
    for _ in range(5):
        model.weight.data = model.weight.data.clone()
        ema.update()
    assert tried == [0]


def test_what_a_signal_handler_raises_while_the_kernel_compiles_is_no_error_of_the_compiler(kernel, caplog) -> None:
    """A compiler takes seconds: the time limit of a job may come meanwhile, and must not be lost."""
    model = net()
    signals = [signal.SIGUSR1]

    def compile_(num_chunks: int, constants: dict[str, Any]) -> None:
        if signals:
            os.kill(os.getpid(), signals.pop())
            time.sleep(0.05)

    def handle(number: int, frame: Any) -> None:
        raise TimeoutError("the job is over")

    kernel.before = compile_
    ema = ShardedEMA(model, SCHEDULE)
    ema.update()
    former = signal.signal(signal.SIGUSR1, handle)
    try:
        with pytest.raises(TimeoutError, match="the job is over"):
            ema.update()
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert not signals and not caplog.records and ema.num_updates == 1
    ema.update()
    assert ema.num_updates == 2 and made_launches(ema)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "_".join(options))
def test_an_interrupt_around_a_launch_moves_and_counts_everything_once(when, options) -> None:
    """The launch may have reached the device or not, one chunk of many or all of them."""

    def update(model: nn.Module, ema: ShardedEMA, step: int) -> None:
        trained(model, step, [NAN, INF] if step == 3 and "skip_nonfinite" in options else [])
        interrupts = [KeyboardInterrupt] if step in (3, 5) else []

        def interrupt(num_chunks: int, constants: dict[str, Any]) -> None:
            if num_chunks and interrupts:
                raise interrupts.pop()

        kernel = getattr(dist_ema.averaging.fused, "kernel", None)
        if not isinstance(kernel, KernelOnHost):
            ema.update()
            return
        kernel.before = kernel.after = lambda num_chunks, constants: None
        setattr(kernel, when, interrupt)
        if interrupts:
            with pytest.raises(KeyboardInterrupt):
                ema.update()
        else:
            ema.update()
        assert not interrupts

    ours, theirs = both(update, schedule=TRACKS, **options)
    if "skip_nonfinite" in options:
        assert ours.num_refused() == theirs.num_refused() == 2


def test_the_number_of_a_launch_comes_round_after_2_to_the_31(kernel) -> None:
    model = nn.Linear(5, 40)
    ema = ShardedEMA(model, SCHEDULE)
    ema.update()
    ema.update()
    for launch in made_launches(ema):
        launch._number.fill_(2**31 - 3)
    expected = ema.full_state_dict()
    for _ in range(5):
        for name, value in model.named_parameters():
            nn.init.normal_(value)
            expected[name] = expected[name].lerp(value.detach(), 0.25)
        ema.update()
    assert all(torch.equal(value, expected[name]) for name, value in ema.full_state_dict().items())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_another_default_device_of_the_user_does_not_reach_the_tables(kernel, caplog, device) -> None:
    """`torch.set_default_device("cuda")`: tables that are made there cannot be pinned, and every update was slow."""
    model = net()
    ema = ShardedEMA(model, SCHEDULE)
    ema.update()
    with torch.device(device):
        ema.update()
    assert made_launches(ema) and not caplog.records


def test_without_memory_for_an_update_the_average_is_whole_and_goes_on(kernel, monkeypatch) -> None:
    """The memory is wanted anew after that of the model was replaced."""
    model = nn.Linear(5, 40)
    ema = ShardedEMA(model, SCHEDULE)
    ema.update()
    ema.update()
    model.weight.data = torch.ones(40, 5)
    expected = ema.full_state_dict()["weight"].lerp(torch.ones(40, 5), 0.25)

    def none_left(self: Prepared) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Prepared, "_make_scratches", none_left)
        with pytest.raises(torch.OutOfMemoryError):
            ema.update()
    assert ema.num_updates == 2 and ema._state._updater._prepared is None
    ema.update()
    assert torch.equal(ema.full_state_dict()["weight"], expected) and made_launches(ema)


def test_a_copy_moves_its_own_memory_and_not_that_of_the_original(kernel) -> None:
    model = nn.Linear(5, 40)
    ema = ShardedEMA(model, SCHEDULE)
    ema.update()
    ema.update()
    other_model, other = copy.deepcopy((model, ema))
    former, expected = ema.full_state_dict(), other.full_state_dict()["weight"]
    nn.init.ones_(other_model.weight)
    other.update()
    assert all(torch.equal(value, former[name]) for name, value in ema.full_state_dict().items())
    assert torch.equal(other.full_state_dict()["weight"], expected.lerp(torch.ones(40, 5), 0.25))


def negative() -> torch.Tensor:
    """What torch shows with the other sign, as the conjugate of a complex number has it."""
    return torch.complex(torch.ones(1), torch.ones(1)).conj().imag


class Doubled(torch.Tensor):
    """A tensor whose values are not those in its memory."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("value", [negative(), torch.ones(3).as_subclass(Doubled), torch.ones(3, 4).t()])
def test_a_tensor_whose_memory_does_not_have_its_values_is_left_to_torch(monkeypatch, value) -> None:
    monkeypatch.setattr(launches, "_DEVICE_TYPES", ("cpu",))
    assert not launches.can_move(value, [torch.zeros(value.shape)])
    assert launches.can_move(
        value.clone(memory_format=torch.contiguous_format).as_subclass(torch.Tensor), [torch.zeros(value.shape)]
    )


def test_many_tracks_do_not_make_the_compiler_work_for_minutes() -> None:
    """It unrolls the tracks: 32 of them took two minutes."""
    many = {str(index): ConstantSchedule(momentum=index / 100) for index in range(1, 20)}

    def update(model: nn.Module, ema: ShardedEMA, step: int) -> None:
        trained(model, step)
        ema.update()

    with pytest.MonkeyPatch.context() as patch:
        kernel = move_on_host(patch)
        ours = followed(net, update, schedule=many)
        assert not kernel.compiled
    assert_alike(ours, followed(net, update, schedule=many))


def test_nothing_is_made_while_a_graph_is_captured(kernel, monkeypatch, caplog) -> None:
    """The graph would copy the tables anew at each replay, from host memory that others have by then."""
    model = nn.Linear(5, 40)
    ema = ShardedEMA(model, SCHEDULE)
    ema.update()
    monkeypatch.setattr(launches, "_is_capturing", lambda: True)
    ema.update()
    assert not made_launches(ema) and not caplog.records


def test_an_interpreted_kernel_does_not_read_addresses_of_a_gpu(kernel, monkeypatch) -> None:
    """TRITON_INTERPRET=1, with which users look for errors in kernels of their own: reading crashes the process."""
    monkeypatch.setattr(Launch, "_is_on_gpu", True)
    monkeypatch.setattr(KernelOnHost, "IS_COMPILED", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        Launch(kernel, [torch.ones(3)], [[torch.ones(3)]], num_tracks=1, skips=False)  # type: ignore[arg-type]
