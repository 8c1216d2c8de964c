"""An average that lives in a teacher, on every layout: it equals the one kept aside, runs forward, comes back whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from layouts_zoo import (
    WORLDS,
    bare,
    build_layout,
    clean,
    is_fsdp1,
    read_whole,
    runs_forward,
    set_whole,
    settle,
    whole_parameters,
)
from oracle import NaiveAverage
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication

from dist_ema import ConfigError, ConstantSchedule, CosineSchedule, ShardedEMA, UnsupportedModelError

SCHEDULE = CosineSchedule(0.3, 0.01, total_steps=6)
STEPS = 5
TOKENS = torch.arange(8).view(2, 4)
CASES = [(layout, size) for layout, sizes in WORLDS.items() for size in sizes if size in (1, 2, 4)]


def taught(layout: str, **options: object) -> tuple[nn.Module, nn.Module, ShardedEMA]:
    student, teacher = build_layout(layout), build_layout(layout, seed=1, frozen=True)
    return student, teacher, ShardedEMA(student, SCHEDULE, into=teacher, **options)


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {clean(name): value for name, value in model.named_buffers()}


def assert_shows(teacher: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = read_whole(teacher)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name}: {(found[name] != value).sum()} elements differ"


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad(), implicit_replication():
        out = model(TOKENS)
    return out.full_tensor() if isinstance(out, DTensor) else out


def follow(layout: str) -> None:
    student, teacher, ema = taught(layout)
    assert_shows(teacher, read_whole(student))
    naive, twin = NaiveAverage(SCHEDULE.momentum), bare(layout)
    for step in range(STEPS):
        naive.update(set_whole(student, step))
        for buffer in ("running", "count"):
            buffers(student)[buffer].fill_(step)
        with CommDebugMode() as counted:
            ema.update()
        assert counted.get_total_counts() == 0
        if runs_forward(layout):
            twin.load_state_dict(naive.values, strict=False)
            torch.testing.assert_close(output(teacher), output(twin))
        assert_shows(teacher, naive.values)
        if runs_forward(layout):
            output(teacher)  # leaves FSDP's root gathered: the next update must drop that copy
        assert buffers(teacher)["count"] == step and (buffers(teacher)["running"] == step).all()
    whole = ema.full_state_dict()
    if dist.get_rank() == 0:
        for name, value in naive.values.items():
            assert torch.equal(whole[name], value), name


@pytest.mark.parametrize(("layout", "size"), CASES)
def test_the_teacher_equals_the_naive_average_and_runs_forward(world, layout, size) -> None:
    world(size).run(follow, layout)


def save(layout: str, path: str, aside: bool) -> None:
    """What a teacher holds, or an average kept aside."""
    if aside:
        student = build_layout(layout)
        ema = ShardedEMA(student, SCHEDULE)
    else:
        student, _, ema = taught(layout)
    for step in range(3):
        set_whole(student, step)
        buffers(student)["running"].fill_(7.0)
        ema.update()
    ema.save(path)


def load(layout: str, path: str) -> None:
    """Into a run that has begun or not; afterwards it goes on."""
    for updates_before in (0, 2):
        student, teacher, ema = taught(layout)
        for _ in range(updates_before):
            ema.update()
        ema.load(path)
        naive = NaiveAverage(SCHEDULE.momentum)
        for step in range(3):
            naive.update(set_whole(student, step))
        assert_shows(teacher, naive.values)
        assert (buffers(teacher)["running"] == 7.0).all(), "buffers come back before the first update too"
        naive.update(set_whole(student, 3))
        ema.update()
        assert_shows(teacher, naive.values)
        ema.start_from(path, num_updates=2)
        for step in range(3):
            naive = naive if step else NaiveAverage(SCHEDULE.momentum)
            naive.update(set_whole(student, step))
        assert_shows(teacher, naive.values)


@pytest.mark.parametrize(
    ("first", "size", "second", "other_size"),
    [
        ("ddp", 2, "ddp", 3),
        ("fsdp2", 2, "hsdp", 4),
        ("hsdp", 4, "fsdp1_orig", 2),
        ("fsdp1_hybrid", 4, "fsdp2", 1),
        ("fsdp2", 3, "fsdp1_hybrid", 4),
    ],
)
def test_a_teacher_is_saved_like_any_average_and_comes_back_on_every_replica(
    world, tmp_path: Path, first, size, second, other_size
) -> None:
    taught_path, aside = str(tmp_path / "taught"), str(tmp_path / "aside")
    world(size).run(save, first, taught_path, False)
    world(size).run(save, first, aside, True)
    for name in ("manifest.json", "model.safetensors"):
        assert (tmp_path / "taught" / name).read_bytes() == (tmp_path / "aside" / name).read_bytes()
    world(other_size).run(load, second, aside)


def replicas_before_the_first_update(layout: str) -> None:
    student, teacher, ema = taught(layout)
    live = set_whole(student, 3)
    ema.full_state_dict()  # shows the live model of this moment, as any average does
    assert_shows(teacher, live)
    ema.update()
    live = set_whole(student, 5)
    ema.restart()  # the average is forgotten at once: the teacher may run forward before the next update
    assert_shows(teacher, live)
    set_whole(student, 4)
    with ema.average_parameters():
        pass
    assert_shows(teacher, read_whole(student))


@pytest.mark.parametrize(("layout", "size"), [("ddp", 2), ("fsdp2", 2), ("hsdp", 4), ("fsdp1_orig", 2)])
def test_before_the_first_update_every_replica_of_the_teacher_is_the_live_model(world, layout, size) -> None:
    world(size).run(replicas_before_the_first_update, layout)


def swap_and_hand_over(layout: str) -> None:
    student, teacher, ema = taught(layout)
    for step in range(3):
        set_whole(student, step)
        ema.update()
    before, averaged = read_whole(student), read_whole(teacher)
    with ema.average_parameters():
        assert_shows(student, averaged)
    assert_shows(student, before)
    if not is_fsdp1(student):
        state = {name: value.clone() for name, value in ema.sharded_state_dict().items()}
        set_whole(student, 9)
        ema.update()
        ema.load_sharded_state_dict(state, num_updates=3)
        assert_shows(teacher, averaged)
    ema.copy_to_model()
    assert_shows(student, averaged)


@pytest.mark.parametrize(("layout", "size"), [("ddp", 2), ("fsdp2", 2), ("hsdp", 4), ("fsdp1_hybrid", 4)])
def test_a_teacher_is_swapped_and_handed_over_like_any_average(world, layout, size) -> None:
    world(size).run(swap_and_hand_over, layout)


class Byol(nn.Module):
    """What a teacher need not have beside what it must."""

    def __init__(self, *, predictor: bool = True, width: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
        if predictor:
            self.predictor = nn.Linear(width, width)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def test_a_teacher_need_not_have_what_is_excluded() -> None:
    student, teacher = Byol(), frozen(Byol(predictor=False))
    ema = ShardedEMA(student, ConstantSchedule(decay=0.9), into=teacher, exclude="predictor.*")
    student.encoder(torch.randn(8, 3))
    ema.update()
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, student.state_dict()[name])
    assert set(ema.full_state_dict()) == set(student.state_dict())


def test_an_update_before_the_first_step_gives_the_targets_of_an_update_in_the_forward() -> None:
    """mmpretrain updates in the forward, before the teacher runs; call 0 there copies the student as initialised."""
    student, teacher = nn.Linear(3, 3), frozen(nn.Linear(3, 3))
    ema, in_forward = ShardedEMA(student, SCHEDULE, into=teacher), NaiveAverage(SCHEDULE.momentum)
    ema.update()
    for step in range(STEPS):
        in_forward.update(read_whole(student))
        assert_shows(teacher, in_forward.values)  # what runs forward now
        set_whole(student, step)  # the optimizer's step
        ema.update()


def test_averaged_buffers_live_in_the_teacher_too() -> None:
    student, teacher = Byol(), frozen(Byol())
    ema = ShardedEMA(student, ConstantSchedule(momentum=0.5), into=teacher, update_buffers=True)
    ema.update()
    student.encoder[1].running_mean.fill_(1.0)
    student.encoder[1].num_batches_tracked.fill_(5)
    ema.update()
    assert (teacher.encoder[1].running_mean == 0.5).all() and teacher.encoder[1].num_batches_tracked == 5


@pytest.mark.parametrize("change", ["assign", "to"])
def test_memory_that_somebody_replaced_in_the_teacher_is_followed(change) -> None:
    student, teacher = Byol(), frozen(Byol())
    ema = ShardedEMA(student, ConstantSchedule(momentum=0.5), into=teacher)
    ema.update()
    ema.update()
    zeros = {name: torch.zeros_like(value) for name, value in teacher.state_dict().items()}
    if change == "assign":
        teacher.load_state_dict(zeros, assign=True)
    else:
        teacher.double().float().load_state_dict(zeros)
    ema.update()
    assert torch.equal(teacher.encoder[0].weight, student.encoder[0].weight * 0.5)


def test_a_float32_teacher_of_a_bfloat16_student_stays_accurate() -> None:
    student, teacher = Byol().bfloat16(), frozen(Byol())
    ema = ShardedEMA(student, ConstantSchedule(momentum=0.25), into=teacher, skip_nonfinite=True)
    ema.update()
    with torch.no_grad():
        student.predictor.weight.fill_(1.0)
        student.predictor.weight[0, 0] = torch.nan
    before = teacher.predictor.weight.clone()
    ema.update()
    expected = torch.lerp(before, torch.ones(4, 4), 0.25)
    expected[0, 0] = before[0, 0]
    assert torch.equal(teacher.predictor.weight, expected)
    assert ema.num_refused() == 1


def test_an_excluded_tensor_that_is_not_row_by_row_comes_back_into_the_teacher(tmp_path: Path) -> None:
    def pair() -> tuple[nn.Module, ShardedEMA]:
        student, teacher = Byol(width=5), frozen(Byol(width=5))
        for each in (student, teacher):
            each.predictor.weight.data = torch.randn(5, 5).t()
        return teacher, ShardedEMA(student, ConstantSchedule(decay=0.9), into=teacher, exclude="predictor.*")

    (saved, ema), (teacher, other) = pair(), pair()
    ema.save(tmp_path / "average")
    other.load(tmp_path / "average")
    assert torch.equal(teacher.predictor.weight, saved.predictor.weight)


def test_a_teacher_runs_with_the_live_values_of_what_a_checkpoint_did_not_have(tmp_path: Path) -> None:
    small = nn.ModuleDict({"encoder": nn.Linear(3, 4)})
    ShardedEMA(small, ConstantSchedule(decay=0.9)).save(tmp_path / "average")
    student = nn.ModuleDict({"encoder": nn.Linear(3, 4), "head": nn.Linear(300, 300)})
    teacher = frozen(nn.ModuleDict({"encoder": nn.Linear(3, 4), "head": nn.Linear(300, 300)}))
    ema = ShardedEMA(student, ConstantSchedule(decay=0.9), into=teacher)
    freed = [torch.full((300, 300), 7.0) for _ in range(4)]
    del freed  # what new memory then holds
    ema.load(tmp_path / "average", new="head.*")
    assert torch.equal(teacher.head.weight, student.head.weight)
    assert torch.equal(teacher.encoder.weight, small.encoder.weight)


def test_a_teacher_counts_what_its_first_copy_leaves_out_once() -> None:
    student, teacher = nn.Linear(3, 2), frozen(nn.Linear(3, 2))
    nn.init.constant_(student.bias, torch.inf)
    ema = ShardedEMA(student, ConstantSchedule(decay=0.9), into=teacher, skip_nonfinite=True)
    ema.full_state_dict()
    ema.restart()
    ema.update()
    assert ema.num_refused() == 2


def test_a_failed_load_leaves_the_teacher_alone(tmp_path: Path) -> None:
    student, teacher = Byol(), frozen(Byol())
    ema = ShardedEMA(student, ConstantSchedule(momentum=0.25), into=teacher)
    ema.save(tmp_path / "average")
    damaged = bytearray((tmp_path / "average" / "model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "average" / "model.safetensors").write_bytes(damaged)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with pytest.raises(Exception, match="damaged"):
        ema.load(tmp_path / "average")
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("make", "options", "error", "told"),
    [
        (lambda: frozen(Byol(predictor=False)), {}, UnsupportedModelError, r"lacks 2 averaged tensors.*exclude="),
        (lambda: frozen(Byol(width=5)), {}, UnsupportedModelError, "not laid out as in the model"),
        (lambda: frozen(Byol()).double(), {}, ConfigError, "expected the averaged dtype torch.float32"),
        (Byol, {}, ConfigError, r"requires_grad_\(False\)"),
        (lambda: frozen(Byol()), {"device": "cpu"}, ConfigError, "lies where it lies"),
    ],
    ids=["names", "shape", "dtype", "gradient", "device"],
)
def test_a_teacher_that_does_not_fit_is_refused(make, options, error, told) -> None:
    with pytest.raises(error, match=told):
        ShardedEMA(Byol(), ConstantSchedule(decay=0.9), into=make(), **options)


def test_a_teacher_holds_one_average_and_is_not_the_student() -> None:
    schedules = {"fast": ConstantSchedule(decay=0.9), "slow": ConstantSchedule(decay=0.99)}
    with pytest.raises(ConfigError, match="holds one average"):
        ShardedEMA(Byol(), schedules, into=frozen(Byol()))
    student = frozen(Byol())
    with pytest.raises(ConfigError, match="the model's own tensor"):
        ShardedEMA(student, schedules["fast"], into=student)


def refuse_other_layouts() -> str:
    student, teacher = build_layout("fsdp2"), frozen(bare("fsdp2"))
    settle(student)
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(student, SCHEDULE, into=teacher)
    return str(caught.value)


def test_a_teacher_laid_out_otherwise_is_refused_alike_on_every_rank(world) -> None:
    told = world(2).run(refuse_other_layouts)
    assert told[0] == told[1] and "Wrap both alike" in told[0]


def refused_on_replicas(layout: str) -> int:
    student = build_layout(layout)
    ema = ShardedEMA(student, SCHEDULE, into=build_layout(layout, seed=1, frozen=True), skip_nonfinite=True)
    for _ in range(2):
        with whole_parameters(student) as whole:
            whole["hidden.weight"].view(-1)[:3] = torch.inf
        ema.update()
    return ema.num_refused()


@pytest.mark.parametrize(("layout", "size"), [("ddp", 2), ("fsdp2", 2), ("hsdp", 4), ("fsdp1_hybrid", 4)])
def test_what_replicas_of_a_teacher_leave_out_is_counted_once(world, layout, size) -> None:
    assert world(size).run(refused_on_replicas, layout) == [6] * size
